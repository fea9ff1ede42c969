"""A checkpoint's record of parts and settings, and its file and weights before they are loaded."""

from __future__ import annotations

import shutil
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from helpers.models import make_model, make_tokenizer
from opsd_lightning.checkpoints.file import check_file, mismatched_weights
from opsd_lightning.losses.clips import TokenClip
from opsd_lightning.losses.divergences import GeneralizedJSD, ReverseKL
from opsd_lightning.losses.objectives import DivergenceObjective
from opsd_lightning.methods.anchor import Anchor
from opsd_lightning.methods.checkpoint_record import KEY, compare, record_of, rows_digest
from opsd_lightning.methods.opsd import OPSDModule
from opsd_lightning.methods.sft import SFTModule
from opsd_lightning.models.fingerprint import described
from opsd_lightning.models.policy import LoRA, Policy
from opsd_lightning.prompts.online_contexts import ReasonFirst
from opsd_lightning.teachers import EMATeacher, LiveTeacher, ModelTeacher, SyncTeacher
from opsd_lightning.types import ConfigError, Example, PromptBatch, Sampling

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:opsd_lightning.methods.checkpoint_record")


LORA = LoRA(r=4, alpha=8, dropout=0.0, target_modules=["q_proj"])


def saved_base(folder: Path, seed: int = 0, **config: Any) -> str:
    model = make_model("llama", seed)
    model.config.update({"max_position_embeddings": 1024} | config)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_base(tmp_path_factory.mktemp("settings-base"))


@pytest.fixture(scope="module")
def other_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_base(tmp_path_factory.mktemp("settings-other"), seed=3)


def built(model: str, method: Any = OPSDModule, lora: LoRA | None = LORA, limit: int | None = None, **settings: Any) -> Any:
    module = method(Policy(model, lora=lora, dtype="float32", max_length=limit), **settings)
    module.configure_model()
    return module


def saved(module: Any) -> dict[str, Any]:
    """A checkpoint of a module, as far as an evaluation looks at it."""
    return {KEY: record_of(module), "state_dict": module.state_dict()}


def fits(checkpoint: dict[str, Any], module: Any) -> bool:
    try:
        module.on_load_checkpoint(deepcopy(checkpoint))
    except ConfigError:
        return False
    return True


def resuming(module: Any) -> Any:
    """The module as in a fit: no trainer is needed to compare but its state."""
    module._trainer = SimpleNamespace(
        state=SimpleNamespace(fn="fit"), datamodule=None, optimizers=[], strategy=None, precision="32-true", max_steps=5
    )
    return module


def refusal(checkpoint: dict[str, Any], module: Any) -> str | None:
    """Of a checkpoint in a fit."""
    try:
        compare(resuming(module), deepcopy(checkpoint) | {"lr_schedulers": [], "optimizer_states": [], "global_step": 1})
    except ConfigError as error:
        return str(error)
    return None


class Counting(SyncTeacher):
    """Gathers a state that is public."""

    def __init__(self, every_n_steps: int = 1) -> None:
        super().__init__(every_n_steps)
        self.copies = 0


def test_the_record_of_a_part_is_its_constructors_arguments() -> None:
    teacher = Counting(3)
    before = described(teacher)
    assert before == {"class": "Counting", "decay": 0.0, "update_every_steps": 3}
    teacher.copies, teacher.keeps_head = 7, True
    assert described(teacher) == before != described(Counting(4))
    nested = described(DivergenceObjective(GeneralizedJSD(0.25), clip=TokenClip(0.5)), ["logits_memory_mib"])
    assert nested["divergence"] == {"class": "GeneralizedJSD", "beta": 0.25} and "logits_memory_mib" not in nested
    assert nested["clip"] == {"class": "TokenClip", "tau": 0.5}
    assert described(ReasonFirst())["sampling"]["max_new_tokens"] == 256


def test_updates_per_batch_may_change_on_resume(base: str) -> None:
    assert fits(saved(built(base, updates_per_batch=2, evaluate_teacher=True)), built(base, evaluate_teacher=True))


def test_an_anchor_leaves_the_teacher_in_the_record(base: str) -> None:
    module = built(base, teacher=EMATeacher(0.9), anchor=Anchor())
    teachers = record_of(module)["teachers"]
    assert teachers["model.teacher"] == {"class": "EMATeacher", "decay": 0.9, "update_every_steps": 1}
    assert teachers["model.anchor.teacher"] == {"class": "FixedTeacher"}
    assert "model.teacher.decay 0.9 -> 0.1" in str(
        refusal(saved(module), built(base, teacher=EMATeacher(0.1), anchor=Anchor()))
    )


def test_teachers_of_one_setting_are_all_recorded(base: str) -> None:
    class Two(OPSDModule):
        @property
        def teachers(self) -> list[Any]:
            return [self.teacher, EMATeacher(0.7)]

    kinds = [each["class"] for each in record_of(built(base, Two))["teachers"].values()]
    assert kinds == ["FixedTeacher", "EMATeacher"]


