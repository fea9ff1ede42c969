"""Tests of the allocator's settings that the command line makes."""

from __future__ import annotations

import os
import sys
from unittest import mock

import pytest

from opsd_lightning.cli.allocator import use_expandable_segments
from opsd_lightning.cli.command import main

NAME = "PYTORCH_CUDA_ALLOC_CONF"


@pytest.fixture(autouse=True)
def environment() -> object:
    """Restore the environment after each test."""
    kept = {name: value for name, value in os.environ.items() if not name.endswith("ALLOC_CONF")}
    with mock.patch.dict(os.environ, kept, clear=True):
        yield


@pytest.mark.skipif(sys.platform != "linux", reason="segments cannot grow on other systems")
def test_segments_can_grow() -> None:
    use_expandable_segments("opsd_lightning.TransformersEngine")
    assert os.environ[NAME] == "expandable_segments:True"


@pytest.mark.parametrize("name", [NAME, "PYTORCH_ALLOC_CONF"])
def test_settings_of_the_user_are_kept(name: str) -> None:
    os.environ[name] = "max_split_size_mb:64"
    use_expandable_segments(None)
    assert {key: value for key, value in os.environ.items() if key.endswith("ALLOC_CONF")} == {name: "max_split_size_mb:64"}


def test_vllm_in_this_process_keeps_fixed_segments() -> None:
    use_expandable_segments("opsd_lightning.VLLMEngine")
    assert NAME not in os.environ


@pytest.mark.integration
@pytest.mark.skipif(sys.platform != "linux", reason="segments cannot grow on other systems")
def test_commands_set_it_before_the_model_is_built(base: list[str]) -> None:
    with pytest.raises(SystemExit):  # refused before anything is built
        main(["fit", *base, "--trainer.precision=16-true"])
    assert NAME not in os.environ
    main(["fit", *base, "--trainer.fast_dev_run=1"])
    assert os.environ[NAME] == "expandable_segments:True"
