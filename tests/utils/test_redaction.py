"""Secrets in texts, settings and commands: a table of those that must go, and one of texts that must stay."""

from __future__ import annotations

import dataclasses
import random
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from opsd_lightning.utils.redaction import HIDDEN, hidden_names, is_secret, redact, redact_arguments, redact_text

HERE = Path(__file__).parent


def secrets() -> list[tuple[str, list[str], list[str]]]:
    """Texts, what must not remain of them and what must. Forms are cut in two by a bar, so that no scanner stops at them."""
    found = []
    for line in (HERE / "secrets.tsv").read_text(encoding="utf-8").splitlines():
        text, gone, kept = (part.replace("¦", "").replace("⏎", "\n") for part in line.split("\t"))
        found.append((text, [g for g in gone.split("|") if g], [k for k in kept.split("|") if k]))
    return found


HARMLESS = (HERE / "harmless.txt").read_text(encoding="utf-8").splitlines()


def test_the_tables_are_long() -> None:
    assert len(secrets()) >= 100 and len(HARMLESS) >= 60


@pytest.mark.parametrize(("text", "gone", "kept"), secrets())
def test_a_secret_goes_and_the_rest_stays(text: str, gone: list[str], kept: list[str]) -> None:
    found = redact_text(text)
    assert all(part in text for part in [*gone, *kept]), "the table"
    assert HIDDEN in found and not [part for part in gone if part in found], found
    assert not [part for part in kept if part not in found], found
    assert redact_text(found) == found
    within = redact_text(
        f"RuntimeError: 500 of the server\n{text}\nat step 3 of 12"
        if "\n" in text
        else f"RuntimeError: 500 of the server ({text})\nat step 3 of 12"
    )
    assert not [part for part in gone if part in within] and "500 of the server" in within, within


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_harmless_stays(text: str) -> None:
    assert redact_text(text) == text
    assert redact({"text": text}) == {"text": text}


@pytest.mark.parametrize(
    "settings",
    [
        {
            "columns": ["token", "label"],
            "tags": ["secret", "v2"],
            "fields": ["password", "email"],
            "keys": ["api_key", "auth"],
        },
        {"separator_token": "###", "delimiter_token": "|", "newline_token": "\n", "switch_token": "hmm..."},
        {"trigger_token": "wait", "reflection_token": "hmm", "weight_by_token": "entropy", "loss_by_token": "forward_kl"},
        {"language_token": "en_XX", "lang_token": "zho_Hans", "n_token": 3, "argmax_token": 12, "best_token": 151643},
        {"name": "sk-learn-baseline-run-2026", "save_dir": "runs/sk-small-lr-1e-5-seed-3"},
        {"name": "ablate_token=first_seed=3", "group": "by_token=mean,lr=1e-5", "notes": "secret = 7 + 5 = 12"},
    ],
)
def test_ordinary_settings_stay(settings: dict[str, Any]) -> None:
    assert redact(settings) == settings and redact(settings, whole=True) == settings


@pytest.mark.parametrize(
    "name", ["hub_token", "HF_TOKEN", "api_token", "x.accessToken", "FOO_TOKEN", "token", "github_token"]
)
def test_tokens_of_services_are_hidden_whatever_they_are(name: str) -> None:
    assert redact({name: "abc"}) == {name: HIDDEN} and redact({name: "hunter"}) == {name: HIDDEN}
    assert redact_text(f"{name}=abc") == f"{name}={HIDDEN}"


@pytest.mark.parametrize(
    "settings",
    [
        {"pw": "hunter22"}, {"user_pw": "hunter22"}, {"user": "bob", "pwd": "hunter22"}, {"UID": "bob", "PWD": "hunter22"},
        {"PASS": "hunter22"}, {"otp": "hunter22"}, {"fernet_key": "hunter22"}, {"JSESSIONID": "hunter22"}, {"API Key": "hunter22"},
        {"cmd": ["curl", "-u", "b:hunter22"]}, {"cmd": ["/usr/bin/curl", "--user=b:hunter22"]}, {"cmd": ["curl", "-ub:hunter22"]},
        {"cmd": ["curl", "-su", "b:hunter22"]}, {"cmd": ["sshpass", "-p", "hunter22"]}, {"cmd": ["wandb", "login", "hunter22" * 5]},
    ],
)  # fmt: skip
def test_further_secret_settings_are_hidden(settings: dict[str, Any]) -> None:
    for whole in (False, True):
        found = redact(settings, whole=whole)
        assert "hunter22" not in str(found) and HIDDEN in str(found)
        assert list(found) == list(settings) and len(str(found)) >= 10


