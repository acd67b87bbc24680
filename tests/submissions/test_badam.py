from __future__ import annotations

from typing import Any

import torch

from submissions.badam import BAdam
from tests.submissions.parity import ParityContext, make_parameters, make_setup

NAMES = ("embedding", "blocks.0.weight", "blocks.0.bias", "blocks.1.weight", "head")


def test_one_block_at_a_time_with_fresh_moments() -> None:
    """Against AdamW on the block whose turn it is, from zero moments at each turn."""
    shapes = ((4, 3), (3, 3), (3,), (3, 3), (4, 3))
    ours, theirs = make_parameters(torch.float64, shapes), make_parameters(torch.float64, shapes)
    submission = BAdam(make_setup(dict(zip(NAMES, ours, strict=True))), lr=0.1, weight_decay=0.1, switch_every=2)
    assert len(submission.blocks) == 3
    blocks = [[theirs[NAMES.index(name)] for name in names] for names in submission.blocks]
    turns = []
    adamw: Any = None
    for step in range(14):
        context: Any = ParityContext(ours, step)
        submission.step(context)
        if step % 2 == 0:
            turns.append(submission.order[step // 2 % 3])
            adamw = torch.optim.AdamW(blocks[turns[-1]], lr=0.1, weight_decay=0.1, fused=True)
        ParityContext(theirs, step).backward()
        adamw.step()
        torch.testing.assert_close([p.detach() for p in ours], [p.detach() for p in theirs])
    # Each block has its turn before any has a second one.
    assert sorted(turns[:3]) == sorted(turns[3:6]) == [0, 1, 2]
