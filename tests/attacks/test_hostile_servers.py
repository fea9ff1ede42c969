"""A vLLM server that answers anything but what it was asked: beside a right one no rollout is lost, changed or late; alone it
ends the run with one message.

Every answer goes over a real socket. The hostile server is right at all but one of vLLM's endpoints: it answers the others as
`ProtocolServer` does, so that the attack comes at that point of a rollout.
"""

from __future__ import annotations

import copy
import gzip
import json
import random
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from peft import PeftModel

from helpers.attack import Attack
from helpers.models import EOS, PROMPTS
from helpers.vllm_protocol import ProtocolServer
from opsd_lightning.rollouts.vllm.engines import VLLMServerEngine
from opsd_lightning.types import ConfigError, Rollouts, Sampling

pytestmark = pytest.mark.integration


SAMPLING = Sampling(max_new_tokens=6, n=2)
SECONDS = 1.0  # timeout_seconds
BOUND_SECONDS = 15.0  # two tries at each of four endpoints, and what else this machine does
HEALTH, MODELS, LOAD, UNLOAD = "/health", "/v1/models", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
COMPLETIONS = "/v1/completions"
VOCABULARY = 107


class QuickServer(ProtocolServer):
    """Remembers what it sampled, so that short deadlines hold on a busy machine. All adapters here have the same weights."""

    def __init__(self, folder: str) -> None:
        self.remembered: dict[str, tuple[int, Any]] = {}
        super().__init__(folder)

    def load(self, name: str, folder: str) -> tuple[int, Any]:
        if self.model is None or not Path(folder, "adapter_config.json").exists():
            return super().load(name, folder)
        self.adapters[name] = folder
        return 200, "Success"

    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        if body["model"] != self.folder and body["model"] not in self.adapters:
            return 404, f"The model `{body['model']}` does not exist."
        key = json.dumps(body | {"model": ""}, sort_keys=True)
        if key not in self.remembered:
            self.remembered[key] = super().complete(body)
        status, found = copy.deepcopy(self.remembered[key])
        return status, found | {"model": body["model"]}


class Exchange(NamedTuple):
    """One request at the point of attack.

    Args:
        sock: The connection.
        answer: Answer of a right server.
        asked: The request's JSON.
        random: Where chance decides.
        ended: Set when the test is over.
    """

    sock: socket.socket
    answer: Any
    asked: dict[str, Any]
    random: random.Random
    ended: threading.Event

    def send(self, *parts: bytes, every: float = 0.0) -> None:
        for part in parts:
            if self.ended.is_set():
                return
            self.sock.sendall(part)
            if every:
                self.ended.wait(every)

    def drip(self, data: bytes) -> None:
        self.send(*(data[i : i + 1] for i in range(len(data))), every=self.random.uniform(0.05, 0.4))

    def flood(self, part: bytes, every: float = 0.0) -> None:
        while not self.ended.is_set():
            self.send(part, every=every)

    def wait(self) -> None:
        self.ended.wait(3 * SECONDS)

    @property
    def body(self) -> bytes:
        return json.dumps(self.answer).encode()


class Case(NamedTuple):
    """One attack: where, and what is done there."""

    name: str
    path: str
    act: Callable[[Exchange], None]
    harmless: bool = False  # may be taken: what counts in it is right


def http(body: bytes, *headers: str, status: str = "200 OK", length: bool = True) -> bytes:
    lines = [f"HTTP/1.1 {status}", *headers, *([f"Content-Length: {len(body)}"] if length else [])]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


