"""Many trials: the ledger of planned trials, workers and executors that run it, pruning, targets, timing runs.

It may import trial, scoring, records, config and interface.
"""

from harness import renamed

__getattr__ = renamed.names("harness.study")
