"""Tests of sources, verification of traces, and loaders that resume."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from datasets import Dataset, DatasetDict
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from helpers.classes import subclasses
from helpers.files import write_jsonl
from helpers.messages import mentions
from opsd_lightning.data.datamodule import OPSDDataModule
from opsd_lightning.data.drop_reasons import DropReason
from opsd_lightning.data.loaders import EvalLoader, TrainLoader
from opsd_lightning.data.skill_sources import SkillSource
from opsd_lightning.data.sources import (
    Columns,
    ExampleSource,
    FileSource,
    HubSource,
    ReasoningGymSource,
    TraceStyle,
    WordProblems,
)
from opsd_lightning.data.task_sources import TaskSource
from opsd_lightning.grading.math_grader import MathGrader
from opsd_lightning.methods.opsd import OPSDModule
from opsd_lightning.models.policy import Policy
from opsd_lightning.prompts.contexts import (
    AnswerContext,
    ColumnContext,
    HintContext,
    NoContext,
    OtherProblemContext,
    PrivilegedContext,
)
from opsd_lightning.prompts.templates import Prompts
from opsd_lightning.types import ConfigError, DataRequirements, Example, PromptBatch, UserError

ROWS: list[dict[str, Any]] = [
    {"problem": f"What is {n} + 1?", "solution": f"{n} + 1 = {n + 1}. The answer is {n + 1}.", "gold": n + 1, "tip": "count"}
    for n in range(12)
]
MAPPED = Columns(answer="gold")


class Listed(ExampleSource):
    def __init__(self, *examples: Example) -> None:
        self.listed = list(examples)

    def examples(self) -> list[Example]:
        return self.listed


def files(folder: Path) -> list[Path]:
    Dataset.from_list(ROWS).to_parquet(folder / "rows.parquet")
    (folder / "rows.json").write_text(json.dumps(ROWS))
    with (folder / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)
    return [write_jsonl(folder / "rows.jsonl", ROWS), *(folder / f"rows.{kind}" for kind in ("json", "csv", "parquet"))]


def test_every_file_format_gives_the_same_examples(tmp_path: Path) -> None:
    for path in files(tmp_path):
        examples = FileSource(str(path), columns=MAPPED).examples()
        assert [e[:3] for e in examples] == [(r["problem"], r["solution"], str(r["gold"])) for r in ROWS], path
        assert examples[3].columns["tip"] == "count"
        assert len(FileSource(str(path), split="train[:25%]", columns=MAPPED).examples()) == 3


def test_datasets_are_loaded_from_disk(tmp_path: Path) -> None:
    whole = Dataset.from_list(ROWS)
    whole.save_to_disk(tmp_path / "one")
    DatasetDict({"train": whole, "held": whole.select(range(2))}).save_to_disk(tmp_path / "many")
    assert len(HubSource(str(tmp_path / "one")).examples()) == 12
    assert len(HubSource(str(tmp_path / "many"), split="held").examples()) == 2
    with pytest.raises(UserError, match=mentions("test", "train", "held")):
        HubSource(str(tmp_path / "many"), split="test").examples()
    with pytest.raises(UserError, match="split"):
        HubSource(str(tmp_path / "one"), split="train[:2]").examples()
    with pytest.raises(UserError, match="nobody/nothing"):
        HubSource("nobody/nothing").examples()


def test_reasoning_gym_examples_repeat_for_a_seed() -> None:
    examples = ReasoningGymSource(size=5, seed=3).examples()
    assert len(examples) == 5 and all(e.question and e.trace and e.answer for e in examples)
    assert examples == ReasoningGymSource(size=5, seed=3).examples() != ReasoningGymSource(size=5, seed=4).examples()
    with pytest.raises(ConfigError, match=r"^trace_key: .* 'answer_cot'"):
        ReasoningGymSource("chain_sum", size=1, trace_key="answer_cot").examples()
    (example,) = ReasoningGymSource("chain_sum", size=1).examples()
    assert example.trace == "" and example.answer and example.columns["source_dataset"] == "chain_sum"
    assert [e.trace for e in ReasoningGymSource(size=5, seed=3, trace_key=None).examples()] == [""] * 5
    with pytest.raises(ConfigError, match=r"^task: .* 'no_such_task'"):
        ReasoningGymSource("no_such_task", size=1).examples()


def test_word_problems_are_right_and_distinct() -> None:
    examples = WordProblems(size=500, seed=7).examples()
    assert len({e.question for e in examples}) == 500
    assert examples == WordProblems(size=500, seed=7).examples() != WordProblems(size=500, seed=8).examples()
    for example in examples:
        found = re.fullmatch(r"\w+ has (\d+) ([+-]) (\d+) = (\d+) \w+ (?:now|left), so the answer is (\d+)\.", example.trace)
        assert found, example.trace
        a, sign, b, result, answer = found.groups()
        value = int(a) + int(b) if sign == "+" else int(a) - int(b)
        assert value == int(result) == int(answer) == int(example.answer) and 0 < value <= 20
        assert re.findall(r"\d+", example.question) == [a, b]
    with pytest.raises(UserError, match=r"^size: .* 100000 "):
        WordProblems(size=100000, largest=5).examples()


@pytest.mark.parametrize("style", get_args(TraceStyle))
def test_word_problems_have_right_traces_in_every_style(style: TraceStyle) -> None:
    own, examples = (WordProblems(300, seed=7, largest=10, style=each).examples() for each in ("own", style))
    for example, other in zip(examples, own, strict=True):
        assert (example.question, example.answer) == (other.question, other.answer)
        assert MathGrader().verify(example).score == 1
        assert example.trace.endswith(f"so the answer is {example.answer}.")
        wrong = example.trace.replace(f"is {example.answer}.", f"is {int(example.answer) + 1}.")
        assert MathGrader().verify(example._replace(trace=wrong)).score == 0
        assert all(number in example.trace for number in re.findall(r"\d+", example.question))
    assert (examples == own) == (style == "own")


def test_unknown_styles_are_refused() -> None:
    with pytest.raises(ConfigError, match=mentions("style", "loud")):
        WordProblems(style="loud")  # type: ignore[arg-type]


def test_every_source_is_under_test() -> None:
    ours = {cls for cls in subclasses(ExampleSource) if cls.__module__.startswith("opsd_lightning")}
    assert ours == {FileSource, HubSource, ReasoningGymSource, WordProblems, *subclasses(TaskSource), TaskSource,
                    *subclasses(SkillSource), SkillSource}  # fmt: skip


@pytest.fixture
def data(make_policy: Callable[..., Policy]) -> Callable[..., OPSDDataModule]:
    def make(*examples: Example, **settings: Any) -> OPSDDataModule:
        settings = {
            "batch_size": 1,
            "max_new_tokens": 16,
            "prompts": Prompts("{question}", "{question} {context}"),
        } | settings
        return OPSDDataModule(make_policy(), train=Listed(*examples), **settings)

    return make


GOOD = Example("1+1?", "1 + 1 = 2. The answer is 2.", "2")
INVALID = {
    DropReason.EMPTY_QUESTION: Example("", "The answer is 2.", "2"),
    DropReason.EMPTY_TRACE: Example("a", "", "2"),
    DropReason.WRONG_ANSWER: Example("b", "The answer is 3.", "2"),
    DropReason.NO_FINAL_ANSWER: Example("c", "It is two.", "2"),
    DropReason.PROMPT_TOO_LONG: Example("d" * 600, "The answer is 2.", "2"),
    DropReason.HELD_OUT: Example("held out", "The answer is 2.", "2"),
}


def attached(module: OPSDDataModule, needs: DataRequirements) -> OPSDDataModule:
    """Return a data module with a trainer and a method that has these requirements."""

    class Method(LightningModule):
        data_requirements = needs

    module.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    module.trainer.strategy.connect(Method())
    return module


def test_evaluation_prompts_have_their_own_chat_template_settings(data: Callable[..., OPSDDataModule]) -> None:
    off, on = {"enable_thinking": False}, {"enable_thinking": True}
    prompts = Prompts("{question}", "{question} {context}", None, off, off, evaluation_chat_template_kwargs=on)
    held_out = Example("2+2?", "The answer is 4.", "4")
    module = data(GOOD, val=Listed(held_out), test=Listed(held_out), prompts=prompts)
    module.setup("fit")
    module.setup("test")
    ends = {split: module.policy.load_tokenizer().decode(rows.student[0])[-16:] for split, rows in module.rows.items()}
    assert ends["train"].endswith("<think></think>") and "think" not in ends["val"] + ends["test"]


def test_long_completions_of_an_evaluation_drop_no_training_question(data: Callable[..., OPSDDataModule]) -> None:
    """The context has 512 tokens."""
    val = Listed(Example("2+2?", "", "4"), Example("2+2" + "?" * 50, "", "4"))
    for sampled in (16, 480):
        module = attached(data(GOOD, max_new_tokens=480, val=val), DataRequirements(max_new_tokens=sampled))
        if sampled == 480:
            with pytest.raises(ConfigError, match=r"^data\.train: "):
                module.setup("fit")
        else:
            module.setup("fit")
            assert len(module.rows["train"].examples) == 1
        assert module.dropped["val"] == {DropReason.PROMPT_TOO_LONG: 1}


def test_held_out_questions_are_left_out_without_traces_too(data: Callable[..., OPSDDataModule]) -> None:
    """As GRPO trains on, and contexts of the model's own completions."""

    module = data(Example("1+1?", "", "2"), Example("2+2?", "", "4"), val=Listed(Example("2+2?", "", "4")))
    attached(module, DataRequirements(teacher_prompts=False)).setup("fit")
    assert [e.question for e in module.rows["train"].examples] == ["1+1?"]
    assert module.dropped["train"] == {DropReason.HELD_OUT: 1}


