"""Runs of the comparison: training, measurements of the trained weights, and the second task.

Every run is the command line's ``fit`` and ``test``. Each finished part writes one JSON file to the results folder and is
not repeated. An interrupted part starts again, and so does a training whose checkpoint is gone before it was measured.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.learning.run import read, write
from benchmarks.real_model.settings import (
    ARMS,
    CONFIG,
    DATA_SEEDS,
    GENERAL_PROMPTS,
    SECOND_CONFIG,
    TRANSFER_LARGEST,
    TRANSFER_SEED,
    Arm,
    Scale,
    choose_rate,
)

Result = dict[str, Any]

#: Seconds that a training spends on its own work, as logged: without loading and validation.
SECONDS = ("time/rollout_seconds", "time/scoring_seconds")


class Comparison:
    """All runs of one model at one scale.

    Args:
        model: Hub id or folder of the model.
        folder: Folder of the runs: checkpoints, logs and completions.
        results: Folder of the result files.
        scale: Sizes of the runs.
    """

    def __init__(self, model: str, folder: Path, results: Path, scale: Scale) -> None:
        self.model, self.folder, self.results, self.scale = model, folder, results, scale

    @cached_property
    def model_sha256(self) -> str:
        """Hash of the model's weights, or its hub id."""
        from opsd_lightning.runs.provenance import model_digest

        return model_digest(self.model)

    # Training

    def train(self, arm: Arm, rate: float, seed: int, again: bool = False) -> Result:
        """Train an arm on the first task, unless it is done or if ``again`` is set, and return the result."""
        scale = self.scale
        name = f"{arm.name}-lr{rate:g}-seed{seed}"
        if not again and (done := self._finished(name)) is not None:
            return done
        questions = scale.completions // (scale.group if arm.method == "grpo" else 1)
        return self._fit(name, self._first(arm), rate, seed, scale.steps, questions)

    def trained(self, arm: Arm, seed: int) -> Path:
        """Return the checkpoint after the first task. Train again if only the result is here, and not the checkpoint."""
        rate, path = self.chosen_rate(arm), self.folder / self.run_name(arm, seed) / "last.ckpt"
        if not path.exists():
            self.train(arm, rate, seed, again=True)
        return path

    def chosen_rate(self, arm: Arm) -> float:
        """Return the learning rate whose run with seed 0 validates best after the last step."""
        return choose_rate(lambda rate: self.train(arm.tuned, rate, 0)["validation"])

    def run_name(self, arm: Arm, seed: int) -> str:
        """Return the name of an arm's run with its chosen learning rate."""
        return f"{arm.name}-lr{self.chosen_rate(arm):g}-seed{seed}"

    def train_second(self, arm: Arm, rate: float, seed: int, again: bool = False) -> Result:
        """Train on the second task from the weights after the first, as `train`, and return the result.

        The adapter of the first task is merged into the base model, and a new adapter trains. OPSD's fixed teacher is
        therefore the model after the first task.
        """
        scale = self.scale
        questions = scale.second_completions // (scale.group if arm.method == "grpo" else 1)
        name = f"second-{arm.name}-lr{rate:g}-seed{seed}"
        if not again and (done := self._finished(name)) is not None:
            return done
        arguments = self._second(arm, self.merged(arm, seed))
        return self._fit(name, arguments, rate, seed, scale.second_steps, questions)

    def trained_second(self, arm: Arm, seed: int) -> Path:
        """Return the checkpoint after the second task, as `trained`."""
        rate = self.chosen_second_rate(arm)
        path = self.folder / f"second-{arm.name}-lr{rate:g}-seed{seed}" / "last.ckpt"
        if not path.exists():
            self.train_second(arm, rate, seed, again=True)
        return path

    def chosen_second_rate(self, arm: Arm) -> float:
        """Return the learning rate for the second task, chosen as `chosen_rate`."""
        return choose_rate(lambda rate: self.train_second(arm, rate, 0)["validation"])

    def merged(self, arm: Arm, seed: int) -> str:
        """Return the folder of the model after the first task, with its adapter merged."""
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from opsd_lightning.utils.folders import replace_folder

        run = self.trained(arm, seed).parent
        made, adapter = run / "merged" / "config.json", run / "adapter" / "adapter_model.safetensors"
        if not made.exists() or made.stat().st_mtime < adapter.stat().st_mtime:
            base = AutoModelForCausalLM.from_pretrained(self.model, dtype="float32")
            model = PeftModel.from_pretrained(base, str(run / "adapter")).merge_and_unload()
            with replace_folder(run / "merged", "--output", "merged model") as temporary:
                model.save_pretrained(temporary)
                AutoTokenizer.from_pretrained(self.model).save_pretrained(temporary)
        return str(run / "merged")

    def _fit(self, name: str, arguments: list[str], rate: float, seed: int, steps: int, questions: int) -> Result:
        from opsd_lightning.quickstart import run, say

        say(name)
        started = time.perf_counter()
        folder = self.folder / name
        checkpoint = {"dirpath": str(folder), "filename": "last", "every_n_train_steps": steps}
        checkpoint |= {"enable_version_counter": False, "save_top_k": 1}
        callbacks = [
            {"class_path": "ModelCheckpoint", "init_args": checkpoint},
            {"class_path": "ProgressLines"},
            {"class_path": "AdapterExport"},
        ]
        schedule = {"max_lr": rate, "total_steps": steps, "pct_start": 0.34, "div_factor": 20}
        fit = [f"--seed_everything={seed}", f"--model.init_args.optimizer.init_args.lr={rate}"]
        fit += [f"--model.init_args.lr_scheduler.init_args.{key}={value}" for key, value in schedule.items()]
        fit += [f"--data.batch_size={questions}", f"--data.val.init_args.size={self.scale.validation}"]
        fit += [f"--trainer.default_root_dir={folder}", f"--trainer.logger.init_args.save_dir={folder}"]
        fit += [f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps}", "--trainer.num_sanity_val_steps=0"]
        fit += [f"--trainer.callbacks={json.dumps(callbacks)}"]
        run(["fit", *arguments, *fit])
        rows, validations = read_log(folder)
        result = {
            "run": name,
            "seed": seed,
            "learning_rate": rate,
            "optimizer_steps": len(rows),
            "questions_read": len(rows) * questions,
            "tokens_generated": rows[-1]["train/tokens_generated"],
            "validation": validations[-1][1],
            "training_seconds": round(sum(value for row in rows for key, value in row.items() if key in SECONDS)),
            "minutes": round((time.perf_counter() - started) / 60, 1),
        }
        return self._write(name, result, arguments + fit)

    # Measurements

    def measure_base(self) -> None:
        """Measure the untrained model, and the teacher with references of each style."""
        self._measure("base", ARMS["opsd-own"], self.model, None)
        for style in dict.fromkeys(arm.style for arm in ARMS.values() if arm.style is not None):
            name = f"teacher-{style}"
            if self._finished(f"{name}-measured") is None:
                arguments = [*self._first(Arm("opsd", style)), "--model.init_args.evaluate_teacher=true"]
                found = self._test(name, "target", arguments, None, role="teacher")
                self._write(f"{name}-measured", {"run": name, "target": found}, arguments)
        self._measure_second("base", ARMS["opsd-own"], self.model, None)

    def measure(self, arm: Arm, seed: int) -> None:
        """Measure the weights after the first task, with the chosen learning rate."""
        name = self.run_name(arm, seed)
        if self._finished(f"{name}-measured") is None:
            self._measure(name, arm, self.model, self.trained(arm, seed))

    def measure_second(self, arm: Arm, seed: int) -> None:
        """Measure the second task before training on it, and both tasks and the kept skills after it."""
        name = f"second-{arm.name}-lr{self.chosen_second_rate(arm):g}-seed{seed}"
        parts = (f"{self.run_name(arm, seed)}-second", f"{name}-second", f"{name}-measured")
        if all(self._finished(part) is not None for part in parts):
            return
        self._measure_second(self.run_name(arm, seed), arm, self.model, self.trained(arm, seed))
        checkpoint, merged = self.trained_second(arm, seed), self.merged(arm, seed)
        self._measure_second(name, arm, merged, checkpoint)
        self._measure(name, arm, merged, checkpoint)

    def _measure(self, name: str, arm: Arm, model: str, checkpoint: Path | None) -> None:
        """Measure the first task, its transfer and the kept skills."""
        if self._finished(f"{name}-measured") is not None:
            return
        first = self._first(arm, model)
        skills = [{"class_path": "KeptSkills", "init_args": {"base": False, "sets": self._sets()}}]
        found = {"target": self._test(name, "target", [*first, f"--trainer.callbacks={json.dumps(skills)}"], checkpoint)}
        found |= kept_skills(self.folder / name / "target" / "skills_test.jsonl")
        settings = {"size": self.scale.questions, "seed": TRANSFER_SEED, "largest": TRANSFER_LARGEST}
        transfer = {"class_path": "RewordedProblems", "init_args": settings}
        found["transfer"] = self._test(name, "transfer", [*first, f"--data.test={json.dumps(transfer)}"], checkpoint)
        self._write(f"{name}-measured", {"run": name, **found}, first)

    def _measure_second(self, name: str, arm: Arm, model: str, checkpoint: Path | None) -> None:
        if self._finished(f"{name}-second") is not None:
            return
        second = self._second(arm, model)
        found = self._test(name, "second", second, checkpoint)
        self._write(f"{name}-second", {"run": name, "second": found}, second)

    def _test(self, name: str, part: str, arguments: list[str], checkpoint: Path | None, role: str = "student") -> Result:
        """Return the verdicts of one held-out set: strict, and by the last number of the completion."""
        from opsd_lightning.grading.last_number import ends_in
        from opsd_lightning.quickstart import run, say
        from opsd_lightning.runs.provenance import file_digest
        from opsd_lightning.runs.reader import read_records

        say(f"{name}: {part}")
        folder = self.folder / name / part
        last = [f"--ckpt_path={checkpoint}"] if checkpoint else []
        run(["test", *arguments, "--verbose=false", f"--trainer.default_root_dir={folder}", *last])
        records = [record for record in read_records(folder / "test.jsonl") if record["role"] == role]
        return {
            "strict": digits(bool(record["correct"]) for record in records),
            "last_number": digits(bool(ends_in(record["completion"], record["reference"])) for record in records),
            "completion_tokens": sum(record["completion_tokens"] for record in records) / len(records),
            "truncated": sum(record["truncated"] for record in records) / len(records),
            "completions_sha256": file_digest(folder / "test.jsonl"),
        }

    def _sets(self) -> dict[str, Any]:
        """Return the sets of kept skills for `KeptSkills`."""

        def source(name: str) -> dict[str, Any]:
            return {"class_path": name, "init_args": {"size": self.scale.items}}

        def made(name: str, **arguments: Any) -> dict[str, Any]:
            return {"class_path": name, "init_args": arguments}

        columns = {"question": "question", "trace": None, "answer": None}
        prompts = made("FileSource", path=GENERAL_PROMPTS, columns=columns)
        return {
            "facts": made("ChoicesByLikelihood", source=source("CommonFacts")),
            "stories": made(
                "ChoicesByLikelihood",
                source=source("StoryContinuations"),
                group="situation",
                normalization="bytes",
                chat=False,
            ),
            "formats": made(
                "GradedCompletions", source=source("FormatInstructions"), grader=made("FormatGrader"), max_new_tokens=32
            ),
            "drift": made("BaseDivergence", source=prompts, max_new_tokens=48),
        }

    # Arguments

    def _first(self, arm: Arm, model: str | None = None) -> list[str]:
        styled = ("train", "test") if arm.style not in (None, "own") else ()
        style = [f"--data.{split}.init_args.style={arm.style}" for split in styled]
        seeds = [f"--data.{split}.init_args.seed={seed}" for split, seed in DATA_SEEDS.items()]
        limits = {"sampling": self.scale.max_new_tokens, "eval_sampling": self.scale.eval_max_new_tokens}
        return [
            *self._common(CONFIG, arm, model or self.model),
            *(f"--model.init_args.{part}.max_new_tokens={limit}" for part, limit in limits.items()),
            *seeds,
            *style,
            f"--data.test.init_args.size={self.scale.questions}",
        ]

    def _second(self, arm: Arm, model: str) -> list[str]:
        # Every training question is verified in a sandbox, so there are no more of them than a run may read.
        sizes = {"train": 2 * self.scale.second_steps * self.scale.second_completions, "test": self.scale.second_questions}
        return [
            *self._common(SECOND_CONFIG, arm, model),
            *(f"--data.{split}.init_args.size={size}" for split, size in sizes.items()),
        ]

    def _common(self, config: str, arm: Arm, model: str) -> list[str]:
        preset = [] if arm.method == "opsd" else ["--config", f"configs/presets/{arm.method}.yaml"]
        group = [f"--model.init_args.sampling.n={self.scale.group}"] if arm.method == "grpo" else []
        return ["--config", config, *preset, f"--model.init_args.policy.model={model}", *group]

    def _finished(self, name: str) -> Result | None:
        """Return the result of a part, or None if it has none yet.

        Raises:
            SystemExit: The result is of another model or of other sizes.
        """
        path = self.results / f"{name}.json"
        if not path.exists():
            return None
        found: Result = read(path)
        asked = {"scale": asdict(self.scale), "model": self.model_sha256}
        held = {"scale": found["scale"], "model": found["made_with"]["model_sha256"]}
        if other := [key for key, value in asked.items() if held[key] != value]:
            raise SystemExit(f"error: {path} has another {' and '.join(other)}: give another --results and --output")
        return found

    def _write(self, name: str, result: Result, arguments: list[str]) -> Result:
        from opsd_lightning.runs.provenance import made_with

        result |= {"scale": asdict(self.scale), "arguments": arguments, "made_with": made_with(self.model)}
        write(self.results / f"{name}.json", result)
        return result


def read_log(folder: Path) -> tuple[list[dict[str, float]], list[tuple[int, float]]]:
    """Return the training steps of the latest run in a folder, and its validations as (optimizer steps, accuracy)."""
    from opsd_lightning.runs.reader import read_metrics

    logs = sorted(folder.glob("lightning_logs/version_*/metrics.csv"), key=lambda path: int(path.parent.name[8:]))
    return read_metrics(logs[-1])


def kept_skills(path: Path) -> Result:
    """Return the verdicts of each set of kept skills, and the divergence from the base in nats a token."""
    from opsd_lightning.runs.reader import read_records

    records = [record for record in read_records(path) if record["role"] == "run"]
    found: Result = {}
    for name in ("facts", "stories", "formats"):
        found[name] = digits(bool(record["score"]) for record in records if record["set"] == name)
    drift = [(record["score"], record["weight"]) for record in records if record["set"] == "drift"]
    found["base_divergence"] = sum(score for score, _ in drift) / sum(weight for _, weight in drift)
    return found


def digits(verdicts: Iterable[bool]) -> str:
    """Return verdicts as text, 1 for a right one."""
    return "".join(str(int(verdict)) for verdict in verdicts)
