"""Whether torch.compile makes an elementwise update faster, and what compiling costs.

    python benchmarks/compiled_update.py [--names NAME ...] [--steps 12]

Processor time on one thread, 10.8M parameters in 100 tensors. The update of one flat tensor of any length is compiled
and called for each of them. Learning rate and age are read from a tensor within it, so that they are not constants that
every step would compile anew; two graphs are left, as weight decay is a constant. A step takes as many words of memory
as it reads and writes: AdamW seven per parameter (θ, m and v both ways, g).
"""

from __future__ import annotations

import argparse
import statistics
from time import perf_counter, process_time
from typing import Any

import torch
from optimizer_step import contestants
from torch import Tensor
from torch._dynamo import config
from torch._dynamo.utils import counters

from submissions.rule import Rule, Slice

NAMES = ["lion", "adabelief", "adan", "ademamix", "adopt", "diffgrad", "grams", "amsbound"]


class Compiled:
    """In the place of `Rule.step`."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.updates = [torch.compile(self._update(group), dynamic=True, fullgraph=True) for group in rule.param_groups]

    def _update(self, group: dict[str, Any]) -> Any:
        constant = {name: value for name, value in group.items() if name not in ("params", "lr")}

        def update(theta: Tensor, g: Tensor, state: dict[str, Tensor], numbers: Tensor) -> None:
            t, lr = numbers[0].item(), numbers[1].item()
            torch._check(t > 1)
            at = Slice([theta], [theta], [g], t, [state], constant | {"lr": lr})  # type: ignore[arg-type]
            self.rule.apply(at, self.rule.direction(at))

        return update

    @torch.no_grad()
    def __call__(self, closure: None = None) -> None:
        for update, group in zip(self.updates, self.rule.param_groups, strict=True):
            for at in self.rule._slices(group):
                numbers = torch.tensor([at.t, at["lr"]], dtype=torch.float64)
                for theta, g, state in zip(at.theta, at.g, at.states, strict=True):
                    flat = {name: value.view(-1) for name, value in state.items() if isinstance(value, Tensor)}
                    update(theta.detach().view(-1), g.view(-1), flat, numbers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", default=NAMES, metavar="NAME")
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    config.capture_scalar_outputs = config.specialize_float = True
    print(f"{'submission':16}{'eager':>8}{'compiled':>10}{'AdamW':>8}{'words':>7}{'compiling, s':>14}{'graphs':>8}")
    for name in options.names:
        torch.set_num_threads(1)
        torch._dynamo.reset()
        counters.clear()
        found = contestants(name, "gpt")
        torch.set_num_threads(1)

        def milliseconds(who: str, found: dict[str, Any] = found) -> float:
            return 1000 * statistics.median(found[who].run(options.steps, process_time))

        eager, adamw = milliseconds("ours"), milliseconds("AdamW")
        ours: Any = found["ours"]
        (rule,) = ours.training.submission.optimizers
        rule.step = Compiled(rule)
        start = perf_counter()
        try:
            list(ours.run(1, process_time))
        except Exception as error:  # of many kinds, one for each stage of the compiler
            print(f"{name:16}{eager:8.1f}  does not compile: {type(error).__name__}", flush=True)
            continue
        compiling, compiled = perf_counter() - start, milliseconds("ours")
        words = 3 + 2 * round(found["ours"].state_bytes() / 4 / sum(p.numel() for p in found["ours"].parameters))
        graphs = counters["stats"]["unique_graphs"]
        print(f"{name:16}{eager:8.1f}{compiled:10.1f}{adamw:8.1f}{words:7}{compiling:14.1f}{graphs:8}", flush=True)


if __name__ == "__main__":
    main()
