"""Objects and errors exchanged between ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from opsd_lightning.types import UserError

T = TypeVar("T")


def this_rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def of_every_rank(value: T) -> list[T]:
    """Each rank's value, on every rank."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def together(action: Callable[[], T]) -> T:
    """Do something on every rank; where it fails on one, it fails on all, instead of leaving the others waiting."""
    result, error = None, None
    try:
        result = action()
    except Exception as problem:
        error = problem
    messages = [found for found in of_every_rank(None if error is None else _message(error)) if found is not None]
    if error is not None:
        raise error
    if messages:
        raise messages[0][0](messages[0][1])
    return result  # type: ignore[return-value]


def from_rank_zero(action: Callable[[], T]) -> T:
    """What an action gives on the first rank, alone, on every rank."""
    return next(
        found for found in of_every_rank(together(lambda: action() if this_rank() == 0 else None)) if found is not None
    )


def _message(error: Exception) -> tuple[type[Exception], str]:
    return (UserError if isinstance(error, UserError) else RuntimeError), str(error)
