"""A web server on the loopback interface for one page and the requests of its form.

It protects the page from other users of the machine, and from pages of other sites in the browser:

- It listens on 127.0.0.1 only.
- The address has a random token as its first part. Requests without it are refused.
- The ``Host`` header must name the loopback interface and the port. This refuses a site whose name points to 127.0.0.1 (DNS
  rebinding), since the browser sends the name of the site.
- A request that a page of another origin sends (header ``Origin``) is refused.

Nothing is written to disk. Requests are not logged, since their addresses contain the token.
"""

from __future__ import annotations

import hmac
import json
import secrets
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

from opsd_lightning.types import UserError
from opsd_lightning.utils.terminal import safe_text

ADDRESS = "127.0.0.1"
_MAX_BYTES = 1 << 20  # of a request's body
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",  # the token must not reach other sites
    "X-Content-Type-Options": "nosniff",
}


class LoopbackServer(ThreadingHTTPServer):
    """Server of one page and one function on 127.0.0.1.

    ``GET`` of `address` returns the page. ``POST`` of `address` + ``answer`` with a JSON object calls the function and
    returns its result as JSON, or an object with ``error``.

    Args:
        page: The page, as HTML.
        answer: Function that is called with the object. Several threads may call it at the same time. A `UserError` becomes
            an answer with status 400.
        port: Port to listen on. Defaults to a free one.

    Raises:
        OSError: The port is taken.
    """

    daemon_threads = True

    def __init__(self, page: str, answer: Callable[[Mapping[str, Any]], Mapping[str, Any]], port: int = 0) -> None:
        self.page = page.encode("utf-8", "backslashreplace")
        self.answer = answer
        self.token = secrets.token_urlsafe(32)
        super().__init__((ADDRESS, port), _Handler)
        self.hosts = {f"{name}:{self.server_port}" for name in (ADDRESS, "localhost")}

    @property
    def address(self) -> str:
        """Address of the page, with the token."""
        return f"http://{ADDRESS}:{self.server_port}/{self.token}/"

    def server_bind(self) -> None:
        # HTTPServer asks the name service for the name of the machine.
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Do nothing: a browser that closes a connection is no error."""


class _Handler(BaseHTTPRequestHandler):
    server: LoopbackServer
    server_version, sys_version = "opsd", ""
    timeout = 60  # seconds for a request to arrive

    def do_GET(self) -> None:
        path = self._admitted()
        if path == "":
            self._send(200, self.server.page, "text/html; charset=utf-8")
        elif path is not None:
            self._refuse(404, "There is nothing at this address")

    def do_POST(self) -> None:
        path = self._admitted()
        if path is None:
            return
        if path != "answer":
            self._refuse(404, "There is nothing at this address")
        elif self.headers.get_content_type() != "application/json":
            self._refuse(415, "Send JSON")
        elif (body := self._body()) is not None:
            self._answer(body)

    def _admitted(self) -> str | None:
        """Return the path behind the token, or None after a refusal."""
        hosts, origins = self.headers.get_all("Host", []), self.headers.get_all("Origin", [])
        if len(hosts) != 1 or hosts[0] not in self.server.hosts or any(o != f"http://{hosts[0]}" for o in origins):
            self._refuse(403, "Open the address as `opsd show` printed it")
            return None
        start, token, path = [*self.path.partition("?")[0].split("/", 2), "", ""][:3]
        whole = self.path.count("/") >= 2 and not start  # the answers' address is relative to one that ends in a slash
        if not hmac.compare_digest(token.encode("utf-8", "replace"), self.server.token.encode()) or not whole:
            self._refuse(403, "Open the whole address that `opsd show` printed")
            return None
        return path

    def _body(self) -> bytes | None:
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            self._refuse(411, "The length of the request is missing")
        elif int(length) > _MAX_BYTES:
            self._refuse(413, f"The question and its context are longer than {_MAX_BYTES} bytes")
        else:
            return self.rfile.read(int(length))
        return None

    def _answer(self, body: bytes) -> None:
        try:
            asked = json.loads(body)
            if not isinstance(asked, dict):
                raise ValueError("it is not an object")
        except (ValueError, RecursionError) as error:
            self._refuse(400, f"The request is not a JSON object ({error})")
            return
        try:
            content, status = json.dumps(self.server.answer(asked)), 200
        except UserError as error:
            content, status = json.dumps({"error": safe_text(error)}), 400
        except Exception as error:  # the page shows it, and the server continues
            content, status = json.dumps({"error": safe_text(f"{type(error).__name__}: {error}")}), 500
        self._send(status, content.encode(), "application/json")

    def _refuse(self, status: int, reason: str) -> None:
        self.close_connection = True
        self._send(status, json.dumps({"error": reason}).encode(), "application/json")

    def _send(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **_HEADERS}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuse a request that is not HTTP or has another method."""
        self._refuse(code, message or "The request is not supported")

    def log_message(self, format: str, *args: Any) -> None:
        """Do nothing: the address has the token."""
