"""The limit on the tokens of a scoring pass, which is lowered after an out-of-memory error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_warn

from opsd_lightning.types import ConfigError

T = TypeVar("T")
_SETTING = "model.token_budget"


class TokenBudget:
    """Limit on the tokens of one scoring pass, padding and cached tokens included.

    A result does not depend on it, except for the inputs that LoRA dropout drops. So `attempt` repeats an action with half
    the limit where the device has too little memory for it.

    Args:
        tokens: The limit, at least 1.

    Attributes:
        given: The limit of the settings.
        tokens: The current limit.

    Example::

        budget = TokenBudget(8192)
        loss = budget.attempt(lambda: score_all(budget), undo=optimizer.zero_grad)
    """

    def __init__(self, tokens: int) -> None:
        self.given = self.tokens = tokens
        self._largest = 0  # tokens of the largest planned pass with several rows
        self._longest = 0  # tokens of the longest planned row

    def state_dict(self) -> dict[str, int]:
        """Return the limits, for a checkpoint."""
        return {"given": self.given, "tokens": self.tokens}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the current limit, unless the settings have another limit than those of the checkpoint.

        Raises:
            ValueError: The state is not one of `state_dict`.
        """
        given, tokens = state["given"], state["tokens"]
        if not (isinstance(tokens, int) and 1 <= tokens <= given):
            raise ValueError(f"{tokens!r} is not a limit on tokens")
        if given == self.given:
            self.tokens = tokens

    def note(self, lengths: Sequence[int], passes: Sequence[Sequence[int]]) -> None:
        """Note the planned passes, for the error message and the next limit of an `attempt`.

        Args:
            lengths: Tokens of each row.
            passes: Row indices of each pass.
        """
        self._longest = max([self._longest, *lengths])
        sizes = [len(rows) * max(lengths[row] for row in rows) for rows in passes if len(rows) > 1]
        self._largest = max([self._largest, *sizes])

    def attempt(self, action: Callable[[], T], undo: Callable[[], object] = lambda: None, repeats: bool = True) -> T:
        """Call an action. After an out-of-memory error halve the limit, and call it again.

        Args:
            action: Plans its passes with `tokens`, calls `note`, and makes them.
            undo: Called before the action is repeated.
            repeats: If False, an out-of-memory error ends the run.

        Returns:
            The result of the action.

        Raises:
            ConfigError: The memory does not hold a pass of a single row, or the action must not be repeated.
        """
        before = self.tokens
        while True:
            self._largest = self._longest = 0
            try:
                found = action()
            except torch.OutOfMemoryError as error:
                if not repeats or not self._largest:
                    raise self._refusal(repeats) from error
            else:
                if self.tokens < before:
                    rank_zero_warn(
                        f"the device has too little memory for scoring passes of {before} tokens ({_SETTING}). They are "
                        f"limited to {self.tokens} tokens from now on, which does not change the result. Set {_SETTING} to "
                        "this number to avoid the failed passes"
                    )
                return found
            # Here the error is gone, and with it the tensors that its traceback held.
            self.tokens = max(min(self.tokens, self._largest) // 2, 1)
            undo()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()

    def _refusal(self, repeats: bool) -> ConfigError:
        if self._largest:
            assert not repeats
            return ConfigError(
                f"the device has too little memory for a scoring pass of {self._largest} tokens. Under a strategy for "
                "several devices a pass is not repeated with fewer tokens, since all ranks must make the same passes",
                _SETTING,
                f"Set it to {max(min(self.tokens, self._largest) // 2, 1)} or less",
            )
        return ConfigError(
            f"the device has too little memory to score a single row of {self._longest} tokens, whatever {_SETTING} is",
            "model.sampling.max_new_tokens",
            "Lower it, set model.policy.gradient_checkpointing to true, quantize the base weights, or free memory of the "
            "device (opsd doctor shows what needs it)",
        )
