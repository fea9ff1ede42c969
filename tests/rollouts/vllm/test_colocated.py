"""Tests of rollouts by vLLM in the trainer's process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import BitsAndBytesConfig

from helpers.messages import mentions
from helpers.models import PROMPTS, perturb
from helpers.paths import ROOT
from helpers.training import parts, trainer
from helpers.vllm_stand_in import VERSIONS, make_vllm
from opsd_lightning.losses.objectives import token_logprobs
from opsd_lightning.models.policy import Policy
from opsd_lightning.models.scoring import score
from opsd_lightning.rollouts.base import Demand
from opsd_lightning.rollouts.vllm import process
from opsd_lightning.rollouts.vllm.colocated import VLLMEngine
from opsd_lightning.rollouts.vllm.memory import GIB, memory_share, needed_bytes
from opsd_lightning.types import ConfigError, Rollouts, Sampling

NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
Start = Callable[..., list[Any]]

# -- other versions, and sleeping: a stand-in -------------------------------------------------------------------------------


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Start:
    """Install a stand-in for vLLM, and return the list of its calls, with those of ``torch.cuda.empty_cache``."""

    def start(version: str = VERSIONS[-1], fails: dict[str, Exception] | None = None) -> list[Any]:
        calls: list[Any] = []
        for name, module in make_vllm(version, calls, fails).items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty_cache"))
        return calls

    return start


@pytest.fixture
def make_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., VLLMEngine]]:
    made = []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # for vLLM's output, which is kept after a failure

    def make(**settings: Any) -> VLLMEngine:
        made.append(VLLMEngine(adapter_folder=str(tmp_path / "adapters"), **settings))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def worst_difference(model: PeftModel, rollouts: Rollouts) -> float:
    prompts = [prompt for prompt in PROMPTS for _ in range(rollouts.n)]
    theirs = torch.tensor([value for row in rollouts.logprobs or [] for value in row])
    with torch.no_grad():
        return float((token_logprobs(*score(model, prompts, rollouts.completions)) - theirs).abs().max())


@pytest.mark.parametrize("version", VERSIONS)
def test_every_rollout_has_the_active_weights(
    version: str, stand_in: Start, make_engine: Callable[..., VLLMEngine], built: Callable[..., PeftModel]
) -> None:
    calls, model, engine = stand_in(version), built(), make_engine()
    for change in range(3):
        perturb(model, 0.1, seed=change)
        assert worst_difference(model, engine.generate(model, PROMPTS, Sampling(max_new_tokens=6, n=2), seed=0)) < 1e-4
    with model.disable_adapter():
        assert worst_difference(model, engine.generate(model, PROMPTS, Sampling(max_new_tokens=6), seed=0)) < 1e-4
    engine.close()
    assert [call for call in calls if isinstance(call, str)] == [
        "empty_cache", "start", "generate", "sleep", *["empty_cache", "wake_up", "generate", "sleep"] * 3, "shutdown",
    ]  # fmt: skip


def test_run_sets_the_context_length_and_the_source(
    stand_in: Start, make_engine: Callable[..., VLLMEngine], make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    calls, engine = stand_in(), make_engine()
    policy = make_policy(revision="v2", trust_remote_code=True)
    module, data = parts(policy, rollouts=engine, eval_sampling=Sampling(max_new_tokens=20, n=4))
    data.max_new_tokens = 20
    trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(module, data)
    settings = next(call for call in calls if isinstance(call, dict))
    longest = max(len(prompt) for prompt in data.rows["val"].student) + 20
    assert settings["max_model_len"] == longest and settings["max_num_seqs"] == 3 * 4
    assert settings["revision"] == settings["tokenizer_revision"] == "v2" and settings["trust_remote_code"] is True


def test_four_bit_policy_gives_vllm_its_dequantized_weights(
    stand_in: Start, make_engine: Callable[..., VLLMEngine], make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    calls, engine, policy = stand_in(), make_engine(), make_policy("qwen3", quantization=NF4)
    model = policy.build()
    perturb(model, 0.1)
    engine.prepare(policy, None)
    rollouts = engine.generate(model, PROMPTS, Sampling(max_new_tokens=6), seed=0)
    assert worst_difference(model, rollouts) < 1e-4
    original = make_policy("qwen3").build()
    original.load_state_dict({k: v for k, v in model.state_dict().items() if "lora_" in k}, strict=False)
    assert worst_difference(original, rollouts) > 1e-2, "the checkpoint is another model"
    settings = next(call for call in calls if isinstance(call, dict))
    assert settings["tokenizer"] == policy.model and not Path(settings["model"]).exists(), "the copy is removed"


def test_unusable_policies_and_settings_are_refused_before_training(
    make_engine: Callable[..., VLLMEngine], make_policy: Callable[..., Policy]
) -> None:
    for policy in (
        make_policy(lora=None),
        Policy("model.gguf"),
        make_policy(quantization=BitsAndBytesConfig(load_in_8bit=True)),
    ):
        with pytest.raises(ConfigError):
            make_engine().prepare(policy)
    with pytest.raises(ConfigError, match=mentions("max_model_len", "31", "30")):
        make_engine(max_model_len=30).prepare(make_policy(), Demand(31, 1))
    make_engine(max_model_len=31).prepare(make_policy(), Demand(31, 1))
    for name in ("revision", "max_model_len", "logprobs_mode"):
        with pytest.raises(ConfigError, match=mentions("options", name)):
            VLLMEngine(options={name: 1})


def test_later_rollout_that_does_not_fit_is_refused(
    stand_in: Start, make_engine: Callable[..., VLLMEngine], built: Callable[..., PeftModel]
) -> None:
    stand_in()
    engine, model = make_engine(), built()
    engine.generate(model, PROMPTS, Sampling(max_new_tokens=4), seed=0)
    with pytest.raises(ConfigError, match=mentions("max_model_len")):
        engine.generate(model, PROMPTS, Sampling(max_new_tokens=5), seed=0)


@pytest.mark.parametrize("call", ["start", "generate", "sleep", "wake_up"])
def test_an_error_of_vllm_is_one_message(
    call: str, stand_in: Start, make_engine: Callable[..., VLLMEngine], built: Callable[..., PeftModel]
) -> None:
    stand_in(fails={call: RuntimeError("CUDA out of memory.\n  File x, line 1\n  hf_abcdefghijklmnopqrstuvwxyzabcdefgh")})
    engine, model = make_engine(), built()
    if call == "wake_up":
        engine.generate(model, PROMPTS, Sampling(max_new_tokens=2), seed=0)
    with pytest.raises(ConfigError, match=mentions("out of memory", "gpu_memory_utilization")) as caught:
        engine.generate(model, PROMPTS, Sampling(max_new_tokens=2), seed=0)
    assert "\n" not in str(caught.value) and "hf_abc" not in str(caught.value)


def test_missing_vllm_is_refused(built: Callable[..., PeftModel], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=mentions("vllm", "VLLMServerEngine")):
        VLLMEngine().generate(built(), PROMPTS, Sampling(max_new_tokens=2), seed=0)


LOGS = {
    # vLLM 0.10, 0.20 and 0.32: an error in the engine's process, which the parent only refers to.
    "(EngineCore_0 pid=7) ValueError: No available memory for the cache blocks. Try it.\n"
    "RuntimeError: Engine core initialization failed. See root cause above.": "No available memory",
    "(EngineCore pid=7) ERROR 11-28 06:39:01 [core.py:1] EngineCore failed to start.\n"
    "(EngineCore pid=7) ERROR 11-28 06:39:01 [core.py:1] torch.OutOfMemoryError: CUDA out of memory. Tried": "CUDA out of memory",
    "no error at all": "Engine core initialization failed",
}


@pytest.mark.parametrize("text", LOGS)
def test_reason_is_found_in_the_output_of_the_engines_process(text: str) -> None:
    log = process.EngineLog()
    with log.captured():
        subprocess.run([sys.executable, "-c", f"print({text!r})"], check=True)
    error = RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {}")
    message = str(process.failure("load x", error, log))
    log.remove()
    assert LOGS[text] in message and str(log.path) in message


def test_environment_of_the_engines_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True,max_split_size_mb:64")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    before = dict(os.environ)
    with process.child_environment(torch.device("cuda", 2)):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "6"
        assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "max_split_size_mb:64" and "PYTORCH_ALLOC_CONF" not in os.environ
    assert dict(os.environ) == before


def test_memory_share_is_the_need_or_what_is_free() -> None:
    weights, row = 4 * GIB, GIB // 8
    total = 24 * GIB
    need = needed_bytes(weights, row, 32)
    assert memory_share(weights, row, 32, 18 * GIB, total) == pytest.approx(need / total, abs=1e-3)
    scarce = memory_share(weights, row, 32, 10 * GIB, total, kept=GIB)
    assert scarce < need / total and scarce * total <= 10 * GIB - GIB
    with pytest.raises(ConfigError, match=mentions("GiB")):
        memory_share(weights, row, 32, 7 * GIB, total)


def test_memory_beside_training_is_left_where_vllm_does_not_sleep() -> None:
    sizes = {"weights": 4 * GIB, "row": GIB // 8, "rows": 64, "free": 20 * GIB, "total": 24 * GIB}
    awake, asleep = (VLLMEngine(sleep=sleep).memory_share(**sizes) for sleep in (False, True))
    assert awake * 24 <= 10 < asleep * 24
    assert VLLMEngine(gpu_memory_utilization=0.7).memory_share(**sizes) == 0.7


# -- vLLM itself -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def in_process(vllm_python: str, vllm_model: Path, tmp_path: Path) -> Callable[[str], tuple[Any, str]]:
    """Run a scenario of helpers/vllm_in_process.py, and return what it found and what it printed besides."""

    def run(scenario: str) -> tuple[Any, str]:
        environment = os.environ | {
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        script = ROOT / "tests" / "helpers" / "vllm_in_process.py"
        command = [vllm_python, str(script), scenario, str(vllm_model), str(tmp_path / "adapters")]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
        assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]
        lines = ran.stdout.splitlines()
        found = next(line for line in lines if line.startswith("FOUND "))
        return json.loads(found[6:]), "\n".join(line for line in lines if line != found) + ran.stderr

    return run


@pytest.mark.integration
@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_in_the_trainers_process(in_process: Callable[[str], tuple[Any, str]], tmp_path: Path) -> None:
    (found, message, length), output = in_process("sample")
    (base, *_), (student, *_), (moved, *_), (again, *_), (greedy, *_) = found
    print("log-probability differences", [difference for _, difference in found])
    assert all(difference < 1e-3 for _, difference in found)
    assert again == moved and base != student != moved
    assert len(greedy) == len(PROMPTS)
    assert length == 256, "the demand of the run, and not the model's 1,024 positions"
    assert message.startswith("model.rollouts.init_args.max_model_len: ")
    assert not list((tmp_path / "adapters").glob("*/*"))
    assert "EngineCore" not in output, "vLLM's output is in its file"


@pytest.mark.integration
@pytest.mark.vllm
@pytest.mark.slow
def test_four_bit_policy_trains_on_its_own_dequantized_weights(in_process: Callable[[str], tuple[Any, str]]) -> None:
    (differences, length, longest, evaluated), _ = in_process("fit")
    print("log-probability differences", differences)
    assert len(differences) == 2 and max(differences) < 1e-3
    assert length == longest, "validation's completions are longer than training's"
    assert "val/avg@1" in evaluated


@pytest.mark.integration
@pytest.mark.vllm
@pytest.mark.slow
def test_failures_of_vllm_are_one_message(in_process: Callable[[str], tuple[Any, str]]) -> None:
    (sleep, argument, length, memory), output = in_process("failures")
    print("\n".join([sleep, argument, length, memory]))
    assert sleep.startswith("model.rollouts.init_args.sleep: ")
    assert argument.startswith("model.rollouts.init_args.options: ") and "no_such_argument" in argument
    assert length.startswith("model.rollouts.init_args.max_model_len: ") and "2048" in length
    assert "on current platform" in sleep, "the reason, and not the number of errors"
    assert memory.startswith("model.rollouts.init_args.") and "emory" in memory
    for message in (sleep, argument, length, memory):
        assert "\n" not in message and len(message) < 800
    assert "Traceback" not in output
