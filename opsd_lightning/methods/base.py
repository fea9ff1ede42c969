"""The base class of all methods: policy, evaluation, checkpoints, and the parts of a training step.

A method (`opsd.OPSDModule`, `sft.SFTModule`, `grpo.GRPOModule`) writes its own ``training_step`` from these parts:

    step = self.begin_step(batch, self.sample(batch))
    for ratios in self.updates(step):
        self.update(step, terms)
    return self.finish_step(step)

Optimization is manual. The loss of every micro-batch is divided by the number of completion tokens of the whole step, which
is known only after ``training_step`` has sampled them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, ClassVar, NoReturn, Self

import torch
from lightning.fabric.utilities.data import AttributeDict
from lightning.pytorch import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from opsd_lightning.checkpoints import file as checkpoint_file, io as checkpoint_io
from opsd_lightning.distributed.checks import check_precision, check_strategy
from opsd_lightning.distributed.collectives import no_backward_sync
from opsd_lightning.distributed.fsdp2 import FSDP2Strategy
from opsd_lightning.evaluation.evaluator import EvaluatedModule, Evaluator
from opsd_lightning.grading.base import PROBLEMS, Grader
from opsd_lightning.grading.math_grader import MathGrader
from opsd_lightning.losses.objectives import Objective, Term
from opsd_lightning.methods import checkpoint_record
from opsd_lightning.methods.checkpoint_record import Configured
from opsd_lightning.methods.idle_steps import IdleSteps
from opsd_lightning.methods.optimization import make_optimizer, make_scheduler
from opsd_lightning.methods.step import Pass, PhaseClock, Step, StepCallback, StepOutput, StepRecord, read_passes
from opsd_lightning.methods.step_metrics import step_metrics
from opsd_lightning.methods.trainer_checks import check_trainer
from opsd_lightning.models.fingerprint import base_record
from opsd_lightning.models.policy import Policy, base_of, eos_ids, is_adapter_key
from opsd_lightning.models.precision import check_dtypes
from opsd_lightning.models.scoring import score
from opsd_lightning.models.sharding import full_tensor
from opsd_lightning.models.token_budget import TokenBudget
from opsd_lightning.prompts.online_contexts import Attempts
from opsd_lightning.rollouts.base import RolloutEngine, seed_for
from opsd_lightning.rollouts.importance import check_difference, log_ratios, with_logprobs
from opsd_lightning.rollouts.transformers_engine import TransformersEngine
from opsd_lightning.runs import early_signals, lock as run_lock, requeue
from opsd_lightning.runs.resuming import record_pending_work, restore_pending_work
from opsd_lightning.runs.saved_config import check_no_hidden_values
from opsd_lightning.runs.signals import stop_if_signalled
from opsd_lightning.types import (
    ConfigError,
    DataRequirements,
    PositiveFloat,
    PositiveInt,
    PromptBatch,
    Rollouts,
    Sampling,
    checked,
)
from opsd_lightning.utils import disk_errors
from opsd_lightning.utils.redaction import redact

# Divergence of student and teacher, in nats, below which they agree in float32. The gradient is then rounding error, which
# an optimizer such as Adam would scale up to full steps.
_ROUNDING = 1e-6
# The same in bfloat16, as a mean over tokens.
_HALF_ROUNDING = 1e-3
# A larger loss is that of distributions with a token that only one of them rules out (see `objectives.log_softmax`).
_INFINITE = 1e20
_IN_PROGRESS_BAR = ("train/loss", "train/forward_kl", "train/completion_tokens", "train/truncated_fraction")


@checked
class PolicyModule(EvaluatedModule, ABC):
    """Base class of methods that train the policy on completions.

    Args:
        policy: The model.
        rollouts: Rollout engine. Defaults to `TransformersEngine`.
        sampling: Sampling of the training completions.
        eval_sampling: Sampling in validation, test and predict. Defaults to ``sampling``.
        grader: Grader of completions. Defaults to `MathGrader`. On the command line linked to ``data.grader``.
        optimizer: Makes the optimizer of the trainable parameters.
        lr_scheduler: Makes the learning-rate schedule, which is stepped after every optimizer step. Defaults to a constant
            rate.
        max_grad_norm: Norm to which larger gradients are clipped, above 0. Defaults to no clipping.
        token_budget: Limit on the tokens of one scoring pass, padding included, at least 1. It bounds memory and does not
            change the result, except for the inputs that LoRA dropout drops. On one device it is halved where memory runs
            out.
        updates_per_batch: Optimizer steps on one batch of rollouts, at least 1. The paper makes 1. From the second step on,
            the loss of a token is weighted by p_now / p_before, where p_before is its probability before the first step.
            Make ``every_n_train_steps`` of a `ModelCheckpoint` a multiple of it.
        seed: Seed of rollouts and dropout. On the command line linked to ``seed_everything``.
        allow_checkpoint_changes: If True, load a checkpoint that was made with another base model, LoRA settings, teacher,
            kind of optimizer or schedule, batch size times devices, seed or data. All differences are listed.
    """

    #: Measurements that are logged as means over the step's tokens.
    measured: ClassVar[tuple[str, ...]] = ("student_entropy",)
    #: Number of consecutive steps without learning after which a run counts as idle.
    idle_limit: ClassVar[int] = 10
    #: Likely reason for a zero gradient of weighted tokens.
    idle_reason: ClassVar[str] = "the gradient is 0"
    #: Record of the base model, for checkpoints. See `fingerprint.base_record`.
    base_record: dict[str, Any] | None = None
    #: The training rows seen last, with their digests.
    rows_digest: tuple[PromptBatch, tuple[str, str]] | None = None
    #: Settings of this run's optimizer and schedule, once they are made.
    configured: Configured | None = None

    def __init__(
        self,
        policy: Policy,
        *,
        rollouts: RolloutEngine | None = None,
        sampling: Sampling = Sampling(),
        eval_sampling: Sampling | None = None,
        grader: Grader | None = None,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=5e-6, weight_decay=0.0),
        lr_scheduler: LRSchedulerCallable | None = None,
        max_grad_norm: PositiveFloat | None = None,
        token_budget: PositiveInt = 8192,
        updates_per_batch: PositiveInt = 1,
        seed: int = 0,
        allow_checkpoint_changes: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if any(not isinstance(value, (int, float, str, Mapping, type(None))) for value in dict(self.hparams).values()):
            # Built in Python and not by the CLI: a safe checkpoint cannot hold the parts, which are objects.
            self._hparams: Any = {}
            self._hparams_initial: Any = {}
        else:  # for checkpoints and loggers
            self._hparams = AttributeDict(redact(self._hparams, whole=True))
            self._hparams_initial = AttributeDict(redact(self._hparams_initial, whole=True))
        self.automatic_optimization = False
        self.strict_loading = False  # checkpoints hold the adapters, not the base model
        self.policy = policy
        self.rollouts = rollouts or TransformersEngine()
        self.sampling = sampling
        self.make_optimizer, self.make_scheduler = optimizer, lr_scheduler
        self.max_grad_norm = max_grad_norm
        self.token_budget = token_budget
        self.scoring_budget = TokenBudget(token_budget)
        self.updates_per_batch = updates_per_batch
        self.seed = seed
        self.allow_checkpoint_changes = allow_checkpoint_changes
        self._resumed = False  # True from loading a checkpoint to the next optimizer step
        self._settings_changed = False  # True if the checkpoint has other optimizer settings than this run
        self.tokens_generated = 0
        self.idle = IdleSteps(self.idle_limit)
        self._diverged: RuntimeError | None = None
        self.evaluator = Evaluator(eval_sampling or sampling, grader or MathGrader())
        self._clock = PhaseClock()

    # -- the method --------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def objective(self) -> Objective:
        """The method's objective, which decides the tokens that count."""

    def term_of(self, batch: PromptBatch, rollouts: Rollouts) -> Term:
        """Return the method's own term of the loss for completions outside of a training step.

        Its weights are not normalized. Nothing is logged or counted. Every rank must call. A method with a teacher adds the
        teacher's states and prompts.

        Args:
            batch: The questions.
            rollouts: Completions of them, `completions_per_context` of each question.
        """
        return Term(self.objective, self.objective.token_weights(rollouts))

    @property
    def completions_per_context(self) -> int:
        """Number of completions of a question from which the teacher's context is made. 1 if it needs none."""
        return 1

    @property
    def data_requirements(self) -> DataRequirements:
        """The data that training needs. A method that needs more or less replaces fields."""
        return DataRequirements(
            privileged=False,
            scores_demonstrations=self.evaluator.demonstrations is not None,
            graded_teacher=self.evaluator.teacher is not None,
            max_new_tokens=self.sampling.max_new_tokens,
            teachers=self.teachers,
        )

    def sampled(self, stage: str) -> dict[str, Sampling]:
        trains = stage == "fit" and self.data_requirements.max_new_tokens > 0
        return super().sampled(stage) | ({"train": self.sampling} if trains else {})

    def attach(self) -> None:
        """Prepare the freshly built model, before it is sharded."""

    @abstractmethod
    def training_step(self, batch: PromptBatch, batch_idx: int) -> StepOutput:
        """Make the optimizer steps of one batch. See `opsd.DistillationModule` for an example."""

    # -- the model ---------------------------------------------------------------------------------------------------

    def configure_callbacks(self) -> list[Callback]:
        """Lock the run's folders and prepare its checkpoints. Lightning calls this hook first in every stage."""
        early_signals.start_join_timeout()
        run_lock.attach(self.trainer)
        checkpoint_io.install(self.trainer)
        disk_errors.reset([self.trainer, *self.trainer.loggers])
        if run_lock.is_first_rank(self.trainer):
            disk_errors.guard_loggers(self.trainer.loggers)
        return super().configure_callbacks()

    def configure_model(self) -> None:
        """Build the policy and the weights that the method adds. Lightning calls this hook once devices are known.

        Raises:
            ConfigError: The model cannot be loaded, or does not fit the settings.
        """
        if hasattr(self, "model"):
            return
        if self._trainer is not None:
            check_precision(self._trainer.precision_plugin)
            check_strategy(self._trainer.strategy)
            self.rollouts.check(self.policy, str(self._trainer.precision), self._trainer.strategy.root_device)
            if self._trains:
                check_dtypes(self.policy, str(self._trainer.precision))
            self._check_trainer()
        self.tokenizer = self.policy.load_tokenizer()
        self.objective.check(self.policy.load_config().get_text_config().vocab_size, "model.objective")
        self.model = self.policy.build(self._trainer.strategy.root_device if self._trainer is not None else None)
        if self._trainer is not None and self._trains:
            check_dtypes(self.policy, str(self._trainer.precision), self.model)
        self.base_record = base_record(self.policy, self.model)
        self.attach()
        if self._trainer is not None and isinstance(self._trainer.strategy, FSDP2Strategy):
            self._trainer.strategy.shard(self.model)

    def on_fit_start(self) -> None:
        self._check_trainer()  # again, because another trainer may have built the module
        self.idle, self._diverged, self.validated = IdleSteps(self.idle_limit), None, 0
        self.check_policy()

    @property
    def _trains(self) -> bool:
        """True in a fit, and in the doctor's examination of a fit, where the trainer has no stage."""
        return self.trainer.state.fn in (TrainerFn.FITTING, None)

    def _check_trainer(self) -> None:
        if self.trainer.state.fn == "fit":
            check_trainer(self.trainer, self)

    def logged_names(self) -> set[str]:
        names = {"clipped_fraction" if name == "clipped" else name for name in self.measured} | {
            "loss", "grad_norm", "adapter_norm", "completion_tokens", "completion_tokens_min", "completion_tokens_max",
            "truncated_fraction", "eos_rate", "tokens_generated",
        }  # fmt: skip
        if "forward_kl" in names:
            names.add("first_token_forward_kl")
        if self.rollouts.max_importance_ratio is not None:
            names |= {"importance_ratio", "importance_ratio_max", "importance_ratio_clipped"}
        # An engine from elsewhere may return log-probabilities without being asked.
        own = type(self.rollouts).__module__.startswith("opsd_lightning.")
        if not own or (self.rollouts.logprob_tolerance, self.rollouts.max_importance_ratio) != (None, None):
            names |= {"rollout_logprob_difference", "rollout_logprob_difference_max"}
        phases = {f"time/{phase}_{unit}" for phase in ("rollout", "scoring") for unit in ("seconds", "tokens_per_second")}
        return super().logged_names() | {f"train/{name}" for name in names} | phases

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(self.make_optimizer, [p for p in self.model.parameters() if p.requires_grad])
        if isinstance(self.trainer.strategy, FSDP2Strategy) and type(optimizer).__module__.startswith("bitsandbytes"):
            raise ConfigError(
                f"bitsandbytes' {type(optimizer).__name__} cannot update weights that trainer.strategy fsdp2 shards",
                "model.optimizer",
                "Use torch.optim.AdamW, whose state fsdp2 shards too, or ddp",
            )
        self.configured = Configured(optimizer)
        if self.make_scheduler is None:
            return optimizer
        scheduler = make_scheduler(self.make_scheduler, optimizer, self.trainer.max_steps)
        self.configured.add(scheduler)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        if self._settings_changed and self.configured is not None:
            self._settings_changed = False
            self.configured.apply(self.trainer.optimizers[0], self.lr_schedulers(), self.global_step)  # type: ignore[arg-type]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        stop_if_signalled(self.trainer, self.command)  # after the callbacks, because one may save this step

    def on_fit_end(self) -> None:
        requeue.retire_after_fit(self.trainer)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch  # ragged lists: tensors are made where they are used

    # -- training ----------------------------------------------------------------------------------------------------

    def sample(self, batch: PromptBatch) -> Rollouts:
        """Sample the student's completions, and prefetch those of the next batch if the engine can."""
        step, rank = self.global_step, self.trainer.global_rank
        self._clock.restart()
        seed = seed_for(self.seed, "rollout", step, rank)
        rollouts = self.rollouts.generate(self.model, batch.student, self.sampling, seed)
        ahead = step + self.updates_per_batch
        if batch.upcoming and (self.trainer.max_steps < 0 or ahead < self.trainer.max_steps):
            seed = seed_for(self.seed, "rollout", ahead, rank)
            self.rollouts.prefetch(self.model, batch.upcoming, self.sampling, seed)
        self._clock.end("rollout")
        return rollouts

    def begin_step(self, batch: PromptBatch, rollouts: Rollouts) -> Step:
        """Start a training step: compare sampler and student, and keep log-probabilities for later updates.

        Every rank must call.

        Args:
            batch: The questions.
            rollouts: The completions to train on.

        Raises:
            ConfigError: The sampler does not have the student's weights.
        """
        self._clock.restart()
        students = [prompt for prompt in batch.student for _ in range(rollouts.n)]
        correction = self._sampler_correction(students, rollouts)
        if self.updates_per_batch > 1 and rollouts.sampled:
            rollouts = with_logprobs(self.scorer, students, rollouts, self.objective)
        return Step(batch, rollouts, students, correction)

    def updates(self, step: Step) -> Iterator[list[Tensor] | None]:
        """Iterate over the ``updates_per_batch`` optimizer steps on a batch. Call `update` once in each iteration.

        Yields:
            Ratios p_now / p_before of every completion token, for each completion a tensor of shape [C], where p_before is
            the student's probability before the first update. None in the first update, where all ratios are 1, and for
            completions that were not sampled.
        """
        for number in range(self.updates_per_batch):
            if number and self.global_step >= self.trainer.max_steps >= 0:
                return
            self._optimizer.zero_grad()
            if number:
                self._clock.restart()
            ratios = None
            if number and step.rollouts.sampled:
                found = log_ratios(
                    self.scorer, step.student_prompts, step.rollouts, self.objective, self.objective.temperature
                )
                ratios = [row.exp() for row in found]
            yield ratios

    def update(self, step: Step, terms: list[Term]) -> None:
        """Make one optimizer step: micro-batches, gradient clipping, optimizer, schedule. Every rank must call.

        Args:
            step: The training step.
            terms: Terms of the loss, the method's own first.

        Raises:
            RuntimeError: The loss, the gradient or the trained weights are not finite.
        """
        if step.correction is not None:
            terms = [term.weighted(step.correction) for term in terms]
        loss, measured = self.scoring_budget.attempt(
            partial(self._backward, step, terms), undo=self._optimizer.zero_grad, repeats=self.ranks.repeats_passes
        )
        self._clock.end("scoring")
        if not abs(loss) < _INFINITE:
            self._stop(f"the loss is {loss} at step {self.global_step}")
        grad_norm = self._clip(terms, measured)
        if not math.isfinite(grad_norm):
            self._stop(f"the gradient's norm is {grad_norm} at step {self.global_step}, loss {loss}")
        # An optimizer's own rate of 0 is warned of when it is made.
        rates = [float(group.get("lr", 1.0)) for group in self._optimizer.param_groups]
        rate_is_zero = self.make_scheduler is not None and not any(rates)
        first = step.record is None
        if first:
            step.record = StepRecord(step.batch, step.student_prompts, step.rollouts, terms, loss, measured)
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, StepCallback):
                    callback.on_step_scored(self.trainer, self, step.record)
        self._step_optimizer(loss)
        self.log("train/grad_norm", grad_norm, batch_size=1)
        if first and step.record is not None:
            self._watch(step.record, grad_norm, rate_is_zero)
        self._clock.restart()

    def finish_step(self, step: Step) -> StepOutput:
        """Log the step, and return its output for callbacks. Every rank must call."""
        assert step.record is not None, "a step makes at least one update"
        metrics = step_metrics(step.record, self.measured, self.ranks)
        self.tokens_generated += int(metrics.tokens) if step.rollouts.sampled else 0
        values = {f"train/{name}": value for name, value in metrics.values.items()}
        values["train/tokens_generated"] = float(self.tokens_generated)
        for phase, seconds in self._clock.seconds.items():
            values[f"time/{phase}_seconds"] = seconds
            values[f"time/{phase}_tokens_per_second"] = step.rollouts.tokens / seconds if seconds else 0.0
        shown = {name: values.pop(name) for name in _IN_PROGRESS_BAR if name in values}
        self.log_dict(shown, prog_bar=True, batch_size=1)
        self.log_dict(values, batch_size=1)
        self._clock = PhaseClock()
        return {
            "loss": torch.tensor(step.record.loss, dtype=torch.float32),
            "rollouts": step.rollouts,
            "measured": step.record.measured,
        }

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Log a metric as Lightning does. Numbers are kept on the CPU, so that no copy to the device is waited for."""
        if isinstance(value, (int, float)) and not kwargs.get("sync_dist"):
            value = torch.tensor(value, dtype=torch.float32)  # not the default dtype
        super().log(name, value, *args, **kwargs)

    @property
    def _optimizer(self) -> LightningOptimizer:
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        return optimizer

    def _backward(self, step: Step, terms: list[Term]) -> tuple[float, dict[str, list[Tensor]]]:
        """Score all completions in micro-batches and accumulate the gradient of the loss.

        Returns:
            The loss over all ranks, and the measurements of the first term, as in `StepRecord`.
        """
        torch.manual_seed(seed_for(self.seed, "dropout", self.global_step, self.trainer.global_rank))
        prompts, completions = step.student_prompts, step.rollouts.completions
        sizes = [len(completion) for completion in completions]
        plan = self.scorer.micro_batches([len(prompt) + size for prompt, size in zip(prompts, sizes, strict=True)])
        passes: list[Pass] = []
        for number, rows in enumerate(plan):
            # A rank without rows scores the first prompt without a completion: no token, and a loss of 0 with a graph.
            read, written = [prompts[i] for i in rows or [0]], [completions[i] for i in rows] or [[]]
            student, targets = score(self.model, read, written)
            losses, measured = zip(*(term.loss(student, targets, rows, sizes) for term in terms), strict=True)
            total = torch.stack(losses).sum()
            # Distributed strategies average gradients over ranks, and the weights already divide by all ranks' tokens.
            with nullcontext() if number == len(plan) - 1 else no_backward_sync(self.trainer.strategy):
                self.manual_backward(total * self.trainer.world_size)
            passes.append(Pass(rows, total.detach(), measured[0]))
        loss, by_row = read_passes(passes, sizes)
        return self.ranks.sum([loss])[0], by_row

    def _clip(self, terms: list[Term], measured: dict[str, list[Tensor]]) -> float:
        """Clip the gradient, and return its norm before."""
        if len(terms) == 1 and self._agree_to_rounding(measured):
            self._optimizer.zero_grad(set_to_none=False)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        return float(full_tensor(torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm or math.inf)))

    def _step_optimizer(self, loss: float) -> None:
        # A restored optimizer state is used for the first time: an error is the checkpoint's.
        with checkpoint_file.wrap_restore_errors(None) if self._resumed else nullcontext():
            self._optimizer.step()
        parameters = [p.detach() for p in self.model.parameters() if p.requires_grad]
        adapter_norm = float(full_tensor(torch.nn.utils.get_total_norm(parameters)))
        if not math.isfinite(adapter_norm):  # before a teacher follows, or a checkpoint is written
            self._stop(f"the norm of the trained weights is {adapter_norm} after step {self.global_step}, loss {loss}")
        if (scheduler := self.lr_schedulers()) is not None:
            with checkpoint_file.wrap_restore_errors(None) if self._resumed else nullcontext():
                scheduler.step()  # type: ignore[union-attr, call-arg]
        self._resumed = False
        self.log("train/adapter_norm", adapter_norm, batch_size=1)

    def _stop(self, problem: str) -> NoReturn:
        """End the run. From now on no checkpoint is written, not even by a callback that saves on exceptions."""
        self._diverged = RuntimeError(
            f"{problem}: lower the learning rate, clip (model.objective.init_args.clip), or compute in bfloat16 or float32; "
            "the last checkpoint is still good"
        )
        raise self._diverged

    def _agree_to_rounding(self, measured: dict[str, list[Tensor]]) -> bool:
        """Return True if student and teacher agree on every token of all ranks up to rounding. Every rank must call."""
        if "forward_kl" not in self.measured:
            return False
        columns = [row for name in ("forward_kl", "reverse_kl") for row in measured.get(name, [])]
        return (
            self.ranks.max([float(torch.cat([torch.zeros(1, dtype=torch.float32), *columns]).abs().max())])[0] <= _ROUNDING
        )

    def _watch(self, record: StepRecord, grad_norm: float, rate_is_zero: bool) -> None:
        """Warn of consecutive steps that teach nothing. Every rank must call, and all reach the same verdict."""
        rollouts, ends = record.rollouts, eos_ids(self.model)
        written = [sum(token not in ends for token in completion) for completion in rollouts.completions]
        weighted = sum(int((weight != 0).sum()) for weight in record.terms[0].weights)
        counts = self.ranks.sum([sum(written), weighted, rollouts.terminated.count(True)])
        longest = int(self.ranks.max([max(map(len, rollouts.completions), default=0)])[0])
        self._warn_of_rounding(record)
        reason = None
        if not counts[0]:
            reason = "every completion is empty, an EOS at once; look at the end of the student's prompts (opsd doctor)"
        elif not counts[1]:
            reason = self._without_weight(longest, not counts[2])
        elif grad_norm == 0:
            reason = self.idle_reason
        elif rate_is_zero:
            reason = "the learning rate is 0 (model.lr_scheduler)"
        if self.idle.add(reason):
            rank_zero_warn(f"step {self.global_step}: {self.idle.problem}")

    def _warn_of_rounding(self, record: StepRecord) -> None:
        """Warn if student and teacher agree up to half precision at the first step. Every rank must call."""
        if self.idle.steps or "forward_kl" not in self.measured:
            return
        half = str(self.trainer.precision).startswith("bf16") or base_of(self.model).dtype == torch.bfloat16
        divergence = torch.cat([torch.zeros(0, dtype=torch.float32), *record.measured.get("forward_kl", [])])
        total, count = self.ranks.sum([float(divergence.sum()), divergence.numel()])
        if half and count and 0 < total / count < _HALF_ROUNDING:
            rank_zero_warn(
                f"the teacher and the student differ by {total / count:.1e} nats a token at the first step. In bfloat16 "
                "that may be rounding alone, from which an optimizer such as Adam makes full steps. For a control whose "
                "teacher reads the student's prompt (NoContext), set trainer.precision to 32-true and model.policy.dtype "
                "to float32"
            )

    def _without_weight(self, longest: int, all_truncated: bool) -> str:
        objective = self.objective
        if all_truncated and not objective.include_truncated:
            text = "every completion was truncated (model.sampling.max_new_tokens)"
            return f"{text}, and the objective leaves those out (include_truncated)"
        if longest <= objective.skip_first_tokens:
            return (
                f"no completion is longer than {longest} tokens, and the objective's skip_first_tokens is "
                f"{objective.skip_first_tokens}"
            )
        return self.idle_reason

    def _sampler_correction(self, students: list[list[int]], rollouts: Rollouts) -> list[Tensor] | None:
        """Log the difference between sampler and student, refuse a large one, and return token weights if asked for."""
        if rollouts.logprobs is None:
            return None
        found = log_ratios(self.scorer, students, rollouts, self.objective)  # engines report temperature 1
        away = torch.cat([*found, torch.zeros(1, dtype=torch.float32)]).abs()
        total, count = self.ranks.sum([float(away.sum()), float(away.numel() - 1)])
        difference, most = total / max(count, 1), self.ranks.max([float(away.max())])[0]
        self.log("train/rollout_logprob_difference", difference, batch_size=1)
        self.log("train/rollout_logprob_difference_max", most, batch_size=1)
        check_difference(difference, self.rollouts.logprob_tolerance)
        limit = self.rollouts.max_importance_ratio
        return None if limit is None else self.truncated([row.exp() for row in found], limit, "importance_ratio")

    def require_grades(self, setting: str) -> None:
        """Raise `ConfigError` if ``data.grader`` grades no completions, which a setting needs."""
        grader = self.evaluator.grader
        if not grader.grades_completions:
            raise ConfigError(
                f"{type(grader).__name__} grades no completions, and {setting} needs grades",
                "data.grader",
                f"Choose a grader that fits the data, such as ExactMatch, or change {setting}",
            )

    def log_grading(self, attempts: Attempts) -> None:
        """Log the number of completions that count as wrong because grading gave no verdict. Every rank must call."""
        found = [grade.problem for grade in attempts.grades]
        counts = self.ranks.sum([found.count(problem) for problem in PROBLEMS.values()])
        self.log_dict({f"train/{name}": count for name, count in zip(PROBLEMS, counts, strict=True)}, batch_size=1)

    def truncated(self, ratios: list[Tensor], limit: float, name: str) -> list[Tensor]:
        """Truncate importance ratios, and log their mean, maximum and truncated share. Every rank must call.

        Args:
            ratios: For each completion a tensor of shape [C].
            limit: Largest ratio to return.
            name: Name of the metrics, ``train/<name>``.
        """
        flat = torch.cat([*ratios, torch.zeros(1, dtype=torch.float32)])
        total, above, count = self.ranks.sum([float(flat.sum()), float((flat > limit).sum()), flat.numel() - 1])
        most = self.ranks.max([float(flat.max())])[0]
        logged = {"": total / max(count, 1), "_max": most, "_clipped": above / max(count, 1)}
        self.log_dict({f"train/{name}{ending}": value for ending, value in logged.items()}, batch_size=1)
        return [row.clamp(max=limit) for row in ratios]

    def normalized(self, weights: list[Tensor]) -> list[Tensor]:
        """Divide token weights by their sum over the whole step and all ranks. Every rank must call."""
        total = max(*self.ranks.sum([float(torch.cat([*weights, torch.zeros(1, dtype=torch.float32)]).sum())]), 1e-12)
        return [weight / total for weight in weights]

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the adapters' weights, or all weights in full fine-tuning."""
        state = super().state_dict(*args, **kwargs)
        return {key: value for key, value in state.items() if self.policy.trains_all or is_adapter_key(key)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._diverged is not None:
            raise self._diverged
        checkpoint["opsd_tokens_generated"] = self.tokens_generated
        checkpoint["opsd_token_budget"] = self.scoring_budget.state_dict()
        checkpoint[checkpoint_record.KEY] = checkpoint_record.record_of(self)
        requeue.record_job(checkpoint)
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            record_pending_work(self.trainer, checkpoint, self.validated)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **settings: Any,
    ) -> Self:
        """Build a module from a checkpoint file and the settings that a command-line run saved in it.

        Args:
            checkpoint_path: A local file.
            map_location: As in ``torch.load``.
            hparams_file: Not supported. Pass the settings themselves.
            strict: Not supported. Checkpoints hold the adapters alone.
            weights_only: Always True.
            **settings: Arguments of the class that replace the checkpoint's.

        Raises:
            ConfigError: The file is remote or is not a safe checkpoint, or its settings would import other modules.
        """
        checkpoint_io.check_weights_only(weights_only)
        checkpoint_file.check_no_hparams(hparams_file)
        keys = (cls.CHECKPOINT_HYPER_PARAMS_KEY, "hparams", "module_arguments")
        with checkpoint_file.open_checked(checkpoint_path, cls, keys, settings) as file:
            return super().load_from_checkpoint(file, map_location, None, strict, True, **settings)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint_file.check_callbacks(checkpoint)
        self._resumed = True
        if self._trainer is None:  # the module is made of the checkpoint's settings
            check_no_hidden_values(checkpoint.get("hyper_parameters", {}))
        self.tokens_generated = checkpoint.get("opsd_tokens_generated", 0)
        self.configure_model()
        with checkpoint_file.wrap_restore_errors(None):
            if "opsd_token_budget" in checkpoint:
                self.scoring_budget.load_state_dict(checkpoint["opsd_token_budget"])
            if "opsd_compared" not in checkpoint:  # a strategy may have called this before
                checkpoint["opsd_compared"] = True
                self._settings_changed = checkpoint_record.compare(self, checkpoint)
            checkpoint_record.check_weights(self, checkpoint)
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            restore_pending_work(self._trainer, checkpoint)
