"""Tests of callbacks, checkpoints, the doctor and decoding on the imitated device."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from transformers import BitsAndBytesConfig

from helpers.classes import subclasses
from helpers.covering import Case
from helpers.device_cases import (
    A_TOKEN,
    DEFAULT,
    ENGINES,
    WEIGHTS,
    checked_steps,
    parts_of,
    save_model,
    trainer_of,
    watched_device,
)
from helpers.skills import skill_sets
from helpers.strict_device import Card, strict_device, unavailable
from opsd_lightning.callbacks.baseline import BaselineEvaluation
from opsd_lightning.callbacks.collapse_guard import CollapseGuard
from opsd_lightning.callbacks.export import AdapterExport
from opsd_lightning.callbacks.health import Health
from opsd_lightning.callbacks.kept_skills import KeptSkills
from opsd_lightning.callbacks.progress import ProgressLines
from opsd_lightning.callbacks.rollouts import RolloutTable, RolloutWriter
from opsd_lightning.data.datamodule import OPSDDataModule
from opsd_lightning.doctor.command import main as doctor
from opsd_lightning.grading.no_grader import NoGrader
from opsd_lightning.methods.opsd import OPSDModule
from opsd_lightning.methods.step import StepCallback
from opsd_lightning.models.policy import base_of
from opsd_lightning.models.scoring import score
from opsd_lightning.prompts.online_contexts import CritiqueContext, FeedbackContext, OnlineContext
from opsd_lightning.reports.run_report import RunReport
from opsd_lightning.reports.token_report import TokenReport
from opsd_lightning.types import ConfigError, Sampling

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(unavailable() is not None, reason=str(unavailable())),
]

CALLBACKS: list[Callable[[], Callback]] = [
    AdapterExport,
    BaselineEvaluation,
    CollapseGuard,
    lambda: Health(every_n_steps=1),
    lambda: KeptSkills(skill_sets(3), every_n_steps=1),
    ProgressLines,
    lambda: RolloutTable(every_n_steps=1),
    RolloutWriter,
    RunReport,
    lambda: TokenReport(every_n_steps=1, pictures=False, repeated_questions=1),
]
#: Callbacks that the package adds itself, and base classes.
ADDED = {"SavedConfig", "RunLock", "RunUnlock", StepCallback.__name__}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("stages"))


def test_every_callback_is_run_here() -> None:
    own = {cls.__name__ for cls in subclasses(Callback) if cls.__module__.startswith("opsd_lightning.")}
    assert own - ADDED == {type(make()).__name__ for make in CALLBACKS}


@pytest.mark.parametrize(
    "case",
    [
        {"teacher": "ema", "precision": "bf16-mixed", "weights": "nf4", "checkpointing": "yes"},
        {"method": "grpo"},
        pytest.param({"method": "sft", "weights": "bfloat16", "precision": "bf16-mixed"}, marks=pytest.mark.slow),
        pytest.param({"teacher": "trust region", "divergence": "jsd", "weights": "all trained"}, marks=pytest.mark.slow),
    ],
    ids=lambda case: " ".join(case.values()),
)
@pytest.mark.filterwarnings("ignore:.*CollapseGuard:UserWarning")
def test_callbacks_run_on_the_device(case: Case, folder: str, tmp_path: Path) -> None:
    """Every callback, in a fit, a test and a prediction."""
    with watched_device() as device:
        module, data = parts_of(case, folder)
        callbacks = [make() for make in CALLBACKS if make is not AdapterExport or case.get("weights") != "all trained"]
        if case.get("weights") == "all trained":  # no divergence from a base model that is not kept
            next(callback for callback in callbacks if isinstance(callback, KeptSkills)).sets.pop("drift")
        precision = (DEFAULT | case)["precision"]
        run = trainer_of(
            tmp_path, *callbacks, logger=CSVLogger(tmp_path), precision=precision, max_steps=2, enable_progress_bar=True
        )
        with checked_steps(device, module):
            run.fit(module, data)
        run.test(module, data, verbose=False)
        run.predict(module, data)
        assert not device.mixes
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} >= {".csv", ".html"}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param({"teacher": "ema", "precision": "bf16-mixed"}, marks=pytest.mark.slow),
        {"weights": "nf4", "precision": "bf16-mixed", "checkpointing": "yes"},
        {"weights": "all trained", "updates": "2"},
        {"method": "grpo"},
    ],
    ids=lambda case: " ".join(case.values()),
)
def test_a_resumed_run_is_bit_identical_on_the_device(case: Case, folder: str, tmp_path: Path) -> None:
    """Dropout and sampling draw from the device's generator, whose state no checkpoint stores."""
    settings = {"precision": (DEFAULT | case)["precision"], "limit_val_batches": 0}
    updates = int((DEFAULT | case)["updates"])

    def weights(path: Path, *callbacks: Callback, steps: int = 3, **fit: Any) -> dict[str, Tensor]:
        with strict_device():
            torch.rand(steps, device="cuda")  # another state of the generator
            module, data = parts_of(case, folder)
            checkpointing = {"enable_checkpointing": bool(callbacks)}
            run = trainer_of(path, *callbacks, max_steps=steps * updates, **settings, **checkpointing)
            run.fit(module, data, **fit)
            return {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}

    keep = ModelCheckpoint(tmp_path, filename="first", every_n_train_steps=updates, save_top_k=1)
    whole = weights(tmp_path / "whole")
    weights(tmp_path / "begun", keep, steps=1)
    again = weights(tmp_path / "resumed", ckpt_path=keep.best_model_path, weights_only=True)
    assert whole and whole.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_a_checkpoint_of_the_device_is_read_on_the_cpu(folder: str, tmp_path: Path) -> None:
    with strict_device():
        module, data = parts_of({}, folder)
        run = trainer_of(tmp_path, limit_val_batches=0)
        run.fit(module, data)
        run.save_checkpoint(tmp_path / "end.ckpt")
        expected = {name: value.cpu().clone() for name, value in module.state_dict().items()}
    state = torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"]
    assert state.keys() == expected.keys()
    assert all(type(value) is Tensor and torch.equal(value, expected[name]) for name, value in state.items())


