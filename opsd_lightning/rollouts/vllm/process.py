"""Start of a vLLM instance in this process, and messages for its failures.

vLLM runs its engine in a child process, which writes its log and its tracebacks to the inherited standard output. Here both
go to a file, and a failure becomes one message with the engine's own reason.

Names and arguments that differ between vLLM's versions are looked up in this module only. It was written after the sources
of vLLM 0.10.0 to 0.33.0 (docs/vllm.md).
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

from opsd_lightning.types import ConfigError, UserError
from opsd_lightning.utils.redaction import redact_text

T = TypeVar("T")

_OPTIONS = "model.rollouts.init_args.options"
_SHARE = "model.rollouts.init_args.gpu_memory_utilization"
_LENGTH = "model.rollouts.init_args.max_model_len"
# Parts of vLLM's error messages, with the setting and what to do about each.
_REMEDIES = [
    ("Sleep mode is not supported", "model.rollouts.init_args.sleep", "Set it to false, since only GPUs support it"),
    ("less than desired GPU memory", _SHARE, "Lower it, or free the GPU's memory, which other processes use"),
    ("No available memory for the cache blocks", _SHARE, "Raise it, or use a larger GPU"),
    ("KV cache", _LENGTH, f"Lower it, or raise {_SHARE}"),
    ("kv cache", _SHARE, f"Raise it, or lower {_LENGTH}"),
    ("out of memory", _SHARE, "Lower it, or lower model.token_budget, which bounds the trainer's own memory"),
    ("OutOfMemoryError", _SHARE, "Lower it, or lower model.token_budget, which bounds the trainer's own memory"),
    ("max seq len", _LENGTH, "Lower it"),
    ("max_model_len", _LENGTH, "Lower it to the model's context length"),
    ("trust_remote_code", "model.policy.trust_remote_code", "Read the model's code, and set it to true"),
    ("does not support LoRA", "model.rollouts", "Use TransformersEngine, since vLLM has no LoRA for this architecture"),
    ("are not supported for now", "model.rollouts", "Use TransformersEngine, since vLLM does not have this architecture"),
    ("keyword argument", _OPTIONS, "Remove the argument, which this version of vLLM does not have"),
    (
        "bootstrapping phase",
        "model.rollouts",
        'Call the training under `if __name__ == "__main__":`, since vLLM starts a process that imports your script',
    ),
]
# A line such as "(EngineCore pid=42) ERROR 11-28 06:39:01 [core.py:1] ValueError: reason"
_ERROR_LINE = re.compile(r"(?:^|[\s\]])(?P<error>(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt): .+)$")
_NO_REASON = ("Engine core initialization failed", "EngineCore encountered an issue", "EngineCore failed to start")


class EngineLog:
    """File that takes vLLM's output, kept only after a failure."""

    def __init__(self) -> None:
        handle, name = tempfile.mkstemp(prefix="opsd-vllm-", suffix=".log")
        os.close(handle)
        self.path = Path(name)

    @contextmanager
    def captured(self) -> Iterator[None]:
        """Write this process's standard output and error to the file. Child processes that start inside keep doing so."""
        sys.stdout.flush()
        sys.stderr.flush()
        saved = [os.dup(number) for number in (1, 2)]
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        try:
            os.dup2(file, 1)
            os.dup2(file, 2)
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, number)
                os.close(copy)
            os.close(file)

    def reason(self) -> str | None:
        """Return the last error in the file that gives a reason, without its traceback."""
        found = None
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            match = _ERROR_LINE.search(line.rstrip())
            if match is not None and not any(words in match["error"] for words in _NO_REASON):
                found = match["error"]
        return found

    def remove(self) -> None:
        """Remove the file."""
        with suppress(OSError):
            self.path.unlink()


def guarded(action: str, log: EngineLog, call: Callable[[], T], quiet: bool = False) -> T:
    """Call vLLM, and convert its errors into one message.

    Args:
        action: The action, for the message, such as ``load the model``.
        log: File with vLLM's output.
        call: The call.
        quiet: If True, write all output of the call to ``log``.

    Raises:
        ConfigError: The call failed.
    """
    try:
        if not quiet:
            return call()
        with log.captured():
            return call()
    except UserError:
        raise
    except Exception as error:  # vLLM raises errors of all kinds
        raise failure(action, error, log) from None


