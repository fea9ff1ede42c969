"""What goes wrong in self-distillation, as metrics: where the divergence lies, hedging, leaks, copying, diversity.

Every metric is a ratio of sums, or several, so that a value over several ranks is exactly that of all their completions. The
callback that logs them is `opsd_lightning.callbacks.health.Health`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from opsd_lightning.types import PositiveInt, UserError, checked
from opsd_lightning.utils.token_text import Piece

#: Words that reconsider. Self-distillation suppresses them, at up to 40 % of the accuracy out of domain (arXiv 2603.24472).
HEDGES = ("wait", "hmm", "maybe", "perhaps", "alternatively", "actually", "however", "but", "let me check", "double-check")
#: What a student writes that has learned to speak of what only the teacher read.
LEAKS = (
    "reference solution", "reference answer", "given solution", "provided solution", "solution provided", "solution above",
    "according to the solution", "as shown in the solution", "solution says", "given trace", "privileged",
)  # fmt: skip
#: Words of manner: their divergence can be 6 to 15 times that of mathematics, and then style is what is learned.
STYLE = (
    "so", "now", "then", "thus", "hence", "therefore", "first", "next", "finally", "let", "lets", "okay", "ok", "well",
    "note", "wait", "hmm", "maybe", "perhaps", "alternatively", "actually", "however", "but", "also", "sure", "indeed",
)  # fmt: skip
#: The classes of `token_class`, in the order of `ClassDivergence`.
CLASSES = ("math", "style", "word", "mark", "special")
_WORD = re.compile(r"\w+|[^\w\s]")


def token_class(piece: Piece, style: Sequence[str] = STYLE) -> str:
    """The class of one token: ``special`` (EOS and the like), ``math`` (a digit, an operator, the backslash of a LaTeX
    command), ``style`` (a whole word of ``style``), ``mark`` (punctuation, white space and Markdown's ``**`` alone) or
    ``word`` (the rest, parts of words too)."""
    text = re.sub(r"\*{2,}", "", piece.text).strip()
    if piece.kind == "special":
        return "special"
    if re.search(r"[\d+*/=<>^\\\u00d7\u00f7\u2212\u2264\u2265]", text) or text == "-":
        return "math"
    if text.lower().replace("'", "") in style:
        return "style"
    return "word" if re.search(r"\w", text) or piece.kind in ("bytes", "unknown") else "mark"


class GroupedMean(Metric):
    """Means of numbers by group: sum of a group's values / their count. A group without any is left out.

    Args:
        groups: The groups' names.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, groups: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.groups = tuple(groups)
        self.add_state("total", torch.zeros(len(self.groups)), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(len(self.groups)), dist_reduce_fx="sum")

    def add(self, values: Tensor, groups: Tensor) -> None:
        """Add values, each to the group of that place. Shapes [N], [N]."""
        size, values = len(self.groups), values.double().cpu()
        self.total += torch.bincount(groups.cpu(), values, size).to(self.total)
        self.count += torch.bincount(groups.cpu(), minlength=size).to(self.count)

    def compute(self) -> dict[str, Tensor]:
        """The mean of every group that has a value."""
        return {name: self.total[i] / self.count[i] for i, name in enumerate(self.groups) if self.count[i] > 0}


class PositionDivergence(GroupedMean):
    """The divergence (nats per token) of the first tokens, and by quarter of the completion.

    ``first_k``: the mean over the first k tokens of every completion, k = 1, 4, 16. ``quarter_q``: over the tokens n of
    completions of C tokens with floor(4 n / C) = q - 1.
    """

    FIRST = (1, 4, 16)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__([f"first_{k}" for k in self.FIRST] + [f"quarter_{q}" for q in range(1, 5)], **kwargs)

    def update(self, divergence: Sequence[Tensor]) -> None:
        """Add completions.

        Args:
            divergence: Of each completion's tokens, shape [C] each.
        """
        values, groups = [torch.zeros(0)], [torch.zeros(0, dtype=torch.long)]
        for row in divergence:
            for index, k in enumerate(self.FIRST):
                values.append(row[:k])
                groups.append(torch.full((len(row[:k]),), index))
            values.append(row)
            groups.append(len(self.FIRST) + 4 * torch.arange(len(row)) // max(len(row), 1))
        self.add(torch.cat(values), torch.cat(groups))


class ClassDivergence(GroupedMean):
    """The divergence by `token_class`: its mean over a class's tokens, and the class's share of the whole.

    ``math`` ...: nats per token. ``math_share`` ...: sum over the class's tokens / sum over all
    tokens, where that is above 0. ``style_over_math``: the ratio of the two means; where it is 6 to 15, style
    is what is learned.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(CLASSES, **kwargs)

    def update(self, divergence: Sequence[Tensor], classes: Sequence[Sequence[str]]) -> None:
        """Add completions.

        Args:
            divergence: Of each completion's tokens, shape [C] each.
            classes: The class of each token.
        """
        groups = [CLASSES.index(name) for names in classes for name in names]
        self.add(torch.cat([torch.zeros(0), *divergence]), torch.tensor(groups, dtype=torch.long))

    def compute(self) -> dict[str, Tensor]:
        """By class, see above."""
        found, whole = super().compute(), self.total.sum()
        shares = {f"{name}_share": self.total[CLASSES.index(name)] / whole for name in found} if whole > 0 else {}
        if "style" in found and found.get("math", torch.zeros(())) > 0:
            shares["style_over_math"] = found["style"] / found["math"]
        return found | shares


class CorrectnessGap(GroupedMean):
    """By correctness of the completion: the mean over tokens of log p_T - log p_S of the sampled token, in nats.

    Where the teacher's knowledge helps, it likes the tokens of correct completions and not those of wrong ones: ``correct``
    above ``wrong``. ``accuracy``: the share of correct completions.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(("wrong", "correct", "accuracy"), **kwargs)

    def update(self, gap: Sequence[Tensor] | None, correct: Sequence[bool]) -> None:
        """Add completions.

        Args:
            gap: Of each completion's tokens, shape [C] each; None without a teacher.
            correct: Whether each completion is.
        """
        self.add(torch.tensor([float(right) for right in correct]), torch.full((len(correct),), 2))
        if gap is not None:
            groups = [int(right) for values, right in zip(gap, correct, strict=True) for _ in range(len(values))]
            self.add(torch.cat([torch.zeros(0), *gap]), torch.tensor(groups, dtype=torch.long))


class Share(Metric):
    """A sum over another; 0 where there is nothing."""

    full_state_update = False
    top: Tensor
    bottom: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("top", "bottom"):
            self.add_state(name, torch.zeros(()), dist_reduce_fx="sum")

    def compute(self) -> Tensor:
        """The quotient."""
        return self.top / self.bottom.clamp(min=1)


class PhraseRate(Metric):
    """How often phrases occur in completions: ``per_1k``, occurrences in 1000 completion tokens, and ``fraction``, the share
    of completions with at least one.

    Args:
        phrases: Words or phrases, at least one; whole words, in any case, with any white space between words.
    """

    full_state_update = False
    found: Tensor
    tokens: Tensor
    having: Tensor
    rows: Tensor

    def __init__(self, phrases: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not phrases or not all(isinstance(phrase, str) and phrase.strip() for phrase in phrases):
            raise UserError(f"the phrases to count are {list(phrases)}: give at least one, and none that is empty")
        words = [r"\s+".join(map(re.escape, phrase.split())) for phrase in sorted(phrases, key=len, reverse=True)]
        self.pattern = re.compile(rf"(?<!\w)(?:{'|'.join(words)})(?!\w)", re.IGNORECASE)
        for name in ("found", "tokens", "having", "rows"):
            self.add_state(name, torch.zeros(()), dist_reduce_fx="sum")

    def update(self, texts: Sequence[str], tokens: Sequence[int]) -> None:
        """Add completions: the text and the number of tokens of each."""
        counts = [len(self.pattern.findall(text)) for text in texts]
        self.found += sum(counts)
        self.having += sum(count > 0 for count in counts)
        self.tokens += sum(tokens)
        self.rows += len(texts)

    def compute(self) -> dict[str, Tensor]:
        """Both rates; 0 without any completion."""
        return {"per_1k": 1000 * self.found / self.tokens.clamp(min=1), "fraction": self.having / self.rows.clamp(min=1)}


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """The n-grams of a text's words and marks, in lower case."""
    words = _WORD.findall(text.lower())
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


@checked
class TraceOverlap(Share):
    """The share of the completions' n-grams that stand in the trace, those of the question left out on both sides.

    A student that recites traces nears 1; what it may know, the question, counts neither for nor against it.

    Args:
        n: Words and marks of an n-gram, at least 1.
    """

    def __init__(self, n: PositiveInt = 4, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.n = n

    def update(self, texts: Sequence[str], traces: Sequence[str], questions: Sequence[str]) -> None:
        """Add completions with the trace and the question of each."""
        for text, trace, question in zip(texts, traces, questions, strict=True):
            known = set(ngrams(question, self.n))
            own = [gram for gram in ngrams(text, self.n) if gram not in known]
            told = set(ngrams(trace, self.n))
            self.top += sum(gram in told for gram in own)
            self.bottom += len(own)


@checked
class Distinct(Share):
    """Diversity: the mean over questions of (different n-grams / n-grams) of all its completions together.

    1: nothing is repeated, within a completion or between those of one question. Falls with loops, and, with several
    completions a question, when they grow alike (pass@k falls while avg@k rises). Longer completions repeat more.

    Args:
        n: Words and marks of an n-gram, at least 1.
    """

    def __init__(self, n: PositiveInt = 3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.n = n

    def update(self, texts: Sequence[str]) -> None:
        """Add one question's completions; without any n-gram nothing."""
        grams = [gram for text in texts for gram in ngrams(text, self.n)]
        if grams:
            self.top += len(set(grams)) / len(grams)
            self.bottom += 1


class MeanLength(GroupedMean):
    """Tokens a completion: ``all``, and of the ``terminated`` ones, which the limit did not cut."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(("all", "terminated"), **kwargs)

    def update(self, lengths: Sequence[int], terminated: Sequence[bool]) -> None:
        """Add completions."""
        ended = [length for length, end in zip(lengths, terminated, strict=True) if end]
        self.add(torch.tensor([*lengths, *ended]).float(), torch.tensor([0] * len(lengths) + [1] * len(ended)))
