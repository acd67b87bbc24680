"""How numbers look on the page, and the rows of its tables."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml

from harness.records.status import DISPLAY_ORDER, SCORED, Status

UNKNOWN = "–"
STYLED_STATUSES = (*SCORED, Status.STOPPED)
"""Statuses that have a class in page.css."""

# Colour, dash and marker repeat with 8, 5 and 7, so the first 280 submissions differ in how they are drawn, and the
# first 40 in colour and dash alone. The colours are in page.css; plots.js has the same dashes and markers.
DASHES = ("", "6 3", "2 3", "9 3 2 3", "12 4")
MARKERS = (
    "M14 2.5a3.5 3.5 0 1 0 0 7a3.5 3.5 0 1 0 0-7z",
    "M11 3h6v6h-6z",
    "M14 1.5l4.5 4.5l-4.5 4.5l-4.5-4.5z",
    "M14 2l4.2 7.4h-8.4z",
    "M14 10l4.2-7.4h-8.4z",
    "M12.8 2h2.4v2.8h2.8v2.4h-2.8v2.8h-2.4v-2.8h-2.8v-2.4h2.8z",
    "M11.3 2l2.7 2.7l2.7-2.7l1.3 1.3l-2.7 2.7l2.7 2.7l-1.3 1.3l-2.7-2.7l-2.7 2.7l-1.3-1.3l2.7-2.7l-2.7-2.7z",
)


def style_of(index: int) -> dict[str, Any]:
    """colour (a number of page.css), dash and marker (of SVG) of submission `index`, wherever it is drawn."""
    return {"colour": index % 8, "dash": DASHES[index % len(DASHES)], "marker": MARKERS[index % len(MARKERS)]}


@dataclass(frozen=True)
class Scale:
    """Positions of the small bars that stand beside numbers: `width` pixels from `low` to `high`."""

    low: float
    high: float
    log: bool = False
    width: float = 64.0

    def position(self, value: float) -> float:
        """Pixels from the left end, kept inside the bar."""
        # A value of zero or below has no logarithm, and belongs at the left end.
        if self.log:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return round(min(max(share, 0.0), 1.0) * self.width, 1)


@dataclass(frozen=True)
class Ranking:
    """What the main table needs beyond the submissions themselves."""

    score_scale: Scale
    speedup_scale: Scale
    memory_unit: str
    memory_bytes: float
    """Bytes in one `memory_unit`."""
    fastest: dict[str, float | None]
    """Seconds of the fastest, by workload."""


def ranking(board: dict[str, Any]) -> Ranking:
    """Scales, units and the fastest times for the main table. board: from `page_data`."""
    submissions = board["submissions"]
    ratios = [s[key] for s in submissions for key in ("speedup", "speedup_low", "speedup_high")]
    # An interval may reach to zero or to a billion; the bars show what lies within a factor of ten, symmetric about 1.
    reach = max((abs(math.log(ratio)) for ratio in ratios if ratio and ratio > 0), default=0.0)
    reach = min(max(reach * 1.05, math.log(1.2)), math.log(10.0))
    memory = max((s["peak_memory_bytes"] or 0 for s in submissions), default=0)
    unit, size = _memory_unit(memory)
    fastest = {}
    for workload in board["workloads"]:
        times = (s["times"].get(workload["name"]) for s in submissions)
        known = [time["seconds"] for time in times if time and time["seconds"] is not None]
        fastest[workload["name"]] = min(known, default=None)
    return Ranking(Scale(0.0, 1.0), Scale(math.exp(-reach), math.exp(reach), log=True), unit, size, fastest)


def _memory_unit(size: float) -> tuple[str, float]:
    return ("GiB", 2.0**30) if size >= 2**30 else ("MiB", 2.0**20)


def trial_table(submission: dict[str, Any]) -> dict[str, Any]:
    """columns: hyperparameters that differ between trials; fixed: the others, with their value; notes: whether a trial
    has one."""
    points = [trial["hyperparameters"] or {} for trial in submission["trials"]]
    names = list(dict.fromkeys(name for point in points for name in point))
    fixed = [
        name for name in names if len(points) > 1 and all(point.get(name) == points[0].get(name) for point in points)
    ]
    return {
        "columns": [name for name in names if name not in fixed],
        "fixed": {name: points[0][name] for name in fixed},
        "notes": any(trial["note"] for trial in submission["trials"]),
    }


def decimals(value: float | None, digits: int = 3) -> str:
    """0.8714 as `0.871`."""
    return UNKNOWN if value is None else f"{value:.{digits}f}"


def seconds(value: float | None) -> str:
    """About four digits, never an exponent."""
    if value is None:
        return UNKNOWN
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def count(value: float | None) -> str:
    """A whole number with separators: `12,345`."""
    return UNKNOWN if value is None else f"{value:,.0f}"


def short(value: Any) -> str:
    """A metric or a hyperparameter: five digits of a number, anything else as it is."""
    if value is None:
        return UNKNOWN
    if isinstance(value, float):
        return f"{value:.5g}"
    return str(value)


def percent(value: float | None) -> str:
    """A share, 0.123, as `12.3 %`."""
    if value is None:
        return UNKNOWN
    return f"{100 * value:.1f} %"


def difference(ratio: float) -> str:
    """1.12 as `12 %`."""
    return f"{100 * (ratio - 1):.2g} %"


def memory(value: float | None) -> str:
    """Bytes with a unit: `1.25 GiB` or `310 MiB`."""
    if value is None:
        return UNKNOWN
    unit, size = _memory_unit(value)
    return f"{value / size:.{2 if unit == 'GiB' else 0}f} {unit}"


def speedup(submission: dict[str, Any]) -> str:
    """The speed-up over the baseline as `1.23×`, as a bound where targets were missed."""
    value, note = submission["speedup"], submission["speedup_note"]
    if value is None:
        return UNKNOWN
    sign = {"upper bound": "≤ ", "lower bound": "≥ "}.get(note or "", "")
    return f"{sign}{value:.2f}×"


def speedup_hint(submission: dict[str, Any]) -> str | None:
    """What stands under a speed-up that is not simply a number."""
    note: str | None = submission["speedup_note"]
    return {
        "exact": None,
        "upper bound": "missed targets the baseline met",
        "lower bound": "the baseline missed targets",
        "none": "not comparable",
    }.get(note or "exact", note)


def interval(low: float | None, high: float | None, digits: int = 2) -> str:
    """`[0.91, 0.97]`, empty where neither end is known."""
    if low is None and high is None:
        return ""
    return f"[{decimals(low, digits)}, {decimals(high, digits)}]"


def seconds_interval(low: float | None, high: float | None) -> str:
    """`[91.2, 97.0]` in seconds, empty where neither end is known."""
    return "" if low is None and high is None else f"[{seconds(low)}, {seconds(high)}]"


def ranks(submission: dict[str, Any]) -> str:
    """The ranks that the data allow: `2` or `1–3`, with `?` for an end that is unknown."""
    low, high = submission["rank_low"], submission["rank_high"]
    if low is None and high is None:
        return UNKNOWN
    return str(low) if low == high else f"{'?' if low is None else low}–{'?' if high is None else high}"


def status_order(statuses: dict[str, int]) -> list[tuple[str, int]]:
    """Counts above zero in the order of `DISPLAY_ORDER`, unknown statuses after it."""
    rank = {name: position for position, name in enumerate(DISPLAY_ORDER)}
    return sorted(((n, c) for n, c in statuses.items() if c), key=lambda item: (rank.get(item[0], len(rank)), item[0]))


def reached_share(statuses: dict[str, int]) -> float | None:
    """Share of the trials that reached the target, for sorting by status; None without trials."""
    total = sum(statuses.values())
    return statuses.get("reached", 0) / total if total else None


def status_class(status: str | None) -> str:
    """A class of page.css; other people's words never become one."""
    return f"status-{status}" if status in STYLED_STATUSES else "status-other"


def words(status: str | None) -> str:
    """A status with spaces in place of underscores."""
    return UNKNOWN if not status else status.replace("_", " ")


def as_yaml(config: dict[str, Any]) -> str:
    """A configuration as it is written in configs/."""
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True, default_flow_style=False, width=100)


def plural(number: int, noun: str) -> str:
    """`1 trial`, `1,200 trials`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


FILTERS: dict[str, Callable[..., Any]] = {
    "as_yaml": as_yaml,
    "count": count,
    "decimals": decimals,
    "difference": difference,
    "interval": interval,
    "memory": memory,
    "percent": percent,
    "ranks": ranks,
    "reached_share": reached_share,
    "seconds": seconds,
    "seconds_interval": seconds_interval,
    "short": short,
    "speedup": speedup,
    "speedup_hint": speedup_hint,
    "status_class": status_class,
    "status_order": status_order,
    "words": words,
}
