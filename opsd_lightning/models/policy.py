"""The policy: a causal language model with a LoRA adapter, which is student and teacher.

`Policy` holds plain settings, which YAML files and checkpoints store, and `Policy.build` loads the model. The base weights
are frozen. The trainable adapter is named ``default``, as in peft. A teacher may add a second, frozen adapter named
``teacher``.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, final

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
    excluded_modules,
)
from opsd_lightning.models.gguf_header import check_gguf
from opsd_lightning.models.rope import constant_length, fix_frequencies, row_limit
from opsd_lightning.types import ConfigError, PositiveFloat, PositiveInt, Probability, checked

STUDENT = "default"
TEACHER = "teacher"


@checked
@final
@dataclass(frozen=True)
class LoRA:
    """Settings of the trainable low-rank adapter (peft's ``LoraConfig``).

    Args:
        r: Rank, at least 1. The paper uses 64.
        alpha: Scale. The weight update is alpha / r times B A. The paper uses 128.
        dropout: Probability of dropping an input of A in training, from 0 to below 1.
        target_modules: ``all-linear``, or names of linear layers such as ``[q_proj, v_proj]``. ``all-linear`` excludes the
            head, routers that are not plain linear layers, and modules that do not run on text, such as a vision tower.
        options: Further fields of peft's ``LoraConfig``, by name, such as ``{use_rslora: true}``.

    Example::

        >>> from opsd_lightning import LoRA
        >>> config = LoRA(r=16, alpha=32, target_modules=["q_proj", "v_proj"]).config()
        >>> config.lora_alpha / config.r
        2.0
    """

    r: PositiveInt = 64
    alpha: PositiveFloat = 128.0
    dropout: Probability = 0.05
    target_modules: str | list[str] = "all-linear"
    options: dict[str, Any] = field(default_factory=dict)

    def config(self) -> LoraConfig:
        """Return the settings as peft's ``LoraConfig``.

        Raises:
            ConfigError: peft does not accept an option, or the adapter's initialization would change the base weights.
        """
        init = self.options.get("init_lora_weights", True)
        if isinstance(init, str) and init not in ("gaussian", "orthogonal"):
            raise ConfigError(
                f"{init!r} changes the base weights, so an exported adapter would not fit the original base model",
                "model.policy.lora.options.init_lora_weights",
                "Remove it, or use gaussian or orthogonal",
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
            raise ConfigError(
                f"peft rejects the settings ({_first_line(error)})", "model.policy.lora", "Correct them"
            ) from None


@checked
@dataclass(frozen=True)
class ModelSettings(ABC):
    """Abstract base class of the settings of a causal language model, which load it. `Policy` documents the fields."""

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
            raise ConfigError(
                "quantized weights cannot train, and model.policy.lora is null (full fine-tuning)",
                "model.policy.quantization",
                "Remove it, or set model.policy.lora",
            )
        if self.quantization is not None and self.model.endswith(".gguf"):
            raise ConfigError(
                "a .gguf file cannot be quantized when it is loaded",
                f"{self.setting}.quantization",
                "Remove it, or convert the file to a model folder first",
            )

    @property
    @abstractmethod
    def setting(self) -> str:
        """Prefix of the setting names in errors."""

    @property
    def trains_all(self) -> bool:
        """True if all weights train (full fine-tuning), False if an adapter trains."""
        return self.lora is None and self.adapter is None

    def _where(self) -> dict[str, Any]:
        """Return the arguments of ``from_pretrained`` that identify the model."""
        path = Path(self.model).expanduser()
        gguf = path.suffix == ".gguf"
        local = gguf or path.is_absolute() or self.model.startswith((".", "~")) or self.model.count("/") > 1
        if local and not path.exists():
            raise ConfigError(
                f"{self.model} does not exist", f"{self.setting}.model", "Give a Hugging Face id, a folder or a .gguf file"
            )
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
        except Exception as error:  # each file format and model class raises its own errors
            raise ConfigError(
                f"cannot load {self.model!r} ({_first_line(error)})",
                f"{self.setting}.model",
                "Give the Hugging Face id, local folder or .gguf file of a causal language model",
            ) from error

    def load_config(self) -> PretrainedConfig:
        """Load the model's configuration without its weights."""
        config: PretrainedConfig = self._load(AutoConfig.from_pretrained)
        check_config(config, f"{self.setting}.model")
        return config

    def context_length(self) -> int | None:
        """Return the length limit of a row (prompt and completion) in tokens, or None if the model has no limit."""
        return row_limit(self.load_config(), self.max_length, f"{self.setting}.max_length")

    def limit_hint(self) -> str:
        """Return the setting that allows longer rows, in parentheses for messages, or an empty string if there is none."""
        if self.max_length is None and constant_length(self.load_config()) is None:
            return ""
        return f" ({self.setting}.max_length)"

    @abstractmethod
    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer."""

    def end_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Return the ids of all tokens that end a completion, the tokenizer's EOS token first.

        The weights are not loaded.

        Raises:
            ConfigError: Neither the tokenizer nor the configuration names an EOS token.
        """
        config = self.load_config()
        sources: list[Any] = [tokenizer, config, config.get_text_config()]
        with suppress(OSError, ValueError):  # the file is optional
            sources.append(GenerationConfig.from_pretrained(self.model, revision=self.revision or "main"))
        found = [token for source in sources for token in _as_list(getattr(source, "eos_token_id", None))]
        if not found:
            raise ConfigError(
                f"neither the tokenizer nor the configuration of {self.model} names an EOS token, which ends every trace",
                f"{self.setting}.model",
                "Set eos_token in its tokenizer_config.json, or choose another model",
            )
        return list(dict.fromkeys(found))

    def build(self, device: torch.device | None = None) -> PeftModel:
        """Load the base model, quantize it if set, freeze it and add the trainable adapter.

        Args:
            device: Device on which weights are quantized. Defaults to the CPU. Other weights are loaded on the CPU.

        Raises:
            ConfigError: The model or the adapter cannot be loaded, or they do not fit each other.
        """
        kwargs: dict[str, Any] = {"dtype": self.dtype}
        if self.attn_implementation is not None:
            kwargs["attn_implementation"] = self.attn_implementation
        if self.quantization is not None:
            kwargs |= {"quantization_config": self.quantization, "device_map": {"": device or torch.device("cpu")}}
        config, tokenizer = self.load_config(), self.load_tokenizer()
        limit = row_limit(config, self.max_length, f"{self.setting}.max_length")
        base: PreTrainedModel
        # `check_tensors` refuses tensors of another shape below, with their names.
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        base, info = self._load(AutoModelForCausalLM.from_pretrained, **kwargs)
        # transformers loads the base model of a repository that is an adapter.
        if getattr(base, "_hf_peft_config_loaded", False):
            fix = "Give the adapter's base model here, and the adapter as model.policy.adapter"
            raise ConfigError(f"{self.model} is an adapter", f"{self.setting}.model", fix)
        check_tensors(base, info, f"{self.setting}.model")
        check_vocabulary(base, tokenizer, f"{self.setting}.model")
        fix_frequencies(base, limit)
        if self.model.endswith(".gguf"):
            # The weights are dequantized. With this mark transformers would refuse to save them.
            del base.config.quantization_config
            base.hf_quantizer = None  # type: ignore[assignment]
        for module in base.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                # On CPUs with AVX512-BF16, bitsandbytes repacks the weights in the first pass without gradients, such as a
                # rollout. Afterwards the scales are rounded, and gradients cannot pass through the layers.
                setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 (untyped)
        self._check_generation_config()
        # The checkpoint's sampling defaults (such as top_k or a repetition penalty) would apply to every rollout that does
        # not set them. Only the EOS tokens are kept, from all sources: a chat model may have more than its tokenizer.
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
            raise ConfigError(
                f"full fine-tuning would train the checkpoint's {base.dtype} weights, in which updates of small learning "
                "rates are lost to rounding",
                "model.policy.dtype",
                "Set it to float32 and trainer.precision to bf16-mixed, or name the dtype to train in it anyway",
            )
        model = self.adapt(base)
        if not self.trains_all and (bias := getattr(model.peft_config[STUDENT], "bias", "none")) != "none":
            raise ConfigError(
                f"{bias!r} trains biases of the base model, which stay on in the fixed teacher and are not in checkpoints",
                "model.policy.lora.options.bias",
                "Remove it",
            )
        rounded = [n for n, w in model.named_parameters() if w.requires_grad and w.dtype in (torch.bfloat16, torch.float16)]
        if rounded and not self.trains_all:
            raise ConfigError(
                f"{rounded[0]} trains in {base.dtype}, in which updates of small learning rates are lost to rounding",
                f"{self.setting}.dtype",
                "Set it to float32, or remove modules_to_save from model.policy.lora.options",
            )
        if self.gradient_checkpointing:
            # transformers 5.23 renamed the method.
            name = "activation" if hasattr(base, "activation_checkpointing_enable") else "gradient"
            getattr(base, f"{name}_checkpointing_enable")({"use_reentrant": False})
        # `from_pretrained` returns the model in evaluation mode, in which gradient checkpointing has no effect.
        model.train()
        return model

    def _check_generation_config(self) -> None:
        """Refuse an unreadable generation configuration, whose EOS tokens transformers would silently ignore."""
        path = Path(self.model).expanduser() / "generation_config.json"
        if path.is_file():
            try:
                json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                problem = f"{path} is not valid JSON ({error})"
                raise ConfigError(problem, f"{self.setting}.model", "Correct or remove the file") from error

    def adapt(self, base: PreTrainedModel) -> PeftModel:
        """Add the trainable adapter to a base model. In full fine-tuning, return the base model as it is.

        Raises:
            ConfigError: The adapter does not fit the base model.
        """
        if self.trains_all:
            return base  # type: ignore[return-value]  # see `base_of`
        if self.adapter is None:
            assert self.lora is not None
            config = self.lora.config()
            if config.target_modules == "all-linear" and (excluded := excluded_modules(base)) is not None:
                config.exclude_modules = _combine_patterns(config.exclude_modules, excluded)
            try:
                model = _as_peft(get_peft_model(base, config))
            except (ValueError, TypeError) as error:
                if self.lora.dropout and "lora_dropout" in str(error):
                    raise ConfigError(
                        f"{type(base).__name__} stores the weights of its experts in one tensor, for which LoRA does not "
                        f"support dropout, and dropout is {self.lora.dropout}",
                        "model.policy.lora.dropout",
                        "Set dropout to 0",
                    ) from None
                if "Mamba" in str(error) and config.exclude_modules is None:
                    raise ConfigError(
                        f"peft cannot adapt out_proj of {type(base).__name__}, which uses the weight outside the layer",
                        "model.policy.lora.options.exclude_modules",
                        "Set it to [out_proj]",
                    ) from None
                raise ConfigError(
                    f"the settings do not fit {self.model} ({_first_line(error)})", "model.policy.lora", "Correct them"
                ) from None
            check_adapted(model, "model.policy")
            return model
        try:
            config = LoraConfig.from_pretrained(self.adapter)
            if not isinstance(config, LoraConfig):
                raise TypeError(f"its type is {config.peft_type}")
            weights = load_peft_weights(self.adapter, device="cpu")
            if not all(bool(torch.isfinite(value).all()) for value in weights.values()):
                raise ValueError("its weights are not finite")
        except Exception as error:  # the hub, JSON and both formats of weights raise different errors
            raise ConfigError(
                f"cannot load {self.adapter} as a LoRA adapter ({_first_line(error)})",
                "model.policy.adapter",
                "Give the folder or Hugging Face id of a LoRA adapter in peft's format",
            ) from None
        default = LoRA()
        if self.lora not in (None, default) and (self.lora.r, self.lora.alpha) != (config.r, config.lora_alpha):
            raise ConfigError(
                f"r = {self.lora.r} and alpha = {self.lora.alpha} contradict model.policy.adapter, which has r = {config.r} "
                f"and alpha = {config.lora_alpha}",
                "model.policy.lora",
                "Remove it",
            )
        config.inference_mode = False
        if Path(self.model).expanduser().exists():
            config.base_model_name_or_path = None  # peft warns if the name in the adapter's settings is not this path
        try:
            check_adapter_config(config, weights, base)
            model = _as_peft(get_peft_model(base, config))
            result: Any = set_peft_model_state_dict(model, weights)
            # A parameter that tied layers share is in the file under one of its names only.
            parameters = dict(model.named_parameters(remove_duplicate=False))
            found = {id(value) for name, value in parameters.items() if name not in set(result.missing_keys)}
            missing = [k for k in result.missing_keys if f".{STUDENT}" in k and id(parameters.get(k)) not in found]
            wrong = list(result.unexpected_keys) + missing
            if wrong:
                raise ValueError(f"{len(wrong)} weights have no counterpart, such as {wrong[0]}")
        except (torch.OutOfMemoryError, ConfigError):
            raise
        except Exception as error:  # the adapter's settings may have any type
            raise ConfigError(
                f"{self.adapter} does not fit {self.model} ({_first_line(error)})",
                "model.policy.adapter",
                "Give an adapter that was trained on this base model",
            ) from None
        return model


@final
@checked
@dataclass(frozen=True)
class Policy(ModelSettings):
    """Settings of the policy: a causal language model with a trainable LoRA adapter.

    Args:
        model: Hugging Face id, local folder, or ``.gguf`` file (dequantized when it is loaded).
        lora: Settings of the trainable adapter. Ignored if ``adapter`` is given, which has its own settings. Null for full
            fine-tuning: all weights train, and checkpoints contain all of them.
        adapter: Trained LoRA adapter to start from, as a peft folder or Hugging Face id. The fixed teacher is then the model
            with this adapter. Defaults to a new adapter.
        dtype: Dtype of the base weights. ``auto`` uses the checkpoint's dtype. The adapter is float32.
        quantization: Quantization of the base weights by transformers and bitsandbytes: 4-bit NF4 with ``load_in_4bit: true,
            bnb_4bit_quant_type: nf4``, or 8-bit with ``load_in_8bit: true``. Defaults to none.
        attn_implementation: ``eager``, ``sdpa``, ``flash_attention_2``, ... Defaults to the choice of transformers.
        max_length: Length limit of a row (prompt and completion) in tokens. Longer rows are dropped from the data. Defaults
            to the model's context length, or to the original length of RoPE whose frequencies depend on the length
            (``longrope``, ``dynamic``). With a larger value all rows use the frequencies for rows of that length.
        gradient_checkpointing: If True, recompute activations in the backward pass, which saves memory and takes about a
            third more time.
        pad_token: Padding token for a tokenizer without one, for example its EOS token. Padding does not affect the loss.
        chat_template: Jinja file with a chat template, which replaces the tokenizer's own.
        revision: Branch, tag or commit of a Hugging Face id. Defaults to ``main``.
        trust_remote_code: If True, run code from the model's repository. Read the code first.

    Example::

        >>> from opsd_lightning import LoRA, Policy
        >>> policy = Policy("Qwen/Qwen3-0.6B", lora=LoRA(r=16, alpha=32), dtype="bfloat16", max_length=4096)
        >>> policy.trains_all
        False
        >>> model = policy.build()  # doctest: +SKIP
    """

    @property
    def setting(self) -> str:
        return "model.policy"

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer, and set its chat template and padding token."""
        tokenizer: PreTrainedTokenizerBase = self._load(AutoTokenizer.from_pretrained)
        if self.chat_template is not None:
            try:
                tokenizer.chat_template = Path(self.chat_template).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
                raise ConfigError(
                    f"cannot read {self.chat_template} ({reason})",
                    "model.policy.chat_template",
                    "Name a Jinja file in UTF-8 that this process can read",
                ) from None
        if not tokenizer.chat_template:
            raise ConfigError(
                f"the tokenizer of {self.model} has no chat template",
                "model.policy.chat_template",
                "Name a Jinja file, or choose an instruction-tuned model",
            )
        if self.pad_token is not None:
            if tokenizer.convert_tokens_to_ids(self.pad_token) in (None, tokenizer.unk_token_id):
                raise ConfigError(
                    f"{self.pad_token!r} is not a token of {self.model}",
                    "model.policy.pad_token",
                    f"Use one of its tokens, such as its EOS token {tokenizer.eos_token!r}",
                )
            tokenizer.pad_token = self.pad_token
        if tokenizer.pad_token_id is None:
            raise ConfigError(
                f"the tokenizer of {self.model} has no padding token",
                "model.policy.pad_token",
                f"Set it, for example to the EOS token {tokenizer.eos_token!r}",
            )
        return tokenizer


@final
class OtherModel(ModelSettings):
    """Settings of another model than the policy, such as a separate teacher. It needs no chat template.

    Attributes:
        role: The object that the model belongs to. Its ``setting`` is the prefix of the setting names in errors.
    """

    role: Any = None

    @property
    def setting(self) -> str:
        return getattr(self.role, "setting", "model.teacher")

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        return self._load(AutoTokenizer.from_pretrained)


def _as_list(value: int | list[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _combine_patterns(exclude_modules: str | list[str] | None, pattern: str) -> str:
    """Return one regular expression for a user's ``exclude_modules`` and a further pattern."""
    if not exclude_modules:
        return pattern
    if isinstance(exclude_modules, str):
        return f"{exclude_modules}|{pattern}"
    # peft matches a name in a list with modules of that name at any depth.
    return "|".join([*(rf"(.*\.)?{re.escape(name)}" for name in exclude_modules), pattern])


def _as_peft(model: Any) -> PeftModel:
    assert isinstance(model, PeftModel)
    return model


def base_of(model: PeftModel) -> Any:
    """Return the causal language model inside a ``PeftModel``. In full fine-tuning, return the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def below_head(base: Any) -> Any:
    """Return the decoder of a causal language model, which computes the hidden states for the head."""
    inner = base.base_model
    return base.model if inner is base else inner  # the attribute that transformers looks up does not exist in Llama 4


def eos_ids(model: PeftModel) -> frozenset[int]:
    """Return the ids of all tokens that end a completion."""
    config = base_of(model).generation_config
    return frozenset(_as_list(config.eos_token_id))


def device_of(model: PeftModel) -> torch.device:
    """Return the device of the computation, which differs from the device of weights that are offloaded to the host."""
    parameter = next(model.parameters())
    if isinstance(parameter, DTensor) and parameter.device_mesh.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return parameter.device


def active_adapter(model: PeftModel) -> str | None:
    """Return the name of the active adapter, or None if adapters are disabled.

    Raises:
        ConfigError: The model has no adapter (full fine-tuning), and only an adapter can be sent to vLLM.
    """
    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    layer = next(layers, None)
    if layer is None:
        raise ConfigError(
            "vLLM engines send adapters only, and model.policy.lora is null (full fine-tuning)",
            "model.rollouts",
            "Use TransformersEngine, or set model.policy.lora",
        )
    return None if layer.disable_adapters else str(layer.active_adapters[0])


def is_adapter_key(key: str) -> bool:
    """Return True if a parameter's name is that of an adapter's parameter."""
    return not {STUDENT, TEACHER}.isdisjoint(key.split("."))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, without dropout and gradient checkpointing, and restore each module's mode on exit.

    With gradient checkpointing in training mode, ``generate`` silently returns wrong tokens.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
