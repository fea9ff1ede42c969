"""Where questions and their traces come from."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveInt

from opsd_lightning.data.tables import FORMATS, Table, first_line, read_table, typed_rows
from opsd_lightning.types import ConfigError, Example, UserError
from opsd_lightning.utils.texts import NotTextError, text_of


class ExampleSource(ABC):
    """Yields questions with their traces; whether a trace is right is checked by the data module."""

    @abstractmethod
    def examples(self) -> list[Example]:
        """All examples, in a fixed order. An empty ``answer`` is filled in from the trace's own final answer.

        Raises:
            UserError: The data are not there or lack a column.
        """


@dataclass(frozen=True)
class Columns:
    """Which column of the data holds what: text, numbers, dates or truth values, but no lists or objects.

    Args:
        question: The problem.
        trace: The worked solution. Null where the data have none, which evaluation and some methods do not need.
        answer: The reference answer. Taken from the end of the trace where null; with both null there is neither.
    """

    question: str = "problem"
    trace: str | None = "solution"
    answer: str | None = None

    def read(self, rows: Iterable[Mapping[str, Any]], origin: str, places: Iterable[str] | None = None) -> list[Example]:
        """Make examples of rows.

        Args:
            rows: Values by column. A key that some rows lack is an error where it is one of the three columns.
            origin: Name of the data in messages.
            places: Where each row stands, such as ``line 12``, for messages. Defaults to the numbers of the rows from 1.

        Raises:
            ConfigError: A column is missing or holds something else than text and numbers, or there is no row.
        """
        rows = list(rows)
        if not rows:
            raise ConfigError(f"{origin} holds no rows", "path", "Check the source's path and split")
        places = (f"row {number} of {len(rows)}" for number in range(1, len(rows) + 1)) if places is None else places
        names = {setting: getattr(self, setting) for setting in ("question", "trace", "answer")}
        names = {setting: name for setting, name in names.items() if name is not None}
        for setting, name in names.items():
            if not any(name in row for row in rows):
                there = ", ".join(map(str, dict.fromkeys(key for row in rows for key in row)))
                problem = f"{origin} has no column {name!r} (columns.{setting}); it has {there or 'none'}"
                raise ConfigError(problem, f"columns.{setting}", "Set it to one of them")
        examples = []
        for row, place in zip(rows, places, strict=True):
            texts = {"trace": "", "answer": ""}
            for setting, name in names.items():
                if name not in row:
                    problem = f"{origin}, {place}: no column {name!r}, which other rows have"
                    raise ConfigError(problem, f"columns.{setting}", "Write null where a row has nothing")
                texts[setting] = _text(row[name], f"{origin}, {place}: the column {name!r}", f"columns.{setting}")
            examples.append(Example(**texts, columns=row))
        return examples


def _text(value: Any, holder: str, setting: str) -> str:
    try:
        return (text_of(value) or "").strip()
    except NotTextError as error:
        raise ConfigError(f"{holder} holds {error}", setting, "Name one that holds text or numbers") from None


class HubSource(ExampleSource):
    """A Hugging Face dataset, by id or as a folder that ``Dataset.save_to_disk`` wrote.

    Numbers, dates and truth values are written as text, class labels as their names. CSV and JSON files on the hub get
    their types from ``datasets``, which reads ``007`` as 7 and ``NA`` as null: where that matters, download them and take
    `FileSource`.

    Args:
        path: The dataset's id, or the folder.
        split: The split, slices such as ``train[:1000]`` included; for a folder only a split's name.
        name: The dataset's configuration, where it has several.
        revision: Branch, tag or commit.
        columns: Which column holds what.
    """

    def __init__(
        self,
        path: str,
        split: str = "train",
        name: str | None = None,
        revision: str | None = None,
        columns: Columns = Columns(),
    ) -> None:
        self.path, self.split, self.name, self.revision = path, split, name, revision
        self.columns = columns

    def examples(self) -> list[Example]:
        from datasets import load_dataset

        folder = Path(self.path).expanduser()
        if folder.is_file():
            raise ConfigError(f"{self.path} is a file", "path", "Take FileSource to read it")
        try:
            if folder.exists():
                loaded = self._from_disk(folder)
            else:
                loaded = load_dataset(self.path, self.name, split=self.split, revision=self.revision)
            rows = typed_rows(loaded)
        except UserError:
            raise
        except Exception as error:  # datasets raises of many kinds: from the hub, from the disk, from its parsers
            problem = f"cannot load the dataset {self.path!r}, split {self.split!r} ({first_line(error)})"
            raise ConfigError(problem, "path", "Give a Hugging Face id or a folder written by save_to_disk") from error
        return self.columns.read(rows, f"the dataset {self.path}")

    def _from_disk(self, folder: Path) -> Any:
        from datasets import DatasetDict, load_from_disk

        if not any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
            problem = f"the folder {self.path} holds no dataset that Dataset.save_to_disk wrote"
            raise ConfigError(problem, "path", "Give such a folder, a Hugging Face id, or take FileSource for a file in it")
        loaded = load_from_disk(str(folder))
        if isinstance(loaded, DatasetDict):
            if self.split not in loaded:
                problem = f"{self.path} has no split {self.split!r}; it has {', '.join(map(str, loaded))}"
                raise ConfigError(problem, "split", "Set it to one of them")
            return loaded[self.split]
        if self.split != "train":
            problem = f"{self.path} holds one dataset without splits, and the split is {self.split!r}"
            raise ConfigError(problem, "split", "Leave it out")
        return loaded


class FileSource(ExampleSource):
    """A JSON Lines, JSON, Parquet or CSV file, told apart by its ending.

    The file is read anew each time. Values keep the text that they are written as: numbers their digits, cells of CSV
    everything (``007``, ``NA``). Text is UTF-8; JSON is a list of objects, or one object per line. A malformed row, and a
    list or an object in one of the columns, is refused with its line.

    Args:
        path: The file: ``.jsonl``, ``.json``, ``.parquet`` or ``.csv``.
        split: Slice of its rows: ``train`` for all, or such as ``train[:90%]`` and ``train[90%:]``.
        columns: Which column holds what.
    """

    def __init__(self, path: str, split: str = "train", columns: Columns = Columns()) -> None:
        self.path, self.split = path, split
        self.columns = columns

    def examples(self) -> list[Example]:
        table = self._table().part(self.split)
        return self.columns.read(table.rows, str(self.path), table.places)

    def _table(self) -> Table:
        try:
            path = Path(self.path).expanduser()
            if path.is_dir():
                fix = "Name a file in it, or take HubSource for a folder that Dataset.save_to_disk wrote"
                raise ConfigError(f"{self.path} is a folder", "path", fix)
            if path.suffix not in FORMATS:
                problem = f"{self.path} does not end in one of {', '.join(FORMATS)}"
                raise ConfigError(problem, "path", "Name such a file, with its ending")
            if not path.is_file():
                raise ConfigError(f"{self.path} does not exist", "path", "Name a file that does")
            return read_table(path)
        except (OSError, RuntimeError) as error:  # RuntimeError: no such user's home
            raise ConfigError(f"{self.path} cannot be read ({first_line(error)})", "path", "Name a readable file") from None


class ReasoningGymSource(ExampleSource):
    """A procedural task of the ``reasoning-gym`` package whose metadata carry a worked trace (extra ``gym``).

    Args:
        task: The task's name, such as ``gsm_symbolic``.
        size: How many questions to make, at least 1.
        seed: Of the questions. Give each split its own.
        trace_key: The entry of the task's metadata that holds the trace.
        options: Further settings of the task, by name.
    """

    def __init__(
        self,
        task: str = "gsm_symbolic",
        size: PositiveInt = 1000,
        seed: int = 0,
        trace_key: str = "answer_cot",
        options: dict[str, Any] | None = None,
    ) -> None:
        self.task, self.size, self.seed, self.trace_key = task, PositiveInt(size), seed, trace_key
        self.options = options or {}

    def examples(self) -> list[Example]:
        try:
            import reasoning_gym
        except ImportError:
            raise UserError("ReasoningGymSource needs reasoning-gym: pip install 'opsd-lightning[gym]'") from None
        try:
            dataset = reasoning_gym.create_dataset(self.task, size=self.size, seed=self.seed, **self.options)
        except (ValueError, TypeError, AssertionError) as error:
            raise UserError(
                f"the source's task {self.task!r} cannot be made by reasoning-gym ({first_line(error)})"
            ) from error
        found = []
        for number, item in enumerate(dataset):
            if self.trace_key not in item["metadata"]:
                keys = ", ".join(sorted(item["metadata"]))
                raise UserError(
                    f"the task {self.task!r} has no trace {self.trace_key!r} in its metadata ({keys}): set the source's "
                    "trace_key, or choose a task with worked solutions, such as gsm_symbolic"
                )
            holder = f"question {number} of the task {self.task!r}"
            question = _text(item["question"], f"{holder}: its question", "task")
            trace = _text(item["metadata"][self.trace_key], f"{holder}: {self.trace_key!r} of its metadata", "trace_key")
            answer = _text(item["answer"], f"{holder}: its answer", "task")
            found.append(Example(question, trace, answer, item["metadata"]))
        return found


class WordProblems(ExampleSource):
    """One-step word problems with small numbers and a one-line worked solution, made on the spot: the quick start's.

    Args:
        size: How many distinct questions to make, at least 1.
        seed: Of the questions. Splits with different seeds still share some: the data module takes those out of training.
        largest: The largest number in a question or an answer, at least 5.
    """

    _NAMES = (
        "Mia",
        "Leo",
        "Ada",
        "Tom",
        "Zoe",
        "Sam",
        "Eva",
        "Max",
        "Ivy",
        "Ben",
        "Lily",
        "Noah",
        "Ruth",
        "Omar",
        "Nina",
        "Carl",
    )
    _THINGS = ("pens", "books", "apples", "coins", "shells", "cards", "marbles", "stamps", "cookies", "stickers", "buttons")
    # The worked sentence is in the words that a small chat model itself uses: a teacher then takes it up, where it
    # answers at once after a bare "14 - 7 = 7".
    _KINDS = (
        ("{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?", "+", "now"),
        ("{name} has {a} {things} and finds {b} more. How many {things} does {name} have now?", "+", "now"),
        ("{name} has {a} {things}. {other} gives {name} {b} more. How many {things} does {name} have now?", "+", "now"),
        ("{name} has {a} {things} and gives away {b}. How many {things} are left?", "-", "left"),
        ("{name} has {a} {things} and loses {b} of them. How many {things} are left?", "-", "left"),
        ("{name} has {a} {things}. {other} takes {b} of them. How many {things} does {name} have left?", "-", "left"),
    )

    def __init__(self, size: PositiveInt = 1000, seed: int = 0, largest: PositiveInt = 20) -> None:
        if largest < 5:
            raise ValueError(f"WordProblems: largest is {largest}, but must be at least 5")
        self.size, self.seed, self.largest = PositiveInt(size), seed, PositiveInt(largest)

    def examples(self) -> list[Example]:
        draw = random.Random(f"word problems {self.seed}")
        found: dict[str, Example] = {}
        repeats = 0
        while len(found) < self.size:
            if repeats > 1000:
                raise UserError(f"WordProblems cannot make {self.size} distinct questions with numbers up to {self.largest}")
            template, sign, end = draw.choice(self._KINDS)
            big = draw.randint(5, self.largest)
            b = draw.randint(2, big - 2)
            a, answer = (big - b, big) if sign == "+" else (big, big - b)
            name, other = draw.sample(self._NAMES, 2)
            things = draw.choice(self._THINGS)
            question = template.format(a=a, b=b, name=name, other=other, things=things)
            trace = f"{name} has {a} {sign} {b} = {answer} {things} {end}, so the answer is {answer}."
            repeats = repeats + 1 if question in found else 0
            found[question] = Example(question, trace, str(answer))
        return list(found.values())
