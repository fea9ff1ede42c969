"""Metrics for the known failures of self-distillation: divergence by position and class, hedging, leaks, copying, diversity.

Each metric consists of ratios of sums, so that its value over several ranks is exactly the value over all their completions.
The callback `opsd_lightning.callbacks.health.Health` logs them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from opsd_lightning.types import ConfigError, PositiveInt, checked
from opsd_lightning.utils.token_text import Piece

#: Hedging words. Self-distillation suppresses them, which costs up to 40 % of accuracy out of domain (arXiv 2603.24472).
HEDGES = ("wait", "hmm", "maybe", "perhaps", "alternatively", "actually", "however", "but", "let me check", "double-check")
#: Leak phrases: they refer to the privileged context, which only the teacher reads.
LEAKS = (
    "reference solution", "reference answer", "given solution", "provided solution", "solution provided", "solution above",
    "according to the solution", "as shown in the solution", "solution says", "given trace", "privileged",
)  # fmt: skip
#: Style words. Their divergence can be 6 to 15 times as large as that of mathematics, and then the student learns style.
STYLE = (
    "so", "now", "then", "thus", "hence", "therefore", "first", "next", "finally", "let", "lets", "okay", "ok", "well",
    "note", "wait", "hmm", "maybe", "perhaps", "alternatively", "actually", "however", "but", "also", "sure", "indeed",
)  # fmt: skip
#: The classes of `token_class`, in the order of `ClassDivergence`.
CLASSES = ("math", "style", "word", "mark", "special")
_WORD = re.compile(r"\w+|[^\w\s]")


def token_class(piece: Piece, style: Sequence[str] = STYLE) -> str:
    """Return the class of a token.

    Args:
        piece: Text and kind of the token.
        style: Style words in lower case.

    Returns:
        ``special`` (EOS and other special tokens), ``math`` (contains a digit, an operator or the backslash of a LaTeX
        command), ``style`` (a whole style word), ``mark`` (punctuation, white space or Markdown's ``**`` only) or ``word``
        (all other tokens, including parts of words).
    """
    text = re.sub(r"\*{2,}", "", piece.text).strip()
    if piece.kind == "special":
        return "special"
    if re.search(r"[\d+*/=<>^\\\u00d7\u00f7\u2212\u2264\u2265]", text) or text == "-":
        return "math"
    if text.lower().replace("'", "") in style:
        return "style"
    return "word" if re.search(r"\w", text) or piece.kind in ("bytes", "unknown") else "mark"


class GroupedMean(Metric):
    """Mean of the values of each group. Groups without values are left out.

    Args:
        groups: Names of the groups.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, groups: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.groups = tuple(groups)
        self.add_state("total", torch.zeros(len(self.groups), dtype=torch.float32), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(len(self.groups), dtype=torch.float32), dist_reduce_fx="sum")

    def add(self, values: Tensor, groups: Tensor) -> None:
        """Add values.

        Args:
            values: Shape [N].
            groups: Index of the group of each value. Shape [N].
        """
        size, values = len(self.groups), values.double().cpu()
        self.total += torch.bincount(groups.cpu(), values, size).to(self.total)
        self.count += torch.bincount(groups.cpu(), minlength=size).to(self.count)

    def compute(self) -> dict[str, Tensor]:
        """Return the mean of each group that has values."""
        return {name: self.total[i] / self.count[i] for i, name in enumerate(self.groups) if self.count[i] > 0}


class PositionDivergence(GroupedMean):
    """Mean divergence of the first tokens and of each quarter of the completions, in nats per token.

    ``first_k`` is the mean over the first k tokens of each completion, for k = 1, 4, 16. ``quarter_q`` is the mean over
    tokens n = 0, 1, ... with floor(4 n / C) = q - 1 in completions of C tokens.
    """

    FIRST = (1, 4, 16)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__([f"first_{k}" for k in self.FIRST] + [f"quarter_{q}" for q in range(1, 5)], **kwargs)

    def update(self, divergence: Sequence[Tensor]) -> None:
        """Add completions.

        Args:
            divergence: Divergence at each token, one tensor of shape [C] per completion.
        """
        values, groups = [torch.zeros(0, dtype=torch.float32)], [torch.zeros(0, dtype=torch.long)]
        for row in divergence:
            for index, k in enumerate(self.FIRST):
                values.append(row[:k])
                groups.append(torch.full((len(row[:k]),), index))
            values.append(row)
            groups.append(len(self.FIRST) + 4 * torch.arange(len(row)) // max(len(row), 1))
        self.add(torch.cat(values), torch.cat(groups))


class ClassDivergence(GroupedMean):
    """Mean divergence of each class of tokens (see `token_class`), and the share of each class in the total divergence.

    ``math``, ``style``, ...: mean over the tokens of the class, in nats per token. ``math_share``, ...: sum over the tokens
    of the class / sum over all tokens, if that is above 0. ``style_over_math``: ratio of the two means. At values of 6 to
    15, the student mainly learns style.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(CLASSES, **kwargs)

    def update(self, divergence: Sequence[Tensor], classes: Sequence[Sequence[str]]) -> None:
        """Add completions.

        Args:
            divergence: Divergence at each token, one tensor of shape [C] per completion.
            classes: Class of each token, one sequence per completion.
        """
        groups = [CLASSES.index(name) for names in classes for name in names]
        self.add(torch.cat([torch.zeros(0, dtype=torch.float32), *divergence]), torch.tensor(groups, dtype=torch.long))

    def compute(self) -> dict[str, Tensor]:
        """Return means, shares and the ratio by name."""
        means, total = super().compute(), self.total.sum()
        shares = {f"{name}_share": self.total[CLASSES.index(name)] / total for name in means} if total > 0 else {}
        if "style" in means and means.get("math", torch.zeros((), dtype=torch.float32)) > 0:
            shares["style_over_math"] = means["style"] / means["math"]
        return means | shares


class CorrectnessGap(GroupedMean):
    """Mean of log p_T - log p_S at the sampled tokens of correct and of wrong completions, in nats.

    If the privileged context helps the teacher, it prefers the tokens of correct completions, and ``correct`` is above
    ``wrong``. ``accuracy`` is the share of correct completions.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(("wrong", "correct", "accuracy"), **kwargs)

    def update(self, gap: Sequence[Tensor] | None, correct: Sequence[bool]) -> None:
        """Add completions.

        Args:
            gap: log p_T - log p_S at each token, one tensor of shape [C] per completion. None without a teacher.
            correct: True for each correct completion.
        """
        self.add(torch.tensor([float(right) for right in correct], dtype=torch.float32), torch.full((len(correct),), 2))
        if gap is not None:
            groups = [int(right) for values, right in zip(gap, correct, strict=True) for _ in range(len(values))]
            self.add(torch.cat([torch.zeros(0, dtype=torch.float32), *gap]), torch.tensor(groups, dtype=torch.long))


class Ratio(Metric):
    """Ratio of two sums, 0 without any value."""

    full_state_update = False
    numerator: Tensor
    denominator: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("numerator", "denominator"):
            self.add_state(name, torch.zeros((), dtype=torch.float32), dist_reduce_fx="sum")

    def compute(self) -> Tensor:
        """Return the ratio."""
        return self.numerator / self.denominator.clamp(min=1)


class PhraseRate(Metric):
    """Rate of phrases in completions.

    ``per_1k`` is the number of occurrences per 1000 completion tokens. ``fraction`` is the share of completions with at
    least one occurrence. Only whole words match, regardless of case and of the white space between words.

    Args:
        phrases: Words or phrases, at least one.

    Raises:
        ConfigError: There is no phrase, or one of them is empty.
    """

    full_state_update = False
    occurrences: Tensor
    tokens: Tensor
    matching: Tensor
    completions: Tensor

    def __init__(self, phrases: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not phrases or not all(isinstance(phrase, str) and phrase.strip() for phrase in phrases):
            problem = f"cannot count the phrases {list(phrases)}"
            raise ConfigError(problem, "phrases", "Give at least one phrase, and no empty one")
        words = [r"\s+".join(map(re.escape, phrase.split())) for phrase in sorted(phrases, key=len, reverse=True)]
        self.pattern = re.compile(rf"(?<!\w)(?:{'|'.join(words)})(?!\w)", re.IGNORECASE)
        for name in ("occurrences", "tokens", "matching", "completions"):
            self.add_state(name, torch.zeros((), dtype=torch.float32), dist_reduce_fx="sum")

    def update(self, texts: Sequence[str], tokens: Sequence[int]) -> None:
        """Add completions.

        Args:
            texts: Text of each completion.
            tokens: Number of tokens of each completion.
        """
        counts = [len(self.pattern.findall(text)) for text in texts]
        self.occurrences += sum(counts)
        self.matching += sum(count > 0 for count in counts)
        self.tokens += sum(tokens)
        self.completions += len(texts)

    def compute(self) -> dict[str, Tensor]:
        """Return both rates, 0 without completions."""
        return {
            "per_1k": 1000 * self.occurrences / self.tokens.clamp(min=1),
            "fraction": self.matching / self.completions.clamp(min=1),
        }


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """Return the n-grams of a text in lower case. Each word and each punctuation mark counts as one element."""
    words = _WORD.findall(text.lower())
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


@checked
class TraceOverlap(Ratio):
    """Share of the completions' n-grams that also occur in the trace. N-grams of the question do not count.

    The value is close to 1 for a student that recites traces.

    Args:
        n: Number of words and punctuation marks in an n-gram, at least 1.
    """

    def __init__(self, n: PositiveInt = 4, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.n = n

    def update(self, texts: Sequence[str], traces: Sequence[str], questions: Sequence[str]) -> None:
        """Add completions, and the trace and question of each."""
        for text, trace, question in zip(texts, traces, questions, strict=True):
            known = set(ngrams(question, self.n))
            own = [gram for gram in ngrams(text, self.n) if gram not in known]
            in_trace = set(ngrams(trace, self.n))
            self.numerator += sum(gram in in_trace for gram in own)
            self.denominator += len(own)


@checked
class Distinct(Ratio):
    """Diversity of completions: distinct n-grams / n-grams in all completions of a question, averaged over questions.

    The value is 1 if no n-gram is repeated within or between the completions of a question. It falls if completions contain
    loops or become similar to each other (pass@k falls while avg@k rises). Longer completions have lower values.

    Args:
        n: Number of words and punctuation marks in an n-gram, at least 1.
    """

    def __init__(self, n: PositiveInt = 3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.n = n

    def update(self, texts: Sequence[str]) -> None:
        """Add the completions of one question. A question without any n-gram does not count."""
        grams = [gram for text in texts for gram in ngrams(text, self.n)]
        if grams:
            self.numerator += len(set(grams)) / len(grams)
            self.denominator += 1


class MeanLength(GroupedMean):
    """Mean number of tokens of ``all`` completions, and of the ``terminated`` ones, which end with an EOS."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(("all", "terminated"), **kwargs)

    def update(self, lengths: Sequence[int], terminated: Sequence[bool]) -> None:
        """Add completions.

        Args:
            lengths: Number of tokens of each completion.
            terminated: True for each completion that ends with an EOS.
        """
        ended = [length for length, end in zip(lengths, terminated, strict=True) if end]
        self.add(torch.tensor([*lengths, *ended]).float(), torch.tensor([0] * len(lengths) + [1] * len(ended)))