def failure(action: str, error: BaseException, log: EngineLog) -> ConfigError:
    """Return one message for an error of vLLM, with its reason, the setting to change and the file with its output."""
    reason = _first_reason(error)
    if any(words in reason for words in _NO_REASON):
        reason = log.reason() or reason
    reason = redact_text(reason)[:400].rstrip(". ")
    everything = f"{type(error).__name__} {error} {reason}"
    setting, fix = next(
        ((setting, fix) for words, setting, fix in _REMEDIES if words in everything),
        ("model.rollouts", f"Correct {_OPTIONS}, or use another engine"),
    )
    return ConfigError(f"vLLM cannot {action} ({reason})", setting, f"{fix}. vLLM's output is in {log.path}")


def _first_reason(error: BaseException) -> str:
    """Return the first line of an error's message. For several errors in one (pydantic), return the first error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if re.match(r"\d+ validation errors? for ", lines[0]) and len(lines) > 1:
        found = next((line for line in lines if line.startswith("Value error, ")), " ".join(lines[1:3]))
        return found.removeprefix("Value error, ").partition(" [type=")[0]
    return lines[0]


def import_vllm() -> Any:
    """Import vLLM.

    Raises:
        ConfigError: It is not installed here, or does not fit the installed torch or transformers.
    """
    try:
        import vllm
        import vllm.lora.request
    except Exception as error:  # an extension that was built for another torch raises other errors than ImportError
        raise ConfigError(
            f"VLLMEngine cannot import vllm ({redact_text(str(error))[:300]})",
            "model.rollouts",
            "Install it in this environment (docs/vllm.md), or use VLLMServerEngine, whose servers have one of their own",
        ) from None
    return vllm


def context_length(llm: Any) -> int:
    """Return the context length of a ``vllm.LLM`` in tokens."""
    engine = llm.llm_engine
    # In 0.10.0 to 0.33.0 the engine has the configuration. LLM itself has it since 0.12.
    config = engine.model_config if hasattr(engine, "model_config") else engine.vllm_config.model_config
    return int(config.max_model_len)


def wake(llm: Any) -> None:
    """Take back the GPU memory of a sleeping ``vllm.LLM``.

    Raises:
        RuntimeError: The instance is not fully awake.
    """
    torch.cuda.empty_cache()  # the trainer's cached blocks are free memory that vLLM could not get otherwise
    if llm.wake_up() is False:  # None before 0.33
        raise RuntimeError("wake_up did not wake all parts of the engine")


def stop(llm: Any, log: EngineLog) -> None:
    """End the process of a ``vllm.LLM``, which frees its memory, and write the output to ``log``."""
    with suppress(Exception), log.captured():  # it may have died before
        llm.llm_engine.engine_core.shutdown()


def sampled_logprobs(output: Any) -> list[float]:
    """Return the log-probabilities of the sampled tokens in a ``vllm.CompletionOutput``."""
    return [float(place[token].logprob) for place, token in zip(output.logprobs, output.token_ids, strict=True)]


@contextmanager
def child_environment(device: torch.device) -> Iterator[None]:
    """Set the environment of the process that vLLM starts inside the context.

    Only this rank's GPU is visible to it, since vLLM uses the first one. Its allocator has no expandable segments, which
    vLLM's sleep mode refuses before 0.20.
    """
    changed: dict[str, str | None] = {}
    if device.type == "cuda" and torch.cuda.device_count() > 1:
        index = device.index if device.index is not None else torch.cuda.current_device()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        changed["CUDA_VISIBLE_DEVICES"] = str(index) if visible is None else visible.split(",")[index]
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        if "expandable_segments" in (value := os.environ.get(name, "")):
            changed[name] = ",".join(part for part in value.split(",") if "expandable_segments" not in part) or None
    before = {name: os.environ.get(name) for name in changed}
    _set_environment(changed)
    try:
        yield
    finally:
        _set_environment(before)


def _set_environment(values: Mapping[str, str | None]) -> None:
    """Set environment variables. None removes one."""
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
