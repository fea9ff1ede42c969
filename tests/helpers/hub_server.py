"""A stand-in of the Hugging Face hub's HTTP API on a real socket: accounts, repositories, uploads and commits."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_" + "x" * 34


@dataclass
class Repository:
    """A repository of models."""

    private: bool
    writable: bool = True
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)


class HubServer:
    """Server with one account, ``ann``, which is in the organization ``lab``.

    Requests whose path contains a key of ``failures`` are answered with its status.
    """

    def __init__(self, role: str = "write", **account: Any) -> None:
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.failures: dict[str, int] = {}
        self.paths: list[str] = []
        token = {"displayName": "test", "role": role, **account}
        self.account = {"name": "ann", "orgs": [{"name": "lab"}], "auth": {"type": "access_token", "accessToken": token}}
        ours = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def handle_any(self) -> None:
                body = self.read()
                path = self.path.partition("?")[0]
                ours.paths.append(f"{self.command} {path}")
                failure = next((status for part, status in ours.failures.items() if part in path), None)
                if failure is not None:
                    status, answer = failure, {"error": "refused"}
                elif not path.startswith("/blobs/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    status, answer = 401, {"error": "Invalid credentials"}
                else:
                    status, answer = ours.answer(self.command, path, body)
                content = json.dumps(answer).encode()
                self.send_response(status)
                if status == 404:
                    self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content if self.command != "HEAD" else b"")

            def read(self) -> bytes:
                if self.headers.get("Transfer-Encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length", 0)))
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)

            do_GET = do_POST = do_PUT = do_HEAD = handle_any

        class Server(ThreadingHTTPServer):
            daemon_threads = True

        self.http = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}"

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Return status and JSON of the answer to a request."""
        if path == "/api/whoami-v2":
            return 200, self.account
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path.startswith("/blobs/"):
            self.blobs[path.rpartition("/")[2]] = body
            return 200, {}
        for name, repository in self.repositories.items():
            if path == f"/{name}.git/info/lfs/objects/batch":
                return 200, self._batch(json.loads(body))
            if path == f"/api/models/{name}":
                return 200, {"id": name, "private": repository.private, "siblings": []}
            if path == f"/api/models/{name}/auth-check/write":
                return (200, {}) if repository.writable else (403, {"error": "no write access"})
            if path == f"/api/models/{name}/preupload/main":
                files = json.loads(body)["files"]
                return 200, {"files": [self._mode(each["path"]) for each in files]}
            if path == f"/api/models/{name}/commit/main":
                return self._commit(name, repository, body)
        return 404, {"error": "Repository not found"}

    def _create(self, request: dict[str, Any]) -> tuple[int, Any]:
        name = f"{request.get('organization') or 'ann'}/{request['name']}"
        if name in self.repositories:
            return 409, {"error": "exists", "url": f"{self.url}/{name}"}
        private = request.get("visibility", "private" if request.get("private") else "public") == "private"
        self.repositories[name] = Repository(private)
        return 200, {"url": f"{self.url}/{name}", "name": name}

    def _batch(self, request: dict[str, Any]) -> dict[str, Any]:
        objects = [
            {"oid": each["oid"], "size": each["size"], "actions": {"upload": {"href": f"{self.url}/blobs/{each['oid']}"}}}
            for each in request["objects"]
        ]
        return {"transfer": "basic", "objects": objects}

    @staticmethod
    def _mode(path: str) -> dict[str, Any]:
        return {"path": path, "uploadMode": "lfs" if path.endswith(".safetensors") else "regular", "shouldIgnore": False}

    def _commit(self, name: str, repository: Repository, body: bytes) -> tuple[int, Any]:
        files: dict[str, bytes] = {}
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repository.commits.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.blobs[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"] and len(content) == value["size"]
                files[value["path"]] = content
        repository.files |= files
        oid = hashlib.sha1(body).hexdigest()
        return 200, {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{name}/commit/{oid}", "hookOutput": ""}
