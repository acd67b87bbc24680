"""From records to a leaderboard: reading them, times to target, scores, intervals, tunability, and their assembly.

It may import records, config and interface. It trains nothing and writes no file but its own table of trials.
"""

from harness import renamed

__getattr__ = renamed.names("harness.scoring")