def test_invalid_rows_are_dropped_with_a_count_and_a_reason(
    data: Callable[..., OPSDDataModule], caplog: pytest.LogCaptureFixture
) -> None:
    module = data(GOOD, *INVALID.values(), val=Listed(INVALID[DropReason.HELD_OUT]))
    with caplog.at_level("INFO"):
        module.setup("fit")
    assert [e.question for e in module.rows["train"].examples] == ["1+1?"]
    assert module.dropped["train"] == dict.fromkeys(INVALID, 1)
    text = caplog.text
    texts = module.limits["train"].texts(module.dropped["train"])
    assert "data.train (Listed): 1 of 7 rows" in text and all(reason in text for reason in texts)


@pytest.mark.parametrize("reason", INVALID, ids=lambda reason: reason.name)
def test_or_refused(reason: DropReason, data: Callable[..., OPSDDataModule]) -> None:
    module = data(GOOD, INVALID[reason], val=Listed(INVALID[DropReason.HELD_OUT]), on_invalid="error")
    with pytest.raises(ConfigError) as caught:
        module.setup("fit")
    assert caught.value.setting == "data.train"
    assert caught.value.problem == f"row 1: {module.limits['train'].text(reason)}"


def test_equal_answers_need_not_be_written_alike(data: Callable[..., OPSDDataModule]) -> None:
    module = data(Example("q", r"so \boxed{\frac{1}{2}}", "0.5"), Example("r", r"so \boxed{7}", ""))
    module.setup("fit")
    assert [e.answer for e in module.rows["train"].examples] == ["0.5", "7"]


