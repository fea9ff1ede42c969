"""HTTP requests that end: within a deadline and a number of bytes, whatever the other side sends.

Both limits hold for the whole exchange: resolving the name, connecting, TLS, the request, interim answers, the headers and
the body with its framing. An HTTP client's own time-outs hold for each read. No redirect is followed, no proxy asked, no
cookie kept, and no compressed answer taken, so that a body is never larger than what came over the wire.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import httpcore

_SLICE_SECONDS = 0.25  # how soon a request that is under way notices that it was stopped
_PIECE_BYTES = 65536


class ExchangeError(Exception):
    """There is no whole answer: the message says why."""


class Answer(NamedTuple):
    """A whole answer.

    Args:
        status: The HTTP status.
        headers: By names in lower case. Of a repeated one the last.
        body: At most as long as was allowed.
    """

    status: int
    headers: dict[str, str]
    body: bytes


class Exchanger:
    """Makes requests, also from several threads at once, over connections that are kept.

    Args:
        headers: Sent with every request.
        connections: The most idle connections that are kept.
        connect_seconds: Time limit for one connection, within the request's own.
        secure: Prepare for https.
    """

    def __init__(self, headers: Mapping[str, str], connections: int, connect_seconds: float, secure: bool) -> None:
        self._headers = {"Accept": "application/json", "Accept-Encoding": "identity", **headers}
        self._connect_seconds = connect_seconds
        self._backend = _Backend()
        self._pool = httpcore.ConnectionPool(
            ssl_context=httpcore.default_ssl_context() if secure else None,
            max_connections=None,
            max_keepalive_connections=connections,
            keepalive_expiry=3.0,  # servers close idle connections after some seconds, vLLM after 5
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
    ) -> Answer:
        """Make one request.

        Args:
            method: ``GET`` or ``POST``.
            url: Where, without a user or password.
            body: JSON, or None.
            deadline: When it must have ended, in seconds of ``time.monotonic``.
            max_bytes: The most bytes that may come back, headers and framing included.
            stop: Once set, the request ends with an error.

        Raises:
            ExchangeError: No whole answer within the limits.
        """
        headers = self._headers if body is None else self._headers | {"Content-Type": "application/json"}
        budget = self._backend.local.budget = _Budget(deadline, max_bytes, stop)
        try:
            while True:
                try:
                    return self._exchange(method, url, headers, body)
                except (httpcore.NetworkError, httpcore.RemoteProtocolError):
                    # The server closed a connection that was kept, as it may: ask on a new one.
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
                raise ExchangeError(f"an answer in Content-Encoding {encoding[:40]!r}, which was not asked for")
            whole = bytearray()
            for piece in answer.iter_stream():
                whole += piece
            return Answer(answer.status, found, bytes(whole))

    def close(self) -> None:
        """Close all connections."""
        self._pool.close()


class _Budget:
    """Time and bytes that are left to one request."""

    def __init__(self, deadline: float, max_bytes: int, stop: threading.Event | None) -> None:
        self.deadline, self.max_bytes, self.left, self.stop = deadline, max_bytes, max_bytes, stop
        self.connected = False  # on a connection of its own, and not on one that was kept

    def seconds(self, error: type[Exception], limit: float | None = None) -> float:
        """Time left, at most ``limit``.

        Raises:
            Exception: ``error`` if there is none, or the request was stopped.
        """
        if self.stop is not None and self.stop.is_set():
            raise ExchangeError("stopped")
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise error("no answer in time")
        return left if limit is None else min(left, limit)

    def slice(self, error: type[Exception]) -> float:
        return self.seconds(error, None if self.stop is None else _SLICE_SECONDS)

    def take(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise ExchangeError(f"more than {self.max_bytes:,} bytes came, which no right answer takes")


class _Backend(httpcore.NetworkBackend):
    """Connects within the calling thread's budget."""

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
    """Reads and writes within the calling thread's budget; httpcore's own limits hold for each read alone."""

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
        # One deadline holds for the whole handshake: Python's ssl module counts it down itself.
        seconds = self._local.budget.seconds(httpcore.ConnectTimeout, timeout)
        return _Stream(self._inner.start_tls(ssl_context, server_hostname, timeout=seconds), self._local)

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


def _resolve(host: str, port: int, end: float) -> list[tuple[str, int]]:
    """Addresses of a host. The system's resolver takes no time limit, so that it is left behind where it takes too long."""
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
        except RuntimeError:  # the interpreter is ending
            ask()
        else:
            thread.join(max(end - time.monotonic(), 0.001))
            if thread.is_alive():
                raise httpcore.ConnectTimeout(f"the name {host} is not resolved in time")
    if failed:
        raise httpcore.ConnectError(str(failed[0]))
    return list(dict.fromkeys((entry[4][0], entry[4][1]) for entry in found))
