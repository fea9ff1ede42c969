"""A counter of training steps without a learning signal: steps without weighted tokens or without a gradient."""

from __future__ import annotations


class IdleSteps:
    """A counter of consecutive idle training steps. A step is idle if nothing was learned in it.

    Args:
        limit: Number of consecutive idle steps from which the run counts as idle.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.steps = self.streak = 0
        self._reason = ""

    def add(self, reason: str | None) -> bool:
        """Count a step.

        Args:
            reason: Why the step was idle. None if it was not.

        Returns:
            True if this step reaches the limit, False before and after.
        """
        self.steps += 1
        self.streak = 0 if reason is None else self.streak + 1
        self._reason = reason or ""
        return self.streak == self.limit

    @property
    def problem(self) -> str | None:
        """The reason why the latest steps were idle, or None if there are fewer of them than the limit."""
        return self._text() if self.streak >= self.limit else None

    @property
    def verdict(self) -> str | None:
        """The `problem` of a run that has ended. A run that is shorter than the limit has one if all its steps were idle."""
        return self._text() if self.streak and (self.streak >= self.limit or self.streak == self.steps) else None

    def _text(self) -> str:
        steps = f"the last {self.streak} steps" if self.streak < self.steps else f"all {self.steps} steps"
        return f"nothing was learned in {steps}: {self._reason}"
