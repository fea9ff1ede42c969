"""Tests of `KeptSkills`: measurements of a fit and a test, files, resumption, and refused settings."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from helpers.chat_templates import template
from helpers.messages import mentions
from helpers.skills import Digits, Rows, records, skill_sets
from helpers.training import Recorder, adapters, metrics, parts, trainer
from opsd_lightning.callbacks.kept_skills import KeptSkills
from opsd_lightning.callbacks.rollouts import RolloutWriter
from opsd_lightning.data.sources import FileSource, WordProblems
from opsd_lightning.data.task_sources import CategoryQuestions
from opsd_lightning.evaluation.skill_sets import BaseDivergence, ChoicesByLikelihood, GradedCompletions
from opsd_lightning.evaluation.skills import ItemScore, SkillSet
from opsd_lightning.models.policy import Policy
from opsd_lightning.prompts.templates import Prompts
from opsd_lightning.types import ConfigError, Example, Sampling

pytestmark = pytest.mark.integration

MakePolicy = Callable[..., Policy]


def fit(policy: Policy, folder: Path, *callbacks: Any, checkpoint: Path | None = None, **settings: Any) -> Any:
    torch.manual_seed(0)
    settings = {"max_steps": 4, "val_check_interval": 2, "check_val_every_n_epoch": None} | settings
    module, data = parts(policy)
    run = trainer(
        folder, *callbacks, enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks), **settings
    )
    run.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    return module


def counts(path: Path) -> Counter[tuple[str, str, int]]:
    return Counter((record["set"], record["role"], record["step"]) for record in records(path))


def test_a_fit_measures_the_start_each_validation_and_the_end(make_policy: MakePolicy, tmp_path: Path) -> None:
    skills = KeptSkills(skill_sets(5))
    fit(make_policy(), tmp_path, skills, max_steps=5)
    found = counts(tmp_path / "skills.jsonl")
    graded = {("facts", "base", 0): 5, ("digits", "base", 0): 5}
    assert found == graded | {(name, "run", step): 5 for name in ("facts", "digits", "drift") for step in (0, 2, 4, 5)}
    logged = metrics(tmp_path)
    for name in ("facts", "digits", "drift"):
        rows = [row for row in logged if f"skills/{name}" in row]
        assert [row["step"] for row in rows] == [0, 1, 3, 4]  # Lightning numbers batches from 0
        for row, step in zip(rows, (0, 2, 4, 5), strict=True):
            written = records(tmp_path / "skills.jsonl")
            scores = [r for r in written if (r["set"], r["role"], r["step"]) == (name, "run", step)]
            mean = sum(r["score"] for r in scores) / sum(r["weight"] for r in scores)
            assert row[f"skills/{name}"] == pytest.approx(mean, abs=1e-6)
    assert set().union(*logged) >= skills.logged_names(None)  # type: ignore[arg-type]
    assert skills.of_run["drift"].value > 1e-6


def test_training_does_not_change(make_policy: MakePolicy, tmp_path: Path) -> None:
    plain = adapters(fit(make_policy(), tmp_path / "plain"))
    measured = adapters(fit(make_policy(), tmp_path / "measured", KeptSkills(skill_sets(3), every_n_steps=1)))
    for name, weight in plain.items():
        assert torch.equal(weight, measured[name]), name


def test_a_resumed_fit_does_not_measure_the_base_again(make_policy: MakePolicy, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    fit(make_policy(), whole, KeptSkills(skill_sets(5)))
    folder = tmp_path / "resumed"
    keep = ModelCheckpoint(folder / "saved", filename="run", every_n_train_steps=2)
    with pytest.raises(RuntimeError, match="crash"):
        fit(make_policy(), folder, KeptSkills(skill_sets(5)), keep, Recorder(crash_before=3))
    again = KeptSkills(skill_sets(5))
    fit(make_policy(), folder, again, checkpoint=folder / "saved" / "run.ckpt")
    assert counts(folder / "skills.jsonl") == counts(whole / "skills.jsonl")
    assert records(folder / "skills.jsonl") == records(whole / "skills.jsonl")
    assert again.of_base.keys() == {"facts", "digits"}


@pytest.mark.filterwarnings("ignore::UserWarning:opsd_lightning.methods.checkpoint_record")
def test_a_set_with_other_items_starts_anew_when_a_run_resumes(make_policy: MakePolicy, tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path / "saved", filename="run", every_n_train_steps=2)
    fit(make_policy(), tmp_path, KeptSkills(skill_sets(5)), keep, max_steps=2)
    changed = KeptSkills(skill_sets(5) | {"facts": skill_sets(3)["facts"]})
    fit(make_policy(), tmp_path, changed, checkpoint=tmp_path / "saved" / "run.ckpt")
    found = counts(tmp_path / "skills.jsonl")
    assert {key: count for key, count in found.items() if key[0] == "facts"} == {
        ("facts", "base", 0): 3, ("facts", "run", 2): 3, ("facts", "run", 4): 3,
    }  # fmt: skip
    assert [entry["step"] for entry in changed.history if entry["set"] == "digits"] == [0, 2, 4]
    change = changed.of_run["facts"].change(changed.of_base["facts"])[0]
    facts = {entry["step"]: entry["change"][0] for entry in changed.history if entry["set"] == "facts"}
    assert facts.keys() == {2, 4} and facts[4] == change


def longer(skills: dict[str, Any]) -> dict[str, Any]:
    return skills | {"digits": GradedCompletions(WordProblems(size=4, seed=8), Digits(), max_new_tokens=7)}


def by_bytes(skills: dict[str, Any]) -> dict[str, Any]:
    return skills | {"facts": ChoicesByLikelihood(CategoryQuestions(size=4, seed=7), normalization="bytes")}


def by_label(skills: dict[str, Any]) -> dict[str, Any]:
    return skills | {"facts": ChoicesByLikelihood(CategoryQuestions(size=4, seed=7), scored="label")}


def in_other_words(skills: dict[str, Any]) -> dict[str, Any]:
    prompts = Prompts("{question} Be brief.")
    return skills | {"digits": GradedCompletions(WordProblems(size=4, seed=8), Digits(), max_new_tokens=6, prompts=prompts)}


def other_options(skills: dict[str, Any]) -> dict[str, Any]:
    rows = CategoryQuestions(size=4, seed=7).examples()
    rows[0] = rows[0]._replace(columns={"options": ["one", "two", "three", "four"]})
    return skills | {"facts": ChoicesByLikelihood(Rows(rows))}


def other_batches(skills: dict[str, Any]) -> dict[str, Any]:
    return skills | {"facts": ChoicesByLikelihood(Rows(CategoryQuestions(size=4, seed=7).examples()), batch_size=3)}


@pytest.mark.filterwarnings("ignore::UserWarning:opsd_lightning.methods.checkpoint_record")
@pytest.mark.parametrize(
    ("change", "anew"),
    [
        (longer, {"digits"}),
        (by_bytes, {"facts"}),
        (by_label, {"facts"}),
        (in_other_words, {"digits"}),
        (other_options, {"facts"}),
        (other_batches, set()),
    ],
)
def test_the_base_of_other_settings_is_not_kept(
    change: Callable[[dict[str, Any]], dict[str, Any]], anew: set[str], make_policy: MakePolicy, tmp_path: Path
) -> None:
    sets = {name: skills for name, skills in skill_sets(4).items() if name != "drift"}
    before, after = KeptSkills({**sets}), KeptSkills(change(sets))
    for skills in (before, after):
        module, data = parts(make_policy())
        run = trainer(tmp_path, skills, logger=False)
        run.validate(module, data, verbose=False)
    state = before.state_dict()
    after.of_base = {}
    after.load_state_dict(state)
    assert after.of_base.keys() == {"facts", "digits"} - anew


class Brevity(SkillSet):
    """A set of a user's own: share of greedy completions that end within four tokens."""

    def measure(self, module: Any, places: Sequence[int]) -> list[ItemScore]:
        prompts = [module.tokenizer.encode(self.examples[place].question) for place in places]
        rollouts = module.rollouts.generate(module.model, prompts, Sampling(4, temperature=0.0), seed=0)
        return [ItemScore(float(terminated)) for terminated in rollouts.terminated]


