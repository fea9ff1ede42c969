"""Tests of graded completions on disk: an interrupted evaluation resumes and ends with the same result."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer

from helpers.distributed import ddp, parts
from helpers.processes import on_ranks
from opsd_lightning.callbacks.rollouts import RolloutWriter
from opsd_lightning.data.sources import WordProblems
from opsd_lightning.grading.base import Grade, Grader
from opsd_lightning.grading.exact_match import ExactMatch
from opsd_lightning.grading.json_grader import JSONGrader
from opsd_lightning.grading.math_grader import MathGrader
from opsd_lightning.models.policy import LoRA, Policy
from opsd_lightning.rollouts.transformers_engine import TransformersEngine
from opsd_lightning.teachers import EMATeacher
from opsd_lightning.types import ConfigError, Example, Rollouts, Sampling

pytestmark = pytest.mark.integration


class Counting(TransformersEngine):
    """Stops at a given call, as a machine that goes down does."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        self._stop_at, self._calls = stop_at, 0

    def generate(self, model: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> Rollouts:
        self._calls += sampling.temperature > 0  # not the greedy rows of the check at the start
        if self._calls == self._stop_at:
            if dist.is_initialized():
                dist.barrier()  # the first rank to end ends the others: each reaches its own stop before
            raise RuntimeError("power cut")
        return super().generate(model, prompts, sampling, seed)


class LastDigit(MathGrader):
    """Grades that a random model gets right now and then: by the length of what it wrote."""

    def find_answer(self, text: str) -> str | None:
        return str(len(text) % 3) if text else None

    def equal(self, answer: str | None, reference: str) -> bool:
        return answer == str(len(reference) % 3)


Run = tuple[dict[str, float], int]


@pytest.fixture
def run(make_policy: Callable[..., Policy]) -> Callable[..., Run]:
    def start(
        folder: Path,
        stage: str = "test",
        stop_at: int | None = None,
        strategy: Any = "auto",
        devices: int = 1,
        **changes: Any,
    ) -> Run:
        policy = make_policy(lora=LoRA(r=4, alpha=8, dropout=0.0, options={"init_lora_weights": False}))
        engine = Counting(stop_at)
        settings = {
            "eval_sampling": Sampling(max_new_tokens=10, n=4, temperature=2.0),
            "rollouts": engine,
            "grader": LastDigit(),
            "evaluate_teacher": True,
            "teacher": EMATeacher(),
        } | changes
        size = settings.pop("size", 7)
        resume = settings.pop("resume", True)
        module, data = parts(policy, 2, **settings)
        data.sources["test"] = WordProblems(size=size, seed=3)
        trainer = Trainer(
            accelerator="cpu",
            devices=devices,
            strategy=strategy,
            default_root_dir=folder,
            callbacks=[RolloutWriter(resume=resume)],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        if stage == "test":
            trainer.test(module, data, verbose=False)
        else:
            trainer.predict(module, data)
        return {name: float(value) for name, value in trainer.callback_metrics.items()}, engine._calls

    return start


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def only(folder: Path, stage: str = "test") -> Path:
    (found,) = (folder / "results").glob(f"{stage}-*")
    return found


@pytest.mark.parametrize("stop_at", [1, 2, 6, 8])
def test_interrupted_test_resumes(stop_at: int, run: Callable[..., Run], tmp_path: Path) -> None:
    """Four batches of both roles: eight rollouts. The teacher's of a batch whose student's are done is lost with it."""
    whole, calls = run(tmp_path / "whole")
    assert calls == 8
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path / "cut", stop_at=stop_at)
    finished = (stop_at - 1) // 2
    if finished:
        part = only(tmp_path / "cut") / "rank0.jsonl"
        assert len(lines(part)) == finished * 2 * 4 * 2  # questions, samples, roles
        with part.open("ab") as file:
            file.write(b'{"role": "student", "index": 6, "sample"')  # half a line
    again, calls = run(tmp_path / "cut")
    assert calls == 8 - 2 * finished
    assert again == whole  # to the last bit
    ours, theirs = tmp_path / "cut" / "test.jsonl", tmp_path / "whole" / "test.jsonl"
    assert ours.read_bytes() == theirs.read_bytes()
    assert [(r["role"], r["index"], r["sample"]) for r in lines(ours)] == [
        (role, index, sample) for role in ("student", "teacher") for index in range(7) for sample in range(4)
    ]
    assert sorted(p.name for p in only(tmp_path / "cut").iterdir()) == ["completions.jsonl", "metrics.json", "settings.json"]
    saved = json.loads((only(tmp_path / "cut") / "metrics.json").read_text())
    assert saved["test/avg@4"] == whole["test/avg@4"] and 0 < whole["test/avg@4"] < 1
    assert run(tmp_path / "cut") == (whole, 0)  # nothing is left to do
    assert run(tmp_path / "cut", resume=False) == (whole, 8)


def test_interrupted_predict_resumes(run: Callable[..., Run], tmp_path: Path) -> None:
    run(tmp_path / "whole", "predict")
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path / "cut", "predict", stop_at=3)
    assert len(lines(only(tmp_path / "cut", "predict") / "rank0.jsonl")) == 2 * 2 * 4
    assert run(tmp_path / "cut", "predict")[1] == 2
    assert (tmp_path / "cut" / "predict.jsonl").read_bytes() == (tmp_path / "whole" / "predict.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"eval_sampling": Sampling(max_new_tokens=10, n=4, temperature=1.9)}, "sampling"),
        ({"seed": 1}, "seed"),
        ({"size": 6}, "questions"),
        ({"grader": MathGrader()}, "grader"),
        ({"rollouts": TransformersEngine(max_rows=3)}, "engine"),
        ({"evaluate_teacher": False}, "teacher"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_changed_evaluation_starts_over(
    changes: dict[str, Any], name: str, run: Callable[..., Run], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path, stop_at=5)
    kept = (only(tmp_path) / "rank0.jsonl").read_bytes()
    before = only(tmp_path)
    with caplog.at_level("INFO"):
        run(tmp_path, **changes)
    assert str(before) in caplog.text and name in caplog.text
    assert len(list((tmp_path / "results").iterdir())) == 2 and (before / "rank0.jsonl").read_bytes() == kept


@pytest.mark.parametrize(
    "changes",
    [
        {"lora": LoRA(r=4, alpha=16, dropout=0.0, options={"init_lora_weights": False})},
        {"attn_implementation": "eager"},
    ],
    ids=["alpha", "attention"],
)
def test_changed_settings_start_over(
    changes: dict[str, Any], run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path)
    build = Policy.build
    monkeypatch.setattr(Policy, "build", lambda self, *args: build(replace(self, **changes), *args))
    assert run(tmp_path)[1] == 8 and len(list((tmp_path / "results").iterdir())) == 2


class Half(Grader):
    """Half of the score of another grader, and of what a function says."""

    def __init__(self, inner: Grader, share: float = 0.5, bonus: Callable[[str], float] | None = None) -> None:
        self.inner, self._share, self.bonus = inner, share, bonus

    def grade(self, completion: str, example: Example) -> Grade:
        return Grade(self._share * self.inner.grade(completion, example).score)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Half(ExactMatch()), Half(ExactMatch(ignore_case=True))),
        (Half(ExactMatch()), Half(ExactMatch(), share=0.25)),
        (Half(ExactMatch(), bonus=partial(min, 1)), Half(ExactMatch(), bonus=partial(min, 2))),
        (Half(Half(ExactMatch())), Half(Half(JSONGrader()))),
    ],
    ids=["setting of a part", "private attribute", "argument of a function", "class of a part"],
)
def test_parts_of_graders_tell_evaluations_apart(
    first: Grader, second: Grader, run: Callable[..., Run], tmp_path: Path
) -> None:
    assert [run(tmp_path, grader=grader)[1] > 0 for grader in (first, first, second)] == [True, False, True]