def test_no_usable_row_and_too_few_rows(data: Callable[..., OPSDDataModule]) -> None:
    with pytest.raises(ConfigError, match=r"^data\.train: .*empty trace"):
        data(INVALID[DropReason.EMPTY_TRACE]).setup("fit")
    with pytest.raises(ConfigError, match=r"^data\.batch_size: "):
        data(GOOD, batch_size=4).setup("fit")
    with pytest.raises(UserError, match=mentions("data.test")):
        data(GOOD).setup(TrainerFn.TESTING)  # as the trainer does


UNTRACED = Example("3+3?", "", "6")


@pytest.mark.parametrize("context", [AnswerContext(), NoContext(), ColumnContext("note")], ids=lambda c: type(c).__name__)
def test_contexts_that_are_not_made_of_traces_need_none(
    context: PrivilegedContext, data: Callable[..., OPSDDataModule]
) -> None:
    given = {"note": "Add them."}
    module = data(UNTRACED._replace(columns=given), GOOD._replace(columns=given), context=context)
    module.setup("fit")
    assert len(module.rows["train"].examples) == 2 and all(module.rows["train"].teacher)
    with pytest.raises(ConfigError, match=r"^data\.train: .*empty trace"):
        data(UNTRACED, context=HintContext()).setup("fit")


def test_a_context_without_text_is_left_out(data: Callable[..., OPSDDataModule]) -> None:
    filled, empty = (GOOD._replace(question=q, columns={"note": note}) for q, note in (("a", "Add."), ("b", "")))
    module = data(filled, empty, context=ColumnContext("note"))
    module.setup("fit")
    assert [e.question for e in module.rows["train"].examples] == ["a"]
    assert module.dropped["train"] == {DropReason.EMPTY_CONTEXT: 1}


def test_held_out_questions_need_no_trace(data: Callable[..., OPSDDataModule], caplog: pytest.LogCaptureFixture) -> None:
    module = data(GOOD, UNTRACED, val=Listed(UNTRACED, Example("4+4?", "", "")), test=Listed(UNTRACED))
    with caplog.at_level("INFO"):
        for stage in ("fit", "test"):
            module.setup(stage)
    assert [e.answer for e in module.rows["test"].examples] == [e.answer for e in module.rows["val"].examples] == ["6"]
    assert "data.val (Listed): 1 of 2 rows; 1 left out: " in caplog.text
    assert "1 of 2 rows; 1 left out: empty trace" in caplog.text  # in training
    assert module.rows["test"].teacher == [[]] and all(module.rows["train"].teacher)


