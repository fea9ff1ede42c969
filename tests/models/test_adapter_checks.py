"""Settings of an adapter that was trained elsewhere: what costs more than its weights is refused, quickly."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from helpers.models import make_model, make_tokenizer
from opsd_lightning.models import adapter_checks
from opsd_lightning.models.policy import LoRA, Policy
from opsd_lightning.types import ConfigError, UserError

pytestmark = [
    pytest.mark.filterwarnings("ignore:`init_lora_weights` is:UserWarning:peft.tuners.lora.config"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning:peft.tuners.tuners_utils"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    base, adapter = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("adapter")
    make_model("llama").save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    Policy(str(base), LoRA(r=4, alpha=8)).build().save_pretrained(adapter)
    return str(base), adapter


def with_settings(folder: Path, adapter: Path, **settings: Any) -> str:
    shutil.copytree(adapter, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return str(folder)


SLOW = r"((\w|\.)+)+!"


@pytest.mark.parametrize(
    "settings",
    [{"r": 10**7}, {"r": 0}, {"r": "8"}, {"rank_pattern": {"q_proj": 10**7}}, {"init_lora_weights": "pissa_niter_100000000"},
     {"init_lora_weights": "loftq"}, {"init_lora_weights": "olora"}, {"init_lora_weights": "corda"},
     {"layer_replication": [[0, 2]] * 2000}, {"layer_replication": [[0, 10**9]]}, {"layer_replication": [[-5, 1]]},
     {"target_modules": SLOW}, {"exclude_modules": SLOW}, {"rank_pattern": {SLOW: 4}}, {"alpha_pattern": {SLOW: 4}},
     {"modules_to_save": [SLOW]}, {"layers_pattern": [SLOW], "layers_to_transform": [0]}],
)  # fmt: skip
def test_costly_settings_are_refused(
    settings: dict[str, Any], folders: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_checks, "_SECONDS", 0.5)
    start = time.monotonic()
    with pytest.raises(UserError):
        Policy(folders[0], adapter=with_settings(tmp_path / "a", folders[1], **settings)).build()
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    "settings",
    [{}, {"init_lora_weights": "gaussian"}, {"init_lora_weights": "eva"}, {"rank_pattern": {r".*\.nothing": 8}},
     {"target_modules": r".*(q|k|v|o|gate|up|down)_proj"}],
)  # fmt: skip
def test_usual_adapters_load(settings: dict[str, Any], folders: tuple[str, Path], tmp_path: Path) -> None:
    model = Policy(folders[0], adapter=with_settings(tmp_path / "a", folders[1], **settings)).build()
    assert model.peft_config["default"].r == 4


@pytest.mark.parametrize("bits", [4, 8])
def test_a_configuration_of_quantized_weights_beside_plain_ones(
    bits: int, folders: tuple[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders[0], tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    quantization = {"quant_method": "bitsandbytes", f"load_in_{bits}bit": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization}))
    with pytest.raises(UserError) as refused:
        Policy(str(tmp_path / "base")).build()
    assert bits == 8 or isinstance(refused.value, ConfigError)
