"""Tests of ddp and FSDP2 on two gloo processes, against one process on the joined batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import BitsAndBytesConfig

from helpers.distributed import (
    NF4,
    STRATEGIES,
    ByReference,
    EndsOften,
    FirstHalfSilent,
    Recorder,
    Scripted,
    Seen,
    assert_same,
    both,
    check_resumption,
    ddp,
    fsdp2,
    fsdp2_sharded,
    joined,
    parts,
    run,
    trainer,
)
from helpers.messages import mentions
from helpers.models import EOS
from helpers.processes import on_ranks
from helpers.skills import records, skill_sets
from opsd_lightning.callbacks.export import AdapterExport
from opsd_lightning.callbacks.kept_skills import KeptSkills
from opsd_lightning.callbacks.rollouts import RolloutWriter
from opsd_lightning.data.sources import WordProblems
from opsd_lightning.distributed.checks import check_strategy
from opsd_lightning.distributed.fsdp2 import FSDP2Strategy
from opsd_lightning.grading.math_grader import MathGrader
from opsd_lightning.grading.no_grader import NoGrader
from opsd_lightning.methods.anchor import Anchor
from opsd_lightning.methods.grpo import GRPOModule
from opsd_lightning.methods.mixed import MixedOPSDModule
from opsd_lightning.methods.sft import SFTModule
from opsd_lightning.models.policy import LoRA, Policy
from opsd_lightning.models.scoring import Scorer
from opsd_lightning.prompts.online_contexts import CritiqueContext, FeedbackContext
from opsd_lightning.prompts.templates import Prompts
from opsd_lightning.rollouts.transformers_engine import TransformersEngine
from opsd_lightning.teachers import EMATeacher, FixedTeacher, LiveTeacher, Teacher
from opsd_lightning.types import ConfigError, Sampling, UserError

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore::UserWarning:opsd_lightning.methods.checkpoint_record"),
    # GPT-2 returns views.
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning:torch"),
]


class ByLength(MathGrader):
    """Right are completions of more than 3 characters: some of each question's."""

    def find_answer(self, completion: str) -> str | None:
        return completion

    def equal(self, answer: Any, reference: str) -> bool:
        return len(answer) > 3


