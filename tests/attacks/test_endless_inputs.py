"""Attacks with templates, settings, models and records without end: refused in bounded time."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.attack import Attack
from helpers.grading import with_answers
from helpers.models import CHAT_TEMPLATE, make_tokenizer
from opsd_lightning.cli.command import main
from opsd_lightning.cli.parser import load_yaml
from opsd_lightning.grading.math_grader import MathGrader
from opsd_lightning.models.policy import Policy
from opsd_lightning.prompts import chat_template
from opsd_lightning.reports.page import write_report
from opsd_lightning.runs.reader import read_run
from opsd_lightning.types import ConfigError, UserError
from opsd_lightning.utils.limited_process import exceeded_limit

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore::UserWarning:opsd_lightning.grading")]


MESSAGES = [{"role": "user", "content": "1 + 1?"}]


@contextmanager
def within(seconds: float, case: object) -> Iterator[None]:
    """End the test where something takes longer, also in C code."""

    def late(*_: Any) -> None:
        raise AssertionError(f"it takes more than {seconds:g} s: {case!r:.200}")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# -- chat templates ------------------------------------------------------------------------------------------------------

TEMPLATES = [
    "{% for a in range(90000) %}{% for b in range(90000) %}{% for c in range(90000) %}{% endfor %}{% endfor %}{% endfor %}",
    "{{ 10 ** (10 ** 10) }}",
    "{{ 'a' * 10 ** 10 }}",
    "{% set n = namespace(t='a') %}{% for i in range(60) %}{% set n.t = n.t ~ n.t %}{% endfor %}{{ n.t }}",
    "{% for a in range(300) %}{{ 'a' * 99999 }}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}",
    "{{ ('a' * 90000000) | list | length }}{% for a in range(90000) %}{{ 'a' * 90000000 }}{% endfor %}",
]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="templates are tried in a forked process")
def test_chat_templates(attack: Attack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "_SECONDS", 0.5)
    monkeypatch.setattr(chat_template, "_ENDING", set())
    rng, tokenizer = attack.random, make_tokenizer()
    for number in range(attack.tries(sample=len(TEMPLATES), whole=30)):
        bomb = TEMPLATES[number % len(TEMPLATES)]
        kwargs: dict[str, Any] = {}
        if rng.random() < 0.5:
            bomb, kwargs = f"{{% if deep is defined %}}{bomb}{{% endif %}}", {"deep": True}
        tokenizer.chat_template = rng.choice([bomb + CHAT_TEMPLATE, CHAT_TEMPLATE + bomb])
        with within(60, tokenizer.chat_template), pytest.raises(ConfigError) as refused:
            chat_template.render(tokenizer, MESSAGES, kwargs, date(2024, 7, 26))
        assert refused.value.setting == chat_template.SETTING
        attack.tried("endless chat templates")
    tokenizer.chat_template = CHAT_TEMPLATE
    assert "1 + 1?" in chat_template.render(tokenizer, MESSAGES, {}, date(2024, 7, 26))


def test_what_a_child_runs_out_of() -> None:
    assert exceeded_limit(lambda: time.sleep(60), 0.2, 1 << 28) == "time"
    assert exceeded_limit(lambda: len(str(10**10**8)), 0.2, 1 << 28) == "time"
    assert exceeded_limit(lambda: bytearray(1 << 30), 20.0, 1 << 28) == (
        "memory" if Path("/proc/self/statm").exists() else ""
    )
    assert exceeded_limit(lambda: 1 / 0, 20.0, 1 << 28) == exceeded_limit(lambda: None, 20.0, 1 << 28) == ""
    assert exceeded_limit(lambda: os.kill(os.getpid(), signal.SIGKILL), 20.0, 1 << 28) == "memory"


# -- YAML ----------------------------------------------------------------------------------------------------------------


def _aliases(rng: random.Random) -> str:
    width, depth = rng.randint(6, 12), rng.randint(8, 20)
    lines = ["a0: &a0 " + rng.choice(["[x, x, x]", "{x: 1, y: 2}", "x"])]
    for level in range(1, depth):
        parts = [f"*a{level - 1}"] * width
        lines.append(f"a{level}: &a{level} " + rng.choice(["[{}]", "{{<<: [{}]}}"]).format(", ".join(parts)))
    if "<<" in "".join(lines):
        lines[0] = "a0: &a0 {x: 1, y: 2}"
        lines = [re.sub(r": \[(\*a\d+(?:, )?)+\]$", lambda found: found[0], text) for text in lines]
    return "\n".join(lines) + "\n"


def _deep(rng: random.Random) -> str:
    depth = rng.choice([200, 2_000, 100_000])
    opening, closing = rng.choice([("[", "]"), ("{a: ", "}"), ("- ", ""), ("? ", "")])
    return rng.choice(["", "a:\n  "]) + opening * depth + "1" + closing * rng.choice([0, depth])


def _long(rng: random.Random) -> str:
    return rng.choice([
        "a: " + "9" * 100_000, "a: 0x" + "f" * 10_000, "a: " + ":".join(["59"] * 5_000), "".join(f"k{i}: 1\n" for i in range(60_000)),
        "a: '" + "x" * 2_000_000 + "'", "&a [*a, *a]" + " " * 300, "a: [" + "1, " * 100_000 + "]", "&a {b: *a}", "a: 0b" + "1" * 50_000,
    ])  # fmt: skip


def test_yaml(attack: Attack, tmp_path: Path) -> None:
    """As a value, as a file, and in the record of a run."""
    rng = attack.random
    for number in range(attack.tries(sample=12, whole=200)):
        text = [_aliases, _deep, _long][number % 3](rng)
        for path in (None, "x.yaml"):
            with within(20, text), pytest.raises(yaml.YAMLError):
                load_yaml(text, path)
        folder = record_of(tmp_path / str(number))
        (folder / "record" / "config.yaml").write_text(text)
        with within(20, text), pytest.raises(UserError):
            write_report([folder], tmp_path / "page.html")
        shutil.rmtree(folder)
        attack.tried("endless YAML")
    plain = "a: &a {lr: 0.1, layers: [1, 2]}\nb: *a\nc: {<<: *a, lr: 0.2}\n" + "# a comment\n" * 50
    assert load_yaml(plain, "x.yaml")["c"] == {"lr": 0.2, "layers": [1, 2]}


def test_yaml_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, text in enumerate(
        [_aliases(random.Random(0)), "model: " + "[" * 5_000, "2001-99-99", "seed_everything: " + "9" * 9_999]
    ):
        config = tmp_path / f"{number}.yaml"
        config.write_text(text)
        with within(60, text), pytest.raises((SystemExit, UserError)) as stop:
            main(["fit", f"--config={config}"])
        assert not isinstance(stop.value, SystemExit) or stop.value.code == 2
        assert "Traceback" not in capsys.readouterr().err


# -- models --------------------------------------------------------------------------------------------------------------


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _gguf(tensors: int = 0, values: list[bytes] | None = None, count: int | None = None, rest: bytes = b"") -> bytes:
    found = values or []
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, len(found) if count is None else count) + b"".join(found) + rest


def _hostile_gguf(rng: random.Random) -> bytes:
    huge = rng.choice([2**30, 2**40, 2**60, 2**63, 2**64 - 1])
    key = _string("general.architecture")
    return rng.choice([
        _gguf(tensors=huge), _gguf(count=huge), _gguf(tensors=huge, rest=b"\0" * 4096), _gguf(count=huge, rest=b"\0" * 4096),
        _gguf(values=[key + struct.pack("<IIQ", 9, rng.choice([0, 4, 8, 9, 12, 99]), huge)]),
        _gguf(values=[key + struct.pack("<IQ", 8, huge)]), _gguf(values=[struct.pack("<Q", huge)]),
        _gguf(values=[key + struct.pack("<I", rng.choice([9, 13, 2**31]))]),
        _gguf(values=[key + struct.pack("<IIQ", 9, 9, 1) * 1 + struct.pack("<IQ", 9, 1) * 1000]),
        _gguf(tensors=1, rest=_string("a") + struct.pack("<I", rng.choice([9, 2**32 - 1])) + b"\xff" * 64),
        _gguf(tensors=1, rest=_string("a") + struct.pack("<IQIQ", 1, huge, 0, 0)), b"GGUF", b"", b"PK\3\4" + rng.randbytes(500),
        b"GGUF" + rng.randbytes(rng.randint(1, 2_000)),
    ])  # fmt: skip


def test_ggufs(attack: Attack, tmp_path: Path) -> None:
    for _ in range(attack.tries(sample=25, whole=500)):
        content = _hostile_gguf(attack.random)
        path = tmp_path / "model.gguf"
        path.write_bytes(content)
        policy = Policy(model=str(path))
        for load in (policy.load_config, policy.load_tokenizer):
            with within(20, content), pytest.raises(UserError, match=r"model\.policy\.model"):
                load()
        attack.tried("endless GGUF headers")


def test_what_is_no_file_is_no_gguf(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.gguf")
    (tmp_path / "zero.gguf").symlink_to("/dev/zero")
    (tmp_path / "folder.gguf").mkdir()
    for name in ("fifo", "zero", "folder"):
        with within(20, name), pytest.raises(ConfigError):
            Policy(model=str(tmp_path / f"{name}.gguf")).load_config()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_model_files_of_any_depth(name: str, folders: dict[str, str], tmp_path: Path) -> None:
    """None of them ends by anything but a message, or by being taken as it is."""
    for number, (depth, opening, closing) in enumerate([(300, '{"a": ', "}"), (5_000, "[", "]"), (100_000, '{"a": ', "}")]):
        folder = tmp_path / str(number)
        shutil.copytree(folders["llama"], folder)
        text = (folder / name).read_text().rstrip()[:-1] + f', "zz": {opening * depth}1{closing * depth}}}'
        (folder / name).write_text(text)
        policy = Policy(model=str(folder), dtype="float32")
        for load in (policy.load_config, policy.load_tokenizer):
            with within(60, (name, depth)), suppress(UserError):
                load()


def test_a_model_of_endless_layers(folders: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders["llama"], folder)
    config = json.loads((folder / "config.json").read_text())
    for layers in (10**6, 10**12, 10**300):
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
        with within(20, layers), pytest.raises(UserError, match=r"model\.policy\.model"):
            Policy(model=str(folder), dtype="float32").build()


# -- answers -------------------------------------------------------------------------------------------------------------


def test_answer_patterns(attack: Attack) -> None:
    patterns = [r"((?:\w+\s?)+)=", r"((a|aa)+)$b", r"(.*.*.*.*.*.*=)!", r"((?:(?:a?)+)+)b", r"((?:a+)+)b(?R)?"]
    for number in range(attack.tries(sample=2, whole=20)):
        grader = MathGrader(answer_pattern=patterns[number % len(patterns)], timeout_seconds=0.3)
        with within(20, grader):
            grader.grade("a" * attack.random.choice([100, 10_000]) + "!=b ", *with_answers(["5"]))
        attack.tried("endless regular expressions")


# -- records of runs -----------------------------------------------------------------------------------------------------


def record_of(folder: Path) -> Path:
    """The record of a run with everything that a report reads."""
    record = folder / "record"
    record.mkdir(parents=True)
    start = {"command": ["opsd", "fit"], "time": "2026-01-01T00:00:00", "step": 0, "seed": 0, "folder": "/", "devices": "cpu", "git": "",
             "versions": {"torch": "2"}}  # fmt: skip
    info = {"starts": [start], "logs": ["a"], "status": "finished", "reason": "", "ended": None, "warnings": ["w"]}
    (record / "run.json").write_text(json.dumps(info))
    (record / "config.yaml").write_text(
        "model: {class_path: opsd_lightning.OPSDModule, init_args: {token_budget: 1}}\ntrainer: {max_steps: 2}\n"
    )
    lines = [
        {
            "kind": "train",
            "step": s,
            "tokens": 10 * s,
            "seconds": 1.0 * s,
            "metrics": {"train/loss": 1 / s, "train/forward_kl": 0.5},
        }
        for s in (1, 2)
    ]
    lines += [
        {
            "kind": "val",
            "step": s,
            "tokens": 0,
            "seconds": 0,
            "metrics": {"val/avg@1": 0.5, "val/avg@1_se": 0.1, "val/questions": 4},
        }
        for s in (0, 2)
    ]
    (record / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sample = {"index": 0, "question": "1?", "correct": True, "answer": "1", "completion_tokens": 1, "truncated": False, "completion": "1",
              "samples": 1, "right": 1, "reference": "1"}  # fmt: skip
    lines = [{"kind": "val", "step": step, "records": [sample]} for step in (0, 2)]
    (record / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


HOSTILE = [
    None, True, -1, 0, 2**63, 10**400, -(10**400), 1e308, -1e308, 5e-324, float("nan"), float("inf"), "", "x", "\0", "\u202e<script>", "9" * 5_000, [],
    {}, [[]], {"": {}}, ["x"] * 1_000, {"class_path": 5}, {"class_path": None, "init_args": 3}, "1e999", "../../etc/passwd", {str(n): n for n in range(300)},
]  # fmt: skip


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from _places(part, (*path, key))


def _changed(value: Any, rng: random.Random) -> Any:
    """A value with one part of it replaced, removed or nested."""
    path = rng.choice(list(_places(value)))
    if not path:
        return rng.choice(HOSTILE)
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    change = rng.random()
    if change < 0.1 and isinstance(inner, dict):
        inner[rng.choice(["", "\0", "train/x", "val/avg@9", "class_path", "step"])] = rng.choice(HOSTILE)
    elif change < 0.2:
        del inner[path[-1]]
    elif change < 0.3:
        deep: Any = 1
        for _ in range(rng.choice([50, 150])):
            deep = {"a": deep} if rng.random() < 0.5 else [deep]
        inner[path[-1]] = deep
    else:
        inner[path[-1]] = rng.choice(HOSTILE)
    return value


def _damage(folder: Path, rng: random.Random) -> None:
    name = rng.choice(["run.json", "metrics.jsonl", "samples.jsonl", "config.yaml"])
    path = folder / "record" / name
    if name == "config.yaml":
        path.write_text(yaml.safe_dump(_changed(yaml.safe_load(path.read_text()), rng)))
    elif name == "run.json":
        path.write_text(json.dumps(_changed(json.loads(path.read_text()), rng)))
    else:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        place = rng.randrange(len(lines))
        lines[place] = _changed(lines[place], rng)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _whole_file(folder: Path, rng: random.Random) -> None:
    path = folder / "record" / rng.choice(["run.json", "metrics.jsonl", "samples.jsonl", "config.yaml"])
    path.unlink()
    kind = rng.randrange(6)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.symlink_to(rng.choice(["/dev/zero", "/dev/stdin", "/proc/self/mem", path.name, "/nowhere"]))
    elif kind == 2:
        path.mkdir()
    elif kind == 3:
        path.write_bytes(rng.randbytes(1_000))
    elif kind == 4:
        path.write_text(rng.choice(['{"a": ', "["]) * 100_000 + "\n")
    else:
        path.write_text(
            '{"kind": "train", "step": 1e999, "tokens": -Infinity, "seconds": NaN, "metrics": {"train/loss": NaN}}\n' * 3
        )


@pytest.mark.parametrize("damage", [_damage, _whole_file])
def test_reports_of_hostile_records(damage: Callable[[Path, random.Random], None], attack: Attack, tmp_path: Path) -> None:
    """A page or one message, in bounded time."""
    for number in range(attack.tries(sample=40, whole=600)):
        folder = record_of(tmp_path / str(number))
        damage(folder, attack.random)
        with within(20, (attack.round, number)), suppress(UserError):
            write_report([folder], tmp_path / "page.html")
        shutil.rmtree(folder)
        attack.tried("hostile records")
    assert read_run(record_of(tmp_path / "good")).accuracy == "val/avg@1"