@pytest.mark.parametrize("has_source", [True, False])
def test_changed_code_of_a_grader_starts_over(
    has_source: bool, run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user corrects the grader, and evaluates again. In a notebook, the module has no source."""
    text = (
        "from opsd_lightning import Grade, Grader\n"
        "class Constant(Grader):\n    def grade(self, completion, example):\n        return Grade(SCORE)\n"
    )
    found = []
    for number, score in enumerate(("0.25", "0.25", "0.75")):
        module = ModuleType("graders_of_a_user")
        module.__file__ = str(tmp_path / f"{number}.py") if has_source else None
        (tmp_path / f"{number}.py").write_text(text.replace("SCORE", score))
        exec(compile(text.replace("SCORE", score), str(module.__file__), "exec"), vars(module))
        monkeypatch.setitem(sys.modules, "graders_of_a_user", module)
        values, calls = run(tmp_path / "run", grader=module.Constant())
        found.append((values["test/avg@4"], calls > 0))
    assert found == [(0.25, True), (0.25, False), (0.75, True)]


def test_changed_weights_start_over(run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path)
    build = Policy.build

    def other(self: Policy, *args: Any) -> Any:
        model = build(self, *args)
        with torch.no_grad():
            next(p for n, p in model.named_parameters() if "lora_B.default" in n)[0, 0] += 1e-3
        return model

    monkeypatch.setattr(Policy, "build", other)
    assert run(tmp_path)[1] == 8 and len(list((tmp_path / "results").iterdir())) == 2


def test_evaluation_resumes_on_two_ranks(run: Callable[..., Run], tmp_path: Path) -> None:
    """A rank that was ahead samples again what the other had not finished: sampling may need both."""
    two = {"devices": 2, "strategy": None}

    def ranks(folder: Path, *stops: int | None) -> list[Run]:
        def work(rank: int) -> Run:
            return run(folder, stop_at=stops[rank] if stops else None, **(two | {"strategy": ddp()}))

        return on_ranks(work, tmp_path)

    whole = ranks(tmp_path / "whole")
    assert [calls for _, calls in whole] == [4, 4]
    assert whole[0][0] == whole[1][0]
    with pytest.raises(AssertionError, match="power cut"):
        ranks(tmp_path / "cut", 3, 4)
    folder = only(tmp_path / "cut")
    assert (folder / "rank0.jsonl").exists()
    again = ranks(tmp_path / "cut")
    assert [calls for _, calls in again] == [2, 2]
    assert again[0][0] == whole[0][0]
    assert (tmp_path / "cut" / "test.jsonl").read_bytes() == (tmp_path / "whole" / "test.jsonl").read_bytes()
    assert len(lines(tmp_path / "whole" / "test.jsonl")) == 7 * 4 * 2
    assert not list(folder.glob("rank*"))


def test_batches_without_indices_are_refused(
    run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from opsd_lightning.data.loaders import EvalLoader

    plain = EvalLoader.__iter__
    monkeypatch.setattr(EvalLoader, "__iter__", lambda self: (b._replace(indices=()) for b in plain(self)))
    with pytest.raises(ConfigError) as refused:
        run(tmp_path)
    assert refused.value.setting == "data"


def test_results_table_is_printed(run: Callable[..., Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values, _ = run(tmp_path)
    printed = capsys.readouterr().out
    for phrase in ("avg@4", "pass@2", "maj@4", "teacher avg@4", "completion tokens", "truncated fraction", "± over samples"):
        assert phrase in printed, phrase
    row = next(line for line in printed.splitlines() if " avg@4 " in line and "teacher" not in line)
    for name in ("avg@4", "avg@4_se", "avg@4_se_samples"):
        assert f"{values[f'test/{name}']:.1%}" in row
    assert str(tmp_path / "test.jsonl") in printed and str(only(tmp_path)) in printed