def test_a_set_of_ones_own_needs_one_method(make_policy: MakePolicy, tmp_path: Path) -> None:
    skills = KeptSkills({"brevity": Brevity(WordProblems(size=5), batch_size=2)})
    fit(make_policy(), tmp_path, skills, max_steps=1, limit_val_batches=0)
    found = records(tmp_path / "skills.jsonl")
    assert [record["item"] for record in found if record["role"] == "base"] == list(range(5))
    assert {record["score"] for record in found} <= {0.0, 1.0}


def test_a_new_fit_keeps_the_file_of_an_earlier_one(make_policy: MakePolicy, tmp_path: Path) -> None:
    for _ in range(2):
        fit(
            make_policy(),
            tmp_path,
            KeptSkills({"facts": skill_sets(2)["facts"]}),
            max_steps=1,
            limit_val_batches=0,
            logger=False,
        )
    assert records(tmp_path / "skills-1.jsonl") == records(tmp_path / "skills.jsonl")


def test_a_test_compares_base_and_run(make_policy: MakePolicy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep = ModelCheckpoint(tmp_path / "saved", filename="run", every_n_train_steps=3)
    fitted = KeptSkills(skill_sets(5))
    fit(make_policy(), tmp_path, fitted, keep, max_steps=3)
    capsys.readouterr()
    module, data = parts(make_policy())
    skills = KeptSkills(skill_sets(5))
    run = trainer(tmp_path, RolloutWriter(), skills, logger=False)
    (values,) = run.test(module, data, ckpt_path=tmp_path / "saved" / "run.ckpt", weights_only=True, verbose=False)
    for name in ("facts", "digits"):
        base, now = (
            [r["score"] for r in records(tmp_path / "skills_test.jsonl") if (r["set"], r["role"]) == (name, role)]
            for role in ("base", "run")
        )
        assert base == [item.score for item in fitted.of_base[name].items]
        assert now == [item.score for item in fitted.of_run[name].items]
        assert values[f"test/skills/{name}"] == pytest.approx(sum(now) / 5, abs=1e-6)
        assert values[f"test/skills/{name}_base"] == pytest.approx(sum(base) / 5, abs=1e-6)
        assert values[f"test/skills/{name}_change"] == pytest.approx((sum(now) - sum(base)) / 5, abs=1e-6)
    assert values["test/skills/drift"] == pytest.approx(fitted.of_run["drift"].value, rel=1e-4)
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if "digits" in line)
    assert f"{values['test/skills/digits_base']:.1%}" in row and f"{values['test/skills/digits']:.1%}" in row
    assert any("drift" in line and f"{values['test/skills/drift']:.4f}" in line for line in printed.splitlines())


