"""Sources of questions with traces."""

from __future__ import annotations

import json
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

from opsd_lightning.data.conversations import (
    ConversationError,
    check_no_media,
    decoded,
    read_conversation,
    read_demonstration,
    read_message,
    read_tools,
)
from opsd_lightning.data.generation import distinct_examples
from opsd_lightning.data.tables import FORMATS, Table, first_line, read_table, typed_rows
from opsd_lightning.grading.reasoning_gym_grader import COLUMN
from opsd_lightning.grading.reasoning_gym_job import encode, make_dataset
from opsd_lightning.types import ConfigError, Example, PositiveInt, checked
from opsd_lightning.utils.messages import SYSTEM_ROLES, column_text, is_messages, message_text
from opsd_lightning.utils.texts import NotTextError, text_of

AUTO = "auto"
"""Value of ``trace_key`` that reads the key of reasoning-gym's worked solutions where there is one."""

_TRACE_KEY = "answer_cot"
_Part = TypeVar("_Part")

TraceStyle = Literal["own", "terse", "formal"]
"""Style of the worked solutions of `WordProblems`."""

# Columns with further parts of the prompt, by the column of the question, in the forms of Alpaca and ms-swift.
_WITH_QUESTION = {"instruction": ("input", "history", "system"), "query": ("history", "system")}
# The beginning of a list of messages that was written into one text, such as a cell of CSV.
_WRITTEN_MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']\s*:""")


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
    """Names of the columns that hold questions, traces and answers, or conversations.

    Values are text, numbers, dates or truth values. Questions and traces may also be lists of messages, as in trl's columns
    ``prompt``, ``completion`` and ``privileged_context``. Other lists and objects are errors.

    Args:
        question: Column of the problem: a text, or the messages of a conversation up to the user's last turn.
        trace: Column of the worked solution. Null if the data have none; evaluation and some methods need none. A list of
            messages reads as their texts, one a line; a single assistant's message is the demonstration of a conversation.
        answer: Column of the reference answer. If null, the answer is found at the end of the trace.
        messages: Column of whole conversations, in place of ``question`` and ``trace``. The assistant's turn at the end is
            the demonstration, which only the teacher reads. Both roles read all turns before it.
        tools: Column of the tools' JSON schemas, for the chat template.

    Example::

        >>> from opsd_lightning import Columns
        >>> rows = [{"q": "1 + 1?", "proof": "1 + 1 = 2. The answer is 2.", "gold": 2}]
        >>> (example,) = Columns(question="q", trace="proof", answer="gold").read(rows, "my rows")
        >>> example.question, example.answer
        ('1 + 1?', '2')
        >>> chat = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
        >>> (example,) = Columns(messages="chat").read([{"chat": chat}], "my rows")
        >>> example.messages, example.trace
        ([{'role': 'user', 'content': '1 + 1?'}], '2')
    """

    question: str = "problem"
    trace: str | None = "solution"
    answer: str | None = None
    messages: str | None = None
    tools: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("question", "trace") if getattr(self, name) not in (getattr(type(self), name), None)]
        if self.messages is not None and given:
            problem = f"it is set, and so is columns.{given[0]}"
            fix = (
                "To read a prompt and its reference from two columns, name them as columns.question and columns.trace, and "
            )
            raise ConfigError(problem, "columns.messages", f"{fix}set columns.messages to null")

    def read(
        self,
        rows: Iterable[Mapping[str, Any]],
        origin: str,
        places: Iterable[str] | None = None,
        null_filled: bool = False,
    ) -> list[Example]:
        """Make examples from rows.

        Args:
            rows: Values by column. Each row needs all columns that are not null.
            origin: Name of the data in messages.
            places: Place of each row in messages, such as ``line 12``. Defaults to the number of the row, from 1.
            null_filled: If True, leave null values in messages and tools out. Arrow fills every object with the keys of all
                others.

        Raises:
            ConfigError: There is no row, a column is missing, a value is neither text nor number, or a conversation is
                malformed.
        """
        rows = list(rows)
        if not rows:
            raise ConfigError(f"{origin} has no rows", "path", "Check the source's path and split")
        places = (f"row {number} of {len(rows)}" for number in range(1, len(rows) + 1)) if places is None else places
        read = ("question", "trace", "answer", "tools") if self.messages is None else ("messages", "answer", "tools")
        names = {setting: name for setting in read if (name := getattr(self, setting)) is not None}
        for setting, name in names.items():
            if not any(name in row for row in rows):
                chats = [str(key) for key, value in rows[0].items() if is_messages(value)]
                if self.messages is None and setting == "question" and len(chats) == 1:
                    problem = f"{origin} has no column {name!r}, and its column {chats[0]!r} holds conversations"
                    raise ConfigError(problem, "columns.messages", f"Set it to {chats[0]}")
                there = ", ".join(map(str, dict.fromkeys(key for row in rows for key in row)))
                problem = f"{origin} has no column {name!r} (columns.{setting}); it has {there or 'none'}"
                raise ConfigError(problem, f"columns.{setting}", "Set it to one of them")
        examples = []
        for row, place in zip(rows, places, strict=True):
            for setting, name in names.items():
                if name not in row:
                    problem = f"{origin}, {place}: no column {name!r}, which other rows have"
                    raise ConfigError(problem, f"columns.{setting}", "Write null in rows without a value")
            examples.append(_Row(row, f"{origin}, {place}", names, null_filled).example())
        return examples


