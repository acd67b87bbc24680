"""Make a learning-rate schedule from the gradient norms of one run (harness/refined_schedule.py says how and why).

    python scripts/refine_schedule.py NAME workload=gpt2 optimizer=adamw [--weights adam | sgd] [--smoothing 0.1]
                                      [KEY=VALUE ...]

Trains the workload once, with linear decay over the whole budget, and writes configs/schedule/NAME.yaml; then
`python run.py workload=gpt2 optimizer=adamw schedule=NAME` uses it. That run is tuning and no record of it is kept:
count it where the number of trials matters. `seed=` should be one that serves no study.
"""

from __future__ import annotations

import argparse
import sys

from harness.choices import CONFIG_DIR
from harness.config import load
from harness.environment import configure_torch, device_of
from harness.hyperparameters import import_class
from harness.problems import UserError, reporting
from harness.refined_schedule import gradient_norms, refined
from harness.training import Training


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--weights", choices=("adam", "sgd"), default="adam")
    parser.add_argument("--smoothing", type=float, default=0.1)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_intermixed_args()
    path = CONFIG_DIR / "schedule" / f"{options.name}.yaml"
    if path.exists():
        raise UserError(f"{path} exists; choose another name or remove it")
    if not 0 < options.smoothing < 1:
        raise UserError(f"--smoothing {options.smoothing}: must lie in (0, 1), the median's share of the run")
    run = load(["schedule=linear", "schedule.horizon_fraction=1.0", *options.settings])
    device = device_of(run)
    configure_torch(run, device)
    workload = import_class(run.facts.class_path, "workload.class_path")(run.facts)
    workload.load(run.data, device)
    training = Training(run, workload, device)
    training.build()
    factors = refined(gradient_norms(training, options.weights), options.weights, options.smoothing)
    lines = [", ".join(f"{factor:g}" for factor in factors[k : k + 16]) for k in range(0, len(factors), 16)]
    path.write_text(
        f"# refined from the gradient norms of {run.optimizer.name} on {run.facts.full_name}, seed {run.seed}\n"
        "shape: table\n"
        "warmup_fraction: 0.0\n"
        "horizon_fraction: 1.0\n"
        "table: [\n    " + ",\n    ".join(lines) + ",\n]\n"
    )
    print(
        f"wrote {path}; the largest factor stands at {factors.index(max(factors)) / (len(factors) - 1):.0%} of the run"
    )
    return 0


if __name__ == "__main__":
    sys.exit(reporting(main))
