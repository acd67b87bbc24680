"""Search spaces: what a tuner may try, and which point each trial tries.

A space has the shape of a recipe (`harness.config.schema.Recipe`), with a range where the recipe has a value:

    search_space:
      hyperparameters:
        lr: {log: [1.0e-3, 3.0e-2]}
        betas: [{one_minus_log: [0.8, 0.98]}, {one_minus_log: [0.9, 0.999]}]
      warmup_fraction: {choices: [0.02, 0.05, 0.1]}
      horizon_fraction: {linear: [0.7, 1.0]}

or is a fixed list: `search_space: {points: [{hyperparameters: {lr: 0.01}}, ...]}`.

Points are quasi-random (scrambled Sobol, Owen 1998) and a pure function of (submission, study seed, trial number):
different in every study, the same on every machine, and trial i does not depend on how many trials there are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

from harness.errors import UserError, did_you_mean, shorten
from harness.hashing import stable_hash

Kind = Literal["linear", "log", "one_minus_log", "integer", "choices"]
KINDS: tuple[str, ...] = get_args(Kind)
RECIPE_KEYS = ("hyperparameters", "warmup_fraction", "horizon_fraction", "clip_norm")
"""Keys of a recipe, and so of a space and of a point."""
KeyPath = tuple[str | int, ...]
"""Where a value is in a recipe: keys of mappings and indices of lists."""


@dataclass(frozen=True)
class Dimension:
    """One range. `values` are its two ends (both included), or all choices."""

    path: KeyPath
    kind: Kind
    values: tuple[Any, ...]

    @property
    def name(self) -> str:
        """As in the YAML: `hyperparameters.betas[1]`."""
        head, *rest = self.path
        return str(head) + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in rest)

    def value(self, u: float) -> Any:
        """The value at quantile u in [0, 1) of the range: an int for `integer`, a choice, or else a float."""
        if self.kind == "choices":
            return self.values[int(u * len(self.values))]
        low, high = self.values
        if self.kind == "linear":
            return low + u * (high - low)
        if self.kind == "integer":
            # + 1, so that the upper end has the same share as every other integer.
            return low + int(u * (high - low + 1))
        if self.kind == "log":
            return math.exp(math.log(low) + u * (math.log(high) - math.log(low)))
        # one_minus_log: log-uniform in 1 - value, from the larger 1 - low down to 1 - high.
        return 1 - math.exp(math.log1p(-low) + u * (math.log1p(-high) - math.log1p(-low)))

    def position(self, value: Any) -> float:
        """Where `value` lies between the two ends, in [0, 1] on the scale of the range. Choices count by order."""
        if self.kind == "choices":
            return self.values.index(value) / max(len(self.values) - 1, 1)
        low, high = self.values
        if self.kind == "log":
            low, high, value = math.log(low), math.log(high), math.log(value)
        elif self.kind == "one_minus_log":
            low, high, value = math.log1p(-low), math.log1p(-high), math.log1p(-value)
        return float((value - low) / (high - low))


@dataclass(frozen=True)
class SearchSpace:
    """Either ranges or a list of points, each point a partial recipe."""

    dimensions: tuple[Dimension, ...]
    points: tuple[dict[str, Any], ...]

    def point(self, submission: str, study: int, trial: int) -> dict[str, Any]:
        """The point of trial `trial` (from 1) in study `study`, in the shape of a recipe. Raises UserError if a list
        has fewer points."""
        seed = stable_hash("search space", submission, study)
        if self.points:
            if trial > len(self.points):
                raise UserError(
                    f"trial {trial} of {submission}: its search_space lists {len(self.points)} points; "
                    f"ask for at most as many with ruleset.trials={len(self.points)}, or list more"
                )
            # In an order of the study's own: the first trials of two studies are not the same points.
            return self.points[_permutation(len(self.points), seed)[trial - 1]]
        point: dict[str, Any] = {}
        # The dimensions are sorted by name, so the order in the YAML does not matter.
        for dimension, u in zip(self.dimensions, _sobol(len(self.dimensions), seed, trial), strict=True):
            _insert(point, dimension.path, dimension.value(u))
        return point

    def middle(self) -> dict[str, Any]:
        """The point in the middle of every range."""
        point: dict[str, Any] = {}
        for dimension in self.dimensions:
            _insert(point, dimension.path, dimension.value(0.5))
        return point

    def corners(self) -> Iterator[dict[str, Any]]:
        """Points that together hold every value a check has to see: all points of a list, or both ends and all choices
        of each range."""
        if self.points:
            yield from self.points
            return
        for i in range(max(len(dimension.values) for dimension in self.dimensions)):
            point: dict[str, Any] = {}
            for dimension in self.dimensions:
                _insert(point, dimension.path, dimension.values[min(i, len(dimension.values) - 1)])
            yield point


def parse_search_space(raw: Any, key: str = "optimizer.search_space") -> SearchSpace:
    """The space that a YAML describes; raises UserError with every problem in it. key: its name in the messages."""
    if not isinstance(raw, dict) or not raw:
        raise UserError(f"{key}={raw}: must be a mapping like {{hyperparameters: {{lr: {{log: [1e-3, 1e-1]}}}}}}")
    if "points" in raw:
        return SearchSpace((), _parse_points(raw, key))
    return SearchSpace(_parse_ranges(raw, key), ())


def _parse_points(raw: dict[str, Any], key: str) -> tuple[dict[str, Any], ...]:
    """The points of a fixed list; raises UserError with every problem in it."""
    points, problems = raw["points"], []
    if len(raw) > 1:
        problems.append(f"{key}: has points and ranges; keep one of the two")
    elif not isinstance(points, list) or not points or not all(isinstance(p, dict) and p for p in points):
        problems.append(f"{key}.points={points}: must be a list of points like {{hyperparameters: {{lr: 0.01}}}}")
    else:
        for i, point in enumerate(points):
            problems += _unknown_keys(point, f"{key}.points[{i}]")
        if any(point in points[:i] for i, point in enumerate(points)):
            problems.append(f"{key}.points: a point is listed twice; remove it")
    if problems:
        raise UserError(problems)
    return tuple(points)


def _parse_ranges(raw: dict[str, Any], key: str) -> tuple[Dimension, ...]:
    problems = _unknown_keys(raw, key)
    known = {name: raw[name] for name in RECIPE_KEYS if name in raw}
    dimensions = []
    for path, leaf in _leaves(known, ()):
        dimension = _parse_dimension(path, leaf, key, problems)
        if dimension is not None:
            dimensions.append(dimension)
    if not dimensions and not problems:
        problems.append(f"{key}: nothing in it is a range; write one like lr: {{log: [1e-3, 1e-1]}}")
    if problems:
        raise UserError(problems)
    return tuple(sorted(dimensions, key=lambda dimension: dimension.name))


def _unknown_keys(mapping: dict[str, Any], key: str) -> list[str]:
    of_class = mapping.get("hyperparameters", {})
    problems = []
    if not isinstance(of_class, dict):
        problems.append(f"{key}.hyperparameters={shorten(of_class)}: must be a mapping like {{lr: ...}}")
    return problems + [
        f"{key}.{name}: unknown key; {did_you_mean(str(name), RECIPE_KEYS)}"
        for name in mapping
        if name not in RECIPE_KEYS
    ]


def _leaves(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    """Every range of a space, or what stands in its place, with its path."""
    # A mapping at any other place is a range, {KIND: [low, high]}, or stands in the place of one.
    if isinstance(value, dict) and path in ((), ("hyperparameters",)):
        for name, item in value.items():
            yield from _leaves(item, (*path, str(name)))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _leaves(item, (*path, i))
    else:
        yield path, value


def _parse_dimension(path: KeyPath, leaf: Any, key: str, problems: list[str]) -> Dimension | None:
    """The range that `leaf` describes; None, and a line in `problems`, if it is none."""
    name = f"{key}.{Dimension(path, 'choices', ()).name}"
    if isinstance(path[-1], int) and _is_number(leaf):
        # One number of a list that keeps its value, beside others that have a range.
        return Dimension(path, "choices", (leaf,))
    if not isinstance(leaf, dict) or len(leaf) != 1 or not set(leaf) <= set(KINDS):
        listed = ", ".join(KINDS)
        problems.append(f"{name}={leaf}: must be one range, {{KIND: [low, high]}} with KIND one of {listed}")
        return None
    ((kind, values),) = leaf.items()
    if not isinstance(values, list) or not values:
        problems.append(f"{name}.{kind}={values}: must be a list")
        return None
    if kind == "choices":
        # Not by a set: a choice can be a list, which has no hash.
        if any(value in values[:i] for i, value in enumerate(values)):
            problems.append(f"{name}.choices={values}: a choice is listed twice; remove it")
        return Dimension(path, "choices", tuple(values))
    if len(values) != 2 or not all(_is_number(value) for value in values):
        problems.append(f"{name}.{kind}={values}: must be two finite numbers, [low, high]")
        return None
    low, high = values
    range_problems = []
    if low >= high:
        range_problems.append(f"{name}.{kind}={values}: empty; the first number must be the smaller")
    if kind == "log" and low <= 0:
        range_problems.append(f"{name}.log={values}: a logarithmic range must stay above 0")
    if kind == "one_minus_log" and high >= 1:
        range_problems.append(f"{name}.one_minus_log={values}: 1 - value must stay above 0")
    if kind == "integer" and not all(isinstance(value, int) for value in values):
        range_problems.append(f"{name}.integer={values}: must be whole numbers")
    problems += range_problems
    return None if range_problems else Dimension(path, kind, (low, high))


def _is_number(value: Any) -> bool:
    # A bool is an int too.
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _insert(point: dict[str, Any], path: KeyPath, value: Any) -> None:
    """Set `value` at `path`, making mappings and lists on the way; the items of a list come in their order."""
    container: Any = point
    for key, next_key in pairwise(path):
        if isinstance(container, dict):
            container.setdefault(key, [] if isinstance(next_key, int) else {})
        elif key == len(container):
            container.append([] if isinstance(next_key, int) else {})
        container = container[key]
    if isinstance(container, list):
        container.append(value)
    else:
        container[path[-1]] = value


def _sobol(dimensions: int, seed: int, trial: int) -> list[float]:
    """Point number `trial` (from 1) of a scrambled Sobol sequence: a quantile in [0, 1) for each dimension."""
    # Imported here, since only drawing a point needs it.
    from scipy.stats import qmc

    sampler = qmc.Sobol(dimensions, scramble=True, rng=seed)
    # In scipy, fast_forward(0) on a new sequence would go back by one.
    if trial > 1:
        sampler.fast_forward(trial - 1)
    return [float(u) for u in sampler.random(1)[0]]


def _permutation(length: int, seed: int) -> list[int]:
    # By hashes, since the shuffles of Python and NumPy can change with their versions.
    return sorted(range(length), key=lambda i: stable_hash(seed, i))
