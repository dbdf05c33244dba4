"""What a `CTROptimizer` tells of itself: ranks, metrics, a report, a description."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyctrlora.describe import describe
from pyctrlora.report import record, report

if TYPE_CHECKING:
    from torch import Tensor

    from pyctrlora.roster import Roster


class Reports:
    """Methods of `CTROptimizer` that read and change nothing, but for `allocate_ranks`."""

    _roster: Roster
    param_groups: list[dict[str, Any]]

    def ranks(self) -> dict[str, int]:
        """Active directions of each pair by its name; reading synchronises."""
        active = self._roster.engine.ranks()
        pairs = self._roster.all_pairs()
        return {pair.name: active.get(pair.name, pair.a.shape[0]) for _, pair in pairs}

    def allocate_ranks(self, utilities: dict[str, list[float]]) -> None:
        """Chooses the ranks to start with, within the budget; before the first step.

        They are kept from the end of the first step to the first event, `rank_start` or not.

        Args:
            utilities: of each layer's directions by its name, e.g. halved squared singular values.

        Raises:
            ValueError: no budget, training has begun, or layers are missing.
        """
        self._roster.engine.allocate_ranks(utilities)

    def record(self, loss: float | Tensor | None = None) -> None:
        """Keeps the last step's numbers for `report()["training"]`, with its loss; synchronises."""
        record(self._roster, self.metrics(), float(self.param_groups[0]["lr"]), loss)

    def report(self) -> dict[str, Any]:
        """What has happened so far, as plain types; reading synchronises. See `report.report`."""
        return report(self._roster, self.metrics(), self.ranks())

    def metrics(self) -> dict[str, float]:
        """Numbers about the last step and counters of what was skipped; reading synchronises."""
        return dict(self._roster.engine.metrics())

    def describe(self) -> str:
        """What is trained how, to print: pairs, AdamW's parameters, skipped and retired layers."""
        roster = self._roster
        retired = roster.engine.retired()
        return describe(self.param_groups, roster.all_pairs(), roster.frozen, retired)
