"""The machine of the checks: a CUDA device or its imitation, models with random weights, and what the checks share."""

from __future__ import annotations

import contextlib
import gc
import json
import shutil
import string
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from helpers.models import CHAT_TEMPLATE, EOS, SPECIAL, make_model, make_tokenizer
from helpers.paths import ROOT
from helpers.strict_device import Card, Counts, StrictDevice, strict_device
from opsd_lightning.cli.allocator import use_expandable_segments
from opsd_lightning.data.datamodule import OPSDDataModule
from opsd_lightning.data.sources import WordProblems
from opsd_lightning.methods.opsd import OPSDModule
from opsd_lightning.models.policy import LoRA, Policy
from opsd_lightning.prompts.templates import Prompts
from opsd_lightning.types import Sampling

GIB = 2**30
RECIPE = ROOT / "configs" / "qwen3_1.7b_qlora.yaml"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

#: Sizes of Qwen3-1.7B from its published config.json, and of the model that the imitation takes instead.
QWEN3_1_7B = {
    "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936,
}  # fmt: skip
SMALL = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 300,
}  # fmt: skip


class Machine:
    """The device, and the sizes of the large checks.

    Args:
        folder: Folder for models and runs. Models stay there for the next process.
        imitation: The imitated device. None on a machine with a GPU.

    Attributes:
        rows: Completions of a step.
        prompt: Tokens of a student's prompt.
        teacher_prompt: Tokens of a teacher's prompt.
        completion: Tokens of a completion of the recipe.
        bfloat16: True if the GPU computes in bfloat16. Others, such as a T4, compute in float32.
    """

    def __init__(self, folder: Path, imitation: StrictDevice | None = None) -> None:
        self.folder, self.imitation = folder, imitation
        self.imitated = imitation is not None
        self.device = torch.device("cuda", 0)
        self.rows, self.prompt, self.teacher_prompt, self.completion = (
            (2, 8, 12, 12) if self.imitated else (32, 256, 2048, 1024)
        )
        self.bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        self.precision = "bf16-mixed" if self.bfloat16 else "32-true"
        self.dtype = "bfloat16" if self.bfloat16 else "float32"

    @property
    def nf4(self) -> BitsAndBytesConfig:
        """The recipes' quantization."""
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, self.dtype),
        )  # fmt: skip

    # -- models --------------------------------------------------------------------------------------------------------

    def tiny(self, architecture: str = "qwen3") -> str:
        """Return the folder of a model of a few thousand weights whose context holds the package's own prompts."""

        def save(path: Path) -> None:
            model = make_model(architecture)
            if architecture != "gpt2":  # its positions are learned
                model.config.max_position_embeddings = 2048
            model.save_pretrained(path)
            make_tokenizer().save_pretrained(path)

        return self._made(architecture, save)

    def large(self) -> str:
        """Return the folder of a model of Qwen3-1.7B's shape with random weights, whose rows run to their limit.

        Any next token is about equally likely, so that a completion seldom ends by itself: the largest step that there is.
        """

        def save(path: Path) -> None:
            config = Qwen3Config(
                **(SMALL if self.imitated else QWEN3_1_7B), max_position_embeddings=40_960, tie_word_embeddings=True,
                eos_token_id=EOS,
            )  # fmt: skip
            torch.manual_seed(0)
            with torch.device("cpu" if self.imitated else self.device):
                model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            model.generation_config = GenerationConfig(eos_token_id=[EOS], pad_token_id=EOS)
            model.save_pretrained(path)
            tokenizer_of(config.vocab_size).save_pretrained(path)

        return self._made("large", save)

    def _made(self, name: str, save: Callable[[Path], None]) -> str:
        path = self.folder / name
        if not path.exists():
            partial = self.folder / f"{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            save(partial)
            partial.rename(path)
            self.clean()
        return str(path)

    def tiny_policy(self, architecture: str = "qwen3", **settings: Any) -> Policy:
        settings = {"lora": LoRA(r=4, alpha=8, dropout=0.0), "dtype": "float32"} | settings
        return Policy(self.tiny(architecture), **settings)

    def recipe_policy(self, quantized: bool = True) -> Policy:
        """Return the policy of configs/qwen3_1.7b_qlora.yaml, on random weights."""
        return Policy(
            self.large(), lora=LoRA(r=64, alpha=128, dropout=0.05, target_modules=TARGETS), dtype=self.dtype,
            quantization=self.nf4 if quantized else None, gradient_checkpointing=True,
        )  # fmt: skip

    def build(self, policy: Policy) -> Any:
        """Return the policy on the device, built as in a run."""
        with torch.device(self.device):  # as Lightning does around configure_model
            model = policy.build(self.device)
        return model.to(self.device)

    def autocast(self) -> Any:
        """Return the context that `trainer.precision` of the recipe computes in."""
        return torch.autocast("cuda", dtype=torch.bfloat16, enabled=self.bfloat16, cache_enabled=False)

    # -- runs ----------------------------------------------------------------------------------------------------------

    def recipe_arguments(self, run: str, completion: int, steps: int, config: Path = RECIPE) -> list[str]:
        """Return arguments of ``opsd fit`` for a recipe on random weights and made-up questions.

        Args:
            run: Name of the run's folder.
            completion: ``max_new_tokens``.
            steps: Optimizer steps.
            config: The recipe.
        """
        path = self.folder / "rows.jsonl"
        if not path.exists():
            trace = "0 " * (16 if self.imitated else 900)  # a character is a token
            rows = [{"problem": f"{n} + 1?", "solution": rf"{trace}\boxed{{{n + 1}}}"} for n in range(self.rows * 4)]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        overrides = {"model.policy.model": self.large()}
        for split, rows in (("train", f"train[:-{self.rows}]"), ("val", f"train[-{self.rows}:]")):
            overrides |= {f"data.{split}": "FileSource", f"data.{split}.path": path, f"data.{split}.split": rows}
        overrides |= {
            "data.batch_size": self.rows, "data.eval_batch_size": max(self.rows // 2, 1),
            "model.sampling.max_new_tokens": completion, "model.eval_sampling.max_new_tokens": completion,
            "trainer.max_steps": steps, "trainer.default_root_dir": self.folder / run,
            "trainer.enable_progress_bar": "false",
        }  # fmt: skip
        if not self.bfloat16:
            overrides |= {
                "model.policy.dtype": "float32", "trainer.precision": "32-true",
                "model.policy.quantization.init_args.bnb_4bit_compute_dtype": "float32",
            }  # fmt: skip
        return [f"--config={config}", *(f"--{name}={value}" for name, value in overrides.items())]

    def fit(
        self, module: Any, data: Any, run: str, *callbacks: Callback, accelerator: str = "gpu", **settings: Any
    ) -> Trainer:
        """Fit in a folder of this run, without validation unless the settings ask for it."""
        checkpoint = {key: settings.pop(key) for key in ("ckpt_path", "weights_only") if key in settings}
        settings = {"max_steps": 2, "logger": False, "limit_val_batches": 0, "enable_checkpointing": False} | settings
        trainer = Trainer(
            accelerator=accelerator, devices=1, callbacks=list(callbacks), default_root_dir=self.folder / run,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, log_every_n_steps=1, **settings,
        )  # fmt: skip
        trainer.fit(module, data, **checkpoint)
        return trainer

    def parts(self, policy: Policy, **settings: Any) -> tuple[OPSDModule, OPSDDataModule]:
        """Return a module and its data: short word problems, two questions a step, sampled as in the recipe."""
        torch.manual_seed(0)
        tokens = 5 if self.imitated else 16
        settings = {
            "sampling": Sampling(tokens, 1.1, 0.95, 20, n=2),
            "optimizer": lambda p: torch.optim.AdamW(p, lr=0.01),
            "token_budget": 1024 if self.imitated else 128,
            "max_grad_norm": 1.0,
        } | settings
        data = OPSDDataModule(
            policy, train=WordProblems(size=8, seed=1), val=WordProblems(size=2, seed=2),
            prompts=Prompts("{question}", "{question} {context}"), batch_size=2, eval_batch_size=2,
            max_new_tokens=settings["sampling"].max_new_tokens,
        )  # fmt: skip
        return OPSDModule(policy, **settings), data

    # -- measurements --------------------------------------------------------------------------------------------------

    def seconds(self, action: Callable[[], Any]) -> float:
        """Return the seconds of an action, until the device has finished."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        action()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    def peak(self, action: Callable[[], Any]) -> int:
        """Return the peak bytes of an action above what is allocated before it."""
        self.clean()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        return torch.cuda.max_memory_allocated() - before

    @contextlib.contextmanager
    def free_memory(self, size: int) -> Iterator[None]:
        """Leave so many bytes of the device free inside the context."""
        self.clean()
        taken = max(torch.cuda.mem_get_info()[0] - size, 0)
        if self.imitation is not None:
            self.imitation.card.used_elsewhere += taken
            try:
                yield
            finally:
                self.imitation.card.used_elsewhere -= taken
            return
        ballast = torch.empty(taken, dtype=torch.uint8, device=self.device)
        try:
            yield
        finally:
            del ballast

    @contextlib.contextmanager
    def waits(self) -> Iterator[Counter[str]]:
        """Count the places where the host waits for the device, by file and line."""
        found: Counter[str] = Counter()
        if self.imitation is not None:
            with self._counted() as counts:
                yield found
            found.update(counts.synchronizations)
            return
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield found
            finally:
                torch.cuda.set_sync_debug_mode("default")
        for warning in seen:
            if "synchroniz" in str(warning.message):
                found[f"{Path(warning.filename).name}:{warning.lineno}"] += 1

    def kernels(self, action: Callable[[], Any]) -> Counter[str]:
        """Count the kernels that an action launches, by name."""
        if self.imitation is not None:
            with self._counted() as counts:
                action()
            return counts.kernels
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            action()
            torch.cuda.synchronize()
        on_device = torch.autograd.DeviceType.CUDA
        return Counter(event.name for event in profile.events() if event.device_type == on_device)

    @contextlib.contextmanager
    def _counted(self) -> Iterator[Counts]:
        assert self.imitation is not None
        self.imitation.counts.pop("counted", None)
        with self.imitation.phase("counted") as counts:
            yield counts

    def clean(self) -> None:
        """Free what a check has left, and restore the settings of torch that checks change."""
        gc.collect()
        torch.cuda.empty_cache()
        torch.use_deterministic_algorithms(False)


class Losses(Callback):
    """Callback that keeps the loss of each step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *args: Any) -> None:
        self.values.append(float(outputs["loss"]))


