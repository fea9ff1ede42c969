"""Verify the rows of a split and make the prompts of both roles."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, NamedTuple

import numpy
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.utilities import rank_zero_info

from opsd_lightning.data.drop_reasons import DropReason, RowLimits
from opsd_lightning.data.fingerprint import (
    UnknownValueError,
    code_fingerprint,
    fingerprint,
    object_fingerprint,
    tokenizer_fingerprint,
)
from opsd_lightning.data.prepared_rows import Ints, PreparedRows
from opsd_lightning.grading.base import Grade, Grader
from opsd_lightning.prompts.chat_template import kind
from opsd_lightning.prompts.contexts import PrivilegedContext, WrongContext
from opsd_lightning.prompts.templates import Prompts
from opsd_lightning.types import ConfigError, DataRequirements, Example
from opsd_lightning.utils.file_cache import FileCache
from opsd_lightning.utils.messages import question_key

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Called with the index and the reason of each dropped row.
OnDrop = Callable[[int, DropReason], None]

#: Limit on the size of all cached files in bytes.
MOST_BYTES = 8 << 30

#: Characters of the rows above which rows are cached and progress is shown.
LARGE = 1_000_000

_CHUNK = 256  # rows between two steps of the progress bar
_CONFIRMED = 16  # rows that are prepared again to confirm cached ones
_MOST_THREADS = 8


class _Verdict(NamedTuple):
    reason: DropReason | None
    answer: str = ""
    undecided: bool = False


class _Tokens(NamedTuple):
    student: Ints
    teacher: Ints
    trace: Ints | None
    cut: bool


@dataclass(frozen=True)
class Preparation:
    """Everything that the prepared rows of a split depend on, besides the rows.

    Args:
        split: ``train``, ``val`` or ``test``.
        tokenizer: Tokenizer of the policy.
        prompts: Templates of both roles' prompts.
        context: Text that only the teacher reads.
        grader: Grades completions and traces.
        verify: If True, rows whose trace the grader does not grade as right are dropped.
        needs: Requirements of the training method or of the evaluation.
        limits: Context lengths that rows must fit.
        end: Tokens at the end of a trace that is trained on.
        stops: All tokens that end a sampled completion.
        held_out: Normalized questions that training must not use.
    """

    split: str
    tokenizer: PreTrainedTokenizerBase
    prompts: Prompts
    context: PrivilegedContext
    grader: Grader
    verify: bool
    needs: DataRequirements
    limits: RowLimits
    end: Sequence[int]
    stops: Sequence[int]
    held_out: frozenset[str]

    def fingerprint(self, found: Sequence[Example]) -> str:
        """Return the key of these rows in a cache: a digest of everything that they depend on.

        Raises:
            UnknownValueError: Something that they depend on has no fingerprint, such as a grader, context or source column
                of a class that is not part of this package.
        """
        needs = {
            field.name: getattr(self.needs, field.name)
            for field in fields(DataRequirements)
            if field.name not in ("teachers", "max_new_tokens", "privileged")  # the first two are in the limits
        }
        if type(self.prompts) is not Prompts:
            raise UnknownValueError(f"{type(self.prompts).__qualname__}, which is not Prompts")
        if not self.grader.repeatable:
            raise UnknownValueError(f"{type(self.grader).__qualname__}, whose grades need not be the same in another run")
        if isinstance(self.context, WrongContext):
            raise UnknownValueError("WrongContext, whose texts depend on the grader's time limit")
        return fingerprint(
            code_fingerprint(),
            self.split,
            tokenizer_fingerprint(self.tokenizer),
            self.prompts,
            object_fingerprint(self.context),
            self.context.needs_traces,
            object_fingerprint(self.grader),
            self.verify,
            needs,
            self.limits,
            list(self.end),
            list(self.stops),
            sorted(self.held_out),
            len(found),
            list(found),
        )

    def prepare(self, found: Sequence[Example], on_drop: OnDrop, progress: bool = False) -> PreparedRows:
        """Verify and tokenize rows.

        Args:
            found: The rows of the source.
            on_drop: Called when a row is dropped. An error that it raises ends the preparation.
            progress: If True, show progress bars.

        Raises:
            ConfigError: The teacher is graded, and the context of an evaluation question is empty.
        """
        rows = PreparedRows()

        def drop(index: int, reason: DropReason) -> None:
            on_drop(index, reason)
            rows.dropped.append((index, reason))

        with _bar(f"data.{self.split}: verifying", len(found), progress) as advance:
            for chunk in _chunks(range(len(found))):
                for index, verdict in zip(chunk, self._verify([found[index] for index in chunk]), strict=True):
                    if verdict.undecided:
                        rows.undecided.append(index)
                    if verdict.reason is not None:
                        drop(index, verdict.reason)
                        continue
                    rows.verified.append(index)
                    if verdict.answer != found[index].answer:
                        rows.answers[index] = verdict.answer
                advance(len(chunk))
        verified = rows.examples(found, rows.verified)
        with _bar(f"data.{self.split}: tokenizing", len(verified), progress) as advance:
            for chunk in _chunks(range(len(verified))):
                for place, tokens in zip(chunk, self._tokenize(chunk, verified), strict=True):
                    index = rows.verified[place]
                    if tokens is None:
                        drop(index, DropReason.EMPTY_CONTEXT)
                        continue
                    rows.lengths.append((len(tokens.student), len(tokens.teacher)))
                    if (too_long := self._too_long(tokens)) is not None:
                        drop(index, too_long)
                        continue
                    rows.cut += tokens.cut
                    rows.usable.append(index)
                    rows.student.append(tokens.student)
                    rows.teacher.append(tokens.teacher)
                    if tokens.trace is not None:
                        rows.traces.append(tokens.trace)
                advance(len(chunk))
        return rows

    def confirms(self, rows: PreparedRows, found: Sequence[Example]) -> bool:
        """Prepare some rows again, and return True if they are those that were cached.

        These are rows from the whole split, and all rows whose verification was stopped by a limit on time or memory.
        """
        spread = {round(place * (len(found) - 1) / (_CONFIRMED - 1)) for place in range(_CONFIRMED)}
        indices = sorted({*spread, *rows.undecided} & set(range(len(found))))
        dropped = dict(rows.dropped)
        if max(rows.verified, default=0) >= len(found):
            return False
        places = {index: place for place, index in enumerate(rows.verified)}
        for index, verdict in zip(indices, self._verify([found[index] for index in indices]), strict=True):
            if (verdict.reason is None) != (index in places) or verdict.reason not in (None, dropped.get(index)):
                return False
            if verdict.reason is None and verdict.answer != rows.answers.get(index, found[index].answer):
                return False
        chosen = [index for index in indices if index in places]
        tokenized = self._tokenize([places[index] for index in chosen], rows.examples(found, rows.verified))
        usable = {index: place for place, index in enumerate(rows.usable)}
        for index, tokens in zip(chosen, tokenized, strict=True):
            reason = DropReason.EMPTY_CONTEXT if tokens is None else self._too_long(tokens)
            if reason != dropped.get(index) or (reason is None) != (index in usable):
                return False
            if tokens is not None and reason is None:
                place = usable[index]
                cached = [rows.student[place], rows.teacher[place], rows.traces[place] if rows.traces else None]
                if not all(map(_same, cached, (tokens.student, tokens.teacher, tokens.trace))):
                    return False
        return True

    # -- verification ------------------------------------------------------------------------------------------------------

    def _verify(self, examples: Sequence[Example]) -> list[_Verdict]:
        """Return the verdict on each row: the reason for dropping it, or its reference answer."""
        found = [self._early_verdict(example) for example in examples]
        unread = [place for place, verdict in enumerate(found) if verdict is None]
        grades = self.grader.verifications([examples[place] for place in unread])
        for place, grade in zip(unread, grades, strict=True):
            found[place] = self._trace_verdict(examples[place].answer, grade)
        return [verdict for verdict in found if verdict is not None]

    def _trace_verdict(self, reference: str, grade: Grade) -> _Verdict:
        undecided = bool(grade.problem)
        if self.grader.is_right(grade.score):
            return _Verdict(None, reference or grade.answer or "", undecided)
        reason = DropReason.NO_FINAL_ANSWER if grade.answer is None else DropReason.WRONG_ANSWER
        return _Verdict(reason, undecided=undecided)

    def _early_verdict(self, example: Example) -> _Verdict | None:
        """Return the verdict on a row whose trace need not be read."""
        needs = self.needs
        needs_trace = needs.traces or needs.trace_completions or (needs.teacher_prompts and self.context.needs_traces)
        verifies = self.verify and bool(example.trace)
        if not example.question:
            return _Verdict(DropReason.EMPTY_QUESTION)
        if not example.trace and needs_trace:
            return _Verdict(DropReason.EMPTY_TRACE)
        if (
            not verifies
            and not self.grader.can_grade(example)
            and (needs.answers if self.verify and self.grader.grades_completions else needs.grades)
        ):
            return _Verdict(DropReason.NO_ANSWER)
        if question_key(example) in self.held_out:
            return _Verdict(DropReason.HELD_OUT)
        return None if verifies else _Verdict(None, example.answer)

    # -- prompts -----------------------------------------------------------------------------------------------------------

    def _tokenize(self, places: Sequence[int], verified: Sequence[Example]) -> list[_Tokens | None]:
        """Return the token ids of the rows at some places, with None for each row whose context is empty."""
        reads = self.needs.teacher_prompts or self.needs.graded_teacher
        work: list[tuple[Example, str | None] | None] = []
        for place in places:
            context = self.context.text(place, verified) if reads else None
            blank = context is not None and not context.strip()
            if blank and self.split != "train":
                raise self._blank_context(verified[place], verified)
            work.append(None if blank else (verified[place], context))

        def tokens(item: tuple[Example, str | None] | None) -> _Tokens | None:
            return None if item is None else self._tokens(*item, reads)

        threads = min(_MOST_THREADS, _cores(), len(work))
        if threads < 2 or type(self.prompts) is not Prompts or not self.tokenizer.is_fast:
            return [tokens(item) for item in work]
        # The first row of each kind is rendered in a child process once, which no thread should start.
        kinds: dict[Hashable, int] = {}
        for number, item in enumerate(work):
            if item is not None:
                example, context = item
                written = frozenset(example.demonstration or ())
                kinds.setdefault((*kind(example.messages, example.tools), written, context is None), number)
        first = {number: tokens(work[number]) for number in kinds.values()}
        rest = [number for number in range(len(work)) if number not in first]
        with ThreadPoolExecutor(threads, "tokenizing") as pool:  # fast tokenizers release the GIL
            first.update(zip(rest, pool.map(tokens, [work[number] for number in rest]), strict=True))
        return [first[number] for number in range(len(work))]

    def _tokens(self, example: Example, context: str | None, reads: bool) -> _Tokens:
        try:
            return self._prompts_of(example, context, reads)
        except ConfigError as error:
            if not example.messages:
                raise
            problem = f"data.{self.split}: at the conversation with the question {example.question[:60]!r} {error.problem}"
            raise ConfigError(problem, error.setting, error.fix) from None

    def _prompts_of(self, example: Example, context: str | None, reads: bool) -> _Tokens:
        student = self.prompts.student(self.tokenizer, example)
        teacher = self.prompts.teacher(self.tokenizer, example, context) if reads else None
        trace = None
        if self.needs.trace_completions:
            trace = self.prompts.trace(self.tokenizer, example, self.end, self.stops)
        return _Tokens(
            _ints(student),
            _ints(teacher or []),
            None if trace is None else _ints(trace),
            teacher is not None and teacher.trace_was_cut,
        )

    def _too_long(self, tokens: _Tokens) -> DropReason | None:
        trace = None if tokens.trace is None else len(tokens.trace)
        return self.limits.exceeded(len(tokens.student), len(tokens.teacher), trace)

    def _blank_context(self, example: Example, verified: Sequence[Example]) -> ConfigError:
        """Return the error for an evaluation question with an empty context."""
        if missing := sum(not each.trace for each in verified):
            return ConfigError(
                f"{missing} of {len(verified)} questions of data.{self.split} have no trace for the teacher to read",
                "model.evaluate_teacher",
                "Set it to false, name the column of the traces (columns.trace), or give a data.context that needs none, "
                "such as AnswerContext",
            )
        return ConfigError(
            f"the teacher gets an empty text at the question {example.question[:60]!r} of data.{self.split}",
            "data.context",
            "Fill in the data that the context is made of, or set model.evaluate_teacher to false",
        )


def prepare_rows(
    plan: Preparation, found: Sequence[Example], cache_dir: str | None, on_drop: OnDrop, progress: bool
) -> PreparedRows:
    """Return the prepared rows of a split from the cache, or prepare and cache them.

    Few rows, which take about a second, are prepared every time.

    Args:
        plan: Everything that the prepared rows depend on, besides the rows.
        found: The rows of the source.
        cache_dir: Folder of the cache (see `FileCache`), or None.
        on_drop: See `Preparation.prepare`. Called for cached rows too.
        progress: If True, show progress bars.

    Raises:
        ConfigError: See `Preparation.prepare`.
    """
    if sum(len(text) for example in found for text in example.contents) < LARGE:
        return plan.prepare(found, on_drop)
    name, cache, key = f"data.{plan.split}", None, ""
    if cache_dir is not None:
        try:
            key, cache = plan.fingerprint(found), FileCache(cache_dir, "rows", MOST_BYTES)
            rows = _load(cache, key, plan, found)
        except UnknownValueError as error:
            rank_zero_info(f"{name}: not cached, because the rows depend on {error}")
            rows = None
        except OSError as error:
            rank_zero_info(f"{name}: not cached ({error})")
            rows = cache = None
        if rows is not None and cache is not None:
            rank_zero_info(f"{name}: {len(found)} rows were verified and tokenized before ({cache.path(key)})")
            for index, reason in rows.dropped:
                on_drop(index, reason)
            return rows
    rank_zero_info(f"{name}: verifying and tokenizing {len(found)} rows")
    rows = plan.prepare(found, on_drop, progress)
    if cache is not None:
        try:
            cache.store(key, rows.to_bytes())
        except OSError as error:
            rank_zero_info(f"{name}: not cached ({error})")
    return rows


def _load(cache: FileCache, key: str, plan: Preparation, found: Sequence[Example]) -> PreparedRows | None:
    """Return the cached rows, or None if there are none or they are not those of these settings."""
    content = cache.load(key)
    if content is None:
        return None
    try:
        rows = PreparedRows.from_bytes(content)
    except ValueError:
        return None
    return rows if plan.confirms(rows, found) else None


def _ints(ids: Sequence[int]) -> Ints:
    return numpy.array(ids, dtype=numpy.int32)


def _same(cached: Ints | None, made: Ints | None) -> bool:
    return (cached is None and made is None) or (cached is not None and made is not None and numpy.array_equal(cached, made))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _chunks(indices: range) -> Iterator[range]:
    return (indices[start : start + _CHUNK] for start in range(0, len(indices), _CHUNK))


@contextmanager
def _bar(description: str, total: int, shown: bool) -> Iterator[Callable[[int], object]]:
    """Show a progress bar in a context, and yield the function that advances it."""
    with Tqdm(total=total, desc=description, unit=" rows", leave=False, disable=not shown) as bar:
        yield bar.update
