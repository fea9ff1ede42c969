"""Whose weights the teacher scores with; it never gets a gradient.

All but `ModelTeacher` are the same network in the student's memory, and differ only in which adapter is active. Source:
arXiv 2601.18734, section 3 (fixed initial policy; EMA and live teachers are its ablations; a separate one is a baseline).
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase

from opsd_lightning.models.fingerprint import base_record
from opsd_lightning.models.policy import STUDENT, TEACHER, LoRA, OtherModel, base_of, device_of, evaluating
from opsd_lightning.models.scoring import has_adapted_head, head_of, moving_weights, score_all
from opsd_lightning.types import (
    ClosedUnitInterval,
    ConfigError,
    OpenUnitInterval,
    PositiveInt,
    TokenStates,
    UserError,
    checked,
)


class Teacher(ABC):
    """The role that has read the reference solution.

    What a teacher keeps lives in the policy as the frozen adapter ``teacher``, and so in every checkpoint.

    Attributes:
        privileged: Whether it reads the privileged context, or the student's own prompt.
        writes: Whether it can sample: `weights` are then all that it computes with.
        setting: Where it stands in the configuration, for messages.
        keeps_head: Keep the head's weights of the time of scoring, for several optimizer steps on the same states.
    """

    privileged: bool = True
    writes: bool = True
    setting: str = "model.teacher"
    keeps_head: bool = False

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise `UserError` where it does not go with the policy's tokenizer. Called before `attach`."""

    def attach(self, model: PeftModel) -> None:
        """Called once on the freshly built policy, before any training: add what the teacher keeps."""

    def context_length(self) -> int | None:
        """The most tokens (prompt and completion) that it scores; None where that is the policy's own limit, or unknown."""
        return None

    def network(self, model: PeftModel) -> PeftModel | None:
        """Return the network that it scores with where that is not the policy's, on the policy's device."""
        return None

    @abstractmethod
    def weights(self, model: PeftModel) -> AbstractContextManager[None]:
        """Inside, the policy computes with the teacher's weights; after, with the student's again."""

    def after_step(self, model: PeftModel, step: int) -> None:
        """Called after every optimizer step, with the number of steps made so far."""

    @torch.no_grad()
    def score(
        self,
        model: PeftModel,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        token_budget: int = 8192,
        agree: Callable[[int], int] = lambda passes: passes,
    ) -> TokenStates:
        """The teacher's states at the student's completion tokens; dropout off, no gradient. See `scoring.score_all`."""
        with self.weights(model):
            states = score_all(model, prompts, completions, token_budget, agree)
            kept = moving_weights(model) if self.keeps_head else None
        own = head_of(model, kept) if kept else states.head
        if isinstance(model, PeftModel) and not has_adapted_head(model):
            return TokenStates(states.hidden, own)

        def head(hidden: Tensor) -> Tensor:  # each role has a head of its own
            with evaluating(model), self.weights(model):
                return own(hidden)

        return TokenStates(states.hidden, head)


class FixedTeacher(Teacher):
    """The initial policy, for ever: the authors' recommendation (default).

    With a fresh adapter that is the base model, the adapter switched off. Where training starts from an adapter that
    already does something, a frozen copy of that one is kept; in full fine-tuning, a copy of all weights.
    """

    # In full fine-tuning, the weights at the start, in the order of the model's parameters.
    _start: list[Tensor] | None = None

    def attach(self, model: PeftModel) -> None:
        if not isinstance(model, PeftModel):
            self._start = [parameter.detach().clone() for parameter in model.parameters()]
        elif not is_identity(model):
            _add_frozen_copy(model)

    def share(self, other: FixedTeacher) -> None:
        """Use the weights that another fixed teacher of the same policy keeps in full fine-tuning."""
        self._start = other._start

    def weights(self, model: PeftModel) -> AbstractContextManager[None]:
        if self._start is not None:
            return _exchanged(list(model.parameters()), self._start)
        return _using_teacher_adapter(model) if TEACHER in model.peft_config else without_adapter(model)


class LiveTeacher(Teacher):
    """The student's current weights. Follows the student wherever it goes: can be unstable."""

    @contextmanager
    def weights(self, model: PeftModel) -> Iterator[None]:
        yield