class HostileServer:
    """Answers ``/<name of a case>/<an endpoint of vLLM>``."""

    def __init__(self, twin: ProtocolServer, cases: dict[str, Case], chance: random.Random) -> None:
        self.twin, self.cases, self.random = twin, cases, chance
        self.ended = threading.Event()
        self.attacked: set[str] = set()
        self.other_hosts: list[str] = []
        self.listening = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port = self.listening.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.port}/{name}"

    def accept(self) -> None:
        while True:
            try:
                sock, _ = self.listening.accept()
            except OSError:
                return
            threading.Thread(target=self.serve, args=(sock,), daemon=True).start()

    def serve(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(30)
        with sock:
            try:
                while not self.ended.is_set() and self.answer(sock):
                    pass
            except (OSError, ValueError):
                return

    def answer(self, sock: socket.socket) -> bool:
        head = b""
        while b"\r\n\r\n" not in head:
            piece = sock.recv(65536)
            if not piece:
                return False
            head += piece
        head, _, body = head.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        while len(body) < int(headers.get("content-length", 0)):
            body += sock.recv(65536)
        name, _, rest = first.split(" ")[1].lstrip("/").partition("/")
        if name == "stolen":
            self.other_hosts.append(first)
            return False
        case, path = self.cases[name], "/" + rest
        asked = json.loads(body) if body else {}
        status, found = self.twin.handle(path, asked)
        if path != case.path:
            if isinstance(found, str) and status != 200:
                found = {"error": {"message": found}}
            sock.sendall(http(json.dumps(found).encode(), status=f"{status} X"))
            return True
        self.attacked.add(name)
        case.act(Exchange(sock, found, asked, random.Random(self.random.random()), self.ended))
        return name.startswith("kept")

    def close(self) -> None:
        self.ended.set()
        self.listening.close()


# -- the attacks ---------------------------------------------------------------------------------------------------------


def reset(exchange: Exchange) -> None:
    exchange.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def half_closed(exchange: Exchange) -> None:
    exchange.send(http(exchange.body)[:-20])
    exchange.sock.shutdown(socket.SHUT_WR)
    exchange.wait()


def then_wait(*parts: bytes) -> Callable[[Exchange], None]:
    def act(exchange: Exchange) -> None:
        exchange.send(*parts)
        exchange.wait()

    return act


def chunked(*parts: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"".join(parts)


def chunk(data: bytes, extension: bytes = b"") -> bytes:
    return b"%x%s\r\n%s\r\n" % (len(data), extension, data)


def bomb(encoding: str, data: bytes) -> Callable[[Exchange], None]:
    return lambda x: x.send(http(data, f"Content-Encoding: {encoding}"))


GZIP_BOMB = gzip.compress(b" " * 2**26, 9)

# At any endpoint: what is not HTTP, or never ends.
WIRE: dict[str, Callable[[Exchange], None]] = {
    "closed at once": lambda x: None,
    "reset": reset,
    "silent": lambda x: x.wait(),
    "half closed": half_closed,
    "status line drips": lambda x: x.drip(b"HTTP/1.1 200 " + b"O" * 2000 + b"\r\n\r\n"),
    "headers drip": lambda x: x.drip(b"HTTP/1.1 200 OK\r\n" + b"X-A: b\r\n" * 300 + b"\r\n"),
    "body drips": lambda x: (x.send(http(b"", f"Content-Length: {len(x.body) + 1000}", length=False)), x.drip(x.body + b" " * 1000)),  # type: ignore[dict-item,func-returns-value]
    "chunks drip": lambda x: (x.send(chunked()), x.send(*(chunk(bytes([b])) for b in x.body + b" " * 1000), every=0.2)),  # type: ignore[dict-item,func-returns-value]
    "a chunk's size drips": lambda x: (x.send(chunked()), x.drip(b"0" * 1000)),  # type: ignore[dict-item,func-returns-value]
    "a chunk's extension drips": lambda x: (x.send(chunked(b"5;a=")), x.drip(b"x" * 1000)),  # type: ignore[dict-item,func-returns-value]
    "trailers drip": lambda x: (x.send(chunked(chunk(x.body), b"0\r\n")), x.drip(b"X-A: b\r\n" * 200)),  # type: ignore[dict-item,func-returns-value]
    "100 for ever": lambda x: x.flood(b"HTTP/1.1 100 Continue\r\n\r\n", every=0.05),
    "a flood of 100": lambda x: x.flood(b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
    "103 with headers for ever": lambda x: x.flood(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n", every=0.05),
    "101": then_wait(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n"),
    "noise": lambda x: x.send(x.random.randbytes(5000)),
    "endless noise": lambda x: x.flood(b"\x80\x81" * 4096),
    "no status line": lambda x: x.send(x.body),
    "HTTP/2": then_wait(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"),
    "a TLS alert": lambda x: x.send(b"\x15\x03\x03\x00\x02\x02\x28"),
    "status 000": lambda x: x.send(http(x.body, status="000 Zero")),
    "status 20": lambda x: x.send(http(x.body, status="20 Short")),
    "status 2OO": lambda x: x.send(http(x.body, status="2OO Letters")),
    "status of many digits": lambda x: x.send(http(x.body, status="2" * 5000)),
    "one header without an end": lambda x: x.flood(b"HTTP/1.1 200 OK\r\nX: " + b"y" * 65536),
    "headers without an end": lambda x: (x.send(b"HTTP/1.1 200 OK\r\n"), x.flood(b"X-A: b\r\n" * 1000)),  # type: ignore[dict-item,func-returns-value]
    "a header with NUL": lambda x: x.send(http(x.body, "X: a\0b")),
    "a header without a colon": lambda x: x.send(http(x.body, "nonsense")),
    "a header with a space in its name": lambda x: x.send(http(x.body, "X Y: z")),
    "a negative length": lambda x: x.send(http(x.body, "Content-Length: -5", length=False)),
    "a length of words": lambda x: x.send(http(x.body, "Content-Length: many", length=False)),
    "a length of 10**40": then_wait(http(b"{", f"Content-Length: {10**40}", length=False)),
    "two lengths": lambda x: x.send(http(x.body, "Content-Length: 3")),
    "more said than sent": lambda x: x.send(http(x.body[:-7], f"Content-Length: {len(x.body)}", length=False)),
    "more said than sent, and open": lambda x: then_wait(http(x.body[:-7], f"Content-Length: {len(x.body)}", length=False))(x),
    "an unknown transfer encoding": lambda x: x.send(http(x.body, "Transfer-Encoding: gzip", length=False)),
    "a chunk's size is no number": lambda x: x.send(chunked(b"zz\r\n" + x.body)),
    "a negative chunk": lambda x: x.send(chunked(b"-5\r\n" + x.body)),
    "a chunk of 2**64": then_wait(chunked(b"FFFFFFFFFFFFFFFF\r\n{")),
    "a chunk longer than it says": lambda x: x.send(chunked(b"3\r\n" + x.body + b"\r\n0\r\n\r\n")),
    "no last chunk": lambda x: x.send(chunked(chunk(x.body))),
    "no last chunk, and open": lambda x: then_wait(chunked(chunk(x.body)))(x),
    "endless chunks": lambda x: (x.send(chunked()), x.flood(chunk(b" " * 65000))),  # type: ignore[dict-item,func-returns-value]
    "endless empty extensions": lambda x: (x.send(chunked()), x.flood(chunk(b" ", b";a=" + b"b" * 9000))),  # type: ignore[dict-item,func-returns-value]
    "an endless body": lambda x: (x.send(b"HTTP/1.1 200 OK\r\n\r\n"), x.flood(b"[" * 65536)),  # type: ignore[dict-item,func-returns-value]
    "a gzip bomb": bomb("gzip", GZIP_BOMB),
    "a gzip bomb in gzip": bomb("gzip, gzip", gzip.compress(GZIP_BOMB)),
    "a deflate bomb": bomb("deflate", zlib.compress(b" " * 2**26)),
    "broken br": bomb("br", b"\xff" * 1000),
    "broken zstd": bomb("zstd", b"\x28\xb5\x2f\xfd" + b"\xff" * 1000),
    "gzip that was not asked for": lambda x: x.send(http(gzip.compress(x.body), "Content-Encoding: gzip")),
    "an unknown encoding": bomb("rot13", b"{}"),
    "redirected elsewhere": lambda x: x.send(http(b"", f"Location: http://localhost:{x.sock.getsockname()[1]}/stolen", status="307 X")),
    "redirected to a file": lambda x: x.send(http(b"", "Location: file:///etc/passwd", status="302 Found")),
    "redirected in a circle": lambda x: x.send(http(b"", "Location: #", status="301 Moved")),
    "status 204": lambda x: x.send(http(b"", status="204 Nothing", length=False)),
    "status 206": lambda x: x.send(http(x.body, status="206 Partial")),
    "status 304": lambda x: x.send(http(b"", status="304 X", length=False)),
    "status 400": lambda x: x.send(http(b'{"error": {"message": "no\x1b[31m\\u001b]0;x\\u0007"}}', status="400 X")),
    "status 401": lambda x: x.send(http(b'{"error": "nauthorized"}', status="401 X")),
    "status 404": lambda x: x.send(http(b'{"error": {"message": "gone"}}', status="404 X")),
    "status 407": lambda x: x.send(http(b"", "Proxy-Authenticate: Basic", status="407 X")),
    "status 418 with noise": lambda x: x.send(http(x.random.randbytes(3000), status="418 X")),
    "status 500 of megabytes": lambda x: x.send(http(b"x" * 2**22, status="500 X")),
    "status 500, deep": lambda x: x.send(http(b"[" * 30000, status="500 X")),
    "status 502": lambda x: x.send(http(b"<html>", status="502 X")),
    "status 999": lambda x: x.send(http(b"", status="999 X")),
    "busy for 1e9 seconds": lambda x: x.send(http(b"", "Retry-After: 1000000000", status="503 X")),
    "busy for -1 seconds": lambda x: x.send(http(b"", "Retry-After: -1", status="429 X")),
    "busy until words": lambda x: x.send(http(b"", "Retry-After: NaN", status="429 X")),
    "busy until 9999": lambda x: x.send(http(b"", "Retry-After: Fri, 31 Dec 9999 23:59:59 GMT", status="503 X")),
    "busy until 1970": lambda x: x.send(http(b"", "Retry-After: Thu, 01 Jan 1970 00:00:00 -9999", status="429 X")),
    "busy for many digits": lambda x: x.send(http(b"", "Retry-After: " + "9" * 5000, status="429 X")),
}  # fmt: skip


def raw(body: bytes) -> Callable[[Exchange], None]:
    return lambda x: x.send(http(body))


# At both endpoints whose JSON is read.
NO_JSON: dict[str, Callable[[Exchange], None]] = {
    "HTML": raw(b"<html>hello</html>"),
    "nothing": raw(b""),
    "null": raw(b"null"),
    "a list": raw(b"[]"),
    "a number": raw(b"7"),
    "a text": raw(b'"choices"'),
    "cut off": lambda x: x.send(http(x.body[:-3])),
    "followed by more": lambda x: x.send(http(x.body + b"{}")),
    "in single quotes": lambda x: x.send(http(repr(x.answer).encode())),
    "server-sent events": lambda x: x.send(http(b"data: " + x.body + b"\n\n")),
    "with a BOM": lambda x: x.send(http(b"\xef\xbb\xbf" + x.body)),
    "in UTF-16": lambda x: x.send(http(json.dumps(x.answer).encode("utf-16"))),
    "no UTF-8": lambda x: x.send(http(x.body.replace(b'{"', b'{"\xff\xfe": 0, "', 1))),
    "a key twice": lambda x: x.send(http(x.body[:-1] + b', "data": 1, "choices": 1}')),
    "deep lists": raw(b"[" * 50000),
    "deep objects": raw(b'{"a":' * 10000),
    "an integer of 5,000 digits": lambda x: x.send(http(b'{"a": ' + b"9" * 5000 + b", " + x.body[1:])),
    "NaN": lambda x: x.send(http(b'{"a": NaN, ' + x.body[1:])),
    "-Infinity": lambda x: x.send(http(b'{"a": -Infinity, ' + x.body[1:])),
    "megabytes of text": lambda x: x.send(http(b'{"a": "' + b"x" * 5_000_000 + b'", ' + x.body[1:])),
}


def mutated(change: Callable[[Any, Exchange], Any]) -> Callable[[Exchange], None]:
    def act(x: Exchange) -> None:
        answer = copy.deepcopy(x.answer)
        found = change(answer, x)
        x.send(http(json.dumps(answer if found is None else found).encode()))

    return act


def set_key(key: str, value: Any) -> Callable[[Exchange], None]:
    return mutated(lambda answer, x: answer.__setitem__(key, value))


def choice(key: str, value: Any) -> Callable[[Exchange], None]:
    return mutated(lambda answer, x: answer["choices"][0].__setitem__(key, value))


def one_token(value: Any) -> Callable[[Exchange], None]:
    """One token replaced, in all lists that name it."""

    def change(answer: Any, x: Exchange) -> None:
        found = answer["choices"][0]
        place = x.random.randrange(len(found["token_ids"]))
        found["token_ids"][place] = value
        found["logprobs"]["tokens"][place] = f"token_id:{value}"

    return mutated(change)


def ids(change: Callable[[list[int]], list[Any]]) -> Callable[[Exchange], None]:
    """Other tokens, with as many log-probabilities."""

    def act(answer: Any, x: Exchange) -> None:
        found = answer["choices"][0]
        found["token_ids"] = change(found["token_ids"])
        found["logprobs"] = {
            "tokens": [f"token_id:{token}" for token in found["token_ids"]],
            "token_logprobs": [-1.0] * len(found["token_ids"]),
        }

    return mutated(act)


def one_logprob(value: Any) -> Callable[[Exchange], None]:
    def change(answer: Any, x: Exchange) -> None:
        values = answer["choices"][0]["logprobs"]["token_logprobs"]
        values[x.random.randrange(len(values))] = value

    return mutated(change)


def logprobs(key: str, value: Any) -> Callable[[Exchange], None]:
    return mutated(lambda answer, x: answer["choices"][0]["logprobs"].__setitem__(key, value))


WRONG_COMPLETIONS: dict[str, Callable[[Exchange], None]] = {
    "no choices": mutated(lambda answer, x: {"model": answer["model"]}),
    "choices are null": set_key("choices", None),
    "choices are an object": set_key("choices", {"0": {}}),
    "choices are empty": set_key("choices", []),
    "two choices": mutated(lambda answer, x: answer["choices"].append(answer["choices"][0])),
    "a choice is null": set_key("choices", [None]),
    "a choice is a text": set_key("choices", ["hello"]),
    "a choice is a list": set_key("choices", [[]]),
    "index 1": choice("index", 1),
    "index true": choice("index", False),
    "index 0.0": choice("index", 0.0),
    "index as text": choice("index", "0"),
    "another model": set_key("model", "gpt-4"),
    "no model": mutated(lambda answer, x: answer.pop("model") and None),
    "model is a list": set_key("model", ["a"]),
    "no token ids": choice("token_ids", None),
    "token ids are a text": choice("token_ids", "abc"),
    "token ids are an object": choice("token_ids", {"0": 5}),
    "a token of the vocabulary's size": one_token(VOCABULARY),
    "token -1": one_token(-1),
    "token 2**31": one_token(2**31),
    "token 2**63": one_token(2**63),
    "token 10**400": one_token(10**400),
    "token 5.0": one_token(5.0),
    "token true": one_token(True),
    "token as text": one_token("5"),
    "token null": one_token(None),
    "token as a list": one_token([5]),
    "no tokens at all": ids(lambda found: []),
    "too many tokens": ids(lambda found: [8] * 7),
    "a million tokens": ids(lambda found: [8] * 10**6),
    "too few tokens": ids(lambda found: [8]),
    "tokens after an EOS": ids(lambda found: [8, EOS, 8, 8, 8, 8]),
    "no finish reason": choice("finish_reason", None),
    "finish reason abort": choice("finish_reason", "abort"),
    "finish reason is a list": choice("finish_reason", ["stop"]),
    "finish reason with an escape": choice("finish_reason", "\x1b[2J\u202e"),
    "no log-probabilities": choice("logprobs", None),
    "log-probabilities are a list": choice("logprobs", []),
    "log-probabilities without values": logprobs("token_logprobs", None),
    "one log-probability too few": mutated(lambda answer, x: answer["choices"][0]["logprobs"]["token_logprobs"].pop() and None),
    "one log-probability too many": mutated(lambda answer, x: answer["choices"][0]["logprobs"]["token_logprobs"].append(-1.0)),
    "a log-probability of 0.5": one_logprob(0.5),
    "a log-probability of -1e9": one_logprob(-1e9),
    "a log-probability of -1e308": one_logprob(-1e308),
    "a log-probability of 10**400": one_logprob(-(10**400)),
    "a log-probability null": one_logprob(None),
    "a log-probability true": one_logprob(True),
    "a log-probability as text": one_logprob("-1.0"),
    "a log-probability as a list": one_logprob([-1.0]),
    "a log-probability of 1e999": lambda x: x.send(http(json.dumps(x.answer).encode().replace(b'_logprobs": [', b'_logprobs": [-1e999, ', 1))),
    "a log-probability NaN": one_logprob(float("nan")),
    "a log-probability Infinity": one_logprob(float("-inf")),
    "log-probabilities of other tokens": logprobs("tokens", ["token_id:9"] * 6),
    "log-probabilities of no tokens": logprobs("tokens", None),
    "another prompt": choice("prompt_token_ids", [1, 2, 3]),
    "a prompt of booleans": choice("prompt_token_ids", [True]),
    "a prompt as text": choice("prompt_token_ids", "40"),
}  # fmt: skip

HARMLESS: dict[str, Callable[[Exchange], None]] = {
    "HTTP/9.9": lambda x: x.send(http(x.body).replace(b"1.1", b"9.9", 1)),
    "a lone surrogate": choice("text", "\ud800"),
    "unknown fields": set_key("__proto__", {"a": [1]}),
    "HTTP/1.0": lambda x: x.send(http(x.body).replace(b"1.1", b"1.0", 1)),
    "many small chunks": lambda x: x.send(chunked(*(chunk(bytes([b]), b";a=b") for b in x.body), b"0\r\n\r\n")),
    "one interim answer": lambda x: x.send(b"HTTP/1.1 100 Continue\r\n\r\n", http(x.body)),
    "kept and followed by noise": lambda x: x.send(http(x.body) + b"noise\r\n\r\n"),
}


def card(key: str, value: Any, which: int = 0) -> Callable[[Exchange], None]:
    return mutated(lambda answer, x: answer["data"][which].__setitem__(key, value))


def more_cards(cards: Callable[[Exchange], list[Any]]) -> Callable[[Exchange], None]:
    return mutated(lambda answer, x: answer["data"].extend(cards(x)))


WRONG_LISTS: dict[str, Callable[[Exchange], None]] = {
    "no data": mutated(lambda answer, x: {"object": "list"}),
    "data is null": set_key("data", None),
    "data is an object": set_key("data", {"id": "m"}),
    "data is empty": set_key("data", []),
    "a card is null": set_key("data", [None]),
    "a card is a number": set_key("data", [3]),
    "a model without a name": card("id", None),
    "a model named by a number": card("id", 7),
    "a model named by nothing": card("id", ""),
    "no length": card("max_model_len", None),
    "length 0": card("max_model_len", 0),
    "length -1": card("max_model_len", -1),
    "length true": card("max_model_len", True),
    "length as text": card("max_model_len", "512"),
    "length 512.5": card("max_model_len", 512.5),
    "length 10**300": card("max_model_len", 10**300),
    "length 8, too small": card("max_model_len", 8),
    "an adapter without a folder": more_cards(lambda x: [{"id": "a", "parent": "m"}]),
    "an adapter in a number": more_cards(lambda x: [{"id": "a", "parent": "m", "root": 5}]),
    "an adapter named by a list": more_cards(lambda x: [{"id": ["a"], "parent": "m", "root": "/"}]),
    "megabytes of adapters": more_cards(lambda x: [{"id": f"a{i}", "root": "/" * 400, "parent": "m"} for i in range(15000)]),
}  # fmt: skip


def traversing(path: str) -> Callable[[Exchange], None]:
    """Adapters in names like ours, in folders that are none of ours."""

    def cards(x: Exchange) -> list[Any]:
        runs = [x.random.randbytes(8).hex() for _ in range(50)]
        return [{"id": f"opsd-{run}-1", "root": path.replace("RUN", run), "parent": "m"} for run in runs]

    return more_cards(cards)


ODD_LISTS: dict[str, Callable[[Exchange], None]] = {
    "adapters in the root folder": traversing("/"),
    "adapters up the tree": traversing("../../precious"),
    "adapters in a folder that is no run": traversing("adapters/opsd-run-RUN/../../precious"),
    "an adapter with an escape in its name": more_cards(lambda x: [{"id": "\x1b[2J/../..", "root": "\x00", "parent": "m"}]),
    "thousands of adapters": more_cards(lambda x: [{"id": f"a{i}", "root": f"/{i}", "parent": "m"} for i in range(5000)]),
}

LOADS: dict[str, Callable[[Exchange], None]] = {
    "loading is not allowed": lambda x: x.send(http(b'{"error": {"message": "Not Found"}}', status="404 X")),
    "no adapter found": lambda x: x.send(http(b'{"error": {"message": "No adapter found for /"}}', status="404 X")),
    "its rank is too high": lambda x: x.send(http(b'{"error": {"message": "max_lora_rank 2"}}', status="500 X")),
    "loading fails": lambda x: x.send(http(b'{"error": {"message": "CUDA"}}', status="500 X")),
}


def all_cases() -> list[Case]:
    found = [
        Case(f"{path[1:].replace('/', '.')} {name}", path, act)
        for path in (COMPLETIONS, MODELS, HEALTH, LOAD)
        for name, act in WIRE.items()
        # The answer's body says nothing there.
        if path in (COMPLETIONS, MODELS) or name not in ("half closed",)
    ]
    found += [
        Case(f"{path[1:].replace('/', '.')} {name}", path, act)
        for path in (COMPLETIONS, MODELS)
        for name, act in NO_JSON.items()
    ]
    found += [Case(f"wrong {name}", COMPLETIONS, act) for name, act in WRONG_COMPLETIONS.items()]
    found += [Case(f"list {name}", MODELS, act) for name, act in WRONG_LISTS.items()]
    found += [Case(f"load {name}", LOAD, act) for name, act in LOADS.items()]
    found += [Case(name, COMPLETIONS, act, harmless=True) for name, act in HARMLESS.items()]
    found += [Case(f"odd {name}", MODELS, act, harmless=True) for name, act in ODD_LISTS.items()]
    found += [Case(f"unload {name}", UNLOAD, act, harmless=True) for name, act in WIRE.items()]
    # The names are parts of addresses.
    return [case._replace(name="".join(c if c.isalnum() or c in ".-" else "_" for c in case.name)) for case in found]


class Result(NamedTuple):
    rollouts: Rollouts | None
    error: BaseException | None
    seconds: float


def judge(found: Result, expected: Rollouts, url: str, alone: bool, harmless: bool) -> str | None:
    """Return the fault in the outcome of an attack."""
    if found.seconds >= BOUND_SECONDS:
        return f"it took {found.seconds:.1f} seconds"
    if found.error is None:
        taken = alone and not harmless
        return "taken as right" if taken else None if found.rollouts == expected else "the rollouts are others"
    if not alone:
        return f"the run ended: {found.error!r}"
    message = str(found.error)
    plain = len(message) < 2000 and message.isprintable() and url in message
    right = isinstance(found.error, ConfigError) and found.error.setting == "model.rollouts.init_args.urls"
    return None if plain and right else repr(found.error)[:3000]


@pytest.fixture
def right(folders: dict[str, str]) -> Iterator[QuickServer]:
    server = QuickServer(folders["llama"])
    yield server
    server.kill()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_hostile_servers(
    attack: Attack, right: QuickServer, folders: dict[str, str], built: Callable[..., PeftModel], tmp_path: Path
) -> None:
    model, threads = built(), set(threading.enumerate())
    precious = tmp_path / "precious" / "checkpoint.ckpt"
    precious.parent.mkdir()
    precious.write_text("precious")

    def rollouts(*urls: str) -> Result:
        engine = VLLMServerEngine(
            list(urls), str(tmp_path / "adapters"), timeout_seconds=SECONDS, retries=1, max_concurrency=4
        )
        began = time.monotonic()
        found, problem = None, None
        try:
            found = engine.generate(model, PROMPTS, SAMPLING, seed=3)
        except Exception as error:
            problem = error
        finally:
            engine.close()
        return Result(found, problem, time.monotonic() - began)

    twin = QuickServer(folders["llama"])
    for server in (right, twin):  # what they remember from here on
        for _ in range(2):
            engine = VLLMServerEngine([server.url], str(tmp_path / "adapters"), timeout_seconds=60.0)
            expected = engine.generate(model, PROMPTS, SAMPLING, seed=3)
            engine.close()
    cases = all_cases()
    endless = [case for case in cases if case.path == COMPLETIONS and ("drip" in case.name or "ever" in case.name)]
    others = [case for case in cases if case not in endless]
    chosen = endless + attack.random.sample(others, attack.tries(sample=16, whole=len(others)))
    attack.random.shuffle(chosen)
    hostile = HostileServer(twin, {case.name: case for case in chosen}, attack.random)
    problems: list[str] = []
    late = threading.Timer(60 + 2 * len(chosen), hostile.close)  # what hangs comes to an end, too late
    late.start()
    try:
        with ThreadPoolExecutor(12) as pool:
            beside = [pool.submit(rollouts, hostile.url(case.name), right.url) for case in chosen]
            alone = [pool.submit(rollouts, hostile.url(case.name)) for case in chosen]
            for case, two, one in zip(chosen, beside, alone, strict=True):
                for number, found in (("beside a right one", two.result()), ("alone", one.result())):
                    if (
                        wrong := judge(found, expected, hostile.url(case.name), number == "alone", case.harmless)
                    ) is not None:
                        problems.append(f"{case.name}, {number}: {wrong}")
    finally:
        late.cancel()
        hostile.close()
        twin.kill()
    attack.tried("hostile server answers beside a right server", len(chosen))
    attack.tried("hostile server answers, no other server", len(chosen))
    assert not problems, f"round {attack.round}:\n" + "\n".join(problems)
    assert {case.name for case in chosen} == hostile.attacked, "every attack was made"
    assert not hostile.other_hosts, "no redirect was followed"
    assert precious.read_text() == "precious" and not list((tmp_path / "adapters").iterdir())
    assert right.adapters == {}
    left = {thread for thread in threading.enumerate() if thread.name.startswith("opsd-")} - threads
    assert not left, "threads are left"
