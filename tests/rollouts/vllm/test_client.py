"""Tests of the end of runs on vLLM servers, and of limits on the servers' answers."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from peft import PeftModel

from helpers.messages import mentions
from helpers.models import PROMPTS, perturb
from helpers.training import parts, trainer
from helpers.vllm_protocol import ProtocolServer, hang
from opsd_lightning.models.policy import Policy
from opsd_lightning.rollouts.vllm import client as vllm_servers
from opsd_lightning.rollouts.vllm.client import check_urls
from opsd_lightning.rollouts.vllm.engines import VLLMServerEngine
from opsd_lightning.types import ConfigError, Sampling
from opsd_lightning.utils.http import retry_after, sanitize

pytestmark = [
    pytest.mark.integration,
    # Servers fail here on purpose. Killed ones leave sockets.
    pytest.mark.filterwarnings("ignore:vLLM server http:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning"),
    # `pytest.warns` issues this one again, without the module by which pyproject.toml ignores it.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


SAMPLING = Sampling(max_new_tokens=4)


@pytest.fixture
def server(folders: dict[str, str]) -> Iterator[ProtocolServer]:
    started = ProtocolServer(folders["llama"])
    yield started
    started.kill()


@pytest.fixture
def engine(server: ProtocolServer, tmp_path: Path) -> Iterator[Callable[..., VLLMServerEngine]]:
    made = []

    def make(*urls: str, **settings: Any) -> VLLMServerEngine:
        settings = {"retries": 0, "timeout_seconds": 20.0, "max_concurrency": 2} | settings
        made.append(VLLMServerEngine(list(urls) or [server.url], str(tmp_path / "adapters"), **settings))
        return made[-1]

    yield make
    for each in made:
        each.close()


def in_a_child(work: Callable[[], None]) -> int:
    """Fork a process that does something, with the signals of a new one; returns its number."""
    child = os.fork()
    if child:
        return child
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
        work()
    finally:
        os._exit(0)


def wait_until(happened: Callable[[], Any], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def end(child: int, seconds: float = 60.0) -> float:
    """Wait for a child's end; returns how long it took."""
    began = time.monotonic()
    try:
        wait_until(lambda: os.waitpid(child, os.WNOHANG)[0], seconds)
    except AssertionError:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    return time.monotonic() - began


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


# -- the ends of a run ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True], ids=["in step", "ahead"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_leaves_no_adapter(
    number: int,
    overlap: bool,
    server: ProtocolServer,
    engine: Callable[..., VLLMServerEngine],
    make_policy: Callable[..., Policy],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """SIGTERM between steps; SIGINT in the middle of a rollout that hangs."""
    monkeypatch.setattr(vllm_servers, "STOP_TIMEOUT_SECONDS", 1.0)
    policy = make_policy()

    def fit() -> None:
        module, data = parts(policy, rollouts=engine(overlap=overlap, timeout_seconds=300.0, logprob_tolerance=9.0))
        trainer(tmp_path, max_steps=10_000, limit_val_batches=0).fit(module, data)

    child = in_a_child(fit)
    wait_until(lambda: server.paths.count("/v1/load_lora_adapter") >= 3)
    assert server.adapters and left(tmp_path / "adapters")
    if number == signal.SIGINT:
        seen: list[str] = []
        ours = os.getpid()
        server.hook = lambda path: (
            (seen.append(path), hang(30.0)) if path == "/v1/completions" and os.getpid() == ours else None
        )  # type: ignore[func-returns-value]
        wait_until(lambda: seen)
        time.sleep(0.3)
    os.kill(child, number)
    assert end(child) < 20
    assert server.adapters == {} and left(tmp_path / "adapters") == []


