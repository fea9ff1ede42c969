"""Skill sets: multiple choice by log-probability, graded completions, and divergence from the base model."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from transformers import PreTrainedTokenizerBase

from opsd_lightning.data.sources import ExampleSource
from opsd_lightning.evaluation.evaluator import EvaluatedModule
from opsd_lightning.evaluation.skills import ItemScore, SkillSet, base_weights
from opsd_lightning.grading.base import Grader
from opsd_lightning.grading.choice_grader import ChoiceGrader
from opsd_lightning.grading.example_columns import SETTING as GRADER, shown
from opsd_lightning.losses.objectives import NegativeLogLikelihood, token_logprobs
from opsd_lightning.models.policy import ModelSettings
from opsd_lightning.prompts.control_tokens import Marks, behind_a_break, encode, encode_text, texts_in
from opsd_lightning.prompts.templates import Prompts, filled
from opsd_lightning.rollouts.base import Demand, seed_for
from opsd_lightning.types import ConfigError, Example, PositiveInt, Sampling, checked

# Two answers that have nothing in common.
_PROBES = ("0", "a")

#: Divisor of the log-probability of an option.
Normalization = Literal["none", "tokens", "characters", "bytes"]

_QUESTION = Prompts(student_template="{question}")
_TOO_LONG = "Leave it out of the source, or choose a model with a longer context"


def _as_evaluated(prompts: Prompts, kwargs: Mapping[str, Any]) -> Prompts:
    """Return a set's prompts, with the run's arguments of the chat template if the set gives none of its own."""
    given = prompts.student_chat_template_kwargs or prompts.evaluation_chat_template_kwargs is not None
    own = prompts.of_split("test")
    return own if given else replace(own, student_chat_template_kwargs=dict(kwargs))


class _Choice(NamedTuple):
    """A multiple-choice question in tokens.

    Args:
        prompt: Tokens of the prompt.
        named: Text of each option by label.
        texts: Scored text of each option.
        options: Tokens of each option.
        right: Label of the right option.
    """

    prompt: list[int]
    named: dict[str, str]
    texts: list[str]
    options: list[list[int]]
    right: str


@checked
class ChoicesByLikelihood(SkillSet):
    r"""Multiple-choice questions by log-probability: the model chooses the option that it finds most probable.

    The score of an option is sum_n log p(y_n | prompt, y_<n), divided by its length as ``normalization`` says. The option
    with the highest score is the choice; the first one of equal scores. ``none``, ``characters`` and ``bytes`` are the
    metrics ``acc``, ``acc_norm`` and ``acc_bytes`` of lm-evaluation-harness 0.4.13. An item with a log-probability that is
    not finite has no choice and scores 0.

    With ``chat``, an option is the assistant's answer to the chat prompt. Without, prompt and option are one text, which is
    encoded as a whole and divided behind the last token of the prompt, as in lm-evaluation-harness: white space at the end
    of the prompt belongs to the option. Where the tokenizer would merge characters of both into one token, the option is
    encoded alone instead. The end of an answer is not scored. A text that the chat template writes before each answer, such
    as an empty thinking block, is part of the prompt and is not scored.

    Args:
        source: Source of the questions, each with options and a reference answer.
        options: Column with the options, as in `ChoiceGrader`. Null reads them from the question.
        reference: Form of the reference answer, as in `ChoiceGrader`.
        first_index: Index of the first option, 0 or 1.
        scored: ``text`` scores the text of each option, ``label`` its label, such as "B". The question must then show the
            options with their labels.
        normalization: Divisor of an option's log-probability: ``none``, or its number of ``tokens``, ``characters`` or
            ``bytes`` (UTF-8).
        chat: If True, make the prompt with the chat template. If False, the prompt is the student's template alone.
        prompts: Templates of the prompt. Only the student's are used. Defaults to the question alone. Without arguments of
            the chat template, those of the run's evaluations apply (``data.prompts``).
        delimiter: Text between prompt and option without ``chat``.
        batch_size: Number of questions that each device measures at a time, at least 1.
        group: Column that names the group of a question, as in `SkillSet`.

    Example::

        >>> from opsd_lightning import CategoryQuestions, ChoicesByLikelihood
        >>> facts = ChoicesByLikelihood(CategoryQuestions(size=300, seed=9), scored="label")
        >>> facts.normalization
        'none'
    """

    def __init__(
        self,
        source: ExampleSource,
        options: str | None = "options",
        reference: Literal["auto", "letter", "index", "text"] = "auto",
        first_index: Literal[0, 1] = 0,
        scored: Literal["text", "label"] = "text",
        normalization: Normalization = "none",
        chat: bool = True,
        prompts: Prompts = _QUESTION,
        delimiter: str = " ",
        batch_size: PositiveInt = 32,
        group: str | None = None,
    ) -> None:
        super().__init__(source, batch_size, group)
        if normalization not in get_args(Normalization):
            choices = ", ".join(get_args(Normalization))
            raise ConfigError(f"it is {normalization!r}", "ChoicesByLikelihood.normalization", f"Choose one of {choices}")
        if scored not in ("text", "label"):
            raise ConfigError(f"it is {scored!r}", "ChoicesByLikelihood.scored", "Choose text or label")
        self.reader = ChoiceGrader(options, reference, first_index)
        self.scored, self.normalization = scored, normalization
        self.chat, self.prompts, self.delimiter = chat, prompts, delimiter
        self._choices: list[_Choice] = []

    def prepare(self, policy: ModelSettings, tokenizer: PreTrainedTokenizerBase) -> None:
        limit, stops = policy.context_length(), policy.end_ids(tokenizer)
        self._choices = []
        for example in self.examples:
            choice = self._encoded(tokenizer, example, stops)
            longest = len(choice.prompt) + max(map(len, choice.options))
            if limit is not None and longest > limit:
                problem = f"{shown(example.question)} has {longest} tokens with an option, and the context {limit}"
                raise ConfigError(problem, "source", _TOO_LONG)
            self._choices.append(choice)

    def _encoded(self, tokenizer: PreTrainedTokenizerBase, example: Example, stops: Sequence[int]) -> _Choice:
        question = shown(example.question)
        try:
            named, right = self.reader.choices(example)
        except ConfigError as error:
            raise ConfigError(error.problem, error.setting.removeprefix(GRADER), error.fix) from None
        if right is None:
            raise ConfigError(f"{question} has no reference answer", "source", "Name its column as columns.answer")
        labels = list(named)
        texts = [named[label].strip() for label in labels] if self.scored == "text" else labels
        if not all(texts):
            raise ConfigError(f"{question} has an empty option", "options", "Give every option a text")
        if len({text.strip() for text in named.values()}) < len(named):
            raise ConfigError(f"{question} has an option twice", "options", "Remove one of the two")
        if self.scored == "label" and (missing := self._not_shown(example, named)):
            problem = f"the prompt of {question} does not show {missing}, so its label means nothing to the model"
            fix = "Score the options' text, or write the options into the questions (CommonFacts: show_options: true)"
            raise ConfigError(problem, "scored", fix)
        if self.chat:
            prompts = _as_evaluated(self.prompts, self.chat_template_kwargs)
            answers = _answers(prompts, tokenizer, example, [*texts, *_PROBES], stops)
            bare = [encode_text(tokenizer, probe, "completion") for probe in _PROBES]
            # The chat template may write a text before each answer.
            opening = [] if answers[len(texts) :] == bare else _common_start(answers)
            prompt = [*prompts.student(tokenizer, example), *opening]
            options = [answer[len(opening) :] for answer in answers[: len(texts)]]
        else:
            prompt, options = self._tokens(tokenizer, example, texts)
        if not prompt:
            raise ConfigError(f"{question} gives an empty prompt", "prompts.student_template", "Write a text in it")
        if not all(options):
            empty = texts[options.index([])]
            raise ConfigError(f"the option {empty!r} of {question} has no tokens", "options", "Give it another text")
        if len({tuple(option) for option in options}) < len(options):
            raise ConfigError(f"{question} has two options with the same tokens", "options", "Remove one of the two")
        return _Choice(prompt, named, texts, options, right)

    def _not_shown(self, example: Example, named: Mapping[str, str]) -> str | None:
        """Return the first option whose label or text the prompt lacks."""
        shown_text = " ".join("\n".join(texts_in([turn["content"] for turn in self.prompts.messages(example)])).split())
        for label, text in named.items():
            if " ".join(text.split()) not in shown_text or not re.search(
                rf"(?<!\w){label}(?!\w)", shown_text, re.IGNORECASE
            ):
                return f"the option {label}) {text}"
        return None

    def _tokens(
        self, tokenizer: PreTrainedTokenizerBase, example: Example, texts: Sequence[str]
    ) -> tuple[list[int], list[list[int]]]:
        if example.messages:
            problem = f"{shown(example.question)} is a conversation, which needs the chat template"
            raise ConfigError(problem, "chat", "Set it to true")
        prompt = filled(self.prompts.template("student", False), question=example.question)[0]
        context = prompt.rstrip()
        start = _start(tokenizer)
        options = []
        before: list[int] = []
        for text in texts:
            continuation = prompt[len(context) :] + self.delimiter + text
            marks = Marks(tokenizer, [context, continuation])
            first, second = marks.hide(context), marks.hide(continuation)
            before, whole = (encode(tokenizer, part, marks.hidden) for part in (first, first + second))
            if whole[: len(before)] == before:
                options.append(whole[len(before) :])
            else:  # a token has characters of both
                options.append(behind_a_break(lambda part: encode_text(tokenizer, part), continuation))
        return start + before if before else [], options

    @torch.no_grad()
    def measure(self, module: EvaluatedModule, places: Sequence[int]) -> list[ItemScore]:
        choices = [self._choices[place] for place in places]
        rows = [(choice.prompt, option) for choice in choices for option in choice.options]
        states = module.scorer.score([prompt for prompt, _ in rows], [option for _, option in rows])
        flat = [token for _, option in rows for token in option]
        targets = torch.tensor(flat, dtype=torch.long, device=states.hidden.device)
        found = token_logprobs(states, targets, module.objective.logits_memory_mib).double().cpu()
        sums = iter([float(part.sum()) for part in found.split([len(option) for _, option in rows])])
        results = []
        for choice in choices:
            labels = list(choice.named)
            logprobs = [next(sums) for _ in choice.options]
            scores = [
                logprob / self._length(text, option)
                for logprob, text, option in zip(logprobs, choice.texts, choice.options, strict=True)
            ]
            finite = all(map(math.isfinite, logprobs))
            chosen = labels[max(range(len(scores)), key=scores.__getitem__)] if finite else None
            details: dict[str, Any] = {
                "choice": chosen,
                "right": choice.right,
                "options": choice.named,
                "logprobs": dict(zip(labels, logprobs, strict=True)),
            }
            if not finite:
                details["problem"] = "a log-probability is not finite"
            results.append(ItemScore(float(chosen == choice.right), details=details))
        return results

    def _length(self, text: str, option: Sequence[int]) -> int:
        if self.normalization == "tokens":
            return len(option)
        if self.normalization == "characters":
            return len(text)
        return len(text.encode()) if self.normalization == "bytes" else 1


def _answers(
    prompts: Prompts, tokenizer: PreTrainedTokenizerBase, example: Example, texts: Sequence[str], stops: Sequence[int]
) -> list[list[int]]:
    """Return the tokens of some answers to a chat prompt, without the token that ends an answer."""
    answers = (example._replace(trace=text, demonstration=None) for text in texts)
    return [prompts.trace(tokenizer, answer, stops[:1], stops)[:-1] for answer in answers]


def _common_start(rows: Sequence[Sequence[int]]) -> list[int]:
    """Return the tokens with which all rows begin."""
    return [column[0] for column in takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))]


def _start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the BOS token if the tokenizer begins a text with it, otherwise nothing."""
    ids = list(tokenizer("a")["input_ids"])
    return ids[:1] if ids and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id else []


