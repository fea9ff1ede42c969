"""Scores of held-out questions before and after training: by the grader, and by the last number of each completion.

The grader asks for a form. The last number of a completion does not depend on it. The difference of the two gains is form.
It is known only where every reference answer is a number.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from opsd_lightning.grading.last_number import ends_in, number_of
from opsd_lightning.utils.statistics import mean_and_interval, paired_change, wilson

Record = Mapping[str, Any]
Scores = dict[Hashable, list[float]]

_STUDENT = ("before: student", "after: student")


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
        half: Half of the width of its 95 % interval, as of `utils.statistics.paired_change`.
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
        rows: One row for each time and role. Those of the student are over the questions graded before and after, if both
            times have some in common.
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
        before, after = map(self.row, _STUDENT)
        if self.strict is None or self.last_number is None or self.form is None or before is None or after is None:
            return ""
        assert before.last_number is not None and after.last_number is not None
        by_number = (
            f"graded by the last number of a completion, the student goes from {before.last_number.value:.1%} to "
            f"{after.last_number.value:.1%} ({100 * self.last_number.value:+.1f} ± {100 * self.last_number.half:.1f})"
        )
        if self.strict.value <= 0:
            return f"{by_number[0].upper()}{by_number[1:]}."
        if self.last_number.value <= 0:
            verb = "falls" if self.last_number.value < 0 else "does not change"
            return (
                f"Of the gain of {100 * self.strict.value:.1f} points, none is arithmetic, and the score by the last number "
                f"{verb} (95 % interval, same questions): {by_number}."
            )
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
    graded = _on_common_questions({name: rows for name, rows in graded.items() if rows})
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
    if not set(_STUDENT) <= set(strict):
        return HeldOut(rows)
    first = _paired(strict)
    if not first[0]:
        return HeldOut(rows)
    if not numeric:
        return HeldOut(rows, Change(*paired_change(*first)))
    second = _paired(loose)
    gains = [[late - early for early, late in zip(*values, strict=True)] for values in (second, first)]
    return HeldOut(rows, *(Change(*paired_change(*values)) for values in (first, second, gains)))


def _on_common_questions(graded: Mapping[str, list[Record]]) -> dict[str, list[Record]]:
    """Keep the student's records of questions that were graded before and after, if there are any."""
    questions = [{_question(each) for each in graded.get(name, ())} for name in _STUDENT]
    common = set.intersection(*questions)
    if not common:
        return dict(graded)
    return {
        name: [each for each in rows if name not in _STUDENT or _question(each) in common] for name, rows in graded.items()
    }


def _question(record: Record) -> Hashable:
    return record.get("index", record["question"])


def _strict(record: Record) -> float:
    return float(record.get("score", record["correct"]))


def _by_last_number(record: Record) -> float:
    return float(bool(ends_in(str(record.get("completion")), str(record["reference"]))))


def _by_question(records: Sequence[Record], score: Callable[[Record], float]) -> Scores:
    found: Scores = {}
    for record in records:
        found.setdefault(_question(record), []).append(score(record))
    return found


def _accuracy(scores: Scores) -> Accuracy:
    means = [sum(values) / len(values) for values in scores.values()]
    mean, half = mean_and_interval(means)
    if all(len(values) == 1 and values[0] in (0, 1) for values in scores.values()):
        return Accuracy(mean, *wilson([value > 0 for value in means]))
    return Accuracy(mean, max(mean - half, 0.0), min(mean + half, 1.0))


def _paired(scores: Mapping[str, Scores]) -> tuple[list[float], list[float]]:
    """Return the student's mean scores before and after, of each question that both times have."""
    before, after = (scores[name] for name in _STUDENT)
    common = [question for question in before if question in after]
    early, late = ([sum(found[each]) / len(found[each]) for each in common] for found in (before, after))
    return early, late
