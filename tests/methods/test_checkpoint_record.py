"""Tests that a run resumes from its own checkpoint, and that another checkpoint is refused with the differences."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import SGD, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    MultiplicativeLR,
    OneCycleLR,
    SequentialLR,
)
from transformers import BitsAndBytesConfig, get_cosine_schedule_with_warmup

from helpers.messages import mentions
from helpers.models import make_model, make_tokenizer
from opsd_lightning.data.datamodule import OPSDDataModule
from opsd_lightning.data.sources import WordProblems
from opsd_lightning.methods.checkpoint_record import KEY, Configured, rows_digest
from opsd_lightning.methods.opsd import OPSDModule
from opsd_lightning.methods.sft import SFTModule
from opsd_lightning.models.fingerprint import base_record
from opsd_lightning.models.policy import LoRA, Policy
from opsd_lightning.prompts.templates import Prompts
from opsd_lightning.teachers import EMATeacher, ModelTeacher
from opsd_lightning.types import ConfigError, PromptBatch, Sampling

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:opsd_lightning.methods.checkpoint_record")


LORA = LoRA(r=4, alpha=8, dropout=0.0, target_modules=["q_proj"])


def adamw(**settings: Any) -> Callable[[Any], Optimizer]:
    return lambda parameters: AdamW(parameters, **({"lr": 0.01} | settings))


def saved_base(folder: Path, seed: int = 0, **config: Any) -> str:
    """A model with room for whole prompts, its weights drawn with a seed."""
    model = make_model("llama", seed)
    model.config.update({"max_position_embeddings": 1024} | config)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


class Asked(Callback):
    """The questions of every step, and the learning rate that the step was made with."""

    def __init__(self) -> None:
        self.questions: list[list[str]] = []
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, module: Any, optimizer: Optimizer) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: PromptBatch, *args: Any) -> None:
        self.questions.append([example.question for example in batch.examples])


def parts(
    model: str, lora: LoRA = LORA, method: Any = SFTModule, batch_size: int = 2, seed: int = 0, rows: Any = None,
    template: str = "{question}", dtype: Any = "float32", **settings: Any,
) -> tuple[Any, OPSDDataModule]:  # fmt: skip
    policy = Policy(model, lora=lora, dtype=dtype)
    source = WordProblems(size=12, seed=1) if rows is None else rows
    data = OPSDDataModule(
        policy, train=source, val=WordProblems(2, seed=2), prompts=Prompts(template, "{question} {context}"),
        batch_size=batch_size, max_new_tokens=4, seed=seed,
    )  # fmt: skip
    settings = {"sampling": Sampling(max_new_tokens=4), "optimizer": adamw(), "seed": seed} | settings
    return method(policy, **settings), data


def trainer(folder: Path, *callbacks: Callback, max_steps: int = 3) -> Trainer:
    return Trainer(
        accelerator="cpu", callbacks=list(callbacks), default_root_dir=folder, enable_progress_bar=False, logger=False,
        enable_model_summary=False, max_steps=max_steps, num_sanity_val_steps=0, limit_val_batches=0,
    )  # fmt: skip


def resume(folder: Path, checkpoint: Path, model: str, max_steps: int = 4, **settings: Any) -> tuple[Trainer, Asked]:
    asked = Asked()
    fit = trainer(folder, asked, max_steps=max_steps)
    fit.fit(*parts(model, **settings), ckpt_path=checkpoint, weights_only=True)
    return fit, asked


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def other_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_base(tmp_path_factory.mktemp("other"), seed=3)


@pytest.fixture(scope="module")
def checkpoint(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two of an epoch's six steps."""
    folder = tmp_path_factory.mktemp("run")
    trainer(folder, ModelCheckpoint(folder, "two", every_n_train_steps=2), max_steps=2).fit(*parts(base))
    return folder / "two.ckpt"


def test_record_holds_plain_values(checkpoint: Path) -> None:
    found = torch.load(checkpoint, weights_only=True)[KEY]
    assert json.loads(json.dumps(found)) == found


REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "rank and alpha": ({"lora": LoRA(2, 4, 0.0, ["q_proj"])}, ["lora.r 4 -> 2", "lora.alpha 8 -> 4"]),
    "dropout": ({"lora": LoRA(4, 8, 0.2, ["q_proj"])}, ["lora.dropout 0 -> 0.2"]),
    "modules": ({"lora": LoRA(4, 8, 0.0, ["k_proj", "q_proj"])}, ["lora.target_modules [q_proj] -> [k_proj, q_proj]"]),
    "layers": ({"lora": LoRA(4, 8, 0.0, ["layers.1.self_attn.q_proj"])}, ["lora.target_modules 2 modules -> 1 modules"]),
    "scale and patterns": (
        {"lora": LoRA(4, 8, 0.0, ["q_proj"], {"use_rslora": True, "alpha_pattern": {"q_proj": 1}})},
        ["lora.options.use_rslora false -> true", "lora.options.alpha_pattern.q_proj null -> 1"],
    ),
    "all weights": ({"lora": None}, ["model.policy.lora an adapter -> null"]),
    "method": ({"method": OPSDModule}, ["model SFTModule -> OPSDModule", "model.teacher null -> FixedTeacher"]),
    "seed": ({"seed": 5}, ["seed_everything 0 -> 5"]),
    "batch": ({"batch_size": 3}, ["data.batch_size 2 x 1 devices -> 3 x 1 devices"]),
    "rows": ({"rows": WordProblems(12, seed=7)}, ["data.train 12 rows"]),
    "prompts": ({"template": "Q: {question}"}, ["data.prompts, data.context"]),
    "optimizer": ({"optimizer": lambda p: SGD(p, lr=0.01)}, ["model.optimizer torch.AdamW -> torch.SGD"]),
    "its state": ({"optimizer": adamw(amsgrad=True)}, ["model.optimizer.amsgrad false -> true"]),
    "its groups": (
        {"optimizer": lambda p: AdamW([{"params": p[:1]}, {"params": p[1:]}], lr=0.01)},
        ["model.optimizer (parameters in each group) [4] -> [1, 3]"],
    ),
    "schedule": ({"lr_scheduler": lambda o: ExponentialLR(o, 0.9)}, ["model.lr_scheduler null -> torch.ExponentialLR"]),
    "several": (
        {"seed": 1, "batch_size": 4, "optimizer": lambda p: RMSprop(p), "lora": LoRA(4, 16, 0.0, ["q_proj"])},
        ["alpha 8 -> 16", "seed_everything 0 -> 1", "2 x 1 devices -> 4 x 1", "torch.AdamW -> torch.RMSprop"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_checkpoint_of_another_run_is_refused(case: str, base: str, checkpoint: Path, tmp_path: Path) -> None:
    settings, told = REFUSED[case]
    with pytest.raises(ConfigError) as refused:
        resume(tmp_path, checkpoint, base, **settings)
    assert refused.value.setting == "ckpt_path"
    assert all(part in refused.value.problem for part in told), refused.value.problem
    assert refused.value.problem.count(" -> ") == len(told) + 1  # nothing else; one is the legend


def test_another_base_is_refused_by_its_weights_or_its_configuration(
    base: str, other_base: str, checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as refused:
        resume(tmp_path, checkpoint, other_base)
    assert f"model.policy.model {base} (weights " in refused.value.problem and other_base in refused.value.problem
    turned = saved_base(tmp_path / "turned", rms_norm_eps=1e-3)
    with pytest.raises(ConfigError) as refused:
        trainer(tmp_path).validate(*parts(turned), ckpt_path=checkpoint, weights_only=True, verbose=False)
    assert "model.policy.model.rms_norm_eps 1e-06 -> 0.001" in refused.value.problem
    assert "weights" not in refused.value.problem


def test_evaluation_compares_only_the_model(base: str, other_base: str, checkpoint: Path, tmp_path: Path) -> None:
    def validate(model: str = base, **settings: Any) -> None:
        trainer(tmp_path).validate(*parts(model, **settings), ckpt_path=checkpoint, weights_only=True, verbose=False)

    validate(
        method=OPSDModule, seed=4, batch_size=3, rows=WordProblems(8, seed=9), optimizer=lambda p: SGD(p, lr=1.0),
        lora=LoRA(4, 8, 0.5, ["q_proj"]), lr_scheduler=lambda o: ExponentialLR(o, 0.5), template="{question}?",
    )  # fmt: skip
    for settings in ({"lora": LoRA(4, 1, 0.0, ["q_proj"])}, {"model": other_base}, {"dtype": "bfloat16"}):
        with pytest.raises(ConfigError):
            validate(**settings)


def test_load_from_checkpoint_compares_the_model(base: str, other_base: str, checkpoint: Path) -> None:
    again = SFTModule.load_from_checkpoint(checkpoint, policy=Policy(base, LORA, dtype="float32"), weights_only=True)
    assert again.model.peft_config["default"].lora_alpha == 8
    for policy in (Policy(base, LoRA(4, 64, 0.0, ["q_proj"]), dtype="float32"), Policy(other_base, LORA, dtype="float32")):
        with pytest.raises(ConfigError):
            SFTModule.load_from_checkpoint(checkpoint, policy=policy, weights_only=True)
        SFTModule.load_from_checkpoint(checkpoint, policy=policy, weights_only=True, allow_checkpoint_changes=True)


def teachers(base: str, other_base: str) -> dict[str, tuple[Any, Any, str]]:
    return {
        "decay": (EMATeacher(0.9), EMATeacher(0.8), "model.teacher.decay 0.9 -> 0.8"),
        "base": (ModelTeacher(base), ModelTeacher(other_base), "model.teacher.model "),
    }


@pytest.mark.parametrize("case", ["decay", "base"])
def test_another_teacher_is_refused(case: str, base: str, other_base: str, tmp_path: Path) -> None:
    first, second, told = teachers(base, other_base)[case]
    keep = ModelCheckpoint(tmp_path, "one", every_n_train_steps=1)
    trainer(tmp_path, keep, max_steps=1).fit(*parts(base, method=OPSDModule, teacher=first))
    with pytest.raises(ConfigError) as refused:
        resume(tmp_path, tmp_path / "one.ckpt", base, method=OPSDModule, teacher=second)
    assert told in refused.value.problem
    module, data = parts(base, method=OPSDModule, teacher=second)  # not graded: of no matter to an evaluation
    trainer(tmp_path).validate(module, data, ckpt_path=tmp_path / "one.ckpt", weights_only=True, verbose=False)


def test_explicit_settings_win_and_the_optimizers_state_stays(base: str, checkpoint: Path, tmp_path: Path) -> None:
    fit, asked = resume(tmp_path, checkpoint, base, 3, optimizer=adamw(lr=1e-4, weight_decay=0.5, betas=(0.8, 0.9)))
    (group,) = fit.optimizers[0].param_groups
    assert (group["lr"], group["weight_decay"], tuple(group["betas"])) == (1e-4, 0.5, (0.8, 0.9)) and asked.rates == [1e-4]
    assert {float(state["step"]) for state in fit.optimizers[0].state.values()} == {3.0}


def test_a_schedule_goes_on_as_the_new_settings_have_it(base: str, tmp_path: Path) -> None:
    def cosine(rate: float, steps: int) -> dict[str, Any]:
        return {"optimizer": adamw(lr=rate), "lr_scheduler": lambda o: get_cosine_schedule_with_warmup(o, 2, steps)}

    def run(folder: str, **settings: Any) -> list[float]:
        asked = Asked()
        keep = ModelCheckpoint(tmp_path / folder, "three", every_n_train_steps=3)
        trainer(tmp_path, asked, keep, max_steps=5).fit(*parts(base, **settings))
        return asked.rates

    first = run("first", **cosine(0.01, 20))
    path = tmp_path / "first" / "three.ckpt"
    assert resume(tmp_path, path, base, 5, **cosine(0.01, 20))[1].rates == first[3:]
    for settings in (cosine(0.003, 20), cosine(0.01, 8)):  # only functions know of the second
        assert resume(tmp_path, path, base, 5, **settings)[1].rates == pytest.approx(run("other", **settings)[3:], rel=1e-9)


SCHEDULES: dict[str, Callable[[Optimizer, float], Any]] = {
    "none": lambda o, rate: None,
    "warmup": lambda o, rate: LinearLR(o, 0.1, 1.0, 4),
    "function": lambda o, rate: LambdaLR(o, partial(pow, 0.9)),
    "factors": lambda o, rate: MultiplicativeLR(o, lambda step: 0.8),
    "cosine": lambda o, rate: CosineAnnealingLR(o, T_max=12, eta_min=1e-5),
    "restarts": lambda o, rate: CosineAnnealingWarmRestarts(o, T_0=3),
    "one cycle": lambda o, rate: OneCycleLR(o, max_lr=rate, total_steps=12),
    "cycles": lambda o, rate: CyclicLR(o, rate / 10, rate, 3, cycle_momentum=False),
    "one after another": lambda o, rate: SequentialLR(o, [LinearLR(o, 0.1), CosineAnnealingLR(o, 8)], [3]),
    "chained": lambda o, rate: ChainedScheduler([ConstantLR(o, 0.5, 2), ExponentialLR(o, 0.9)]),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_can_be_taken_up_with_another_rate(schedule: str) -> None:
    """A run with a rate of 0.1 stops after five steps and goes on with 0.02: as if it had been so from the start."""

    def make(rate: float) -> tuple[Optimizer, Any, Configured]:
        optimizer = AdamW([torch.nn.Parameter(torch.ones(2))], lr=rate)
        configured = Configured(optimizer)
        scheduler = SCHEDULES[schedule](optimizer, rate)
        if scheduler is not None:
            configured.add(scheduler)
        return optimizer, scheduler, configured

    def steps(optimizer: Optimizer, scheduler: Any, number: int) -> list[tuple[float, Any]]:
        found = []
        for _ in range(number):
            optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
            optimizer.step()
            found.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"]))
            if scheduler is not None:
                scheduler.step()
        return found

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old, old_scheduler, _ = make(0.1)
        steps(old, old_scheduler, 5)
        whole = steps(*make(0.02)[:2], 10)
        optimizer, scheduler, configured = make(0.02)
        optimizer.load_state_dict(old.state_dict())
        configured.apply(optimizer, scheduler, 5)
    moments = [state["exp_avg"] for state in optimizer.state.values()]
    assert all(torch.equal(a, b["exp_avg"]) for a, b in zip(moments, old.state.values(), strict=True)) and moments
    assert steps(optimizer, scheduler, 5) == whole[5:]


def told(recorded: Any) -> list[str]:
    return [str(warning.message) for warning in recorded if str(warning.message).startswith("ckpt_path")]


def test_checkpoint_changes_can_be_allowed(base: str, checkpoint: Path, tmp_path: Path) -> None:
    """All are told of, and a state that fits another optimizer is not used."""
    changes = {"optimizer": lambda p: SGD(p, lr=0.5), "lora": LoRA(4, 9, 0.0, ["q_proj"]), "seed": 3}
    with pytest.warns(UserWarning, match="ckpt_path|optimizer") as warned:
        fit, _ = resume(tmp_path, checkpoint, base, 3, allow_checkpoint_changes=True, **changes)
    assert all(part in told(warned)[0] for part in ("alpha 8 -> 9", "AdamW -> torch.SGD", "seed_everything 0 -> 3"))
    assert fit.global_step == 3 and fit.optimizers[0].param_groups[0]["lr"] == 0.5
    with pytest.raises(ValueError, match=mentions("model.policy.lora.r")):  # nothing allows weights of another shape
        resume(tmp_path, checkpoint, base, allow_checkpoint_changes=True, lora=LoRA(2, 4, 0.0, ["q_proj"]))


@pytest.mark.parametrize(("size", "left_out"), [(1, 0), (3, 2)])
def test_changed_batch_size_skips_seen_questions(
    size: int, left_out: int, base: str, checkpoint: Path, tmp_path: Path
) -> None:
    """Four of twelve."""
    whole = Asked()
    trainer(tmp_path, whole, max_steps=6).fit(*parts(base))
    order = [question for step in whole.questions for question in step]
    more = (12 - 4 - left_out) // size
    fit, asked = resume(tmp_path, checkpoint, base, 2 + more, batch_size=size, allow_checkpoint_changes=True)
    assert [question for step in asked.questions for question in step] == order[4 + left_out :]
    assert [len(step) for step in asked.questions] == [size] * more
    assert fit.fit_loop.epoch_progress.current.completed == 1  # the epoch ends with them


def test_changed_rows_start_a_new_epoch(base: str, checkpoint: Path, tmp_path: Path) -> None:
    fresh = Asked()
    rows = WordProblems(12, seed=8)
    trainer(tmp_path, fresh, max_steps=2).fit(*parts(base, rows=rows))
    _, asked = resume(tmp_path, checkpoint, base, 4, rows=rows, allow_checkpoint_changes=True)
    assert asked.questions == fresh.questions


def test_a_checkpoint_without_a_record_resumes_with_one_warning(base: str, checkpoint: Path, tmp_path: Path) -> None:
    old = torch.load(checkpoint, weights_only=True)
    del old[KEY]
    torch.save(old, tmp_path / "old.ckpt")
    with pytest.warns(UserWarning, match="ckpt_path") as warned:
        fit, asked = resume(tmp_path, tmp_path / "old.ckpt", base, 3, optimizer=adamw(lr=1e-4))
    assert len(told(warned)) == 1 and fit.global_step == 3
    assert asked.rates == [1e-4]  # its optimizer state says that the rate was another
    assert {float(state["step"]) for state in fit.optimizers[0].state.values()} == {3.0}
    for settings in ({"optimizer": lambda p: SGD(p, lr=0.01)}, {"lr_scheduler": lambda o: ExponentialLR(o, 0.5)}):
        with pytest.raises(ConfigError):
            resume(tmp_path, tmp_path / "old.ckpt", base, **settings)


def test_a_schedule_without_a_record_goes_on(base: str, tmp_path: Path) -> None:
    def cycle(rate: float) -> dict[str, Any]:
        return {"optimizer": adamw(lr=rate), "lr_scheduler": lambda o: OneCycleLR(o, max_lr=rate, total_steps=6)}

    asked, path = Asked(), tmp_path / "old.ckpt"
    keep = ModelCheckpoint(tmp_path, "old", every_n_train_steps=2, save_top_k=1)
    trainer(tmp_path, asked, max_steps=4).fit(*parts(base, **cycle(0.01)))
    trainer(tmp_path, keep, max_steps=2).fit(*parts(base, **cycle(0.01)))
    old = torch.load(path, weights_only=True)
    del old[KEY]
    torch.save(old, path)
    assert resume(tmp_path, path, base, 4, **cycle(0.01))[1].rates == asked.rates[2:]
    assert resume(tmp_path, path, base, 4, **cycle(0.02))[1].rates == pytest.approx([2 * rate for rate in asked.rates[2:]])


def test_weights_only_checkpoint_cannot_be_resumed(base: str, tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, "weights", every_n_train_steps=1, save_weights_only=True)
    trainer(tmp_path, keep, max_steps=1).fit(*parts(base))
    with pytest.raises(ConfigError) as refused:
        resume(tmp_path, tmp_path / "weights.ckpt", base)
    assert refused.value.setting == "ckpt_path"
    trainer(tmp_path).validate(*parts(base), ckpt_path=tmp_path / "weights.ckpt", weights_only=True, verbose=False)


def fingerprint(folder: str, **settings: Any) -> dict[str, Any]:
    policy = Policy(folder, **({"lora": LORA, "dtype": "float32"} | settings))
    return base_record(policy, policy.build())


def test_base_fingerprint_is_independent_of_dtype(base: str, other_base: str) -> None:
    """And below every adapter."""
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    ways: list[dict[str, Any]] = [
        {}, {"dtype": "bfloat16"}, {"dtype": "float16"}, {"quantization": four_bits}, {"lora": None},
        {"lora": LoRA(2, 4, 0.0, ["embed_tokens", "lm_head", "down_proj"])},
        {"lora": LoRA(2, 4, 0.0, ["q_proj"], {"trainable_token_indices": [5], "modules_to_save": ["lm_head"]})},
    ]  # fmt: skip
    found = [fingerprint(base, **way) for way in ways]
    assert len({each["weights"] for each in found}) == 1
    assert [each["dtype"] for each in found[:3]] == ["float32", "bfloat16", "float16"]
    assert found[0]["quantization"] is None and found[3]["quantization"]["load_in_4bit"] is True
    for way in ways[:4]:
        assert fingerprint(other_base, **way)["weights"] != found[0]["weights"]


def test_a_change_of_any_weight_is_seen(base: str) -> None:
    policy = Policy(base, LORA, dtype="float32")
    model = policy.build()
    seen = {base_record(policy, model)["weights"]}
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    for parameter in frozen:
        with torch.no_grad():
            parameter.view(-1)[-1] += 1
        seen.add(base_record(policy, model)["weights"])
    assert len(seen) == len(frozen) + 1


def test_the_digest_of_rows_sees_all_of_them(base: str) -> None:
    _, data = parts(base, method=OPSDModule)
    data.setup("fit")
    rows = data.rows["train"]

    def reversed_rows() -> PromptBatch:
        return PromptBatch(rows.student[::-1], rows.teacher[::-1], rows.examples[::-1], rows.counted)

    first, *others = rows.examples
    changed = [
        *(rows._replace(examples=[first._replace(**{field: "7"}), *others]) for field in ("question", "trace", "answer")),
        rows._replace(student=[rows.student[0][:-1], *rows.student[1:]]),
        rows._replace(teacher=[[*rows.teacher[0], 5], *rows.teacher[1:]]),
        reversed_rows(),
    ]  # fmt: skip
    assert len({rows_digest(each) for each in (rows, *changed)}) == len(changed) + 1
    assert rows_digest(rows) == rows_digest(rows._replace(counted=[]))