@checked
class EMATeacher(Teacher):
    """An exponential moving average of the student's adapter: teacher <- decay teacher + (1 - decay) student.

    It averages the factors A and B, as everyone does; that is not the average of their products B A.

    Args:
        decay: Weight of the past in each update, from 0 to 1. 0.999 (authors) to 0.95.
        update_every_steps: Optimizer steps from one update to the next, at least 1.
    """

    def __init__(self, decay: ClosedUnitInterval = 0.999, update_every_steps: PositiveInt = 1) -> None:
        self.decay = decay
        self.update_every_steps = update_every_steps

    def attach(self, model: PeftModel) -> None:
        _require_adapter(model, self.setting)
        _add_frozen_copy(model)

    def weights(self, model: PeftModel) -> AbstractContextManager[None]:
        return _using_teacher_adapter(model)

    @torch.no_grad()
    def after_step(self, model: PeftModel, step: int) -> None:
        if step % self.update_every_steps == 0:
            for teacher, student in _pairs(model):
                teacher.lerp_(student.to(teacher.dtype), 1 - self.decay)


@checked
class SyncTeacher(EMATeacher):
    """A hard copy of the student, taken anew every some steps.

    Args:
        every_n_steps: Optimizer steps from one copy to the next, at least 1.
    """

    def __init__(self, every_n_steps: PositiveInt = 25) -> None:
        super().__init__(0.0, every_n_steps)


@checked
class TrustRegionTeacher(FixedTeacher):
    """Between the initial policy and the student: its logits are (1 - weight) fixed + weight live ones.

    Its distribution is the geometric mean of both, so that it follows the student without leaving the start behind. Costs a
    second scoring pass.

    Args:
        weight: Share of the live logits, above 0 and below 1.
    """

    writes = False

    def __init__(self, weight: OpenUnitInterval = 0.1) -> None:
        self.weight = weight

    def score(
        self,
        model: PeftModel,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        token_budget: int = 8192,
        agree: Callable[[int], int] = lambda passes: passes,
    ) -> TokenStates:
        fixed = super().score(model, prompts, completions, token_budget, agree)
        student = LiveTeacher()
        student.keeps_head = self.keeps_head
        live = student.score(model, prompts, completions, token_budget, agree)
        width = fixed.hidden.shape[-1]

        def head(hidden: Tensor) -> Tensor:
            start, now = _full(fixed.head(hidden[:, :width])), _full(live.head(hidden[:, width:]))
            with torch.autocast(hidden.device.type, enabled=False):
                return torch.lerp(start, now, self.weight)

        return TokenStates(torch.cat([fixed.hidden, live.hidden], dim=-1), head)


@checked
class ModelTeacher(Teacher):
    """Another model, in memory beside the policy: on-policy distillation from a separate teacher.

    Without ``model``, in full fine-tuning (``model.policy.lora: null``), a frozen copy of the policy as it starts.

    Args:
        model: A Hugging Face id, a local folder, or a ``.gguf`` file; its tokens must be the policy's. Rows that do not fit
            its context are left out of training, with a count.
        privileged: Whether it reads the privileged context too, instead of the student's own prompt.
        dtype: Type of its weights. ``auto`` takes the checkpoint's own.
        quantization: As of ``model.policy.quantization``.
        revision: Branch, tag or commit of a Hugging Face id.
        max_length: As of ``model.policy.max_length``.
    """

    writes = False

    def __init__(
        self,
        model: str | None = None,
        privileged: bool = False,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        quantization: BitsAndBytesConfig | None = None,
        revision: str | None = None,
        max_length: PositiveInt | None = None,
    ) -> None:
        # With the smallest adapter, which changes nothing: quantized weights are not a policy that trains.
        self.recipe = (
            None
            if model is None
            else OtherModel(model, LoRA(r=1), None, dtype, quantization, revision=revision, max_length=max_length)
        )
        if self.recipe is not None:
            self.recipe.role = self
        self.privileged = privileged
        self._network: Any = None

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if self.recipe is not None and self.recipe.load_tokenizer().get_vocab() != tokenizer.get_vocab():
            raise UserError(
                f"{self.setting}.model: the tokens of {self.recipe.model} are not those of model.policy.model, so that "
                "their distributions cannot be compared: choose a teacher of the same family"
            )

    def attach(self, model: PeftModel) -> None:
        if self.recipe is not None:
            self._network = self.recipe.build(device_of(model))
            self.base = base_record(self.recipe, self._network)
            if (theirs := _vocabulary(self._network)) < (ours := _vocabulary(model)):
                raise UserError(
                    f"{self.setting}.model: {self.recipe.model} gives {theirs} logits, model.policy.model {ours}, and they "
                    "cannot be compared: choose a teacher with at least as many"
                )
        elif isinstance(model, PeftModel):
            raise UserError(
                f"{self.setting} is ModelTeacher without a model, a copy for full fine-tuning; the policy has an adapter, "
                "so take FixedTeacher, which needs no copy, or name a model"
            )
        else:
            self._network = copy.deepcopy(model)
        self._network.requires_grad_(False)

    def context_length(self) -> int | None:
        if self.recipe is None or self._network is None:
            return None if self.recipe is None else self.recipe.context_length()
        return getattr(base_of(self._network), "row_limit", None)

    def network(self, model: PeftModel) -> PeftModel:
        if device_of(self._network) != device_of(model):  # Lightning moves the policy alone
            self._network.to(device_of(model))
        return self._network

    def weights(self, model: PeftModel) -> AbstractContextManager[None]:
        raise NotImplementedError("ModelTeacher scores with a network of its own")

    @torch.no_grad()
    def score(
        self,
        model: PeftModel,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        token_budget: int = 8192,
        agree: Callable[[int], int] = lambda passes: passes,
    ) -> TokenStates:
        network = self.network(model)
        longest = max(len(prompt) + len(completion) for prompt, completion in zip(prompts, completions, strict=True))
        if (limit := self.context_length()) is not None and longest > limit:
            raise UserError(
                f"{self.setting}: a prompt and completion of {longest} tokens do not fit its context of {limit}: choose a "
                "teacher with a longer one, or lower model.sampling.max_new_tokens or data.prompts.max_trace_tokens"
            )
        states = score_all(network, prompts, completions, token_budget, agree)
        vocabulary = _vocabulary(model)

        def head(hidden: Tensor) -> Tensor:
            return states.head(hidden)[:, :vocabulary]

        return TokenStates(states.hidden, head)


