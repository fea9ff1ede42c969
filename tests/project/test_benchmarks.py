"""Tests that every benchmark runs on a tiny model, and of the results that do not depend on the machine."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.paths import ROOT

pytestmark = pytest.mark.integration


BENCHMARKS = ROOT / "benchmarks"
SMALL = {
    "objective": "--vocabulary 300 --hidden 16 --tokens 50 --divergences all",
    "scoring": "--model {llama} --rows 6 --prompt 4 --shortest 2 --longest 9 --token-budget 40 --teacher-prompt 20 --completion 5",
    "rollout": "--model {llama} --batch 4 --rows 6 --prompt 5 --shortest 2 --longest 12",
    "scaling": "--model {llama} --tokens 8",
    "memory": "--recipes qwen3_1.7b_qlora --lengths 1024 2048",
    "clip_inversion": "--made-up --positions 50 --vocabulary 100 --taus 0.05",
    "device_counts": "--layers 1 --tokens 1 --weights bfloat16 --engines default",
    "callbacks": "--model {llama} --batch 2 --new-tokens 6 --steps 3",
    "attempts": "--model {llama} --vocabulary 300",
    "data_start": "--model {roomy} --rows 20 --sentences 6 --sides 'one process, no cache' 'two ranks, no cache'",
    "plan": "--calibrate {folder}/step.json --check {folder}/step.json --kernels 1000 --launch-us 5",
    "quantized_sampler": "--model {roomy} --steps 1 --tokens 4",
    "start_checks": "--model {llama} --short",
    "start_up": "--command=--version --before {root}",
    "step": "--model {llama} --batch 3 --lengths ragged --shortest 2 --completion 6 --prompt 5 --teacher-prompt 8 --steps 1",
}


def test_every_benchmark_is_run_here() -> None:
    assert {path.stem for path in BENCHMARKS.glob("*.py")} - {"__init__", "common"} == set(SMALL) | {
        "servers",  # test_vllm
        "tasks",  # test_quickstart
        "structure",
        "structure_step",
    }


@pytest.fixture
def run(folders: dict[str, str], roomy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def call(name: str) -> dict[str, Any]:
        out = tmp_path / f"{name}.json"
        options = shlex.split(
            SMALL[name].format(**folders, roomy=roomy, folder=tmp_path, root=shlex.quote(str(BENCHMARKS.parent)))
        )
        script = BENCHMARKS / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(script), "--device", "cpu", "--repeats", "1", "--json", str(out), *options])
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        monkeypatch.setattr(importlib.import_module("common"), "MEASURED_ON_CPU", (256, 2**20))
        runpy.run_path(str(script), run_name="__main__")
        return json.loads(out.read_text())

    return call


def rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for value in result.values() if isinstance(value, list) for row in value]


def test_the_table_of_tasks_compares_question_by_question(tmp_path: Path) -> None:
    from benchmarks.tasks import table

    write_json = lambda name, value: (tmp_path / name).write_text(json.dumps(value))  # noqa: E731
    write_json("choice-before.json", {"task": "choice", "student": "0001" * 20, "teacher": "1" * 80})
    write_json("choice-seed0.json", {"task": "choice", "seed": 0, "student": "0111" * 20})
    before, teacher, after = (line.split(" | ") for line in table(tmp_path).splitlines()[2:])
    assert before[2:4] == ["25.0 %", "16.8 to 35.5 %"] and teacher[2] == "100.0 %"
    half = 100 * 1.96 * (41 - 40**2 / 82) ** 0.5 / 82  # Agresti and Min: half a gain and half a loss are added
    assert after[2] == "75.0 %" and after[4] == f"+50.0 ± {half:.1f} |"


def test_the_page_of_tasks_has_the_table_of_the_results() -> None:
    from benchmarks.tasks import RESULTS, table

    page = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    assert list(RESULTS.glob("*-seed*.json")) and table(RESULTS) in page


def test_objective(run: Any) -> None:
    found = rows(run("objective"))
    assert len(found) == 4
    assert all(row["loss rel. diff."] < 1e-5 and row["gradient rel. diff."] < 1e-5 for row in found)


@pytest.mark.slow
def test_data_start(run: Any) -> None:
    one, two = rows(run("data_start"))
    assert one["side"] != two["side"] and one["seconds"] > one["verifying, s"] > 0 and two["tokenizing, s"] > 0


@pytest.mark.slow
def test_start_checks(run: Any) -> None:
    *checks, together = rows(run("start_checks"))
    assert all(row["calls"] and row["seconds"] for row in checks)
    assert together["seconds"] == pytest.approx(sum(row["seconds"] for row in checks)) and together["share, %"] < 100


def test_start_up(run: Any) -> None:
    (row,) = rows(run("start_up"))
    assert 0 < row["now, CPU s"] < row["now, s"] * 4 and row["before, lines on stderr"] == row["now, lines on stderr"] == 0


def test_scoring(run: Any) -> None:
    ragged, shared = rows(run("scoring"))
    assert ragged["loss rel. diff."] < 1e-5 and ragged["token ratio"] < 1
    assert shared["logits rel. diff."] < 1e-5 and shared["token ratio"] == (20 + 8 * 4) / (8 * 24)


def test_rollout(run: Any) -> None:
    *engines, greedy = rows(run("rollout"))
    assert [row["engine"].strip() for row in engines] == ["plain generate", "TransformersEngine", "adapter not merged"]
    assert greedy == {"greedy completions equal to plain generate's": "6 of 6"}


@pytest.mark.slow  # continuous batching takes long to start on a CPU; rollouts/test_transformers_engine.py runs it
def test_rollout_with_continuous_batching(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SMALL, "rollout", SMALL["rollout"] + " --continuous")
    *_, plain, continuous = rows(run("rollout"))
    assert (plain["engine"], continuous["engine"]) == ("TransformersEngine", "ContinuousBatchingEngine")


@pytest.mark.slow
def test_scaling(run: Any) -> None:
    result = run("scaling")
    assert all(row["seconds"] > 0 for row in rows(result)) and result["machine"]["matmul_flops"] > 0


def test_quantized_sampler(run: Any) -> None:
    """The dequantized weights are the trainer's model, and the checkpoint is not."""
    found = {row["trainer, sampler"]: row["mean, nats"] for row in rows(run("quantized_sampler"))[3:]}
    assert found["NF4, NF4 dequantized to bfloat16"] < found["NF4, 16-bit checkpoint"] / 5


