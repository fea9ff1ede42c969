"""A small chat-completions server on a real socket, for tests of judges."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, dict[str, str], bytes]


def completion(text: str) -> Reply:
    """A right reply with this text."""
    message = {"role": "assistant", "content": text}
    return 200, {}, json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}).encode()


def parts(prompt: str) -> list[str]:
    """The texts between the tags of a prompt, in order."""
    return [found[2] for found in re.finditer(r"<(text-[0-9a-f]{12})>\n(.*?)\n</\1>", prompt, re.DOTALL)]


def compare(request: dict[str, Any]) -> Reply:
    """The verdict 10 if the last part of a prompt equals the one before, else 2."""
    *_, reference, answer = parts(request["messages"][-1]["content"])
    return completion(f"I compare them.\nVerdict: {10 if answer.strip() == reference.strip() else 2}")


class JudgeServer:
    """Server that answers each request with ``answer``, and keeps requests and headers.

    ``most`` is the largest number of requests that were answered at one time.
    """

    def __init__(self, answer: Callable[[dict[str, Any]], Reply] = compare) -> None:
        self.answer, self.requests = answer, list[dict[str, Any]]()
        self.headers, self.paths = list[dict[str, str]](), list[str]()
        self.busy = self.most = 0
        self.lock = threading.Lock()
        ours = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *args: Any) -> None:
                pass

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with ours.lock:
                    ours.requests.append(request)
                    ours.headers.append(dict(self.headers))
                    ours.paths.append(self.path)
                    ours.busy += 1
                    ours.most = max(ours.most, ours.busy)
                try:
                    status, headers, body = ours.answer(request)
                finally:
                    with ours.lock:
                        ours.busy -= 1
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(body))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *args: Any) -> None:
                """Clients that were stopped close their connections."""

        self.http = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