def _texts_of(messages: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(message["role"], message_text(message).strip()) for message in messages]


class _Row(NamedTuple):
    """A row of a source.

    Args:
        values: Values by column.
        place: Origin and place of the row in messages.
        names: Column of each argument of `Columns` that is read.
        null_filled: See `Columns.read`.
    """

    values: Mapping[str, Any]
    place: str
    names: Mapping[str, str]
    null_filled: bool

    def example(self) -> Example:
        answer = self._text("answer")
        tools = self._part("tools", read_tools) if "tools" in self.names else []
        asked = "messages" if "messages" in self.names else "question"
        if asked == "question" and not is_messages(self._value("question")):
            question = self._text("question")
            self._check_all_read(*_WITH_QUESTION.get(self.names["question"], ()))
            trace, demonstration = self._trace([{"role": "user", "content": question}])
            if not tools and not (demonstration or {}).get("tool_calls"):
                return Example(question, trace, answer, self.values)
            turns = [{"role": "user", "content": question}]
            return Example(question, trace, answer, self.values, turns, tools, demonstration)
        found = self._part(asked, read_conversation)
        self._part(asked, lambda *_: check_no_media(self.values))
        if "tools" not in self.names and self.values.get("tools"):
            problem = f"{self.place}: the column 'tools' holds the tools of a conversation and is not read"
            raise ConfigError(problem, "columns.tools", "Set it to tools, or remove the column")
        if self.values.get("chat_template_kwargs"):
            problem = f"{self.place}: the column 'chat_template_kwargs' is not read"
            fix = (
                "Remove it, and set data.prompts.student_chat_template_kwargs and teacher_chat_template_kwargs for all rows"
            )
            raise ConfigError(problem, f"columns.{asked}", fix)
        if found.messages[0]["role"] not in SYSTEM_ROLES:
            self._check_all_read("system")
        trace, demonstration = self._trace(found.messages)
        if trace and found.demonstration:
            problem = f"{self.place}: the column {self.names[asked]!r} ends with an assistant's turn"
            fix = "Remove this turn from the column, or set columns.trace to null to make it the demonstration"
            raise ConfigError(problem, f"columns.{asked}", fix)
        if found.demonstration:
            trace, demonstration = found.trace.strip(), found.demonstration
        return Example(found.question.strip(), trace, answer, self.values, found.messages, tools, demonstration)

    def _check_all_read(self, *columns: str) -> None:
        """Raise `ConfigError` if the row has one of these columns, which belong to the prompt."""
        for name in columns:
            value = self.values.get(name)
            if value and name not in self.names.values() and (not isinstance(value, str) or value.strip()):
                asked = "messages" if "messages" in self.names else "question"
                problem = f"{self.place}: the column {name!r} belongs to the prompt and is not read"
                fix = f"Write it into the column {self.names[asked]!r} (a system text as the first message), or remove it"
                raise ConfigError(problem, f"columns.{asked}", fix)

    def _trace(self, prompt: list[dict[str, Any]]) -> tuple[str, dict[str, Any] | None]:
        """Return the text of the trace, and the assistant's message if the trace is one.

        A trace may repeat the messages of the prompt, as in preference data.
        """
        messages = self._value("trace")
        if not is_messages(messages):
            return self._text("trace", column_text), None
        if len(messages) > 1:
            found = self._part(
                "trace", lambda *_: [read_message(each, i, self.null_filled) for i, each in enumerate(messages, 1)]
            )
            if _texts_of(found[:-1]) != _texts_of(prompt):
                return self._text("trace", column_text), None
            messages = messages[-1:]
        message = self._part("trace", lambda *_: read_demonstration(messages[0], self.null_filled))
        return message_text(message).strip(), message if message["role"] == "assistant" else None

    def _value(self, setting: str) -> Any:
        """Return the value of a column, or None if it is not read. A JSON text of messages becomes a list."""
        value = self.values[self.names[setting]] if setting in self.names else None
        if not isinstance(value, str) or not _WRITTEN_MESSAGES.match(value):
            return value
        return self._part(setting, lambda *_: decoded(value, "messages"))

    def _text(self, setting: str, read: Callable[[Any], str | None] = text_of) -> str:
        if setting not in self.names:
            return ""
        holder = f"{self.place}: the column {self.names[setting]!r}"
        return _text(self._value(setting), holder, f"columns.{setting}", read)

    def _part(self, setting: str, read: Callable[[Any, bool], _Part]) -> _Part:
        """Read a part of a conversation. Errors name the row and the setting."""
        name = self.names[setting]
        try:
            return read(self.values[name], self.null_filled)
        except ConversationError as error:
            problem = f"{self.place}: the column {name!r}: {error.problem}"
            raise ConfigError(problem, f"columns.{setting}", error.fix) from None


