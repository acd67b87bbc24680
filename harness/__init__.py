"""Pacemark's harness: training, time, records, tuning and scoring. It knows no workload and no optimizer by name.

Seven rooms; imports go from a room to those listed after it, never back (checked in CI, see [tool.importlinter] in
pyproject.toml):

    board       tables, documents and pages of a leaderboard
    study       many trials: ledger, workers, executors, pruning, targets, timing runs
    trial       one trial: training, clock, record, hardware, trackers
    scoring     records to a leaderboard: times, scores, intervals
    records     what lies on disk: folders, manifests, evaluations, leases
    config      the configuration of a trial: schema, composition, search spaces
    interface   what authors of submissions and workloads import

and below all of them seeding, files, processes, hashing, command_line, log, display, errors and version. board and
study do not know each other, nor do trial and scoring.
"""

if __name__ != "harness":
    raise ImportError(f"{__name__} is the package `harness`; import pacemark first, then harness")

from harness.renamed import install_import_hook

install_import_hook()
