"""Comparison with lm-evaluation-harness on a merged export, item by item. Needs its command in an environment of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from helpers.paths import ROOT
from helpers.skills import records
from helpers.training import parts, trainer
from opsd_lightning.callbacks.export import AdapterExport
from opsd_lightning.callbacks.kept_skills import KeptSkills
from opsd_lightning.data.sources import Columns, FileSource
from opsd_lightning.evaluation.skill_sets import ChoicesByLikelihood
from opsd_lightning.models.policy import Policy

TASKS = ROOT / "configs" / "eval" / "lm_eval"
COMMAND = shutil.which(os.environ.get("OPSD_LM_EVAL", "lm_eval"))
METRICS: dict[str, Any] = {"acc": "none", "acc_norm": "characters", "acc_bytes": "bytes"}

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(COMMAND is None, reason="needs lm_eval 0.4.13 on the path, or named in OPSD_LM_EVAL"),
]


@pytest.mark.parametrize("chat", [False, True])
def test_scores_are_those_of_lm_eval(chat: bool, make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    assert COMMAND is not None
    keep = ModelCheckpoint(tmp_path / "saved", filename="run", every_n_train_steps=3)
    module, data = parts(make_policy())
    trainer(tmp_path, keep, AdapterExport(merged_folder="merged"), max_steps=3, limit_val_batches=0).fit(module, data)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    environment.pop("PYTHONPATH", None)
    subprocess.run(
        [COMMAND, "--model", "hf", "--model_args", f"pretrained={tmp_path / 'merged'},dtype=float32", "--device", "cpu",
         "--tasks", "opsd_facts", "--include_path", str(TASKS), "--batch_size", "4", "--log_samples", "--output_path",
         str(tmp_path / "lm_eval"), *(["--apply_chat_template"] if chat else [])],
        env=environment, cwd=ROOT, check=True, timeout=600,
    )  # fmt: skip
    (path,) = (tmp_path / "lm_eval").rglob("samples_*.jsonl")
    theirs = {sample["doc_id"]: sample for sample in map(json.loads, path.read_text().splitlines())}

    columns = Columns(question="question", trace=None, answer="answer")
    source = FileSource(str(TASKS / "facts.jsonl"), columns=columns)
    sets = {
        metric: ChoicesByLikelihood(source, reference="index", chat=chat, normalization=normalization)
        for metric, normalization in METRICS.items()
    }
    run = trainer(tmp_path, KeptSkills({**sets}), logger=False)
    run.test(*parts(make_policy()), ckpt_path=tmp_path / "saved" / "run.ckpt", weights_only=True, verbose=False)
    ours = [record for record in records(tmp_path / "skills_test.jsonl") if record["role"] == "run"]
    assert len(ours) == 3 * len(theirs) == 96
    for record in ours:
        sample = theirs[record["item"]]
        logprobs = [float(response[0][0]) for response in sample["resps"]]
        # White space at the end of a prompt is part of lm_eval's options, here the template's line break, with the same
        # log-probability in each. It decides nothing unless it is divided by the options' lengths.
        line_break = max(logprobs) - max(record["logprobs"].values()) if chat else 0.0
        assert line_break <= 1e-4
        assert [value + line_break for value in record["logprobs"].values()] == pytest.approx(logprobs, rel=1e-3)
        if not chat or record["set"] == "acc":
            assert record["score"] == sample[record["set"]], record