def test_the_current_folder_and_users_of_containers_stay() -> None:
    settings = {
        "user": "bob",
        "pwd": "/home/bob",
        "a": {"pwd": "runs"},
        "b": ["docker", "run", "-u", "1000:1000"],
        "c": ["it's", "-n"],
    }
    assert redact(settings) == settings


@pytest.mark.parametrize(
    "pair", [["x-api-key", "abc"], ("Authorization", "abc"), ["cookie", "a=b"], ["X-Auth-Token", "wait"]]
)
def test_pairs_of_headers_are_hidden(pair: Any) -> None:
    assert redact({"a": pair}) == {"a": [pair[0], HIDDEN]}
    assert redact({"headers": [["token", "abc"], ["secret", "def"]]}) == {"headers": [["token", "***"], ["secret", "***"]]}


@dataclasses.dataclass
class Client:
    api_key: str
    url: str = "https://bob:hunter22@host/x"
    retries: int = 3


class Hidden:
    """As pydantic's SecretStr."""

    def get_secret_value(self) -> str:
        return "hunter22"


def test_everything_below_a_secret_name_is_hidden() -> None:
    value: dict[str, Any] = {
        "api_keys": {"a": "k1", "b": ["k2", ("k3", b"k4")], "n": 123456, "on": True, "none": None},
        "credentials": {"class_path": "own.Login", "init_args": {"user": "bob", "pass": "k5"}},
        "client": Client("k6"),
        "space": Namespace(dbPassword="k7", path=Path("/data/x")),
        "env": [{"name": "API_KEY", "value": "k8"}, {"name": "PORT", "value": "80"}],
        "headers": [["X-Api-Key", "k9"], ("Accept", "text/html")],
        "command": ["serve", "--api-key", "k10", "--port", "80"],
        "kept": Hidden(),
        "raw": b"password=k11 port=80",
        "key_file": Path("/data/token=k12"),
        "set": {"hf_" + "a" * 30},
        "hf_" + "b" * 30: 1,
    }
    found = redact(value)
    assert found["api_keys"] == {"a": "***", "b": ["***", ["***", b"***"]], "n": "***", "on": True, "none": None}
    assert found["credentials"] == {"class_path": "own.Login", "init_args": {"user": "***", "pass": "***"}}
    assert found["client"] == {"api_key": "***", "url": "https://***@host/x", "retries": 3}
    assert found["space"] == {"dbPassword": "***", "path": Path("/data/x")}
    assert found["env"] == [{"name": "API_KEY", "value": "***"}, {"name": "PORT", "value": "80"}]
    assert found["headers"] == [["X-Api-Key", "***"], ["Accept", "text/html"]]
    assert found["command"] == ["serve", "--api-key", "***", "--port", "80"]
    assert (
        found["kept"] == "***" and found["raw"] == b"password=*** port=80" and found["set"] == ["***"] and found["***"] == 1
    )
    assert str(found["key_file"]) == "/data/token=***"
    assert not [n for n in range(1, 13) if f"'k{n}'" in repr(found)]
    assert set(hidden_names(found)) >= {"api_keys.a", "credentials.init_args.pass", "client.api_key"}
    assert "client.url" in set(hidden_names(redact(value, whole=True)))


def test_a_value_with_a_hidden_part_is_hidden_wholly_where_runs_start_from() -> None:
    value = {
        "url": "https://bob:hunter22@host/x",
        "note": "the password: hunter22",
        "paths": [Path("/data/token=hunter22")],
        "command": ["serve", "--env=password=hunter22", "--port", "80"],
        "hf_" + "b" * 30: 1,
        "own": "a literal *** stays, https://host/***",
    }
    found = redact(value, whole=True)
    assert found == {
        "url": "***", "note": "***", "paths": ["***"], "command": ["serve", "***", "--port", "80"], "***": 1, "own": value["own"],
    }  # fmt: skip
    assert list(hidden_names(found)) == ["url", "note", "paths.0", "command.1", "***"]


