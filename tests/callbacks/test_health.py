"""Tests of the health metrics against hand counts, and of the callback that logs them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from helpers.distributed import ddp
from helpers.processes import on_ranks
from helpers.training import Recorder, adapters, parts, trainer
from opsd_lightning.callbacks.health import Health
from opsd_lightning.callbacks.health_metrics import (
    ClassDivergence,
    CorrectnessGap,
    Distinct,
    MeanLength,
    PhraseRate,
    PositionDivergence,
    TraceOverlap,
    token_class,
)
from opsd_lightning.methods.grpo import AnswerReward, GRPOModule
from opsd_lightning.methods.mixed import MixedOPSDModule
from opsd_lightning.methods.sft import SFTModule
from opsd_lightning.methods.step import StepCallback, StepRecord
from opsd_lightning.models.policy import Policy
from opsd_lightning.types import ConfigError, Sampling
from opsd_lightning.utils.token_text import Piece


def rounded(found: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: round(float(value), 5) for name, value in found.items()}


def test_divergence_is_averaged_by_position() -> None:
    """Eight tokens 1 .. 8 and two tokens 10, 20: quarters (1, 2), (3, 4), ...; of two tokens the first and the third."""
    metric = PositionDivergence()
    metric.update([torch.arange(1.0, 9.0), torch.tensor([10.0, 20.0]), torch.zeros(0)])
    assert rounded(metric.compute()) == {
        "first_1": 5.5,  # (1 + 10) / 2
        "first_4": round(40 / 6, 5),  # (1 + 2 + 3 + 4 + 10 + 20) / 6
        "first_16": 6.6,  # (36 + 30) / 10
        "quarter_1": round(13 / 3, 5),
        "quarter_2": 3.5,
        "quarter_3": round(31 / 3, 5),
        "quarter_4": 7.5,
    }


@pytest.mark.parametrize(
    ("piece", "expected"),
    [
        (Piece(" 12"), "math"),
        (Piece(" +"), "math"),
        (Piece("-"), "math"),
        (Piece("\\frac"), "math"),
        (Piece(" Wait"), "style"),
        (Piece("Let's"), "style"),
        (Piece(" apples"), "word"),
        (Piece(" -ly"), "word"),
        (Piece(".\n"), "mark"),
        (Piece(" **"), "mark"),
        (Piece("**Step"), "word"),
        (Piece(" **5"), "math"),
        (Piece(" *"), "math"),
        (Piece("  "), "mark"),
        (Piece("<|im_end|>", "special"), "special"),
        (Piece("", "bytes", b"\xe2\x9c"), "word"),
    ],
)
def test_tokens_are_sorted_into_classes(piece: Piece, expected: str) -> None:
    assert token_class(piece) == expected


def test_divergence_is_averaged_by_token_class() -> None:
    metric = ClassDivergence()
    metric.update([torch.tensor([0.5, 3.0]), torch.tensor([0.5, 1.0, 1.0])], [["math", "style"], ["math", "style", "word"]])
    assert rounded(metric.compute()) == {
        "math": 0.5,
        "style": 2.0,
        "word": 1.0,
        "math_share": round(1 / 6, 5),
        "style_share": round(4 / 6, 5),
        "word_share": round(1 / 6, 5),
        "style_over_math": 4.0,
    }


def test_teacher_gap_is_split_by_correctness() -> None:
    metric = CorrectnessGap()
    metric.update([torch.tensor([1.0, 3.0]), torch.tensor([-2.0]), torch.tensor([-5.0, 0.0])], [True, False, False])
    assert rounded(metric.compute()) == {"wrong": round(-7 / 3, 5), "correct": 2.0, "accuracy": round(1 / 3, 5)}
    metric = CorrectnessGap()
    metric.update(None, [True, False])
    assert rounded(metric.compute()) == {"accuracy": 0.5}


def test_phrases_are_whole_words_in_any_case() -> None:
    metric = PhraseRate(["wait", "let me  check"])
    metric.update(["Wait, wait: Let me\ncheck the waiter.", "No awaiting."], [40, 10])
    assert rounded(metric.compute()) == {"per_1k": 60.0, "fraction": 0.5}
    with pytest.raises(ConfigError):
        PhraseRate([])


def test_overlap_with_the_trace_leaves_the_question_out() -> None:
    metric = TraceOverlap(2)
    # Of the completion's pairs "a b", "b c", "c d", "d z" the first is the question's; of the others two are the trace's.
    metric.update(["a b c d z"], ["A b c d e"], ["a b"])
    assert float(metric.compute()) == pytest.approx(2 / 3)
    metric.update(["short"], ["short"], [""])  # no pair
    assert float(metric.compute()) == pytest.approx(2 / 3)


def test_diversity_within_and_between_completions() -> None:
    def of(*texts: str) -> float:
        metric = Distinct(2)
        metric.update(texts)
        return float(metric.compute())

    assert of("a b c", "d e f") == 1.0
    assert of("a b c", "a b c") == 0.5
    assert of("a a a a a") == 0.25
    metric = Distinct(2)
    metric.update(["a b c", "a b c"])
    metric.update(["a b c"])
    assert float(metric.compute()) == 0.75


def test_mean_lengths_are_counted_in_tokens() -> None:
    metric = MeanLength()
    metric.update([2, 4, 9], [True, True, False])
    assert rounded(metric.compute()) == {"all": 5.0, "terminated": 3.0}


class Seen(StepCallback):
    """The health metrics after each step, and what they were made of."""

    def __init__(self) -> None:
        self.values: dict[int, dict[str, float]] = {}
        self.first_kl: dict[int, float] = {}

    def on_step_scored(self, trainer: Any, module: Any, record: StepRecord) -> None:
        if rows := record.measured.get("forward_kl"):
            self.first_kl[trainer.global_step + 1] = float(torch.stack([row[0] for row in rows]).mean())

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        self.values[trainer.global_step] = {
            name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("health/")
        }


def test_health_metrics_are_logged_without_changing_training(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    weights, losses, seen = [], [], Seen()
    for callbacks in ([], [Health(every_n_steps=2), seen]):
        torch.manual_seed(0)
        module, data = parts(make_policy())
        recorder = Recorder()
        trainer(tmp_path / str(len(callbacks)), recorder, *callbacks, max_steps=4).fit(module, data)
        weights.append(adapters(module))
        losses.append(recorder.losses)
    assert losses[0] == losses[1]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    names = {"hedges_per_1k_tokens", "leak_fraction", "trace_overlap", "distinct_3", "length_drift", "accuracy"}
    names |= {"forward_kl_first_1", "forward_kl_quarter_4"}
    assert {f"health/{name}" for name in names} <= seen.values[2].keys()
    assert any(name.startswith("health/teacher_gap_") for name in seen.values[2])
    for step in (1, 2, 4):  # the first and the multiples are measured, and by the step's own numbers
        assert seen.values[step]["health/forward_kl_first_1"] == pytest.approx(seen.first_kl[step], rel=1e-5)
    assert seen.values[3] == seen.values[2]
    assert seen.values[1]["health/length_drift"] == pytest.approx(1.0)


@pytest.mark.parametrize("method", ["sft", "grpo"])
def test_methods_without_a_teacher_skip_the_divergence(
    method: str, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    policy = make_policy()
    _, data = parts(policy)
    settings: dict[str, Any] = {"optimizer": lambda p: torch.optim.AdamW(p, lr=0.01), "lr_scheduler": None}
    sampling = Sampling(max_new_tokens=8, n=2)
    module = (
        SFTModule(policy, **settings)
        if method == "sft"
        else GRPOModule(policy, reward=AnswerReward(), sampling=sampling, updates_per_batch=2, **settings)
    )
    seen = Seen()
    trainer(tmp_path, Health(every_n_steps=1), seen, max_steps=2).fit(module, data)
    last = seen.values[max(seen.values)]
    assert not any("forward_kl" in name or "gap" in name for name in last)
    assert ("health/accuracy" in last) == (method == "grpo")  # the data's traces say nothing of the student


def test_a_resumed_run_compares_with_its_own_start(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    first = Health(every_n_steps=1, window=2)
    fit = trainer(tmp_path, first, max_steps=2)
    fit.fit(*parts(make_policy()))
    fit.save_checkpoint(tmp_path / "last.ckpt")
    second = Health(every_n_steps=1, window=2)
    trainer(tmp_path, second, max_steps=4).fit(*parts(make_policy()), ckpt_path=str(tmp_path / "last.ckpt"))
    assert len(first.state_dict()["lengths"]) == 2 and second.state_dict() == first.state_dict()


@pytest.mark.integration
def test_two_ranks_log_the_values_of_all_completions(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    """Each rank tells what it fed; the logged values are those of both together."""
    policy = make_policy()

    class Fed(Health):
        def measure(self, module: Any, update: Any) -> Any:
            self.fed = update.measured["forward_kl"], [len(c) for c in update.rollouts.completions]
            self.found = super().measure(module, update)
            return self.found

    def work(rank: int) -> Any:
        health = Fed(every_n_steps=1)
        module, data = parts(policy)
        trainer(tmp_path / "ranks", health, max_steps=1, devices=2, strategy=ddp()).fit(module, data)
        return {"fed": health.fed, "found": {name: float(value) for name, value in health.found.items()}}

    ranks = on_ranks(work, tmp_path)
    assert ranks[0]["found"] == ranks[1]["found"]
    whole = PositionDivergence()
    for rank in ranks:
        whole.update(rank["fed"][0])
    for name, value in whole.compute().items():
        assert ranks[0]["found"][f"forward_kl_{name}"] == pytest.approx(float(value), rel=1e-5)
    assert ranks[0]["fed"][0][0].tolist() != ranks[1]["fed"][0][0].tolist()


@pytest.mark.filterwarnings("ignore::UserWarning:opsd_lightning.methods.optimization")
def test_steps_on_traces_are_not_the_students(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    policy = make_policy()
    _, data = parts(policy)
    settings: dict[str, Any] = {"optimizer": lambda p: torch.optim.AdamW(p, lr=0.0), "sampling": Sampling(max_new_tokens=8)}
    module = MixedOPSDModule(policy, trace_share=0.5, **settings)
    sampled: list[bool] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            sampled.append(outputs["rollouts"].sampled)

    health, seen = Health(every_n_steps=1, window=100), Seen()
    trainer(tmp_path, health, seen, Watch(), max_steps=8).fit(module, data)
    assert 0 < sum(sampled) < 8 and len(health.state_dict()["lengths"]) == sum(sampled)
    assert all(values.get("health/trace_overlap", 0.0) < 1 for values in seen.values.values())


@pytest.mark.parametrize(("settings", "name"), [({"hedges": []}, "hedges"), ({"leaks": ["  "]}, "leaks")])
def test_empty_phrases_are_refused(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Health(**settings)
    assert refused.value.setting == f"trainer.callbacks.{name}"