def test_clip_inversion(run: Any) -> None:
    """Only the pointwise clip turns the gradient round; rescaling keeps its direction exactly."""
    for row in rows(run("clip_inversion")):
        if row["clip"] == "PointwiseClip" and row["divergence"] == "ForwardKL":
            assert row["inverted, %"] > 50 and row["turned, %"] > 50
        elif row["clip"] != "PointwiseClip":
            assert row["inverted, %"] == row["turned, %"] == 0
        if row["clip"] == "RescaleClip":
            assert row["mean cosine"] == pytest.approx(1.0)


def test_clip_inversion_of_a_model(run: Any, roomy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same holds of a model's own completions: what is looked at is what the teacher most wants raised."""
    monkeypatch.setitem(SMALL, "clip_inversion", f"--model {roomy} --questions 3 --new-tokens 6 --taus 1e-4")
    found = rows(run("clip_inversion"))
    assert len(found) == 6
    for row in found:
        assert row["mean cosine"] <= 1 + 1e-6
        if row["clip"] == "RescaleClip":
            assert row["inverted, %"] == row["turned, %"] == row["no gradient, %"] == 0
            assert row["mean cosine"] == pytest.approx(1.0)
        if row["clip"] == "TokenClip":
            assert row["no gradient, %"] > 50  # a tau this small is below most positions' divergence


def test_callbacks(run: Any) -> None:
    *each, together = run("callbacks")["in the hooks"]
    parts = [row["share of a step, %"] for row in each]
    assert len(parts) == 5 and all(share > 0 for share in parts)
    assert together["share of a step, %"] == pytest.approx(sum(parts))


def test_device_counts(run: Any) -> None:
    results = run("device_counts")
    tokens, steps = (rows for rows in results.values() if isinstance(rows, list))
    with_adapter, without = tokens
    assert with_adapter["kernels"] > without["kernels"] > 0
    assert {row["phase"] for row in steps} >= {"rollout", "teacher", "micro-batches", "optimizer"}
    assert all(row["a step"] == pytest.approx(row["reads"] + row["uploads"]) for row in steps)


@pytest.mark.slow  # weighs alternatives that were not built
def test_attempts(run: Any) -> None:
    result = run("attempts")
    assert len(rows(result)) == 3 + 4 + 1 + 1 + 4


def test_plan(run: Any, tmp_path: Path) -> None:
    """A step that was made up, in the form that step.py writes: what is fitted to it is predicted."""
    row = {"trainer": "opsd_lightning", "rollouts s": 5.0, "teacher s": 2.0, "student and update s": 4.0}
    facts = {"matmul_flops": 1e12, "read_bytes_per_second": 2e10}
    step = {"command": "python benchmarks/step.py --batch 4", "machine": facts, "one step": [row]}
    (tmp_path / "step.json").write_text(json.dumps(step))
    found = run("plan")
    assert len(found["shares"]) == 4
    for phase, seconds in (("rollouts", 5.0), ("teacher", 2.0), ("student", 4.0)):
        assert [step[f"{phase} share"] for step in found["shares"]] == pytest.approx([seconds / 11] * 4)
    fsdp2 = [row for row in found["plan"] if row["how"] == "bf16, fsdp2"]
    assert fsdp2[0]["network s"] > fsdp2[1]["network s"] > 0
    alone = [row for row in found["plan"] if row["how"] == "NF4, ddp"][-1]
    assert alone["bound by"] == "rollouts, launches"
    assert alone["rollouts s"] >= 1024 * 36 / 28 * 1000 * 5e-6, "the launches of all decoded tokens"


def test_memory(run: Any) -> None:
    checks, kept, sampling, lengths = list(run("memory").values())[-4:]
    (check,) = checks
    assert 0.5 < check["NF4 bytes a weight"] < 0.53
    assert 0.9 < check["ratio"] < 1.1, "the estimate of a layer's peak"
    assert all(0 < row["peak"] < float(row["card"].rpartition(" ")[2]) for row in kept)
    assert [row["phase"] for row in sampling] == ["rollout", "validation", "benchmark"]
    rows = [row["rows at one time"] for row in lengths]
    assert rows[0] > rows[1] > 0


def test_step(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both trainers in processes of their own: the same completions give the same first loss."""
    pytest.importorskip("trl", reason="the other side of benchmarks/step.py is TRL: pip install trl==1.16.0")
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    # On a CPU a fork, which imports nothing again, measures what a new interpreter does.
    forking = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: forking)
    ours, theirs, _ = rows(run("step"))
    assert float(ours["first loss"]) == pytest.approx(float(theirs["first loss"]), rel=1e-4)


@pytest.mark.slow
def test_structure_of_this_tree_is_measured() -> None:
    found = subprocess.run(
        [sys.executable, str(BENCHMARKS / "structure.py")], check=True, capture_output=True, text=True, timeout=300
    ).stdout
    rows = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in found.splitlines())
    assert int(rows["imports in cycles of units"]) == 0 and int(rows["public names"]) > 90
    assert re.fullmatch(r"\d+ pairs of files; base to method \d+, method to base \d+", rows["calls between files in a step"])
