"""Tests of `opsd show`: checkpoints are loaded, and the tokens of questions that are typed in are those of the models."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.browser import browser, needs_browser
from helpers.messages import mentions
from opsd_lightning.cli.command import main as cli
from opsd_lightning.models.policy import base_of, evaluating
from opsd_lightning.prompts.templates import Prompts
from opsd_lightning.reports.html import render_template
from opsd_lightning.reports.live import Live, load_live
from opsd_lightning.reports.loopback import LoopbackServer
from opsd_lightning.reports.show import main as show
from opsd_lightning.types import ConfigError, UserError
from opsd_lightning.utils.files import script_json

pytestmark = pytest.mark.integration

QUESTION, CONTEXT = "2 + 2?", "It is <b>4</b>."
HUB_ID = "nobody/base"  # of the base model, which the run loads from a folder


@pytest.fixture(scope="module")
def run(folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its checkpoint, record and exported adapter."""
    root = tmp_path_factory.mktemp("run")
    cli(
        ["fit", f"--model.policy.model={folders['llama']}", "--model.policy.lora={r: 4, alpha: 8, dropout: 0.3}",
         "--model.policy.dtype=float32", "--model.teacher=EMATeacher", "--model.teacher.decay=0.5",
         "--model.sampling={max_new_tokens: 9, temperature: 0.8}", "--model.objective.temperature=1.7",
         "--model.optimizer=AdamW", "--model.optimizer.lr=0.05", "--data.train.size=4", "--data.batch_size=2",
         "--data.prompts.student_template={question}", "--data.prompts.teacher_template={question} Hint: {context}",
         "--trainer.max_steps=2", "--trainer.accelerator=cpu", f"--trainer.default_root_dir={root}", "--trainer.logger=false",
         "--trainer.enable_progress_bar=false", "--trainer.callbacks+=ModelCheckpoint",
         f"--trainer.callbacks.dirpath={root}", "--trainer.callbacks.filename=last", "--trainer.callbacks+=AdapterExport",
         f"--trainer.callbacks.base_model={HUB_ID}", "--trainer.callbacks+=RunReport"]
    )  # fmt: skip
    return root


@pytest.fixture(scope="module")
def live(run: Path) -> Live:
    return load_live(str(run / "last.ckpt"), device="cpu")


@torch.no_grad()
def by_hand(live: Live, prompt: list[int], completion: list[int], adapter: str | None) -> torch.Tensor:
    """Log-probabilities at each token, from a forward pass of the whole row with one adapter or none."""
    with evaluating(live.model):
        if adapter is None:
            with live.model.disable_adapter():
                logits = base_of(live.model)(torch.tensor([[*prompt, *completion]])).logits[0]
        else:
            live.model.set_adapter(adapter)
            logits = base_of(live.model)(torch.tensor([[*prompt, *completion]])).logits[0]
            live.model.set_adapter("default")
    return (logits[len(prompt) - 1 : -1] / live.objective.temperature).log_softmax(-1)


def logprobs(table: torch.Tensor, tokens: list[int]) -> list[float]:
    return table.gather(-1, torch.tensor(tokens)[:, None])[:, 0].tolist()


def test_tokens_of_a_checkpoint_are_those_of_its_models(live: Live) -> None:
    """The student with its adapter and without dropout, the teacher with its own weights and the context."""
    step = live.answer({"question": QUESTION, "context": CONTEXT, "samples": 3, "seed": 5})
    assert step["temperature"] == 1.7 and [rollout["row"] for rollout in step["rollouts"]] == [0, 1, 2]
    assert live.describe()["teacher"] == "EMATeacher" and live.describe()["live"]["max_new_tokens"] == 9
    prompts = [live.tokenizer.encode(step["rollouts"][0][f"{role}_prompt"]) for role in ("student", "teacher")]
    assert f"{QUESTION} Hint: {CONTEXT}" in step["rollouts"][0]["teacher_prompt"]
    assert CONTEXT not in step["rollouts"][0]["student_prompt"]
    for rollout in step["rollouts"]:
        tokens = rollout["tokens"]
        assert 0 < len(tokens) == rollout["length"] <= 9 and rollout["context"] == CONTEXT
        ours, theirs = (
            by_hand(live, prompt, tokens, name) for prompt, name in zip(prompts, ("default", "teacher"), strict=True)
        )
        assert rollout["student"]["logprob"] == pytest.approx(logprobs(ours, tokens), rel=2e-3, abs=1e-4)
        assert rollout["teacher"]["logprob"] == pytest.approx(logprobs(theirs, tokens), rel=2e-3, abs=1e-4)
        expected = (theirs.exp() * (theirs - ours)).sum(-1).tolist()
        assert rollout["forward_kl"] == pytest.approx(expected, rel=2e-2, abs=1e-4)
        base = by_hand(live, prompts[1], tokens, None)
        assert logprobs(base, tokens) != pytest.approx(logprobs(theirs, tokens), abs=1e-4)  # the teacher has learned, too
    again = live.answer({"question": QUESTION, "context": CONTEXT, "samples": 3, "seed": 5})
    assert again["step"] == step["step"] + 1 and again["rollouts"] == step["rollouts"]