class _Generated(SkillSet):
    """Base class of sets with greedy completions of the chat prompt.

    Args:
        source: Source of the questions.
        max_new_tokens: Longest completion in tokens, at least 1.
        prompts: Templates of the prompt. Only the student's are used.
        batch_size: Number of questions that each device measures at a time, at least 1.
        group: Column that names the group of a question.
    """

    def __init__(
        self, source: ExampleSource, max_new_tokens: int, prompts: Prompts, batch_size: int, group: str | None
    ) -> None:
        super().__init__(source, batch_size, group)
        self.sampling = Sampling(max_new_tokens, temperature=0.0)
        self.prompts = prompts
        self._prompts: list[list[int]] = []

    def prepare(self, policy: ModelSettings, tokenizer: PreTrainedTokenizerBase) -> None:
        limit, most = policy.context_length(), self.sampling.max_new_tokens
        prompts = _as_evaluated(self.prompts, self.chat_template_kwargs)
        self._prompts = []
        for example in self.examples:
            prompt = list(prompts.student(tokenizer, example))
            if limit is not None and len(prompt) + most > limit:
                problem = f"{shown(example.question)} has {len(prompt)} tokens, and with {most} new ones exceeds {limit}"
                raise ConfigError(problem, "max_new_tokens", f"Lower it. {_TOO_LONG}")
            self._prompts.append(prompt)

    def demand(self) -> Demand | None:
        return Demand(max(map(len, self._prompts)) + self.sampling.max_new_tokens, self.batch_size)

    def generate(self, module: EvaluatedModule, places: Sequence[int]) -> tuple[list[list[int]], list[bool]]:
        """Return the greedy completions of some prompts, and for each True if it has ended."""
        prompts = [self._prompts[place] for place in places]
        found = module.rollouts.generate(module.model, prompts, self.sampling, seed_for(module.seed, "skills"))
        return found.completions, found.terminated


