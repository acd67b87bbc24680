"""One trial: training, clock, record, ranks, hardware, trackers, and the conformance checks of a submission.

It may import records, config and interface. It does not know studies: the rule that may stop a trial early
is passed to it.
"""

from harness import renamed

__getattr__ = renamed.names("harness.trial")
