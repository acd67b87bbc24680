"""Loaded last by the process from which `forked` takes its processes: what most of them would begin with."""

import gc

from harness.config.compose import load_run

load_run(["workload=gpt2", "optimizer=adamw"])
# Otherwise the first collection of garbage in each process looks through all that is loaded, for as long as a trial.
gc.collect()
gc.freeze()
