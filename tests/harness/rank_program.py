"""What tests run on several processes: `torchrun ... rank_program.py FOLDER [TRIALS]`.

TRIALS is a JSON file of the arguments of trials by name; without it, everything that test_distributed.py looks at. On
more than two processes that is what depends on their number: which micro-batches each has, and the sums over them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.config.compose import load_run
from harness.errors import UserError
from harness.interface.data_order import Selection
from harness.interface.needs import Need
from harness.interface.step import ModelRunner
from harness.interface.submission import OptimizerSubmission
from harness.study.timing_run import measure_timings
from harness.trial.batch_norm import recompute_statistics
from harness.trial.distributed import init_distributed, shutdown
from harness.trial.trial import run_trial
from tests.conftest import TINY_GPT2, TINY_RESNET, TINY_VIT
from tests.harness.problem import context, make
from tests.submissions.parity import make_setup

FRAGILE = ["optimizer=any", "optimizer.class_path=tests.harness.seams.Fragile", "schedule.shape=constant"]
TRIALS = {
    "gpt2": [*TINY_GPT2, "workload.micro_batch=2", *FRAGILE],
    "resnet": [*TINY_RESNET, "workload.micro_batch=4", "optimizer=sgd"],
    "vit": [*TINY_VIT, "workload.micro_batch=4", "optimizer=powersgd"],
}


def what_a_step_offers(examples: int) -> dict[str, Any]:
    """Everything that the step context computes, on 16 examples or fewer in micro-batches of four."""
    evaluator, _ = make(micro_batch=4)
    evaluator.ranks = ranks = init_distributed()
    ctx = context(evaluator, *set(Need) - {Need.COMMUNICATION}, examples=examples)
    tensors: dict[str, Any] = {}
    tensors["loss"] = ctx.backward()
    tensors["gradients"] = [p.grad for p in evaluator.parameters]
    tensors["buffers"] = [b.clone() for b in evaluator.buffers]
    tensors["elsewhere"] = ctx.gradients(params=[p.detach() + 0.1 for p in evaluator.parameters])
    tensors["sampled"] = ctx.gradients(labels="sampled")
    tensors["sampled loss"] = ctx.loss(labels="sampled")
    tensors["product"] = ctx.hessian_vector_product([torch.ones_like(p) for p in evaluator.parameters])
    tensors["pieces"] = [gradient for piece in ctx.micro_batch_gradients() for gradient in piece]
    tensors["gradients of the pieces together"] = [p.grad for p in evaluator.parameters]
    if examples == 16:  # BatchNorm needs two examples in each
        tensors["smaller pieces"] = [gradient for piece in ctx.micro_batch_gradients(at_least=8) for gradient in piece]
    tensors["buffers after"] = [b.clone() for b in evaluator.buffers]
    counters = evaluator.counters
    tensors["counters"] = torch.tensor([counters.forward_examples, counters.backward_examples])
    local_context = context(evaluator, Need.COMMUNICATION, examples=examples)
    local_context.backward()
    local_gradients = [torch.zeros_like(p) if p.grad is None else p.grad / ranks.size for p in evaluator.parameters]
    ranks.all_reduce_sum_(local_gradients)
    tensors["mean of the ranks' own gradients"] = local_gradients
    recompute_statistics(evaluator, [Selection(torch.arange(examples), torch.arange(examples))])
    tensors["buffers recalibrated"] = [b.clone() for b in evaluator.buffers]
    tensors["weights after closures"] = what_closures_make(evaluator, examples)
    return tensors


def what_closures_make(evaluator: ModelRunner, examples: int) -> list[Tensor]:
    """The weights after steps of an optimizer that evaluates each batch several times and keeps what it found."""
    named = dict(evaluator.model.named_parameters())
    optimizer = torch.optim.LBFGS(named.values(), lr=0.1, max_iter=4)
    submission = OptimizerSubmission(make_setup(named), [optimizer], closure=True)
    for _ in range(3):
        submission.step(context(evaluator, Need.RE_EVALUATE, examples=examples))
        evaluator.counters.update_steps += 1
    return [parameter.detach() for parameter in named.values()]


def what_one_rank_finds(folder: Path) -> None:
    """A mistake that the last rank alone can see is the same UserError on all, and they are still together."""
    ranks = init_distributed()
    (folder / "no folder").touch()
    records = folder / ("no folder" if ranks.rank == ranks.size - 1 else "records")
    try:
        run_trial(load_run([*TRIALS["gpt2"], f"records={records}"]))
    except UserError as error:
        messages = error.messages
    assert all(each == messages for each in ranks.all_gather(messages))
    assert len(messages) == 1 and "cannot be used" in messages[0]
    assert not (folder / "records").exists()


def main(folder: Path) -> None:
    ranks = init_distributed()
    for examples in (16, 14, 8, 3):
        tensors = what_a_step_offers(examples)
        if ranks.is_main:
            torch.save(tensors, folder / f"step_{examples}.pt")
    if ranks.size > 2:
        run_all({"gpt2": TRIALS["gpt2"]}, folder)
        shutdown(0)
    if ranks.size > 1:
        what_one_rank_finds(folder)
    runs = {name: load_run([*TINY_GPT2, "workload.micro_batch=2", f"optimizer={name}"]) for name in ("sgd", "lion")}
    rows = measure_timings(runs, rounds=3, seconds_per_segment=0.01, report=lambda line: None)
    assert (
        ranks.all_gather(len(rows)) == [6] * ranks.size and len(set(ranks.all_gather(int(rows["steps"].iloc[0])))) == 1
    )
    run_all(TRIALS, folder)
    shutdown(0)


def run_all(trials: dict[str, list[str]], folder: Path) -> None:
    for name, arguments in trials.items():
        run_trial(load_run([*arguments, f"records={folder / name}", "machine=here", "checkpoint_seconds=0"]))


if __name__ == "__main__":
    if len(sys.argv) == 2:
        main(Path(sys.argv[1]))
    else:
        run_all(json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[1]))
        shutdown(0)
