"""The data module: reads questions with traces, verifies them and makes the prompts of student and teacher."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import Any, Literal, Self

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from transformers import PreTrainedTokenizerBase

from opsd_lightning.checkpoints.file import check_no_hparams, open_checked
from opsd_lightning.checkpoints.io import check_weights_only
from opsd_lightning.data.conversations import ConversationError, check_example
from opsd_lightning.data.drop_reasons import GRADED, DropReason, RowLimits, TeacherLimit
from opsd_lightning.data.fingerprint import fingerprint
from opsd_lightning.data.loaders import EvalLoader, TrainLoader
from opsd_lightning.data.preparation import Preparation, prepare_rows
from opsd_lightning.data.prepared_rows import PreparedRows, token_lists
from opsd_lightning.data.sources import ExampleSource
from opsd_lightning.distributed.collectives import get_rank, rank_and_world_size, run_on_all_ranks, run_on_rank_zero
from opsd_lightning.grading.base import Grader
from opsd_lightning.grading.math_grader import MathGrader
from opsd_lightning.models.policy import Policy
from opsd_lightning.prompts.contexts import NoContext, PrivilegedContext, TraceContext
from opsd_lightning.prompts.template_checks import (
    added_text,
    is_null_control,
    opens_answer,
    reads_date,
    rendering_problems,
)
from opsd_lightning.prompts.templates import Prompts
from opsd_lightning.runs.signals import watch_signals
from opsd_lightning.types import ConfigError, DataRequirements, DeclaresData, Example, PositiveInt, PromptBatch, checked
from opsd_lightning.utils.file_cache import AUTO
from opsd_lightning.utils.files import is_remote
from opsd_lightning.utils.messages import question_key

# The other ranks wait for rank zero to prepare the rows, which must not end at the timeout of a collective operation.
_LONGEST_WAIT = timedelta(days=365)


@checked
class OPSDDataModule(LightningDataModule):
    """Reads questions with verified traces and makes the prompts of student and teacher.

    A trace is verified if the grader grades it as right. `MathGrader` does so if its final answer equals the reference
    answer. A row is dropped and counted, or refused, if it is empty, fails this check or does not fit the model's context.
    Training also drops rows that do not fit a teacher's context, and questions that are in ``val`` or ``test`` up to white
    space. Questions of ``val`` and ``test`` need no trace if they have an answer, unless the teacher is graded on them or
    the grader grades no completions.

    Args:
        policy: The model, for its tokenizer and context length. On the command line taken from ``model.policy``.
        train: Source of the training questions.
        val: Source of the validation questions.
        test: Source of the questions for ``test`` and ``predict``.
        prompts: Templates of both roles' prompts.
        context: Text that only the teacher reads. Defaults to the verified trace, `TraceContext`.
        grader: Grades completions and traces. Defaults to `MathGrader`.
        verify: If True, drop rows whose trace the grader does not grade as right. Set it to False for demonstrations, which
            need no answer.
        batch_size: Questions of one optimizer step on each device, at least 1.
        eval_batch_size: Questions of one batch in validation, test and predict, at least 1.
        max_new_tokens: Longest completion that must fit behind a prompt, in tokens. On the command line taken from
            ``model.sampling`` and ``model.eval_sampling``. Behind training prompts only the method's own
            ``sampling.max_new_tokens`` must fit.
        on_invalid: ``drop`` drops invalid rows and logs their number and the reasons. ``error`` refuses them.
        seed: Seed for the order of the training questions. On the command line taken from ``seed_everything``.
        cache_dir: Folder for verified and tokenized rows, which later runs with the same data and settings read. Defaults to
            ``auto``, the folder ``opsd_lightning`` in ``$XDG_CACHE_HOME`` or ``~/.cache``. If null, nothing is cached.

    Example::

        >>> from opsd_lightning import OPSDDataModule, Policy, WordProblems
        >>> policy = Policy("HuggingFaceTB/SmolLM2-135M-Instruct")
        >>> data = OPSDDataModule(policy, train=WordProblems(size=100), val=WordProblems(size=20, seed=1), batch_size=8)
        >>> data.batch_size
        8
    """

    def __init__(
        self,
        policy: Policy | None = None,
        train: ExampleSource | None = None,
        val: ExampleSource | None = None,
        test: ExampleSource | None = None,
        prompts: Prompts = Prompts(),
        context: PrivilegedContext | None = None,
        grader: Grader | None = None,
        verify: bool = True,
        batch_size: PositiveInt = 32,
        eval_batch_size: PositiveInt = 32,
        max_new_tokens: PositiveInt = 1024,
        on_invalid: Literal["drop", "error"] = "drop",
        seed: int = 0,
        cache_dir: str | None = AUTO,
    ) -> None:
        super().__init__()
        if on_invalid not in ("drop", "error"):
            raise ConfigError(f"it is {on_invalid!r}", "data.on_invalid", "Choose drop or error")
        if cache_dir is not None and (not cache_dir or is_remote(cache_dir)):
            problem = f"it is {cache_dir!r}, which is not a local folder"
            raise ConfigError(problem, "data.cache_dir", "Name a local folder, or set it to null")
        if policy is None:  # optional in the signature only: the command line links it from model.policy
            problem = "it is missing, and its tokenizer makes the prompts"
            raise ConfigError(problem, "data.policy", "Pass the module's policy")
        self.policy = policy
        self.sources = {"train": train, "val": val, "test": test}
        self.prompts = prompts
        self.context = context or TraceContext()
        self.grader = self.context.grader = grader or MathGrader()
        self.verify = verify
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.max_new_tokens = max_new_tokens
        self.on_invalid = on_invalid
        self.seed = seed
        self.cache_dir = cache_dir
        self.rows: dict[str, PromptBatch] = {}
        #: Number of dropped rows of each split by reason.
        self.dropped: dict[str, Counter[DropReason]] = {}
        #: Context lengths that the rows of each split were compared with.
        self.limits: dict[str, RowLimits] = {}
        #: Tokens of the student's and the teacher's prompt of every valid row, also of rows that are too long.
        self.lengths: dict[str, list[tuple[int, int]]] = {}
        #: Number of contexts of each split that were cut to ``prompts.max_trace_tokens``.
        self.traces_cut: dict[str, int] = {}
        #: If True, `setup` raises for settings that do not reach the prompts.
        self.checks_prompts = True

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: None = None,
        weights_only: bool | None = None,
        **settings: Any,
    ) -> Self:
        """Build a data module from a checkpoint file, as `PolicyModule.load_from_checkpoint` builds a module."""
        check_weights_only(weights_only)
        check_no_hparams(hparams_file)
        with open_checked(checkpoint_path, cls, (cls.CHECKPOINT_HYPER_PARAMS_KEY,), settings) as file:
            return super().load_from_checkpoint(file, map_location, None, True, **settings)

    def setup(self, stage: str) -> None:
        """Read, verify and tokenize the questions of a stage.

        Raises:
            ConfigError: A source is missing or has no usable row, or has an invalid one under ``on_invalid: error``. Or a
                setting does not reach the prompts.
        """
        if self.trainer is not None and self.trainer.state.fn is not None:
            watch_signals(self.trainer)  # reading takes long
        stage = str(getattr(stage, "value", stage))  # the trainer passes a member of an enumeration
        splits = {"fit": ["val", "train"], "validate": ["val"], "test": ["test"], "predict": ["test"]}[stage]
        if self.sources[splits[-1]] is None:
            problem = f"it is not set, and `{stage}` needs it"
            raise ConfigError(problem, f"data.{splits[-1]}", "Give it a source, such as HubSource")
        splits = [split for split in splits if self.sources[split] is not None and not self._ready(split)]
        if not splits:
            return
        tokenizer = self.policy.load_tokenizer()
        if self.checks_prompts:
            self._check_prompts(tokenizer, stage)
        limit = self.policy.context_length()
        for split in splits:
            self.rows[split] = self._prepare(split, tokenizer, limit)
        devices = rank_and_world_size(self.trainer)[1]
        if stage == "fit" and (usable := len(self.rows["train"].examples)) < self.batch_size * devices:
            raise ConfigError(
                f"one step on {devices} device(s) takes {self.batch_size * devices} questions, and data.train has only "
                f"{usable} usable rows",
                "data.batch_size",
                "Lower it, or give more data",
            )

    def requirements(self) -> DataRequirements:
        """Return the data requirements of the attached module. Defaults to those of a plain `OPSDModule`.

        Raises:
            ConfigError: The module does not declare its requirements.
        """
        module = self.trainer.lightning_module if self.trainer is not None else None
        if module is None:
            return DataRequirements()
        if not isinstance(module, DeclaresData):
            raise ConfigError(
                f"{type(module).__name__} does not declare the data that it needs",
                "model",
                "Derive it from PolicyModule, or give it a property data_requirements that returns DataRequirements",
            )
        return module.data_requirements

    def reads_teacher(self, stage: str) -> bool:
        """Return True if the teacher's prompts are read in a stage."""
        needs = self.requirements()
        return needs.graded_teacher or (needs.privileged and (stage == "fit" or needs.scores_demonstrations))

    def longest_completion(self, split: str) -> int:
        """Return the longest completion that must fit behind the prompts of a split, in tokens.

        Long completions of an evaluation do not count for training questions, of which they would drop many.
        """
        sampled = self.requirements().max_new_tokens if split == "train" else 0
        return min(sampled, self.max_new_tokens) if sampled else self.max_new_tokens

    def _check_prompts(self, tokenizer: PreTrainedTokenizerBase, stage: str) -> None:
        prompts, reads = self.prompts, self.reads_teacher(stage)
        for problem in rendering_problems(tokenizer, prompts, reads):
            raise problem
        if added := added_text(tokenizer, prompts):
            rank_zero_info(f"The chat template adds a text of its own to every prompt: {added[:200]!r}")
        if reads_date(tokenizer, prompts):
            rank_zero_info(f"The chat template asks for the date, and gets {prompts.date} (data.prompts.date)")
        kwargs = [prompts.of_split(split).student_chat_template_kwargs for split in ("train", "val")]
        if not all(opens_answer(tokenizer, prompts, each) for each in kwargs):
            rank_zero_warn(
                "model.policy.chat_template has no generation prompt: it does not open the assistant's turn at the end of a "
                "prompt"
            )
        if reads and isinstance(self.context, NoContext) and not is_null_control(tokenizer, prompts):
            rank_zero_warn(
                "data.context is NoContext, but the prompts of student and teacher still differ (chat_template_kwargs, "
                "teacher_response_prefix). The teacher trains the student, so this run is no null control. It is the "
                "control of a run with the same prompts and a context"
            )

    def asks_for_unread_boxes(self, examples: Sequence[Example]) -> bool:
        r"""Return True if the default prompt asks for ``\boxed{}`` at some rows, and the grader does not read it."""
        default = self.prompts.student_template is None and not self.grader.reads_boxes
        return default and not all(example.messages for example in examples)

    def _ready(self, split: str) -> bool:
        needs = self.requirements()
        rows = self.rows.get(split)
        return rows is not None and (
            (all(rows.teacher) or not needs.graded_teacher) and (bool(rows.traces) or not needs.scores_demonstrations)
        )

    def _prepare(self, split: str, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> PromptBatch:
        """Tokenize the usable rows of a split, and count the dropped ones.

        Rank zero does so for all ranks, however long it takes. Each rank reads the source itself.
        """
        needs = self.requirements()
        if split != "train":
            needs = self._evaluation_needs(needs)
        self.limits[split] = self._limits(split, needs, limit)
        self.lengths[split] = []
        found: list[Example] = []

        def prepare() -> tuple[PreparedRows, str]:
            found.extend(self._read(split))
            stops = self.policy.end_ids(tokenizer) if needs.trace_completions else []
            prompts = self.prompts.of_split(split)
            end = prompts.end(tokenizer, stops) if stops else []
            others = ("val", "test") if split == "train" else ()
            held_out = frozenset(question_key(example) for other in others for example in self._questions(other))
            limits, refuse = self.limits[split], partial(self._refuse, split)
            plan = Preparation(
                split, tokenizer, prompts, self.context, self.grader, self.verify, needs, limits, end, stops, held_out
            )
            return prepare_rows(plan, found, self.cache_dir, refuse, self._shows_progress()), texts()

        def texts() -> str:
            return fingerprint([list(map(str, example.contents)) for example in found]) if ranks > 1 else ""

        def read() -> None:
            found.extend(self._read(split))
            if texts() != expected:
                raise ConfigError(
                    f"rank {rank} reads other rows than rank 0",
                    f"data.{split}",
                    "Give every machine the same files, and return the examples of a source in a fixed order",
                )

        rank, ranks = rank_and_world_size(self.trainer)
        if ranks == 1:
            rows, expected = prepare()
        else:
            rows, expected = run_on_rank_zero(prepare, _LONGEST_WAIT)
            run_on_all_ranks(read if get_rank() else lambda: None)
        self.dropped[split], self.traces_cut[split], self.lengths[split] = rows.reasons, rows.cut, rows.lengths
        texts_of = self.limits[split].texts(rows.reasons)
        reasons = "; ".join(f"{count} left out: {text}" for text, count in texts_of.items())
        reasons += self._first_ungraded(rows, found)
        cuts = f"; {rows.cut} traces cut to data.prompts.max_trace_tokens" if rows.cut else ""
        counts = f"{len(rows.usable)} of {len(found)} rows{'; ' + reasons if reasons else ''}{cuts}"
        rank_zero_info(f"data.{split} ({type(self.sources[split]).__name__}): {counts}")
        if self.asks_for_unread_boxes(found):
            rank_zero_info(
                f"data.{split}: the default data.prompts.student_template asks for a final answer in \\boxed{{}}, and "
                f"{type(self.grader).__name__} does not read it. Set it to the request of the task, or to '{{question}}'"
            )
        if any(example.tools for example in found) and (added := added_text(tokenizer, self.prompts, tools=True)):
            rank_zero_info(f"data.{split}: the chat template describes the tools with a text of its own: {added[:200]!r}")
        if not rows.usable:
            problem = f"no usable row of {len(found)} ({reasons})"
            fixes = [
                "Check the source and its columns",
                *map(self._fix_of_grades, sorted(GRADED & rows.reasons.keys(), key=str)),
            ]
            raise ConfigError(problem, f"data.{split}", ". ".join(dict.fromkeys(filter(None, fixes))))
        examples = rows.examples(found, rows.usable)
        student, teacher, traces = (token_lists(ids) for ids in (rows.student, rows.teacher, rows.traces))
        return PromptBatch(student, teacher, examples, [True] * len(examples), traces=traces)

    def _first_ungraded(self, rows: PreparedRows, found: Sequence[Example]) -> str:
        """Return the first row that was dropped because of its grade, for messages."""
        for index, reason in rows.dropped:
            if reason in GRADED:
                question, trace, answer = (_shortened(text) for text in found[index][:3])
                settings = "data.grader" if reason is DropReason.NO_ANSWER else "data.grader, data.verify"
                return f"; the first of these, row {index}: question {question}, trace {trace}, answer {answer} ({settings})"
        return ""

    def _evaluation_needs(self, needs: DataRequirements) -> DataRequirements:
        """Return the requirements of validation and test, which grade completions or score demonstrations."""
        if needs.scores_demonstrations:
            reads = needs.privileged and needs.teacher_prompts
            teachers = needs.teachers if reads else ()
            return DataRequirements(reads, answers=False, trace_completions=True, privileged=reads, teachers=teachers)
        return DataRequirements(teacher_prompts=False, grades=True, graded_teacher=needs.graded_teacher)

    def _refuse(self, split: str, index: int, reason: DropReason) -> None:
        """Raise for a dropped row under ``on_invalid: error``."""
        if self.on_invalid == "error":
            problem = f"row {index}: {self.limits[split].text(reason)}"
            fixes = ["Fix the row, or set data.on_invalid to drop", self._fix_of_grades(reason)]
            raise ConfigError(problem, f"data.{split}", ". ".join(filter(None, fixes)))

    def _fix_of_grades(self, reason: DropReason) -> str:
        """Return what to change if rows are dropped because of their grades. Empty for other reasons."""
        if reason not in GRADED:
            return ""
        if reason is not DropReason.NO_ANSWER:
            return "Choose the data.grader of this task, or set data.verify to false for demonstrations"
        fix = "Name the column of the answers (columns.answer), or choose NoGrader as data.grader for data without answers"
        return fix if self.verify else f"{fix}. Under data.verify: true, answers are read from traces"

    def _shows_progress(self) -> bool:
        trainer = self.trainer
        return sys.stderr.isatty() and (trainer is None or trainer.progress_bar_callback is not None)

    def _limits(self, split: str, needs: DataRequirements, limit: int | None) -> RowLimits:
        lengths = [(teacher, teacher.context_length() or limit) for teacher in needs.teachers]
        teachers = [TeacherLimit(each.setting, length, each.privileged) for each, length in lengths if length is not None]
        return RowLimits(
            self.longest_completion(split),
            limit,
            "" if limit is None else self.policy.limit_hint(),
            needs.max_new_tokens,
            tuple(teachers),
        )

    def _questions(self, split: str) -> list[Example]:
        return self.rows[split].examples if split in self.rows else self._read(split)

    def _read(self, split: str) -> list[Example]:
        """Return the examples of a split's source. Errors name the source's settings as the command line does."""
        source = self.sources[split]
        try:
            found = [] if source is None else source.examples()
        except ConfigError as error:
            raise ConfigError(error.problem, f"data.{split}.init_args.{error.setting}", error.fix) from error
        for number, example in enumerate(found):
            for name, value in zip(("question", "trace", "answer"), example[:3], strict=True):
                if not isinstance(value, str):
                    problem = f"the {name} of example {number} of {type(source).__name__} is of type {type(value).__name__}"
                    raise ConfigError(problem, f"data.{split}", "Make it a str in the source")
            try:
                check_example(example)
            except ConversationError as error:
                problem = f"example {number} of {type(source).__name__}: {error.problem}"
                raise ConfigError(problem, f"data.{split}", error.fix) from None
        return found

    def _loader(self, split: str) -> EvalLoader:
        return EvalLoader(self.rows[split], self.eval_batch_size, *rank_and_world_size(self.trainer))

    def train_dataloader(self) -> TrainLoader:
        limit, same = 1.0, False
        if self.trainer is not None:
            limit, same = self.trainer.limit_train_batches, self.trainer.overfit_batches > 0  # type: ignore[attr-defined]
        return TrainLoader(
            self.rows["train"], self.batch_size, self.seed, *rank_and_world_size(self.trainer), limit, not same
        )

    def val_dataloader(self) -> EvalLoader | list[Any]:
        return self._loader("val") if "val" in self.rows else []

    def test_dataloader(self) -> EvalLoader:
        return self._loader("test")

    def predict_dataloader(self) -> EvalLoader:
        return self._loader("test")


def _shortened(text: str) -> str:
    """Return a text for a message, with its end, where an answer stands."""
    return repr(text if len(text) <= 120 else f"{text[:40]} ... {text[-75:]}")
