"""A stand-in for the module ``vllm`` where vLLM cannot run: other versions than the tested one, and sleeping on a GPU.

Its classes have the names, arguments and attributes of vLLM's sources, version by version, as far as the package uses them.
Completions come from a real model, of which adapters are read from their folders by peft.
"""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig

from opsd_lightning.losses.objectives import token_logprobs
from opsd_lightning.models.scoring import score
from opsd_lightning.rollouts.transformers_engine import TransformersEngine
from opsd_lightning.types import Sampling

#: Oldest version of each form, by what differs: LLM.model_config since 0.12, the result of wake_up since 0.33.
VERSIONS = ["0.10.0", "0.12.0", "0.33.0"]


class LoRARequest(NamedTuple):
    """vllm/lora/request.py: further fields differ between versions and have defaults."""

    lora_name: str
    lora_int_id: int
    lora_path: str = ""


class SamplingParams(SimpleNamespace):
    """vllm/sampling_params.py."""


def make_vllm(version: str, calls: list[Any], fails: dict[str, Exception] | None = None) -> dict[str, ModuleType]:
    """Return the modules of a version, for ``sys.modules``.

    Args:
        version: One of `VERSIONS`.
        calls: Takes the name of each call of the engine, and the arguments of its start.
        fails: Errors to raise, by the name of the call.
    """
    fails = fails or {}
    old, new = version == "0.10.0", version == "0.33.0"

    def called(name: str) -> None:
        calls.append(name)
        if name in fails:
            raise fails[name]

    class LLM:
        """vllm/entrypoints/llm.py."""

        def __init__(self, model: str, **settings: Any) -> None:
            calls.append({"model": model, **settings})
            called("start")
            config = SimpleNamespace(max_model_len=settings["max_model_len"])
            core = SimpleNamespace(shutdown=lambda: called("shutdown"))
            engine = {"model_config": config, "vllm_config": SimpleNamespace(model_config=config), "engine_core": core}
            self.llm_engine = SimpleNamespace(**engine)
            if not old:
                self.model_config = config
            self.asleep = False
            self.base = AutoModelForCausalLM.from_pretrained(model, dtype=settings["dtype"]).eval()
            self.loaded: dict[str, str] = {}
            self.model: Any = None

        def generate(self, prompts: Any, sampling_params: Any, *, use_tqdm: bool, lora_request: Any) -> list[Any]:
            called("generate")
            assert not self.asleep and not use_tqdm
            model = self.active(lora_request)
            outputs = []
            for prompt, params in zip(prompts, sampling_params, strict=True):
                model.generation_config = GenerationConfig(
                    eos_token_id=params.stop_token_ids, pad_token_id=params.stop_token_ids[0]
                )
                rows = [prompt["prompt_token_ids"]]
                sampling = Sampling(max_new_tokens=params.max_tokens, temperature=params.temperature)
                found = TransformersEngine(merge_adapter=False).generate(model, rows, sampling, params.seed)
                with torch.no_grad():
                    values = token_logprobs(*score(model, rows, found.completions)).tolist()
                (ids,) = found.completions
                logprobs = [{token: SimpleNamespace(logprob=value)} for token, value in zip(ids, values, strict=True)]
                reason = "stop" if found.terminated[0] else "length"
                output = SimpleNamespace(token_ids=ids, logprobs=logprobs, finish_reason=reason)
                outputs.append(SimpleNamespace(outputs=[output]))
            return outputs

        def active(self, request: LoRARequest | None) -> Any:
            if request is None:
                if self.model is not None:
                    self.model.disable_adapter_layers()
                return self.base
            name = str(request.lora_int_id)
            assert self.loaded.setdefault(name, request.lora_path) == request.lora_path, "adapters are cached by number"
            if self.model is None:
                self.model = PeftModel.from_pretrained(self.base, request.lora_path, name).eval()
            elif name not in self.model.peft_config:
                self.model.load_adapter(request.lora_path, name)
            self.model.enable_adapter_layers()
            self.model.set_adapter(name)
            return self.base

        def sleep(self, level: int = 1, **mode: Any) -> None:
            assert level == 1 and not mode
            called("sleep")
            self.asleep = True

        def wake_up(self, tags: list[str] | None = None) -> bool | None:
            assert tags is None
            called("wake_up")
            self.asleep = False
            return True if new else None

    root, lora, request = ModuleType("vllm"), ModuleType("vllm.lora"), ModuleType("vllm.lora.request")
    request.LoRARequest = LoRARequest  # type: ignore[attr-defined]
    lora.request, root.lora = request, lora  # type: ignore[attr-defined]
    root.__version__, root.LLM, root.SamplingParams = version, LLM, SamplingParams  # type: ignore[attr-defined]
    root.TokensPrompt = dict  # type: ignore[attr-defined]
    return {"vllm": root, "vllm.lora": lora, "vllm.lora.request": request}
