"""Tests of the cache of verified and tokenized rows: what it returns is what is computed without it."""

from __future__ import annotations

import io
import os
import stat
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
from lightning.pytorch import LightningModule, Trainer

from opsd_lightning.data import preparation
from opsd_lightning.data.datamodule import OPSDDataModule
from opsd_lightning.data.drop_reasons import DropReason
from opsd_lightning.data.preparation import Preparation
from opsd_lightning.data.prepared_rows import PreparedRows
from opsd_lightning.data.sources import ExampleSource
from opsd_lightning.grading.math_grader import MathGrader
from opsd_lightning.models.policy import Policy
from opsd_lightning.prompts.contexts import AnswerContext, ColumnContext, HintContext, OtherProblemContext, TraceContext
from opsd_lightning.prompts.templates import Prompts
from opsd_lightning.types import ConfigError, DataRequirements, Example
from opsd_lightning.utils.file_cache import FileCache

# Every reason for dropping a row, answers found in traces, control tokens in the data, and rows as usual.
SPECIAL = [
    Example("", "The answer is 2.", "2"),
    Example("no trace", "", "2"),
    Example("wrong", "The answer is 3.", "2"),
    Example("none", "It is two.", "2"),
    Example("long " * 100, "The answer is 2.", "2"),
    Example("held  out", "The answer is 2.", "2"),
    Example("filled in", r"so \boxed{7}", ""),
    Example("no tip", "The answer is 2.", "2", {"tip": ""}),
    Example("<|im_end|>", "<think> The answer is 2. <|end|>", "2"),
    Example("equal", r"so \boxed{\frac{1}{2}}", "0.5"),
    Example("algebra", r"so \boxed{(x+1)^2}", "x^2+2x+1"),
]
ROWS = [
    *SPECIAL,
    *(Example(f"{n}+1?", f"{n} plus 1 makes {n + 1}. The answer is {n + 1}.", str(n + 1)) for n in range(40)),
]
ROWS = [row._replace(columns={"tip": f"Count from {n}."} | dict(row.columns)) for n, row in enumerate(ROWS)]


class Listed(ExampleSource):
    def __init__(self, examples: Sequence[Example]) -> None:
        self.listed = list(examples)

    def examples(self) -> list[Example]:
        return self.listed


class Method(LightningModule):
    def __init__(self, **needs: Any) -> None:
        super().__init__()
        self.data_requirements = DataRequirements(**needs)


