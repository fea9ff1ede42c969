"""What every method shares: the policy, one optimizer step over micro-batches and ranks, evaluation, checkpoints.

A method (`opsd.OPSDModule`, `sft.SFTModule`, `grpo.GRPOModule`) says what is sampled, what is made of it once a batch, and
which weighted terms the loss is made of. Optimization is manual because one call of ``training_step`` samples all of a
step's rollouts at once, and only then is the number of completion tokens known that every micro-batch's loss is divided by.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
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
from opsd_lightning.distributed.fsdp2 import FSDP2Strategy
from opsd_lightning.distributed.replicas import replica, replicas, unsynchronized
from opsd_lightning.evaluation.evaluator import EvaluatedModule, Evaluator
from opsd_lightning.grading.math_grader import PROBLEMS, MathGrader
from opsd_lightning.losses.objectives import Objective, Term, Update
from opsd_lightning.methods import checkpoint_record
from opsd_lightning.methods.checkpoint_record import Configured
from opsd_lightning.methods.idle_steps import IdleSteps
from opsd_lightning.methods.optimization import make_optimizer, make_scheduler
from opsd_lightning.methods.trainer_checks import check_trainer
from opsd_lightning.models.fingerprint import base_record
from opsd_lightning.models.policy import Policy, base_of, eos_ids, is_adapter_key
from opsd_lightning.models.precision import check_dtypes
from opsd_lightning.models.scoring import score, split_rows
from opsd_lightning.models.sharding import whole
from opsd_lightning.rollouts.base import RolloutEngine, seed_for
from opsd_lightning.rollouts.importance import check_difference, log_ratios, with_logprobs
from opsd_lightning.rollouts.transformers_engine import TransformersEngine
from opsd_lightning.runs import early_signals, lock as run_lock, requeue
from opsd_lightning.runs.resuming import do_what_is_due, say_what_is_due
from opsd_lightning.runs.saved_config import check_hidden
from opsd_lightning.runs.signals import stop_if_asked
from opsd_lightning.types import (
    DataRequirements,
    PositiveFloat,
    PositiveInt,
    PromptBatch,
    Rollouts,
    Sampling,
    TokenStates,
    UserError,
    checked,
)
from opsd_lightning.utils import disk_errors
from opsd_lightning.utils.redaction import redact

# Divergence of two roles, in nats, up to which they agree in float32: what is left of the gradient is rounding, which an
# optimizer such as Adam scales up to full steps.
_ROUNDING = 1e-6
# As much, on average over tokens, in bfloat16.
_HALF_ROUNDING = 1e-3
# A loss above it is one of infinitely unlike distributions (see `objectives.log_softmax`).
_INFINITE = 1e20


@checked
class PolicyModule(EvaluatedModule, ABC):
    """A method of training the policy on completions.

    Args:
        policy: The model.
        rollouts: How completions are sampled: `TransformersEngine` unless given.
        sampling: What is sampled to train on.
        eval_sampling: What is sampled in validation, test and predict; as in training unless given.
        grader: How completions are graded. On the command line taken from ``data.grader``.
        optimizer: Makes the optimizer of the trainable parameters.
        lr_scheduler: Makes its learning-rate schedule, stepped after every optimizer step. Constant unless given.
        max_grad_norm: Gradients with a larger norm are scaled down to it, above 0. Not clipped unless given.
        token_budget: The most tokens, padding included, that one scoring pass works on, at least 1. It decides memory,
            not the result (but for which inputs LoRA dropout drops).
        updates_per_batch: Optimizer steps on one batch of rollouts, at least 1. From the second on, tokens are weighted by
            the ratio of their probabilities now and before the first.
        seed: Of rollouts and dropout. On the command line taken from ``seed_everything``.
        allow_checkpoint_changes: Load a checkpoint although it was made with another base model, LoRA settings, teacher,
            kind of optimizer or schedule, batch size times devices, seed or data than this run's. All are listed.
    """

    #: What is logged of every token, as a mean over the step's tokens.
    measured: ClassVar[tuple[str, ...]] = ("student_entropy",)
    #: Steps in a row without anything to learn from which a run counts as idle.
    idle_limit: ClassVar[int] = 10
    #: Why a step has no gradient though its tokens have weights.
    idle_reason: ClassVar[str] = "the gradient is 0"
    #: What the first optimizer step on a batch is made of, for callbacks in ``on_before_optimizer_step``; else None.
    current: Update | None = None
    #: Record of the base model, for checkpoints. See `fingerprint.base_record`.
    base_record: dict[str, Any] | None = None
    #: The training rows that were seen last, with their digests.
    rows_digest: tuple[PromptBatch, tuple[str, str]] | None = None
    #: The run's own settings of the optimizer, once it is made.
    configured: Configured | None = None

    def __init__(
        self,
        policy: Policy,
        rollouts: RolloutEngine | None = None,
        sampling: Sampling = Sampling(),
        eval_sampling: Sampling | None = None,
        grader: MathGrader | None = None,
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
            # Built in Python, not by the CLI: the parts are objects, which a safe checkpoint cannot hold.
            self._hparams: Any = {}
            self._hparams_initial: Any = {}
        else:  # checkpoints and loggers keep them
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
        self.updates_per_batch = updates_per_batch
        self.seed = seed
        self.allow_checkpoint_changes = allow_checkpoint_changes
        self._resumed = False  # a checkpoint was loaded, and no step made since
        self._settings_changed = False  # the checkpoint's optimizer settings are not this run's
        self.tokens_generated = 0
        self.idle = IdleSteps(self.idle_limit)
        self._diverged: RuntimeError | None = None
        self.evaluator = Evaluator(eval_sampling or sampling, grader or MathGrader())

    # -- the method --------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def objective(self) -> Objective:
        """The method's own objective, which decides which tokens count."""

    @property
    def data_requirements(self) -> DataRequirements:
        """The data that training needs. A method that needs more or less replaces fields."""
        graded = self.evaluator.teacher is not None
        return DataRequirements(
            privileged=False, graded_teacher=graded, max_new_tokens=self.sampling.max_new_tokens, teachers=self.teachers
        )

    def attach(self) -> None:
        """Called once on the freshly built model, before it is sharded."""

    def sample(self, batch: PromptBatch) -> Rollouts:
        """The completions that a step trains on: the student's own."""
        step, rank = self.global_step, replica(self.trainer)[0]
        seed = seed_for(self.seed, "rollout", step, rank)
        rollouts = self.rollouts.generate(self.model, batch.student, self.sampling, seed)
        ahead = step + self.updates_per_batch
        if batch.upcoming and (self.trainer.max_steps < 0 or ahead < self.trainer.max_steps):
            seed = seed_for(self.seed, "rollout", ahead, rank)
            self.rollouts.prefetch(self.model, batch.upcoming, self.sampling, seed)
        return rollouts

    @abstractmethod
    def prepare(self, batch: PromptBatch, rollouts: Rollouts) -> Any:
        """What is made once of a batch of rollouts: teachers' states, advantages."""

    @abstractmethod
    def terms(self, prepared: Any, rollouts: Rollouts, ratios: list[Tensor] | None) -> list[Term]:
        """The terms of one optimizer step's loss.

        Args:
            prepared: What `prepare` made.
            rollouts: The batch's completions.
            ratios: Probability of every completion token under the student over that before the first update on the
                batch, [C] a row; None in that first update, and of completions that were not sampled.
        """

    def after_update(self) -> None:
        """Called after every optimizer step."""

    # -- the model ---------------------------------------------------------------------------------------------------

    def configure_callbacks(self) -> list[Callback]:
        """Lock the run's folders and prepare its checkpoints. Called by Lightning before every stage, first of all hooks."""
        early_signals.joins()
        run_lock.attach(self.trainer)
        checkpoint_io.install(self.trainer)
        disk_errors.begin([self.trainer, *self.trainer.loggers])
        if run_lock.is_first(self.trainer):
            disk_errors.guard_loggers(self.trainer.loggers)
        return super().configure_callbacks()

    def configure_model(self) -> None:
        """Build the policy and what the method keeps in it. Called by Lightning, once its devices are known.

        Raises:
            UserError: The model cannot be loaded, or settings contradict it.
        """
        if hasattr(self, "model"):
            return
        if self._trainer is not None:
            check_precision(self._trainer.precision_plugin)
            check_strategy(self._trainer.strategy)
            if self._trains:
                check_dtypes(self.policy, str(self._trainer.precision))
            self._check_trainer()
            if replica(self._trainer)[1] < self._trainer.world_size and not self.rollouts.splits_layers:
                raise UserError(
                    f"trainer.strategy.tensor_parallel_size does not go with model.rollouts {type(self.rollouts).__name__}: "
                    "use TransformersEngine"
                )
            self.evaluator.count_over(replicas(self._trainer.strategy))
        self.tokenizer = self.policy.load_tokenizer()
        vocabulary = self.policy.load_config().get_text_config().vocab_size
        try:
            self.objective.check(vocabulary)
        except ValueError as error:
            raise UserError(f"model.{error}") from None
        self.model = self.policy.build(self._trainer.strategy.root_device if self._trainer is not None else None)
        if self._trainer is not None and self._trains:
            check_dtypes(self.policy, str(self._trainer.precision), self.model)
        self.base_record = base_record(self.policy, self.model)
        self.attach()
        if self._trainer is not None and isinstance(self._trainer.strategy, FSDP2Strategy):
            self._trainer.strategy.shard(self.model)

    def on_fit_start(self) -> None:
        self._check_trainer()  # also of a module that another trainer built
        self.idle, self._diverged, self.validated = IdleSteps(self.idle_limit), None, 0
        self.check_policy()

    @property
    def _trains(self) -> bool:
        """Whether the trainer fits the module; None is its stage where the doctor examines a fit."""
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
        own = type(self.rollouts).__module__.startswith("opsd_lightning.")  # another may bring log-probabilities unasked
        if not own or (self.rollouts.logprob_tolerance, self.rollouts.max_importance_ratio) != (None, None):
            names |= {"rollout_logprob_difference", "rollout_logprob_difference_max"}
        phases = {f"time/{phase}_{what}" for phase in ("rollout", "scoring") for what in ("seconds", "tokens_per_second")}
        return super().logged_names() | {f"train/{name}" for name in names} | phases

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(self.make_optimizer, [p for p in self.model.parameters() if p.requires_grad])
        if isinstance(self.trainer.strategy, FSDP2Strategy) and type(optimizer).__module__.startswith("bitsandbytes"):
            raise UserError(
                f"model.optimizer is bitsandbytes' {type(optimizer).__name__}, which cannot update weights that "
                "trainer.strategy fsdp2 shards: use torch.optim.AdamW, whose state is then divided among devices, or ddp"
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
        stop_if_asked(self.trainer, self.command)  # after callbacks, of which one may have saved this step

    def on_fit_end(self) -> None:
        requeue.finished(self.trainer)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch  # ragged lists; tensors are made where they are used

    # -- training ----------------------------------------------------------------------------------------------------

    def training_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """Sample, then make ``updates_per_batch`` optimizer steps.

        Returns:
            For callbacks, of the first update: ``rollouts``, the ``loss`` and, by name, ``measured``: for each completion
            a tensor of shape [C] on the CPU (see `Objective.__call__` for the names).
        """
        seconds = {"rollout": 0.0, "scoring": 0.0}
        with _timed(seconds, "rollout"):
            rollouts = self.sample(batch)
        students = [prompt for prompt in batch.student for _ in range(rollouts.n)]
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        with _timed(seconds, "scoring"):
            correction = self._correction(students, rollouts)
            if self.updates_per_batch > 1 and rollouts.sampled:
                agree = self.most_over_ranks
                rollouts = with_logprobs(self.model, students, rollouts, self.token_budget, self.objective, agree)
            prepared = self.prepare(batch, rollouts)
        first: tuple[float, dict[str, list[Tensor]]] | None = None
        for update in range(self.updates_per_batch):
            if update and self.global_step >= self.trainer.max_steps >= 0:
                break
            optimizer.zero_grad()
            torch.manual_seed(seed_for(self.seed, "dropout", self.global_step, replica(self.trainer)[0]))
            with _timed(seconds, "scoring"):
                # In the first update all ratios are 1; traces are no samples of the student's, and have none.
                ratios = self._ratios(students, rollouts) if update and rollouts.sampled else None
                terms = self.terms(prepared, rollouts, ratios)
                if correction is not None:
                    terms = [t._replace(weights=[w * c for w, c in zip(t.weights, correction, strict=True)]) for t in terms]
                found = self._backward(students, rollouts, terms)
            if first is None:
                first, self.current = found, Update(batch, students, rollouts, terms, found[1])
            # A rate of 0 by the optimizer itself is warned of when it is made.
            rates = [float(group.get("lr", 1.0)) for group in optimizer.param_groups]
            stands_still = self.make_scheduler is not None and not any(rates)
            grad_norm = self._update(optimizer, found, len(terms))
            if self.current is not None:
                self._watch(rollouts, terms, grad_norm, stands_still)
            self.current = None
        assert first is not None
        self._log_step(rollouts, first[1], first[0], seconds)
        return {"loss": torch.tensor(first[0]), "rollouts": rollouts, "measured": first[1]}

    def _update(self, optimizer: LightningOptimizer, found: tuple[float, dict[str, list[Tensor]]], terms: int) -> float:
        """Make an optimizer step from what `_backward` found, and return the gradient's norm."""
        loss, measured = found
        if not abs(loss) < _INFINITE:
            self._stop(f"the loss is {loss} at step {self.global_step}")
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if terms == 1 and self._agree_to_rounding(measured):
            optimizer.zero_grad(set_to_none=False)
        grad_norm = float(whole(torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm or math.inf)))
        if not math.isfinite(grad_norm):
            self._stop(f"the gradient's norm is {grad_norm} at step {self.global_step}, loss {loss}")
        with checkpoint_file.restoring(None) if self._resumed else nullcontext():  # its state is used for the first time
            optimizer.step()
        adapter_norm = float(whole(torch.nn.utils.get_total_norm([p.detach() for p in parameters])))
        if not math.isfinite(adapter_norm):  # before a teacher follows, or a checkpoint is written
            self._stop(f"the norm of the trained weights is {adapter_norm} after step {self.global_step}, loss {loss}")
        if (scheduler := self.lr_schedulers()) is not None:
            with checkpoint_file.restoring(None) if self._resumed else nullcontext():
                scheduler.step()  # type: ignore[union-attr, call-arg]
        self._resumed = False
        self.after_update()
        self.log_dict({"train/grad_norm": grad_norm, "train/adapter_norm": adapter_norm}, batch_size=1)

        return grad_norm

    def _stop(self, problem: str) -> NoReturn:
        """End the run. No checkpoint is written from now on, also not by a callback that saves on exceptions."""
        self._diverged = RuntimeError(
            f"{problem}: lower the learning rate, clip (model.objective.init_args.clip), or compute in bfloat16 or float32; "
            "the last checkpoint is still good"
        )
        raise self._diverged

    def _agree_to_rounding(self, measured: dict[str, list[Tensor]]) -> bool:
        """Whether both roles give every token of all ranks the same distribution, but for rounding. Every rank must call."""
        if "forward_kl" not in self.measured:
            return False
        columns = [row for name in ("forward_kl", "reverse_kl") for row in measured.get(name, [])]
        return self.over_ranks([float(torch.cat([torch.zeros(1), *columns]).abs().max())], "max")[0] <= _ROUNDING

    def _watch(self, rollouts: Rollouts, terms: list[Term], grad_norm: float, stands_still: bool) -> None:
        """Warn of steps in a row that teach nothing. Every rank must call; all come to the same."""
        ends = eos_ids(self.model)
        written = [sum(token not in ends for token in completion) for completion in rollouts.completions]
        weighted = sum(int((weight != 0).sum()) for weight in terms[0].weights)
        counts = self.over_ranks([sum(written), weighted, rollouts.terminated.count(True)], "sum")
        longest = int(self.over_ranks([max(map(len, rollouts.completions), default=0)], "max")[0])
        self._warn_of_rounding()
        reason = None
        if not counts[0]:
            reason = "every completion is empty, an EOS at once; look at the end of the student's prompts (opsd doctor)"
        elif not counts[1]:
            reason = self._without_weight(longest, not counts[2])
        elif grad_norm == 0:
            reason = self.idle_reason
        elif stands_still:
            reason = "the learning rate is 0 (model.lr_scheduler)"
        if self.idle.add(reason):
            rank_zero_warn(f"step {self.global_step}: {self.idle.problem}")

    def _warn_of_rounding(self) -> None:
        """Warn at the first step where both roles agree as far as half precision tells. Every rank must call."""
        if self.idle.steps or "forward_kl" not in self.measured or self.current is None:
            return
        half = str(self.trainer.precision).startswith("bf16") or base_of(self.model).dtype == torch.bfloat16
        divergence = torch.cat([torch.zeros(0), *self.current.measured.get("forward_kl", [])])
        total, count = self.over_ranks([float(divergence.sum()), divergence.numel()], "sum")
        if half and count and 0 < total / count < _HALF_ROUNDING:
            rank_zero_warn(
                f"the teacher and the student differ by {total / count:.1e} nats a token at the first step. In bfloat16 "
                "that may be rounding alone, of which an optimizer such as Adam makes full steps. For a control whose "
                "teacher reads what the student reads (NoContext), set trainer.precision to 32-true and "
                "model.policy.dtype to float32"
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

    def _correction(self, students: list[list[int]], rollouts: Rollouts) -> list[Tensor] | None:
        """Log how far the sampler was from the student, stop where it is too far, and weigh tokens where that is asked."""
        if rollouts.logprobs is None:
            return None
        agree = self.most_over_ranks  # engines report log-probabilities at temperature 1
        found = log_ratios(self.model, students, rollouts, self.token_budget, self.objective, agree, 1.0)
        away = torch.cat([*found, torch.zeros(1)]).abs()
        total, count = self.over_ranks([float(away.sum()), float(away.numel() - 1)], "sum")
        difference, most = total / max(count, 1), self.over_ranks([float(away.max())], "max")[0]
        self.log("train/rollout_logprob_difference", difference, batch_size=1)
        self.log("train/rollout_logprob_difference_max", most, batch_size=1)
        check_difference(difference, self.rollouts.logprob_tolerance)
        limit = self.rollouts.max_importance_ratio
        return None if limit is None else self.cut_off([row.exp() for row in found], limit, "importance_ratio")

    def _ratios(self, students: list[list[int]], rollouts: Rollouts) -> list[Tensor]:
        agree, temperature = self.most_over_ranks, self.objective.temperature
        found = log_ratios(self.model, students, rollouts, self.token_budget, self.objective, agree, temperature)
        return [row.exp() for row in found]

    def log_grading(self, problems: Sequence[str]) -> None:
        """Log how many of a step's completions are wrong for want of a verdict. Every rank must call."""
        counts = self.over_ranks([sum(found == problem for found in problems) for problem in PROBLEMS.values()], "sum")
        self.log_dict({f"train/{name}": count for name, count in zip(PROBLEMS, counts, strict=True)}, batch_size=1)

    def cut_off(self, ratios: list[Tensor], limit: float, name: str) -> list[Tensor]:
        """Ratios of at most ``limit``; logs their mean, maximum and how many were above. Every rank must call."""
        flat = torch.cat([*ratios, torch.zeros(1)])
        total, above, count = self.over_ranks([float(flat.sum()), float((flat > limit).sum()), flat.numel() - 1], "sum")
        most = self.over_ranks([float(flat.max())], "max")[0]
        logged = {"": total / max(count, 1), "_max": most, "_clipped": above / max(count, 1)}
        self.log_dict({f"train/{name}{ending}": value for ending, value in logged.items()}, batch_size=1)
        return [row.clamp(max=limit) for row in ratios]

    def shares(self, weights: list[Tensor]) -> list[Tensor]:
        """Weights of tokens divided by their sum over the whole step and all ranks. Every rank must call."""
        total = max(*self.over_ranks([float(torch.cat([*weights, torch.zeros(1)]).sum())], "sum"), 1e-12)
        return [weight / total for weight in weights]

    def _backward(
        self, students: list[list[int]], rollouts: Rollouts, terms: list[Term]
    ) -> tuple[float, dict[str, list[Tensor]]]:
        """Score all rollouts, micro-batch by micro-batch, and accumulate the gradient of the step's loss."""
        sizes = [len(completion) for completion in rollouts.completions]
        states = [None if term.teacher is None else term.teacher.hidden.split(sizes) for term in terms]
        plan = split_rows(self.model, [len(s) + n for s, n in zip(students, sizes, strict=True)], self.token_budget)
        # Under sharding every rank must make the same number of passes: one that has none left makes empty ones.
        passes = self.most_over_ranks(len(plan))
        loss = 0.0
        measured: dict[str, list[Tensor]] = {}
        for number, rows in enumerate(plan + [[]] * (passes - len(plan))):
            # An empty pass is the first prompt with no completion: no token, a loss of zero that keeps its graph.
            picked = rows or [0]
            completions = [rollouts.completions[i] if rows else [] for i in picked]
            student, targets = score(self.model, [students[i] for i in picked], completions)
            parts = []
            for term, rows_of_teacher in zip(terms, states, strict=True):
                weight = torch.cat([term.weights[i] for i in rows] or [torch.zeros(0)]).to(targets.device)
                teacher = None
                if term.teacher is not None and rows_of_teacher is not None:
                    hidden = torch.cat([rows_of_teacher[i] for i in rows] or [term.teacher.hidden[:0]])
                    teacher = TokenStates(hidden, term.teacher.head)
                part, tokens = term.objective(student, teacher, targets, weight)
                parts.append(part)
                if len(parts) > 1:
                    continue  # the first term's tokens are what is logged
                for name, values in tokens.items():
                    store = measured.setdefault(name, [torch.zeros(0)] * len(students))
                    for i, value in zip(picked, values.cpu().split([len(c) for c in completions]), strict=True):
                        store[i] = value
            total = torch.stack(parts).sum()
            # Distributed strategies average gradients over ranks; the weights already divide by all ranks' tokens.
            with nullcontext() if number == passes - 1 else unsynchronized(self.trainer.strategy):
                self.manual_backward(total * replica(self.trainer)[1])
            loss += float(total.detach())
        return self.over_ranks([loss], "sum")[0], measured

    def _log_step(
        self, rollouts: Rollouts, measured: dict[str, list[Tensor]], loss: float, seconds: dict[str, float]
    ) -> None:
        nothing = [torch.zeros(0)] * len(rollouts.completions)
        columns = [measured.get(name, nothing) for name in self.measured]
        first = [row[0] for row in measured.get("forward_kl", nothing) if len(row)]
        lengths = [len(completion) for completion in rollouts.completions]
        counts = (rollouts.tokens, sum(first), len(first), len(lengths), rollouts.terminated.count(False))
        sums = [float(torch.cat(column).sum()) for column in columns] + [float(count) for count in counts]
        *token_sums, tokens, first_sum, first_count, rows, truncated = self.over_ranks(sums, "sum")
        shortest, longest = self.over_ranks([-min(lengths), max(lengths)], "max")
        self.tokens_generated += int(tokens) if rollouts.sampled else 0
        means = {name: value / max(tokens, 1) for name, value in zip(self.measured, token_sums, strict=True)}
        if "clipped" in means:
            means["clipped_fraction"] = means.pop("clipped")
        bar = {"train/loss": loss}
        if "forward_kl" in means:
            bar["train/forward_kl"] = means.pop("forward_kl")
            means["first_token_forward_kl"] = first_sum / max(first_count, 1)
        self.log_dict(bar, prog_bar=True, batch_size=1)
        values = {f"train/{name}": value for name, value in means.items()}
        values |= {
            "train/completion_tokens_min": -shortest,
            "train/completion_tokens_max": longest,
            "train/eos_rate": 1 - truncated / rows,
            "train/tokens_generated": float(self.tokens_generated),
        }
        for phase, elapsed in seconds.items():
            values[f"time/{phase}_seconds"] = elapsed
            values[f"time/{phase}_tokens_per_second"] = rollouts.tokens / max(elapsed, 1e-9)
        self.log_dict(values, batch_size=1)
        bar = {"train/completion_tokens": tokens / rows, "train/truncated_fraction": truncated / rows}
        self.log_dict(bar, prog_bar=True, batch_size=1)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The adapters' weights alone: never the base model's, but in full fine-tuning."""
        state = super().state_dict(*args, **kwargs)
        return {key: value for key, value in state.items() if self.policy.trains_all or is_adapter_key(key)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._diverged is not None:
            raise self._diverged
        checkpoint["opsd_tokens_generated"] = self.tokens_generated
        checkpoint[checkpoint_record.KEY] = checkpoint_record.record_of(self)
        requeue.say_the_job(checkpoint)
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            say_what_is_due(self.trainer, checkpoint, self.validated)

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
        """Build a module from a checkpoint's file, with the settings that a command-line run wrote into it.

        Args:
            checkpoint_path: A local file.
            map_location: As in ``torch.load``.
            hparams_file: Not supported: give the settings themselves.
            strict: Has to be left out: checkpoints hold the adapters alone.
            weights_only: True, whether or not it is given.
            **settings: Arguments of the class that take the place of the checkpoint's.

        Raises:
            ConfigError: The file is remote or not a safe checkpoint, or its settings would import other modules.
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
            check_hidden(checkpoint.get("hyper_parameters", {}))
        self.tokens_generated = checkpoint.get("opsd_tokens_generated", 0)
        self.configure_model()
        with checkpoint_file.restoring(None):
            if "opsd_compared" not in checkpoint:  # a strategy may have called this before
                checkpoint["opsd_compared"] = True
                self._settings_changed = checkpoint_record.compare(self, checkpoint)
            checkpoint_record.check_weights(self, checkpoint)
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            do_what_is_due(self._trainer, checkpoint)


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Add the time spent inside. Both phases end by reading numbers off the device, so they wait for it."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[phase] += time.perf_counter() - start
