"""HTTP requests with a deadline and a size limit for the whole exchange.

Both limits cover name resolution, connecting, TLS, the request, interim responses, headers and the body with its framing,
while the timeouts of HTTP clients only cover single reads. Redirects, proxies, cookies and compressed responses are not
supported, so a body is never larger than the received bytes.
"""

from __future__ import annotations

import email.utils
import json
import re
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

import httpcore

from opsd_lightning.utils.redaction import HIDDEN, redact_text

_SLICE_SECONDS = 0.25  # interval at which a pending request checks whether it was stopped
_PIECE_BYTES = 65536
_LONGEST_RETRY_AFTER_SECONDS = 60.0


class ExchangeError(Exception):
    """No complete response was received. The message is the reason."""


class Answer(NamedTuple):
    """A complete HTTP response.

    Args:
        status: HTTP status code.
        headers: Headers by lower-case name. The last one counts if a name is repeated.
        body: Body of the response.
    """

    status: int
    headers: dict[str, str]
    body: bytes


class Exchanger:
    """Thread-safe HTTP client with persistent connections.

    Args:
        headers: Headers of every request.
        connections: Maximum number of idle connections.
        connect_seconds: Time limit for connecting, in seconds, within the deadline of the request.
        secure: If True, support https.
    """

    def __init__(self, headers: Mapping[str, str], connections: int, connect_seconds: float, secure: bool) -> None:
        self._headers = {"Accept": "application/json", "Accept-Encoding": "identity", **headers}
        self._connect_seconds = connect_seconds
        self._backend = _Backend()
        self._pool = httpcore.ConnectionPool(
            ssl_context=httpcore.default_ssl_context() if secure else None,
            max_connections=None,
            max_keepalive_connections=connections,
            keepalive_expiry=3.0,  # vLLM, for one, closes idle connections after 5 seconds
            network_backend=self._backend,
        )

    def request(
        self,
        method: str,
        url: str,
        body: bytes | None,
        deadline: float,
        max_bytes: int,
        stop: threading.Event | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Make one request.

        Args:
            method: ``GET`` or ``POST``.
            url: Address without a user or password.
            body: JSON, or None.
            deadline: Time of ``time.monotonic`` in seconds at which the request fails.
            max_bytes: Maximum number of received bytes, including headers and framing.
            stop: Event that makes the request fail when it is set.
            headers: Further headers of this request.

        Raises:
            ExchangeError: No complete response was received within the limits.
        """
        sent = self._headers | dict(headers or {}) | ({} if body is None else {"Content-Type": "application/json"})
        budget = self._backend.local.budget = _Budget(deadline, max_bytes, stop)
        try:
            while True:
                try:
                    return self._exchange(method, url, sent, body)
                except (httpcore.NetworkError, httpcore.RemoteProtocolError):
                    # A server may close an idle connection at any time: repeat the request on a new one.
                    if budget.connected or budget.left < max_bytes:
                        raise
        except httpcore.TimeoutException as error:
            raise ExchangeError(str(error) or "no connection in time") from None
        except (httpcore.NetworkError, httpcore.ProtocolError, OSError) as error:
            raise ExchangeError(f"{type(error).__name__}: {error}") from None
        finally:
            self._backend.local.budget = None

    def _exchange(self, method: str, url: str, headers: Mapping[str, str], body: bytes | None) -> Answer:
        with self._pool.stream(
            method,
            url,
            headers=list(headers.items()),
            content=body,
            extensions={"timeout": {"connect": self._connect_seconds}},
        ) as answer:
            found = {name.decode("ascii").lower(): value.decode("latin-1") for name, value in answer.headers}
            encoding = found.get("content-encoding", "identity").strip().lower()
            if encoding != "identity":
                raise ExchangeError(f"the response has Content-Encoding {encoding[:40]!r}, which was not requested")
            content = bytearray()
            for piece in answer.iter_stream():
                content += piece
            return Answer(answer.status, found, bytes(content))

    def close(self) -> None:
        """Close all connections."""
        self._pool.close()


class _Budget:
    """Remaining time and bytes of one request."""

    def __init__(self, deadline: float, max_bytes: int, stop: threading.Event | None) -> None:
        self.deadline, self.max_bytes, self.left, self.stop = deadline, max_bytes, max_bytes, stop
        self.connected = False  # True if the request opened a new connection

    def seconds(self, error: type[Exception], limit: float | None = None) -> float:
        """Return the remaining seconds, at most ``limit``.

        Raises:
            ExchangeError: The request was stopped.
            Exception: No time is left. The exception is of type ``error``.
        """
        if self.stop is not None and self.stop.is_set():
            raise ExchangeError("stopped")
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise error("no response in time")
        return left if limit is None else min(left, limit)

    def slice(self, error: type[Exception]) -> float:
        """Return the seconds to wait before the next check for a stop."""
        return self.seconds(error, None if self.stop is None else _SLICE_SECONDS)

    def take(self, count: int) -> None:
        """Count received bytes.

        Raises:
            ExchangeError: More bytes were received than allowed.
        """
        self.left -= count
        if self.left < 0:
            raise ExchangeError(f"the response exceeds {self.max_bytes:,} bytes")


class _Backend(httpcore.NetworkBackend):
    """Network backend that connects within the budget of the calling thread."""

    def __init__(self) -> None:
        self.local = threading.local()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        budget: _Budget = self.local.budget
        budget.connected = True
        end = budget.deadline if timeout is None else min(budget.deadline, time.monotonic() + timeout)
        addresses = _resolve(host, port, end)
        last: Exception = httpcore.ConnectError(f"{host} has no address")
        for index, (address, number) in enumerate(addresses):
            left = min(budget.seconds(httpcore.ConnectTimeout), end - time.monotonic()) / (len(addresses) - index)
            try:
                inner = httpcore.SyncBackend().connect_tcp(
                    address, number, timeout=max(left, 0.001), socket_options=socket_options or ()
                )
                return _Stream(inner, self.local)
            except httpcore.ConnectTimeout as error:
                last = httpcore.ConnectTimeout(str(error) or "no connection in time")
            except httpcore.ConnectError as error:
                last = error
        raise last


class _Stream(httpcore.NetworkStream):
    """Network stream that reads and writes within the budget of the calling thread."""

    def __init__(self, inner: httpcore.NetworkStream, local: threading.local) -> None:
        self._inner, self._local = inner, local

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        budget: _Budget = self._local.budget
        while True:
            seconds = budget.slice(httpcore.ReadTimeout)
            try:
                found = self._inner.read(max_bytes, timeout=seconds)
            except httpcore.ReadTimeout:
                continue
            budget.take(len(found))
            return found

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        budget: _Budget = self._local.budget
        sock: socket.socket = self._inner.get_extra_info("socket")
        left = memoryview(buffer)
        while left:
            sock.settimeout(budget.slice(httpcore.WriteTimeout))
            try:
                left = left[sock.send(left[:_PIECE_BYTES]) :]
            except TimeoutError:
                continue
            except OSError as error:
                raise httpcore.WriteError(str(error)) from error

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        # Python's ssl module applies the timeout to the whole handshake.
        seconds = self._local.budget.seconds(httpcore.ConnectTimeout, timeout)
        return _Stream(self._inner.start_tls(ssl_context, server_hostname, timeout=seconds), self._local)

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


def _resolve(host: str, port: int, end: float) -> list[tuple[str, int]]:
    """Return the addresses and ports of a host.

    The system's resolver has no timeout, so it runs in a thread that is abandoned at the time ``end``.
    """
    found: list[Any] = []
    failed: list[OSError] = []

    def ask(flags: int = 0) -> None:
        try:
            found.extend(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags))
        except OSError as error:
            failed.append(error)

    ask(socket.AI_NUMERICHOST)
    if not found:
        failed.clear()
        thread = threading.Thread(target=ask, name="opsd-resolve", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the interpreter is shutting down
            ask()
        else:
            thread.join(max(end - time.monotonic(), 0.001))
            if thread.is_alive():
                raise httpcore.ConnectTimeout(f"the name {host} was not resolved in time")
    if failed:
        raise httpcore.ConnectError(str(failed[0]))
    return list(dict.fromkeys((entry[4][0], entry[4][1]) for entry in found))


# -- responses and addresses ---------------------------------------------------------------------------------------------


def is_address(url: object) -> bool:
    """Return True for the address of a server: http or https, in ASCII, without a query and without a fragment."""
    if not isinstance(url, str):
        return False
    try:
        parts = urllib.parse.urlsplit(url)
        right = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    return right and url.isascii() and url.isprintable() and not set(url) & set(" ?#")


def strict_json(body: bytes) -> Any:
    """Return the value of a JSON text in UTF-8.

    Raises:
        ValueError: The text is not JSON, is nested too deeply, repeats a key, or holds NaN or an infinity.
    """
    try:
        return json.loads(body.decode("utf-8"), parse_constant=_reject_constant, object_pairs_hook=_unique_keys)
    except RecursionError:
        raise ValueError("the value is nested too deeply") from None


def _reject_constant(name: str) -> Any:
    raise ValueError(f"{name} is not valid JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is repeated")
    return found


def retry_after(value: str | None) -> float:
    """Return the seconds in a ``Retry-After`` header (a number or a date), at most a minute. Return 0 if it is invalid."""
    text = (value or "").strip()[:64]
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
        return min(float(text), _LONGEST_RETRY_AFTER_SECONDS)
    try:
        when = email.utils.parsedate_to_datetime(text)
        when = when.replace(tzinfo=UTC) if when.tzinfo is None else when
        return min(max((when - datetime.now(UTC)).total_seconds(), 0.0), _LONGEST_RETRY_AFTER_SECONDS)
    except (ValueError, TypeError, OverflowError, IndexError):
        return 0.0


def sanitize(text: object, secret: str = "", length: int = 300) -> str:
    """Return text from a server for use in messages: one short line, without secrets, with control characters escaped.

    Args:
        text: Any object, which is converted to text.
        secret: Further text to hide, such as an API key.
        length: Maximum number of characters.
    """
    words = str(text)[: 8 * length]
    if secret:
        words = words.replace(secret, HIDDEN)
    words = redact_text(words)
    words = "".join(c if c.isprintable() else ascii(c)[1:-1] if c not in "\r\n\t" else " " for c in words[: 2 * length])
    return words if len(words) <= length else words[: length - 3] + "..."