@pytest.fixture(autouse=True)
def few_rows_are_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "LARGE", 0)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list of the splits that are prepared and not read from the cache."""
    splits: list[str] = []
    real = Preparation.prepare

    def prepare(self: Preparation, *args: Any, **kwargs: Any) -> PreparedRows:
        splits.append(self.split)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Preparation, "prepare", prepare)
    return splits


@pytest.fixture
def data(make_policy: Callable[..., Policy], tmp_path: Path) -> Callable[..., OPSDDataModule]:
    """Return a function that makes a data module and sets it up."""

    def make(rows: Sequence[Example] = ROWS, needs: dict[str, Any] | None = None, **settings: Any) -> OPSDDataModule:
        settings = {
            "batch_size": 1,
            "max_new_tokens": 16,
            "prompts": Prompts("{question}", "{question} {context}"),
            "val": Listed([Example("held out", "", "2")]),
            "cache_dir": str(tmp_path / "cache"),
        } | settings
        module = OPSDDataModule(make_policy(), train=Listed(rows), **settings)
        module.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
        module.trainer.strategy.connect(Method(**(needs or {})))
        module.setup("fit")
        return module

    return make


def contents(data: OPSDDataModule) -> list[Any]:
    return [data.rows, data.dropped, data.lengths, data.traces_cut, data.limits]


VARIANTS: dict[str, dict[str, Any]] = {
    "as usual": {},
    "other questions": {"rows": ROWS[:-1]},
    "other order": {"rows": ROWS[::-1]},
    "another answer": {"rows": [*ROWS[:-1], ROWS[-1]._replace(answer="1")]},
    "other template": {"prompts": Prompts("{question}", "{context} {question}")},
    "cut traces": {"prompts": Prompts("{question}", "{question} {context}", max_trace_tokens=20)},
    "hints": {"context": HintContext(0.3)},
    "column": {"context": ColumnContext("tip")},
    "other problem": {"context": OtherProblemContext()},
    "answers": {"context": AnswerContext()},
    "boxed answers": {"grader": MathGrader(answer_pattern=None)},
    "shorter context": {"max_new_tokens": 300},
    "held out": {"val": Listed([ROWS[-1]])},
    "traces are completions": {"needs": {"trace_completions": True, "teacher_prompts": False}},
    "graded teacher": {"needs": {"graded_teacher": True}, "val": Listed([ROWS[-2], ROWS[-1]])},
    "no trace needed": {"needs": {"teacher_prompts": False}},
}


def test_cached_rows_are_those_that_are_made_without_a_cache(data: Callable[..., OPSDDataModule], made: list[str]) -> None:
    """All variants share one cache, so one that read the rows of another would differ."""
    plain = {name: contents(data(**settings, cache_dir=None)) for name, settings in VARIANTS.items()}
    made.clear()
    for name, settings in VARIANTS.items():
        assert contents(data(**settings)) == plain[name], name
        assert "train" in made, name
        made.clear()
    for name, settings in VARIANTS.items():
        assert contents(data(**settings)) == plain[name], name
    assert made == []
    reasons = set(plain["column"][1]["train"]) | set(plain["as usual"][1]["train"])
    assert len(reasons) == 7 and plain["cut traces"][3]["train"] > 0


def test_messages_do_not_depend_on_the_cache(data: Callable[..., OPSDDataModule], caplog: pytest.LogCaptureFixture) -> None:
    counts = []
    for _ in range(2):
        with caplog.at_level("INFO"):
            data()
        counts.append([line for line in caplog.messages if "left out" in line])
        caplog.clear()
    assert counts[0] == counts[1] and len(counts[0]) == 1


def test_cached_rows_are_refused_as_others(data: Callable[..., OPSDDataModule], made: list[str]) -> None:
    with pytest.raises(ConfigError) as plain:
        data(on_invalid="error", cache_dir=None)
    data()
    made.clear()
    with pytest.raises(ConfigError) as cached:
        data(on_invalid="error")
    assert made == [] and str(cached.value) == str(plain.value)


def test_few_rows_leave_no_file(
    data: Callable[..., OPSDDataModule], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(preparation, "LARGE", 10**6)
    data()
    assert not (tmp_path / "cache").exists()


def test_null_turns_the_cache_off(
    data: Callable[..., OPSDDataModule], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data(cache_dir=None)
    assert not any(tmp_path.rglob("*.rows"))
    data(cache_dir="auto")
    assert any((tmp_path / "opsd_lightning").rglob("*.rows"))


class UsersContext(TraceContext):
    shown = "one"

    def text(self, index: int, examples: Sequence[Example]) -> str | None:
        return self.shown


class UsersGrader(MathGrader):
    accepts = "2"

    def equal(self, answer: str | None, reference: str) -> bool:
        return answer == self.accepts


def test_rows_made_by_a_users_code_are_made_each_time(
    data: Callable[..., OPSDDataModule], made: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = data(context=UsersContext())
    monkeypatch.setattr(UsersContext, "shown", "two")
    assert data(context=UsersContext()).rows["train"].teacher != first.rows["train"].teacher
    first = data(grader=UsersGrader())
    monkeypatch.setattr(UsersGrader, "accepts", "3")
    assert data(grader=UsersGrader()).rows["train"].examples != first.rows["train"].examples
    assert made.count("train") == 4


# -- damaged, foreign and wrong files ----------------------------------------------------------------------------------------


def train_file(folder: Path) -> Path:
    return max((folder / "cache" / "rows").iterdir(), key=lambda path: path.stat().st_size)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "shorter": lambda content: content[:-100],
    "longer": lambda content: content + b"0",
    "one bit": lambda content: content[:-100] + bytes([content[-100] ^ 1]) + content[-99:],
    "digest": lambda content: content[:20] + bytes([content[20] ^ 1]) + content[21:],
    "format": lambda content: b"x" + content[1:],
    "other file": lambda content: b"PK\3\4" * 1000,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_made_again(
    damage: str, data: Callable[..., OPSDDataModule], made: list[str], tmp_path: Path
) -> None:
    plain = contents(data())
    path = train_file(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(DAMAGES[damage](whole))
    made.clear()
    assert contents(data()) == plain and made == ["train"]
    assert path.read_bytes() == whole


def test_the_file_of_another_key_is_not_read(data: Callable[..., OPSDDataModule], made: list[str], tmp_path: Path) -> None:
    data()
    other = train_file(tmp_path)
    content = other.read_bytes()
    other.unlink()
    plain = contents(data(ROWS[1:], cache_dir=None))
    data(ROWS[1:])
    train_file(tmp_path).write_bytes(content)
    made.clear()
    assert contents(data(ROWS[1:])) == plain and made == ["train"]


def change_tokens(rows: PreparedRows) -> None:
    rows.student[-1] = rows.student[-1][::-1]


def change_teacher(rows: PreparedRows) -> None:
    rows.teacher[-1] = numpy.append(rows.teacher[-1], numpy.int32(7))


def change_answer(rows: PreparedRows) -> None:
    rows.answers[len(ROWS) - 1] = "12"


def drop_an_undecided_row(rows: PreparedRows) -> None:
    """As on a busy machine, on which a comparison took too long."""
    place = rows.usable.index(48)  # not one of those that are always confirmed
    index = rows.usable.pop(place)
    rows.verified.remove(index)
    del rows.student[place], rows.teacher[place], rows.lengths[-1]
    rows.dropped.append((index, DropReason.WRONG_ANSWER))
    rows.undecided.append(index)


def add_a_row(rows: PreparedRows) -> None:
    rows.verified.append(len(ROWS) + 3)


@pytest.mark.parametrize("change", [change_tokens, change_teacher, change_answer, drop_an_undecided_row, add_a_row])
def test_rows_that_are_not_those_of_the_settings_are_made_again(
    change: Callable[[PreparedRows], None], data: Callable[..., OPSDDataModule], made: list[str], tmp_path: Path
) -> None:
    """As after a change that no fingerprint sees."""
    plain = contents(data())
    path, cache = train_file(tmp_path), FileCache(str(tmp_path / "cache"), "rows", 1 << 30)
    content = cache.load(path.stem)
    assert content is not None
    rows = PreparedRows.from_bytes(content)
    change(rows)
    cache.store(path.stem, rows.to_bytes())
    made.clear()
    assert contents(data()) == plain and made == ["train"]


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"{}", b"\xff" * 100])
def test_other_content_is_no_prepared_rows(
    content: bytes, data: Callable[..., OPSDDataModule], made: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="rows"):
        PreparedRows.from_bytes(content)
    plain = contents(data())
    FileCache(str(tmp_path / "cache"), "rows", 1 << 30).store(train_file(tmp_path).stem, content)
    made.clear()
    assert contents(data()) == plain and made == ["train"]


# -- the folder --------------------------------------------------------------------------------------------------------------


def test_only_the_user_can_read_the_files(data: Callable[..., OPSDDataModule], tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        data()
    finally:
        os.umask(before)
    folder = tmp_path / "cache" / "rows"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    folder.chmod(0o755)
    data()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def foreign(folder: Path) -> None:
    (folder.parent / "elsewhere").mkdir()
    folder.symlink_to(folder.parent / "elsewhere")


def of_another_user(folder: Path) -> None:
    folder.mkdir()
    if os.getuid() != 0:
        pytest.skip("only root can give a folder to another user")
    os.chown(folder, 12345, 12345)


def a_file(folder: Path) -> None:
    folder.write_text("mine")


@pytest.mark.parametrize("obstacle", [foreign, of_another_user, a_file])
def test_a_folder_that_cannot_be_trusted_is_not_used(
    obstacle: Callable[[Path], None], data: Callable[..., OPSDDataModule], made: list[str], tmp_path: Path
) -> None:
    (tmp_path / "cache").mkdir()
    obstacle(tmp_path / "cache" / "rows")
    plain = contents(data(cache_dir=None))
    made.clear()
    assert contents(data()) == contents(data()) == plain and made.count("train") == 2
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".rows"]


def test_a_full_disk_does_not_end_the_run(
    data: Callable[..., OPSDDataModule], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Any, target: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        found = contents(data())
    assert found == contents(data(cache_dir=None)) and list((tmp_path / "cache" / "rows").iterdir()) == []


def test_the_files_that_were_unused_for_longest_are_removed(tmp_path: Path) -> None:
    cache = FileCache(str(tmp_path), "rows", 3500)
    for age, key in enumerate("abc", 1):
        cache.store(key, b"x" * 1000)
        os.utime(cache.path(key), (1000.0 - age, 1000.0 - age))
    cache.load("c")  # the oldest is used again
    (cache.folder / "notes.txt").write_bytes(b"x" * 5000)
    (cache.folder / ".old.partial").write_bytes(b"x")
    os.utime(cache.folder / ".old.partial", (1000.0, 1000.0))
    (cache.folder / ".new.partial").write_bytes(b"x")
    cache.store("d", b"x" * 1000)
    cache.store("e", b"x" * 9000)
    names = {path.name for path in cache.folder.iterdir()}
    assert names == {"e.rows", "notes.txt", ".new.partial"}
    os.unlink(cache.path("e"))
    for key in "abc":
        cache.store(key, b"x" * 1000)
    cache.store("d", b"x" * 1000)
    assert sum(path.suffix == ".rows" for path in cache.folder.iterdir()) == 3 and cache.path("d").exists()


@pytest.mark.parametrize("cache_dir", ["s3://bucket/cache", ""])
def test_a_cache_in_no_local_folder_is_refused(cache_dir: str, data: Callable[..., OPSDDataModule]) -> None:
    with pytest.raises(ConfigError) as caught:
        data(cache_dir=cache_dir)
    assert caught.value.setting == "data.cache_dir"


def test_an_unknown_home_folder_does_not_end_the_run(data: Callable[..., OPSDDataModule]) -> None:
    plain = contents(data(cache_dir=None))
    assert contents(data(cache_dir="~nobody-of-this-name/cache")) == plain


# -- threads and progress ----------------------------------------------------------------------------------------------------


def test_threads_make_the_same_rows(data: Callable[..., OPSDDataModule], monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for cores in (1, 4):
        monkeypatch.setattr(preparation, "_cores", lambda cores=cores: cores)
        found.append(contents(data(needs={"trace_completions": True}, cache_dir=None)))
    assert found[0] == found[1]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("trainer", "stream", "shown"),
    [
        pytest.param({"enable_progress_bar": True}, Terminal, True, id="terminal"),
        pytest.param({"enable_progress_bar": False}, Terminal, False, id="turned off"),
        pytest.param({"enable_progress_bar": True}, io.StringIO, False, id="log file"),
    ],
)
def test_progress_is_shown_in_a_terminal(
    trainer: dict[str, bool],
    stream: type[io.StringIO],
    shown: bool,
    make_policy: Callable[..., Policy],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts = Prompts("{question}", "{question} {context}")
    data = OPSDDataModule(make_policy(), Listed(ROWS), batch_size=1, max_new_tokens=16, prompts=prompts, cache_dir=None)
    data.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, **trainer)  # type: ignore[arg-type]
    data.trainer.strategy.connect(Method())
    written = stream()
    monkeypatch.setattr(sys, "stderr", written)
    data.setup("fit")
    text = written.getvalue()
    assert ("data.train" in text and f"/{len(ROWS)} " in text) == shown
    assert shown or "it/s" not in text


def test_a_cached_start_takes_less_work(data: Callable[..., OPSDDataModule], monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the rows that confirm the cached ones are graded again."""
    graded: list[int] = []
    real = MathGrader.verifications

    def verifications(self: MathGrader, examples: Sequence[Example]) -> Any:
        graded.append(len(examples))
        return real(self, examples)

    monkeypatch.setattr(MathGrader, "verifications", verifications)
    data()
    first, graded[:] = sum(graded), []
    data()
    assert 0 < sum(graded) <= 16 + 1 < first


def test_time_of_last_use_is_kept(tmp_path: Path) -> None:
    cache = FileCache(str(tmp_path), "rows", 1 << 30)
    path = cache.store("a", b"content")
    os.utime(path, (1000.0, 1000.0))
    cache.load("a")
    assert path.stat().st_mtime > time.time() - 3600
