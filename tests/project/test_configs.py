"""Tests of every configuration: it parses, and every recipe trains a step on a tiny model of its architecture."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict

from helpers.configs import parsed, shrunk_skills
from helpers.files import write_jsonl
from helpers.grading import with_answers
from helpers.paths import ROOT
from helpers.vllm_stand_in import VERSIONS, make_vllm
from opsd_lightning.cli.command import main
from opsd_lightning.prompts.templates import STUDENT_TEMPLATE, Prompts

pytestmark = pytest.mark.integration


CONFIGS = ROOT / "configs"
RECIPES = sorted(CONFIGS.glob("*.yaml"))
TASKS = sorted((CONFIGS / "tasks").glob("*.yaml"))
PRESETS = sorted((CONFIGS / "presets").glob("*.yaml"))
EVALUATIONS = sorted((CONFIGS / "eval").glob("*.yaml"))
FAMILY = {"quickstart": "llama", "learn": "llama"}


@pytest.fixture
def shrunk(folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], list[str]]:
    """A recipe's own settings on a tiny model, few short rows and one step."""
    monkeypatch.chdir(tmp_path)  # its logger has a folder of its own

    def arguments(recipe: Path) -> list[str]:
        rows = [{"problem": f"{n}+1?", "solution": rf"\boxed{{{n + 1}}}"} for n in range(8)]
        path = write_jsonl(tmp_path / "rows.jsonl", rows)
        source = [f"--data.{split}=FileSource" for split in ("train", "val", "test")]
        source += [f"--data.{split}.init_args.path={path}" for split in ("train", "val", "test")]
        slices = {"train": "train[4:]", "val": "train[:2]", "test": "train[2:4]"}
        source += [f"--data.{split}.init_args.split={rows}" for split, rows in slices.items()]
        return [
            f"--config={recipe}",
            f"--model.policy.model={folders[FAMILY.get(recipe.stem, 'qwen3')]}",
            *source,
            "--data.batch_size=2",
            "--data.eval_batch_size=2",
            "--model.sampling.max_new_tokens=8",
            "--model.eval_sampling.max_new_tokens=8",
            "--trainer.accelerator=cpu",
            f"--trainer.default_root_dir={tmp_path}",
            "--trainer.max_steps=1",
            "--trainer.val_check_interval=1",
        ]

    return arguments


# The larger Qwen recipes are laid out as the smallest.
LARGER = [path for path in RECIPES if "4b" in path.stem or "8b" in path.stem]


