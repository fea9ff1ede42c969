"""Teachers: the weights that score the student's completions. They never get a gradient.

All but `ModelTeacher` run the student's own network in memory and differ only in the active adapter. Source: arXiv
2601.18734, section 3 (fixed initial policy; EMA and live teachers are its ablations; a separate model is a baseline).

| class | weights | can generate | stays as it is |
|---|---|---|---|
| `FixedTeacher` | the initial policy | yes | yes |
| `LiveTeacher` | the student's current weights | yes | no |
| `EMATeacher` | moving average of the student | yes | no |
| `SyncTeacher` | copy of the student, renewed every n steps | yes | no |
| `TrustRegionTeacher` | mixture of fixed and live logits | no | no |
| `ModelTeacher` | another model | no | yes |
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase

from opsd_lightning.models.fingerprint import base_record
from opsd_lightning.models.policy import STUDENT, TEACHER, LoRA, OtherModel, base_of, device_of, evaluating
from opsd_lightning.models.scoring import Scorer, has_adapted_head, head_of, moving_weights
from opsd_lightning.types import ClosedUnitInterval, ConfigError, OpenUnitInterval, PositiveInt, TokenStates, checked


class Teacher(ABC):
    """The role that reads the privileged context and scores the student's completions.

    A teacher may keep weights in the policy as the frozen adapter ``teacher``, which every checkpoint then holds.

    Attributes:
        privileged: If True, the teacher reads the privileged context. If False, it reads the student's prompt.
        setting: Dotted name of the teacher in the configuration, for messages.
        keeps_head: If True, states contain a copy of the trainable weights of the head, because several optimizer steps use
            the same states.
    """

    privileged: bool = True
    setting: str = "model.teacher"
    keeps_head: bool = False

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise `ConfigError` if the teacher does not fit the policy's tokenizer. Called before `attach`."""

    def attach(self, model: PeftModel) -> None:
        """Add the teacher's own weights to the newly built policy. Called once, before training and sharding."""

    def context_length(self) -> int | None:
        """Return the largest number of tokens, prompt and completion, that fits. None if only the policy's limit holds."""
        return None

    def network(self, model: PeftModel) -> PeftModel | None:
        """Return the teacher's network, on the policy's device. None if it is the policy's own."""
        return None

    @abstractmethod
    def score(self, scorer: Scorer, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> TokenStates:
        """Score completions with the teacher's weights, without gradient and dropout. Every rank must call.

        Args:
            scorer: A scorer of the policy.
            prompts: The teacher's prompt of each completion.
            completions: The student's completions, T tokens in total.

        Returns:
            States of shape [T, D]. See `Scorer.score`.
        """

    def after_step(self, model: PeftModel, step: int) -> None:
        """Follow the student. Called after every optimizer step with the number of steps so far."""


class GenerativeTeacher(Teacher):
    """A teacher whose weights fit the student's network, so that it can also generate text."""

    @abstractmethod
    def weights(self, model: PeftModel) -> AbstractContextManager[None]:
        """Return a context manager in which the policy computes with the teacher's weights."""

    @torch.no_grad()
    def score(self, scorer: Scorer, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> TokenStates:
        model = scorer.model
        with self.weights(model):
            states = scorer.score(prompts, completions)
            kept = moving_weights(model) if self.keeps_head else None
        own = head_of(model, kept) if kept else states.head
        if isinstance(model, PeftModel) and not has_adapted_head(model):
            return TokenStates(states.hidden, own)

        def head(hidden: Tensor) -> Tensor:  # student and teacher have different heads
            with evaluating(model), self.weights(model):
                return own(hidden)

        return TokenStates(states.hidden, head)


class ReferenceTeacher(Teacher):
    """A teacher that never changes, which an `Anchor` needs."""


class FixedTeacher(GenerativeTeacher, ReferenceTeacher):
    """The initial policy, as the authors recommend. The default.

    With a fresh adapter, that is the base model with the adapter disabled. If training starts from an adapter that already
    changes the model, a frozen copy of that adapter is kept. In full fine-tuning, a copy of all weights is kept.
    """

    # In full fine-tuning, the initial weights, in the order of the model's parameters.
    _start: list[Tensor] | None = None
    _base_weights: bool = False

    def attach(self, model: PeftModel) -> None:
        if not isinstance(model, PeftModel):
            self._start = [parameter.detach().clone() for parameter in model.parameters()]
        elif not is_identity(model):
            _add_frozen_copy(model)

    def share(self, other: FixedTeacher) -> None:
        """Use the weights that another fixed teacher of the same policy keeps in full fine-tuning."""
        self._start = other._start

    def use_base_weights(self) -> None:
        """Score with the base model, all adapters disabled, even if another teacher keeps an adapter."""
        self._base_weights = True

    def weights(self, model: PeftModel) -> AbstractContextManager[None]:
        if self._start is not None:
            return _exchanged(list(model.parameters()), self._start)
        if self._base_weights or TEACHER not in model.peft_config:
            return without_adapter(model)
        return _using_teacher_adapter(model)


class LiveTeacher(GenerativeTeacher):
    """The student's current weights. Training can become unstable, because the teacher follows every step."""

    @contextmanager
    def weights(self, model: PeftModel) -> Iterator[None]:
        yield


class _AdapterCopy(GenerativeTeacher):
    """A frozen copy of the student's adapter: teacher <- decay teacher + (1 - decay) student, every some steps."""

    @abstractmethod
    def __init__(self, decay: float, update_every_steps: int) -> None:
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
class EMATeacher(_AdapterCopy):
    """An exponential moving average of the student's adapter: teacher <- decay teacher + (1 - decay) student.

    The average is of the factors A and B, as is common, and not of their product B A.

    Args:
        decay: Weight of the past in each update, from 0 to 1. Common values are 0.999 (the authors') to 0.95.
        update_every_steps: Optimizer steps between updates. At least 1.

    Example::

        >>> from opsd_lightning import EMATeacher
        >>> EMATeacher(decay=0.99).decay
        0.99
    """

    def __init__(self, decay: ClosedUnitInterval = 0.999, update_every_steps: PositiveInt = 1) -> None:
        super().__init__(decay, update_every_steps)


@checked
class SyncTeacher(_AdapterCopy):
    """A copy of the student's adapter that is renewed every few optimizer steps.

    Args:
        every_n_steps: Optimizer steps between copies. At least 1.
    """

    def __init__(self, every_n_steps: PositiveInt = 25) -> None:
        super().__init__(0.0, every_n_steps)


@checked
class TrustRegionTeacher(Teacher):
    """A mixture of the initial policy and the student: logits are (1 - weight) fixed + weight live.

    Its distribution is the normalized geometric mean of both, so that it follows the student but stays near the initial
    policy. It costs a second scoring pass.

    Args:
        weight: Share of the student's logits, above 0 and below 1.
    """

    def __init__(self, weight: OpenUnitInterval = 0.1) -> None:
        self.weight = weight
        self._fixed = FixedTeacher()

    @property
    def fixed(self) -> FixedTeacher:
        """The teacher of the fixed logits."""
        return self._fixed

    def attach(self, model: PeftModel) -> None:
        self._fixed.attach(model)

    def score(self, scorer: Scorer, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> TokenStates:
        live_teacher = LiveTeacher()
        live_teacher.keeps_head = self._fixed.keeps_head = self.keeps_head
        fixed = self._fixed.score(scorer, prompts, completions)
        live = live_teacher.score(scorer, prompts, completions)
        width = fixed.hidden.shape[-1]

        def head(hidden: Tensor) -> Tensor:
            start, now = _full(fixed.head(hidden[:, :width])), _full(live.head(hidden[:, width:]))
            with torch.autocast(hidden.device.type, enabled=False):
                return torch.lerp(start, now, self.weight)

        return TokenStates(torch.cat([fixed.hidden, live.hidden], dim=-1), head)


@checked
class ModelTeacher(ReferenceTeacher):
    """Another model, in memory beside the policy: on-policy distillation from a separate teacher.

    Without ``model``, in full fine-tuning (``model.policy.lora: null``), a frozen copy of the initial policy.

    Args:
        model: A Hugging Face id, a local folder, or a ``.gguf`` file. Its vocabulary must be the policy's. Rows that do not
            fit its context are left out of training, and counted.
        privileged: If True, the teacher reads the privileged context instead of the student's prompt.
        dtype: Type of the weights. ``auto`` takes the checkpoint's.
        quantization: As ``model.policy.quantization``.
        revision: Branch, tag or commit of a Hugging Face id.
        max_length: As ``model.policy.max_length``.
    """

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
            raise ConfigError(
                f"the tokens of {self.recipe.model} are not those of model.policy.model, so that their distributions cannot "
                "be compared",
                f"{self.setting}.model",
                "Choose a teacher of the same family",
            )

    def attach(self, model: PeftModel) -> None:
        if self.recipe is not None:
            self._network = self.recipe.build(device_of(model))
            self.base = base_record(self.recipe, self._network)
            if (theirs := _vocabulary(self._network)) < (ours := _vocabulary(model)):
                raise ConfigError(
                    f"{self.recipe.model} gives {theirs} logits and model.policy.model {ours}, which cannot be compared",
                    f"{self.setting}.model",
                    "Choose a teacher with at least as many logits",
                )
        elif isinstance(model, PeftModel):
            raise ConfigError(
                "ModelTeacher without a model is a copy for full fine-tuning, and the policy has an adapter",
                self.setting,
                "Use FixedTeacher, which needs no copy, or name a model",
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

    @torch.no_grad()
    def score(self, scorer: Scorer, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> TokenStates:
        longest = max(len(prompt) + len(completion) for prompt, completion in zip(prompts, completions, strict=True))
        if (limit := self.context_length()) is not None and longest > limit:
            raise ConfigError(
                f"a prompt and completion of {longest} tokens do not fit the context of {limit} tokens",
                self.setting,
                "Choose a teacher with a longer context, or lower model.sampling.max_new_tokens or "
                "data.prompts.max_trace_tokens",
            )
        states = scorer.of(self.network(scorer.model)).score(prompts, completions)
        vocabulary = _vocabulary(scorer.model)

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
    """Swap parameter values inside the context, without a copy, and restore them bit by bit."""
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
    """Return logits in at least float32: a mixture in half precision would be rounded twice."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _vocabulary(model: PeftModel) -> int:
    """Return the number of logits. Models of one family pad their vocabularies to different sizes."""
    return int(base_of(model).get_output_embeddings().weight.shape[0])


def is_identity(model: PeftModel) -> bool:
    """Return True if the adapter changes nothing yet, so that the initial policy is the base model."""
    lora = [p for name, p in model.named_parameters() if f".lora_B.{STUDENT}" in name or f"embedding_B.{STUDENT}" in name]
    if not lora:
        raise ConfigError("EMA and fixed teachers need a LoRA adapter; the policy has none", "model.policy.lora", "Set it")
    return not any(bool(p.any()) for p in lora)


def _add_frozen_copy(model: PeftModel) -> None:
    if STUDENT not in model.peft_config:
        raise ConfigError("the policy has no LoRA adapter for the teacher to copy", "model.policy.lora", "Set it")
    model.add_adapter(TEACHER, copy.deepcopy(model.peft_config[STUDENT]))
    model.set_adapter(STUDENT)
    with torch.no_grad():
        for teacher, student in _pairs(model):
            teacher.copy_(student)
            teacher.requires_grad_(False)


def _pairs(model: PeftModel) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    """Yield each parameter of the teacher's adapter with the student's."""
    parameters = dict(model.named_parameters())
    for name, teacher in parameters.items():
        parts = name.split(".")
        if TEACHER in parts:
            yield teacher, parameters[".".join(STUDENT if part == TEACHER else part for part in parts)]  # type: ignore[misc]


@contextmanager
def without_adapter(model: PeftModel) -> Iterator[None]:
    """Disable all adapters inside the context."""
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
    """Restore ``requires_grad``, which peft changes when it switches adapters."""
    # Under sharding, gathering inside the context may replace a parameter object: both objects get their flag back.
    before = {name: (parameter, parameter.requires_grad) for name, parameter in model.named_parameters()}
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            for each in (before[name][0], parameter):
                each.requires_grad_(before[name][1])
