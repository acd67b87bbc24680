"""Make a learning-rate schedule from the gradient norms of one run (how and why: harness/trial/refined_schedule.py).

    python scripts/refine_schedule.py NAME workload=gpt2 optimizer=adamw [--weights adam | sgd] [--smoothing 0.1]
                                      [KEY=VALUE ...]

Trains the workload once, with linear decay over the whole budget, and writes configs/schedule/NAME.yaml; then
`python run.py workload=gpt2 optimizer=adamw schedule=NAME` uses it. That run is tuning, and no record of it is kept:
count it where the number of trials matters. Give a `seed=` that serves no study.
"""

from __future__ import annotations

import argparse
import sys

from harness.command_line import run_script
from harness.config.choices import CONFIG_DIR
from harness.config.compose import load_run
from harness.errors import UserError
from harness.trial.environment import configure_torch, select_device
from harness.trial.refined_schedule import gradient_norms, refine_schedule
from harness.trial.training import Training
from harness.trial.trial import load_workload


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--weights", choices=("adam", "sgd"), default="adam")
    parser.add_argument("--smoothing", type=float, default=0.1)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    # Intermixed, since a KEY=VALUE can stand before or after an option.
    options = parser.parse_intermixed_args(arguments)
    path = CONFIG_DIR / "schedule" / f"{options.name}.yaml"
    if path.exists():
        raise UserError(f"{path} exists; choose another name or remove it")
    if not 0 < options.smoothing < 1:
        raise UserError(f"--smoothing {options.smoothing}: must lie in (0, 1), the median's share of the run")
    run = load_run(["schedule=linear", "schedule.horizon_fraction=1.0", *options.settings])
    device = select_device(run)
    configure_torch(run, device)
    training = Training(run, load_workload(run, device), device)
    training.build()
    factors = refine_schedule(gradient_norms(training, options.weights), options.weights, options.smoothing)
    lines = [", ".join(f"{factor:g}" for factor in factors[k : k + 16]) for k in range(0, len(factors), 16)]
    path.write_text(
        f"# refined from the gradient norms of {run.optimizer.name} on {run.spec.full_name}, seed {run.seed}\n"
        "shape: table\n"
        "warmup_fraction: 0.0\n"
        "horizon_fraction: 1.0\n"
        "table: [\n    " + ",\n    ".join(lines) + ",\n]\n"
    )
    position = factors.index(max(factors)) / (len(factors) - 1)
    print(f"written: {path}; the largest factor is at {position:.0%} of the run")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
