"""Tests of the precision of a step: measurements are exact in float32 for the logits of any precision, on both devices.

Under autocast the logits are in bfloat16. What is measured from them must not be rounded again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from helpers.covering import Case
from helpers.device_cases import DEFAULT, objective_of, parts_of, save_model, trainer_of
from helpers.strict_device import strict_device, unavailable
from helpers.training import trainer as cpu_trainer
from opsd_lightning.callbacks.health_metrics import ClassDivergence, MeanLength, PhraseRate
from opsd_lightning.losses.objectives import Objective, log_softmax, token_logprobs
from opsd_lightning.methods.base import PolicyModule
from opsd_lightning.models import scoring
from opsd_lightning.models.policy import LoRA
from opsd_lightning.models.scoring import check_head
from opsd_lightning.reports.token_scores import predictions
from opsd_lightning.rollouts import self_checks
from opsd_lightning.rollouts.base import RolloutEngine
from opsd_lightning.types import ConfigError, Rollouts, Sampling, TokenStates

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))),
]
CASES: dict[str, Case] = {
    "forward KL": {},
    "reverse KL, top k, clip": {"divergence": "reverse", "support": "top k and tail", "clip": "token"},
    "JSD, trust region, anchor": {"divergence": "jsd", "clip": "pointwise", "teacher": "trust region", "anchor": "yes"},
    "sampled token": {"divergence": "sampled token", "positions": "decaying"},
    "grpo": {"method": "grpo"},
    "sft": {"method": "sft"},
}


class Fixed(RolloutEngine):
    """Engine of fixed completions, so that two precisions are compared on the same tokens."""

    def generate(self, model: Any, prompts: Any, sampling: Sampling, seed: int) -> Rollouts:
        rows = [[40 + (7 * row + 3 * n) % 50 for n in range(10)] for row in range(len(prompts) * sampling.n)]
        return Rollouts(rows, [True] * len(rows), sampling.n)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("precision"))


@contextlib.contextmanager
def on(device: str) -> Iterator[None]:
    with strict_device() if device == "cuda" else contextlib.nullcontext():
        yield


class Watch(Callback):
    """Callback that keeps the first step's loss, gradients and logged metrics."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self.gradients: dict[str, Tensor] = {}

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        if not self.gradients:
            parameters = module.model.named_parameters()
            self.gradients = {name: p.grad.detach().cpu().float().clone() for name, p in parameters if p.grad is not None}

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.metrics = {key: float(v) for key, v in trainer.callback_metrics.items() if key.startswith("train/")}


def one_step(case: Case, precision: str, device: str, folder: str, path: Path) -> tuple[PolicyModule, Watch]:
    """Make one optimizer step on fixed completions without dropout."""
    with on(device):
        module, data = parts_of(case, folder, policy={"lora": LoRA(r=4, alpha=8, dropout=0.0)}, rollouts=Fixed())
        watch = Watch()
        settings: dict[str, Any] = {"max_steps": 1, "limit_val_batches": 0, "precision": precision}
        if device == "cuda":
            run = trainer_of(path, watch, **settings)
        else:
            run = cpu_trainer(path, watch, **settings | {"logger": False, "enable_checkpointing": False})
        run.fit(module, data)
    return module, watch