def _text(value: Any, holder: str, setting: str, read: Callable[[Any], str | None] = text_of) -> str:
    try:
        return (read(value) or "").strip()
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
        return self.columns.read(rows, f"the dataset {self.path}", null_filled=True)

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
        return self.columns.read(table.rows, str(self.path), table.places, Path(self.path).suffix == ".parquet")

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
        seed: Seed for generating the questions. Question i of seed s is question 0 of seed s + i, so give the splits seeds
            that are further apart than ``size``.
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
        style: Style of the worked solution: ``own`` for the words of a small chat model, or one that such a model does not
            write: ``terse`` for a notation of its own, ``formal`` for a textbook's derivation, which is longest. The
            questions are the same in each style.

    Example::

        >>> from opsd_lightning import WordProblems
        >>> for style in ("own", "terse", "formal"):
        ...     (example,) = WordProblems(size=1, style=style).examples()
        ...     print(example.trace)
        Ivy has 8 - 5 = 3 cards left, so the answer is 3.
        [[calc]] let x:=8; let y:=5; x-y -> 3 [[end]] so the answer is 3.
        Let m := |S| = 8 and k := |T| = 5. By hypothesis, n := m - k. Substitution yields n = 8 - 5 = 3. Q.E.D., so the
        answer is 3.
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

    _TRACES: ClassVar[dict[TraceStyle, str]] = {
        "own": "{name} has {a} {sign} {b} = {answer} {things} {end}, so the answer is {answer}.",
        "terse": "[[calc]] let x:={a}; let y:={b}; x{sign}y -> {answer} [[end]] so the answer is {answer}.",
        "formal": "Let m := |S| = {a} and k := |T| = {b}. By hypothesis, n := m {sign} k. Substitution yields n = "
        "{a} {sign} {b} = {answer}. Q.E.D., so the answer is {answer}.",
    }

    def __init__(
        self, size: PositiveInt = 1000, seed: int = 0, largest: PositiveInt = 20, style: TraceStyle = "own"
    ) -> None:
        if largest < 5:
            raise ConfigError(f"it is {largest}", "WordProblems.largest", "Set it to 5 or more")
        if style not in self._TRACES:
            raise ConfigError(f"it is {style!r}", "WordProblems.style", f"Set it to {' or '.join(self._TRACES)}")
        self.size, self.seed, self.largest, self.style = size, seed, largest, style

    def examples(self) -> list[Example]:
        return distinct_examples(self._draw, self.size, f"word problems {self.seed}", "raise largest")

    def _draw(self, numbers: random.Random) -> Example:
        template, sign, end = numbers.choice(self._KINDS)
        big = numbers.randint(5, self.largest)
        b = numbers.randint(2, big - 2)
        a, answer = (big - b, big) if sign == "+" else (big, big - b)
        name, other = numbers.sample(self._NAMES, 2)
        things = numbers.choice(self._THINGS)
        question = template.format(a=a, b=b, name=name, other=other, things=things)
        values = {"name": name, "a": a, "b": b, "sign": sign, "answer": answer, "things": things, "end": end}
        trace = self._TRACES[self.style].format(**values)
        return Example(question, trace, str(answer))
