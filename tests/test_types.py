"""Tests of the types that all modules share."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import pytest

from opsd_lightning.types import ConfigError, PositiveInt, UserError, checked

if TYPE_CHECKING:
    from decimal import Decimal


def test_config_error_keeps_its_fields() -> None:
    error = ConfigError("it is 3", "data.batch_size", "Set it to 4")
    assert isinstance(error, UserError) and isinstance(error, ValueError)
    assert (error.problem, error.setting, error.fix) == ("it is 3", "data.batch_size", "Set it to 4")
    assert str(error) == "data.batch_size: it is 3. Set it to 4"


def test_config_error_survives_another_process() -> None:
    error = pickle.loads(pickle.dumps(ConfigError("a", "b", "c")))
    assert (error.problem, error.setting, error.fix, str(error)) == ("a", "b", "c", "b: a. c")


def test_config_error_is_raised_like_any_other() -> None:
    with pytest.raises(ValueError, match=r"^b: a\. c$"):
        raise ConfigError("a", "b", "c")


@checked
class Layers:
    """A class as users write it: any number of positional arguments, and a name for type checkers only."""

    def __init__(self, *sizes: int, n: PositiveInt = 1, price: Decimal | None = None) -> None:
        self.sizes, self.n = sizes, n


def test_arguments_are_checked_by_their_own_type() -> None:
    made = Layers(0, -1, n=2)
    assert (made.sizes, made.n) == ((0, -1), 2)
    with pytest.raises(ConfigError) as refused:
        Layers(n=0)
    assert refused.value.setting == "Layers.n"


def test_too_many_arguments_are_a_type_error() -> None:
    @checked
    class One:
        def __init__(self, first: Any, *, second: PositiveInt = 1) -> None: ...

    with pytest.raises(TypeError):
        One(1, 0)  # type: ignore[misc]