def test_untrained_weights_are_measured_once(make_policy: MakePolicy, tmp_path: Path) -> None:
    module, data = parts(make_policy())
    skills = KeptSkills(skill_sets(3))
    trainer(tmp_path, skills, logger=False).validate(module, data, verbose=False)
    for name, result in skills.of_base.items():
        assert skills.of_run[name] is result
    assert skills.of_run["drift"].value == pytest.approx(0, abs=1e-6)


def test_without_the_base(make_policy: MakePolicy, tmp_path: Path) -> None:
    module, data = parts(make_policy())
    skills = KeptSkills({"facts": skill_sets(3)["facts"]}, base=False)
    (values,) = trainer(tmp_path, skills, logger=False).test(module, data, verbose=False)
    assert {name for name in values if "skills" in name} == {"test/skills/facts", "test/skills/facts_se"}
    assert set(counts(tmp_path / "skills_test.jsonl")) == {("facts", "run", 0)}


def test_full_fine_tuning(make_policy: MakePolicy, tmp_path: Path) -> None:
    """The base is the model at the start of a fit, and is not there afterwards."""
    policy = make_policy(lora=None)
    sets = {"digits": skill_sets(3)["digits"]}
    skills = KeptSkills(sets)
    keep = ModelCheckpoint(tmp_path / "saved", filename="run", every_n_train_steps=2)
    fit(policy, tmp_path, skills, keep, max_steps=2)
    other = KeptSkills(sets)
    fit(make_policy(), tmp_path / "adapter", other, max_steps=1)
    assert [i.score for i in skills.of_base["digits"].items] == [i.score for i in other.of_base["digits"].items]
    module, data = parts(policy)
    tested = KeptSkills(sets)
    run = trainer(tmp_path, tested, logger=False)
    (values,) = run.test(module, data, ckpt_path=tmp_path / "saved" / "run.ckpt", weights_only=True, verbose=False)
    assert not tested.of_base and "test/skills/digits_change" not in values
    assert values["test/skills/digits"] == pytest.approx(skills.of_run["digits"].value, abs=1e-6)
    with pytest.raises(ConfigError) as error:
        fit(policy, tmp_path, KeptSkills(skill_sets(3)), max_steps=1)
    assert error.value.setting == "model.policy.lora"


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("name", ["facts", "drift"])
def test_a_checkpoint_may_monitor_a_skill(name: str, mode: str, make_policy: MakePolicy, tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path / "saved", monitor=f"skills/{name}", mode=mode)
    run = {"max_steps": 2}
    if (name == "facts") == (mode == "max"):
        fit(make_policy(), tmp_path, KeptSkills(skill_sets(2)), keep, **run)
        assert keep.best_model_score is not None
    else:
        with pytest.raises(ConfigError) as error:
            fit(make_policy(), tmp_path, KeptSkills(skill_sets(2)), keep, **run)
        assert error.value.setting == "trainer.callbacks.mode"


