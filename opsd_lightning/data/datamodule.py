"""Questions with verified traces, from a source to batches of prompts for both roles."""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal, Self

from jsonargparse.typing import PositiveInt
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from transformers import PreTrainedTokenizerBase

from opsd_lightning.checkpoints.file import check_no_hparams, open_checked
from opsd_lightning.checkpoints.io import check_weights_only
from opsd_lightning.data.loaders import EvalLoader, TrainLoader
from opsd_lightning.data.sources import ExampleSource
from opsd_lightning.distributed.collectives import rank_and_world_size
from opsd_lightning.grading.math_grader import MathGrader
from opsd_lightning.models.policy import Policy
from opsd_lightning.prompts.contexts import NoContext, PrivilegedContext, TraceContext
from opsd_lightning.prompts.template_checks import is_null_control, opens_answer, reads_date, rendering_problems
from opsd_lightning.prompts.templates import Prompt, Prompts
from opsd_lightning.runs.signals import watch
from opsd_lightning.types import ConfigError, Example, PromptBatch, UserError
from opsd_lightning.utils.texts import folded


class OPSDDataModule(LightningDataModule):
    """Pairs questions with verified traces and makes the prompts of both roles.

    Verified means checked here: the trace's own final answer must equal the reference answer. Rows that are empty, fail
    this check, do not fit the model's context (in training also a teacher's) or (in training) also stand among the
    held-out questions, be it with other spaces or line ends, are left out with a count, or refused. Held-out questions
    need no trace where they have an answer, unless the teacher is graded on them.

    Args:
        policy: The model, for its tokenizer and context length. On the command line taken from ``model.policy``.
        train: Source of the training questions.
        val: Source of the validation questions.
        test: Source of the questions for ``test`` and ``predict``.
        prompts: The wording of both roles' prompts.
        context: What the teacher gets to read; the verified trace unless given.
        grader: How final answers are found and compared.
        batch_size: Questions of one optimizer step on each device, at least 1.
        eval_batch_size: Questions of one batch in validation, test and predict, at least 1.
        max_new_tokens: The longest completion that must fit behind a prompt, in tokens. On the command line taken from
            ``model.sampling`` and ``model.eval_sampling``.
        on_invalid: ``drop`` leaves invalid rows out and says how many and why; ``error`` refuses them.
        seed: Of the order of the training questions. On the command line taken from ``seed_everything``.
    """

    def __init__(
        self,
        policy: Policy | None = None,
        train: ExampleSource | None = None,
        val: ExampleSource | None = None,
        test: ExampleSource | None = None,
        prompts: Prompts = Prompts(),
        context: PrivilegedContext | None = None,
        grader: MathGrader = MathGrader(),
        batch_size: PositiveInt = 32,
        eval_batch_size: PositiveInt = 32,
        max_new_tokens: PositiveInt = 1024,
        on_invalid: Literal["drop", "error"] = "drop",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if on_invalid not in ("drop", "error"):
            raise ValueError(f"data.on_invalid is {on_invalid!r}: choose drop or error")
        if policy is None:  # optional in the signature alone: the command line links it from model.policy
            raise UserError("OPSDDataModule needs the policy, for its tokenizer: pass the module's")
        self.policy = policy
        self.sources = {"train": train, "val": val, "test": test}
        self.prompts = prompts
        self.context = context or TraceContext()
        self.grader = self.context.grader = grader
        self.batch_size = PositiveInt(batch_size)
        self.eval_batch_size = PositiveInt(eval_batch_size)
        self.max_new_tokens = PositiveInt(max_new_tokens)
        self.on_invalid = on_invalid
        self.seed = seed
        self.rows: dict[str, PromptBatch] = {}
        self.dropped: dict[str, Counter[str]] = {}
        #: Tokens of the student's and the teacher's prompt of every row that was valid, whether or not it fit.
        self.lengths: dict[str, list[tuple[int, int]]] = {}
        self.traces_cut: dict[str, int] = {}
        #: Refuse in `setup` what does not reach the prompts.
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
        """Build a data module from a checkpoint's file, as `PolicyModule.load_from_checkpoint` does a module."""
        check_weights_only(weights_only)
        check_no_hparams(hparams_file)
        with open_checked(checkpoint_path, cls, (cls.CHECKPOINT_HYPER_PARAMS_KEY,), settings) as file:
            return super().load_from_checkpoint(file, map_location, None, True, **settings)

    def setup(self, stage: str) -> None:
        """Read, verify and tokenize what a stage needs.

        Raises:
            UserError: A source is missing, or leaves no usable row, or holds an invalid one under ``on_invalid: error``.
            ConfigError: Something that is set does not reach the prompts.
        """
        if self.trainer is not None and self.trainer.state.fn is not None:
            watch(self.trainer)  # reading takes long
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
        if stage == "fit" and len(self.rows["train"].examples) < self.batch_size * rank_and_world_size(self.trainer)[1]:
            raise UserError(
                f"data.train has {len(self.rows['train'].examples)} usable rows, fewer than the {self.batch_size} questions "
                f"of one step on {rank_and_world_size(self.trainer)[1]} device(s): lower data.batch_size or give more data"
            )

    def reads_teacher(self, stage: str) -> bool:
        """Return whether the teacher's prompts are made in a stage."""
        module: Any = self.trainer.lightning_module if self.trainer is not None else None
        teacher = getattr(module, "teacher", None)
        trains = stage == "fit" and (module is None or getattr(teacher, "privileged", False))
        return trains or self._teacher_is_graded()

    def _check_prompts(self, tokenizer: PreTrainedTokenizerBase, stage: str) -> None:
        prompts, reads = self.prompts, self.reads_teacher(stage)
        for problem in rendering_problems(tokenizer, prompts, reads):
            raise problem
        if reads_date(tokenizer, prompts):
            rank_zero_info(f"The chat template asks for the date, and gets {prompts.date} (data.prompts.date)")
        if not opens_answer(tokenizer, prompts, prompts.student_chat_template_kwargs):
            rank_zero_warn(
                "model.policy.chat_template opens no answer: prompts end where no turn of the assistant has begun"
            )
        if reads and isinstance(self.context, NoContext) and not is_null_control(tokenizer, prompts):
            rank_zero_warn(
                "data.context is NoContext, but the roles' prompts differ without a context, too (chat_template_kwargs, "
                "teacher_response_prefix): the teacher trains the student, and this is no null control"
            )

    def _ready(self, split: str) -> bool:
        return split in self.rows and (all(self.rows[split].teacher) or not self._teacher_is_graded())

    def _prepare(self, split: str, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> PromptBatch:
        source = self.sources[split]
        assert source is not None
        found = self._read(split)
        dropped: Counter[str] = Counter()
        module: Any = self.trainer.lightning_module if self.trainer is not None else None
        reads_context = split == "train" and getattr(module, "needs_traces", True)
        needs_answer = split != "train" or getattr(module, "needs_answers", True)
        in_place = split == "train" and getattr(module, "trains_on_traces", False)
        lengths = [(each, each.context_length() or limit) for each in getattr(module, "teachers", ()) if split == "train"]
        limits = [(each, length) for each, length in lengths if length is not None]
        for_teacher = reads_context or self._teacher_is_graded()
        # Contexts made at each step, and training on the traces themselves, look at them whatever data.context does.
        online = getattr(module, "context", None) is not None
        needs_trace = in_place or (reads_context and (online or self.context.needs_traces))
        others = ("val", "test") if split == "train" else ()
        held_out = {folded(example.question) for other in others for example in self._questions(other)}
        valid: list[Example] = []
        numbers: list[int] = []  # of the valid examples among those found
        for number, example in enumerate(found):
            checked, reason = self._verify(example, held_out, needs_trace, needs_answer)
            if reason:
                self._drop(split, number, reason, dropped)
            else:
                valid.append(checked)
                numbers.append(number)
        end = self.prompts.end(tokenizer, self.policy.end_ids(tokenizer)) if in_place else []
        traces: list[list[int]] = []
        batch = PromptBatch([], [], [], [], traces=traces)
        cut = 0
        self.lengths[split] = []
        room = f"the model's context of {limit} tokens{self.policy.limit_hint()}"
        for index, example in enumerate(valid):
            student, teacher = self.prompts.student(tokenizer, example), Prompt()
            if for_teacher:
                context = self.context.text(index, valid)
                blank = context is not None and not context.strip()
                if blank and split == "train":
                    self._drop(split, numbers[index], "data.context gives the teacher an empty text", dropped)
                    continue
                if blank and all(e.trace for e in valid):
                    problem = f"the teacher gets an empty text at the question {example.question[:60]!r} of data.{split}"
                    fix = "Fill in what the context is made of, or set model.evaluate_teacher to false"
                    raise ConfigError(problem, "data.context", fix)
                if blank:
                    raise UserError(
                        f"model.evaluate_teacher is on, but {sum(not e.trace for e in valid)} of {len(valid)} questions of "
                        f"data.{split} have no trace for the teacher to read: set it to false, name the trace's column "
                        "(columns.trace), or give a data.context that needs none, such as AnswerContext"
                    )
                teacher = self.prompts.teacher(tokenizer, example, context)
            self.lengths[split].append((len(student), len(teacher)))
            longest = max(len(student), len(teacher))
            trace = self.prompts.trace(tokenizer, example, end) if in_place else []
            if limit is not None and longest + self.max_new_tokens > limit:
                reason = f"prompt and {self.max_new_tokens} new tokens do not fit {room}"
                self._drop(split, numbers[index], reason, dropped)
                continue
            if limit is not None and in_place and len(student) + len(trace) > limit:
                self._drop(split, numbers[index], f"prompt and trace do not fit {room}", dropped)
                continue
            completion = max(module.sampling.max_new_tokens, len(trace)) if limits else 0
            if reason := _too_long(limits, student, teacher, completion):
                self._drop(split, numbers[index], reason, dropped)
                continue
            cut += teacher.trace_was_cut
            batch.student.append(list(student))
            batch.teacher.append(list(teacher))
            batch.examples.append(example)
            batch.counted.append(True)
            if in_place:
                traces.append(trace)
        self.dropped[split], self.traces_cut[split] = dropped, cut
        reasons = "; ".join(f"{count} left out: {reason}" for reason, count in dropped.items())
        cuts = f"; {cut} traces cut to data.prompts.max_trace_tokens" if cut else ""
        counts = f"{len(batch.examples)} of {len(found)} rows{'; ' + reasons if reasons else ''}{cuts}"
        rank_zero_info(f"data.{split} ({type(source).__name__}): {counts}")
        if not batch.examples:
            raise UserError(f"data.{split} has no usable row of {len(found)} ({reasons}); check the source and its columns")
        return batch

    def _questions(self, split: str) -> list[Example]:
        return self.rows[split].examples if split in self.rows else self._read(split)

    def _read(self, split: str) -> list[Example]:
        """Examples of a split's source. Its refusals name the setting as the command line takes it."""
        source = self.sources[split]
        try:
            found = [] if source is None else source.examples()
        except ConfigError as error:
            if error.setting.startswith("data."):
                raise
            raise ConfigError(error.problem, f"data.{split}.init_args.{error.setting}", error.fix) from error
        for number, example in enumerate(found):
            for name, value in zip(("question", "trace", "answer"), example[:3], strict=True):
                if not isinstance(value, str):
                    problem = f"the {name} of example {number} of {type(source).__name__} is of type {type(value).__name__}"
                    raise ConfigError(problem, f"data.{split}", "Make it a str in the source")
        return found

    def _teacher_is_graded(self) -> bool:
        """Whether evaluation samples the privileged teacher too, and so needs its prompts."""
        module = self.trainer.lightning_module if self.trainer is not None else None
        return getattr(getattr(module, "evaluator", None), "teacher", None) is not None

    def _verify(self, example: Example, held_out: set[str], needs_trace: bool, needs_answer: bool) -> tuple[Example, str]:
        """The example, its answer filled in where the source has none, and why it cannot be used, if so."""
        if not example.question:
            return example, "empty question"
        if not example.trace and needs_trace:
            return example, "empty trace"
        if not example.trace and not example.answer and needs_answer:
            return example, "neither trace nor answer"
        if folded(example.question) in held_out:
            return example, "question is also in data.val or data.test"
        if not example.trace:
            return example, ""
        answer = self.grader.find_answer(example.trace)
        if answer is None:
            return example, "trace has no final answer (data.grader.answer_pattern finds none)"
        if not example.answer:
            return example._replace(answer=answer), ""
        if not self.grader.equal(answer, example.answer):
            return example, "trace contradicts the reference answer"
        return example, ""

    def _drop(self, split: str, number: int, reason: str, dropped: Counter[str]) -> None:
        if self.on_invalid == "error":
            raise UserError(f"data.{split}, row {number}: {reason}. Mend it, or set data.on_invalid to drop")
        dropped[reason] += 1

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


def _too_long(limits: list[tuple[Any, int]], student: list[int], teacher: list[int], completion: int) -> str:
    """Which of some teachers, with their limits in tokens, a row is too long for, if any."""
    for each, limit in limits:
        if max(len(student), len(teacher) if each.privileged else 0) + completion > limit:
            return f"prompt and completion do not fit the context of {each.setting}, {limit} tokens"
    return ""
