"""Attacks with hostile texts on everything that prints: no control character reaches the terminal."""

from __future__ import annotations

import json
import logging
import random
import re
import sys
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console

from helpers.attack import Attack
from opsd_lightning import quickstart
from opsd_lightning.callbacks.progress import ProgressLines, print_metrics
from opsd_lightning.doctor import display as doctor
from opsd_lightning.doctor.findings import Diagnosis, Finding
from opsd_lightning.evaluation.held_out import held_out_scores
from opsd_lightning.reports import page as report
from opsd_lightning.runs.reader import read_held_out
from opsd_lightning.utils.terminal import SafeArgumentParser, escape_controls, safe_messages, safe_text, safe_tracebacks, say

pytestmark = pytest.mark.integration


PIECES = [
    "\x1b[2J", "\x1b]0;title\x07", "\x1b]8;;http://evil\x1b\\link\x1b]8;;\x1b\\", "\x1b]52;c;ZXZpbA==\x07", "\x9b31m", "\x9d0;t\x9c",
    "\x90q\x9c", "\r", "\r\n", "\b\b\b", "\x00", "\x7f", "\x0b\x0c", "\x85", "\u202e", "\u2066", "\u2069", "\u200b", "\u200d",
    "\ufeff", "\u2028", "\u2029", "\xad", "\ud800", "\udfff", "\U000e0041", "\x1bP1$r0m\x1b\\", "\x1b[?1049h", "\x1bc", "\x05",
    "[red]", "[/red]", "[link=http://evil]x[/link]", "[bold", "[/]", "\\", "[@click=f()]", ":boom:", "{}", "%s", "%", "\n", "\t",
    "a", "é", "日本", "😀", " ", "=", '"', "'", "password=hunter22 ",
]  # fmt: skip


def hostile(rng: random.Random) -> str:
    text = "".join(rng.choices(PIECES, k=rng.randint(1, 12)))
    return text + "".join(
        chr(rng.choice([rng.randrange(0x20), rng.randrange(0x7F, 0xA0), rng.randrange(0x2000, 0x2070)]))
        for _ in range(rng.randrange(4))
    )


def let_through(text: str) -> list[str]:
    kinds, visible = (
        {"Cc", "Cf", "Cs", "Zl", "Zp"},
        "\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd",
    )
    text = re.sub("(?<=😀)\u200d(?=😀)", "", text)  # which joins them
    return [repr(sign) for sign in text if unicodedata.category(sign) in kinds and sign not in "\n\t" + visible]


def diagnosis(text: str) -> Diagnosis:
    levels: list[Any] = ["note", "warning", "error"]
    facts = {
        "data": {"train": {"rows": 3, "left_out": {text: 1}, "kept": 2}, text: {"rows": 3, "left_out": {}, "kept": 2}},
        "template": {"prompts_end_with": {"student": text, text: "x"}},
        "thinking": {"prompts": {"student": text, text: text}},
        "divergence": [
            {"first_forward_kl": 0.1, "next_forward_kl": None, "student_first": text, "student_probability": 0.5,
             "teacher_first": text, "teacher_probability": 0.5},
        ],
        "memory": {"bytes": {text: 5, "total": 5}, "device": text, "device_bytes": 2**30, "free_bytes": 2**29,
                   "step": {"rows": 4, "rows_at_once": 4}, "rows_at_once": 2},
    }  # fmt: skip
    return Diagnosis([Finding(level, text, text, text, text) for level in levels], facts)


