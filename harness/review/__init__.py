"""Whether records can be believed and compared: what in them contradicts itself, the configs or the other records.

`review.review` runs all checks; there is one file for each kind. A board refuses what is `refused`; a person reads the
rest (docs/fair_play.md). Nothing here imports torch or anything that a record names.
"""
