"""Command lines that nobody should type: each is run or refused with exit status 2, and nothing is written.

Seeded, so that a failure repeats. FUZZ_CASES=3000 makes a long run of it, FUZZ_SEED another one.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import traceback
from pathlib import Path

import pytest

from harness.command_line import run_script
from harness.config.choices import GROUPS, list_choices
from harness.config.compose import load_run
from harness.config.options import parse_options
from harness.config.study_trials import list_trials
from harness.errors import UserError
from harness.records.layout import RecordPath
from scripts import run as command

CASES = int(os.environ.get("FUZZ_CASES", "120"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
BATCHES = 4

KEYS = [
    *GROUPS, "variant", "+experiment", "seed", "trial", "pruning", "device", "precision", "compile", "deterministic",
    "threads", "judge", "run_to_end", "data", "records", "machine", "label", "overwrite", "checkpoint_seconds", "debug",
    "modified", "shipped", "overridden", "nonsense", "hydra.run.dir", "hydra",
    *(f"workload.{key}" for key in (
        "name", "variant", "held_out", "description", "class_path", "version", "metric", "direction", "target",
        "target_version", "target_provenance", "nominal_batch", "micro_batch", "max_steps", "eval_every", "max_seconds",
        "memory_format", "model", "data", "model.width", "model.heads", "model.layers", "data.blocks", "data.x.y",
    )),
    *(f"optimizer.{key}" for key in (
        "name", "description", "paper", "class_path", "wrappers", "paper_defaults", "recipe", "recipe.hyperparameters",
        "recipe.schedule", "recipe.warmup_fraction", "recipe.clip_norm", "hyperparameters", "hyperparameters.lr",
        "hyperparameters.betas", "hyperparameters.weight_decay", "search_space", "search_space.points",
        "search_space.hyperparameters", "search_space.hyperparameters.lr", "clip_norm", "no_decay", "needs", "closure",
    )),
    *(f"schedule.{key}" for key in (
        "shape", "warmup_fraction", "horizon_fraction", "decay_fraction", "step_count", "step_factor", "cycles",
        "cycle_factor", "table", "final_fraction", "tail", "power", "rest_decay_fraction", "scale_weight_decay",
    )),
    *(f"ruleset.{key}" for key in ("name", "studies", "trials", "points", "budget_factor", "judge", "retries")),
    *(f"executor.{key}" for key in ("name", "workers", "options", "minutes", "stall_minutes")),
    *(f"tracker.{key}" for key in ("name", "project", "mode", "folder")),
    "scale.name", "scale",
]  # fmt: skip
VALUES = [
    "", "x", "0", "-1", "1", "3", "00", "1e3", "1e20", "1e400", "-1e400", "nan", "inf", "-inf", "99999999999999999999",
    "0.5", "true", "null", "'null'", "???", "''", "[]", "[1]", "[1,2]", "[[1],[2]]", "{}", "{a: 1}", "{a: {b: [1]}}",
    "{1: 2}", "{lr: {log: [1e-3, 1e-1]}}", "{log: [1, 0]}", "{log: [nan, 1]}", "{choices: []}", "{linear: x}",
    "{points: 3}", "{points: [{hyperparameters: 3}]}", "{points: [3]}", "{hyperparameters: {lr: {integer: [1, 1e99]}}}",
    "${nothere}", "${workload}", "${workload.name}", "${oc.env:NOPE}", "${oc.env:HOME}", "${seed}", "${optimizer}",
    "${oc.decode:x}", "${", "$", "\\", "a b", "a=b", "../..", "/", "/dev/null", "/etc/passwd", "~", "-", "--help",
    "torch.optim.SGD", "torch.nn.Linear", "subprocess.Popen", "..x.Y", ".x", "x.", "os", "collections.abc.Mapping",
    "typing.Any", "workloads.gpt2.GPT2", "harness.interface.workload.Workload", "torch.optim.Optimizer",
    "harness.interface.submission.Submission", "harness.interface.submission.Wrapper", "[torch.optim.SGD]",
    "[harness.interface.submission.Wrapper]", "int", "builtins.int", "builtins.type", "enum.Enum", "adamw", "gpt2",
    "cuda", "cuda:99", "cpu", "external", "slurm", "ray", "glob(*)", "glob(", "interval(0,1)", "range(0,3)",
    "range(0,1e400)", "range(0,1,0)", "choice(1,2)", "1,2", "tag(x,1)", "sort(3,1)", "shuffle(1,2)", "str(1)",
    "int(x)", "float(inf)", "json_str({})", "x" * 300, "9" * 5000, "[" * 200 + "]" * 200, "\N{SNOWMAN}", "\ufeff1",
    "a\tb", "\x00", "\ud800", "４", "4090", "1_000", "0x10", "1:30", "yes", "2026-01-01", "!!python/object:os.system",
]  # fmt: skip
FORMS = ["{key}={value}"] * 12 + ["+{key}={value}", "++{key}={value}", "~{key}", "~{key}={value}", "{key}@x={value}",
         "{key}", "{value}", "{key}.{value}=1", "{key}={value}={value}", "{key}.x.y={value}", "{key}[0]={value}",
         "{key}.0={value}", " {key} = {value} "]  # fmt: skip


def draw(source: random.Random) -> tuple[list[str], bool]:
    """The arguments of a command, and whether it is a sweep."""
    arguments = []
    if source.random() < 0.95:
        arguments.append(f"workload={source.choice(list_choices('workload'))}")
    if source.random() < 0.95:
        arguments.append(f"optimizer={source.choice(['adamw', 'any', 'lion', 'sam', 'muon'])}")
    if source.random() < 0.2:
        arguments.append("ruleset=external")
    for _ in range(source.choice([1, 1, 1, 2, 3])):
        form = source.choice(FORMS)
        arguments.append(form.format(key=source.choice(KEYS), value=source.choice(VALUES)))
    return arguments, source.random() < 0.2


def try_command(arguments: list[str], is_sweep: bool) -> str | None:
    """What is wrong with how a command is taken; None if nothing is."""
    printed, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        try:
            if is_sweep:
                status = run_script(lambda line: len(command._load_sweep(line)) * 0, arguments)
            else:
                status = run_script(command.main, ["--show", *arguments])
        except BaseException:
            return traceback.format_exc()
    lines = [line for line in errors.getvalue().splitlines() if line.startswith("error: ")]
    if status not in (0, 2) or (status == 2) != bool(lines):
        return f"status {status}, {errors.getvalue()}"
    if any(len(line) > 2000 for line in lines) and max(map(len, arguments)) < 1000:
        return f"too long: {max(lines, key=len)[:500]}"
    if status == 0 and not is_sweep:
        return check_accepted(arguments)
    return None


def check_accepted(arguments: list[str]) -> str | None:
    """What is wrong with a configuration that was taken: it must have a place, trials and an identity."""
    try:
        options = parse_options(arguments)
        if options.help or options.version:
            return None
        run = load_run(options.overrides)
        path = RecordPath.of_run(run, "here")
        path.folder.exists()
        json.dumps(run.identity(), allow_nan=False)
        assert list_trials(run) and run.spec.max_steps
    except UserError as error:
        return f"shown, and then refused: {error}"
    except Exception:
        return traceback.format_exc()
    return None


@pytest.mark.parametrize("batch", range(BATCHES))
def test_every_command_line_is_taken_or_refused(batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = random.Random(f"{SEED} {batch}")
    problems: dict[str, list[str]] = {}
    for _ in range(CASES // BATCHES):
        arguments, is_sweep = draw(source)
        problem = try_command(arguments, is_sweep)
        if problem is not None:
            # By the last line, so that a class of them is one.
            problems.setdefault(problem.strip().splitlines()[-1][:80], [repr(arguments), problem[-1500:]])
    assert not problems, "\n\n".join("\n".join(lines) for lines in problems.values())
    assert not list(tmp_path.iterdir()), "something was written"
