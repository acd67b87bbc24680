"""Make the table of docs/any_optimizer.md: every optimizer class of the installed libraries, and what comes of it.

    pip install --no-deps torch pytorch_optimizer timm schedulefree prodigyopt dog-optimizer momo-opt dadaptation \\
        heavyball bitsandbytes torchao lion-pytorch adan-pytorch sophia-opt came-pytorch einops
    python scripts/any_optimizer.py [--check] [LIBRARY ...]

Each class is configured as a user would do it, `optimizer=any optimizer.class_path=CLASS`, and trained for some steps
of a small GPT-2, with an interruption from which it must resume to the bit. Where it is refused, the option that the
message names is added, and it is tried again. Code that a library compiles runs uncompiled here. About ten minutes.

--check prints what would change. With names of libraries only these are tried, and nothing is written.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import io
import multiprocessing
import re
import shlex
import sys
import types
import warnings
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from harness.board.generated_docs import update_document
from harness.command_line import run_script
from harness.config.compose import load_run
from harness.config.probe import examine
from harness.errors import UserError
from harness.trial.training import Training
from harness.trial.trial import load_workload
from harness.trial.weights import hash_weights

ROOT = Path(__file__).parents[1]
LIBRARIES = (
    "torch.optim", "pytorch_optimizer", "timm.optim", "heavyball", "bitsandbytes.optim", "torchao.optim",
    "schedulefree", "momo", "dadaptation", "dog", "prodigyopt", "lion_pytorch", "adan_pytorch",
    "sophia_opt", "came_pytorch",
)  # fmt: skip
STEPS = 6
"""Steps of a class, the first half of them before the interruption."""
LATEST_START = 15
"""Steps after which a class must have moved the weights."""
SECONDS = 300
"""After which a class is given up."""
_SMALL = (
    "workload=gpt2", "workload.nominal_batch=4", "workload.micro_batch=2", "workload.eval_every=1",
    "workload.max_steps=20", "device=cpu", "optimizer=any",
)  # fmt: skip
_VALUES = {
    "rank": "8", "update_proj_gap": "50", "scale": "1.0", "projection_type": "std", "sn": "true", "normalized": "true",
    "num_data": "512", "num_iterations": "20", "lr": "0.001", "VALUE": "1",
}  # fmt: skip
"""What is put where a message says VALUE."""
_ROUNDS = 4
"""How many messages are followed."""


@dataclass(frozen=True)
class Outcome:
    """What came of a class."""

    path: str
    kind: str
    """trains, with options, refused, fails, or undecided."""
    options: tuple[str, ...] = ()
    text: str = ""
    """The message that it ends with, or remarks."""


def list_classes(library: str) -> list[str]:
    """The import paths of the optimizers of a library; empty where it is not installed."""
    modules = [library]
    if library == "timm.optim":
        modules = _modules_of_timm()
    classes: dict[type[Any], str] = {}
    for name in modules:
        try:
            module = importlib.import_module(name)
        except Exception as error:
            print(f"without {name}: {error}", file=sys.stderr)
            continue
        for attribute, cls in vars(module).items():
            if not isinstance(cls, type) or not issubclass(cls, torch.optim.Optimizer):
                continue
            is_elsewhere = library == "timm.optim" and cls.__module__ != name
            if not is_elsewhere and not attribute.startswith("_") and _is_complete(cls):
                classes.setdefault(cls, f"{name}.{attribute}")
    return sorted(classes.values(), key=str.lower)


def _is_complete(cls: type[Any]) -> bool:
    """Whether it is no mere base of others, which has no step."""
    return cls.step is not torch.optim.Optimizer.step and not getattr(cls, "__abstractmethods__", None)


def _modules_of_timm() -> list[str]:
    """The modules of timm's optimizers, importable also without torchvision, which its models ask for."""
    spec = importlib.util.find_spec("timm")
    if spec is None or not spec.submodule_search_locations:
        return ["timm.optim"]
    folder = Path(next(iter(spec.submodule_search_locations)))
    if importlib.util.find_spec("torchvision") is None:
        for name, path in (("timm", folder), ("timm.optim", folder / "optim")):
            package = types.ModuleType(name)
            package.__path__ = [str(path)]
            sys.modules[name] = package
    return [f"timm.optim.{path.stem}" for path in sorted((folder / "optim").glob("[a-z]*.py"))]


# ---- one class -----------------------------------------------------------------------------------------------------


def try_class(path: str) -> Outcome:
    """What comes of a class, with the options that the messages name."""
    options: list[str] = []
    for _ in range(_ROUNDS):
        try:
            run = load_run([*_SMALL, f"optimizer.class_path={path}", *options])
        except UserError as error:
            text = error.messages[0]
            named = [option for message in error.messages for option in _remedy(message)]
            further = [option for option in named if option not in options]
            if not further:
                return Outcome(path, "refused", tuple(options), text)
            options += further
            continue
        except Exception as error:
            return Outcome(path, "fails", tuple(options), f"{type(error).__name__}: {error}")
        try:
            resumes = _train(run)
        except Exception as error:
            return Outcome(path, "fails", tuple(options), f"{type(error).__name__}: {str(error).splitlines()[0]}")
        remarks = list(examine(run).remarks)
        if not resumes and not any("interrupted" in remark for remark in remarks):
            return Outcome(path, "fails", tuple(options), "does not resume to the bit, and nothing says so")
        return Outcome(path, "with options" if options else "trains", tuple(options), "; ".join(remarks))
    return Outcome(path, "refused", tuple(options), text)