@checked
class GradedCompletions(_Generated):
    """Greedy completions, graded by any grader: multiple choice by generation, format following and others.

    Args:
        source: Source of the questions, with what the grader needs.
        grader: The grader of the completions.
        max_new_tokens: Longest completion in tokens, at least 1.
        prompts: Templates of the prompt. Only the student's are used. Defaults to the question alone. Without arguments of
            the chat template, those of the run's evaluations apply (``data.prompts``).
        batch_size: Number of questions that each device measures at a time, at least 1.
        group: Column that names the group of a question, as in `SkillSet`.

    Example::

        >>> from opsd_lightning import CategoryQuestions, ChoiceGrader, GradedCompletions
        >>> spoken = GradedCompletions(CategoryQuestions(size=300, seed=9), ChoiceGrader(), max_new_tokens=32)
        >>> spoken.sampling.temperature
        0.0
    """

    def __init__(
        self,
        source: ExampleSource,
        grader: Grader,
        max_new_tokens: PositiveInt = 256,
        prompts: Prompts = _QUESTION,
        batch_size: PositiveInt = 32,
        group: str | None = None,
    ) -> None:
        super().__init__(source, max_new_tokens, prompts, batch_size, group)
        self.grader = grader

    def prepare(self, policy: ModelSettings, tokenizer: PreTrainedTokenizerBase) -> None:
        name = type(self.grader).__name__
        if not self.grader.grades_completions:
            raise ConfigError(f"{name} grades no completions", "grader", "Choose another grader")
        for example in self.examples:
            try:
                can_grade = self.grader.can_grade(example)
            except ConfigError as error:
                setting = f"grader.init_args.{error.setting.removeprefix(GRADER)}"
                raise ConfigError(error.problem, setting, error.fix) from None
            if not can_grade:
                problem = f"{name} has nothing to grade {shown(example.question)} with"
                raise ConfigError(problem, "source", "Give every question a reference answer, or choose another grader")
        super().prepare(policy, tokenizer)

    @torch.no_grad()
    def measure(self, module: EvaluatedModule, places: Sequence[int]) -> list[ItemScore]:
        completions, terminated = self.generate(module, places)
        texts = [str(module.tokenizer.decode(completion, skip_special_tokens=True)) for completion in completions]
        grades = self.grader.grades(texts, [self.examples[place] for place in places])
        results = []
        for completion, ended, text, grade in zip(completions, terminated, texts, grades, strict=True):
            details: dict[str, Any] = {
                "completion": text,
                "answer": grade.answer,
                "completion_tokens": len(completion),
                "truncated": not ended,
            }
            if grade.problem:
                details["grading_problem"] = grade.problem
            results.append(ItemScore(grade.score, details=details))
        return results


