"""Rows of a report's table of completions: validation, held-out questions and training, within a limited size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from opsd_lightning.runs.reader import Run

_MAX_ROWS = 4000  # of a run
_MAX_CHARACTERS = 1_500_000  # of a run's questions and completions, about
_SHORTEST = 200  # characters that are left of a text


def completion_rows(run: Run) -> dict[str, Any]:
    """Return the rows of a run for the page's script.

    Returns:
        ``rows`` with ``when`` (such as ``validation``), ``step``, ``role``, ``question``, ``completion``, ``answer``,
        ``reference``, ``correct``, ``tokens`` and ``truncated``; ``total``, the number of completions on disk; and ``cut``,
        the number of characters after which texts are cut, or None.
    """
    found = list(_rows(run))
    rows = found[:_MAX_ROWS]
    cut = None
    if sum(len(row["question"]) + len(row["completion"]) for row in rows) > _MAX_CHARACTERS:
        cut = max(_SHORTEST, _MAX_CHARACTERS // (2 * len(rows)))
        for row in rows:
            for name in ("question", "completion"):
                if len(row[name]) > cut:
                    row[name] = row[name][:cut] + "\N{HORIZONTAL ELLIPSIS}"
    return {"rows": rows, "total": len(found), "cut": cut}


def _rows(run: Run) -> Iterator[dict[str, Any]]:
    for name, records in run.held_out.items():
        when, _, role = name.partition(": ")
        for record in records:
            yield _row(record, f"held out, {when}", None, role)
    for line in run.samples:
        for record in line["records"]:
            yield _row(record, "validation" if line["kind"] == "val" else "training", line["step"], "student")
    yield from (_row(record, "training", record["step"], "student") for record in run.rollouts)


def _row(record: Mapping[str, Any], when: str, step: int | None, role: str) -> dict[str, Any]:
    correct = record.get("correct")
    return {
        "when": when,
        "step": step,
        "role": role,
        "question": record["question"],
        "completion": str(record.get("completion", "")),
        "answer": None if record.get("answer") is None else str(record["answer"]),
        "reference": None if record.get("reference") is None else str(record["reference"]),
        "correct": None if correct is None else bool(correct),
        "tokens": record["completion_tokens"],
        "truncated": bool(record["truncated"]),
    }
