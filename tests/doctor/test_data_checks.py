"""Tests of the doctor's advice on prompt lengths."""

from __future__ import annotations

import re
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from opsd_lightning.data.drop_reasons import DropReason
from opsd_lightning.doctor.data_checks import Room, length_findings
from opsd_lightning.doctor.findings import Finding
from opsd_lightning.losses.objectives import DivergenceObjective
from opsd_lightning.types import Sampling

OVERHEAD, NEW = 50, 100
CUT, SHORTER = "data.prompts.max_trace_tokens", "model.sampling.max_new_tokens"


def advice(pairs: list[tuple[int, int]], *rooms: Room, reason: DropReason = DropReason.PROMPT_TOO_LONG) -> Finding | None:
    data: Any = SimpleNamespace(
        lengths={"train": pairs}, dropped={"train": Counter({reason: len(pairs)})}, longest_completion=lambda split: NEW
    )
    found = list(length_findings(data, {"train": rooms}, OVERHEAD, [], Sampling(NEW), DivergenceObjective(), True))
    assert len(found) <= 1
    return found[0] if found else None


def number(finding: Finding, pattern: str) -> int | None:
    found = re.search(pattern + r"\D*(\d+)", finding.fix)
    return None if found is None else int(found[1])


@pytest.mark.parametrize(
    ("student", "context", "limit", "helps"),
    [
        (100, 400, 512, True),
        (100, 400, 290, True),  # 40 tokens of it are left
        (100, 400, 270, False),  # 20: not worth showing
        (100, 0, 200, False),  # the template alone is too long
        (300, 400, 380, False),  # the question is too long
        (300, 400, 440, False),  # and the template behind it
    ],
)
def test_a_cut_is_advised_where_it_helps(student: int, context: int, limit: int, helps: bool) -> None:
    pairs = [(student, student + OVERHEAD + context)] * 20
    finding = advice(pairs, Room(limit, NEW))
    assert finding is not None and (CUT in finding.fix) == helps
    assert helps or finding.setting != CUT
    if helps:
        cut = number(finding, CUT)
        assert cut is not None and student + OVERHEAD + cut + NEW <= limit


def test_no_cut_is_advised_without_a_teacher_prompt() -> None:
    finding = advice([(450, 0)] * 20, Room(512, NEW))
    assert finding is not None and CUT not in finding.fix and number(finding, SHORTER) == 62


def test_shorter_completions_are_advised_where_they_fit() -> None:
    finding = advice([(100, 440)] * 20, Room(512, NEW))
    assert finding is not None and number(finding, SHORTER) == 72
    finding = advice([(100, 500)] * 20, Room(512, NEW))
    assert finding is not None and SHORTER not in finding.fix


def test_advised_length_fits_for_every_limit() -> None:
    """A teacher with a shorter context than the policy's decides."""
    pairs = [(100, 300)] * 20
    teacher = Room(360, NEW, True, "a model.teacher")
    finding = advice(pairs, Room(512, NEW), teacher, reason=DropReason.TEACHER_TOO_LONG)
    assert finding is not None and number(finding, SHORTER) == 60
    cut = number(finding, CUT)
    assert cut is not None and 150 + cut + NEW <= 360
    assert number(finding, r"a model\.teacher with a context of") == 400 and "a model with" not in finding.fix
    blind = advice(pairs, Room(512, NEW), teacher._replace(reads_teacher=False))
    assert blind is not None and CUT not in blind.fix, "it reads the student's prompt, which fits"


def test_advice_tolerates_one_dropped_row_in_a_hundred() -> None:
    pairs = [(100, 350)] * 198 + [(100, 5000)] * 2
    finding = advice([*pairs, *[(100, 500)] * 20], Room(512, NEW))
    assert finding is not None
    cut = number(finding, CUT)
    assert cut is not None and 200 < cut <= 512 - NEW - 150


def test_traces_that_are_trained_on_are_not_cut() -> None:
    assert advice([(100, 0)] * 20, Room(512, NEW), reason=DropReason.TRACE_TOO_LONG) is None
