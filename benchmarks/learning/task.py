"""Task of the test bed: chains of one-digit operations modulo 10, computed from left to right.

    question    2+4+7-7
    worked      2+4=6;6+7=3;3-7=6;A6      the models' own style
    terse       636                       the results only, a reference in another style
    student     Q2+4+7-7>
    teacher     Q2+4+7-7R636>

The split of a question depends only on its hash. Pretraining, training, validation and test questions are therefore disjoint
for all seeds, numbers of operations and numbers of questions.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from jsonargparse.typing import PositiveInt
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opsd_lightning.data.sources import ExampleSource
from opsd_lightning.grading.math_grader import MathGrader
from opsd_lightning.prompts.templates import Prompts
from opsd_lightning.types import Example

Split = Literal["pretrain", "train", "validation", "test"]
Style = Literal["terse", "worked"]

OPERATORS = "+-*"
SHARES: dict[Split, int] = {"pretrain": 50, "train": 30, "validation": 10, "test": 10}  # percent of all questions
SPECIAL = ["<pad>", "<eos>", "<unk>"]
VOCABULARY = [*SPECIAL, *"0123456789", *OPERATORS, *"=;QRA>"]
PROMPTS = Prompts(student_template="{question}", teacher_template="{question}R{context}")
CHAT_TEMPLATE = "{% for m in messages %}{{ 'Q' + m['content'] }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
# The digit after the last A, or the last digit of a terse reference, which has digits only.
ANSWER_PATTERN = r"(?:A|^\d*)(\d)$"
GRADER = MathGrader(answer_pattern=ANSWER_PATTERN)


class Chain(NamedTuple):
    """Digits and the operators between them."""

    digits: tuple[int, ...]
    operators: str

    @property
    def question(self) -> str:
        return str(self.digits[0]) + "".join(f"{o}{d}" for o, d in zip(self.operators, self.digits[1:], strict=True))

    def results(self) -> list[int]:
        """Return the result of each operation modulo 10."""
        found, value = [], self.digits[0]
        for operator, digit in zip(self.operators, self.digits[1:], strict=True):
            value = apply(value, operator, digit) % 10
            found.append(value)
        return found

    def worked(self) -> str:
        """Return the worked answer in the models' own style."""
        values = [self.digits[0], *self.results()]
        steps = zip(values, self.operators, self.digits[1:], values[1:], strict=False)
        return "".join(f"{a}{o}{b}={c};" for a, o, b, c in steps) + f"A{values[-1]}"

    def terse(self) -> str:
        """Return the results only."""
        return "".join(map(str, self.results()))

    def example(self, trace: Style = "terse") -> Example:
        """Return the question with one of its traces, and columns for all contexts.

        ``wrong`` is a terse reference in which each digit is off by the same amount.
        """
        terse, worked = self.terse(), self.worked()
        shift = 1 + sum(self.digits) % 9
        columns = {
            "terse": terse,
            "worked": worked,
            "answer": terse[-1],
            "wrong": "".join(str((int(digit) + shift) % 10) for digit in terse),
        }
        return Example(self.question, columns[trace], terse[-1], columns)


def apply(value: int, operator: str, digit: int) -> int:
    """Return the result of one operation before the modulus."""
    return value + digit if operator == "+" else value - digit if operator == "-" else value * digit


def split_of(question: str) -> Split:
    """Return the split of a question, from a hash of its text."""
    place = int.from_bytes(hashlib.sha256(question.encode()).digest()[:4], "little") % 100
    for split, share in SHARES.items():
        if place < share:
            return split
        place -= share
    raise AssertionError("the shares sum to 100")


def draw(rng: random.Random, operations: int, carries: bool = True) -> Chain:
    """Draw a random chain.

    Args:
        rng: Random number generator.
        operations: Number of operations, at least 1.
        carries: If True, results can be outside 0 to 9 before the modulus. If False, each operation is drawn again until its
            result is inside.
    """
    digits, operators, value = [rng.randrange(10)], "", 0
    value = digits[0]
    while len(operators) < operations:
        operator, digit = rng.choice(OPERATORS), rng.randrange(10)
        result = apply(value, operator, digit)
        if carries or 0 <= result <= 9:
            operators += operator
            digits.append(digit)
            value = result % 10
    return Chain(tuple(digits), operators)


class ChainProblems(ExampleSource):
    """Source of distinct questions of one split in random order.

    Args:
        split: ``pretrain``, ``train``, ``validation`` or ``test``.
        size: Number of questions, at least 1. The split can have fewer.
        operations: Operations per question, at least 1. Three give 270,000 questions over all splits.
        seed: Seed of the choice of questions.
        trace: Style of the trace, ``terse`` (the results only) or ``worked`` (the models' own style).
    """

    def __init__(
        self,
        split: Split = "train",
        size: PositiveInt = 1000,
        operations: PositiveInt = 3,
        seed: int = 0,
        trace: Style = "terse",
    ) -> None:
        if split not in SHARES or trace not in ("terse", "worked"):
            raise ValueError(
                f"ChainProblems: split is {split!r} (one of {', '.join(SHARES)}), trace {trace!r} (terse, worked)"
            )
        self.split, self.trace, self.seed = split, trace, seed
        self.size, self.operations = PositiveInt(size), PositiveInt(operations)

    def examples(self) -> list[Example]:
        rng = random.Random(f"{self.seed} {self.operations}")
        total = 10 ** (self.operations + 1) * len(OPERATORS) ** self.operations
        seen: set[str] = set()
        found: list[Example] = []
        while len(found) < self.size and len(seen) < total:
            chain = draw(rng, self.operations)
            if chain.question not in seen:
                seen.add(chain.question)
                if split_of(chain.question) == self.split:
                    found.append(chain.example(self.trace))
        return found


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per character and a chat template that adds Q before the question and > after it."""
    inner = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def encode(text: str) -> list[int]:
    """Return the token ids of a text, faster than the tokenizer."""
    return [_IDS[character] for character in text]


_IDS = {token: index for index, token in enumerate(VOCABULARY)}
PAD, EOS = _IDS["<pad>"], _IDS["<eos>"]


def prompts(examples: Sequence[Example], context: str | None = None) -> list[list[int]]:
    """Return token ids of the student's prompts, or of the teacher's with a column as context."""
    middle = ["" if context is None else "R" + example.columns[context] for example in examples]
    return [encode(f"Q{example.question}{text}>") for example, text in zip(examples, middle, strict=True)]


def runs_folder() -> Path:
    """Return the folder of bases and results below the current folder, which Git ignores."""
    return Path("runs") / "learning"
