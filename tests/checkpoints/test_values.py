"""State of callbacks in checkpoints: plain values come back as they were, others are refused before anything is lost."""

from __future__ import annotations

import datetime
import decimal
import enum
import os
import pickle
import types
from collections import OrderedDict, defaultdict, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opsd_lightning.checkpoints.file import check_callbacks, load_file
from opsd_lightning.checkpoints.io import AtomicCheckpointIO
from opsd_lightning.types import ConfigError

_WHOLE = {"pytorch-lightning_version": "2.5.0", "state_dict": {"a": torch.ones(3)}, "epoch": 0, "global_step": 1}


class Colour(enum.Enum):
    RED = 1


def checkpoint(state: Any) -> dict[str, Any]:
    return _WHOLE | {"callbacks": {"Mine": {"state": state}, "Other": {"kept": 1}}}


def test_plain_values_survive_a_checkpoint(tmp_path: Path) -> None:
    now = datetime.datetime.now()
    shared: deque[Any] = deque([1, np.float32(2)], 5)
    state = {
        "scalars": [np.float64(1.5), np.int32(-3), np.bool_(True), np.float16(2), np.complex64(1j), np.str_("é")],
        "arrays": [np.arange(6.0).reshape(2, 3), np.asfortranarray(np.eye(3, dtype="f4")), np.zeros((0, 3)), np.array("é")],
        "big end": np.arange(3, dtype=">i4"), "dtype": np.dtype("f4"), "deque": shared, "again": shared,
        "default": defaultdict(list, {1: [2], "d": deque([defaultdict(int, a=1)])}), "none": defaultdict(None, a=1),
        "ordered": OrderedDict(b=1, a=deque([1])), "times": (now, now.astimezone(), now.date(), now.time()),
        "delta": datetime.timedelta(1, 2, 3), "path": Path("/a/b"), "frozen": frozenset([1, 2]), "range": range(1, 5, 2),
        "decimal": decimal.Decimal("1.5"), "slice": slice(1, None), "in a tuple": (deque([np.zeros(2)]), 1),
    }  # fmt: skip
    AtomicCheckpointIO().save_checkpoint(checkpoint(state), tmp_path / "x.ckpt")
    found = load_file(tmp_path / "x.ckpt")["callbacks"]["Mine"]["state"]
    assert list(found) == list(state)
    for name, value in state.items():
        told, is_told = repr(value), repr(found[name])
        assert told == is_told and type(value) is type(found[name]), name
    assert found["again"] is found["deque"] and found["deque"].maxlen == 5
    assert found["default"]["new"] == [] and found["arrays"][0].flags.writeable
    assert [type(one) for one in found["scalars"]] == [type(one) for one in state["scalars"]]


@pytest.mark.parametrize(
    "state",
    [Colour.RED, types.SimpleNamespace(a=1), np.array([{}], object), lambda: 1, defaultdict(lambda: 1), {"a": {1: Colour.RED}},
     np.zeros(2, [("a", "f4")]), np.random.default_rng(0), int, deque([Colour.RED])],
)  # fmt: skip
def test_unloadable_state_is_refused_when_it_is_saved(state: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    AtomicCheckpointIO().save_checkpoint(checkpoint(1), path)
    before = path.read_bytes()
    with pytest.raises(ConfigError) as refused:
        AtomicCheckpointIO().save_checkpoint(checkpoint(state), path)
    assert refused.value.setting == "trainer.callbacks" and "Mine" in str(refused.value)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["x.ckpt"]


class Calls:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    "state",
    [Calls(list, Calls(range, 2**40)), Calls(frozenset, Calls(range, 2**40)), Calls(bytes, 2**40),
     Calls(defaultdict, Calls(int, 1)), Calls(deque, Calls(range, 2**40)), Calls(np.dtype, "O8"), Calls(np.dtype, [("a", "f4")]),
     Calls(np._core.multiarray.scalar, Calls(np.dtype, "U999999"), b"a"), Calls(np.ndarray, (2**40,)), Calls(str, b"a"),
     Calls(datetime.datetime, 1.5), Calls(int, "9" * 10_000)],
)  # fmt: skip
def test_value_classes_with_other_arguments_are_refused(state: Any, tmp_path: Path) -> None:
    assert pickle.dumps(state, protocol=2)
    torch.save(checkpoint(state), tmp_path / "x.ckpt")
    with pytest.raises(ConfigError):
        load_file(tmp_path / "x.ckpt")


def test_remote_names_are_removed_from_a_downloaded_checkpoint() -> None:
    score = torch.tensor(1.0)
    state: dict[str, Any] = {
        "best_model_path": "memory://bucket/a.ckpt", "kth_best_model_path": "/run/b.ckpt", "last_model_path": "s3://x/c.ckpt",
        "best_k_models": {"memory://bucket/a.ckpt": score, "/run/b.ckpt": score}, "dirpath": "memory://bucket",
    }  # fmt: skip
    check_callbacks({"callbacks": {"ModelCheckpoint": state}})
    assert state["best_model_path"] == state["last_model_path"] == "" and list(state["best_k_models"]) == ["/run/b.ckpt"]
    assert state["kth_best_model_path"] == "/run/b.ckpt"