def _remedy(message: str) -> list[str]:
    """The options that a message tells to add, with values in place of VALUE."""
    _, separator, text = message.partition("; add ")
    if not separator or not text.startswith(("optimizer.", "schedule")):
        return []
    text = text.replace("ROLE", "hidden_matrix")
    text = re.sub(r"(\w+)([=:] ?)VALUE", lambda match: match[1] + match[2] + _VALUES.get(match[1], "1"), text)
    return shlex.split(text)


def _train(run: Any) -> bool:
    """Train some steps; whether an interrupted training ends with the same bits."""
    straight = _built(run)
    start = hash_weights(straight.runner.model)
    straight.segment(STEPS // 2 * 4, charge_compile=False)
    with straight.submission.evaluation_weights():
        pass
    straight.state_bytes()
    buffer = io.BytesIO()
    torch.save(straight.state_dict(), buffer)
    loss = straight.segment(STEPS * 4, charge_compile=False)
    end = hash_weights(straight.runner.model)
    if not loss.isfinite():
        raise ValueError(f"its loss is {float(loss)} after {STEPS} steps")
    if end == start:
        # Some begin when they have seen several gradients.
        straight.segment(LATEST_START * 4, charge_compile=False)
        if hash_weights(straight.runner.model) == start:
            raise ValueError(f"the weights have not moved in {LATEST_START} steps")
    buffer.seek(0)
    resumed = _built(run)
    resumed.load_state_dict(torch.load(buffer, map_location="cpu", weights_only=True))
    resumed.segment(STEPS * 4, charge_compile=False)
    return end == hash_weights(resumed.runner.model)


def _built(run: Any) -> Training:
    training = Training(run, _workload(), torch.device("cpu"))
    training.build()
    return training


@cache
def _workload() -> Any:
    return load_workload(load_run([*_SMALL, "optimizer.class_path=torch.optim.SGD"]), torch.device("cpu"))


def _try_apart(path: str, channel: Any) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with torch.compiler.set_stance("force_eager"):
        channel.send(try_class(path))


def try_in_process(path: str) -> Outcome:
    """As `try_class`, in a process of its own, so that a class can neither hang nor change the next one."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_try_apart, args=(path, sender))
    process.start()
    sender.close()
    try:
        if receiver.poll(SECONDS):
            outcome = receiver.recv()
            assert isinstance(outcome, Outcome)
            return outcome
        return Outcome(path, "undecided", text=f"not done after {SECONDS} s")
    except EOFError:
        return Outcome(path, "fails", text="its process ended")
    finally:
        process.kill()
        process.join()


# ---- the table -----------------------------------------------------------------------------------------------------

_SHOWN = {
    "trains": "trains",
    "with options": "trains with the options that the message names",
    "refused": "refused before data are loaded",
    "fails": "fails in training",
    "undecided": "undecided",
}


def format_table(outcomes: list[Outcome]) -> str:
    """Counts by library, then a row for each class that takes more than its class path."""
    counts: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        counts.setdefault(_library(outcome), Counter())[outcome.kind] += 1
    kinds = [kind for kind in _SHOWN if any(kind in count for count in counts.values())]
    lines = [f"| library | classes | {' | '.join(_SHOWN[kind] for kind in kinds)} |", "|---" * (len(kinds) + 2) + "|"]
    for library, count in counts.items():
        cells = " | ".join(str(count[kind]) for kind in kinds)
        lines.append(f"| {library} | {count.total()} | {cells} |")
    total = sum(counts.values(), Counter[str]())
    lines.append(f"| **all** | {total.total()} | {' | '.join(str(total[kind]) for kind in kinds)} |")
    lines += ["", "These train by their class path alone:", ""]
    for library in counts:
        plain = [o for o in outcomes if o.kind == "trains" and not o.text and _library(o) == library]
        if plain:
            lines.append(f"- {library}: {', '.join(o.path.rpartition('.')[2] for o in plain)}")
    lines += ["", "And these take more, or something is said of them:", "", "| class | outcome | options | said |"]
    lines.append("|---|---|---|---|")
    for outcome in outcomes:
        if outcome.kind != "trains" or outcome.text:
            options = " ".join(f"`{option}`" for option in outcome.options)
            text = outcome.text.removeprefix(f"optimizer.class_path={outcome.path}: ")
            lines.append(f"| {outcome.path} | {outcome.kind} | {_cell(options)} | {_cell(text)} |")
    return "\n".join(lines) + "\n"


def _library(outcome: Outcome) -> str:
    return next(library for library in LIBRARIES if outcome.path.startswith(f"{library}."))


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the document instead of writing it")
    parser.add_argument("libraries", nargs="*", metavar="LIBRARY", help=f"one of {', '.join(LIBRARIES)}")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    _workload()
    outcomes = []
    for library in options.libraries or LIBRARIES:
        for path in list_classes(library):
            outcomes.append(try_in_process(path))
            last = outcomes[-1]
            print(f"{last.kind:12} {path} {' '.join(last.options)} {last.text[:300]}", file=sys.stderr, flush=True)
    table = format_table(outcomes)
    if options.libraries:
        print(table)
        return 0
    document = ROOT / "docs" / "any_optimizer.md"
    return update_document(document, table, "python scripts/any_optimizer.py", check=options.check)


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