def of_quickstart(folder: Path, text: str) -> Callable[[], None]:
    record = {"role": "student", "question": text, "reference": text, "completion": text, "correct": True, "answer": text}
    record |= {"completion_tokens": 3, "truncated": False}
    for when in ("before", "after"):
        (folder / when).mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(record | {"role": role}) for role in ("student", "teacher") for _ in range(2)]
        (folder / when / "test.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "metrics.csv").write_text("step,train/loss,train/reverse_kl,train/tokens_generated\n0,1,1,1\n")
    trainer = SimpleNamespace(logger=SimpleNamespace(log_dir=str(folder)))

    def report() -> None:
        console = Console(width=110, emoji=False)
        records = read_held_out(folder.resolve())
        scores = held_out_scores(records)
        assert scores is not None
        quickstart.report_grades(console, scores)
        quickstart.report_training(console, trainer)
        quickstart.report_completions(console, records)

    return report


def progress(text: str) -> None:
    lines = ProgressLines()
    metrics = {f"val/avg@1{text}": torch.tensor(0.5), f"val/avg@1{text}_se": torch.tensor(0.1)}
    trainer: Any = SimpleNamespace(is_global_zero=True, callback_metrics=metrics)
    lines._scores(trainer, "val")
    lines._print(trainer, text)


def refused(parse: Callable[[], Any]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse()
    assert stop.value.code == 2


def logged(text: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    root = logging.getLogger("lightning.pytorch")
    root.addHandler(handler)
    try:
        with safe_messages(), warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = lambda m, c, f, n, *_: sys.stderr.write(warnings.formatwarning(m, c, f, n))
            warnings.warn(text, stacklevel=1)
            rank_zero_info(text.replace("%", "%%"))
            try:
                raise ValueError(text)
            except ValueError:
                root.exception("failed: %s", text)
    finally:
        root.removeHandler(handler)


def uncaught(text: str) -> None:
    try:
        raise RuntimeError(text) from ValueError(text)
    except RuntimeError as error:
        sys.excepthook(RuntimeError, error, error.__traceback__)


@pytest.fixture
def hooks() -> Iterator[None]:
    import threading

    before = sys.excepthook, threading.excepthook
    safe_tracebacks()
    yield
    sys.excepthook, threading.excepthook = before


def test_hostile_texts(
    attack: Attack, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes], hooks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "110")
    for number in range(attack.tries(sample=30, whole=300)):
        text = hostile(attack.random)
        colours = number % 4 == 3
        monkeypatch.setenv("FORCE_COLOR", "1") if colours else monkeypatch.delenv("FORCE_COLOR", raising=False)
        paths: dict[str, Callable[[], object]] = {
            "say": lambda text=text: say(text),
            "say to stderr": lambda text=text: say(text, error=True),
            "metrics": lambda text=text: print_metrics({text: 0.5, f"{text}@1": 0.25, f"{text}@1_se": 0.1}),
            "progress": lambda text=text: progress(text),
            "doctor": lambda text=text: doctor.show(diagnosis(text)),
            "quick start": of_quickstart(tmp_path / "quick", text),
            "report": lambda text=text: refused(lambda: report.main([str(tmp_path) + "/" + (text.replace("\0", "").replace("/", "") or "x")])),
            "arguments": lambda text=text: refused(lambda: SafeArgumentParser("opsd").parse_args([f"--{text}"])),
            "logs": lambda text=text: logged(text),
            "traceback": lambda text=text: uncaught(text),
        }  # fmt: skip
        for name, path in paths.items():
            path()
            out, err = (part.decode("utf-8") for part in capfdbinary.readouterr())
            found = out + err
            assert found, (name, ascii(text))
            plain = re.sub(r"\x1b\[[0-9;]*m", "", found) if colours else found
            assert not let_through(plain), (name, attack.round, number, ascii(text), let_through(plain))
            assert "\x1b]8" not in found and "hunter22" not in found, (name, ascii(text))
        attack.tried("hostile texts on the terminal", len(paths))


def test_what_is_readable_stays() -> None:
    text = "The answer is 7.\n\tΔx ≥ ½, 日本語, naïve 😀, שלום, नमस्ते, a\u0301 [red] \\x1b"
    assert escape_controls(text) == text and safe_text(text) == text and escape_controls(escape_controls("\x1b")) == "\\x1b"
    assert (
        escape_controls("one\r\ntwo\rthree") == "one\ntwo\\rthree"
        and escape_controls("\u202e\ud800\U000e0041") == "\\u202e\\ud800\\U000e0041"
    )


def test_a_terminal_that_lacks_characters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with (tmp_path / "out").open("w", encoding="ascii") as file:
        monkeypatch.setattr(sys, "stdout", file)
        say("± é \x1b 3")
    assert (tmp_path / "out").read_text() == "\\xb1 \\xe9 \\x1b 3\n"


def test_any_text(attack: Attack) -> None:
    """No code point leaves a control character or text that cannot be encoded."""
    for _ in range(attack.tries(sample=200, whole=20_000)):
        text = "".join(chr(attack.random.randrange(0x110000)) for _ in range(30)) + hostile(attack.random)
        found = safe_text(text)
        assert not let_through(found), ascii(text)
        assert found.encode() and escape_controls(found) == found, ascii(text)
    attack.tried("random texts made into messages", attack.tries(sample=200, whole=20_000))
