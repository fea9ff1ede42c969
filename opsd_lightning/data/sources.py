"""Sources of questions with traces."""

from __future__ import annotations

import json
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opsd_lightning.data.tables import FORMATS, Table, first_line, read_table, typed_rows
from opsd_lightning.grading.reasoning_gym_grader import COLUMN
from opsd_lightning.grading.reasoning_gym_job import encode, make_dataset
from opsd_lightning.types import ConfigError, Example, PositiveInt, checked
from opsd_lightning.utils.texts import NotTextError, text_of

AUTO = "auto"
"""Value of ``trace_key`` that reads the key of reasoning-gym's worked solutions where there is one."""

_TRACE_KEY = "answer_cot"


class ExampleSource(ABC):
    """Base class of sources. The data module checks the traces."""

    @abstractmethod
    def examples(self) -> list[Example]:
        """Return all examples, in a fixed order. The data module fills an empty ``answer`` in from the trace.

        Raises:
            ConfigError: The data do not exist or lack a column. Its ``setting`` is an argument of the source, such as
                ``path``: the data module adds ``data.train.init_args.`` in front.
        """


@dataclass(frozen=True)
class Columns:
    """Names of the columns that hold questions, traces and answers.

    Their values are text, numbers, dates or truth values. Lists and objects are errors.

    Args:
        question: Column of the problem.
        trace: Column of the worked solution. Null if the data have none; evaluation and some methods need none.
        answer: Column of the reference answer. If null, the answer is found at the end of the trace.

    Example::

        >>> from opsd_lightning import Columns
        >>> rows = [{"q": "1 + 1?", "proof": "1 + 1 = 2. The answer is 2.", "gold": 2}]
        >>> (example,) = Columns(question="q", trace="proof", answer="gold").read(rows, "my rows")
        >>> example.question, example.answer
        ('1 + 1?', '2')
    """

    question: str = "problem"
    trace: str | None = "solution"
    answer: str | None = None

    def read(self, rows: Iterable[Mapping[str, Any]], origin: str, places: Iterable[str] | None = None) -> list[Example]:
        """Make examples from rows.

        Args:
            rows: Values by column. Each row needs all three columns.
            origin: Name of the data in messages.
            places: Place of each row in messages, such as ``line 12``. Defaults to the number of the row, from 1.

        Raises:
            ConfigError: There is no row, a column is missing, or a value is neither text nor number.
        """
        rows = list(rows)
        if not rows:
            raise ConfigError(f"{origin} has no rows", "path", "Check the source's path and split")
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
                    raise ConfigError(problem, f"columns.{setting}", "Write null in rows without a value")
                texts[setting] = _text(row[name], f"{origin}, {place}: the column {name!r}", f"columns.{setting}")
            examples.append(Example(texts["question"], texts["trace"], texts["answer"], row))
        return examples


def _text(value: Any, holder: str, setting: str) -> str:
    try:
        return (text_of(value) or "").strip()
    except NotTextError as error:
        raise ConfigError(f"{holder} holds {error}", setting, "Name a column of text or numbers") from None


class HubSource(ExampleSource):
    """A Hugging Face dataset: an id on the hub, or a folder written by ``Dataset.save_to_disk``.

    Numbers, dates and truth values become text, and class labels their names. ``datasets`` infers the types of CSV and JSON
    files on the hub, and reads ``007`` as 7 and ``NA`` as null. To keep such text, download the file and use `FileSource`.

    Args:
        path: The dataset's id, or the folder.
        split: The split or a slice of it, such as ``train[:1000]``. For a folder, the name of a split.
        name: Name of the dataset's configuration, if it has several.
        revision: Branch, tag or commit.
        columns: Names of the columns.
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
            raise ConfigError(f"{self.path} is a file", "path", "Use FileSource to read it")
        try:
            if folder.exists():
                loaded = self._from_disk(folder)
            else:
                loaded = load_dataset(self.path, self.name, split=self.split, revision=self.revision)
            rows = typed_rows(loaded)
        except ConfigError:
            raise
        except Exception as error:  # datasets has no base class for its errors
            problem = f"cannot load the dataset {self.path!r}, split {self.split!r} ({first_line(error)})"
            raise ConfigError(problem, "path", "Give a Hugging Face id or a folder written by save_to_disk") from error
        return self.columns.read(rows, f"the dataset {self.path}")

    def _from_disk(self, folder: Path) -> Any:
        from datasets import DatasetDict, load_from_disk

        if not any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
            problem = f"the folder {self.path} has no dataset of Dataset.save_to_disk"
            raise ConfigError(problem, "path", "Give such a folder or a Hugging Face id, or use FileSource for a file in it")
        loaded = load_from_disk(str(folder))
        if isinstance(loaded, DatasetDict):
            if self.split not in loaded:
                problem = f"{self.path} has no split {self.split!r}; it has {', '.join(map(str, loaded))}"
                raise ConfigError(problem, "split", "Set it to one of them")
            return loaded[self.split]
        if self.split != "train":
            problem = f"{self.path} has one dataset without splits, and the split is {self.split!r}"
            raise ConfigError(problem, "split", "Leave it out")
        return loaded


class FileSource(ExampleSource):
    """A JSON Lines, JSON, Parquet or CSV file.

    Values keep their text: numbers keep all digits, and cells of CSV are not interpreted (``007``, ``NA``). Text is UTF-8.
    JSON is a list of objects, or one object per line. The error for a malformed row, or for a list or an object in one of
    the columns, gives its line. Each call of `examples` reads the file again.

    Args:
        path: The file. Its ending gives the format: ``.jsonl``, ``.json``, ``.parquet`` or ``.csv``.
        split: Slice of its rows: ``train`` for all, or a slice such as ``train[:90%]`` or ``train[90%:]``.
        columns: Names of the columns.

    Example::

        >>> import json, pathlib, tempfile
        >>> from opsd_lightning import Columns, FileSource
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "rows.jsonl")
        ...     _ = path.write_text(json.dumps({"problem": "1 + 1?", "gold": 2}))
        ...     FileSource(str(path), columns=Columns(trace=None, answer="gold")).examples()[0].answer
        '2'
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
                fix = "Name a file in it, or use HubSource for a folder of Dataset.save_to_disk"
                raise ConfigError(f"{self.path} is a folder", "path", fix)
            if path.suffix not in FORMATS:
                problem = f"{self.path} does not end in one of {', '.join(FORMATS)}"
                raise ConfigError(problem, "path", "Name a file with such an ending")
            if not path.is_file():
                raise ConfigError(f"{self.path} does not exist", "path", "Name an existing file")
            return read_table(path)
        except (OSError, RuntimeError) as error:  # RuntimeError: no such user's home
            raise ConfigError(f"{self.path} cannot be read ({first_line(error)})", "path", "Name a readable file") from None


