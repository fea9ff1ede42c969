"""Held-out questions are kept out of training, however they are spaced and composed; other questions stay."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from typing import Any

import pytest

from opsd_lightning.data.datamodule import OPSDDataModule
from opsd_lightning.data.sources import ExampleSource, FileSource
from opsd_lightning.doctor.data_checks import data_facts, overlap_findings
from opsd_lightning.models.policy import Policy
from opsd_lightning.prompts.templates import Prompts
from opsd_lightning.types import Example

TEXT = "\u00c5sa has 2 pens,\nand  gets 3.\tHow many?"
SAME = {
    "decomposed": unicodedata.normalize("NFD", TEXT),
    "angstrom sign": TEXT.replace("\u00c5", "\u212b"),
    "line ends of Windows": TEXT.replace("\n", "\r\n"),
    "on one line": " ".join(TEXT.split()),
    "more spaces": TEXT.replace(" ", "   "),
    "no-break spaces": TEXT.replace(" ", "\u00a0"),
    "paragraph separator": TEXT.replace("\n", "\u2029"),
    "space around": f"\n {TEXT}\u3000",
}
OTHER = {
    "case": TEXT.lower(),
    "superscript": TEXT.replace("2", "\u00b2"),
    "full-width digit": TEXT.replace("3", "\uff13"),
    "no space": TEXT.replace(" 3", "3"),
    "without its accent": TEXT.replace("\u00c5", "A"),
    "punctuation": TEXT.replace("?", "!"),
}


class Asked(ExampleSource):
    def __init__(self, *questions: str) -> None:
        self.questions = questions

    def examples(self) -> list[Example]:
        return [Example(question, "so \\boxed{5}", "5") for question in self.questions]


@pytest.fixture
def prepared(make_policy: Callable[..., Policy]) -> Callable[..., OPSDDataModule]:
    def prepare(train: list[str], **held_out: Any) -> OPSDDataModule:
        prompts = Prompts("{question}", "{question} {context}")
        data = OPSDDataModule(
            make_policy(), train=Asked(*train), **held_out, batch_size=1, max_new_tokens=4, prompts=prompts
        )
        data.setup("fit")
        return data

    return prepare


@pytest.mark.parametrize("split", ["val", "test"])
def test_held_out_questions_are_removed_from_training(split: str, prepared: Callable[..., OPSDDataModule]) -> None:
    data = prepared([*SAME.values(), *OTHER.values()], **{split: Asked(TEXT)})
    assert [example.question for example in data.rows["train"].examples] == list(OTHER.values())
    assert data.dropped["train"].total() == len(SAME)


def test_doctor_counts_the_same_overlap(prepared: Callable[..., OPSDDataModule]) -> None:
    asked = [*SAME.values(), *OTHER.values()]
    data = prepared(asked, val=Asked("another one?"))
    assert data_facts(data, "train")["repeated_questions"] == len(SAME) - 1
    data = prepared(["another one?"], val=Asked(*asked), test=Asked(TEXT))
    (finding,) = overlap_findings(data)
    assert finding.text.startswith(f"{len(SAME)} of {len(asked)} ")
    data.sources["test"] = FileSource("nowhere.jsonl")
    assert list(overlap_findings(data)) == []