def test_a_graded_teacher_needs_something_to_read(
    data: Callable[..., OPSDDataModule], make_policy: Callable[..., Policy]
) -> None:
    def graded(**settings: Any) -> OPSDDataModule:
        module = data(GOOD, test=Listed(GOOD, UNTRACED), **settings)
        module.setup("test")  # for another module, without the teacher: its prompts are made when they are needed
        module.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        module.trainer.strategy._lightning_module = OPSDModule(make_policy(), evaluate_teacher=True)
        module.setup("test")
        return module

    with pytest.raises(ConfigError) as caught:
        graded()
    assert caught.value.setting == "model.evaluate_teacher" and "1 of 2 questions of data.test" in caught.value.problem
    assert all(graded(context=AnswerContext()).rows["test"].teacher)


def test_sources_without_traces_serve_evaluation(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"problem": "1+1?", "gold": 2}])
    (example,) = FileSource(str(path), columns=Columns(trace=None, answer="gold")).examples()
    assert example[:3] == ("1+1?", "", "2")
    (example,) = FileSource(str(path), columns=Columns(trace=None)).examples()
    assert example[:3] == ("1+1?", "", "")


def test_prompts_hold_the_context(data: Callable[..., OPSDDataModule], make_policy: Callable[..., Policy]) -> None:
    other = Example("2+2?", "2 + 2 = 4. The answer is 4.", "4")
    module = data(GOOD, other, context=OtherProblemContext())
    module.setup("fit")
    tokenizer = make_policy().load_tokenizer()
    text = [tokenizer.decode(ids) for ids in module.rows["train"].teacher]
    assert "1+1? 2 + 2 = 4" in text[0] and "2+2? 1 + 1 = 2" in text[1]
    assert "=" not in tokenizer.decode(module.rows["train"].student[0])


def rows(count: int) -> PromptBatch:
    return PromptBatch([[n] for n in range(count)], [[n] for n in range(count)], [GOOD] * count, [True] * count)


def epoch(loader: TrainLoader) -> list[list[int]]:
    return [[ids[0] for ids in batch.student] for batch in loader]


def test_train_loader_covers_an_epoch_once_over_all_ranks() -> None:
    ranks = [TrainLoader(rows(25), 4, 0, rank, 2) for rank in range(2)]
    first = [epoch(loader) for loader in ranks]
    seen = [n for rank in first for batch in rank for n in batch]
    assert len(seen) == len(set(seen)) == 24 and all(len(batch) == 4 for rank in first for batch in rank)
    assert [epoch(loader) for loader in ranks] != first
    assert epoch(TrainLoader(rows(25), 4, 1, 0, 2)) != first[0]


@pytest.mark.parametrize("stop", range(1, 13))
def test_train_loader_resumes_anywhere(stop: int) -> None:
    """Also at the exact end of an epoch (6 batches): it must not be served again, nor skipped."""

    def stream(loader: TrainLoader, count: int) -> list[list[int]]:
        found: list[list[int]] = []
        while len(found) < count:
            for batch in loader:
                found.append([ids[0] for ids in batch.student])
                if len(found) == count:
                    break
        return found

    whole = stream(TrainLoader(rows(25), 4, 0, 0, 1), 20)
    first = TrainLoader(rows(25), 4, 0, 0, 1)
    begun = stream(first, stop)
    second = TrainLoader(rows(25), 4, 0, 0, 1)
    second.load_state_dict(first.state_dict())
    assert begun + stream(second, 20 - stop) == whole


@pytest.mark.parametrize("world", [1, 2, 3])
def test_eval_loader_counts_every_question_once(world: int) -> None:
    counted, lengths = [], set()
    for rank in range(world):
        loader = EvalLoader(rows(7), 2, rank, world)
        lengths.add(len(list(loader)))
        assert len(list(loader)) == len(loader)
        counted += [ids[0] for b in loader for ids, counts in zip(b.student, b.counted, strict=True) if counts]
    assert sorted(counted) == list(range(7)) and len(lengths) == 1


@pytest.mark.parametrize("reason", [DropReason.EMPTY_TRACE, DropReason.PROMPT_TOO_LONG], ids=lambda reason: reason.name)
def test_a_refused_row_has_its_number_in_the_source(reason: DropReason, data: Callable[..., OPSDDataModule]) -> None:
    """Not its number among the verified rows."""
    module = data(GOOD, INVALID[DropReason.HELD_OUT], GOOD, INVALID[reason], GOOD)
    numbers: list[tuple[int, DropReason]] = []
    module._refuse = lambda split, index, why: numbers.append((index, why))  # type: ignore[method-assign]
    module.setup("fit")
    assert numbers == [(3, reason)]


def test_a_module_that_declares_no_data_requirements_is_refused(data: Callable[..., OPSDDataModule]) -> None:
    module = data(GOOD)
    module.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    module.trainer.strategy.connect(LightningModule())
    with pytest.raises(ConfigError) as caught:
        module.setup("fit")
    assert caught.value.setting == "model" and "LightningModule" in caught.value.problem