@checked
class ReasoningGymSource(ExampleSource):
    """A procedural task of the ``reasoning-gym`` package (extra ``gym``). Grade it with `ReasoningGymGrader`.

    The columns are the task's metadata, and ``reasoning_gym``, which the grader reads. A few tasks, such as ``rush_hour``,
    have no reference answer but grade any answer.

    Args:
        task: Name of the task, such as ``gsm_symbolic``.
        size: Number of questions, at least 1.
        seed: Seed for generating the questions. Give each split its own.
        trace_key: Key of the trace in the task's metadata. ``auto`` reads ``answer_cot``, which ``gsm_symbolic`` has, and
            leaves the trace empty for tasks without it. Null always leaves it empty.
        options: Further settings of the task, by name. The parts of ``composite`` are objects with ``name``, ``weight`` and
            ``config``.

    Example::

        >>> from opsd_lightning import ReasoningGymSource
        >>> (example,) = ReasoningGymSource("spell_backward", size=1, seed=1).examples()
        >>> example.question, example.answer, example.trace
        ('Spell this word backward (example: sun -> nus): ammonia', 'ainomma', '')
    """

    def __init__(
        self,
        task: str = "gsm_symbolic",
        size: PositiveInt = 1000,
        seed: int = 0,
        trace_key: str | None = AUTO,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.task, self.size, self.seed, self.trace_key = task, size, seed, trace_key
        self.options = options or {}

    def examples(self) -> list[Example]:
        options = {"size": self.size, "seed": self.seed, **self.options}
        try:
            dataset = make_dataset(self.task, options)
        except ImportError:
            fix = "Run pip install 'opsd-lightning[gym]'"
            raise ConfigError("reasoning-gym is not installed", "task", fix) from None
        except (ValueError, TypeError, AssertionError) as error:
            problem = f"reasoning-gym cannot make the task {self.task!r} ({first_line(error)})"
            raise ConfigError(problem, "task", "Name a task of reasoning-gym, and give it options that it has") from error
        found = []
        for number, item in enumerate(dataset):
            holder = f"question {number} of the task {self.task!r}"
            question = _text(item["question"], f"{holder}: its question", "task")
            answer = _text(item["answer"], f"{holder}: its answer", "task")
            try:
                record = {"task": self.task, "options": options, "entry": encode(item)}
            except TypeError as error:
                raise ConfigError(f"{holder}: {error}", "task", "Choose another task") from None
            columns = {**item["metadata"], COLUMN: json.dumps(record)}
            found.append(Example(question, self._trace(item["metadata"], holder), answer, columns))
        return found

    def _trace(self, metadata: Mapping[str, Any], holder: str) -> str:
        if self.trace_key is None or (self.trace_key == AUTO and _TRACE_KEY not in metadata):
            return ""
        key = _TRACE_KEY if self.trace_key == AUTO else self.trace_key
        if key not in metadata:
            problem = f"the metadata of {holder} have no key {key!r}; they have {', '.join(sorted(metadata))}"
            raise ConfigError(problem, "trace_key", "Set it to one of them, or to null for questions without traces")
        return _text(metadata[key], f"{holder}: {key!r} of its metadata", "trace_key")


@checked
class WordProblems(ExampleSource):
    """Generated one-step word problems with small numbers and a worked solution of one line, as in the quick start.

    Args:
        size: Number of distinct questions, at least 1.
        seed: Seed for generating the questions. Splits with different seeds still share some questions; the data module
            drops these from training.
        largest: Largest number in a question or an answer, at least 5.

    Example::

        >>> from opsd_lightning import WordProblems
        >>> (example,) = WordProblems(size=1).examples()
        >>> print(example.trace)
        Ivy has 8 - 5 = 3 cards left, so the answer is 3.
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
    # The trace is in the words of a small chat model, so that a teacher who reads it reasons in the same words. After a bare
    # "14 - 7 = 7" the teacher answers without any reasoning.
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
            raise ConfigError(f"it is {largest}", "WordProblems.largest", "Set it to 5 or more")
        self.size, self.seed, self.largest = size, seed, largest

    def examples(self) -> list[Example]:
        draw = random.Random(f"word problems {self.seed}")
        found: dict[str, Example] = {}
        repeats = 0
        while len(found) < self.size:
            if repeats > 1000:
                problem = f"there are no {self.size} distinct questions with numbers up to {self.largest}"
                raise ConfigError(problem, "size", "Lower it, or raise largest")
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
