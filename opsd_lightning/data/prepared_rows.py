"""The usable rows of a split as token ids, in a form that can be cached and sent to other ranks."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from opsd_lightning.data.drop_reasons import DropReason
from opsd_lightning.types import Example

Ints = NDArray[numpy.int32]


@dataclass
class PreparedRows:
    """The usable rows of a split, and the reasons for dropping the others.

    Rows are named by their index in the source. A verified row is usable if its context is not empty and its prompts fit the
    context lengths.

    Args:
        verified: Index of each verified row, ascending.
        usable: Index of each usable row, ascending.
        student: Token ids of the student's prompt of each usable row.
        teacher: Token ids of the teacher's prompt of each usable row. Empty if they are not read.
        traces: Token ids of the trace of each usable row as a completion. Empty if the method does not train on traces.
        lengths: Tokens of the student's and the teacher's prompt of each verified row with a context.
        answers: Answer of each verified row without a reference answer, found at the end of its trace.
        dropped: Index and reason of each dropped row, in the order in which they were dropped.
        undecided: Index of each row whose verification was stopped by a limit on time or memory, so that it might end in
            another way on an idle machine.
        cut: Number of contexts of usable rows that were cut to ``prompts.max_trace_tokens``.
    """

    verified: list[int] = field(default_factory=list)
    usable: list[int] = field(default_factory=list)
    student: list[Ints] = field(default_factory=list)
    teacher: list[Ints] = field(default_factory=list)
    traces: list[Ints] = field(default_factory=list)
    lengths: list[tuple[int, int]] = field(default_factory=list)
    answers: dict[int, str] = field(default_factory=dict)
    dropped: list[tuple[int, DropReason]] = field(default_factory=list)
    undecided: list[int] = field(default_factory=list)
    cut: int = 0

    @property
    def reasons(self) -> Counter[DropReason]:
        """Number of dropped rows by reason."""
        return Counter(reason for _, reason in self.dropped)

    def examples(self, found: Sequence[Example], indices: Sequence[int]) -> list[Example]:
        """Return rows of the source with their answers filled in."""
        return [
            found[index]._replace(answer=self.answers[index]) if index in self.answers else found[index] for index in indices
        ]

    def to_bytes(self) -> bytes:
        """Return the rows as the content of a safetensors file."""
        record = {
            "answers": list(self.answers.items()),
            "dropped": [(index, reason.name) for index, reason in self.dropped],
            "undecided": self.undecided,
            "cut": self.cut,
        }
        tensors = {
            "verified": numpy.array(self.verified, dtype=numpy.int32),
            "usable": numpy.array(self.usable, dtype=numpy.int32),
            "lengths": numpy.array(self.lengths, dtype=numpy.int32).reshape(-1, 2),
        }
        for name, rows in (("student", self.student), ("teacher", self.teacher), ("traces", self.traces)):
            tensors[name] = numpy.concatenate([numpy.empty(0, dtype=numpy.int32), *rows])
            tensors[f"{name}_lengths"] = numpy.array([len(row) for row in rows], dtype=numpy.int32)
        return bytes(save({**tensors, "record": numpy.frombuffer(json.dumps(record).encode(), dtype=numpy.uint8)}))

    @classmethod
    def from_bytes(cls, content: bytes) -> PreparedRows:
        """Read what `to_bytes` has returned.

        Raises:
            ValueError: The content is something else.
        """
        try:
            tensors = load(content)
            record = json.loads(tensors.pop("record").tobytes())
            if any(array.dtype != numpy.int32 for array in tensors.values()):
                raise ValueError("not all tensors are int32")
            rows = {name: _split(tensors[name], tensors[f"{name}_lengths"]) for name in ("student", "teacher", "traces")}
            found = cls(
                tensors["verified"].tolist(),
                tensors["usable"].tolist(),
                **rows,
                lengths=[(student, teacher) for student, teacher in tensors["lengths"].tolist()],
                answers=dict(record["answers"]),
                dropped=[(index, DropReason[reason]) for index, reason in record["dropped"]],
                undecided=record["undecided"],
                cut=record["cut"],
            )
        except (SafetensorError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not prepared rows: {error}") from None
        counts = {len(found.student), len(found.teacher), len(found.usable), len(found.traces) or len(found.usable)}
        if len(counts) > 1:
            raise ValueError("the numbers of rows and prompts differ")
        return found


def _split(ids: Ints, lengths: Ints) -> list[Ints]:
    ends = numpy.cumsum(lengths, dtype=numpy.int64)
    if (lengths < 0).any() or (ends[-1] if len(ends) else 0) != len(ids):
        raise ValueError("the lengths of the rows do not add up")
    return numpy.split(ids, ends[:-1]) if len(ends) else []


def token_lists(rows: Sequence[Ints]) -> list[list[int]]:
    """Return token ids as lists. Equal ids are one object, so that a token takes 8 bytes instead of 36."""
    largest = max((int(row.max()) for row in rows if len(row)), default=0)
    numbers = numpy.arange(largest + 1).astype(object)
    return [numbers[row].tolist() for row in rows]
