"""Grade the choice of a completion between the options of a multiple-choice question."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from opsd_lightning.grading.base import Grade, Grader
from opsd_lightning.grading.choices import LETTERS, ChoiceReader, OptionError, read_options
from opsd_lightning.grading.example_columns import SETTING, column_of, shown
from opsd_lightning.grading.final_answer import strip_thinking
from opsd_lightning.grading.patterns import check_pattern, last_match
from opsd_lightning.types import ConfigError, Example, PositiveFloat, checked


@checked
@dataclass(frozen=True)
class ChoiceGrader(Grader):
    r"""Grader of multiple-choice questions.

    It reads a completion's choice by its letter ("B", "(B) 12", "Option B", "The answer is (B).", "**B**") or by the text of
    the option. An answer phrase counts before a line of its own, and the last phrase before earlier ones. A completion that
    names several options without a final one has no answer, and so has one whose letter and text belong to different
    options. Thinking blocks are skipped.

    Args:
        options: Column with the options: a list of texts, which get the letters A, B, ...; an object of texts by letter; an
            object with the lists ``label`` and ``text``; or a text with one labelled option per line. Null reads the options
            from the question, such as lines "A) ...".
        reference: Form of the reference answer: ``letter``, ``index`` (a position in the list of options, see
            ``first_index``) or ``text`` (the text of an option). ``auto`` accepts a letter or a text, and is refused if both
            are possible and differ.
        first_index: Index of the first option, 0 or 1.
        answer_pattern: Regular expression whose first group is the choice. Its last match counts, and must be a choice as a
            whole. Null finds the choice as described above.
        timeout_seconds: Time limit of the search with ``answer_pattern``, in seconds. A search that exceeds it counts as
            wrong.

    Example::

        >>> from opsd_lightning import ChoiceGrader, Example
        >>> example = Example("What is 5 + 7?", "", "B", {"options": ["10", "12", "14"]})
        >>> grader = ChoiceGrader()
        >>> [grader.grade(text, example).score for text in ("(B) 12", "The answer is 12.", "A or B", "A good question")]
        [1.0, 1.0, 0.0, 0.0]
    """

    repeatable: ClassVar[bool] = True

    options: str | None = "options"
    reference: Literal["auto", "letter", "index", "text"] = "auto"
    first_index: Literal[0, 1] = 0
    answer_pattern: str | None = None
    timeout_seconds: PositiveFloat = 5.0

    def __post_init__(self) -> None:
        if self.answer_pattern is not None:
            check_pattern(
                self.answer_pattern, f"{SETTING}answer_pattern", "Put the choice in parentheses, or set it to null"
            )
        if self.reference not in ("auto", "letter", "index", "text"):
            fix = "Set it to auto, letter, index or text"
            raise ConfigError(f"it is {self.reference!r}", f"{SETTING}reference", fix)
        if self.first_index not in (0, 1):
            raise ConfigError(f"it is {self.first_index!r}", f"{SETTING}first_index", "Set it to 0 or 1")

    @property
    def reads_boxes(self) -> bool:
        return self.answer_pattern is None or "boxed" in self.answer_pattern

    def can_grade(self, example: Example) -> bool:
        return bool(example.answer.strip()) and self._right(self._reader(example), example) is not None

    def grade(self, completion: str, example: Example) -> Grade:
        reader = self._reader(example)
        right = self._right(reader, example)
        text: str | None = strip_thinking(completion)
        if text is not None and self.answer_pattern is not None:
            try:
                text = last_match(self.answer_pattern, text, self.timeout_seconds)
            except TimeoutError:
                return Grade(0.0, problem="timeout", feedback="The search for the choice took too long.")
            answer = None if text is None else reader.whole(text)
        else:
            answer = None if text is None else reader.read(text)
        if answer is None:
            return Grade(0.0, feedback="The completion makes no clear choice.")
        if answer == right:
            return Grade(1.0, answer)
        return Grade(0.0, answer, f"The choice {answer} ({shown(reader.options[answer])}) is wrong.")

    def verify(self, example: Example) -> Grade:
        """Grade the trace. Without a reference answer, the answer of the grade has the form that ``reference`` names."""
        grade = super().verify(example)
        if grade.answer is None or example.answer.strip() or self.reference in ("auto", "letter"):
            return grade
        options = self._reader(example).options
        if self.reference == "text":
            return grade._replace(answer=options[grade.answer])
        return grade._replace(answer=str(list(options).index(grade.answer) + self.first_index))

    def shown_reference(self, example: Example) -> str:
        """Return the reference answer. An index is shown as the letter of its option, which the question shows."""
        if self.reference != "index" or not example.answer.strip():
            return example.answer
        return self._right(self._reader(example), example) or ""

    def choices(self, example: Example) -> tuple[dict[str, str], str | None]:
        """Return the options of a question by label, and the label of the right one. None if it has no reference.

        Raises:
            ConfigError: The options or the reference cannot be read.
        """
        reader = self._reader(example)
        return dict(reader.options), self._right(reader, example)

    def _reader(self, example: Example) -> ChoiceReader:
        setting = f"{SETTING}options"
        value = example.question if self.options is None else column_of(example, self.options, setting)
        try:
            return ChoiceReader(read_options(value))
        except OptionError as error:
            where = "the question" if self.options is None else f"the column {self.options!r}"
            fix = "Give each question two or more options, as a list or as lines such as 'A) 12'"
            raise ConfigError(f"{where} of {shown(example.question)}: {error}", setting, fix) from None

    def _right(self, reader: ChoiceReader, example: Example) -> str | None:
        """Return the label of the right option, or None if there is no reference."""
        reference = example.answer.strip()
        if not reference:
            return None
        labels = list(reader.options)
        letter = reference.strip("().: ").upper()
        by_letter = letter if letter in reader.options else None
        by_text = reader.label_of(reference)
        found: str | None
        if self.reference == "letter":
            found = by_letter
        elif self.reference == "text":
            found = by_text
        elif self.reference == "index":
            place = int(reference) - self.first_index if reference.isdecimal() and len(reference) < 4 else -1
            found = labels[place] if 0 <= place < len(labels) else None
        else:
            if by_letter is not None and by_text is not None and by_letter != by_text:
                problem = f"the answer {reference!r} is the letter of one option and the text of {by_text}"
                raise ConfigError(problem, f"{SETTING}reference", "Set it to letter or text")
            found = by_letter or by_text or (reader.whole(reference) if self._labelled(reference) else None)
        if found is None:
            kind = {"auto": "no letter or text of an option", "letter": "no letter of an option"}.get(
                self.reference, f"no {self.reference} of an option"
            )
            options = ", ".join(f"{label} {shown(text, 30)}" for label, text in list(reader.options.items())[: len(LETTERS)])
            problem = f"the answer {shown(reference)} of {shown(example.question)} is {kind} ({options})"
            fix = "Set it to letter, index or text, or correct the answer"
            raise ConfigError(problem, f"{SETTING}reference", fix)
        return found

    def _labelled(self, reference: str) -> bool:
        """Return True for a reference such as ``(B) 12``."""
        return reference[:1] in "([" or reference[1:2] in (")", ".", ":")