LONG: dict[str, Any] = {
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 512,
        "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
    },
}  # fmt: skip
DYNAMIC: dict[str, Any] = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}


@pytest.mark.parametrize(
    ("rope", "same", "others"), [(LONG, (None, 300, 512), (700, 1024)), (DYNAMIC, (None, 300, 1024), (1500, 2000))]
)
def test_the_frequencies_of_rope_are_compared(rope: dict[str, Any], same: Any, others: Any, tmp_path: Path) -> None:
    base = saved_base(tmp_path, **rope)
    checkpoint = saved(built(base))
    for limit in same:
        assert fits(checkpoint, built(base, limit=limit))
    for limit in others:
        module = built(base, limit=limit)
        assert not fits(checkpoint, module)
        assert "model.policy.max_length" in str(refusal(checkpoint, module))
    first, second = (saved(built(base, limit=limit)) for limit in others)
    assert fits(first, built(base, limit=others[1])) == (rope is LONG)
    del checkpoint[KEY]["base"]["rope"]
    assert fits(checkpoint, built(base, limit=others[0])) and second


def test_a_graded_fixed_teacher_needs_its_own_base(base: str, other_base: str) -> None:
    """In full fine-tuning too, where the student's weights all come from the checkpoint."""
    checkpoint = saved(built(base, lora=None))
    assert fits(checkpoint, built(other_base, lora=None))
    assert fits(checkpoint, built(base, lora=None, evaluate_teacher=True))
    assert not fits(checkpoint, built(other_base, lora=None, evaluate_teacher=True))
    live = saved(built(base, lora=None, teacher=LiveTeacher()))
    assert fits(live, built(other_base, lora=None, teacher=LiveTeacher(), evaluate_teacher=True))


def test_moved_teacher_model_is_accepted(base: str, other_base: str, tmp_path: Path) -> None:
    checkpoint = saved(built(base, teacher=ModelTeacher(other_base)))
    moved = str(shutil.copytree(other_base, tmp_path / "moved"))
    assert refusal(checkpoint, built(base, teacher=ModelTeacher(moved))) is None
    assert "model.teacher.model " in str(refusal(checkpoint, built(base, teacher=ModelTeacher(base))))
    assert "model.teacher.dtype " in str(refusal(checkpoint, built(base, teacher=ModelTeacher(moved, dtype="bfloat16"))))
    assert "model.teacher.privileged " in str(refusal(checkpoint, built(base, teacher=ModelTeacher(moved, privileged=True))))