class Recorded:
    """The logits of all tokens of a step, in float64, as the objective's blocks got them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.blocks: dict[int, list[tuple[Tensor, Tensor | None, Tensor, Tensor]]] = {}
        self.dtypes: set[torch.dtype] = set()
        plain = Objective._block

        def block(
            objective: Any, student: Tensor, teacher: Tensor | None, targets: Tensor, weights: Tensor, *rest: Any
        ) -> Any:
            self.dtypes.add(student.dtype)
            kept = [
                None if value is None else value.detach().cpu().double().clone() for value in (student, teacher, weights)
            ]
            found = self.blocks.setdefault(id(objective), [])
            found.append((kept[0], kept[1], targets.cpu().clone(), kept[2]))  # type: ignore[arg-type]
            return plain(objective, student, teacher, targets, weights, *rest)

        monkeypatch.setattr(Objective, "_block", block)

    def metrics(self, objective: Objective) -> dict[str, float]:
        """Compute the metrics of an objective in float64."""
        sums: dict[str, float] = {"loss": 0.0}
        tokens = 0
        for student_logits, teacher_logits, targets, weights in self.blocks[id(objective)]:
            student = log_softmax(student_logits / objective.temperature)
            teacher = None if teacher_logits is None else log_softmax(teacher_logits / objective.temperature)
            loss, clipped = objective.per_token(student, teacher, targets)
            sums["loss"] += float((loss * weights).sum())
            columns = {"student_entropy": -(student.exp() * student).sum(-1), "clipped_mass": clipped}
            if teacher is not None:
                columns["forward_kl"] = (teacher.exp() * (teacher - student)).sum(-1)
                columns["reverse_kl"] = (student.exp() * (student - teacher)).sum(-1)
                columns["teacher_entropy"] = -(teacher.exp() * teacher).sum(-1)
            for name, values in columns.items():
                sums[name] = sums.get(name, 0.0) + float(values.sum())
            tokens += len(targets)
        return {name: value if name == "loss" else value / tokens for name, value in sums.items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_logged_metrics_are_those_of_the_logits_in_float64(
    name: str, device: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = Recorded(monkeypatch)
    module, watch = one_step(CASES[name], "bf16-mixed", device, folder, tmp_path)
    assert torch.bfloat16 in recorded.dtypes or CASES[name].get("teacher") == "trust region"
    expected = recorded.metrics(module.objective)
    if (anchor := getattr(module, "anchor", None)) is not None:
        expected["loss"] += recorded.metrics(anchor.objective)["loss"]
    logged = {key: value for key, value in watch.metrics.items() if key.removeprefix("train/") in expected}
    assert len(logged) >= 2
    for key, value in logged.items():
        assert value == pytest.approx(expected[key.removeprefix("train/")], rel=5e-6, abs=2e-7), key


#: Largest relative differences between bf16-mixed and 32-true. A logit has 8 significant bits, and the hidden states pass
#: through a layer of such products.
LOSS, METRIC, GRADIENT = 0.05, 0.05, 0.1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", [name for name in CASES if name != "sampled token"])
def test_bf16_mixed_agrees_with_float32(name: str, device: str, folder: str, tmp_path: Path) -> None:
    _, full = one_step(CASES[name], "32-true", device, folder, tmp_path / "full")
    _, mixed = one_step(CASES[name], "bf16-mixed", device, folder, tmp_path / "mixed")
    assert full.metrics.keys() == mixed.metrics.keys()
    for key, value in full.metrics.items():
        assert mixed.metrics[key] == pytest.approx(value, rel=LOSS if key == "train/loss" else METRIC, abs=1e-3), key
    assert full.gradients.keys() == mixed.gradients.keys()
    ours, theirs = (torch.cat([g.flatten() for g in side.gradients.values()]) for side in (full, mixed))
    assert float((ours - theirs).norm()) <= GRADIENT * float(ours.norm())


@pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
@pytest.mark.parametrize("name", CASES)
def test_the_imitated_device_gives_the_step_of_the_cpu(name: str, folder: str, tmp_path: Path) -> None:
    _, here = one_step(CASES[name], "32-true", "cpu", folder, tmp_path / "cpu")
    _, there = one_step(CASES[name], "32-true", "cuda", folder, tmp_path / "cuda")
    assert here.metrics == pytest.approx(there.metrics, rel=1e-4, abs=1e-6)
    assert here.gradients.keys() == there.gradients.keys()
    for key, gradient in here.gradients.items():
        torch.testing.assert_close(gradient, there.gradients[key], rtol=1e-3, atol=1e-6)


# -- measurements outside the step -------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_log_probabilities_of_bfloat16_logits_are_exact_in_float32(device: str) -> None:
    logits = (4 * torch.randn(30, 200, generator=torch.Generator().manual_seed(0))).bfloat16()
    targets = torch.arange(30)
    expected = (logits.double() / 1.1).log_softmax(-1)
    with on(device), torch.autocast(device, dtype=torch.bfloat16):
        there = TokenStates(logits.to(device), lambda hidden: hidden.clone())
        own = token_logprobs(there, targets.to(device), 1, 1.1).cpu()
        found = predictions(there, targets.to(device), 1.1, 5, 1)
    assert own.dtype == found.logprob.dtype == found.top_logprobs.dtype == torch.float32
    reference = expected.gather(-1, targets[:, None])[:, 0]
    for values in (own, found.logprob):
        torch.testing.assert_close(values.double(), reference, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(found.top_logprobs.double(), expected.topk(5).values, rtol=1e-6, atol=2e-6)


# -- self-checks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_self_checks_run_in_the_precision_of_training(
    stage: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[bool]] = {}

    def watch(name: str) -> None:
        plain = getattr(self_checks, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            seen.setdefault(name, []).append(torch.is_autocast_enabled("cpu"))
            return plain(*args, **kwargs)

        monkeypatch.setattr(self_checks, name, call)

    for name in ("check_head", "_compare_scores", "_compare_rollouts"):
        watch(name)
    module, data = parts_of({"teacher": "other model"}, folder)
    run = cpu_trainer(tmp_path, logger=False, enable_checkpointing=False, max_steps=1, precision="bf16-mixed")
    getattr(run, stage)(module, datamodule=data)
    assert all(all(flags) for flags in seen.values())
    assert set(seen) == {"check_head", "_compare_scores", "_compare_rollouts"}
    assert stage != "fit" or len(seen["check_head"]) == 2, "the network of the teacher, too"


@pytest.mark.parametrize("mixed", [True, False])
def test_rounding_of_autocast_is_no_other_head(mixed: bool, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hidden states of float32 weights are in float32 under autocast, and the logits are not."""
    module, _ = parts_of({}, folder)
    model = module.policy.build()
    plain = scoring.head_of

    def rounded(model: Any, kept: Any = None) -> Any:
        head = plain(model, kept)
        return lambda hidden: head(hidden) * (1 + 2**-8)

    monkeypatch.setattr(scoring, "head_of", rounded)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
        if mixed:
            check_head(model)
        else:
            with pytest.raises(ConfigError):
                check_head(model)


# -- the default dtype -------------------------------------------------------------------------------------------------


@pytest.fixture
def half_by_default() -> Iterator[None]:
    """Make bfloat16 the default dtype, as bf16-true does."""
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("half_by_default")
def test_weights_and_metrics_do_not_take_the_default_dtype() -> None:
    rollouts = Rollouts([[1] * 600, [1] * 3], [True, True], 1)
    for case in ({}, {"positions": "decaying"}, {"positions": "first"}):
        for reduction in ("token_mean", "sequence_mean"):
            weights = objective_of(DEFAULT | case, reduction=reduction).token_weights(rollouts)
            assert all(weight.dtype == torch.float32 for weight in weights)
    rate, lengths, divergence = PhraseRate(["x"]), MeanLength(), ClassDivergence()
    for _ in range(300):
        rate.update(["x"], [1])
    lengths.update([1001, 1002], [True, True])
    divergence.update([torch.tensor([0.1, 0.3], dtype=torch.float32)], [["math", "math"]])
    assert float(rate.completions) == 300
    assert float(lengths.compute()["all"]) == 1001.5
    assert float(divergence.compute()["math"]) == pytest.approx(0.2, rel=1e-6)
