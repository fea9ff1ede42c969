"""The single LoRA-adapted causal language model that plays both roles: how it is loaded.

`Policy` is the recipe (plain settings, so that it travels through YAML and checkpoints); `Policy.build` makes the model.
Base weights are frozen; the trainable adapter is called ``default``, as peft calls it, and a teacher may add a second,
frozen one called ``teacher``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import load_peft_weights
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from opsd_lightning.models.adapter_checks import check_adapter_config
from opsd_lightning.models.base_checks import (
    check_adapted,
    check_config,
    check_folder,
    check_tensors,
    check_vocabulary,
    not_adapted,
)
from opsd_lightning.models.gguf_header import check_gguf
from opsd_lightning.models.rope import constant_length, fix_frequencies, row_limit
from opsd_lightning.types import ConfigError, PositiveFloat, PositiveInt, Probability, UserError, checked

STUDENT = "default"
TEACHER = "teacher"


@checked
@dataclass(frozen=True)
class LoRA:
    """The trainable low-rank adapter (peft's ``LoraConfig``).

    Args:
        r: Rank, at least 1. The paper's is 64.
        alpha: Scale: the update is alpha / r times B A. The paper's is 128.
        dropout: Probability of dropping an input of A while training, from 0 to below 1.
        target_modules: ``all-linear``, or names of linear layers such as ``[q_proj, v_proj]``. ``all-linear`` leaves out the
            head, routers that are no plain linear layers, and modules that never see text, such as a vision tower.
        options: Any further fields of peft's ``LoraConfig``, by name, such as ``{use_rslora: true}``.
    """

    r: PositiveInt = 64
    alpha: PositiveFloat = 128.0
    dropout: Probability = 0.05
    target_modules: str | list[str] = "all-linear"
    options: dict[str, Any] = field(default_factory=dict)

    def config(self) -> LoraConfig:
        start = self.options.get("init_lora_weights", True)
        if isinstance(start, str) and start not in ("gaussian", "orthogonal"):
            raise UserError(
                f"model.policy.lora.options.init_lora_weights: {start!r} changes the base weights, so that the exported "
                "adapter would not fit the model it is loaded on; leave it out, or use gaussian or orthogonal"
            )
        try:
            return LoraConfig(
                r=self.r,
                lora_alpha=self.alpha,  # type: ignore[arg-type]
                lora_dropout=self.dropout,
                target_modules=self.target_modules,
                task_type="CAUSAL_LM",
                **self.options,
            )
        except (TypeError, ValueError) as error:
            raise UserError(f"model.policy.lora does not make a peft LoraConfig: {error}") from None


@checked
@dataclass(frozen=True)
class Policy:
    """The LoRA-adapted causal language model: what to load and how.

    Args:
        model: A Hugging Face id, a local folder, or a ``.gguf`` file (dequantized on loading).
        lora: The trainable adapter's settings. Left alone where ``adapter`` is given: that adapter has its own. Null for
            full fine-tuning: all weights train, and checkpoints hold them all.
        adapter: A trained LoRA adapter to start from, a peft folder or Hugging Face id. The fixed teacher is then the
            model with this adapter, not the base below it.
        dtype: Type of the base weights. ``auto`` takes the checkpoint's own. The adapter stays in float32.
        quantization: How base weights are quantized as they are loaded, by transformers: 4-bit NF4 with ``load_in_4bit:
            true, bnb_4bit_quant_type: nf4``, or 8-bit with ``load_in_8bit: true``. Not quantized unless given.
        attn_implementation: ``eager``, ``sdpa``, ``flash_attention_2``, ...; transformers' choice unless given.
        max_length: Length limit of a row (prompt and completion) in tokens; longer rows are left out of the data. Defaults
            to the model's context, and for RoPE that changes with the length (``longrope``, ``dynamic``) to the length from
            which it does. With a larger value all rows are computed with the frequencies of rows of that length.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more time.
        pad_token: Token to pad with, for a tokenizer that has none, such as its EOS token. Pads never reach the loss.
        chat_template: A Jinja file, for a tokenizer that has no chat template or to replace the one it has.
        revision: Branch, tag or commit of a Hugging Face id.
        trust_remote_code: Run code that the model's repository brings. Off unless you have read it.
    """

    model: str
    lora: LoRA | None = field(default_factory=LoRA)
    adapter: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: BitsAndBytesConfig | None = None
    attn_implementation: str | None = None
    gradient_checkpointing: bool = False
    pad_token: str | None = None
    chat_template: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    max_length: PositiveInt | None = None

    def __post_init__(self) -> None:
        if self.quantization is not None and self.trains_all:
            raise UserError(
                "model.policy.lora is null (full fine-tuning), but model.policy.quantization is set, and quantized weights "
                "cannot train: leave one of them out"
            )
        if self.quantization is not None and self.model.endswith(".gguf"):
            raise UserError(f"{self.setting}.quantization does not go with a .gguf file: convert it to a folder first")

    @property
    def setting(self) -> str:
        """What messages name in front of a field."""
        return "model.policy"

    @property
    def trains_all(self) -> bool:
        """Whether all weights train, instead of an adapter on them."""
        return self.lora is None and self.adapter is None

    def _where(self) -> dict[str, Any]:
        """The arguments of ``from_pretrained`` that say what to load."""
        path = Path(self.model).expanduser()
        gguf = path.suffix == ".gguf"
        local = gguf or path.is_absolute() or self.model.startswith((".", "~")) or self.model.count("/") > 1
        if local and not path.exists():
            raise UserError(f"{self.setting}.model: {self.model} does not exist; give a Hugging Face id, folder or .gguf")
        if path.is_dir():
            check_folder(path, f"{self.setting}.model")
        common = {"trust_remote_code": self.trust_remote_code, "revision": self.revision or "main"}
        if gguf:
            check_gguf(path, f"{self.setting}.model")
            return common | {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        return common | {"pretrained_model_name_or_path": str(path) if local else self.model}

    def _load(self, loader: Callable[..., Any], **kwargs: Any) -> Any:
        where = self._where()
        try:
            return loader(**where, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # each format and class of configuration fails in its own way
            reason = str(error).strip().splitlines()
            raise UserError(
                f"{self.setting}.model: cannot load {self.model!r} ({reason[0] if reason else type(error).__name__}); give "
                "a causal language model's Hugging Face id, local folder or .gguf file"
            ) from error

    def load_config(self) -> PretrainedConfig:
        """The model's configuration, without its weights."""
        config: PretrainedConfig = self._load(AutoConfig.from_pretrained)
        check_config(config, f"{self.setting}.model")
        return config

    def context_length(self) -> int | None:
        """The most tokens (prompt and completion) that the model takes, or None where its configuration is silent."""
        return row_limit(self.load_config(), self.max_length, f"{self.setting}.max_length")

    def limit_hint(self) -> str:
        """Return what a message on rows that are too long adds: the setting that allows longer ones, if one does."""
        if self.max_length is None and constant_length(self.load_config()) is None:
            return ""
        return f" ({self.setting}.max_length)"

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with a chat template and a pad token."""
        tokenizer: PreTrainedTokenizerBase = self._load(AutoTokenizer.from_pretrained)
        if self.chat_template is not None:
            try:
                tokenizer.chat_template = Path(self.chat_template).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
                raise UserError(f"model.policy.chat_template: cannot read {self.chat_template} ({reason})") from None
        if not tokenizer.chat_template:
            raise UserError(
                f"the tokenizer of {self.model} has no chat template: choose an instruction-tuned model, or give a Jinja "
                "file as model.policy.chat_template"
            )
        if self.pad_token is not None:
            if tokenizer.convert_tokens_to_ids(self.pad_token) in (None, tokenizer.unk_token_id):
                raise UserError(f"model.policy.pad_token: {self.pad_token!r} is not a token of {self.model}")
            tokenizer.pad_token = self.pad_token
        if tokenizer.pad_token_id is None:
            raise UserError(
                f"the tokenizer of {self.model} has no pad token: set model.policy.pad_token, for example to its EOS token "
                f"{tokenizer.eos_token!r}"
            )
        return tokenizer

    def end_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Every token that ends a completion, read without the weights; the tokenizer's EOS first.

        Raises:
            UserError: There is none.
        """
        config = self.load_config()
        sources: list[Any] = [tokenizer, config, config.get_text_config()]
        with suppress(OSError, ValueError):  # it may have none
            sources.append(GenerationConfig.from_pretrained(self.model, revision=self.revision or "main"))
        found = [token for source in sources for token in _as_list(getattr(source, "eos_token_id", None))]
        if not found:
            raise UserError(
                f"neither the tokenizer nor the configuration of {self.model} names an EOS token, which must end every "
                "trace that is trained on: set eos_token in its tokenizer_config.json, or take another model.policy.model"
            )
        return list(dict.fromkeys(found))

    def build(self, device: torch.device | None = None) -> PeftModel:
        """Load the base model, quantize it where asked, freeze it and put the trainable adapter on it.

        Args:
            device: Where quantized weights go, which are quantized there. Others load on the CPU.

        Raises:
            UserError: The model or the adapter cannot be loaded, or do not fit each other.
        """
        kwargs: dict[str, Any] = {"dtype": self.dtype}
        if self.attn_implementation is not None:
            kwargs["attn_implementation"] = self.attn_implementation
        if self.quantization is not None:
            kwargs |= {"quantization_config": self.quantization, "device_map": {"": device or torch.device("cpu")}}
        config, tokenizer = self.load_config(), self.load_tokenizer()
        limit = row_limit(config, self.max_length, f"{self.setting}.max_length")
        base: PreTrainedModel
        # Tensors of another shape are refused below, by name.
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        base, info = self._load(AutoModelForCausalLM.from_pretrained, **kwargs)
        if getattr(base, "_hf_peft_config_loaded", False):  # of a base model that the repository's adapter names
            raise ConfigError(f"{self.model} is an adapter", f"{self.setting}.model", "Give it as model.policy.adapter")
        check_tensors(base, info, f"{self.setting}.model")
        check_vocabulary(base, tokenizer, f"{self.setting}.model")
        fix_frequencies(base, limit)
        if self.model.endswith(".gguf"):
            # The weights are plain floats now; left in place, this mark makes transformers refuse to save them.
            del base.config.quantization_config
            base.hf_quantizer = None  # type: ignore[assignment]
        for module in base.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                # On CPUs with that, bitsandbytes' layers repack their weights in the first pass without gradient, such as a
                # rollout's, and stay so: their scales are rounded, and no gradient comes through them any more.
                setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 (untyped)
        self._check_generation_config()
        # The checkpoint's own sampling defaults (a top_k, a repetition penalty) would leak into every rollout that
        # leaves them unset. Only its EOS ids are wanted, all of them: a chat model may have more than its tokenizer's.
        base.generation_config = GenerationConfig(
            eos_token_id=sorted(
                {
                    token
                    for source in (base.generation_config, base.config, tokenizer)
                    for token in _as_list(getattr(source, "eos_token_id", None))
                }
            ),
            pad_token_id=tokenizer.pad_token_id,
        )
        if self.trains_all and self.dtype == "auto" and base.dtype != torch.float32:
            raise UserError(
                f"model.policy.lora is null (full fine-tuning), and the checkpoint's weights are {base.dtype}, which rounds "
                "away what small learning rates change: set model.policy.dtype to float32 and trainer.precision to "
                "bf16-mixed, or the dtype by its name to have it all the same"
            )
        model = self.adapt(base)
        if not self.trains_all and (bias := getattr(model.peft_config[STUDENT], "bias", "none")) != "none":
            raise UserError(
                f"the LoRA adapter trains biases of the base model (bias: {bias}), which a fixed teacher cannot switch "
                "off and a checkpoint does not hold: leave bias out of model.policy.lora.options"
            )
        rounded = [n for n, w in model.named_parameters() if w.requires_grad and w.dtype in (torch.bfloat16, torch.float16)]
        if rounded and not self.trains_all:
            raise ConfigError(
                f"{rounded[0]} trains in the base weights' {base.dtype}, which rounds away what small learning rates change",
                f"{self.setting}.dtype",
                "Set it to float32, or leave modules_to_save out of model.policy.lora.options",
            )
        if self.gradient_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        # `from_pretrained` leaves evaluation mode, in which gradient checkpointing stays off.
        model.train()
        return model

    def _check_generation_config(self) -> None:
        """Refuse a file that cannot be read: transformers would go on without the EOS ids in it."""
        path = Path(self.model).expanduser() / "generation_config.json"
        if path.is_file():
            try:
                json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ConfigError(f"{path} is no JSON ({error})", f"{self.setting}.model", "Correct or remove it") from error

    def adapt(self, base: PreTrainedModel) -> PeftModel:
        """Put the trainable adapter on a base model; where all weights train, the base as it is.

        Raises:
            UserError: The adapter does not fit it.
        """
        if self.trains_all:
            return base  # type: ignore[return-value]  # see `base_of`
        if self.adapter is None:
            assert self.lora is not None
            config = self.lora.config()
            if config.target_modules == "all-linear" and (left_out := not_adapted(base)) is not None:
                config.exclude_modules = _patterns(config.exclude_modules, left_out)
            try:
                model = _as_peft(get_peft_model(base, config))
            except (ValueError, TypeError) as error:
                if self.lora.dropout and "lora_dropout" in str(error):
                    raise ConfigError(
                        f"{type(base).__name__} holds the weights of its experts in one tensor, and LoRA on that takes no "
                        f"dropout, which is set to {self.lora.dropout}",
                        "model.policy.lora.dropout",
                        "Set dropout to 0",
                    ) from None
                if "Mamba" in str(error) and config.exclude_modules is None:
                    raise ConfigError(
                        f"peft puts no adapter on out_proj of {type(base).__name__}, whose weight goes round the layer",
                        "model.policy.lora.options.exclude_modules",
                        "Set it to [out_proj]",
                    ) from None
                raise UserError(f"model.policy.lora does not fit {self.model}: {error}") from None
            check_adapted(model, "model.policy")
            return model
        try:
            config = LoraConfig.from_pretrained(self.adapter)
            if not isinstance(config, LoraConfig):
                raise TypeError(f"it is of kind {config.peft_type}")
            weights = load_peft_weights(self.adapter, device="cpu")
            if not all(bool(torch.isfinite(value).all()) for value in weights.values()):
                raise ValueError("its weights are not finite")
        except Exception as error:  # of the hub, of JSON, of either format of weights
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            problem = f"{self.adapter} is not a LoRA adapter's folder or id ({reason})"
            raise UserError(f"model.policy.adapter: {problem}") from None
        own = LoRA()
        if self.lora is not None and self.lora != own and (self.lora.r, self.lora.alpha) != (config.r, config.lora_alpha):
            raise UserError(
                f"model.policy.adapter brings r = {config.r} and alpha = {config.lora_alpha}; model.policy.lora says "
                f"{self.lora.r} and {self.lora.alpha}: leave model.policy.lora out"
            )
        config.inference_mode = False
        try:
            check_adapter_config(config, weights, base)
            model = _as_peft(get_peft_model(base, config))
            result: Any = set_peft_model_state_dict(model, weights)
            # A parameter that tied layers share is in the file once, and missing under its other names.
            parameters = dict(model.named_parameters(remove_duplicate=False))
            found = {id(value) for name, value in parameters.items() if name not in set(result.missing_keys)}
            missing = [k for k in result.missing_keys if f".{STUDENT}" in k and id(parameters.get(k)) not in found]
            wrong = list(result.unexpected_keys) + missing
            if wrong:
                raise ValueError(f"{len(wrong)} weights have no counterpart, such as {wrong[0]}")
        except (torch.OutOfMemoryError, UserError):
            raise
        except Exception as error:  # settings of any type
            raise UserError(
                f"model.policy.adapter: {self.adapter} was made for another model than {self.model} "
                f"({(str(error).strip().splitlines() or [type(error).__name__])[0]})"
            ) from None
        return model


class OtherModel(Policy):
    """A model beside the policy, which sees no chat: messages name it by where its role stands in the configuration."""

    role: Any = None  # has a `setting`

    @property
    def setting(self) -> str:
        return getattr(self.role, "setting", "model.teacher")

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        return self._load(AutoTokenizer.from_pretrained)


def _as_list(value: int | list[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)


def _patterns(ours: str | list[str] | None, more: str) -> str:
    """A user's ``exclude_modules`` and another pattern as one."""
    if not ours:
        return more
    # peft takes a name in a list for a module of that name at any depth.
    own = ours if isinstance(ours, str) else "|".join(rf"(.*\.)?{re.escape(name)}" for name in ours)
    return f"{own}|{more}"


def _as_peft(model: Any) -> PeftModel:
    assert isinstance(model, PeftModel)
    return model


def base_of(model: PeftModel) -> Any:
    """The causal language model below the adapter; its attributes are transformers' to know.

    In full fine-tuning there is no adapter, and the policy is that model itself: only `teachers`, `models.export` and the
    engines that send an adapter elsewhere need to know the difference.
    """
    return model.get_base_model() if isinstance(model, PeftModel) else model


def below_head(base: Any) -> Any:
    """The network of a causal language model that gives the hidden states for its head."""
    inner = base.base_model
    return base.model if inner is base else inner  # transformers names another attribute than Llama 4 has


def eos_ids(model: PeftModel) -> frozenset[int]:
    """Every token that ends a completion."""
    config = base_of(model).generation_config
    return frozenset(_as_list(config.eos_token_id))


def device_of(model: PeftModel) -> torch.device:
    """Where the model computes, which is not where its weights lie if they are offloaded to the host."""
    parameter = next(model.parameters())
    if isinstance(parameter, DTensor) and parameter.device_mesh.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return parameter.device


def active_adapter(model: PeftModel) -> str | None:
    """The adapter that the model computes with, or None where it is switched off; for samplers that are sent it.

    Raises:
        UserError: The model has none.
    """
    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    layer = next(layers, None)
    if layer is None:
        raise UserError(
            "model.policy.lora is null (full fine-tuning), and vLLM is sent the adapter alone: take TransformersEngine as "
            "model.rollouts, or set model.policy.lora"
        )
    return None if layer.disable_adapters else str(layer.active_adapters[0])


def is_adapter_key(key: str) -> bool:
    """Whether a parameter's name belongs to an adapter rather than to the frozen base model."""
    return not {STUDENT, TEACHER}.isdisjoint(key.split("."))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout and gradient checkpointing off inside; every module's own mode restored after.

    ``generate`` in training mode with gradient checkpointing on silently returns other tokens.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
