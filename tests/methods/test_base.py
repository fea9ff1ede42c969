"""Tests of whole runs: exact resume, contents of checkpoints, logged metrics and callbacks."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from peft import PeftModel
from transformers import AutoModelForCausalLM

from helpers.messages import mentions
from helpers.models import COMPLETIONS, PROMPTS, make_tokenizer
from helpers.training import Recorder, adapters, metrics, parts, trainer
from opsd_lightning.callbacks.baseline import BaselineEvaluation
from opsd_lightning.callbacks.export import AdapterExport
from opsd_lightning.callbacks.rollouts import RolloutTable
from opsd_lightning.data.datamodule import OPSDDataModule
from opsd_lightning.data.sources import WordProblems
from opsd_lightning.distributed.checks import check_precision
from opsd_lightning.distributed.collectives import TrainerRanks
from opsd_lightning.losses.divergences import ReverseKL
from opsd_lightning.losses.objectives import DivergenceObjective
from opsd_lightning.methods.opsd import OPSDModule
from opsd_lightning.methods.step import StepCallback, StepRecord
from opsd_lightning.models.policy import LoRA, Policy
from opsd_lightning.models.scoring import Scorer, score
from opsd_lightning.rollouts.base import RolloutEngine
from opsd_lightning.teachers import EMATeacher, FixedTeacher, LiveTeacher, Teacher
from opsd_lightning.types import Rollouts, Sampling, UserError

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("teacher", [FixedTeacher, lambda: EMATeacher(0.8), LiveTeacher], ids=["fixed", "ema", "live"])
@pytest.mark.parametrize("stop", [3, 4], ids=["within an epoch", "at its end"])
def test_a_resumed_run_is_bit_identical(
    stop: int, teacher: Callable[[], Teacher], make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    """An epoch has four steps. Dropout, sampling, optimizer, schedule, teacher and data order all have to go on."""
    policy = make_policy(lora=LoRA(r=4, alpha=8, dropout=0.3))

    def start() -> tuple[OPSDModule, OPSDDataModule]:
        torch.manual_seed(0)
        return parts(policy, teacher=teacher())

    whole, recorder = start(), Recorder()
    trainer(tmp_path / "whole", recorder).fit(*whole)
    assert set(recorder.losses) == {1, 2, 3, 4, 5, 6}

    saved = ModelCheckpoint(tmp_path, filename="at{step}", every_n_train_steps=stop, save_top_k=1)
    broken = Recorder(crash_before=stop + 1)
    with pytest.raises(RuntimeError, match="crash"):
        trainer(tmp_path / "broken", broken, saved).fit(*start())
    torch.rand(100)  # a new process has other random numbers
    resumed, rest = start(), Recorder()
    trainer(tmp_path / "resumed", rest).fit(*resumed, ckpt_path=saved.best_model_path, weights_only=True)
    assert set(rest.losses) == set(range(stop + 1, 7))
    first = {step: loss for step, loss in broken.losses.items() if step <= stop}
    assert first | rest.losses == recorder.losses
    expected = adapters(whole[0])
    assert all(torch.equal(value, expected[key]) for key, value in adapters(resumed[0]).items())
    assert resumed[0].tokens_generated == whole[0].tokens_generated > 0


def test_the_ema_teacher_follows_every_optimizer_step(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    """Through the training step, and also in what ModelCheckpoint writes, which runs before later hooks would."""
    module, data = parts(make_policy(), teacher=EMATeacher(0.6))
    seen: list[dict[str, torch.Tensor]] = []

    class Keep(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            seen.append(adapters(pl_module))

        on_train_batch_end = lambda self, trainer, pl_module, *args: seen.append(adapters(pl_module))  # noqa: E731

    trainer(tmp_path, Keep(), ModelCheckpoint(tmp_path, filename="last", every_n_train_steps=3), max_steps=3).fit(
        module, data
    )
    expected = {key: value for key, value in seen[0].items() if ".teacher." in key}
    assert expected
    for now in seen[1:]:
        expected = {k: 0.6 * v + 0.4 * now[k.replace(".teacher.", ".default.")] for k, v in expected.items()}
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    for key, value in expected.items():
        torch.testing.assert_close(seen[-1][key], value, atol=1e-7, rtol=1e-5)
        assert torch.equal(saved[key], seen[-1][key])


@pytest.mark.parametrize("teacher", [FixedTeacher(), EMATeacher()], ids=["fixed", "ema"])
def test_checkpoints_hold_adapters_and_never_the_base(
    teacher: Teacher, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    policy = make_policy()
    module, data = parts(policy, teacher=teacher)
    trainer(tmp_path, ModelCheckpoint(tmp_path, filename="last"), max_steps=2).fit(module, data)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    keys = list(checkpoint["state_dict"])
    assert keys and all("lora_" in key for key in keys)
    assert any(".teacher." in key for key in keys) == isinstance(teacher, EMATeacher)
    assert checkpoint["optimizer_states"] and checkpoint["lr_schedulers"] and checkpoint["loops"]
    again = OPSDModule.load_from_checkpoint(tmp_path / "last.ckpt", policy=policy, teacher=teacher, weights_only=True)
    expected = adapters(module)
    assert all(torch.equal(value, expected[key]) for key, value in adapters(again).items())


def test_checkpoint_of_a_command_line_run_loads_in_python(folders: dict[str, str], tmp_path: Path) -> None:
    """The parts come back from the checkpoint's own hyperparameters, links included."""
    from opsd_lightning.cli.command import main

    cli = main(
        ["fit", f"--model.policy.model={folders['llama']}", "--model.policy.lora={r: 4, alpha: 8}", "--model.teacher=EMATeacher",
         "--model.teacher.decay=0.5", "--model.sampling.max_new_tokens=6", "--data.train=WordProblems", "--data.batch_size=2",
         "--data.train.size=4", "--trainer.max_steps=1", "--trainer.accelerator=cpu", f"--trainer.default_root_dir={tmp_path}",
         "--trainer.logger=false", "--trainer.enable_progress_bar=false", "--seed_everything=3",
         "--data.grader.timeout_seconds=2", "--data.prompts.teacher_template={question} {context}"]
    )  # fmt: skip
    path = cli.trainer.checkpoint_callback.best_model_path
    again = OPSDModule.load_from_checkpoint(path, weights_only=True)
    assert isinstance(again.teacher, EMATeacher) and again.teacher.decay == 0.5 and again.sampling.max_new_tokens == 6
    assert again.seed == 3 and again.evaluator.grader.timeout_seconds == 2
    expected = adapters(cli.model)
    assert all(torch.equal(value, expected[key]) for key, value in adapters(again).items())