def _require_adapter(model: PeftModel, setting: str) -> None:
    if not isinstance(model, PeftModel):
        raise ConfigError(
            "this teacher follows the student's adapter, and model.policy.lora is null (full fine-tuning)",
            setting,
            f"Use FixedTeacher, which keeps a copy of all weights{', or LiveTeacher' * (setting == Teacher.setting)}",
        )


@contextmanager
def _exchanged(parameters: Sequence[nn.Parameter], others: list[Tensor]) -> Iterator[None]:
    """Inside, parameters hold other values; after, their own again, bit by bit. Copies nothing."""
    for place, parameter in enumerate(parameters):
        others[place] = others[place].to(parameter.device)  # Lightning moves the policy alone

    def exchange() -> None:
        for place, parameter in enumerate(parameters):
            parameter.data, others[place] = others[place], parameter.data

    exchange()
    try:
        yield
    finally:
        exchange()


def _full(logits: Tensor) -> Tensor:
    """Logits in at least float32: half precision would round a mixture of two a second time."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _vocabulary(model: PeftModel) -> int:
    """How many logits the model gives: families pad their vocabularies to different sizes."""
    return int(base_of(model).get_output_embeddings().weight.shape[0])


def is_identity(model: PeftModel) -> bool:
    """Whether the fresh adapter changes nothing, so that switching it off gives the policy as it starts."""
    lora = [p for name, p in model.named_parameters() if f".lora_B.{STUDENT}" in name or f"embedding_B.{STUDENT}" in name]
    if not lora:
        raise UserError("the policy has no LoRA adapter: EMA and fixed teachers need one (model.policy.lora)")
    return not any(bool(p.any()) for p in lora)


def _add_frozen_copy(model: PeftModel) -> None:
    if STUDENT not in model.peft_config:
        raise UserError("the policy has no LoRA adapter for the teacher to copy (model.policy.lora)")
    model.add_adapter(TEACHER, copy.deepcopy(model.peft_config[STUDENT]))
    model.set_adapter(STUDENT)
    with torch.no_grad():
        for teacher, student in _pairs(model):
            teacher.copy_(student)
            teacher.requires_grad_(False)


def _pairs(model: PeftModel) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    """Each parameter of the teacher's adapter with the student's own."""
    parameters = dict(model.named_parameters())
    for name, teacher in parameters.items():
        parts = name.split(".")
        if TEACHER in parts:
            yield teacher, parameters[".".join(STUDENT if part == TEACHER else part for part in parts)]  # type: ignore[misc]


@contextmanager
def without_adapter(model: PeftModel) -> Iterator[None]:
    """Inside, the policy computes with its base weights alone."""
    with _keeping_requires_grad(model), model.disable_adapter():
        yield


@contextmanager
def _using_teacher_adapter(model: PeftModel) -> Iterator[None]:
    with _keeping_requires_grad(model):
        model.set_adapter(TEACHER)
        try:
            yield
        finally:
            model.set_adapter(STUDENT)


@contextmanager
def _keeping_requires_grad(model: PeftModel) -> Iterator[None]:
    """peft switches ``requires_grad`` along with adapters: what trains is not the teacher's to decide."""
    # Under sharding another object, gathered inside, may stand in a parameter's place after: both get their flag back.
    before = {name: (parameter, parameter.requires_grad) for name, parameter in model.named_parameters()}
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            for each in (before[name][0], parameter):
                each.requires_grad_(before[name][1])
