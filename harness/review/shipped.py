"""What the configs say, which is what records are held against."""

from __future__ import annotations

from typing import Any

from harness.config.compose import shipped_optimizer, shipped_ruleset, shipped_workload
from harness.config.schema import Ruleset


class Shipped:
    """The configs of this repository and of the user's own folders of configs, each read once."""

    def __init__(self) -> None:
        self._workloads: dict[tuple[str, str], dict[str, Any] | None] = {}
        self._rulesets: dict[str, Ruleset | None] = {}
        self._optimizers: dict[str, dict[str, Any] | None] = {}

    def workload(self, full_name: str, scale: str) -> dict[str, Any] | None:
        """The keys of a workload, by its name with the variant (gpt2_silu); None where no config has it. Raises
        UserError where its config cannot be composed."""
        if (full_name, scale) not in self._workloads:
            name, _, variant = full_name.partition("_")
            self._workloads[full_name, scale] = shipped_workload(name, scale, variant or None)
        return self._workloads[full_name, scale]

    def ruleset(self, name: str) -> Ruleset | None:
        """A ruleset; None where no config has it."""
        if name not in self._rulesets:
            self._rulesets[name] = shipped_ruleset(name)
        return self._rulesets[name]

    def optimizer(self, name: str) -> dict[str, Any] | None:
        """The keys of an optimizer's YAML; None where no config has it."""
        if name not in self._optimizers:
            self._optimizers[name] = shipped_optimizer(name)
        return self._optimizers[name]

    def max_steps(self, full_name: str, scale: str, ruleset: str) -> int | None:
        """The budget in nominal steps of a workload under a ruleset; None where one of the two is unknown."""
        workload, rules = self.workload(full_name, scale), self.ruleset(ruleset)
        if workload is None or rules is None:
            return None
        return max(1, round(rules.budget_factor * workload["max_steps"]))