class Scripted(RolloutEngine):
    """Writes what it is told to, in place of a model that knows nothing: completions of each prompt, by its question."""

    def __init__(self, script: Callable[[str, int], str]) -> None:
        self.script, self.tokenizer = script, make_tokenizer()

    def generate(self, model: Any, prompts: Any, sampling: Sampling, seed: int) -> Rollouts:
        texts = [self.script(self.tokenizer.decode(p), n) for p in prompts for n in range(sampling.n)]
        rows = [self.tokenizer.encode(text) for text in texts]
        return Rollouts(rows, [n % 2 == 0 for n in range(len(rows))], sampling.n)


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_grades_belong_to_their_questions(batch: int, make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    """Of four questions with three completions, question i gets i right ones; the teacher gets all right."""
    module, data = parts(make_policy(), eval_sampling=Sampling(max_new_tokens=8, n=3), evaluate_teacher=True)
    data.eval_batch_size = batch
    questions = {e.question: (i, e.answer) for i, e in enumerate(WordProblems(4, 2).examples())}

    def script(prompt: str, n: int) -> str:
        _, (i, answer) = next((q, a) for q, a in questions.items() if q in prompt)
        privileged = "so the answer is" in prompt
        return f"The answer is {answer}." if privileged or n < i else f"The answer is {int(answer) + 50 + n}."

    module.rollouts = Scripted(script)
    (found,) = trainer(tmp_path).validate(module, data, verbose=False)
    shares = torch.tensor([0, 1 / 3, 2 / 3, 1])
    assert found["val/avg@3"] == pytest.approx(0.5)
    assert found["val/avg@3_se"] == pytest.approx(float(shares.std() / 2))
    assert found["val/pass@3"] == pytest.approx(3 / 4)
    assert found["val/maj@3"] == pytest.approx((0 + 1 / 3 + 1 + 1) / 4)
    assert found["val/teacher_avg@3"] == 1
    predictions = trainer(tmp_path).predict(module, val_as_test(data))
    assert predictions is not None
    records = [record for part in predictions for record in part]
    assert [r["correct"] for r in records] == [n < i for i in range(4) for n in range(3)]
    assert [r["question"] for r in records] == [q for q in questions for _ in range(3)]


def val_as_test(data: OPSDDataModule) -> OPSDDataModule:
    data.sources["test"] = data.sources["val"]
    return data


@pytest.mark.parametrize("empty", ["some", "all"])
def test_empty_completions_add_nothing_to_the_loss(empty: str, make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    """They add nothing to the loss, and a step without any token leaves the adapter alone."""
    module, data = parts(make_policy(), optimizer=lambda p: torch.optim.SGD(p, lr=1.0), lr_scheduler=None)
    module.rollouts = Scripted(lambda prompt, n: "" if n or empty == "all" else "so 3")
    recorder = Recorder()
    module.configure_model()
    before = adapters(module)
    trainer(tmp_path, recorder, max_steps=1).fit(module, data)
    moved = not all(torch.equal(value, before[key]) for key, value in adapters(module).items())
    assert moved == (empty == "some")
    assert (recorder.losses[1] > 0) == (empty == "some")
    (row,) = [row for row in metrics(tmp_path) if "train/loss" in row]
    assert row["train/completion_tokens"] == (2.0 if empty == "some" else 0.0)


def test_passes_that_only_keep_ranks_in_step_change_nothing(
    make_policy: Callable[..., Policy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a rank with fewer micro-batches than another has to run."""
    found = []
    for more in (0, 3):
        torch.manual_seed(0)
        module, data = parts(make_policy())
        monkeypatch.setattr(TrainerRanks, "max", lambda self, values, more=more: [value + more for value in values])
        recorder = Recorder()
        trainer(tmp_path / str(more), recorder, max_steps=2).fit(module, data)
        found.append((recorder.losses, adapters(module)))
    (losses, weights), (more_losses, more_weights) = found
    assert losses == pytest.approx(more_losses)
    for key, value in weights.items():
        torch.testing.assert_close(value, more_weights[key])


def test_a_run_resumes_from_a_checkpoint_of_its_validation(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    """The kind that ModelCheckpoint writes when it chooses by accuracy, in mid-epoch."""
    policy = make_policy(lora=LoRA(r=4, alpha=8, dropout=0.3))
    settings = {"val_check_interval": 2, "check_val_every_n_epoch": None}

    def run(folder: Path, *callbacks: Callback, **more: Any) -> tuple[dict[int, float], dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        recorder, (module, data) = Recorder(), parts(policy)
        trainer(folder, recorder, *callbacks, **settings).fit(module, data, **more)
        return recorder.losses, adapters(module)

    saved = ModelCheckpoint(
        tmp_path, monitor="val/avg@2", mode="max", save_top_k=-1, filename="at{step}", auto_insert_metric_name=False
    )
    losses, weights = run(tmp_path / "whole", saved)
    assert sorted(p.name for p in tmp_path.glob("*.ckpt")) == ["at2.ckpt", "at4.ckpt", "at6.ckpt"]
    for step in (2, 4):
        rest, resumed = run(tmp_path / f"from{step}", ckpt_path=tmp_path / f"at{step}.ckpt", weights_only=True)
        assert rest == {n: loss for n, loss in losses.items() if n > step}
        assert all(torch.equal(value, weights[key]) for key, value in resumed.items())


LOGGED = {
    "loss", "forward_kl", "reverse_kl", "clipped_fraction", "student_entropy", "teacher_entropy", "first_token_forward_kl",
    "completion_tokens", "completion_tokens_min", "completion_tokens_max", "truncated_fraction", "eos_rate",
    "tokens_generated", "grad_norm", "adapter_norm",
}  # fmt: skip


def test_logged_metrics_equal_recomputed_values(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    """Each logged number against one computed from the rollouts and scores themselves."""
    seen: list[Any] = []

    class Keep(Callback):
        def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, *args: Any) -> None:
            seen.append(outputs)

    module, data = parts(make_policy(), objective=DivergenceObjective(ReverseKL()))
    trainer(tmp_path, Keep(), max_steps=3).fit(module, data)
    logged = [row for row in metrics(tmp_path) if "train/loss" in row]
    assert len(logged) == 3
    tokens = 0
    for row, out in zip(logged, seen, strict=True):
        assert {f"train/{name}" for name in LOGGED} <= set(row)
        for phase in ("rollout", "scoring"):
            assert row[f"time/{phase}_seconds"] > 0 and row[f"time/{phase}_tokens_per_second"] > 0
        rollouts, measured = out["rollouts"], out["measured"]
        lengths = [len(c) for c in rollouts.completions]
        tokens += sum(lengths)
        for name in ("forward_kl", "reverse_kl", "student_entropy", "teacher_entropy"):
            assert [len(row) for row in measured[name]] == lengths
            assert row[f"train/{name}"] == pytest.approx(float(torch.cat(measured[name]).mean()), rel=1e-4)
        assert row["train/loss"] == pytest.approx(row["train/reverse_kl"], rel=1e-4)
        first = [values[0] for values in measured["forward_kl"] if len(values)]
        assert row["train/first_token_forward_kl"] == pytest.approx(float(sum(first) / len(first)), rel=1e-4)
        assert row["train/completion_tokens"] == pytest.approx(sum(lengths) / len(lengths))
        assert (row["train/completion_tokens_min"], row["train/completion_tokens_max"]) == (min(lengths), max(lengths))
        assert row["train/eos_rate"] == pytest.approx(sum(rollouts.terminated) / len(lengths))
        assert row["train/truncated_fraction"] == pytest.approx(1 - row["train/eos_rate"])
        assert row["train/tokens_generated"] == tokens
    assert logged[0]["train/adapter_norm"] < logged[-1]["train/adapter_norm"]


def test_validation_selects_exports_and_keeps_the_best(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    """ModelCheckpoint on accuracy, the exported adapter with plain peft, and the table of rollouts in every logger."""
    policy = make_policy()
    module, data = parts(policy, eval_sampling=Sampling(max_new_tokens=8, n=2), evaluate_teacher=True)
    scores = iter([0.1, 0.9, 0.4])
    original = module._log_evaluation

    def graded(stage: str) -> None:  # a random model is never right: give the checkpoint something to choose by
        original(stage)
        if not module.trainer.sanity_checking:
            module.log("val/chosen", next(scores))

    module._log_evaluation = graded  # type: ignore[method-assign]
    best = ModelCheckpoint(tmp_path / "ckpt", monitor="val/chosen", mode="max", filename="{step}")
    kept: dict[int, dict[str, torch.Tensor]] = {}

    class Keep(Callback):
        def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
            kept[trainer.global_step] = {
                n: p.detach().clone() for n, p in pl_module.model.named_parameters() if "lora_" in n
            }

    run = trainer(
        tmp_path, best, Keep(), AdapterExport(merged_folder="merged"), RolloutTable(every_n_steps=3, rows=2), BaselineEvaluation(),
        num_sanity_val_steps=-1, val_check_interval=2, check_val_every_n_epoch=None,
        logger=[CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="board")],
    )  # fmt: skip
    run.fit(module, data)
    assert best.best_model_path.endswith("step=4.ckpt") and best.best_model_score == pytest.approx(0.9)
    base = AutoModelForCausalLM.from_pretrained(policy.model, dtype=torch.float32)
    exported = PeftModel.from_pretrained(base, tmp_path / "adapter")
    for name, value in exported.named_parameters():
        if "lora_" in name:
            assert torch.equal(value, kept[4][name]) and ("lora_A" in name or not torch.equal(value, kept[6][name]))
    states, _ = score(exported.eval(), PROMPTS, COMPLETIONS)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    logits = merged(torch.tensor([PROMPTS[0] + COMPLETIONS[0]])).logits[0, len(PROMPTS[0]) - 1 : -1]
    torch.testing.assert_close(states.head(states.hidden)[: len(COMPLETIONS[0])], logits, atol=1e-4, rtol=1e-3)

    rows = metrics(tmp_path / "csv")
    assert rows[0]["step"] == 0 and {"val/avg@2", "val/teacher_avg@2", "val/pass@2", "val/maj@2_se"} <= set(rows[0])
    with (tmp_path / "rollouts.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["step"] for row in table] == ["3", "3", "6", "6"]
    assert all(0 <= float(row["forward_kl"]) < math.inf and row["question"] for row in table)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next((tmp_path / "board").rglob("events*"))))
    events.Reload()
    assert "rollouts/text_summary" in events.Tags()["tensors"] and "train/loss" in events.Tags()["scalars"]


@pytest.mark.parametrize(
    ("updates", "every", "steps"), [(2, 3, ["4", "6", "10"]), (3, 2, ["3", "6", "9", "10"]), (1, 4, ["4", "8"])]
)
def test_rollout_tables_are_written_at_every_multiple(
    updates: int, every: int, steps: list[str], make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    """Also on a run that goes on: a table that was written is not written again."""

    def go(max_steps: int, **start: Any) -> Trainer:
        run = trainer(tmp_path, RolloutTable(every_n_steps=every, rows=1), max_steps=max_steps)
        run.fit(*parts(make_policy(), updates_per_batch=updates), **start)
        return run

    checkpoint = tmp_path / "half.ckpt"
    go(2 * updates).save_checkpoint(checkpoint)
    go(10, ckpt_path=checkpoint)
    with (tmp_path / "rollouts.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == steps


def test_validation_is_independent_of_batch_size(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    """Greedy accuracy and lengths do not depend on the evaluation batch size, and training goes on as before."""
    found = []
    for size in (1, 3, 4):
        torch.manual_seed(0)
        module, data = parts(make_policy(), eval_sampling=Sampling(max_new_tokens=8, temperature=0), evaluate_teacher=True)
        data.eval_batch_size = size
        found.append(trainer(tmp_path / str(size)).validate(module, data, verbose=False)[0])
    assert "val/teacher_avg@1" in found[0]
    for other in found[1:]:
        assert dict(found[0]) == pytest.approx(dict(other))


def test_loss_scaling_is_refused(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    """It would clip, and log, the norm of scaled gradients."""
    from lightning.pytorch.plugins import MixedPrecision

    run = trainer(tmp_path, plugins=[MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))])
    with pytest.raises(UserError, match=mentions("trainer.precision", "16-mixed")):
        run.fit(*parts(make_policy()))


def test_the_trainers_own_quantization_is_refused() -> None:
    """It would convert the LoRA layers as well. Its plugin cannot be built without CUDA: a bare instance stands for it."""
    from lightning.pytorch.plugins import BitsandbytesPrecision

    with pytest.raises(UserError, match=mentions("trainer.plugins", "model.policy.quantization")):
        check_precision(object.__new__(BitsandbytesPrecision))


def test_callbacks_can_read_the_parts_of_a_step(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    """In the first update on a batch, before its weights change, and never else; the teacher's states give its numbers."""
    seen: list[int] = []

    class Look(StepCallback):
        def on_step_scored(self, trainer: Trainer, pl_module: Any, now: StepRecord) -> None:
            seen.append(trainer.global_step)
            (term,) = now.terms
            flat = [token for row in now.rollouts.completions for token in row]
            with torch.no_grad():
                student = Scorer(pl_module.model, 4096).score(now.student_prompts, now.rollouts.completions)
                teacher = Scorer(pl_module.model, 4096).score(term.teacher_prompts, now.rollouts.completions)
            for states, name in ((student, "student_logprob"), (term.teacher, "teacher_logprob")):
                own = states.head(states.hidden).log_softmax(-1)[range(len(flat)), flat]
                torch.testing.assert_close(own, torch.cat(now.measured[name]), atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(teacher.hidden, term.teacher.hidden, atol=1e-4, rtol=1e-4)
            assert [len(prompt) for prompt in now.student_prompts] < [len(prompt) for prompt in term.teacher_prompts]

    # A live teacher's states are those of the same weights before the update.
    module, data = parts(make_policy(), teacher=LiveTeacher(), updates_per_batch=2)
    trainer(tmp_path, Look(), max_steps=4).fit(module, data)
    assert seen == [0, 2]