def test_an_error_leaves_no_adapter(
    server: ProtocolServer,
    engine: Callable[..., VLLMServerEngine],
    make_policy: Callable[..., Policy],
    tmp_path: Path,
) -> None:
    class Fails(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            assert server.adapters
            raise RuntimeError("an error of a callback")

    module, data = parts(make_policy(), rollouts=engine())
    with pytest.raises(RuntimeError, match="an error of a callback"):
        trainer(tmp_path, Fails(), max_steps=3, limit_val_batches=0).fit(module, data)
    assert server.adapters == {} and left(tmp_path / "adapters") == []


def test_unclosed_engine_is_cleaned_up(server: ProtocolServer, built: Callable[..., PeftModel], tmp_path: Path) -> None:
    engine = VLLMServerEngine([server.url], str(tmp_path / "adapters"))
    engine.generate(built(), PROMPTS, SAMPLING, seed=0)
    assert server.adapters and engine._finalizer is not None and engine._finalizer.atexit
    del engine
    gc.collect()
    assert server.adapters == {} and left(tmp_path / "adapters") == []


def test_only_adapters_of_killed_runs_are_removed(
    server: ProtocolServer, engine: Callable[..., VLLMServerEngine], built: Callable[..., PeftModel], tmp_path: Path
) -> None:
    model, folder = built(), tmp_path / "adapters"

    def run() -> None:
        engine().generate(model, PROMPTS, SAMPLING, seed=0)
        time.sleep(600)

    def start() -> tuple[int, str]:
        before, loaded = set(left(folder)), len(server.adapters)
        child = in_a_child(run)
        wait_until(lambda: len(server.adapters) > loaded and set(left(folder)) > before)
        (name,) = set(left(folder)) - before
        return child, name

    killed = [start() for _ in range(3)]
    living, kept = start()
    for child, _ in killed:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    # Runs of another host: their locks say nothing, until a day has passed without a sign of them.
    (_, dead), (_, recent), (_, old) = killed
    for name, age in ((recent, 3600.0), (old, 2 * 86400.0)):
        owner = folder / name / "owner.json"
        owner.write_text(json.dumps(json.loads(owner.read_text()) | {"host": "another"}))
        os.utime(owner, (time.time() - age,) * 2)
    # What is not ours, whatever it is called.
    precious = tmp_path / "precious"
    (precious / "opsd-0123456789abcdef-1").mkdir(parents=True)
    (precious / "owner.json").write_text((folder / dead / "owner.json").read_text())
    (folder / "opsd-run-0123456789abcdef").symlink_to(precious)
    strange = {"opsd-run-0000000000000001": None, "opsd-run-0000000000000002": "{", "mine": json.dumps({"run": "mine"})}
    strange["opsd-run-0000000000000003"] = (folder / dead / "owner.json").read_text()  # of another run
    for name, text in strange.items():
        (folder / name).mkdir()
        if text is not None:
            (folder / name / "owner.json").write_text(text)
    server.adapters |= {
        "someone's": str(folder / dead / "someone's"),
        "opsd-00000000000000aa-1": "/",
        "opsd-00000000000000ab-1": str(folder / "opsd-run-00000000000000ab" / ".." / ".." / "precious"),
        "opsd-0123456789abcdef-1": str(folder / "opsd-run-0123456789abcdef" / "opsd-0123456789abcdef-1"),
    }
    before = dict(server.adapters)
    own = engine()
    own.generate(model, PROMPTS, SAMPLING, seed=1)
    assert own._versions is not None
    swept = {name for name, root in before.items() if Path(root).parent.name in (dead, old)} - {"someone's"}
    assert len(swept) == 2 and set(server.adapters) == set(before) - swept | {f"opsd-{own._versions.run}-1"}
    assert left(folder) == sorted({own._versions.folder.name, kept, recent, "opsd-run-0123456789abcdef", *strange})
    assert (precious / "opsd-0123456789abcdef-1").is_dir()
    os.kill(living, signal.SIGKILL)
    os.waitpid(living, 0)
    engine().generate(model, PROMPTS, SAMPLING, seed=2)
    assert kept not in left(folder) and own._versions.folder.name in left(folder), "it lives on in this process"


def test_a_forked_copy_ends_nothing(
    server: ProtocolServer, engine: Callable[..., VLLMServerEngine], built: Callable[..., PeftModel], tmp_path: Path
) -> None:
    own = engine()
    own.generate(built(), PROMPTS, SAMPLING, seed=0)
    assert own._finalizer is not None
    end(in_a_child(own._finalizer))
    assert server.adapters and left(tmp_path / "adapters")


def test_missed_adapter_versions_are_unloaded_later(
    folders: dict[str, str], server: ProtocolServer, engine: Callable[..., VLLMServerEngine], built: Callable[..., PeftModel]
) -> None:
    """It was away while newer ones came: those that it still holds are unloaded when it is back."""
    other = ProtocolServer(folders["llama"])
    model, own = built(), engine(server.url, other.url)
    own.generate(model, PROMPTS, SAMPLING, seed=0)
    other.hook = lambda path: (503, "busy")
    perturb(model, 0.1, seed=1)
    with pytest.warns(RuntimeWarning, match=mentions(other.url)):
        own.generate(model, PROMPTS, SAMPLING, seed=0)
    perturb(model, 0.1, seed=2)
    own.generate(model, PROMPTS, SAMPLING, seed=0)
    assert len(other.adapters) == 1
    other.hook = lambda path: None
    perturb(model, 0.1, seed=9)
    own.generate(model, PROMPTS, SAMPLING, seed=0)
    assert other.adapters.keys() == server.adapters.keys() and len(other.adapters) == 1
    other.kill()


def test_a_server_that_is_given_up_costs_one_failure_a_step(
    folders: dict[str, str], server: ProtocolServer, engine: Callable[..., VLLMServerEngine], built: Callable[..., PeftModel]
) -> None:
    """One that is healthy but for completions does not cost all its tries at every step."""
    other = ProtocolServer(folders["llama"])
    model, own = built(), engine(server.url, other.url, retries=2, max_concurrency=1)
    other.hook = lambda path: (500, "no") if path == "/v1/completions" else None
    server.hook = lambda path: time.sleep(0.4) if path == "/v1/completions" else None  # leaves the other one time to fail
    tries = []
    for step in range(2):
        with pytest.warns(RuntimeWarning, match=mentions(other.url)):
            rollouts = own.generate(model, PROMPTS * 2, SAMPLING, seed=step)
        assert len(rollouts.completions) == 2 * len(PROMPTS)
        tries.append(other.paths.count("/v1/completions"))
        other.paths.clear()
    assert tries == [3, 1]
    other.kill()


def test_a_server_with_too_short_a_context_leaves_the_work_to_others(
    folders: dict[str, str], server: ProtocolServer, engine: Callable[..., VLLMServerEngine], built: Callable[..., PeftModel]
) -> None:
    short = ProtocolServer(folders["llama"], max_model_len=8)
    with pytest.warns(RuntimeWarning, match=mentions("--max-model-len", "11")):
        rollouts = engine(short.url, server.url).generate(built(), PROMPTS, SAMPLING, seed=0)
    assert len(rollouts.completions) == len(PROMPTS) and not short.requests
    short.kill()


# -- what servers say ----------------------------------------------------------------------------------------------------


def test_retry_after_is_parsed() -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=20), usegmt=True)
    assert retry_after("7") == 7 and retry_after(" 1.5 ") == 1.5 and 15 < retry_after(soon) <= 20
    for hostile in (None, "", "-1", "1e9", "NaN", "inf", "٣", "soon", "Thu, 01 Jan 1970 00:00:00 GMT", "\x00", "0x10"):
        assert retry_after(hostile) == 0, hostile
    for endless in ("1000000000", "9" * 5000, "Fri, 31 Dec 9999 23:59:59 GMT"):
        assert retry_after(endless) == 60, endless


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_left_alone_for_as_long_as_it_asks(
    status: int, engine: Callable[..., VLLMServerEngine], built: Callable[..., PeftModel]
) -> None:
    times: list[float] = []
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                sock, _ = listening.accept()
            except OSError:
                return
            with sock:
                sock.recv(65536)
                times.append(time.monotonic())
                sock.sendall(f"HTTP/1.1 {status} X\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n".encode())

    threading.Thread(target=serve, daemon=True).start()
    with pytest.raises(ConfigError), pytest.warns(RuntimeWarning):
        engine(f"http://127.0.0.1:{listening.getsockname()[1]}", retries=1).generate(built(), PROMPTS, SAMPLING, seed=0)
    listening.close()
    assert len(times) == 2 and 1 <= times[1] - times[0] < 5


