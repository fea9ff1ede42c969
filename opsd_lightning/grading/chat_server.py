"""Client of an OpenAI-compatible chat-completions server, with retries, a time limit and a bounded number of requests."""

from __future__ import annotations

import json
import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from opsd_lightning.utils.http import Answer, ExchangeError, Exchanger, retry_after, sanitize, strict_json

_LONGEST_ANSWER = 1 << 22  # bytes
_CONNECT_SECONDS = 10.0
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 20.0
_TEMPORARY = {408, 409, 425, 429}


class ChatError(Exception):
    """No reply was received. The message is the reason.

    Args:
        reason: The reason.
        timed_out: True if the time limit was exceeded.
        unusable: True if the server replied, and the reply was not accepted.
        stopped: True if the request was cancelled by `ChatServer.end`.
    """

    def __init__(self, reason: str, timed_out: bool = False, unusable: bool = False, stopped: bool = False) -> None:
        super().__init__(reason)
        self.timed_out, self.unusable, self.stopped = timed_out, unusable, stopped


class Endpoint(NamedTuple):
    """A server and how to use it.

    Args:
        base_url: Address before ``/chat/completions``.
        api_key_env: Environment variable with the API key. The key is left out if it is not set.
        max_concurrency: Largest number of requests at one time in this process.
    """

    base_url: str
    api_key_env: str
    max_concurrency: int


class ChatServer:
    """Client of one endpoint. Use `shared`: a forked child gets its own.

    Attributes:
        accepted: Number of accepted replies.
        unusable: Number of requests that got only replies that were not accepted.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.accepted = self.unusable = 0
        self._changed = threading.Lock()
        self._places = threading.BoundedSemaphore(endpoint.max_concurrency)
        self._stops: weakref.WeakKeyDictionary[threading.Thread, threading.Event] = weakref.WeakKeyDictionary()
        self._http = Exchanger(
            {},
            connections=endpoint.max_concurrency,
            connect_seconds=_CONNECT_SECONDS,
            secure=endpoint.base_url.startswith("https:"),
        )

    def reply(self, body: Mapping[str, Any], accept: Callable[[str], bool], seconds: float, retries: int) -> str:
        """Return the text of the server's reply.

        Args:
            body: The request.
            accept: Function that returns True for a usable reply. After another one, the request is repeated once.
            seconds: Time limit in seconds, with all retries and pauses. Waiting for other requests does not count.
            retries: Largest number of repeated requests.

        Raises:
            ChatError: There is no accepted reply.
        """
        stop, content = self._stop_of(threading.current_thread()), json.dumps(body).encode()
        with self._places:
            deadline, pause, unusable = time.monotonic() + seconds, _FIRST_PAUSE_SECONDS, 0
            for attempt in range(retries + 1):
                try:
                    text = self._once(content, deadline, stop)
                    if accept(text):
                        with self._changed:
                            self.accepted += 1
                        return text
                    unusable += 1
                    last = _FailedError(f"the reply is not usable: {sanitize(text[-200:])!r}", final=unusable > 1)
                except _FailedError as error:
                    last = error
                if stop.is_set():
                    raise ChatError("stopped", stopped=True)
                wait = max(last.pause, pause * random.uniform(0.5, 1.0))
                if last.final or attempt == retries or time.monotonic() + wait >= deadline:
                    break
                stop.wait(wait)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        late = not last.final and attempt < retries
        with self._changed:
            self.unusable += unusable > 0
        raise ChatError(f"{last}{' until the time limit' if late else ''}", timed_out=late, unusable=unusable > 0)

    def end(self, threads: Collection[threading.Thread]) -> None:
        """Cancel the requests of some threads."""
        for thread in threads:
            self._stop_of(thread).set()

    def _stop_of(self, thread: threading.Thread) -> threading.Event:
        with self._changed:
            return self._stops.setdefault(thread, threading.Event())

    def _once(self, content: bytes, deadline: float, stop: threading.Event) -> str:
        key = os.environ.get(self.endpoint.api_key_env, "").strip()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            answer = self._http.request(
                "POST",
                f"{self.endpoint.base_url}/chat/completions",
                content,
                deadline,
                _LONGEST_ANSWER,
                stop,
                headers=headers,
            )
        except ExchangeError as error:
            raise _FailedError(sanitize(error, key)) from None
        if answer.status != 200:
            text = sanitize(_message(answer), key) or "no message"
            temporary = answer.status in _TEMPORARY or answer.status >= 500
            pause = retry_after(answer.headers.get("retry-after")) if temporary else 0.0
            raise _FailedError(f"status {answer.status}: {text}", pause, final=not temporary)
        try:
            text = strict_json(answer.body)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError) as error:
            raise _FailedError(f"the reply is not a chat completion ({sanitize(error, key, 120)})") from None
        if not isinstance(text, str):
            raise _FailedError("the reply has no text")
        return text


class _FailedError(Exception):
    """A request failed. If ``final`` is True, repeating it is of no use."""

    def __init__(self, reason: str, pause: float = 0.0, final: bool = False) -> None:
        super().__init__(reason)
        self.pause, self.final = pause, final


def _message(answer: Answer) -> str:
    """Return the message of an error response."""
    if 300 <= answer.status < 400:
        return f"redirects are not followed ({answer.headers.get('location', 'to nowhere')})"
    try:
        found = strict_json(answer.body)
        error = found.get("error", found)
        return str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, AttributeError):
        return answer.body[:2000].decode("utf-8", "replace")


_servers: dict[Endpoint, ChatServer] = {}
_making = threading.Lock()


def shared(endpoint: Endpoint) -> ChatServer:
    """Return the client of an endpoint in this process."""
    with _making:
        if endpoint not in _servers:
            _servers[endpoint] = ChatServer(endpoint)
        return _servers[endpoint]


def _reset_in_child() -> None:
    global _making
    _making = threading.Lock()
    _servers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_in_child)
