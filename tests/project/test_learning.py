"""The learning test bed: its task, statistics, methods and harness, and one tiny run of everything."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.learning import methods, plots, quick, report, run, sweep, task
from benchmarks.learning.bases import MAX_NEW_TOKENS, Base, Strong, batches, easier, make
from benchmarks.learning.task import GRADER, PROMPTS, Chain, ChainProblems, draw, split_of
from helpers.messages import mentions
from helpers.paths import ROOT
from opsd_lightning import NoContext, OPSDDataModule, Policy, ReverseKL
from opsd_lightning.data.drop_reasons import DropReason
from opsd_lightning.types import UserError

pytestmark = pytest.mark.integration


TINY = Base(steps=2, rows=4)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(TINY, tmp_path_factory.mktemp("bases"))


# -- the task ------------------------------------------------------------------------------------------------------------


def test_a_chain_is_worked_from_left_to_right() -> None:
    chain = Chain((2, 4, 7, 7), "+-*")
    assert chain.question == "2+4-7*7"
    assert (chain.worked(), chain.terse()) == ("2+4=6;6-7=9;9*7=3;A3", "693")
    example = chain.example("worked")
    assert (example.trace, example.answer, example.columns["terse"]) == (chain.worked(), "3", "693")


def test_chains_agree_with_python() -> None:
    rng = random.Random(0)
    for _ in range(200):
        chain = draw(rng, 3)
        expression = f"(({chain.question[:3]}){chain.question[3:5]}){chain.question[5:]}"
        assert int(chain.terse()[-1]) == eval(expression) % 10
        steps = chain.worked().split(";")[:-1]
        assert all(int(right) == eval(left) % 10 for left, right in (step.split("=") for step in steps))


def test_without_carries_results_stay_digits() -> None:
    rng = random.Random(0)
    for _ in range(200):
        chain = draw(rng, 3, carries=False)
        value = chain.digits[0]
        for operator, digit in zip(chain.operators, chain.digits[1:], strict=True):
            value = task.apply(value, operator, digit)
            assert 0 <= value <= 9


def test_splits_are_disjoint_for_every_seed_and_length() -> None:
    for operations in (1, 2, 3):
        owner: dict[str, str] = {}
        for split in task.SHARES:
            for seed in (0, 1):
                for example in ChainProblems(split, 300, operations, seed).examples():
                    assert owner.setdefault(example.question, split) == split == split_of(example.question)
    shares = [split_of(draw(random.Random(i), 3).question) for i in range(2000)]
    assert all(abs(shares.count(split) / 2000 - share / 100) < 0.04 for split, share in task.SHARES.items())


@pytest.mark.parametrize("base", [Base(steps=5, rows=20), Strong(steps=5, rows=20)], ids=lambda base: base.name)
def test_pretraining_has_its_own_questions_alone(base: Base) -> None:
    tokenizer = task.make_tokenizer()
    for ids, _ in batches(base):
        for row in ids.tolist():
            text = tokenizer.decode(row)
            assert split_of(text[1 : min(text.find(mark) for mark in "R>" if mark in text)]) == "pretrain"


def test_questions_are_distinct_and_decided_by_the_seed() -> None:
    first, again, other = (ChainProblems("test", 100, seed=seed).examples() for seed in (0, 0, 1))
    assert first == again != other
    assert len({example.question for example in first}) == 100
    everything = [e for split in task.SHARES for e in ChainProblems(split, 1000, 1).examples()]
    assert len(everything) == 300  # a split that holds fewer gives all it has
    assert len(easier(1, 500)) == 300 - len(ChainProblems("pretrain", 1000, 1).examples())
    with pytest.raises(ValueError, match="split"):
        ChainProblems("dev")  # type: ignore[arg-type]


def test_tokenizer_round_trip(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    text = "Q2+4-7*7R693>2+4=6;6-7=9;9*7=3;A3"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == task.encode(text) and tokenizer.decode(ids) == text
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (task.PAD, task.EOS)
    longest = max(len(chain.worked()) for chain in (draw(random.Random(i), 3) for i in range(50)))
    assert longest < MAX_NEW_TOKENS
    example = Chain((2, 4, 7, 7), "+-*").example()
    assert tokenizer.decode(PROMPTS.student(tokenizer, example)) == "Q2+4-7*7>"
    assert tokenizer.decode(PROMPTS.teacher(tokenizer, example, "693")) == "Q2+4-7*7R693>"
    assert list(PROMPTS.student(tokenizer, example)) == task.prompts([example])[0]
    assert list(PROMPTS.teacher(tokenizer, example, "693")) == task.prompts([example], "terse")[0]


@pytest.mark.parametrize(
    ("text", "answer"),
    [("2+4=6;A6", "6"), ("636", "6"), ("6", "6"), ("2+4=6", None), ("2+4=6;A", None), ("", None), ("63=6", None)],
)
def test_answers_are_graded(text: str, answer: str | None) -> None:
    assert GRADER.find_answer(text) == answer


@pytest.mark.parametrize("style", ["terse", "worked"])
def test_the_data_module_verifies_traces(style: task.Style, base: Path) -> None:
    class OneWrong(ChainProblems):
        def examples(self) -> list[Any]:
            found = super().examples()
            wrong = {"terse": found[0].columns["wrong"], "worked": found[0].trace[:-1] + found[0].columns["wrong"][-1]}
            return [found[0]._replace(trace=wrong[style]), *found[1:]]

    def data(on_invalid: Any) -> OPSDDataModule:
        source = OneWrong("test", 20, trace=style)
        policy = Policy(str(base))
        return OPSDDataModule(policy, test=source, prompts=PROMPTS, grader=GRADER, max_new_tokens=26, on_invalid=on_invalid)

    dropping = data("drop")
    dropping.setup("test")
    assert dropping.dropped["test"] == {DropReason.WRONG_ANSWER: 1}
    assert len(dropping.rows["test"].examples) == 19
    with pytest.raises(UserError, match=mentions("row 0")):
        data("error").setup("test")


# -- statistics ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("freedom", "value"), [(1, 12.7062), (2, 4.3027), (4, 2.7764), (14, 2.1448), (30, 2.0423), (1000, 1.9623)]
)
def test_t_quantiles_equal_known_values(freedom: int, value: float) -> None:
    assert report.t_quantile(freedom) == pytest.approx(value, abs=2e-4)  # the textbook's table


def test_estimates_equal_hand_counts() -> None:
    found = report.estimate([1.0, 2.0, 3.0, 4.0])
    assert (found.mean, found.runs) == (2.5, 4)
    assert found.half == pytest.approx(3.18245 * (5 / 3) ** 0.5 / 2, abs=1e-4)
    assert math.isnan(report.estimate([1.0]).half) and report.estimate([]).percent() == "-"
    assert report.estimate([0.5]).percent() == "50.0"
    middle, low, high = report.ratio([8.0, 8.0], [1.0, 4.0])
    assert middle == pytest.approx(4) and low * high == pytest.approx(16)
    assert math.log(high / middle) == pytest.approx(12.7062 * math.log(2), abs=1e-3)


CURVE = [{"accuracy": a, "tokens": t} for a, t in ((0.4, 0), (0.6, 100), (0.5, 200), (0.8, 300))]


def test_curves_are_read_from_records() -> None:
    assert [report.reached(CURVE, a) for a in (0.3, 0.5, 0.7, 0.9)] == [0, pytest.approx(50), pytest.approx(800 / 3), None]
    assert [report.at(CURVE, x) for x in (0, 50, 250, 301)] == [0.4, pytest.approx(0.5), pytest.approx(0.65), None]


def fake_run(name: str, base: str, seed: int, speed: float) -> dict[str, Any]:
    curve = [
        {"accuracy": min(0.4 + 0.1 * speed * i, 1.0), "tokens": 1000 * i, "step": i, "references": 64 * i, "seconds": i}
        for i in range(7)
    ]
    before = {"test": 0.4, "privileged": 1.0, "1_operations": 0.9, "2_operations": 0.7}
    return {
        "settings": {"method": {"name": name}, "base": base, "seed": seed},
        "curve": curve,
        "before": before,
        "after": before | {"test": curve[-1]["accuracy"]},
    }


@pytest.fixture
def made_up() -> dict[str, list[dict[str, Any]]]:
    keys = [(base, seed) for base in ("base0", "base1") for seed in (0, 1)]
    return {
        name: [fake_run(name, base, seed, speed + 0.05 * seed) for base, seed in keys]
        for name, speed in (("opsd", 0.9), ("grpo", 0.45))
    }


def test_tables_hold_the_results(made_up: dict[str, list[dict[str, Any]]]) -> None:
    text = report.document(made_up, {"teacher": {"fixed": made_up["opsd"], "live": made_up["grpo"]}}, ["learning.png"])
    assert "| opsd | 4 | 40.0 ± 0.0 |" in text and "![](learning.png)" in text and "## Ablation: teacher" in text
    fifty = next(line for line in report.token_table(made_up).splitlines() if line.startswith("| 50 "))
    assert fifty.endswith(f"| {math.sqrt(0.9 / 0.45 * 0.95 / 0.5):.1f} (1.9 to 2.0), 4 pairs |")
    ninety = next(line for line in report.token_table(made_up).splitlines() if line.startswith("| 90 "))
    assert "(4 of 4)" in ninety and "- (0 of 4)" in ninety and ninety.endswith("| - |")


def test_ablations_are_compared_in_pairs(made_up: dict[str, list[dict[str, Any]]]) -> None:
    """By base and seed, whatever the order; the row without a change has no change."""
    for found in made_up["opsd"]:
        found["settings"]["method"]["name"] = "unchanged"
    table = report.ablation_table({"fixed": made_up["opsd"][::-1], "live": made_up["grpo"]}).splitlines()
    assert "| 95.5 ± 2.8 |  |" in table[2] and "| -27.0 ± 0.0 |" in table[3]


def test_pictures_are_drawn(made_up: dict[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    paths = plots.curves(made_up, tmp_path / "learning", "title") + plots.retention(made_up, tmp_path / "retention", "title")
    assert [path.suffix for path in paths] == [".png", ".svg"] * 2 and all(path.stat().st_size > 5000 for path in paths)


# -- methods and the harness ---------------------------------------------------------------------------------------------


def test_every_method_is_tuned_on_equal_terms() -> None:
    assert set(methods.TUNING) == set(methods.METHODS)
    assert len({len(settings) for settings in methods.TUNING.values()}) == 1
    for name, settings in methods.TUNING.items():
        assert len({repr(asdict(methods.changed(methods.METHODS[name], change))) for change in settings}) == len(settings)


def parts() -> Iterator[tuple[str, run.Method]]:
    yield from methods.ablations(methods.METHODS["opsd"]).items()
    for i, change in enumerate(methods.TUNING["opsd"]):
        yield f"tuning {i}", methods.changed(methods.METHODS["opsd"], change)


@pytest.mark.parametrize(("name", "method"), list(parts()), ids=lambda value: value if isinstance(value, str) else "")
def test_every_opsd_setting_builds(name: str, method: run.Method) -> None:
    policy = Policy("unused/model")
    module = run.make_module(method, policy, seed=3)
    assert module.seed == 3 and module.sampling.n == method.n  # type: ignore[attr-defined]
    run.make_data(method, policy, 0, run.Measuring())
    assert json.loads(json.dumps(asdict(method))) == asdict(method)


def test_changes_reach_into_parts() -> None:
    method = methods.METHODS["opsd"]
    found = methods.changed(method, {"arguments.objective.clip": methods.part("TokenClip", tau=0.5), "questions": 8}, "x")
    module: Any = run.make_module(found, Policy("unused/model"), 0)
    assert (found.name, found.questions) == ("x", 8) and module.objective.clip.tau == 0.5
    assert isinstance(module.objective.divergence, ReverseKL) and "clip" not in method.arguments["objective"]
    with pytest.raises(KeyError):
        methods.changed(method, {"no_such_field": 1})
    rows = methods.ablations(method)
    assert rows["teacher/fixed"] is rows["support/full"]
    assert asdict(rows["support/full"]) == asdict(method) | {
        "name": rows["support/full"].name,
        "steps": methods.ABLATION_STEPS,
    }
    assert isinstance(run.build(rows["context/none"].data["context"]), NoContext)


class OtherModule:
    """A module of another package."""

    def __init__(self, policy: Policy, seed: int, own: Any, **common: Any) -> None:
        self.policy, self.seed, self.own = policy, seed, own


def test_a_module_of_another_package() -> None:
    arguments = {"own": methods.part("opsd_lightning.losses.divergences.ReverseKL")}
    found: Any = run.make_module(run.Method("x", f"{__name__}.OtherModule", arguments), Policy("unused/model"), 5)
    assert (found.policy.model, found.seed, type(found.own)) == ("unused/model", 5, ReverseKL)


def test_the_rate_rises_and_falls() -> None:
    method = methods.changed(methods.METHODS["opsd"], {"warmup_steps": 1, "decay": True, "steps": 5, "learning_rate": 1.0})
    module: Any = run.make_module(method, Policy("unused/model"), 0)
    optimizer = module.make_optimizer([torch.nn.Parameter(torch.zeros(1))])
    schedule = module.make_scheduler(optimizer)
    rates = []
    for _ in range(5):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.5, 1.0, 0.75, 0.5, 0.25])


SMALL = {"steps": 2, "questions": 4}
MEASURING = run.Measuring(every_steps=1, validation=6, test=5)
SEED = 6  # with it a mixed run samples in its first step and takes the traces in its second


def test_a_run_gives_the_same_again(base: Path, tmp_path: Path) -> None:
    job = run.Job(methods.changed(methods.METHODS["opsd"], SMALL), str(base), 0, MEASURING)
    found = run.execute(job)
    assert [row["step"] for row in found["curve"]] == [0, 1, 2]
    assert [row["references"] for row in found["curve"]] == [0, 4, 8]
    assert 0 < found["curve"][1]["tokens"] <= 4 * MAX_NEW_TOKENS < found["curve"][2]["tokens"] + 4 * MAX_NEW_TOKENS
    assert found["curve"][2]["metrics"]["train/reverse_kl"] > 0 and found["curve"][2]["seconds"] > 0
    assert set(found["before"]) == set(found["after"]) == {"test", "privileged", "1_operations", "2_operations"}
    assert found["settings"]["method"] == asdict(job.method)

    def without_times(result: dict[str, Any]) -> Any:
        rows = [
            row | {"seconds": 0, "metrics": {k: v for k, v in row["metrics"].items() if k[:4] != "time"}}
            for row in result["curve"]
        ]
        return result | {"curve": rows, "wall_seconds": 0}

    assert without_times(run.execute(job)) == without_times(found)
    assert job.path(tmp_path) != run.Job(job.method, str(base), 1, MEASURING).path(tmp_path)


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_runs(name: str, base: Path) -> None:
    make(Strong(steps=2, rows=4), base.parent)
    method, strong = methods.changed(methods.METHODS[name], SMALL), {"strong"} if name == "distill" else set()
    found = run.execute(run.Job(method, str(base), SEED, MEASURING))
    assert [row["step"] for row in found["curve"]] == [0, 1, 2] and "failed" not in found
    _, first, last = found["curve"]
    assert last["references"] == {"trace": 8, "answer": 0, "nothing": 0}[method.uses]
    assert (first["tokens"] > 0) == (not name.startswith("sft"))
    assert (last["tokens"] > first["tokens"]) == (name in ("opsd", "grpo", "distill"))
    assert ("train/reverse_kl" in first["metrics"]) == (name in ("opsd", "distill", "mixed"))
    assert all(map(math.isfinite, first["metrics"].values())) and set(found["after"]) == set(found["before"])
    assert {key for key in found["made_with"] if "sha256" in key} == {f"{model}_sha256" for model in {"base0"} | strong}
    assert set(found["settings"].get("beside_base", ())) == strong


def test_earlier_results_keep_their_names(base: Path) -> None:
    kept = {"opsd": "c2a4df8d3b", "grpo": "2b041eb914", "sft-terse": "c4230b38bf", "sft-worked": "93dd863afb"}
    assert kept == {name: run.Job(methods.METHODS[name], "no/base0").path(Path()).stem[-10:] for name in kept}
    job = run.Job(methods.METHODS["distill"], str(base))
    without = run.Job(job.method, str(shutil.copytree(base, base.parent / "alone" / base.name, dirs_exist_ok=True)))
    make(Strong(steps=2, rows=4), base.parent)
    assert job.path(Path()) != without.path(Path())  # how the other model was made counts too


def test_a_base_is_made_once(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.learning.bases.pretrain", lambda base: pytest.fail("made again"))
    assert make(TINY, base.parent) == base
    facts = json.loads((base / "base.json").read_text())
    assert facts["parameters"] == 144_576 and {"student", "teacher"} <= set(facts["accuracy"])


def in_process(tasks: Any, workers: int) -> list[str]:
    for call, args in tasks.values():
        call(*args)
    return []


def test_an_interrupted_sweep_goes_on(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    method = methods.changed(methods.METHODS["opsd"], SMALL)
    jobs = [run.Job(method, str(base), seed, MEASURING) for seed in range(3)]
    executed: list[int] = []

    def execute(job: run.Job) -> dict[str, Any]:
        if job.seed == 1 and not executed.count(1):
            executed.append(1)
            raise KeyboardInterrupt
        executed.append(job.seed)
        return fake_run("opsd", "base0", job.seed, 1.0) | {"wall_seconds": 0.0}

    monkeypatch.setattr(run, "execute", execute)
    monkeypatch.setattr(sweep, "in_workers", in_process)
    with pytest.raises(KeyboardInterrupt):
        sweep.run_all(jobs, tmp_path, 1)
    assert len(list(tmp_path.glob("*.json"))) == 1
    (tmp_path / f".{jobs[1].path(tmp_path).name}.1.partial").write_text("{")  # as a write that was cut off leaves it
    results = sweep.run_all(jobs, tmp_path, 1)
    assert executed == [0, 1, 1, 2]
    assert [result["settings"]["seed"] for result in results] == [0, 1, 2]
    assert "1 of 3 runs are done; 2 to do" in capsys.readouterr().out
    assert sweep.run_all(jobs, tmp_path, 1) == results and executed == [0, 1, 1, 2]


@pytest.mark.slow
def test_the_sweep_from_bases_to_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage, with runs that are made up from their settings."""

    def execute(job: run.Job) -> dict[str, Any]:
        speed = 1.0 if job.method.learning_rate == 1e-3 else 0.5
        made = fake_run("", "", job.seed, speed) | {"settings": job.settings(), "wall_seconds": 0.0}
        return made | ({"failed": "the gradient's norm is nan"} if job.method.learning_rate == 4e-3 else {})

    monkeypatch.setattr(sweep, "in_workers", in_process)
    monkeypatch.setattr(run, "execute", execute)
    monkeypatch.setattr("benchmarks.learning.bases.Base", lambda seed: Base(seed, steps=1, rows=2))
    monkeypatch.setattr("benchmarks.learning.bases.Strong", lambda: Strong(steps=1, rows=2))
    options = ["--output", str(tmp_path), "--bases", "2", "--seeds", "2", "--methods", "opsd", "grpo"]
    with pytest.raises(SystemExit, match=mentions("bases")):
        sweep.main(["main", *options])
    sweep.main(["all", *options, "--tables", "teacher", "clip"])
    with pytest.raises(SystemExit, match=mentions("--methods", "oopsd", "opsd", "grpo")):
        sweep.main(["tune", *options, "oopsd"])
    with pytest.raises(SystemExit, match=mentions("strong", "bases")):
        sweep.main(["tune", *options, "distill"])
    for stage in ("bases", "main", "report"):
        sweep.main([stage, *options, "distill"])
    chosen = json.loads((tmp_path / "chosen.json").read_text())
    assert chosen["opsd"]["change"] == {"learning_rate": 1e-3} and min(chosen["opsd"]["all"]) == 0
    names = [json.loads(path.read_text())["settings"]["method"]["name"] for path in (tmp_path / "main").glob("*.json")]
    assert sorted(names) == [name for name in ("distill", "grpo", "opsd") for _ in range(4)]
    text = (tmp_path / "report" / "report.md").read_text()
    assert all(found in text for found in ("## Ablation: teacher", "| live |", "| distill | 4 |"))
    assert "Ablation: context" not in text
    assert (tmp_path / "report" / "learning.png").exists() and (tmp_path / "report" / "ablation-clip.svg").exists()


@pytest.mark.slow
def test_quick_learning_run_prints_its_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    quick.main(["--short", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    for phrase in ("student before", "student after", "teacher (has read", "This is a toy", "step    2", "curve.png"):
        assert phrase in printed, phrase
    assert (tmp_path / "curve.svg").exists() and (tmp_path / "adapter" / "adapter_config.json").exists()