@pytest.mark.parametrize("precision", ["bf16-true", "16-mixed", "16-true"])
def test_unsafe_precisions_are_refused_on_the_device(precision: Any, folder: str, tmp_path: Path) -> None:
    with strict_device():
        module, data = parts_of({}, folder)
        with pytest.raises(ConfigError) as error:
            trainer_of(tmp_path, precision=precision).fit(module, data)
    assert error.value.setting == "trainer.precision"


@pytest.mark.parametrize(
    ("weights", "policy", "setting"),
    [
        ("float32", {"dtype": "float16"}, "model.policy.dtype"),
        ("all trained", {"dtype": "float16"}, "model.policy.dtype"),
        (
            "nf4",
            {"quantization": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float16)},
            "model.policy.quantization.bnb_4bit_compute_dtype",
        ),
    ],
)
def test_gradients_in_float16_are_refused_on_the_device(
    weights: str, policy: dict[str, Any], setting: str, folder: str, tmp_path: Path
) -> None:
    with strict_device():
        module, data = parts_of({"weights": weights}, folder, policy=policy)
        with pytest.raises(ConfigError) as error:
            trainer_of(tmp_path).fit(module, data)
    assert error.value.setting == setting


@pytest.mark.parametrize("card", [Card(), Card.t4()], ids=lambda card: card.name)
def test_the_doctor_examines_a_run_on_the_device(
    card: Card, folder: str, tmp_path: Path, base: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with strict_device(card) as device:
        device_settings = {
            "trainer": {"accelerator": "gpu", "devices": 1, "precision": "bf16-mixed"},
            "model": {"policy": {"model": folder}},
        }
        (tmp_path / "device.yaml").write_text(yaml.safe_dump(device_settings))
        doctor([*base, f"--config={tmp_path / 'device.yaml'}", "--json", str(tmp_path / "found.json")])
        assert not device.mixes
    found = json.loads((tmp_path / "found.json").read_text())
    assert not [finding for finding in found["findings"] if finding["level"] == "error"], found["findings"]


# -- synchronizations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("weights", ["float32", "nf4"])
@pytest.mark.parametrize("engine", list(ENGINES))
def test_a_decoded_token_needs_few_synchronizations(engine: str, weights: str, temperature: float, folder: str) -> None:
    """The difference of two rollouts of different lengths: everything that a rollout does once cancels."""
    found = []
    with strict_device() as device:
        module, _ = parts_of({"weights": weights}, folder)
        model = module.policy.build(torch.device("cuda", 0))
        model.to("cuda:0")
        base_of(model).generation_config.eos_token_id = [base_of(model).config.vocab_size + 1]  # no row ends early
        for length in (4, 10):
            with device.phase(f"{length} tokens") as counts:
                sampling = Sampling(length, temperature, 0.95, 20)
                rollouts = ENGINES[engine]().generate(model, [[20, 21, 22], [30]], sampling, 0)
            assert {len(row) for row in rollouts.completions} == {length}
            found.append(counts.synchronizations)
    assert found[1].total() - found[0].total() <= A_TOKEN * 6, found[1] - found[0]


@pytest.mark.parametrize("weights", list(WEIGHTS))
def test_a_scoring_pass_synchronizes_once(weights: str, folder: str) -> None:
    """Transformers looks once for packed rows in the positions."""
    with strict_device() as device:
        module, _ = parts_of({"weights": weights}, folder)
        model = module.policy.build(torch.device("cuda", 0))
        model.to("cuda:0")
        with device.phase("pass") as counts:
            states, _ = score(model, [[20, 21, 22], [30]], [[40] * 5, [41] * 9])
            states.hidden.float().sum().backward()
    assert counts.synchronizations.total() <= 1, counts.synchronizations


def test_a_step_reads_its_measurements_once(folder: str, tmp_path: Path) -> None:
    with watched_device() as device:
        module, data = parts_of({}, folder, token_budget=64)
        with checked_steps(device, module):
            trainer_of(tmp_path, limit_val_batches=0).fit(module, data)
        reads = {place: count for place, count in device.counts["micro-batches"].waits.items() if "copy to the CPU" in place}
    assert sum(reads.values()) == 1, reads
    assert isinstance(module, OPSDModule)


@pytest.mark.parametrize(
    "context", [CritiqueContext(sampling=Sampling(max_new_tokens=4, temperature=0.0)), FeedbackContext()]
)
def test_contexts_of_completions_run_on_the_device(context: OnlineContext, folder: str, tmp_path: Path) -> None:
    """With learning from wrong completions only."""
    with watched_device() as device:
        module, data = parts_of({}, folder, context=context, learn_from="wrong")
        run = trainer_of(tmp_path, max_steps=2, limit_val_batches=0)
        run.fit(module, data)
        assert not device.mixes
    assert float(run.callback_metrics["train/selected_fraction"]) == 1


def test_demonstrations_are_scored_on_the_device(folder: str, tmp_path: Path) -> None:
    """The same values as on the CPU."""

    def values(module: OPSDModule, data: OPSDDataModule, run: Trainer) -> dict[str, float]:
        data.grader = NoGrader()
        run.validate(module, data, verbose=False)
        return {name: float(value) for name, value in run.callback_metrics.items()}

    with watched_device() as device:
        found = values(*parts_of({}, folder, grader=NoGrader()), trainer_of(tmp_path))
        assert not device.mixes
    plain = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    expected = values(*parts_of({}, folder, grader=NoGrader()), plain)
    assert found.keys() == {"val/nll", "val/divergence"} and found == pytest.approx(expected, rel=1e-3)