def test_prose_and_patterns_are_kept_but_for_known_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "canary-value-1")
    kept = {
        "prompts": {"system": "You are a tutor. Secret: be kind.", "student_template": "Password: {question}", "teacher_response_prefix": "token: x1y2z3"},
        "answer_pattern": r"(?i)password: (\w+)",
        "chat_template": "secret={{ secret }} key: abcdef",
        "patterns": ["token", "label", "-p", "api_key: *** or abc123"],
        "instructions": {"de": "Passwort: sei nett"},
    }  # fmt: skip
    assert redact(kept) == kept and not list(hidden_names(kept))
    arguments = ["--data.prompts.system", "Secret: be kind.", "--data.grader.answer_pattern=password: (\\w+)"]
    assert redact_arguments(arguments) == arguments
    forms = ["hf_" + "a" * 30, "https://bob:hunter22@host/x", "canary-value-1", "-----BEGIN PRIVATE KEY-----\nabc"]
    assert [text for text in forms if HIDDEN not in redact({"system": f"use {text}"})["system"]] == []
    assert redact({"prompts": {"api_key": "abc", "system": None}}) == {"prompts": {"api_key": "***", "system": None}}


def test_names_of_secrets() -> None:
    secret = "api_key apiKey APIKey API_KEY OPENAI_KEY dbPassword PGPASSWORD user.password clientSecret hub_token HF_TOKEN".split()
    secret += "x-api-key authToken accessToken cookie set-cookie passphrase private_key aws_secret_access_key DB_PWD token_2".split()
    plain = (
        "max_new_tokens token_budget eos_token PWD OLDPWD api_key_env token_file answer_key pass@1 SSH_AUTH_SOCK key".split()
    )
    plain += "first_token tokens_per_second seconds_per_token stop_token image_token tokenizer secretary compass".split()
    assert [name for name in secret if not is_secret(name)] == [] and [name for name in plain if is_secret(name)] == []


def test_secrets_in_commands_are_hidden() -> None:
    assert redact_arguments(["fit", "--a.api_key", "x", "-v", "--b.token=y", "--c.path=p", "--d={password: z}"]) == [
        "fit", "--a.api_key", "***", "-v", "--b.token=***", "--c.path=p", "--d={password: ***}",
    ]  # fmt: skip
    assert redact_arguments(["--model.policy.pad_token", "<pad>", "KEY_TOKEN=abc"]) == [
        "--model.policy.pad_token", "<pad>", "KEY_TOKEN=***",
    ]  # fmt: skip


def test_environment_secrets_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "MY_TOKEN": "canary-value-1",
        "B_PASSWORD": "pass w/rd&2é",
        "C_SECRET": "1",
        "D_TOKEN": "true",
        "E_CREDENTIALS": "/home/bob/key.json",
        "F_PASSWORD": "password",
        "G_PASSWORD": "hunter2",
        "HARMLESS": "visible-value",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    text = "a canary-value-1 1 true /home/bob/key.json password hunter2 hunter2s xhunter2 visible-value 12 'pass w/rd&2é'"
    assert redact_text(text) == "a *** 1 true /home/bob/key.json password *** hunter2s xhunter2 visible-value 12 '***'"
    assert "w%2F" not in redact_text("q=pass%20w%2Frd%262%C3%A9") and "u00e9" not in redact_text(r'"pass w/rd&2\u00e9"')
    monkeypatch.delenv("MY_TOKEN")
    assert redact_text("canary-value-1") == "canary-value-1"


def test_a_hostile_text_is_read_in_time() -> None:
    rng = random.Random(0)
    pieces = ["token=", "password: ", "://", "@", "a:b@", '"', "'", "{", "[", "(", "\\", "\n", " ", "x" * 50, "Bearer ", "--token ",
              "curl -u ", "jdbc:oracle:a:b/", "%3A%2F%2F", "eyJ", "-----BEGIN PRIVATE KEY-----", "Cookie: a=b; ", "token=f(", "<a>", "<a ", "</a>", '("x-api-key", ', "wandb login ", "name: a ", "api key: ", "f(", "sk-", "sk-proj-", "cookie=",
              '"-u", "b:']  # fmt: skip
    texts = [piece * (20_000 // len(piece)) for piece in pieces]
    texts += ["".join(rng.choices(pieces, k=2000)) for _ in range(3)]
    for text in texts:
        start = time.perf_counter()
        redact_text(text)
        assert time.perf_counter() - start < 10, text[:60]