def test_an_exported_adapter_is_its_checkpoint_against_the_base_model(run: Path, live: Live, tmp_path: Path) -> None:
    """Templates, sampling, temperature and the folder of the base model come from the run's record beside it."""
    asked = {"question": QUESTION, "context": CONTEXT, "seed": 5}
    exported = load_live(str(run / "adapter"), device="cpu")
    (ours,), (theirs,) = exported.answer(asked)["rollouts"], live.answer(asked)["rollouts"]
    for name in ("tokens", "student_prompt", "teacher_prompt"):
        assert ours[name] == theirs[name]
    assert ours["student"]["logprob"] == pytest.approx(theirs["student"]["logprob"], rel=2e-3, abs=1e-4)
    prompt = exported.tokenizer.encode(ours["teacher_prompt"])
    base = by_hand(exported, prompt, ours["tokens"], None)
    assert ours["teacher"]["logprob"] == pytest.approx(logprobs(base, ours["tokens"]), rel=2e-3, abs=1e-4)
    shutil.copytree(run / "adapter", tmp_path / "alone")  # without a record: the package's own templates
    with pytest.raises(ConfigError, match=mentions(HUB_ID)):
        load_live(str(tmp_path / "alone"), device="cpu")
    alone = load_live(str(tmp_path / "alone"), exported.policy.model, "cpu")
    rollout = alone.answer(asked | {"max_new_tokens": 4})["rollouts"][0]
    assert "step by step" in rollout["student_prompt"] and rollout["length"] <= 4


def test_questions_asked_at_the_same_time_get_the_answers_of_single_ones(live: Live) -> None:
    asked = [{"question": f"{n}?", "context": str(n), "seed": n, "samples": 2} for n in range(4)]
    single = [live.answer(each)["rollouts"] for each in asked]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(live.answer, asked))
    assert [step["rollouts"] for step in together] == single
    assert len({step["step"] for step in together}) == 4


def test_teacher_without_a_context_keeps_its_own_prompt(folders: dict[str, str]) -> None:
    """Arguments of its chat template and its prefix stay, as in training."""
    both = load_live(folders["llama"], device="cpu")
    both.prompts = Prompts(teacher_response_prefix="So: ")
    (rollout,) = both.answer({"question": "1?", "max_new_tokens": 2})["rollouts"]
    assert rollout["teacher_prompt"] == rollout["student_prompt"] + "So: "


def test_a_model_is_student_and_teacher(folders: dict[str, str]) -> None:
    both = load_live(folders["llama"], device="cpu")
    (same,) = both.answer({"question": "1?", "max_new_tokens": 6})["rollouts"]
    assert same["context"] is None and same["student_prompt"] == same["teacher_prompt"]
    assert same["forward_kl"] == pytest.approx([0.0] * same["length"], abs=1e-5)
    (differs,) = both.answer({"question": "1?", "context": "2", "max_new_tokens": 6})["rollouts"]
    assert max(differs["forward_kl"]) > 1e-3


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({}, "question"),
        ({"question": "  \n"}, "question"),
        ({"question": QUESTION, "samples": 0}, "samples"),
        ({"question": QUESTION, "samples": "many"}, "samples"),
        ({"question": QUESTION, "temperature": -1}, "temperature"),
        ({"question": QUESTION, "temperature": "nan"}, "temperature"),
        ({"question": QUESTION, "temperature": [1]}, "temperature"),
        ({"question": QUESTION, "max_new_tokens": 10**9}, "max new tokens"),
        ({"question": "?" * 4000}, "tokens"),
        ({"question": QUESTION, "context": "?" * 4000}, "tokens"),
    ],
)
def test_unusable_questions_are_refused(asked: dict[str, Any], named: str, live: Live) -> None:
    with pytest.raises(UserError, match=named):
        live.answer(asked)


