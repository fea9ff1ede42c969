"""HTTP client for a pool of vLLM servers: their state, their adapters, and requests distributed over them.

The threads of all servers take requests from one queue, so a slow server gets fewer requests, and the requests of a failing
server go to the others. The threads exist only during `ServerPool.post_all`.

Responses are not trusted. A response that does not answer its request counts as a failure of the server, and the request is
sent to another one. A server that keeps failing is given up. The run ends when no server is left.
"""

from __future__ import annotations

import json
import os
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

from opsd_lightning.runs.signals import Stopped, stop_signal
from opsd_lightning.types import ConfigError
from opsd_lightning.utils.http import Answer, ExchangeError, Exchanger, is_address, retry_after, sanitize, strict_json

T = TypeVar("T")

_URLS = "model.rollouts.init_args.urls"
_FIRST_BACKOFF_SECONDS, _LONGEST_BACKOFF_SECONDS = 0.25, 10.0
# Upper limits of timeouts: for queries, which a working server answers at once, for loading an adapter, and for closing.
_QUERY_SECONDS, _LOAD_SECONDS, _CLOSE_SECONDS = 10.0, 120.0, 5.0
# Size limits of responses: any response, a list of models, and the additions for each completion token and prompt token.
_ANSWER_BYTES, _LIST_BYTES, _TOKEN_BYTES, _PROMPT_TOKEN_BYTES = 2**16, 2**22, 2048, 32
_MAX_UNLOADS = 64  # adapters of dead runs to unload at a time

#: Seconds without a response, after a signal asked the run to stop, after which the run ends without finishing its step.
STOP_TIMEOUT_SECONDS = 30.0

# Parts of a server's error messages, and what to do about each error.
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
    """One version of an adapter.

    Args:
        name: Name of the adapter in requests.
        folder: Path of the peft folder.
    """

    name: str
    folder: str


class _Unavailable(Exception):
    """The server did not answer. Another server, or the same server later, may answer."""

    def __init__(self, reason: str, pause_seconds: float = 0.0) -> None:
        super().__init__(reason)
        self.pause_seconds = pause_seconds


class BadAnswer(_Unavailable):
    """The response does not answer the request."""


class _Rejected(_Unavailable):
    """The server rejected the request and would reject it again."""


class _ModelNotFound(Exception):
    """The server does not have the requested model or adapter."""


@dataclass(eq=False)
class Server:
    """State of one server."""

    url: str
    alive: bool = True
    model: str = ""  # name of the base model on the server
    max_model_len: int = 0
    adapters: dict[str, str] = field(default_factory=dict)  # adapter names and folders, as listed by the server
    returned: bool = False  # was given up before: until a request succeeds, one failure gives it up again
    failures: int = 0  # consecutive failures; simultaneous requests count once
    failed_at: float = 0.0
    not_before: float = 0.0  # from the server's Retry-After header
    reason: str = ""
    error: Exception | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    loading: threading.Lock = field(default_factory=threading.Lock)

    def pause_seconds(self) -> float:
        """Return the seconds to wait before the next request to this server."""
        until = self.not_before
        if self.failures:
            backoff = min(_FIRST_BACKOFF_SECONDS * 2 ** (self.failures - 1), _LONGEST_BACKOFF_SECONDS)
            until = max(until, self.failed_at + backoff)
        return max(until - time.monotonic(), 0.0)


