"""Runs with secrets in settings, the environment, URLs, loggers' arguments and a server's answer, and what they leave behind."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from helpers.vllm_protocol import ProtocolServer
from opsd_lightning.cli.command import main
from opsd_lightning.doctor import command as doctor
from opsd_lightning.methods.opsd import OPSDModule
from opsd_lightning.rollouts.vllm.client import check_urls
from opsd_lightning.runs.saved_config import SavedConfig
from opsd_lightning.types import ConfigError

pytestmark = pytest.mark.integration


PARTS = '''
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger

from opsd_lightning import TransformersEngine


class Engine(TransformersEngine):
    """An engine with a key."""

    def __init__(self, api_key: str, url: str, headers: dict[str, str], credentials: dict[str, str]) -> None:
        super().__init__()
        self.api_key, self.url, self.headers, self.credentials = api_key, url, headers, credentials


class Notifier(Callback):
    """A callback that fails."""

    def __init__(self, web_hook: str, fails: bool = False, api_keys: list[str] = []) -> None:
        self.web_hook, self.fails = web_hook, fails

    def on_train_end(self, trainer, pl_module) -> None:
        if self.fails:
            raise RuntimeError(f"POST {self.web_hook} failed: Authorization: Bearer canary-of-a-header-1, \\x1b]0;title\\x07")


class KeyedLogger(CSVLogger):
    """A logger with a key."""

    def __init__(self, save_dir: str, api_key: str) -> None:
        super().__init__(save_dir)
        self.api_key = api_key
'''
HOOK = "https://hooks.slack.com/services/T000/B000/canary-of-a-web-hook"
ENGINE = {
    "api_key": "canary-of-a-key",
    "url": "https://bob:pa/ss@canary-of-a-password@host.org/v1?sig=canary-of-a-signature&page=2",
    "headers": {"Authorization": "Bearer canary-of-a-header", "Accept": "text/html"},
    "credentials": {"user": "canary-of-a-user", "secret": "canary-of-a-secret"},
}


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / "own_parts.py").write_text(PARTS)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("MY_SERVICE_TOKEN", "canary-of-the-environment")
    yield folder
    sys.modules.pop("own_parts", None)


def settings(run: Path, fails: bool = False) -> list[str]:
    callbacks = [
        "RunReport",
        {"class_path": "TokenReport", "init_args": {"pictures": False}},
        {"class_path": "own_parts.Notifier", "init_args": {"web_hook": HOOK, "fails": fails, "api_keys": ["canary-of-a-list"]}},
    ]  # fmt: skip
    loggers = [
        {"class_path": "own_parts.KeyedLogger", "init_args": {"save_dir": str(run), "api_key": "canary-of-a-logger"}},
        {"class_path": "TensorBoardLogger", "init_args": {"save_dir": str(run)}},
    ]
    callbacks = [c if isinstance(c, dict) else {"class_path": c} for c in callbacks]
    return [
        f"--model.rollouts={json.dumps({'class_path': 'own_parts.Engine', 'init_args': ENGINE})}",
        f"--trainer.callbacks={json.dumps(callbacks)}",
        f"--trainer.logger={json.dumps(loggers)}",
        f"--trainer.default_root_dir={run}",
        "--data.prompts.system=uses canary-of-the-environment",
    ]


def canaries(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and b"canary" in path.read_bytes()]


def test_nothing_of_a_run_holds_a_secret(
    base: list[str],
    parts: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    cli = main(["fit", *base, *settings(run)])
    main(["test", *base, *settings(run), "--verbose=true"])
    out = "".join(capfd.readouterr())
    assert "canary" not in out
    left = [path for path in run.rglob("*") if path.is_file()]
    names = {path.name for path in left}
    assert {"config.yaml", "hparams.yaml", "run.json", "report.html", "tokens.html", "settings.json", "test.jsonl"} <= names
    assert not canaries(run)
    assert not any(b"canary" in str(path).encode() for path in left)

    # What is no secret is there, and the run itself had the values.
    saved = next(path for path in left if path.name == "config.yaml" and path.parent.name == "version_0")
    text, config = saved.read_text(), yaml.safe_load(saved.read_text())
    engine = config["model"]["init_args"]["rollouts"]["init_args"]
    assert engine["api_key"] == "***" and engine["url"] == "***"
    assert engine["headers"]["Accept"] == "text/html" and cli.model.rollouts.api_key == "canary-of-a-key"
    assert config["trainer"]["max_steps"] == 2 and all(
        name in text.splitlines()[0] for name in ("model.init_args.rollouts.init_args.api_key", "data.prompts.system")
    )
    checkpoint = next(path for path in left if path.suffix == ".ckpt")
    hyper_parameters = torch.load(checkpoint, weights_only=True)["hyper_parameters"]
    assert hyper_parameters["rollouts"]["init_args"]["api_key"] == "***"

    # Hidden values are not run from.
    with pytest.raises(SystemExit) as stop:
        main(["fit", f"--config={saved}"])
    error = capfd.readouterr().err
    assert stop.value.code == 2 and "model.rollouts.init_args.api_key" in error.splitlines()[-1]
    with pytest.raises(ConfigError) as refused:
        OPSDModule.load_from_checkpoint(checkpoint, weights_only=True)
    assert refused.value.setting == "prompts.system" and "rollouts.init_args.api_key" in str(refused.value)
    again = [f"--model.rollouts={json.dumps({'class_path': 'own_parts.Engine', 'init_args': ENGINE})}"]
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(run)}}
    again += [
        "--trainer.callbacks=[]",
        f"--trainer.logger={json.dumps(logger)}",
        "--data.prompts.system=uses canary-of-the-environment",
    ]
    main(["fit", f"--config={saved}", *again, f"--ckpt_path={checkpoint}", "--trainer.max_steps=3"])
    assert not canaries(run)


def test_a_config_without_secrets_is_lightnings_own(base: list[str], tmp_path: Path) -> None:
    cli = main(["validate", *base])
    callback = next(c for c in cli.trainer.callbacks if isinstance(c, SavedConfig))
    saved = next(tmp_path.rglob("config.yaml")).read_text()
    assert saved.endswith(callback.parser.dump(callback.config, skip_none=False)) and "Hidden" not in saved


def test_failing_run_shows_no_secret(
    base: list[str],
    parts: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    with pytest.raises(RuntimeError, match="canary"):
        main(["fit", *base, *settings(run, fails=True)])
    assert not canaries(run) and "canary" not in "".join(capfd.readouterr())
    info = json.loads((run / "record" / "run.json").read_text())
    assert info["status"] == "failed" and info["reason"].startswith(
        "RuntimeError: POST https://hooks.slack.com/services/***"
    )
    assert "\x1b" not in info["reason"] and "\\x1b]0;title\\x07" in info["reason"]


@pytest.fixture
def server(folders: dict[str, str]) -> Iterator[ProtocolServer]:
    found = ProtocolServer(folders["llama"])
    yield found
    found.kill()


@pytest.mark.filterwarnings("ignore::RuntimeWarning:opsd_lightning.rollouts.vllm.engines")
@pytest.mark.parametrize("status", [400, 500])
def test_server_errors_show_no_secret(
    base: list[str],
    parts: Path,
    tmp_path: Path,
    server: ProtocolServer,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    status: int,
) -> None:
    """Its message, which repeats the API key, on the console and in the record."""
    run = tmp_path / "run"
    monkeypatch.setenv("VLLM_API_KEY", "canary-of-the-api-key")
    answer = "bad key: Authorization: Bearer canary-of-the-server-1 \x1b[2J\x1b]52;c;Y2FuYXJ5\x07 canary-of-the-api-key"
    server.hook = lambda path: (status, answer) if path == "/v1/completions" else None
    engine: dict[str, Any] = {"urls": [server.url], "retries": 0, "adapter_folder": str(tmp_path / "adapters")}
    rollouts = f"--model.rollouts={json.dumps({'class_path': 'VLLMServerEngine', 'init_args': engine})}"
    callbacks = f"--trainer.callbacks={json.dumps([{'class_path': 'RunReport'}])}"
    with pytest.raises(SystemExit) as stop, pytest.warns() if status == 500 else capfd.disabled():
        main(
            [
                "fit",
                *base,
                rollouts,
                callbacks,
                f"--trainer.default_root_dir={run}",
                f"--trainer.logger.init_args.save_dir={run}",
            ]
        )
    assert stop.value.code == 2
    out = "".join(capfd.readouterr())
    assert not canaries(run) and "canary" not in out and "\x1b" not in out and "\x07" not in out
    reason = json.loads((run / "record" / "run.json").read_text())["reason"]
    assert "Authorization: ***" in reason and "\\x1b[2J" in reason


def test_an_address_with_a_password_is_refused_without_it() -> None:
    with pytest.raises(ConfigError) as refused:
        check_urls(["http://bob:canary-of-a-url@host:8000"])
    assert refused.value.setting == "model.rollouts.init_args.urls" and "canary" not in str(refused.value)


def test_doctor_shows_no_secret(
    base: list[str],
    parts: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    wrong = ["--data.val.init_args.path=https://bob:canary-of-a-url@127.0.0.1:9/canary-of-the-environment/rows.jsonl"]
    with pytest.raises(SystemExit):
        doctor.main(
            ["--no-model", "--json", str(tmp_path / "found" / "found.json"), *base, *settings(tmp_path / "run"), *wrong]
        )
    out = "".join(capfd.readouterr())
    assert "canary" not in out and "rows.jsonl" in out.replace("\n", "") and not canaries(tmp_path / "found")
