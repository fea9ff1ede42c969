"""HTTP to running vLLM servers: which of them answer, which adapters they hold, and requests spread over all of them.

Requests wait in one queue that every server's threads take from: a slow server takes fewer, and what a dying one had is
taken by the others. Threads live for the time of one `ServerPool.post_all`.

Nothing that a server sends is trusted. What is not the answer to what was asked, of any form, is that server's failure: the
request goes to another one, and a server that goes on failing is given up. Only when none is left does the run end.
"""

from __future__ import annotations

import email.utils
import json
import os
import re
import threading
import time
import urllib.parse
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Generic, NamedTuple, TypeVar

from opsd_lightning.rollouts.vllm.http import Answer, ExchangeError, Exchanger
from opsd_lightning.runs.signals import Stopped, stop_signal
from opsd_lightning.types import ConfigError
from opsd_lightning.utils.redaction import HIDDEN, redact_text

T = TypeVar("T")

_URLS = "model.rollouts.init_args.urls"
_FIRST_BACKOFF_SECONDS, _LONGEST_BACKOFF_SECONDS = 0.25, 10.0
_LONGEST_RETRY_AFTER_SECONDS = 60.0
# Limits below timeout_seconds: for questions that a living server answers at once, for an adapter, and at the end of a run.
_ASKING_SECONDS, _LOADING_SECONDS, _CLOSING_SECONDS = 10.0, 120.0, 5.0
# The most bytes of an answer: of any, of one that lists models, and what each token and each token of the prompt adds.
_ANSWER_BYTES, _LIST_BYTES, _TOKEN_BYTES, _PROMPT_TOKEN_BYTES = 2**16, 2**22, 2048, 32
_MOST_FOREIGN_ADAPTERS = 64  # of dead runs, that are unloaded at one time

#: Seconds without any answer, after a signal asked a run to stop, until it ends within its step.
PATIENCE_SECONDS = 30.0

# What a server's refusal means to who started it: a part of its message, and what to do.
_REMEDIES = [
    ("max_lora_rank", "start the servers with --max-lora-rank of at least model.policy.lora.r"),
    ("not enabled", "start the servers with --enable-lora"),
    (
        "No adapter found",
        "model.rollouts.init_args.adapter_folder must be a folder that the servers see under the same path",
    ),
    ("target modules", "leave that module out of model.policy.lora.target_modules"),
    ("context length", "start the servers with a larger --max-model-len, or lower max_new_tokens"),
    ("out of vocabulary", "start the servers with the model of model.policy.model"),
    ("CERTIFICATE_VERIFY_FAILED", "name your certificate authority's file in the environment variable SSL_CERT_FILE"),
    ("WRONG_VERSION_NUMBER", "write http:// for servers without TLS"),
    ("nauthorized", "give the servers' --api-key in the variable that model.rollouts.init_args.api_key_env names"),
]


class Adapter(NamedTuple):
    """One version of an adapter: the name that requests ask for, and the folder it lies in."""

    name: str
    folder: str


class _Unavailable(Exception):
    """The server cannot answer now; another, or the same one later, may."""

    def __init__(self, reason: str, pause_seconds: float = 0.0) -> None:
        super().__init__(reason)
        self.pause_seconds = pause_seconds


class BadAnswer(_Unavailable):
    """The response does not answer the request."""


class _Refused(_Unavailable):
    """The server would refuse it again."""


class _Unknown(Exception):
    """The server does not hold the model that was asked for."""


@dataclass(eq=False)
class Server:
    """What is known of one server."""

    url: str
    alive: bool = True
    model: str = ""  # the name it serves its base model under
    max_model_len: int = 0
    adapters: dict[str, str] = field(default_factory=dict)  # by name, the folder each was read from, as the server says
    returned: bool = False  # after it was given up: until it has completed something, the next failure gives it up again
    failures: int = 0  # in a row; requests that were under way together count once
    failed_at: float = 0.0
    not_before: float = 0.0  # as its Retry-After asks
    reason: str = ""
    error: Exception | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    loading: threading.Lock = field(default_factory=threading.Lock)

    def pause_seconds(self) -> float:
        """Return the seconds until the next request to this server."""
        until = self.not_before
        if self.failures:
            backoff = min(_FIRST_BACKOFF_SECONDS * 2 ** (self.failures - 1), _LONGEST_BACKOFF_SECONDS)
            until = max(until, self.failed_at + backoff)
        return max(until - time.monotonic(), 0.0)


