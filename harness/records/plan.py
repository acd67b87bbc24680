"""plan_<workload>.json: the trials of a study that are planned, before the first of them has begun."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from harness.errors import UserError

PLAN_FORMAT = "pacemark-plan"
PLAN_FORMAT_VERSION = 1


def parse_plan(content: bytes, path: Path) -> dict[str, Any]:
    """The content of the plan at `path`: `identity`, `trials` as pairs of study and number, `overridden`, `config`.
    Raises UserError if it is damaged or of another format."""
    try:
        plan = json.loads(content)
        if plan["format"] != PLAN_FORMAT or plan["format_version"] != PLAN_FORMAT_VERSION:
            raise ValueError("of another format or version")
        return dict(plan)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove it, and the same command plans again") from error