class PeakMemory(Callback):
    """Callback that keeps the peak memory and the seconds of each phase of the last step.

    The phases are the rollout, the teacher's pass, and the rest: the student's passes, the objective and the optimizer.
    """

    def __init__(self) -> None:
        self.peak_bytes: dict[str, int] = {}
        self.seconds: dict[str, float] = {}

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._phase(pl_module.rollouts, "generate", "rollout")
        self._phase(pl_module.teacher, "score", "teacher")

    def on_train_batch_start(self, *args: Any) -> None:
        self._begin()

    def on_train_batch_end(self, *args: Any) -> None:
        self._end("student")

    def _phase(self, part: Any, method: str, phase: str) -> None:
        call = getattr(part, method)

        def measured(*args: Any, **kwargs: Any) -> Any:
            self._begin()
            try:
                return call(*args, **kwargs)
            finally:
                self._end(phase)
                self._begin()

        setattr(part, method, measured)

    def _begin(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self._since = time.perf_counter()

    def _end(self, phase: str) -> None:
        torch.cuda.synchronize()
        self.peak_bytes[phase] = torch.cuda.max_memory_allocated()
        self.seconds[phase] = time.perf_counter() - self._since


def tokenizer_of(size: int) -> PreTrainedTokenizerFast:
    """Return the tests' tokenizer with a token for every id of a vocabulary of this size."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *string.printable])}
    vocabulary |= {f"<{index}>": index for index in range(len(vocabulary), size)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|im_end|>", unk_token="<unk>",
        additional_special_tokens=[token for token in SPECIAL if token not in ("<unk>", "<|im_end|>")],
    )  # fmt: skip
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def perturb(model: Any, scale: float = 0.1) -> None:
    """Add the same noise to the adapter on every device."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = scale * torch.randn(parameter.shape, generator=generator)
                parameter += noise.to(parameter.device, parameter.dtype)


def random_rows(count: int, length: int, seed: int = 0) -> list[list[int]]:
    """Return rows of ordinary tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(20, 100, (count, length), generator=generator).tolist()


def per_item(short: float, long: float, few: int, many: int) -> float:
    """Return the cost of one item from the costs of a few and of many."""
    return (long - short) / (many - few)


@contextlib.contextmanager
def opened(folder: Path, imitate: str = "") -> Iterator[Machine]:
    """Open the machine of the checks.

    Args:
        folder: Folder for models and runs.
        imitate: Card to imitate, ``gpu`` or ``t4``. Empty on a machine with a GPU.
    """
    if imitate:
        with strict_device(Card.t4() if imitate == "t4" else Card()) as imitation:
            yield Machine(folder, imitation)
    elif not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device here. `--imitate gpu` runs the same code without one")
    else:
        use_expandable_segments(None)  # as `opsd` does, before CUDA is used
        yield Machine(folder)


def within(values: Sequence[float], others: Sequence[float], relative: float) -> bool:
    """Return True if all values are near the others."""
    return all(abs(a - b) <= relative * abs(a) for a, b in zip(values, others, strict=True))