@pytest.mark.parametrize(
    "recipe", [pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path in LARGER)) for path in RECIPES]
)
def test_recipe_takes_a_step(
    recipe: Path, shrunk: Callable[[Path], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, module in make_vllm(VERSIONS[-1], []).items():  # for the recipe that samples by vLLM, which needs a GPU
        monkeypatch.setitem(sys.modules, name, module)
    cli = main(["fit", *shrunk(recipe)])
    assert cli.trainer.global_step == 1
    settings = yaml.safe_load(recipe.read_text())
    base = next(m for n, m in cli.model.model.named_modules() if n.endswith("q_proj.base_layer"))
    assert type(base).__name__ == ("Linear4bit" if "quantization" in settings["model"]["policy"] else "Linear")
    assert cli.model.model.peft_config["default"].r == settings["model"]["policy"]["lora"]["r"]
    weights = [p for n, p in cli.model.model.named_parameters() if "lora_B.default" in n]
    assert all(p.dtype == torch.float32 and p.any() for p in weights)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("recipe", TASKS, ids=lambda path: path.stem)
def test_task_takes_a_step_with_its_own_data(
    recipe: Path, folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its grader grades every reference as right, and its checkpoints are chosen by a metric that it logs."""
    monkeypatch.chdir(tmp_path)
    sizes = [f"--data.{split}.init_args.size={size}" for split, size in (("train", 8), ("val", 2), ("test", 2))]
    cli = main(
        [
            "fit",
            f"--config={recipe}",
            f"--model.policy.model={folders['llama']}",
            *sizes,
            "--data.batch_size=2",
            "--model.sampling.max_new_tokens=8",
            "--model.eval_sampling.max_new_tokens=8",
            f"--trainer.default_root_dir={tmp_path}",
            "--trainer.max_steps=1",
            "--trainer.val_check_interval=1",
        ]
    )
    assert cli.trainer.global_step == 1 and not cli.datamodule.dropped["train"]
    assert cli.trainer.checkpoint_callback.best_model_path
    grader = cli.datamodule.grader
    if grader.grades_completions:
        context = cli.datamodule.context
        examples = cli.datamodule.rows["train"].examples
        shown = [context.text(index, examples) for index in range(len(examples))]
        assert all(grade.score == 1 for grade in grader.grades(shown, examples))
        assert all(grade.score < 1 for grade in grader.grades([""] * len(examples), examples))
    assert f"runs/tasks/{recipe.stem}" in recipe.read_text() and f"make task NAME={recipe.stem}" in recipe.read_text()


def pairs(recipes: Sequence[Path], overlays: Sequence[Any]) -> list[Any]:
    """Return every recipe with every overlay; slow are those whose recipe and whose overlay both stand in another pair."""
    return [
        pytest.param(
            recipe,
            overlay,
            id=f"{recipe.stem}-{getattr(overlay, 'stem', overlay)}",
            marks=[pytest.mark.slow] * bool(i and j),
        )
        for i, recipe in enumerate(recipes)
        for j, overlay in enumerate(overlays)
    ]


OVERLAID = [path for path in RECIPES if path not in LARGER]
OTHERS = {"grpo": "GRPOModule", "sft": "SFTModule"}
METHODS = [path for path in PRESETS if path.stem in ("paper_v1", "released_v3")]
THINKING = CONFIGS / "presets" / "validate_thinking.yaml"
SKILLS = CONFIGS / "presets" / "kept_skills.yaml"
MACHINES = [
    path for path in PRESETS if path not in (*METHODS, THINKING, SKILLS) and path.stem not in (*OTHERS, "full_finetuning")
]
CHANGES = {  # what every other preset is for, by the setting's path
    "ddp": ("trainer.strategy.class_path", "lightning.pytorch.strategies.DDPStrategy"),
    "vllm": ("model.rollouts.class_path", "opsd_lightning.VLLMServerEngine"),
    "fsdp2": ("trainer.strategy.class_path", "opsd_lightning.FSDP2Strategy"),
}


@pytest.mark.parametrize(("recipe", "preset"), pairs(OVERLAID, MACHINES))
def test_presets_of_the_machine_change_that_alone(recipe: Path, preset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config: Any = parsed(["fit", f"--config={recipe}", f"--config={preset}"], monkeypatch)
    own = parsed(["fit", f"--config={recipe}"], monkeypatch)
    assert config["model"] | {"rollouts": 0} == own["model"] | {"rollouts": 0}
    setting, value = CHANGES[preset.stem]
    for name in setting.split("."):
        config = config[name]
    assert config == value


@pytest.mark.parametrize(("recipe", "preset"), pairs(OVERLAID, METHODS))
def test_presets_overlay_every_recipe(recipe: Path, preset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parsed(["fit", f"--config={recipe}", f"--config={preset}"], monkeypatch)
    assert config["model"]["sampling"]["temperature"] == 1.1
    divergence = config["model"]["objective"]["init_args"]["divergence"]["class_path"].rpartition(".")[2]
    assert divergence == {"paper_v1": "GeneralizedJSD", "released_v3": "ForwardKL"}[preset.stem]


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path not in (OVERLAID[0], TASKS[0])))
        for path in [*OVERLAID, *TASKS]
    ],
)
def test_kept_skills_are_one_more_callback(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_skills = parsed(["fit", f"--config={recipe}", f"--config={SKILLS}"], monkeypatch)
    own = parsed(["fit", f"--config={recipe}"], monkeypatch)
    *callbacks, last = with_skills["trainer"].pop("callbacks")
    assert callbacks == own["trainer"].pop("callbacks")
    assert last["class_path"].endswith("KeptSkills")
    assert [with_skills[name] for name in ("model", "trainer")] == [own[name] for name in ("model", "trainer")]


def test_kept_skills_are_measured_in_fit_and_test(roomy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    preset = shrunk_skills(tmp_path)
    settings = [
        f"--config={CONFIGS / 'quickstart.yaml'}", f"--config={preset}", f"--model.policy.model={roomy}",
        *(f"--data.{split}.init_args.size=4" for split in ("train", "val", "test")), "--data.batch_size=2",
        "--model.sampling.max_new_tokens=8", "--model.eval_sampling.max_new_tokens=8", "--trainer.max_steps=1",
        "--trainer.val_check_interval=1", f"--trainer.default_root_dir={tmp_path}",
    ]  # fmt: skip
    checkpoint = main(["fit", *settings]).trainer.checkpoint_callback.best_model_path
    values = main(["test", *settings, f"--ckpt_path={checkpoint}"]).trainer.callback_metrics
    for name, skills in yaml.safe_load(preset.read_text())["trainer"]["callbacks+"][0]["init_args"]["sets"].items():
        assert f"test/skills/{name}" in values
        assert (f"test/skills/{name}_change" in values) == (skills["class_path"] != "BaseDivergence")
    assert (tmp_path / "skills.jsonl").exists() and (tmp_path / "skills_test.jsonl").exists()


def test_the_vllm_recipe_differs_in_base_weights_and_sampler_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm, plain = (
        parsed(["fit", f"--config={CONFIGS}/qwen3_1.7b_{name}.yaml"], monkeypatch) for name in ("lora_vllm", "qlora")
    )
    assert vllm["model"]["rollouts"]["class_path"] == "opsd_lightning.VLLMEngine"
    for config in (vllm, plain):
        del config["model"]["rollouts"], config["model"]["policy"]["quantization"], config["trainer"]["default_root_dir"]
        del config["data"]["policy"], config["config"]
    assert vllm == plain


# vLLM engines send adapters only.
@pytest.mark.parametrize("recipe", [path for path in OVERLAID if "vllm" not in path.stem], ids=lambda path: path.stem)
def test_all_weights_train_in_place_of_an_adapter(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = CONFIGS / "presets" / "full_finetuning.yaml"
    own = parsed(["fit", f"--config={recipe}"], monkeypatch)
    config = parsed(["fit", f"--config={recipe}", f"--config={preset}"], monkeypatch)
    changed = {"lora": None, "quantization": None, "dtype": "float32"}
    assert config["model"]["policy"] == own["model"]["policy"] | changed
    assert config["model"]["teacher"]["class_path"] == "opsd_lightning.FixedTeacher"
    for section, parts in {"model": {"policy": 0, "teacher": 0}, "data": {"policy": 0}, "trainer": {}}.items():
        assert config[section] | parts == own[section] | parts


@pytest.mark.parametrize(("recipe", "other"), pairs(OVERLAID, list(OTHERS)))
def test_another_method_keeps_the_recipes_settings(recipe: Path, other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = parsed(["fit", f"--config={recipe}"], monkeypatch)
    config = parsed(["fit", f"--config={recipe}", f"--config={CONFIGS / 'presets' / other}.yaml"], monkeypatch)
    assert own["method"] == "opsd_lightning.OPSDModule" and config["method"] == f"opsd_lightning.{OTHERS[other]}"
    shared = set(own["model"]) & set(config["model"]) - {"sampling"}
    assert {"policy", "optimizer", "lr_scheduler", "eval_sampling", "rollouts", "grader"} <= shared
    assert all(config["model"][name] == own["model"][name] for name in shared)
    assert config["model"]["sampling"] | {"n": 1} == own["model"]["sampling"]
    assert config["model"]["sampling"]["n"] == (8 if other == "grpo" else 1)
    assert config["trainer"] == own["trainer"] and config["data"] | {"batch_size": 0} == own["data"] | {"batch_size": 0}


@pytest.mark.parametrize("name", ["1.7b_lora_vllm", "1.7b_qlora", "4b_qlora", "8b_qlora"])
def test_the_qwen_recipes_are_the_released_settings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = CONFIGS / f"qwen3_{name}.yaml"
    own = parsed(["fit", f"--config={recipe}"], monkeypatch)
    laid = parsed(["fit", f"--config={recipe}", f"--config={CONFIGS / 'presets' / 'released_v3.yaml'}"], monkeypatch)
    tau = {"8b": 0.06}.get(name.partition("_")[0], 0.05)
    assert own["model"]["objective"]["init_args"]["clip"]["init_args"].pop("tau") == tau
    assert laid["model"]["objective"]["init_args"]["clip"]["init_args"].pop("tau") == 0.05
    assert own["model"] == laid["model"] and own["data"] == laid["data"] and own["trainer"] == laid["trainer"]


# opsd-method, reference settings: pinned here, so that a preset cannot drift unseen.
REFERENCE = {
    "released_v3": ("PointwiseClip", 1024, 5e-6),
    "paper_v1": ("NoClip", 2048, 1e-5),
}


@pytest.mark.parametrize("name", REFERENCE)
def test_preset_values(name: str) -> None:
    preset = yaml.safe_load((CONFIGS / "presets" / f"{name}.yaml").read_text())["model"]
    clip, tokens, rate = REFERENCE[name]
    found = preset["objective"]["init_args"]["clip"]
    assert (found if isinstance(found, str) else found["class_path"]).endswith(clip)
    sampling = preset["sampling"]
    assert sampling == {"max_new_tokens": tokens, "temperature": 1.1, "top_p": 0.95, "top_k": 20, "n": 1}
    assert preset["optimizer"]["init_args"]["lr"] == rate
    lora = preset["policy"]["lora"]
    assert (lora["r"], lora["alpha"], lora["dropout"], len(lora["target_modules"])) == (64, 128, 0.05, 7)


@pytest.mark.parametrize(("recipe", "evaluation"), pairs(OVERLAID[1:], EVALUATIONS))
def test_evaluations_overlay_recipes(recipe: Path, evaluation: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The protocol is the same whatever the recipe says, and what samples stays the recipe's or another overlay's."""
    servers = CONFIGS / "presets" / "vllm.yaml"
    config = parsed(["test", f"--config={recipe}", f"--config={servers}", f"--config={evaluation}"], monkeypatch)
    own = parsed(["test", f"--config={recipe}", f"--config={servers}"], monkeypatch)
    grader = config["model"]["grader"]
    protocol = ("eval_sampling", "grader", "prompts")
    assert config["model"] | dict.fromkeys(protocol) == own["model"] | dict.fromkeys(protocol)
    sampling = config["model"]["eval_sampling"]
    assert sampling == {"max_new_tokens": 38912, "temperature": 1.0, "top_p": 0.95, "top_k": 0, "min_p": 0.0, "n": 12}
    data = config["data"]
    assert data["max_new_tokens"] == 38912 and data["on_invalid"] == "error"
    assert data["prompts"]["student_chat_template_kwargs"] == {"enable_thinking": True} and data["prompts"]["system"] is None
    assert data["prompts"]["student_template"] == STUDENT_TEMPLATE
    test = data["test"]["init_args"]
    where = (test["path"], test["name"], test["split"], *(test["columns"][c] for c in ("question", "trace", "answer")))
    assert where == SETS[evaluation.stem][0]
    assert (grader["init_args"]["answer_pattern"] is None) == (evaluation.stem != "gsm8k")


@pytest.mark.parametrize("evaluation", EVALUATIONS, ids=lambda path: path.stem)
def test_evaluations_think_whatever_a_recipe_validates_with(
    evaluation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: {prompts: {evaluation_chat_template_kwargs: {enable_thinking: false}}}\n")
    base = f"--config={CONFIGS / 'qwen3_1.7b_qlora.yaml'}"
    config = parsed(["test", base, f"--config={recipe}", f"--config={evaluation}"], monkeypatch)
    prompts = Prompts(**{name: value for name, value in config["data"]["prompts"].items() if name.endswith("_kwargs")})
    assert prompts.of_split("test").student_chat_template_kwargs == {"enable_thinking": True}


@pytest.mark.parametrize("recipe", [path for path in RECIPES if "qwen3" in path.stem], ids=lambda path: path.stem)
def test_thinking_validation_is_the_papers_protocol_with_fewer_samples(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And changes nothing of training."""
    own = parsed(["fit", f"--config={recipe}"], monkeypatch)
    config = parsed(["fit", f"--config={recipe}", f"--config={THINKING}"], monkeypatch)
    protocol = yaml.safe_load(EVALUATIONS[0].read_text())
    samples = own["model"]["eval_sampling"]["n"]  # in the name of the metric that selects the checkpoint
    assert config["model"]["eval_sampling"] == protocol["model"]["eval_sampling"] | {"n": samples}
    thinking = protocol["data"]["prompts"]["student_chat_template_kwargs"]
    assert config["data"]["prompts"] == own["data"]["prompts"] | {"evaluation_chat_template_kwargs": thinking}
    same = {"eval_sampling": 0, "prompts": 0}
    assert config["model"] | same == own["model"] | same and config["trainer"] == own["trainer"]
    same = {"max_new_tokens": 0, "prompts": 0}
    assert config["data"] | same == own["data"] | same


def test_thinking_validation_trains_without_thinking(
    shrunk: Callable[[Path], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, *settings = shrunk(CONFIGS / "qwen3_1.7b_qlora.yaml")
    cli = main(["fit", recipe, f"--config={THINKING}", *settings])
    tokenizer = cli.model.tokenizer
    train, val = (tokenizer.decode(cli.datamodule.rows[split].student[0]) for split in ("train", "val"))
    assert train.endswith("<think></think>") and "<think>" not in val
    assert "val/avg@4" in cli.trainer.callback_metrics


# Where the set is, its split and the columns that are read; and rows with all columns that it is documented to have, a
# completion's boxed answer that is right for the last of them, and the reference that it is graded against.
SETS: dict[str, tuple[tuple[str | None, ...], list[dict[str, Any]], str, str]] = {
    "aime24": (
        ("HuggingFaceH4/aime_2024", None, "train", "problem", None, "answer"),
        [{"id": 60, "problem": "Find it.", "solution": "No box.", "answer": "033", "url": "u", "year": "2024"}],
        "33",
        "033",
    ),
    "aime25": (
        ("yentinglin/aime_2025", None, "train", "problem", None, "answer"),
        [{"problem": "Find the angle.", "answer": r"336^\circ"}, {"problem": "Find it.", "answer": "70"}],
        "70.0",
        "70",
    ),
    "hmmt25": (
        ("MathArena/hmmt_feb_2025", None, "train", "problem", None, "answer"),
        [{"problem_idx": 1, "problem": "Find it.", "answer": r"\frac{-1+\sqrt{17}}{2}", "problem_type": ["Algebra"]}],
        r"\frac{\sqrt{17}-1}{2}",
        r"\frac{-1+\sqrt{17}}{2}",
    ),
    "math500": (
        ("HuggingFaceH4/MATH-500", None, "test", "problem", None, "answer"),
        [
            {
                "problem": "Convert (0,3).", "solution": "It is $\\boxed{(3,\\frac{\\pi}{2})}$.", "answer": r"\left( 3, \frac{\pi}{2} \right)",
                "subject": "Precalculus", "level": 2, "unique_id": "test/precalculus/807.json",
            }
        ],
        r"(3, \pi/2)",
        r"\left( 3, \frac{\pi}{2} \right)",
    ),
    "gsm8k": (
        ("openai/gsm8k", "main", "test", "question", "answer", None),
        [
            {"question": "How many in all?", "answer": "The answer is 5 a day: 2*5 = <<2*5=10>>10.\n#### 10"},
            {"question": "How many dollars?", "answer": "He has 1,000 and 80.\n#### 1,080"},
        ],
        "1080",
        "1,080",
    ),
}  # fmt: skip


@pytest.mark.parametrize("evaluation", EVALUATIONS, ids=lambda path: path.stem)
def test_evaluation_of_a_stand_in(
    evaluation: Path, folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The set's own columns through the real source, prompts, sampling and grader; only its texts and the model are small."""
    (_, _, split, *_), rows, answer, reference = SETS[evaluation.stem]
    assert split is not None
    DatasetDict({split: Dataset.from_list(rows)}).save_to_disk(tmp_path / "set")
    small = [
        f"--model.policy.model={folders['qwen3']}",
        "--trainer.accelerator=cpu",
        f"--trainer.default_root_dir={tmp_path}",
        "--model.sampling.max_new_tokens=8",
        "--model.eval_sampling.max_new_tokens=8",
        f"--data.test.init_args.path={tmp_path / 'set'}",
    ]
    cli = main(["test", f"--config={CONFIGS / 'qwen3_1.7b_qlora.yaml'}", f"--config={evaluation}", *small])
    records = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    assert len(records) == 12 * len(rows) and records[-1]["reference"] == reference
    names = {f"test/{name}{error}" for name in ("avg@12", "pass@1", "pass@2", "pass@4", "pass@8", "pass@12", "maj@12")
             for error in ("", "_se", "_se_samples")}  # fmt: skip
    assert names <= set(cli.trainer.callback_metrics)
    assert "± over samples" in capsys.readouterr().out
    grader = cli.model.evaluator.grader
    (example,) = with_answers([reference])
    assert grader.grade(rf"<think>\boxed{{1}}</think> So it is \boxed{{{answer}}}.", example).score == 1
    assert grader.grade(rf"The answer is {answer}. So it is \boxed{{17}}.", example).score == 0
    assert grader.grade(f"The answer is {answer}.", example).score == 0  # what is not boxed does not count
    prompt = cli.model.tokenizer.decode(cli.datamodule.rows["test"].student[0])
    assert rows[0]["problem" if "problem" in rows[0] else "question"] in prompt and "<think></think>" not in prompt


def test_an_evaluation_that_the_model_cannot_hold(
    folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Dataset.from_list(SETS["aime24"][1]).save_to_disk(tmp_path / "set")
    arguments = [f"--model.policy.model={folders['qwen3']}", f"--data.test.init_args.path={tmp_path / 'set'}"]
    with pytest.raises(SystemExit):
        main(["test", f"--config={CONFIGS / 'eval' / 'aime24.yaml'}", *arguments, f"--trainer.default_root_dir={tmp_path}"])
    error = capsys.readouterr().err
    assert all(part in error for part in ("data.test", "row 0", " 38912 ", " 512 "))


def test_every_recipe_has_its_row_in_the_readme() -> None:
    text = (CONFIGS / "README.md").read_text()
    for path in [*RECIPES, *TASKS, *PRESETS, *EVALUATIONS]:
        assert f"`{path.relative_to(CONFIGS)}`" in text, path
