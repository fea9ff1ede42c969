"""Where questions and their traces come from."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from jsonargparse.typing import PositiveInt

from opsd_lightning.types import Example, UserError


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
    """Which column of the data holds what.

    Args:
        question: The problem.
        trace: The worked solution. Null where the data have none, which evaluation and some methods do not need.
        answer: The reference answer. Taken from the end of the trace where null; with both null there is neither.
    """

    question: str = "problem"
    trace: str | None = "solution"
    answer: str | None = None

    def read(self, rows: Iterable[Mapping[str, Any]], origin: str) -> list[Example]:
        """Make examples of rows.

        Raises:
            UserError: A column is missing, or there is no row.
        """
        examples = []
        for row in rows:
            for setting in ("question", "trace", "answer"):
                name = getattr(self, setting)
                if name is not None and name not in row:
                    raise UserError(
                        f"{origin} has no column {name!r} (columns.{setting}); it has {', '.join(map(str, row))}. Set "
                        f"columns.{setting} to one of them"
                    )
            examples.append(
                Example(
                    _text(row[self.question]),
                    _text(row[self.trace]) if self.trace is not None else "",
                    _text(row[self.answer]) if self.answer is not None else "",
                    row,
                )
            )
        if not examples:
            raise UserError(f"{origin} holds no rows: check the source's path and split")
        return examples


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()


class HubSource(ExampleSource):
    """A Hugging Face dataset, by id or as a folder that ``Dataset.save_to_disk`` wrote.

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
        from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

        try:
            if Path(self.path).exists():
                loaded = load_from_disk(self.path)
                if isinstance(loaded, DatasetDict):
                    if self.split not in loaded:
                        raise UserError(f"{self.path} has no split {self.split!r}; it has {', '.join(map(str, loaded))}")
                    loaded = loaded[self.split]
                elif self.split != "train":
                    raise UserError(f"{self.path} holds one dataset without splits: leave split out, not {self.split!r}")
            else:
                loaded = load_dataset(self.path, self.name, split=self.split, revision=self.revision)
        except UserError:
            raise
        except Exception as error:  # datasets raises of many kinds: from the hub, from the disk, from its parsers
            raise UserError(
                f"cannot load the dataset {self.path!r}, split {self.split!r} ({_first_line(error)}); give a Hugging Face "
                "id or a folder written by save_to_disk as the source's path"
            ) from error
        assert isinstance(loaded, Dataset)
        return self.columns.read(loaded, f"the dataset {self.path}")


class FileSource(ExampleSource):
    """A JSON Lines, JSON, Parquet or CSV file, told apart by its ending.

    Args:
        path: The file: ``.jsonl``, ``.json``, ``.parquet`` or ``.csv``.
        split: Slice of its rows: ``train`` for all, or such as ``train[:90%]`` and ``train[90%:]``.
        columns: Which column holds what.
    """

    _BUILDERS: ClassVar = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}

    def __init__(self, path: str, split: str = "train", columns: Columns = Columns()) -> None:
        self.path, self.split = path, split
        self.columns = columns

    def examples(self) -> list[Example]:
        from datasets import Dataset, load_dataset

        path = Path(self.path).expanduser()
        if path.suffix not in self._BUILDERS:
            raise UserError(f"the source's path {self.path} does not end in one of {', '.join(self._BUILDERS)}")
        if not path.is_file():
            raise UserError(f"the source's path {self.path} does not exist")
        try:
            loaded = load_dataset(self._BUILDERS[path.suffix], data_files=str(path), split=self.split)
        except Exception as error:  # datasets raises of many kinds
            raise UserError(f"cannot read {self.path}, split {self.split!r} ({_first_line(error)})") from error
        assert isinstance(loaded, Dataset)
        return self.columns.read(loaded, str(self.path))


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
                f"the source's task {self.task!r} cannot be made by reasoning-gym ({_first_line(error)})"
            ) from error
        found = []
        for item in dataset:
            if self.trace_key not in item["metadata"]:
                keys = ", ".join(sorted(item["metadata"]))
                raise UserError(
                    f"the task {self.task!r} has no trace {self.trace_key!r} in its metadata ({keys}): set the source's "
                    "trace_key, or choose a task with worked solutions, such as gsm_symbolic"
                )
            trace = _text(item["metadata"][self.trace_key])
            found.append(Example(_text(item["question"]), trace, _text(item["answer"]), item["metadata"]))
        return found


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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
