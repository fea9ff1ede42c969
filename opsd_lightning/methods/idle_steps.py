"""Steps that teach nothing: no token to learn from, or no gradient."""

from __future__ import annotations


class IdleSteps:
    """Counts training steps in a row that taught nothing.

    Args:
        limit: Number of steps in a row from which the run counts as idle.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.steps = self.streak = 0
        self._reason = ""

    def add(self, reason: str | None) -> bool:
        """Count a step.

        Args:
            reason: Why it taught nothing; None for a step that did.

        Returns:
            True where the limit is reached at this step.
        """
        self.steps += 1
        self.streak = 0 if reason is None else self.streak + 1
        self._reason = reason or ""
        return self.streak == self.limit

    @property
    def problem(self) -> str | None:
        """Say why the latest steps taught nothing, from the limit on; None before."""
        return self._text() if self.streak >= self.limit else None

    @property
    def verdict(self) -> str | None:
        """As `problem`, for a run that has ended: also of one that is shorter than the limit and taught nothing at all."""
        return self._text() if self.streak and (self.streak >= self.limit or self.streak == self.steps) else None

    def _text(self) -> str:
        which = f"the last {self.streak} steps" if self.streak < self.steps else f"all {self.steps} steps"
        return f"nothing was learned in {which}: {self._reason}"