@pytest.mark.parametrize(
    ("strategy", "teacher"),
    [
        pytest.param("ddp", FixedTeacher, id="fixed-ddp"),
        # Under ddp the weights of all teachers are whole on each rank, as the fixed teacher's are.
        pytest.param("ddp", lambda: EMATeacher(0.8), id="ema-ddp", marks=pytest.mark.slow),
        pytest.param("ddp", LiveTeacher, id="live-ddp", marks=pytest.mark.slow),
        pytest.param("fsdp2", FixedTeacher, id="fixed-fsdp2", marks=pytest.mark.slow),
        pytest.param("fsdp2", lambda: EMATeacher(0.8), id="ema-fsdp2"),
        pytest.param("fsdp2", LiveTeacher, id="live-fsdp2"),
    ],
)
def test_two_ranks_equal_one(
    strategy: str, teacher: Callable[[], Teacher], make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    """Losses, gradients and weights of three steps, with micro-batches, clipping and ragged completions."""
    policy = make_policy()
    settings = {"teacher": teacher(), "rollouts": Scripted([3, 8, 1, 5, 0])}
    one = joined(policy, tmp_path, **settings)
    assert len({round(loss, 6) for loss in one.losses}) == 3 and all(loss > 0 for loss in one.losses)
    for two in on_ranks(lambda rank: run(policy, tmp_path, 2, STRATEGIES[strategy], **settings), tmp_path):
        assert_same(two, one)
        for ours, theirs in zip(two.logged, one.logged, strict=True):
            for name in theirs:
                assert ours[name] == pytest.approx(theirs[name], rel=2e-3, abs=1e-6), name


METHODS: dict[str, dict[str, Any]] = {
    "grpo": {"method": GRPOModule, "grader": ByLength(), "anchor": Anchor(0.1), "updates_per_batch": 2},
    "sft": {"method": SFTModule, "objective": None},
    "mixed": {"method": MixedOPSDModule, "trace_share": 0.5, "updates_per_batch": 2, "teacher": EMATeacher(0.5)},
    "right": {"learn_from": "right", "grader": ByLength()},
    "critique": {
        "context": CritiqueContext(sampling=Sampling(max_new_tokens=4, temperature=0.0)),
        "prompts": Prompts("{question}", "{question} {context}"),
    },
    "feedback": {
        "context": FeedbackContext(),
        "prompts": Prompts("{question}", "{question} {context}"),
        "anchor": Anchor(0.1),
    },
}


# Together they have all that ranks agree on: rewards, an anchor, several updates, turns of references, contexts.
SHARDED = ("grpo", "mixed", "feedback")


@pytest.mark.parametrize(
    ("strategy", "name"),
    [
        *(
            pytest.param("fsdp2", name, id=f"{name}-fsdp2", marks=[pytest.mark.slow] * (name not in SHARDED))
            for name in METHODS
        ),
        pytest.param("ddp", "grpo", id="grpo-ddp"),
        # How ranks agree does not depend on the strategy: one method is enough under the second.
        *(pytest.param("ddp", name, id=f"{name}-ddp", marks=pytest.mark.slow) for name in METHODS if name != "grpo"),
    ],
)
def test_other_methods_on_two_ranks_equal_one(
    strategy: str, name: str, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    """Ranks that agree on the number of passes, sums over both ranks' tokens, and ratios and rewards of their own."""
    policy = make_policy()
    settings = METHODS[name] | {"rollouts": Scripted([3, 8, 1, 5])}
    one = joined(policy, tmp_path, **settings)
    assert len({round(loss, 6) for loss in one.losses}) > 1
    for two in on_ranks(lambda rank: run(policy, tmp_path, 2, STRATEGIES[strategy], **settings), tmp_path):
        assert_same(two, one)


@both
def test_demonstrations_on_two_ranks_equal_one(strategy: str, make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    """Five questions: one is repeated on the second rank, and does not count."""
    policy = make_policy()

    def values(rank: int, **settings: Any) -> dict[str, float]:
        module, data = parts(policy, 2, grader=NoGrader())
        data.grader = NoGrader()
        run = trainer(tmp_path, limit_val_batches=1.0, **settings)
        run.validate(module, data, verbose=False)
        return {name: float(value) for name, value in run.callback_metrics.items()}

    one = values(0)
    assert one.keys() == {"val/nll", "val/divergence"} and one["val/divergence"] > 0
    for two in on_ranks(lambda rank: values(rank, devices=2, strategy=STRATEGIES[strategy]()), tmp_path):
        assert two == pytest.approx(one, rel=1e-4)


def test_an_adapted_head_trains_under_sharding(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    """The head is gathered while the teacher switches the adapter off: its sharded parameters must go on to train."""
    policy = make_policy(lora=LoRA(r=4, alpha=8, dropout=0.0, target_modules=["q_proj", "lm_head"]))
    settings = {"rollouts": Scripted([3, 8, 1, 5])}
    one = joined(policy, tmp_path, **settings)
    assert_same(on_ranks(lambda rank: run(policy, tmp_path, 2, fsdp2, **settings), tmp_path)[0], one)


@both
def test_rank_without_tokens_does_not_change_the_mean(
    strategy: str, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    policy = make_policy()
    one = joined(policy, tmp_path, rollouts=FirstHalfSilent(None))
    for two in on_ranks(
        lambda rank: run(policy, tmp_path, 2, STRATEGIES[strategy], rollouts=FirstHalfSilent(rank)), tmp_path
    ):
        assert_same(two, one)
        assert two.logged[-1]["train/completion_tokens_min"] == 0


class NeverEnds(Callback):
    """No token of the vocabulary ends a completion."""

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        module.model.get_base_model().generation_config.eos_token_id = [10**6]


@pytest.mark.parametrize(
    ("strategy", "gather"),
    [
        pytest.param("ddp", True, id="gathered-ddp", marks=pytest.mark.slow),  # weights are whole: nothing is gathered
        pytest.param("fsdp2", True, id="gathered-fsdp2"),
        pytest.param("fsdp2", False, id="layer by layer-fsdp2"),
    ],
)
def test_ranks_with_different_completion_lengths_do_not_wait(
    strategy: str, gather: bool, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    policy = make_policy()

    def work(rank: int) -> Seen:
        sampling = Sampling(max_new_tokens=[2, 60][rank], n=2)
        engine = TransformersEngine(gather_weights=gather)
        return run(
            policy, tmp_path, 2, STRATEGIES[strategy], steps=2, callbacks=[NeverEnds()], sampling=sampling, rollouts=engine
        )

    ranks = on_ranks(work, tmp_path)
    for rank, seen in enumerate(ranks):
        assert {len(row) for step in seen.completions for row in step} == {[2, 60][rank]}
    assert ranks[0].losses == ranks[1].losses


@pytest.mark.parametrize(
    "architecture", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "qwen3", "mistral"))]
)
def test_greedy_rollouts_and_scores_do_not_depend_on_sharding(
    architecture: str, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    """Also for embeddings tied to the head, with an EOS at its own place in every row."""
    policy = make_policy(architecture, lora=LoRA(r=4, alpha=8, dropout=0.0, options={"init_lora_weights": False}))
    settings: dict[str, Any] = {"sampling": Sampling(max_new_tokens=24, temperature=0, n=2), "steps": 2}
    settings["callbacks"] = [EndsOften()]
    one = joined(policy, tmp_path, **settings)
    assert architecture == "mistral" or len({len(row) for row in one.completions[0]}) > 1
    for gather in (True, False):
        engine = TransformersEngine(gather_weights=gather)
        ranks = on_ranks(lambda rank, e=engine: run(policy, tmp_path, 2, fsdp2, rollouts=e, **settings), tmp_path)
        assert_same(ranks[0], one)
        for step, expected in enumerate(one.completions):
            pairs = [[r.completions[step][i : i + 2] for i in range(0, 8, 2)] for r in ranks]  # n = 2
            assert [row for both in zip(*pairs, strict=True) for pair in both for row in pair] == expected


class Repeated(WordProblems):
    """The same question over and over."""

    def examples(self) -> list[Any]:
        return super().examples()[:1] * 24


@both
def test_sampling_differs_between_ranks_and_repeats_for_a_seed(
    strategy: str, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    policy = make_policy()

    def work(rank: int, seed: int = 0, steps: int = 2) -> list[list[list[int]]]:
        module, data = parts(policy, 4, seed=seed)
        data.sources["train"] = Repeated(size=24, seed=1)
        recorder = Recorder()
        run = trainer(
            tmp_path, recorder, devices=2, max_steps=steps, strategy=STRATEGIES[strategy](), enable_checkpointing=False
        )
        run.fit(module, data)
        return recorder.seen.completions

    first = on_ranks(work, tmp_path)
    assert first == on_ranks(work, tmp_path)
    assert first[0][0] != first[1][0]
    assert first[0][0] != first[0][1]
    other = on_ranks(lambda rank: work(rank, seed=1, steps=1), tmp_path)
    assert all(ours[0] != theirs[0] for ours, theirs in zip(first, other, strict=True))


SAVED_ON_TWO = {"ddp": ddp, "fsdp2": fsdp2, "fsdp2 sharded": fsdp2_sharded}
RESUMED = {  # where a checkpoint of each goes on: processes, strategy
    "ddp": [(1, None), (2, ddp), (2, fsdp2)],
    "fsdp2": [(1, None), (1, fsdp2), (2, fsdp2), (2, ddp)],
    "fsdp2 sharded": [(1, fsdp2_sharded), (2, fsdp2_sharded), (2, fsdp2)],
}


# A checkpoint with an EMA teacher holds what one with a fixed teacher holds, and the teacher's copy.
@pytest.mark.parametrize("saved", SAVED_ON_TWO)
@pytest.mark.parametrize(
    "teacher",
    [pytest.param(FixedTeacher, id="fixed", marks=pytest.mark.slow), pytest.param(lambda: EMATeacher(0.8), id="ema")],
)
def test_checkpoints_of_two_processes_resume_on_one_and_on_two(
    saved: str, teacher: Callable[[], Teacher], make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    settings = {"teacher": teacher(), "rollouts": Scripted([3, 8, 1, 5])}
    sharded = saved == "fsdp2 sharded"
    check_resumption(make_policy(), tmp_path, (2, SAVED_ON_TWO[saved]), sharded, RESUMED[saved], **settings)


def test_shards_of_another_adapter_are_refused(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    def save(rank: int) -> None:
        keep = ModelCheckpoint(tmp_path / "saved", filename="two", every_n_train_steps=2)
        run(make_policy(), tmp_path, 2, fsdp2_sharded, steps=2, callbacks=[keep])

    def resume(rank: int) -> None:
        wider = make_policy(lora=LoRA(r=6, alpha=8, dropout=0.0))
        for path, message in (
            ("saved/two.ckpt", mentions("model.policy.lora.r")),
            ("saved", mentions(str(tmp_path / "saved"))),
        ):
            with pytest.raises(UserError, match=message):
                run(wider, tmp_path, 2, fsdp2, steps=4, checkpoint=str(tmp_path / path))

    on_ranks(save, tmp_path)
    on_ranks(resume, tmp_path)


# Both forms of a checkpoint resume in the test above.
@pytest.mark.parametrize("saved", [pytest.param("fsdp2", marks=pytest.mark.slow), "fsdp2 sharded"])
def test_explicit_optimizer_settings_win_over_a_checkpoint(
    saved: str, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    """Its moments stay; those of another optimizer are left out where that is allowed."""
    policy, strategy = make_policy(), SAVED_ON_TWO[saved]

    class Rates(Callback):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def on_before_optimizer_step(self, trainer: Trainer, module: Any, optimizer: Any) -> None:
            self.seen.append(optimizer.param_groups[0]["lr"])

    def go(steps: int, callback: Callback, **settings: Any) -> Any:
        settings = {"rollouts": Scripted([3, 8, 1, 5])} | settings
        fit = trainer(tmp_path, callback, devices=2, max_steps=steps, strategy=strategy())
        path = None if steps == 2 else str(tmp_path / "saved" / "two.ckpt")
        fit.fit(*parts(policy, 4, **settings), ckpt_path=path, weights_only=True)
        return fit.optimizers[0]

    def work(rank: int) -> tuple[list[float], set[float], list[float]]:
        go(2, ModelCheckpoint(tmp_path / "saved", filename="two", every_n_train_steps=2))
        slower, other = Rates(), Rates()
        optimizer = go(4, slower, optimizer=lambda p: torch.optim.AdamW(p, lr=0.001))
        steps = {float(state["step"]) for state in optimizer.state.values()}
        sgd = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.1), "lr_scheduler": None}
        with pytest.raises(UserError, match=r"(?s)AdamW.*SGD.*model\.lr_scheduler.*LinearLR"):
            go(4, other, **sgd)
        go(4, other, allow_checkpoint_changes=True, **sgd)
        return slower.seen, steps, other.seen

    for rates, steps, others in on_ranks(work, tmp_path):
        assert rates == pytest.approx([0.001 * 0.7, 0.001 * 0.55]) and steps == {4.0} and others == [0.1, 0.1]


@both
@pytest.mark.parametrize("questions", [5, 1], ids=["uneven", "a rank without any"])
def test_validation_is_that_of_one_process(
    strategy: str, questions: int, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    policy = make_policy(lora=LoRA(r=4, alpha=8, dropout=0.0, options={"init_lora_weights": False}))

    def work(world: int, chosen: Any) -> tuple[dict[str, float], list[str]]:
        greedy = Sampling(max_new_tokens=12, temperature=0)
        module, data = parts(policy, 2, eval_sampling=greedy, evaluate_teacher=True, teacher=EMATeacher())
        data.sources["val"] = data.sources["test"] = WordProblems(size=questions, seed=2)
        module.evaluator.grader = ByReference()
        run = trainer(
            tmp_path, RolloutWriter("w"), devices=world, limit_val_batches=1.0, **({"strategy": chosen()} if chosen else {})
        )
        (found,) = run.validate(module, data, verbose=False)
        predictions = run.predict(module, data) or []
        return found, [record["completion"] for part in predictions for record in part]

    one, texts = work(1, None)
    assert 0 < one["val/avg@1"] < 1 or questions == 1
    ranks = on_ranks(lambda rank: work(2, STRATEGIES[strategy]), tmp_path)
    for found, _ in ranks:
        assert found == pytest.approx(one, abs=1e-6)
    assert sorted(ranks[0][1] + ranks[1][1]) == sorted(texts)


@both
@pytest.mark.parametrize(
    "settings",
    [
        {
            "quantization": BitsAndBytesConfig(
                **NF4, bnb_4bit_compute_dtype=torch.float32, bnb_4bit_quant_storage=torch.bfloat16
            )
        },
        {"gradient_checkpointing": True},
    ],
    ids=["4-bit", "gradient checkpointing"],
)
def test_four_bits_and_checkpointing_on_two_ranks(
    strategy: str, settings: dict[str, Any], make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    policy = make_policy("qwen3", **settings)
    sharded = [TransformersEngine(gather_weights=False)] * (strategy == "fsdp2")
    for engine in (Scripted([3, 8, 1, 5]), *sharded):
        greedy = {"rollouts": engine, "sampling": Sampling(max_new_tokens=8, temperature=0), "steps": 2}
        one = joined(policy, tmp_path, **greedy)
        for two in on_ranks(lambda rank, g=greedy: run(policy, tmp_path, 2, STRATEGIES[strategy], **g), tmp_path):
            assert_same(two, one)


def test_offloaded_weights_give_the_same_training(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    policy = make_policy()
    settings = {"rollouts": Scripted([3, 8, 1, 5]), "teacher": EMATeacher(0.9)}
    one = joined(policy, tmp_path, **settings)
    ranks = on_ranks(lambda rank: run(policy, tmp_path, 2, lambda: fsdp2(cpu_offload=True), **settings), tmp_path)
    assert_same(ranks[0], one)


def test_base_and_adapter_are_sharded_and_the_fixed_teacher_stays(
    make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    policy = make_policy()

    def work(rank: int) -> tuple[bool, set[bool], torch.Tensor, torch.Tensor]:
        module, data = parts(policy, 4)
        states = []

        class Watch(Callback):
            def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
                states.append(pl_module.teacher.score(Scorer(pl_module.model), [[40, 41, 42]], [[50, 51, EOS]]).hidden)

        trainer(tmp_path, Watch(), devices=2, strategy=fsdp2(), enable_checkpointing=False).fit(module, data)
        parameters = list(module.model.parameters())
        halves = {p.to_local().numel() * 2 == p.numel() for p in parameters if p.dim() > 1 and len(p) % 2 == 0}
        return all(isinstance(p, DTensor) for p in parameters), halves, states[0], states[-1]

    sharded, halves, first, last = on_ranks(work, tmp_path)[0]
    assert sharded and halves == {True}
    assert torch.equal(first, last)


@both
def test_the_adapter_is_exported(strategy: str, make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    policy = make_policy()
    engine = Scripted([3, 8, 1, 5])
    one = joined(policy, tmp_path / "one", rollouts=engine, callbacks=[AdapterExport(merged_folder="merged")])
    on_ranks(
        lambda rank: run(policy, tmp_path / "two", 2, STRATEGIES[strategy], rollouts=engine, callbacks=[AdapterExport(merged_folder="merged")]),
        tmp_path,
    )  # fmt: skip
    assert one.losses
    for folder, file in (("adapter", "adapter_model.safetensors"), ("merged", "model.safetensors")):
        ours, theirs = (load_file(tmp_path / run / folder / file) for run in ("two", "one"))
        assert ours.keys() == theirs.keys() and ours
        for name, weight in ours.items():
            torch.testing.assert_close(weight, theirs[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy])
def test_strategies_under_which_a_step_would_be_wrong_are_refused(strategy: type[Strategy]) -> None:
    with pytest.raises(ConfigError, match=r"^trainer\.strategy:"):
        check_strategy(strategy())


def test_a_model_that_does_not_name_its_layers_is_refused(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    model = make_policy().build()
    model.get_base_model()._no_split_modules = None
    with pytest.raises(UserError, match=mentions("ddp")):
        FSDP2Strategy().shard(model)


def test_full_fine_tuning_is_refused_under_sharding(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    def work(rank: int) -> None:
        with pytest.raises(UserError, match=mentions("model.policy.lora")):
            run(make_policy(lora=None), tmp_path, 2, fsdp2, teacher=LiveTeacher())

    on_ranks(work, tmp_path)


def test_bitsandbytes_optimizers_are_refused_under_sharding(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    def work(rank: int) -> None:
        with pytest.raises(UserError, match=mentions("AdamW8bit")):
            run(make_policy(), tmp_path, 2, fsdp2, optimizer=lambda p: bitsandbytes.optim.AdamW8bit(p))
        with pytest.raises(UserError, match=r"^model\.policy\.quantization\.load_in_8bit:"):
            run(make_policy(quantization=BitsAndBytesConfig(load_in_8bit=True)), tmp_path, 2, fsdp2)

    on_ranks(work, tmp_path)


@both
@pytest.mark.parametrize("items", [1, 5])
def test_kept_skills_of_two_ranks_are_those_of_one(
    strategy: str, items: int, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    """Items are divided over the ranks, and sharded ranks make the same passes."""

    keep = ModelCheckpoint(tmp_path / "saved", filename="run", every_n_train_steps=2)
    trainer(tmp_path, keep, max_steps=2).fit(*parts(make_policy(), 8))

    def measured(folder: Path, **chosen: Any) -> dict[str, Any]:
        skills = KeptSkills(skill_sets(items))
        run = trainer(folder, skills, **chosen)
        run.test(*parts(make_policy(), 8), ckpt_path=tmp_path / "saved" / "run.ckpt", weights_only=True, verbose=False)
        return {f"{name} {role}": result for role in ("base", "run") for name, result in vars(skills)[f"of_{role}"].items()}

    alone = measured(tmp_path / "one")
    both_ranks = on_ranks(lambda rank: measured(tmp_path / "two", devices=2, strategy=STRATEGIES[strategy]()), tmp_path)
    assert len(records(tmp_path / "two" / "skills_test.jsonl")) == 5 * items
    assert alone["drift run"].value > 1e-5
    for found in both_ranks:
        assert found.keys() == alone.keys()
        for name, result in found.items():
            assert [item.weight for item in result.items] == [item.weight for item in alone[name].items], name
            scores = [[item.score for item in each.items] for each in (result, alone[name])]
            assert scores[0] == pytest.approx(scores[1], rel=1e-3, abs=1e-7), name
