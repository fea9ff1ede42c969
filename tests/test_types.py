"""Tests of the types that all modules share."""

from __future__ import annotations

import pickle

import pytest

from opsd_lightning.types import ConfigError, UserError


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