def test_unusable_checkpoints_are_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    (tmp_path / "notes.ckpt").write_text("notes")
    (tmp_path / "other").mkdir()
    torch.save({"hyper_parameters": {"_class_path": "opsd_lightning.nothing.OPSDModule"}}, tmp_path / "other" / "class.ckpt")
    checkpoint = str(run / "last.ckpt")
    for arguments, named in (
        (["nowhere.ckpt"], "CHECKPOINT"),
        ([str(tmp_path / "notes.ckpt")], "CHECKPOINT"),
        ([str(tmp_path / "other" / "class.ckpt")], "CHECKPOINT"),
        ([str(run / "record")], "CHECKPOINT"),
        (["nobody/model"], "CHECKPOINT"),
        ([str(tmp_path / "damaged")], "--model"),
        ([str(run / "adapter"), "--model=nobody/model"], "--model"),
        ([checkpoint, "--model=nobody/model"], "--model"),
        ([checkpoint, "--pad_token=x"], "--pad_token"),
        ([checkpoint, "--device=gpu"], "--device"),
        ([checkpoint, "--device=cuda:99"], "--device"),
        ([str(run / "adapter"), "--pad_token=nothing"], "--pad_token"),
    ):
        with pytest.raises(SystemExit) as stop:
            show(arguments)
        error = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and [line for line in error if line.startswith("error: ")] == error[-1:]
        assert error[-1].startswith(f"error: {named}: "), error
    with pytest.raises(ConfigError, match=mentions("--model")):
        load_live(str(tmp_path / "damaged"))


# -- the page ------------------------------------------------------------------------------------------------------------


@contextmanager
def serving(live: Live) -> Iterator[LoopbackServer]:
    page = render_template("show.html", script_json({"run": live.describe(), "steps": []}))
    with LoopbackServer(page, live.answer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


WAIT = """new Promise((done, fail) => {
  const start = Date.now(), look = () => document.getElementById("go").disabled
    ? Date.now() - start > 40000 ? fail("no answer") : setTimeout(look, 30) : done(document.getElementById("state").textContent);
  setTimeout(look, 30);
})"""


@pytest.mark.browser
@needs_browser
def test_page_asks_and_shows_the_tokens(live: Live, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = sorted(path for path in run.rglob("*"))
    answered: list[dict[str, Any]] = []

    def answer(asked: Any) -> dict[str, Any]:
        answered.append(live.answer(asked))
        return answered[-1]

    with serving(live) as server, browser() as tab:
        server.answer = answer

        def ask(question: str, context: str, samples: int) -> str:
            values = {"question": question, "context": context, "samples": samples}
            tab.js(
                f"Object.entries({json.dumps(values)}).forEach(([id, value]) => document.getElementById(id).value = value)"
            )
            tab.point("#go", click=True)
            return tab.js(WAIT)

        for width in (390, 1280):
            tab.open(server.address, width, 844)
            assert tab.js("document.querySelectorAll('.card').length") == 0
            assert tab.js("document.documentElement.scrollWidth") <= width
        nasty = "<script>alert(1)</script> 2?"
        assert ask(nasty, CONTEXT, 2) == "" and ask(nasty, "", 1) == ""
        assert tab.js("document.querySelectorAll('.card').length") == 1
        texts = tab.js("[...document.querySelectorAll('.t')].map(t => t.textContent)")
        (shown,) = answered[-1]["rollouts"]
        assert len(texts) == len(shown["tokens"]) and tab.js("document.querySelector('.question').textContent") == nasty
        shades = tab.js("[...document.querySelectorAll('.t')].map(t => +t.className.match(/l(\\d+)/)[1])")
        pairs = sorted(zip(shown["forward_kl"], shades, strict=True))
        assert [shade for _, shade in pairs] == sorted(shades)
        tab.point(".together", click=True)  # both attempts at the question
        assert tab.js("document.querySelectorAll('.card').length") == 3
        tab.point(".card .t", click=True)
        assert "Teacher's top" in tab.js("document.getElementById('detail').innerText")
        assert "7000" in ask("7" * 7000, "", 1) or tab.js("document.querySelectorAll('#state.bad').length") == 1
        assert tab.js("document.documentElement.scrollWidth") <= 1280
        errors = [error for error in tab.errors if "400" not in error]  # the refusal of the long question
        assert errors == [] and set(tab.requests) == {f"{server.address}answer"}
    assert sorted(path for path in run.rglob("*")) == files and list(tmp_path.iterdir()) == []


def test_command_serves_a_page(
    run: Path, folders: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The address is printed whole, and Ctrl-C ends the command."""
    import urllib.request

    found: list[str] = []
    serve_forever = LoopbackServer.serve_forever

    def serve(self: LoopbackServer) -> None:
        thread = threading.Thread(target=serve_forever, args=(self, 0.01))
        thread.start()
        found.append(urllib.request.urlopen(self.address, timeout=20).read().decode())
        self.shutdown()
        thread.join()
        found.append(self.address)
        raise KeyboardInterrupt

    monkeypatch.setattr(LoopbackServer, "serve_forever", serve)
    show([str(run / "adapter"), "--device=cpu"])
    page, address = found
    printed = capsys.readouterr()
    assert address in printed.out and 'id="ask"' in page
    assert folders["llama"] in printed.err and HUB_ID not in printed.err