def test_keys_and_passwords_are_in_no_message(
    server: ProtocolServer,
    engine: Callable[..., VLLMServerEngine],
    built: Callable[..., PeftModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    key = "Zq7-plain-words-as-a-key"
    monkeypatch.setenv("OPSD_TEST_SERVERS", key)
    server.hook = lambda path: (400, f"your header Bearer {key} is wrong") if path == "/v1/completions" else None
    with pytest.raises(ConfigError) as refused, pytest.warns(RuntimeWarning) as warned:
        engine(api_key_env="OPSD_TEST_SERVERS").generate(built(), PROMPTS, SAMPLING, seed=0)
    assert key not in str(refused.value) and not any(key in str(w.message) for w in warned)
    monkeypatch.setenv("OPSD_TEST_SERVERS", key + "\r\nX-Other: 1")
    with pytest.raises(ConfigError) as refused:
        engine(api_key_env="OPSD_TEST_SERVERS").generate(built(), PROMPTS, SAMPLING, seed=0)
    assert key not in str(refused.value) and refused.value.setting == "model.rollouts.init_args.api_key_env"


def test_server_addresses_are_checked() -> None:
    assert check_urls(["http://a:1/v1/", "https://b/x", "http://[::1]:8000"]) == [
        "http://a:1",
        "https://b/x",
        "http://[::1]:8000",
    ]
    for wrong in (
        *("ftp://a", "a:8000", "http://", "http://a:port", "http://a:99999", "http://a b", "http://a/?x=1", "http://a/#b"),
        *("http://ä", "http://a\n", "file:///etc/passwd", "http://a\x00", "", "http://[::1", None, 5),
    ):
        with pytest.raises(ConfigError) as refused:
            check_urls([wrong])  # type: ignore[list-item]
        assert refused.value.setting == "model.rollouts.init_args.urls" and str(refused.value).isprintable(), wrong
    for url in ("http://user:hunter2@a:8000", "http://user:hunter2@a:port", "http://hunter2@a"):
        with pytest.raises(ConfigError) as refused:
            VLLMServerEngine([url])
        assert "hunter2" not in str(refused.value)
    with pytest.raises(ConfigError):
        check_urls(["http://a", "http://a/v1"])


def test_server_messages_are_shortened_and_escaped() -> None:
    for text in ("\x1b[2J\x1b]0;title\x07", "a\r\nb", "\u202eabc", "\ud800", "x" * 10**6, {"a": "\x00"}, None, 5):
        found = sanitize(text)
        assert found.isprintable() and len(found) <= 300


@pytest.mark.parametrize("name", ["../up", "", "a/b", ".hidden", "a" * 65, "a\n", "ä"])
def test_unusable_adapter_names_are_refused(
    name: str, engine: Callable[..., VLLMServerEngine], built: Callable[..., PeftModel]
) -> None:
    with pytest.raises(ConfigError) as refused:
        engine(adapter_name=name).generate(built(), PROMPTS, SAMPLING, seed=0)
    assert refused.value.setting == "model.rollouts.init_args.adapter_name"


def test_a_full_or_closed_folder_is_one_message(
    server: ProtocolServer, built: Callable[..., PeftModel], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    engine = VLLMServerEngine([server.url], str(tmp_path / "file" / "below"))
    with pytest.raises(ConfigError) as refused:
        engine.generate(built(), PROMPTS, SAMPLING, seed=0)
    assert refused.value.setting == "model.rollouts.init_args.adapter_folder"
    engine.close()


def test_unresolvable_name_times_out(
    monkeypatch: pytest.MonkeyPatch, built: Callable[..., PeftModel], tmp_path: Path
) -> None:
    """The system's resolver takes no time limit of ours."""
    resolve = socket.getaddrinfo

    def slow(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host == "slow.invalid" and not kwargs.get("flags"):
            time.sleep(4)
        return resolve(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    engine, began = (
        VLLMServerEngine(["http://slow.invalid:8000"], str(tmp_path), timeout_seconds=0.5, retries=0),
        time.monotonic(),
    )
    with pytest.raises(ConfigError), pytest.warns(RuntimeWarning):
        engine.generate(built(), PROMPTS, SAMPLING, seed=0)
    assert time.monotonic() - began < 3
    wait_until(lambda: not [thread for thread in threading.enumerate() if thread.name == "opsd-resolve"])