@pytest.mark.parametrize("names", [[], ["a b"], ["a/b"], ["facts_se"]])
def test_names_that_no_metric_can_have_are_refused(names: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        KeptSkills({name: skill_sets(2)["facts"] for name in names})
    assert error.value.setting == "trainer.callbacks.sets"


ONE = Example("Which?", "", "A", {"options": ["a", "b"]})


@pytest.mark.parametrize(
    ("skills", "setting"),
    [
        (ChoicesByLikelihood(FileSource("missing.jsonl")), "source.init_args.path"),
        (ChoicesByLikelihood(Rows([])), "source"),
        (ChoicesByLikelihood(Rows([ONE]), options="other"), "options"),
        (GradedCompletions(Rows([ONE._replace(answer="")]), Digits(), max_new_tokens=4), "source"),
        (BaseDivergence(WordProblems(size=2), max_new_tokens=600), "max_new_tokens"),
    ],
)
def test_errors_name_the_setting_of_the_set(skills: Any, setting: str, make_policy: MakePolicy, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        fit(make_policy(), tmp_path, KeptSkills({"mine": skills}))
    assert error.value.setting == f"trainer.callbacks.sets.mine.init_args.{setting}"
    assert not list(tmp_path.rglob("*.jsonl"))


@pytest.mark.parametrize(("evaluation", "thinks"), [(None, True), ({"enable_thinking": False}, False)])
def test_sets_have_the_prompts_of_an_evaluation(
    evaluation: Any, thinks: bool, make_policy: MakePolicy, tmp_path: Path
) -> None:
    path = tmp_path / "qwen3.jinja"
    path.write_text(template("qwen3"))
    policy = make_policy(chat_template=str(path))
    module, data = parts(policy)
    data.prompts = replace(
        data.prompts, student_chat_template_kwargs={"enable_thinking": True}, evaluation_chat_template_kwargs=evaluation
    )
    sets: dict[str, Any] = {name: skills for name, skills in skill_sets(2).items() if name != "facts"}
    trainer(tmp_path, KeptSkills(sets), logger=False).test(module, data, verbose=False)
    for skills in sets.values():
        for prompt in skills._prompts:
            assert ("</think>" in module.tokenizer.decode(prompt)) != thinks


def test_truncated_completions_are_told_once(make_policy: MakePolicy, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=mentions("digits")) as found:
        fit(make_policy(), tmp_path, KeptSkills(skill_sets(4)))
    truncated = [r["truncated"] for r in records(tmp_path / "skills.jsonl") if (r["set"], r["role"]) == ("digits", "run")]
    assert truncated[:4].count(True) > 2
    told = [str(warning.message) for warning in found if "KeptSkills" in str(warning.message)]
    assert len(told) == 1
    assert re.match(mentions("digits", "trainer.callbacks.sets.digits.init_args.max_new_tokens"), told[0])


def test_whole_completions_are_not_told(make_policy: MakePolicy, tmp_path: Path) -> None:
    """A divergence is measured on truncated answers too."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        skills = KeptSkills({name: skills for name, skills in skill_sets(3).items() if name != "digits"})
        trainer(tmp_path, skills, logger=False).test(*parts(make_policy()), verbose=False)


@pytest.mark.parametrize("stage", ["test", "validate"])
def test_an_evaluation_without_batches_is_refused(stage: str, make_policy: MakePolicy, tmp_path: Path) -> None:
    """Lightning would run no hook in which skills are measured."""
    module, data = parts(make_policy())
    setting = f"limit_{'val' if stage == 'validate' else stage}_batches"
    run = trainer(tmp_path, KeptSkills(skill_sets(2)), logger=False, **{setting: 0})
    with pytest.raises(ConfigError) as error:
        getattr(run, stage)(module, data, verbose=False)
    assert error.value.setting == f"trainer.{setting}"


class Diverges(Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        for parameter in pl_module.model.parameters():
            if parameter.requires_grad:
                parameter.data.fill_(float("nan"))


def test_values_that_are_not_finite_are_told(make_policy: MakePolicy, tmp_path: Path) -> None:
    rows = [ONE._replace(answer=answer) for answer in "AAB"]  # also where the first option is right
    sets: dict[str, Any] = {"facts": ChoicesByLikelihood(Rows(rows)), "drift": skill_sets(3)["drift"]}
    run = trainer(tmp_path, KeptSkills(sets), Diverges(), logger=False, max_steps=1, limit_val_batches=0)
    with pytest.warns(UserWarning, match=mentions("finite")) as found:
        run.fit(*parts(make_policy()))
    told = [str(warning.message) for warning in found if "KeptSkills" in str(warning.message)]
    assert len(told) == 2 and all(re.match(mentions("3"), text) for text in told)
    assert [name for name in sets for text in told if re.match(mentions(name), text)] == list(sets)
    diverged = [r for r in records(tmp_path / "skills.jsonl") if (r["set"], r["step"]) == ("facts", 1)]
    assert [(r["score"], r["choice"], "problem" in r) for r in diverged] == [(0.0, None, True)] * 3


def test_a_dry_run_writes_nothing(make_policy: MakePolicy, tmp_path: Path) -> None:
    fit(make_policy(), tmp_path, KeptSkills(skill_sets(2)), fast_dev_run=1, logger=False)
    assert not list(tmp_path.rglob("*.jsonl"))