class ServerPool:
    """Servers of the same base model.

    Args:
        urls: Where they are, such as ``http://localhost:8000``.
        timeout_seconds: Time limit of one request, from connecting to the last byte.
        retries: Failures in a row after which a server is given up, beyond the first.
        max_concurrency: Requests under way on each server.
        api_key_env: Environment variable with the servers' API key, if they ask for one.

    Raises:
        ConfigError: An address or the key cannot be used.
    """

    def __init__(self, urls: Sequence[str], timeout_seconds: float, retries: int, max_concurrency: int, api_key_env: str):
        self.servers = [Server(url) for url in check_urls(urls)]
        self.timeout_seconds, self.retries, self.max_concurrency = timeout_seconds, retries, max_concurrency
        self.model = ""
        self._key = os.environ.get(api_key_env, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise ConfigError(
                f"the API key in {api_key_env} holds characters that no HTTP header may hold",
                "model.rollouts.init_args.api_key_env",
                "Set the variable to the servers' --api-key alone",
            )
        self._http = Exchanger(
            {"Authorization": f"Bearer {self._key}"} if self._key else {},
            connections=len(urls) * max_concurrency,
            connect_seconds=_ASKING_SECONDS,
            secure=any(server.url.startswith("https:") for server in self.servers),
        )
        self._news: deque[str] = deque()

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def alive(self) -> list[Server]:
        return [server for server in self.servers if server.alive]

    # -- what servers are and hold -----------------------------------------------------------------------------------

    def connect(self) -> None:
        """Ask every server what it serves, at first use. One that does not answer is given up while another does.

        Raises:
            ConfigError: None answers, or they serve different models.
        """
        for server in self.servers:
            self._persist(server, self._look)
        self._tell()
        living = self.alive()
        if not living:
            raise ConfigError(
                "; ".join(f"{server.url} does not answer ({server.reason})" for server in self.servers),
                _URLS,
                "Start vLLM servers there (docs/vllm.md), or correct the list",
            )
        for server in living[1:]:
            if server.model != living[0].model:
                raise ConfigError(
                    f"{living[0].url} serves {self.said(living[0].model)}, {server.url} serves {self.said(server.model)}",
                    _URLS,
                    "Start all with the same --model (and --served-model-name)",
                )
        self.model = living[0].model

    def revive(self) -> None:
        """Ask servers that were given up if they are back. One failure before a completion gives such a one up again."""
        for server in self.servers:
            if not server.alive:
                try:
                    self._look(server)
                except _Unavailable:
                    continue
                server.alive, server.returned, server.failures, server.not_before = True, True, 0, 0.0

    def require(self, unfit: Callable[[Server], str | None]) -> None:
        """Give up servers that cannot do what is asked.

        Args:
            unfit: Returns why a living server cannot serve the request, or None.

        Raises:
            ConfigError: None is left.
        """
        for server in self.alive():
            if (reason := unfit(server)) is not None:
                self._give_up(server, reason)
        self._tell()
        self._need_one()

    def _look(self, server: Server, deadline: float | None = None) -> None:
        deadline = self._deadline(_ASKING_SECONDS) if deadline is None else deadline
        self._ask(server, "GET", "/health", deadline)
        answer = self._ask(server, "GET", "/v1/models", deadline, max_bytes=_LIST_BYTES)
        try:
            found = _parsed(answer)
        except BadAnswer as error:
            raise BadAnswer(f"this is not a vLLM server: /v1/models gave {error}") from None
        cards = found.get("data") if isinstance(found, dict) else None
        if not isinstance(cards, list) or not all(isinstance(card, dict) for card in cards):
            raise BadAnswer("this is not a vLLM server: /v1/models lists no models")
        base: dict[str, Any] = next((card for card in cards if card.get("parent") is None), {})
        model, length = base.get("id"), base.get("max_model_len")
        if not isinstance(model, str) or not model or type(length) is not int or not 0 < length < 2**40:
            raise BadAnswer("this is not a vLLM server: /v1/models names no model with its max_model_len")
        if self.model and model != self.model:
            raise _Refused(f"it serves {self.said(model)} now instead of {self.said(self.model)}")
        adapters = {}
        for card in cards:
            if card.get("parent") is not None:
                if not isinstance(card.get("id"), str) or not isinstance(card.get("root"), str):
                    raise BadAnswer("/v1/models lists an adapter without a name or a folder")
                adapters[card["id"]] = card["root"]
        server.model, server.max_model_len, server.adapters = model, length, adapters

    def hold(self, adapter: Adapter, stale: Callable[[str, str], bool]) -> None:
        """Have every living server hold an adapter, and no longer those that nothing asks for.

        Args:
            adapter: The one to hold.
            stale: Returns True for the name and folder of an adapter to unload, as a server lists them.

        Raises:
            ConfigError: No server holds it.
        """
        for server in self.alive():
            self._persist(server, lambda server: self._load(server, adapter))
            if server.alive:
                old = [name for name, root in server.adapters.items() if name != adapter.name and stale(name, root)]
                began = time.monotonic()
                try:
                    for name in old[:_MOST_FOREIGN_ADAPTERS]:
                        self._unload(server, name, self._deadline(_ASKING_SECONDS))
                except _Unavailable as error:
                    self._failed(server, began, error)
        self._tell()
        self._need_one()

    def drop(self, names: Sequence[str]) -> None:
        """Unload adapters, within seconds, where a server answers."""
        deadline = self._deadline(_CLOSING_SECONDS)

        def unload(server: Server) -> None:
            for name in set(names) & server.adapters.keys():
                try:
                    self._unload(server, name, deadline)
                except Exception:  # a server's affair; it must not keep the run from its end
                    return

        threads = [threading.Thread(target=unload, args=(server,), name="opsd-vllm", daemon=True) for server in self.servers]
        for thread, server in zip(threads, self.servers, strict=True):
            try:
                thread.start()
            except RuntimeError:  # the interpreter is ending, and starts no thread any more
                unload(server)
        for thread in threads:
            if thread.ident is not None:
                thread.join(max(deadline - time.monotonic(), 0.0) + 1.0)

    def _load(self, server: Server, adapter: Adapter, deadline: float | None = None) -> None:
        # Every version has a name of its own. With vLLM's load_inplace the server would read the folder again at every
        # single decoding step (its LoRARequest keeps the flag), and rows under way would change weights in between.
        if server.adapters.get(adapter.name) == adapter.folder:
            return
        deadline = self._deadline(_LOADING_SECONDS) if deadline is None else deadline
        if adapter.name in server.adapters:
            self._unload(server, adapter.name, deadline)
        body = {"lora_name": adapter.name, "lora_path": adapter.folder}
        try:
            self._ask(server, "POST", "/v1/load_lora_adapter", deadline, body)
        except _Refused as error:
            # A request whose answer was lost is sent again, and refused where the server took it the first time.
            with suppress(_Unavailable):
                self._look(server, deadline)
            if server.adapters.get(adapter.name) != adapter.folder:
                raise error
            return
        self._look(server, deadline)
        if server.adapters.get(adapter.name) != adapter.folder:
            raise _Refused(
                f"it took adapter {adapter.name} from {adapter.folder} but lists it as "
                f"{self.said(server.adapters.get(adapter.name))}: is there a load balancer in {_URLS}? Name the "
                "servers behind it"
            )

    def _unload(self, server: Server, name: str, deadline: float) -> None:
        self._ask(server, "POST", "/v1/unload_lora_adapter", deadline, {"lora_name": name})
        server.adapters.pop(name, None)

    def _persist(self, server: Server, action: Callable[[Server], None]) -> None:
        """Try until it succeeds or the server is given up."""
        while server.alive:
            time.sleep(server.pause_seconds())
            began = time.monotonic()
            try:
                action(server)
            except _Unavailable as error:
                self._failed(server, began, error)
            else:
                server.failures = 0
                return

    def _failed(self, server: Server, began: float, error: Exception) -> None:
        reason = str(error) if isinstance(error, _Unavailable) else f"{type(error).__name__}: {self.said(error)}"
        with server.lock:
            server.error = error
            if isinstance(error, _Unavailable) and error.pause_seconds:
                server.not_before = max(server.not_before, time.monotonic() + error.pause_seconds)
            if not server.alive:
                return
            if isinstance(error, _Refused):
                self._give_up(server, reason)
                return
            if began < server.failed_at:
                return  # under way when another one failed
            server.failures, server.failed_at, server.reason = server.failures + 1, time.monotonic(), reason
            if server.failures > (0 if server.returned else self.retries):
                self._give_up(server, reason)
            elif not isinstance(error, _Unavailable) or isinstance(error, BadAnswer):
                self._news.append(f"vLLM server {server.url} gave a wrong answer ({reason}); the request is sent again")

    def _give_up(self, server: Server, reason: str) -> None:
        server.alive, server.reason = False, reason
        self._news.append(
            f"vLLM server {server.url} is given up after {max(server.failures, 1)} failure(s) in a row ({reason}); its "
            "rollouts go to the others, and it is asked again at the next step"
        )

    def _tell(self) -> None:
        """Warn of what happened in other threads: a warning may be an error to this one, which must not end a thread."""
        while self._news:
            warnings.warn(self._news.popleft(), RuntimeWarning, stacklevel=3)

    def _need_one(self) -> None:
        if not self.alive():
            reasons = "; ".join(f"{server.url}: {server.reason}" for server in self.servers)
            raise ConfigError(
                f"no vLLM server answers rightly any more ({reasons})",
                _URLS,
                "Look at the servers' own output and start them again, or raise model.rollouts.init_args.timeout_seconds or "
                "retries; the last checkpoint is still good",
            ) from next((server.error for server in self.servers if not isinstance(server.error, _Unavailable)), None)

    # -- requests ----------------------------------------------------------------------------------------------------

    def post_all(
        self,
        bodies: Sequence[dict[str, Any]],
        adapter: Adapter | None,
        read: Callable[[dict[str, Any], str, Any], T],
        start: int = 0,
        stop: threading.Event | None = None,
    ) -> list[T]:
        """Send completion requests to all living servers, each to one of them at a time.

        Args:
            bodies: Of ``/v1/completions``, without ``model``.
            adapter: Which one to sample from. None for the base model.
            read: Reads the answer's JSON, given the request's body and model. It raises `BadAnswer`
                where the answer is not right.
            start: The server that gets the first request, so that ranks do not all begin with the same one.
            stop: Once set, no further request is sent, those under way end, and the call raises.

        Returns:
            What was read, in the order of the bodies.

        Raises:
            ConfigError: No server is left.
            Stopped: A signal asked the run to stop, and no server answers.
        """
        run: _Run[T] = _Run(len(bodies), stop or threading.Event(), self.alive)
        while run.left:  # again where a server was given up, with all others, and is back
            self._tell()
            self._need_one()
            if run.stop.is_set():
                raise RuntimeError("sampling was stopped")
            living = self.alive()
            living = living[start % len(living) :] + living[: start % len(living)]
            threads = [
                threading.Thread(target=self._work, args=(server, bodies, adapter, read, run), name="opsd-vllm", daemon=True)
                for _ in range(min(run.left, self.max_concurrency))
                for server in living
            ]
            try:
                for thread in threads:
                    thread.start()
                patience = _Patience()
                for thread in threads:
                    while thread.is_alive():
                        thread.join(1.0)
                        self._tell()
                        patience.check(run.left)
            except BaseException:  # interrupted: what waits is not sent any more, and what is under way ends
                run.stop.set()
                for thread in threads:
                    if thread.ident is not None:
                        thread.join(1.0)
                raise
        self._tell()
        return run.found  # type: ignore[return-value]

    def _work(
        self,
        server: Server,
        bodies: Sequence[dict[str, Any]],
        adapter: Adapter | None,
        read: Callable[[dict[str, Any], str, Any], T],
        run: _Run[T],
    ) -> None:
        while server.alive and (index := run.take(server)) is not None:
            began = time.monotonic()
            try:
                asked, answer = self._complete(server, bodies[index], adapter, run.stop)
                found = read(bodies[index], asked, answer)
            except Exception as error:  # whatever a server makes go wrong is its failure, and no end of the run
                if not run.stop.is_set():
                    self._failed(server, began, error)
                run.give_back(index, server)
            else:
                server.failures, server.returned = 0, False
                run.finish(index, found)

    def _complete(
        self, server: Server, body: dict[str, Any], adapter: Adapter | None, stop: threading.Event
    ) -> tuple[str, Any]:
        """The model that was asked for, and the answer's JSON."""
        asked = self.model if adapter is None else adapter.name
        body = {"model": asked} | body
        size = _ANSWER_BYTES + _TOKEN_BYTES * body["max_tokens"] + _PROMPT_TOKEN_BYTES * len(body["prompt"])
        deadline, held = self._deadline(), server.adapters
        try:
            return asked, _parsed(self._ask(server, "POST", "/v1/completions", deadline, body, size, stop))
        except _Unknown as error:  # it was started anew, and has lost the adapter
            if adapter is None:
                raise _Unavailable(str(error)) from None
        with server.loading:
            if server.adapters is held:  # no other thread has loaded it again
                self._look(server, deadline)
                self._load(server, adapter, deadline)
        try:
            return asked, _parsed(self._ask(server, "POST", "/v1/completions", deadline, body, size, stop))
        except _Unknown as again:
            raise _Unavailable(str(again)) from None

    def _deadline(self, seconds: float | None = None) -> float:
        limit = self.timeout_seconds if seconds is None else min(seconds, self.timeout_seconds)
        return time.monotonic() + limit

    def _ask(
        self,
        server: Server,
        method: str,
        path: str,
        deadline: float,
        body: dict[str, Any] | None = None,
        max_bytes: int = _ANSWER_BYTES,
        stop: threading.Event | None = None,
    ) -> Answer:
        data = None if body is None else json.dumps(body, allow_nan=False).encode()
        limit = deadline - time.monotonic()
        try:
            answer = self._http.request(method, server.url + path, data, deadline, max_bytes, stop)
        except ExchangeError as error:
            late = time.monotonic() >= deadline
            within = f" within {limit:.3g} seconds" if late else ""
            hint = " (model.rollouts.init_args.timeout_seconds)" if late and limit > 0.95 * self.timeout_seconds else ""
            raise _Unavailable(f"{path}: {self.said(error)}{within}{hint}") from None
        if answer.status == 200:
            return answer
        return self._refused(path, answer)

    def _refused(self, path: str, answer: Answer) -> Answer:
        status, text = answer.status, answer.body.decode("utf-8", "replace")
        with suppress(BadAnswer, KeyError, TypeError, IndexError):
            text = _parsed(answer)["error"]["message"]
        message = self.said(text) or "no message"
        loading = path == "/v1/load_lora_adapter"
        known = next((remedy for part, remedy in _REMEDIES if part in message), None)
        if loading and status in (404, 405) and known is None:
            known = "start the servers with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in their environment, and --enable-lora"
        elif path == "/v1/completions" and status == 404:
            raise _Unknown(message)
        elif path == "/v1/unload_lora_adapter" and status == 404:
            return answer  # gone already
        # vLLM answers an adapter that it cannot take with 500.
        if known is None and (status in (408, 425, 429) or status >= 500):
            pause = retry_after(answer.headers.get("retry-after")) if status in (429, 503) else 0.0
            raise _Unavailable(f"{path} gave {status}: {message}", min(pause, self.timeout_seconds))
        raise _Refused(f"it refuses {path} ({status}: {message}){'; ' + known if known else ''}")

    def said(self, text: object) -> str:
        """Words of a server, as messages repeat them."""
        return said(text, self._key)


class _Patience:
    """Ends the wait for servers that answer nothing any more where a signal asked the run to stop."""

    def __init__(self) -> None:
        self._left, self._since = -1, 0.0

    def check(self, left: int) -> None:
        """Raise after `PATIENCE_SECONDS` without an answer since the signal.

        Raises:
            Stopped: Without a checkpoint: the step is not complete.
        """
        number = stop_signal()
        if not number or left != self._left:
            self._left, self._since = left, time.monotonic()
        elif time.monotonic() - self._since >= PATIENCE_SECONDS:
            raise Stopped(number)


class _Run(Generic[T]):
    """Requests on their way: which wait, which are done."""

    def __init__(self, count: int, stop: threading.Event, alive: Callable[[], list[Server]]) -> None:
        self.waiting = deque(range(count))
        self.found: list[T | None] = [None] * count
        self.left = count
        self.stop = stop
        self.failed_on: dict[int, set[Server]] = {}
        self.alive = alive
        self.changed = threading.Condition()

    def take(self, server: Server) -> int | None:
        """The next request for a server, once there is one and the server may be asked; None when all are done."""
        with self.changed:
            while self.left and not self.stop.is_set() and server.alive:
                pause = server.pause_seconds()
                if not pause and (index := self._next(server)) is not None:
                    return index
                self.changed.wait(min(pause or 0.2, 0.2))
        return None

    def _next(self, server: Server) -> int | None:
        """A request that this server has not failed at, or that every living one has."""
        for index in self.waiting:
            failed = self.failed_on.get(index, ())
            if server not in failed or all(other in failed for other in self.alive()):
                self.waiting.remove(index)
                return index
        return None

    def give_back(self, index: int, server: Server) -> None:
        with self.changed:
            self.failed_on.setdefault(index, set()).add(server)
            self.waiting.appendleft(index)
            self.changed.notify_all()

    def finish(self, index: int, found: T) -> None:
        with self.changed:
            self.found[index] = found
            self.left -= 1
            if not self.left:
                self.changed.notify_all()


def check_urls(urls: Sequence[str]) -> list[str]:
    """Addresses of servers without a trailing slash or ``/v1``.

    Raises:
        ConfigError: One is no address, holds a password, or occurs twice.
    """
    found: list[str] = []
    for url in urls:
        if "@" in str(url):
            raise ConfigError(
                "an address holds a user or password, which vLLM does not ask for",
                _URLS,
                "Leave it out, and give an API key in the variable that api_key_env names",
            )
        try:
            parts = urllib.parse.urlsplit(url)
            right = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
            right = right and url.isascii() and url.isprintable() and not set(url) & set(" ?#")
        except (ValueError, TypeError, AttributeError):
            right = False
        if not right:
            raise ConfigError(
                f"{said(ascii(url))} is no address", _URLS, "Write it as http://host:8000, in ASCII, without ? and #"
            )
        plain = url.rstrip("/").removesuffix("/v1").rstrip("/")
        if plain in found:
            raise ConfigError(f"{plain} occurs twice", _URLS, "Name each server once")
        found.append(plain)
    return found


def retry_after(value: str | None) -> float:
    """Seconds that a ``Retry-After`` header asks for, as a number or a date: at most a minute, and 0 for anything else."""
    text = (value or "").strip()[:64]
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
        return min(float(text), _LONGEST_RETRY_AFTER_SECONDS)
    try:
        when = email.utils.parsedate_to_datetime(text)
        when = when.replace(tzinfo=UTC) if when.tzinfo is None else when
        return min(max((when - datetime.now(UTC)).total_seconds(), 0.0), _LONGEST_RETRY_AFTER_SECONDS)
    except (ValueError, TypeError, OverflowError, IndexError):
        return 0.0


def said(text: object, secret: str = "", length: int = 300) -> str:
    """Words of a server, as messages repeat them: short, on one line, without secrets, and with control characters shown.

    Args:
        text: Anything.
        secret: A further text that is hidden.
        length: The most characters.
    """
    words = str(text)[: 8 * length]
    if secret:
        words = words.replace(secret, HIDDEN)
    words = redact_text(words)
    words = "".join(c if c.isprintable() else ascii(c)[1:-1] if c not in "\r\n\t" else " " for c in words[: 2 * length])
    return words if len(words) <= length else words[: length - 3] + "..."


def _parsed(answer: Answer) -> Any:
    """An answer's JSON, strictly: UTF-8, no NaN and no key twice."""
    try:
        return json.loads(answer.body.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_no_key_twice)
    except (ValueError, RecursionError) as error:
        raise BadAnswer(f"no JSON: {said(error, length=120)}") from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found
