"""Scores of held-out questions before and after training: by the grader, and by the last number of each completion.

The grader asks for a form. The last number of a completion does not depend on it. The difference of the two gains is form.
It is known only where every reference answer is a number.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from opsd_lightning.grading.last_number import ends_in, number_of
from opsd_lightning.utils.statistics import mean_and_interval, wilson

Record = Mapping[str, Any]
Scores = dict[Hashable, list[float]]


class Accuracy(NamedTuple):
    """An accuracy over questions.

    Args:
        value: Mean over the questions, from 0 to 1.
        low: Lower end of its 95 % interval. Wilson's for one completion a question, otherwise a normal one.
        high: Upper end.
    """

    value: float
    low: float
    high: float


class Change(NamedTuple):
    """A paired change on the same questions.

    Args:
        value: Mean over the questions.
        half: Half of the width of its 95 % interval.
    """

    value: float
    half: float


class Row(NamedTuple):
    """Scores of one role at one time.

    Args:
        name: Time and role, such as ``before: student``.
        questions: Number of graded questions.
        strict: Accuracy by the grader.
        last_number: Accuracy by the last number of a completion. None if a reference is not a number.
        silent: Share of completions without an answer.
        truncated: Share of completions that reached the length limit.
        tokens: Mean length of a completion in tokens.
    """

    name: str
    questions: int
    strict: Accuracy
    last_number: Accuracy | None
    silent: float
    truncated: float
    tokens: float


@dataclass(frozen=True)
class HeldOut:
    """Scores of held-out questions.

    Args:
        rows: One row for each time and role.
        strict: Change of the student by the grader. None without completions before and after.
        last_number: Change of the student by the last number of a completion.
        form: The first change minus the second one, question by question.
    """

    rows: Sequence[Row]
    strict: Change | None = None
    last_number: Change | None = None
    form: Change | None = None

    def row(self, name: str) -> Row | None:
        return next((row for row in self.rows if row.name == name), None)

    @property
    def sentence(self) -> str:
        """The form's share of the student's gain in words, or an empty text if it is unknown."""
        before, after = (self.row(f"{when}: student") for when in ("before", "after"))
        if self.strict is None or self.last_number is None or self.form is None or before is None or after is None:
            return ""
        assert before.last_number is not None and after.last_number is not None
        by_number = (
            f"graded by the last number of a completion, the student goes from {before.last_number.value:.1%} to "
            f"{after.last_number.value:.1%} ({100 * self.last_number.value:+.1f} ± {100 * self.last_number.half:.1f})"
        )
        if self.strict.value <= 0:
            return f"{by_number[0].upper()}{by_number[1:]}."
        share = (
            f"{100 * self.form.value:.1f} ± {100 * self.form.half:.1f} are form" if self.form.value > 0 else "none is form"
        )
        return f"Of the gain of {100 * self.strict.value:.1f} points, {share} (95 % interval, same questions): {by_number}."

    def as_dict(self) -> dict[str, Any]:
        """Return all numbers as JSON values."""
        changes = {"strict": self.strict, "last_number": self.last_number, "form": self.form}
        return {
            "scores": {
                row.name: row._asdict()
                | {"strict": row.strict._asdict(), "last_number": row.last_number and row.last_number._asdict()}
                for row in self.rows
            },
            "change": {name: change and change._asdict() for name, change in changes.items()},
        }


def held_out_scores(records: Mapping[str, Sequence[Record]]) -> HeldOut | None:
    """Return the scores of graded completions, or None if nothing was graded.

    Args:
        records: Graded completions by time and role, such as ``before: student``, as `runs.reader.read_held_out` reads them.
    """
    graded = {name: [each for each in rows if each["correct"] is not None] for name, rows in records.items()}
    graded = {name: rows for name, rows in graded.items() if rows}
    if not graded:
        return None
    numeric = all(number_of(str(each.get("reference"))) is not None for rows in graded.values() for each in rows)
    strict = {name: _by_question(rows, _strict) for name, rows in graded.items()}
    loose = {name: _by_question(rows, _by_last_number) for name, rows in graded.items()} if numeric else {}
    rows = [
        Row(
            name,
            len(strict[name]),
            _accuracy(strict[name]),
            _accuracy(loose[name]) if numeric else None,
            sum(each["answer"] is None for each in found) / len(found),
            sum(bool(each["truncated"]) for each in found) / len(found),
            sum(each["completion_tokens"] for each in found) / len(found),
        )
        for name, found in graded.items()
    ]
    first, second = _changes(strict), _changes(loose)
    if not first:
        return HeldOut(rows)
    if not second:
        return HeldOut(rows, _change(list(first.values())))
    form = [first[question] - second[question] for question in first]
    return HeldOut(rows, *(_change(values) for values in (list(first.values()), list(second.values()), form)))


def _strict(record: Record) -> float:
    return float(record.get("score", record["correct"]))


def _by_last_number(record: Record) -> float:
    return float(bool(ends_in(str(record.get("completion")), str(record["reference"]))))


def _by_question(records: Sequence[Record], score: Callable[[Record], float]) -> Scores:
    found: Scores = {}
    for record in records:
        found.setdefault(record.get("index", record["question"]), []).append(score(record))
    return found


def _accuracy(scores: Scores) -> Accuracy:
    means = [sum(values) / len(values) for values in scores.values()]
    mean, half = mean_and_interval(means)
    if all(len(values) == 1 and values[0] in (0, 1) for values in scores.values()):
        return Accuracy(mean, *wilson([value > 0 for value in means]))
    return Accuracy(mean, max(mean - half, 0.0), min(mean + half, 1.0))


def _changes(scores: Mapping[str, Scores]) -> dict[Hashable, float]:
    """Return the student's change of each question that was graded before and after."""
    before, after = (scores.get(f"{when}: student", {}) for when in ("before", "after"))
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    return {question: mean(after[question]) - mean(before[question]) for question in before if question in after}


def _change(values: list[float]) -> Change:
    return Change(*mean_and_interval(values))