def test_changed_training_settings_are_reported(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(checkpoint: dict[str, Any], **settings: Any) -> list[str]:
        lines: list[str] = []
        monkeypatch.setattr("opsd_lightning.methods.checkpoint_record.rank_zero_info", lines.append)
        assert refusal(checkpoint, built(base, **settings)) is None
        return lines

    checkpoint = saved(resuming(built(base, anchor=Anchor(0.1))))
    assert told(checkpoint, anchor=Anchor(0.1)) == []
    (line,) = told(
        checkpoint, anchor=Anchor(0.2), objective=DivergenceObjective(ReverseKL(), clip=TokenClip(0.1), temperature=1.5),
        sampling=Sampling(temperature=0.7), max_grad_norm=0.5, updates_per_batch=2,
    )  # fmt: skip
    for part in (
        "model.objective.divergence ForwardKL -> ReverseKL", "model.objective.clip NoClip -> TokenClip",
        "model.objective.temperature 1 -> 1.5", "model.sampling.temperature 1 -> 0.7", "model.max_grad_norm null -> 0.5",
        "model.updates_per_batch 1 -> 2", "model.anchor.weight 0.1 -> 0.2",
    ):  # fmt: skip
        assert part in line
    assert line.count(" -> ") == 7
    checkpoint[KEY]["settings"]["trainer.precision"] = "bf16-mixed"
    assert "trainer.precision bf16-mixed -> 32-true" in told(checkpoint, anchor=Anchor(0.1))[0]
    del checkpoint[KEY]["settings"]
    assert told(checkpoint, max_grad_norm=0.5, anchor=Anchor(0.1)) == []


def refused_file(path: Path) -> bool:
    with pytest.raises(ConfigError) as refused:
        check_file(path)
    return refused.value.setting == "ckpt_path"


def test_files_that_are_no_checkpoints_are_refused(base: str, tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, "good")
    trainer = Trainer(
        accelerator="cpu", logger=False, callbacks=[keep], default_root_dir=tmp_path, enable_progress_bar=False,
        enable_model_summary=False, max_steps=0,
    )  # fmt: skip
    trainer.strategy.connect(built(base, SFTModule))
    trainer.save_checkpoint(tmp_path / "good.ckpt")
    check_file(tmp_path / "good.ckpt")
    content = (tmp_path / "good.ckpt").read_bytes()
    for number, data in enumerate((b"", b"no checkpoint", content[:-100], b"\x80\x02}q\x00.")):
        (tmp_path / f"{number}.ckpt").write_bytes(data)
        assert refused_file(tmp_path / f"{number}.ckpt")
    values: list[Any] = [{"a": 1}, [1, 2], torch.ones(3), {"state_dict": {}}, {"pytorch-lightning_version": "2"}]
    for value in [*values, {"pytorch-lightning_version": "2", "state_dict": [1]}]:
        torch.save(value, tmp_path / "other.ckpt")
        assert refused_file(tmp_path / "other.ckpt")
    torch.save(torch.load(tmp_path / "good.ckpt", weights_only=True) | {"mine": SimpleNamespace()}, tmp_path / "other.ckpt")
    assert refused_file(tmp_path / "other.ckpt")
    with torch.serialization.safe_globals([SimpleNamespace]):
        check_file(tmp_path / "other.ckpt")


def test_the_command_line_checks_the_file_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from opsd_lightning.cli.command import main

    torch.save({"weights": torch.ones(2)}, tmp_path / "plain.ckpt")
    with pytest.raises(SystemExit) as left:
        main(["test", "--model.policy.model=/no/such/model", f"--ckpt_path={tmp_path / 'plain.ckpt'}"])
    assert left.value.code == 2 and "ckpt_path: " in capsys.readouterr().err


def test_allowing_changes_is_offered_only_for_loadable_weights(base: str) -> None:
    checkpoint, offer = saved(built(base)), "model.allow_checkpoint_changes"
    assert offer in str(refusal(checkpoint, built(base, lora=LoRA(4, 9, 0.0, ["q_proj"]))))
    for lora, teacher, setting in (
        (LoRA(2, 4, 0.0, ["q_proj"]), None, "model.policy.lora.r"),
        (LoRA(4, 8, 0.0, ["k_proj"]), None, "model.policy.lora.target_modules"),
        (None, None, "model.policy.lora"),
        (LORA, EMATeacher(), "model.teacher"),
    ):
        assert offer not in str(refusal(checkpoint, built(base, lora=lora, teacher=teacher)))
        allowed = built(base, lora=lora, teacher=teacher, allow_checkpoint_changes=True)
        with pytest.raises(ConfigError) as refused:
            allowed.on_load_checkpoint(deepcopy(checkpoint))
        assert refused.value.setting == "ckpt_path" and f"{setting} " in refused.value.problem


def test_an_evaluation_without_the_second_adapter_names_its_setting(base: str, tmp_path: Path) -> None:
    first = built(base)
    with torch.no_grad():
        for name, value in first.model.named_parameters():
            if "lora_B" in name:
                value.fill_(0.1)
    first.model.save_pretrained(tmp_path)

    def problem(checkpoint: dict[str, Any], module: Any) -> str:
        with pytest.raises(ConfigError) as refused:
            module.on_load_checkpoint(deepcopy(checkpoint))
        return refused.value.problem

    started = OPSDModule(Policy(base, adapter=str(tmp_path), dtype="float32"))
    started.configure_model()
    plain, averaged = saved(built(base)), saved(built(base, teacher=EMATeacher()))
    assert "model.teacher EMATeacher -> FixedTeacher" in problem(averaged, built(base))
    assert "model.teacher FixedTeacher -> EMATeacher" in problem(plain, built(base, teacher=EMATeacher()))
    assert "model.policy.adapter " in problem(saved(started), built(base))
    assert "model.teacher" not in problem(saved(started), built(base))
    del averaged[KEY]
    both = problem(averaged, built(base))
    assert "model.teacher" in both and "model.policy.adapter" in both


def test_another_base_is_named_by_its_shapes() -> None:
    ours: dict[str, Tensor] = {"model.q.lora_A.default.weight": torch.ones(4, 8)}
    theirs = {"model.q.lora_A.default.weight": torch.ones(4, 16)}
    assert list(mismatched_weights(theirs, ours, Policy("m"))) == ["model.policy.model"] and not mismatched_weights(
        ours, ours, Policy("m")
    )


def test_changed_prompts_and_rows_are_reported_separately() -> None:
    """See also the refusals of a whole run, in test_checkpoint_record."""
    rows = PromptBatch([[1, 2]], [[1, 2, 3]], [Example("q", "t", "a")], [])
    texts, tokens = rows_digest(rows)
    assert (
        rows_digest(rows._replace(student=[[1, 3]]))[0] == texts
        and rows_digest(rows._replace(student=[[1, 3]]))[1] != tokens
    )
    other = rows_digest(rows._replace(examples=[Example("q", "u", "a")]))
    assert other[0] != texts and other[1] == tokens
