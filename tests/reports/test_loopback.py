"""Tests of the server of `opsd show`: what it refuses, and what it leaves behind."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import pytest

from opsd_lightning.reports.loopback import ADDRESS, LoopbackServer
from opsd_lightning.types import UserError

PAGE = "<!doctype html><p>The page"


def answer(asked: Mapping[str, Any]) -> Mapping[str, Any]:
    if asked.get("question") == "refused":
        raise UserError("the question is refused")
    if asked.get("question") == "broken":
        raise RuntimeError("no <b>memory</b>")
    return {"heard": asked}


@pytest.fixture
def server() -> Iterator[LoopbackServer]:
    with LoopbackServer(PAGE, answer) as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield found
        finally:
            found.shutdown()
            thread.join()


def ask(
    server: LoopbackServer, path: str, method: str = "GET", body: bytes | None = None, **headers: str
) -> tuple[int, str, dict[str, str]]:
    """Return status, text and headers of a request whose headers are given alone, underscores standing for hyphens."""
    connection = http.client.HTTPConnection(ADDRESS, server.server_port, timeout=20)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    given = {"Host": f"{ADDRESS}:{server.server_port}"} | {name.replace("_", "-"): v for name, v in headers.items()}
    if body is not None:
        given = {"Content-Length": str(len(body)), "Content-Type": "application/json"} | given
    for name, value in given.items():
        if value:
            connection.putheader(name, value)
    connection.endheaders(body)
    reply = connection.getresponse()
    text = reply.read().decode()
    connection.close()
    return reply.status, text, dict(reply.getheaders())


def test_page_and_answers_are_served_at_the_secret_address(server: LoopbackServer) -> None:
    path = server.address.removeprefix(f"http://{ADDRESS}:{server.server_port}")
    status, text, headers = ask(server, path)
    assert (status, text) == (200, PAGE) and headers["Content-Type"].startswith("text/html")
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert headers["Referrer-Policy"] == "no-referrer" and headers["Cache-Control"] == "no-store"
    assert ask(server, path, Host=f"localhost:{server.server_port}")[0] == 200
    asked = {"question": "wie viele? 😀"}
    for origin in ("", f"http://{ADDRESS}:{server.server_port}"):
        status, text, _ = ask(server, f"{path}answer", "POST", json.dumps(asked).encode(), Origin=origin)
        assert status == 200 and json.loads(text) == {"heard": asked}
    for question, code in (("refused", 400), ("broken", 500)):
        status, text, headers = ask(server, f"{path}answer", "POST", json.dumps({"question": question}).encode())
        assert status == code and question in (text if code == 400 else "broken")
        assert headers["Content-Type"] == "application/json"
    assert len(server.token) >= 40 and server.server_address[0] == ADDRESS


def test_each_server_has_its_own_token() -> None:
    with LoopbackServer(PAGE, answer) as one, LoopbackServer(PAGE, answer) as other:
        assert one.token != other.token and one.server_port != other.server_port


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_requests_without_the_token_are_refused(method: str, server: LoopbackServer) -> None:
    token = server.token
    body = b"{}" if method == "POST" else None
    for path in (
        "/", "/answer", "//", f"/{token}", f"/{token[:-1]}/", f"/{token}x/", f"/{token.swapcase()}/", f"/?token={token}",
        f"/x/{token}/", f"/%2f{token}/", f"/../{token}/", "/favicon.ico", "*", f"http://{ADDRESS}:{server.server_port}/",
    ):  # fmt: skip
        status, text, _ = ask(server, path, method, body)
        assert status == 403 and token not in text and PAGE not in text, path


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_other_hosts_and_origins_are_refused(method: str, server: LoopbackServer) -> None:
    """A site whose name points to 127.0.0.1 sends its own name, even if it should know the token."""
    port, body = server.server_port, b"{}" if method == "POST" else None
    path = f"/{server.token}/" + ("answer" if method == "POST" else "")
    for host in (
        "", "evil.example", f"evil.example:{port}", ADDRESS, f"{ADDRESS}:{port + 1}", f"{ADDRESS}:{port}.evil.example",
        f"evil.example@{ADDRESS}:{port}", f"0.0.0.0:{port}", f"[::1]:{port}",
    ):  # fmt: skip
        assert ask(server, path, method, body, Host=host)[0] == 403, host
    for origin in ("http://evil.example", "null", f"https://{ADDRESS}:{port}", f"http://{ADDRESS}:{port + 1}"):
        assert ask(server, path, method, body, Origin=origin)[0] == 403, origin
    twice = f"GET {path} HTTP/1.1\r\nHost: {ADDRESS}:{port}\r\nHost: evil.example\r\n\r\n"
    with socket.create_connection((ADDRESS, port), timeout=20) as raw:
        raw.sendall(twice.encode())
        assert b" 403 " in raw.recv(100)


def test_other_requests_are_refused_and_the_server_goes_on(server: LoopbackServer) -> None:
    path = f"/{server.token}/"
    assert ask(server, f"{path}other")[0] == 404 and ask(server, path, "POST", b"{}")[0] == 404
    for method in ("PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT"):
        assert ask(server, path, method)[0] == 501
    answers = f"{path}answer"
    for body in (b"", b"[1]", b"{", b"\xff", b"[" * 100_000, b"null"):
        assert ask(server, answers, "POST", body)[0] == 400, body[:9]
    assert ask(server, answers, "POST", b"{}", Content_Type="text/plain")[0] == 415
    assert ask(server, answers, "POST", b"{}", Content_Type="")[0] == 415
    assert ask(server, answers, "POST", None, Content_Type="application/json")[0] == 411
    for length, status in (("-1", 411), ("9" * 30, 413), (str(1 << 21), 413), ("+1", 411)):
        assert ask(server, answers, "POST", None, Content_Type="application/json", Content_Length=length)[0] == status
    for raw in (b"\0\1\2\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"x" * 70_000 + b"\r\n\r\n"):
        with socket.create_connection((ADDRESS, server.server_port), timeout=20) as connection:
            connection.sendall(raw)
            with suppress(ConnectionResetError):  # closed before all of it was read
                assert PAGE.encode() not in connection.recv(1000)
    # A connection that says nothing does not hold up the others.
    with socket.create_connection((ADDRESS, server.server_port), timeout=20):
        assert ask(server, path)[0] == 200


def test_nothing_is_printed(server: LoopbackServer, capfd: pytest.CaptureFixture[str]) -> None:
    """The address of every request has the token."""
    ask(server, f"/{server.token}/")
    ask(server, "/wrong/")
    assert capfd.readouterr() == ("", "")


def test_a_taken_port_is_an_error(server: LoopbackServer) -> None:
    with pytest.raises(OSError, match="in use"):
        LoopbackServer(PAGE, answer, server.server_port)