class ServerPool:
    """Pool of vLLM servers with the same base model.

    Args:
        urls: Addresses of the servers, such as ``http://localhost:8000``.
        timeout_seconds: Time limit of a request in seconds, from connecting to the last byte.
        retries: Number of consecutive failures, after the first one, after which a server is given up.
        max_concurrency: Maximum number of simultaneous requests to each server.
        api_key_env: Environment variable with the servers' API key, if they require one.

    Raises:
        ConfigError: An address or the API key is invalid.
    """

    def __init__(self, urls: Sequence[str], timeout_seconds: float, retries: int, max_concurrency: int, api_key_env: str):
        self.servers = [Server(url) for url in check_urls(urls)]
        self.timeout_seconds, self.retries, self.max_concurrency = timeout_seconds, retries, max_concurrency
        self.model = ""
        self._key = os.environ.get(api_key_env, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise ConfigError(
                f"the API key in {api_key_env} has characters that are not allowed in HTTP headers",
                "model.rollouts.init_args.api_key_env",
                "Set the variable to the servers' --api-key",
            )
        self._http = Exchanger(
            {"Authorization": f"Bearer {self._key}"} if self._key else {},
            connections=len(urls) * max_concurrency,
            connect_seconds=_QUERY_SECONDS,
            secure=any(server.url.startswith("https:") for server in self.servers),
        )
        self._pending_warnings: deque[str] = deque()

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def alive(self) -> list[Server]:
        """Return the servers that are not given up."""
        return [server for server in self.servers if server.alive]

    # -- servers and adapters ----------------------------------------------------------------------------------------

    def connect(self) -> None:
        """Query the model of every server. Servers that do not answer are given up.

        Raises:
            ConfigError: No server answers, or the servers have different models.
        """
        for server in self.servers:
            self._retry(server, self._query)
        self._emit_warnings()
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
                    f"{living[0].url} serves {self._sanitize(living[0].model)}, and {server.url} serves "
                    f"{self._sanitize(server.model)}",
                    _URLS,
                    "Start all servers with the same --model (and --served-model-name)",
                )
        self.model = living[0].model

    def revive(self) -> None:
        """Query the servers that were given up, and use those that answer again."""
        for server in self.servers:
            if not server.alive:
                try:
                    self._query(server)
                except _Unavailable:
                    continue
                server.alive, server.returned, server.failures, server.not_before = True, True, 0, 0.0

    def require(self, unfit: Callable[[Server], str | None]) -> None:
        """Give up servers that cannot serve a rollout.

        Args:
            unfit: Function that returns the reason why a server cannot serve the rollout, or None.

        Raises:
            ConfigError: No server is left.
        """
        for server in self.alive():
            if (reason := unfit(server)) is not None:
                self._give_up(server, reason)
        self._emit_warnings()
        self._require_one()

    def _query(self, server: Server, deadline: float | None = None) -> None:
        deadline = self._deadline(_QUERY_SECONDS) if deadline is None else deadline
        self._request(server, "GET", "/health", deadline)
        answer = self._request(server, "GET", "/v1/models", deadline, max_bytes=_LIST_BYTES)
        try:
            found = _parsed(answer)
        except BadAnswer as error:
            raise BadAnswer(f"this is not a vLLM server: /v1/models returned {error}") from None
        cards = found.get("data") if isinstance(found, dict) else None
        if not isinstance(cards, list) or not all(isinstance(card, dict) for card in cards):
            raise BadAnswer("this is not a vLLM server: /v1/models does not list models")
        base: dict[str, Any] = next((card for card in cards if card.get("parent") is None), {})
        model, length = base.get("id"), base.get("max_model_len")
        if not isinstance(model, str) or not model or type(length) is not int or not 0 < length < 2**40:
            raise BadAnswer("this is not a vLLM server: /v1/models does not list a model with max_model_len")
        if self.model and model != self.model:
            raise _Rejected(f"it now serves {self._sanitize(model)} instead of {self._sanitize(self.model)}")
        adapters = {}
        for card in cards:
            if card.get("parent") is not None:
                if not isinstance(card.get("id"), str) or not isinstance(card.get("root"), str):
                    raise BadAnswer("/v1/models lists an adapter without a name or a folder")
                adapters[card["id"]] = card["root"]
        server.model, server.max_model_len, server.adapters = model, length, adapters

    def load(self, adapter: Adapter, stale: Callable[[str, str], bool]) -> None:
        """Load an adapter on all servers, and unload stale ones.

        Args:
            adapter: Adapter to load.
            stale: Function that returns True if an adapter, given by its name and folder, is to be unloaded.

        Raises:
            ConfigError: No server could load the adapter.
        """
        for server in self.alive():
            self._retry(server, lambda server: self._load(server, adapter))
            if server.alive:
                old = [name for name, root in server.adapters.items() if name != adapter.name and stale(name, root)]
                began = time.monotonic()
                try:
                    for name in old[:_MAX_UNLOADS]:
                        self._unload(server, name, self._deadline(_QUERY_SECONDS))
                except _Unavailable as error:
                    self._record_failure(server, began, error)
        self._emit_warnings()
        self._require_one()

    def unload(self, names: Sequence[str]) -> None:
        """Unload adapters from all servers, within a few seconds and without errors."""
        deadline = self._deadline(_CLOSE_SECONDS)

        def unload(server: Server) -> None:
            for name in set(names) & server.adapters.keys():
                try:
                    self._unload(server, name, deadline)
                except Exception:  # a failing server must not delay the end of the run
                    return

        threads = [threading.Thread(target=unload, args=(server,), name="opsd-vllm", daemon=True) for server in self.servers]
        for thread, server in zip(threads, self.servers, strict=True):
            try:
                thread.start()
            except RuntimeError:  # the interpreter is shutting down and cannot start threads
                unload(server)
        for thread in threads:
            if thread.ident is not None:
                thread.join(max(deadline - time.monotonic(), 0.0) + 1.0)

    def _load(self, server: Server, adapter: Adapter, deadline: float | None = None) -> None:
        # Every version has its own name. With vLLM's load_inplace the server would read the folder in every decoding step
        # (its LoRARequest keeps the flag), and the weights of unfinished rows would change.
        if server.adapters.get(adapter.name) == adapter.folder:
            return
        deadline = self._deadline(_LOAD_SECONDS) if deadline is None else deadline
        if adapter.name in server.adapters:
            self._unload(server, adapter.name, deadline)
        body = {"lora_name": adapter.name, "lora_path": adapter.folder}
        try:
            self._request(server, "POST", "/v1/load_lora_adapter", deadline, body)
        except _Rejected as error:
            # If the response to an earlier request was lost, the server has the adapter and rejects this request.
            with suppress(_Unavailable):
                self._query(server, deadline)
            if server.adapters.get(adapter.name) != adapter.folder:
                raise error
            return
        self._query(server, deadline)
        if server.adapters.get(adapter.name) != adapter.folder:
            raise _Rejected(
                f"it loaded adapter {adapter.name} from {adapter.folder} but lists it as "
                f"{self._sanitize(server.adapters.get(adapter.name))}. Behind a load balancer, {_URLS} must name the "
                "servers themselves"
            )

    def _unload(self, server: Server, name: str, deadline: float) -> None:
        self._request(server, "POST", "/v1/unload_lora_adapter", deadline, {"lora_name": name})
        server.adapters.pop(name, None)

    def _retry(self, server: Server, action: Callable[[Server], None]) -> None:
        """Run an action until it succeeds or the server is given up."""
        while server.alive:
            time.sleep(server.pause_seconds())
            began = time.monotonic()
            try:
                action(server)
            except _Unavailable as error:
                self._record_failure(server, began, error)
            else:
                server.failures = 0
                return

    def _record_failure(self, server: Server, began: float, error: Exception) -> None:
        reason = str(error) if isinstance(error, _Unavailable) else f"{type(error).__name__}: {self._sanitize(error)}"
        with server.lock:
            server.error = error
            if isinstance(error, _Unavailable) and error.pause_seconds:
                server.not_before = max(server.not_before, time.monotonic() + error.pause_seconds)
            if not server.alive:
                return
            if isinstance(error, _Rejected):
                self._give_up(server, reason)
                return
            if began < server.failed_at:
                return  # started before the last failure, which counts for both
            server.failures, server.failed_at, server.reason = server.failures + 1, time.monotonic(), reason
            if server.failures > (0 if server.returned else self.retries):
                self._give_up(server, reason)
            elif not isinstance(error, _Unavailable) or isinstance(error, BadAnswer):
                self._pending_warnings.append(
                    f"vLLM server {server.url} sent an invalid response ({reason}). The request is repeated"
                )

    def _give_up(self, server: Server, reason: str) -> None:
        server.alive, server.reason = False, reason
        self._pending_warnings.append(
            f"vLLM server {server.url} is given up after {max(server.failures, 1)} consecutive failure(s) ({reason}). Its "
            "requests go to the other servers until the next step"
        )

    def _emit_warnings(self) -> None:
        """Issue the warnings of other threads in this thread, where a warning may be turned into an error."""
        while self._pending_warnings:
            warnings.warn(self._pending_warnings.popleft(), RuntimeWarning, stacklevel=3)

    def _require_one(self) -> None:
        if not self.alive():
            reasons = "; ".join(f"{server.url}: {server.reason}" for server in self.servers)
            raise ConfigError(
                f"no vLLM server is left ({reasons})",
                _URLS,
                "Check the servers' logs and restart them, or raise model.rollouts.init_args.timeout_seconds or retries. "
                "Resume from the last checkpoint",
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
        """Distribute completion requests over the servers.

        Args:
            bodies: Bodies of requests to ``/v1/completions``, without ``model``.
            adapter: Adapter to sample from, or None for the base model.
            read: Function of a request's body, its model and the response's JSON, whose result is returned. It raises
                `BadAnswer` if the response is invalid.
            start: Index of the server that gets the first request. Ranks start with different servers.
            stop: Event that ends pending requests and makes the call raise when it is set.

        Returns:
            Results of ``read``, in the order of the bodies.

        Raises:
            ConfigError: No server is left.
            RuntimeError: ``stop`` was set.
            Stopped: A signal asked the run to stop, and no server responds.
        """
        queue: _Queue[T] = _Queue(len(bodies), stop or threading.Event(), self.alive)
        while queue.left:  # again if all servers of this round were given up
            self._emit_warnings()
            self._require_one()
            if queue.stop.is_set():
                raise RuntimeError("sampling was stopped")
            living = self.alive()
            living = living[start % len(living) :] + living[: start % len(living)]
            threads = [
                threading.Thread(
                    target=self._work, args=(server, bodies, adapter, read, queue), name="opsd-vllm", daemon=True
                )
                for _ in range(min(queue.left, self.max_concurrency))
                for server in living
            ]
            try:
                for thread in threads:
                    thread.start()
                timeout = _StopTimeout()
                for thread in threads:
                    while thread.is_alive():
                        thread.join(1.0)
                        self._emit_warnings()
                        timeout.check(queue.left)
            except BaseException:  # interrupted: send no further requests and end pending ones
                queue.stop.set()
                for thread in threads:
                    if thread.ident is not None:
                        thread.join(1.0)
                raise
        self._emit_warnings()
        return queue.found  # type: ignore[return-value]

    def _work(
        self,
        server: Server,
        bodies: Sequence[dict[str, Any]],
        adapter: Adapter | None,
        read: Callable[[dict[str, Any], str, Any], T],
        queue: _Queue[T],
    ) -> None:
        while server.alive and (index := queue.take(server)) is not None:
            began = time.monotonic()
            try:
                asked, answer = self._complete(server, bodies[index], adapter, queue.stop)
                found = read(bodies[index], asked, answer)
            except Exception as error:  # any error counts as a failure of the server
                if not queue.stop.is_set():
                    self._record_failure(server, began, error)
                queue.requeue(index, server)
            else:
                server.failures, server.returned = 0, False
                queue.finish(index, found)

    def _complete(
        self, server: Server, body: dict[str, Any], adapter: Adapter | None, stop: threading.Event
    ) -> tuple[str, Any]:
        """Return the requested model and the JSON of the response. Load the adapter again if the server has lost it."""
        asked = self.model if adapter is None else adapter.name
        body = {"model": asked} | body
        size = _ANSWER_BYTES + _TOKEN_BYTES * body["max_tokens"] + _PROMPT_TOKEN_BYTES * len(body["prompt"])
        deadline, held = self._deadline(), server.adapters
        try:
            return asked, _parsed(self._request(server, "POST", "/v1/completions", deadline, body, size, stop))
        except _ModelNotFound as error:  # the server was restarted and has lost the adapter
            if adapter is None:
                raise _Unavailable(str(error)) from None
        with server.loading:
            if server.adapters is held:  # no other thread has loaded the adapter in the meantime
                self._query(server, deadline)
                self._load(server, adapter, deadline)
        try:
            return asked, _parsed(self._request(server, "POST", "/v1/completions", deadline, body, size, stop))
        except _ModelNotFound as again:
            raise _Unavailable(str(again)) from None

    def _deadline(self, seconds: float | None = None) -> float:
        limit = self.timeout_seconds if seconds is None else min(seconds, self.timeout_seconds)
        return time.monotonic() + limit

    def _request(
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
            raise _Unavailable(f"{path}: {self._sanitize(error)}{within}{hint}") from None
        if answer.status == 200:
            return answer
        return self._check_status(path, answer)

    def _check_status(self, path: str, answer: Answer) -> Answer:
        status, text = answer.status, answer.body.decode("utf-8", "replace")
        with suppress(BadAnswer, KeyError, TypeError, IndexError):
            text = _parsed(answer)["error"]["message"]
        message = self._sanitize(text) or "no message"
        loading = path == "/v1/load_lora_adapter"
        known = next((remedy for part, remedy in _REMEDIES if part in message), None)
        if loading and status in (404, 405) and known is None:
            known = "start the servers with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in their environment, and --enable-lora"
        elif path == "/v1/completions" and status == 404:
            raise _ModelNotFound(message)
        elif path == "/v1/unload_lora_adapter" and status == 404:
            return answer  # not loaded
        # vLLM returns status 500 for adapters that it does not support.
        if known is None and (status in (408, 425, 429) or status >= 500):
            pause = retry_after(answer.headers.get("retry-after")) if status in (429, 503) else 0.0
            raise _Unavailable(f"{path} returned {status}: {message}", min(pause, self.timeout_seconds))
        raise _Rejected(f"it rejects {path} ({status}: {message}){'; ' + known if known else ''}")

    def _sanitize(self, text: object) -> str:
        """Return text from a server for use in messages, without the API key."""
        return sanitize(text, self._key)


class _StopTimeout:
    """Timeout for responses after a signal asked the run to stop."""

    def __init__(self) -> None:
        self._left, self._since = -1, 0.0

    def check(self, left: int) -> None:
        """Check the time since the last response.

        Args:
            left: Number of requests without a response.

        Raises:
            Stopped: A signal asked the run to stop, and no response came for `STOP_TIMEOUT_SECONDS`. No checkpoint is saved,
                since the step is not complete.
        """
        number = stop_signal()
        if not number or left != self._left:
            self._left, self._since = left, time.monotonic()
        elif time.monotonic() - self._since >= STOP_TIMEOUT_SECONDS:
            raise Stopped(number)


class _Queue(Generic[T]):
    """Queue of requests for the threads of all servers."""

    def __init__(self, count: int, stop: threading.Event, alive: Callable[[], list[Server]]) -> None:
        self.waiting = deque(range(count))
        self.found: list[T | None] = [None] * count
        self.left = count
        self.stop = stop
        self.failed_on: dict[int, set[Server]] = {}
        self.alive = alive
        self.changed = threading.Condition()

    def take(self, server: Server) -> int | None:
        """Wait for the next request for a server and return its index, or None if no request is left."""
        with self.changed:
            while self.left and not self.stop.is_set() and server.alive:
                pause = server.pause_seconds()
                if not pause and (index := self._next(server)) is not None:
                    return index
                self.changed.wait(min(pause or 0.2, 0.2))
        return None

    def _next(self, server: Server) -> int | None:
        """Return a request that this server has not failed, or that all servers have failed."""
        for index in self.waiting:
            failed = self.failed_on.get(index, ())
            if server not in failed or all(other in failed for other in self.alive()):
                self.waiting.remove(index)
                return index
        return None

    def requeue(self, index: int, server: Server) -> None:
        """Put back a request that a server has failed."""
        with self.changed:
            self.failed_on.setdefault(index, set()).add(server)
            self.waiting.appendleft(index)
            self.changed.notify_all()

    def finish(self, index: int, found: T) -> None:
        """Store the result of a request."""
        with self.changed:
            self.found[index] = found
            self.left -= 1
            if not self.left:
                self.changed.notify_all()


def check_urls(urls: Sequence[str]) -> list[str]:
    """Return the addresses of servers without trailing slashes and ``/v1``.

    Raises:
        ConfigError: An address is invalid, has a password, or occurs twice.
    """
    found: list[str] = []
    for url in urls:
        if "@" in str(url):
            raise ConfigError(
                "an address has a user or password, which vLLM does not support",
                _URLS,
                "Remove it, and set an API key in the environment variable of api_key_env",
            )
        if not is_address(url):
            raise ConfigError(
                f"{sanitize(ascii(url))} is not a valid address",
                _URLS,
                "Write it as http://host:8000, in ASCII, without ? and #",
            )
        plain = url.rstrip("/").removesuffix("/v1").rstrip("/")
        if plain in found:
            raise ConfigError(f"{plain} occurs twice", _URLS, "Name each server once")
        found.append(plain)
    return found


def _parsed(answer: Answer) -> Any:
    """Decode the JSON of a response strictly: in UTF-8, without NaN and repeated keys."""
    try:
        return strict_json(answer.body)
    except ValueError as error:
        raise BadAnswer(f"invalid JSON ({sanitize(error, length=120)})") from None