@checked
class BaseDivergence(_Generated):
    """Divergence of the run from the base model on the base's own answers: how far training has moved the model.

    KL(p_base(. | n) || p_run(. | n)) in nats, over the full vocabulary, averaged over all tokens n of the base model's
    greedy answers to the prompts, their EOS tokens included. The answers are generated once, with all adapters disabled.
    Full fine-tuning is refused, since it keeps no base model.

    Args:
        source: Source of the prompts. Answers are not read.
        max_new_tokens: Longest answer in tokens, at least 1.
        prompts: Templates of the prompt. Only the student's are used. Defaults to the question alone. Without arguments of
            the chat template, those of the run's evaluations apply (``data.prompts``).
        batch_size: Number of prompts that each device measures at a time, at least 1.
        group: Column that names the group of a prompt, as in `SkillSet`.

    Example::

        >>> from opsd_lightning import BaseDivergence, HotelReplies
        >>> drift = BaseDivergence(HotelReplies(size=64, seed=9), max_new_tokens=48)
        >>> drift.graded
        False
    """

    graded: ClassVar[bool] = False

    def __init__(
        self,
        source: ExampleSource,
        max_new_tokens: PositiveInt = 64,
        prompts: Prompts = _QUESTION,
        batch_size: PositiveInt = 32,
        group: str | None = None,
    ) -> None:
        super().__init__(source, max_new_tokens, prompts, batch_size, group)
        self._answers: dict[int, tuple[list[int], bool]] = {}

    def prepare(self, policy: ModelSettings, tokenizer: PreTrainedTokenizerBase) -> None:
        if policy.trains_all:
            problem = "BaseDivergence needs the base model, and model.policy.lora is null (full fine-tuning)"
            raise ConfigError(problem, "model.policy.lora", "Set it, or leave BaseDivergence out")
        self._answers = {}  # of another model
        super().prepare(policy, tokenizer)

    @torch.no_grad()
    def measure(self, module: EvaluatedModule, places: Sequence[int]) -> list[ItemScore]:
        base = base_weights()
        # Every rank asks for the same batches in each measurement, so that all ranks generate or none does.
        if not all(place in self._answers for place in places):
            with base.weights(module.model):
                found = zip(*self.generate(module, places), strict=True)
            self._answers |= zip(places, found, strict=True)
        prompts = [self._prompts[place] for place in places]
        answers = [self._answers[place][0] for place in places]
        theirs, ours = base.score(module.scorer, prompts, answers), module.scorer.score(prompts, answers)
        flat = torch.tensor([token for answer in answers for token in answer], dtype=torch.long, device=ours.hidden.device)
        objective = NegativeLogLikelihood(logits_memory_mib=module.objective.logits_memory_mib)
        measured = objective(ours, theirs, flat, torch.zeros(flat.shape, dtype=torch.float32, device=flat.device))[1]
        parts = measured["forward_kl"].double().cpu().split(list(map(len, answers)))
        results = []
        for place, part in zip(places, parts, strict=True):
            answer, ended = self._answers[place]
            text = str(module.tokenizer.decode(answer, skip_special_tokens=True))
            details = {"completion": text, "completion_tokens": len(answer), "truncated": not ended}
            results.append(ItemScore(float(part.sum()), len(answer), details))
        return results
