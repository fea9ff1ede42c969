"""Tests of `make test-gpu`: the checks run on an imitated GPU, and the runner survives whatever a check does."""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from gpu.check import CHECKS, main, run_checks
from gpu.runner import Check, Result, line_of, plain, table
from helpers.paths import ROOT

pytestmark = pytest.mark.integration

#: Checks that import no library, so that their process starts at once.
FAKES = """
    import contextlib, os, signal, time
    from gpu.runner import Skip

    class Machine:
        def __init__(self, folder):
            self.folder = folder
        def clean(self):
            pass

    @contextlib.contextmanager
    def opened(folder, imitate):
        yield Machine(folder)

    @contextlib.contextmanager
    def broken(folder, imitate):
        raise RuntimeError("no such device")
        yield

    def good(machine, facts):
        facts["ratio"] = 0.5
        facts["process"] = os.getpid()

    def wrong(machine, facts):
        facts["seen"] = 7
        assert 1 == 2, "one is not two"

    def skips(machine, facts):
        raise Skip("there is no card of that kind")

    def leaves(machine, facts):
        raise SystemExit(0)

    def hangs(machine, facts):
        facts["before"] = 1
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        time.sleep(3600)

    def crashes(machine, facts):
        facts["before"] = 1
        os.kill(os.getpid(), signal.SIGKILL)

    def infinite(machine, facts):
        facts["numbers"] = {"worst": float("nan"), "all": [1.0, float("inf")]}
"""


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of the module ``fake_checks``, from which the process of the checks can import it."""
    (tmp_path / "fake_checks.py").write_text(textwrap.dedent(FAKES))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def fake(name: str, seconds: float = 1.0, **settings: Any) -> Check:
    return Check(name, f"fake_checks:{name}", seconds, f"what {name} shows", **settings)


def run(folder: Path, *checks: Check, budget: float = 60.0, machine: str = "opened") -> tuple[int, dict[str, Any]]:
    """Run fake checks, and return the exit status and the content of the file of results, its checks by name."""
    status = run_checks(list(checks), folder / "gpu.json", budget, f"fake_checks:{machine}")
    content = json.loads((folder / "gpu.json").read_text())
    return status, content | {"checks": {result["name"]: result for result in content["checks"]}}


def rows(text: str) -> dict[str, str]:
    """Return the status of each row of the table at the end of the output."""
    found = re.findall(r"^(\w+) +(pass|fail|skip) +\d+ ", text, re.MULTILINE)
    return dict(found)


# -- the runner --------------------------------------------------------------------------------------------------------


def test_a_failing_check_gives_the_exit_status_and_a_row(fakes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = run(fakes, fake("good"), fake("wrong"), fake("leaves"), fake("skips"))
    assert status == 2 and found["complete"] and found["waiting"] == []
    assert rows(capsys.readouterr().out) == {"good": "pass", "wrong": "fail", "leaves": "fail", "skips": "skip"}
    checks = found["checks"]
    assert checks["good"]["facts"]["ratio"] == 0.5 and checks["good"]["status"] == "pass"
    assert "one is not two" in checks["wrong"]["reason"] and checks["wrong"]["facts"] == {"seen": 7}
    assert "Traceback" in checks["wrong"]["details"] and "fake_checks.py" in checks["wrong"]["details"]
    assert checks["skips"]["reason"] == "there is no card of that kind"


def test_all_passed_is_status_zero(fakes: Path) -> None:
    assert run(fakes, fake("good"), fake("skips"))[0] == 0


def test_a_check_after_a_failure_has_a_new_process(fakes: Path) -> None:
    """A CUDA error stays with its process."""
    again = Check("again", "fake_checks:good", 1.0, "")
    alone = Check("alone", "fake_checks:good", 1.0, "", alone=True)
    last = Check("last", "fake_checks:good", 1.0, "")
    _, found = run(fakes, fake("good"), again, fake("wrong"), alone, last)
    processes = [found["checks"][name]["facts"]["process"] for name in ("good", "again", "alone", "last")]
    assert processes[0] == processes[1] and len(set(processes)) == 3


def test_a_check_that_would_not_end_in_time_is_skipped(fakes: Path) -> None:
    status, found = run(fakes, fake("wrong", seconds=90.0), fake("good", seconds=2.0), budget=40.0)
    assert status == 0
    assert found["checks"]["wrong"]["status"] == "skip" and "90 s" in found["checks"]["wrong"]["reason"]
    assert found["checks"]["good"]["status"] == "pass"


def test_a_check_that_hangs_is_ended(fakes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu.runner.LEAST_LIMIT", 4.0)
    monkeypatch.setattr("gpu.runner.PATIENCE", 1.0)
    status, found = run(fakes, fake("hangs"), fake("good", seconds=20.0))
    assert status == 1 and found["checks"]["good"]["status"] == "pass"
    assert found["checks"]["hangs"]["status"] == "fail" and found["checks"]["hangs"]["facts"] == {"before": 1}


def test_a_check_is_ended_when_the_time_is_over(fakes: Path) -> None:
    """The time was enough for its estimate: the machine is slow, which is no failure."""
    started = time.monotonic()
    status, found = run(fakes, fake("hangs", seconds=0.5), fake("good"), budget=15.0)
    assert time.monotonic() - started < 40
    assert status == 0 and [found["checks"][name]["status"] for name in ("hangs", "good")] == ["skip", "skip"]


def test_a_check_that_ends_its_process_fails(fakes: Path) -> None:
    status, found = run(fakes, fake("crashes"), fake("good"))
    assert status == 1 and found["checks"]["good"]["status"] == "pass"
    assert "SIGKILL" in found["checks"]["crashes"]["reason"] and found["checks"]["crashes"]["facts"] == {"before": 1}


def test_a_missing_package_skips_without_a_process(fakes: Path) -> None:
    status, found = run(fakes, fake("wrong", packages=("no_such_package", "json")), machine="broken")
    assert status == 0 and "no_such_package" in found["checks"]["wrong"]["reason"] and "json" not in str(found["checks"])


def test_a_machine_that_does_not_open_fails_once(fakes: Path) -> None:
    status, found = run(fakes, fake("good"), Check("other", "fake_checks:good", 1.0, ""), machine="broken")
    assert status == 1 and "no such device" in found["checks"]["good"]["reason"]
    assert found["checks"]["other"]["status"] == "skip" and "no such device" in found["checks"]["other"]["reason"]


def test_numbers_that_json_lacks_are_text(fakes: Path) -> None:
    _, found = run(fakes, fake("infinite"))
    assert found["checks"]["infinite"]["facts"] == {"numbers": {"worst": "nan", "all": [1.0, "inf"]}}
    assert plain((1, [float("-inf")])) == [1, ["-inf"]]


def gone(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_results_are_whole_after_a_kill_and_no_process_stays(fakes: Path) -> None:
    code = (
        "from pathlib import Path; from gpu.check import run_checks; from gpu.runner import Check;"
        "names = ['good', 'hangs', 'wrong'];"
        "checks = [Check(name, f'fake_checks:{name}', 1.0, '') for name in names];"
        "run_checks(checks, Path('gpu.json'), 60.0, 'fake_checks:opened')"
    )
    path = os.pathsep.join([str(fakes), str(ROOT), str(ROOT / "tests")])
    runner = subprocess.Popen([sys.executable, "-c", code], cwd=fakes, env=os.environ | {"PYTHONPATH": path})
    try:
        deadline, content = time.monotonic() + 60, {"checks": []}
        while not content["checks"]:  # read all the time: the file is whole at any instant
            assert time.monotonic() < deadline
            if (fakes / "gpu.json").exists():
                content = json.loads((fakes / "gpu.json").read_text())
    finally:
        runner.send_signal(signal.SIGKILL)
        runner.wait()
    content = json.loads((fakes / "gpu.json").read_text())
    assert [result["name"] for result in content["checks"]] == ["good"]
    assert not content["complete"] and content["waiting"] == ["hangs", "wrong"]
    worker = content["checks"][0]["facts"]["process"]
    deadline = time.monotonic() + 30
    while not gone(worker):
        assert time.monotonic() < deadline, "the process of the checks stays"
        time.sleep(0.05)


def test_an_interrupt_leaves_the_table_and_no_process(fakes: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = (
        "import signal, sys; from pathlib import Path; from gpu.check import run_checks; from gpu.runner import Check;"
        "signal.signal(signal.SIGINT, signal.default_int_handler);"
        "checks = [Check(name, f'fake_checks:{name}', 1.0, '') for name in ('good', 'hangs')];"
        "sys.exit(run_checks(checks, Path('gpu.json'), 60.0, 'fake_checks:opened'))"
    )
    path = os.pathsep.join([str(fakes), str(ROOT), str(ROOT / "tests")])
    runner = subprocess.Popen([sys.executable, "-c", code], cwd=fakes, env=os.environ | {"PYTHONPATH": path})
    deadline = time.monotonic() + 60
    while not ((fakes / "gpu.json").exists() and '"good"' in (fakes / "gpu.json").read_text().partition('"checks"')[2]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    runner.send_signal(signal.SIGINT)
    assert runner.wait(timeout=30) == 130
    assert rows(capfd.readouterr().out) == {"good": "pass"}
    assert gone(json.loads((fakes / "gpu.json").read_text())["checks"][0]["facts"]["process"])


def test_the_table_says_what_passed_and_why_not() -> None:
    results = [Result("a", "pass", 1.0, facts={"x": 1234.5}), Result("b", "skip", reason="vllm is\nnot installed")]
    text = table(results, [Check("a", "", 1, "a shows this"), Check("b", "", 1, "b shows that")])
    assert "a shows this" in text and "vllm is not installed" in text and "b shows that" not in text
    assert "x: 1,23" in line_of(results[0])


# -- the checks --------------------------------------------------------------------------------------------------------


def test_every_check_names_a_function() -> None:
    """The names are text, so that listing them imports no framework."""
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    for check in CHECKS:
        module, _, name = check.function.partition(":")
        text = (ROOT / "tests" / f"{module.replace('.', '/')}.py").read_text()
        assert re.search(rf"^def {name}\(machine: Machine, facts: Any\)", text, re.MULTILINE), check.function


def test_an_unknown_check_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["no_such_check"])
    assert stop.value.code == 2 and "no_such_check" in capsys.readouterr().err


def test_every_setting_of_every_local_engine_is_measured() -> None:
    import opsd_lightning.rollouts.continuous_batching  # noqa: F401 (its class)
    from gpu.speed import COMPILED, ENGINES, NOT_MEASURED
    from opsd_lightning.rollouts.base import LocalEngine

    used = [*ENGINES.values(), COMPILED]
    own = [kind for kind in LocalEngine.__subclasses__() if kind.__module__.startswith("opsd_lightning.")]
    assert {kind for kind, _ in used} == set(own) and len(own) > 1
    for kind in own:
        settings = {name for each, values in used if each is kind for name in values} | NOT_MEASURED
        assert set(inspect.signature(kind).parameters) <= settings, kind


def test_a_peak_above_its_estimate_is_found() -> None:
    from gpu.machine import GIB
    from gpu.recipe import compare, too_large

    estimated = {
        "base weights": 2 * GIB, "reserve": GIB, "rollout: keys and values": 4 * GIB, "scoring: logits": GIB, "total": 7 * GIB,
    }  # fmt: skip
    compared = compare({"rollout": 6 * GIB, "teacher": 3 * GIB, "student": 5 * GIB}, estimated)
    assert compared["rollout"] == {"measured": 6.0, "estimated": 6.0}
    assert compared["student"] == {"measured": 5.0, "estimated": 3.0}
    assert too_large(compared) == ["student"]


def test_a_wrong_result_of_the_gpu_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of the device that are off by a thousandth."""
    from gpu import correctness
    from gpu.machine import opened

    score = correctness.score

    def wrong(model: Any, *rows: Any) -> Any:
        states, targets = score(model, *rows)
        on_device = states.hidden.device.type == "cuda"
        return states._replace(hidden=states.hidden * (1.001 if on_device else 1.0)), targets

    facts: dict[str, Any] = {}
    with opened(tmp_path, "gpu") as machine:
        correctness.loss_and_gradients(machine, facts)
        assert max(value for found in facts.values() for value in found.values()) < 1e-4
        monkeypatch.setattr(correctness, "score", wrong)
        with pytest.raises(AssertionError):
            correctness.loss_and_gradients(machine, facts)


@pytest.mark.parametrize("card", ["gpu", pytest.param("t4", marks=pytest.mark.slow)])
def test_all_checks_pass_or_are_skipped_on_an_imitated_card(
    card: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(["--imitate", card, "--json", str(tmp_path / "gpu.json"), "--minutes", "15"])
    content = json.loads((tmp_path / "gpu.json").read_text())
    statuses = {result["name"]: result["status"] for result in content["checks"]}
    assert status == 0, [(result["name"], result["reason"]) for result in content["checks"] if result["status"] == "fail"]
    assert content["complete"] and content["imitated"] == card and rows(capsys.readouterr().out) == statuses
    assert list(statuses) == [check.name for check in CHECKS]
    assert all(result["reason"] for result in content["checks"] if result["status"] == "skip")
    assert all(result["facts"] for result in content["checks"] if result["status"] == "pass")
    needed = {"vllm_colocated", "flash_hub_kernels", "flash_attn", "gpu_tests", "compiled_decoding"}
    assert {name for name, found in statuses.items() if found == "skip"} <= needed
