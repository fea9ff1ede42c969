"""A small HTTP server that speaks vLLM's protocol as far as the package uses it, for tests without vLLM.

It is no mock: completions and log-probabilities come from a real model, and adapters are really read from their folders by
peft. Its answers' fields, status codes and messages are those of vLLM 0.32 (entrypoints/openai).
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


class ProtocolServer:
    """Server of a model folder, and of adapters of rank at most ``max_rank``.

    ``hook`` is called with each path before it is answered, and may return a status and message to answer instead.
    """

    def __init__(self, folder: str, max_model_len: int = 512, max_rank: int = 16, lora: bool = True) -> None:
        self.folder, self.max_model_len, self.max_rank, self.lora = folder, max_model_len, max_rank, lora
        self.base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.model: PeftModel | None = None
        self.adapters: dict[str, str] = {}
        self.requests: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.hook: Callable[[str], tuple[int, str] | None] = lambda path: None
        self.lock = threading.Lock()
        self.connections: set[socket.socket] = set()
        self.http: ThreadingHTTPServer | None = None
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start to answer, on the same port as before."""
        ours = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                self.answer({})

            def do_POST(self) -> None:
                self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def answer(self, body: dict[str, Any]) -> None:
                ours.paths.append(self.path)
                try:
                    status, found = ours.hook(self.path) or ours.handle(self.path, body)
                except _Hang as error:
                    time.sleep(error.args[0])
                    return
                if ours.http is not self.server:  # killed while it worked: nothing comes back
                    self.close_connection = True
                    return
                if isinstance(found, str) and status != 200:
                    found = {"error": {"message": found, "type": "Error", "param": None, "code": status}}
                data = json.dumps(found).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def setup(self) -> None:
                super().setup()
                ours.connections.add(self.connection)

            def finish(self) -> None:
                ours.connections.discard(self.connection)
                super().finish()

        self.http = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.http.daemon_threads = True
        self.port = self.http.server_address[1]
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def kill(self) -> None:
        """Stop all answers, also to current requests, and forget the loaded adapters."""
        http, self.http = self.http, None
        if http is not None:
            http.shutdown()
            http.server_close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        with self.lock:
            self.adapters = {}
            self.model = None

    def handle(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/health":
            return 200, ""
        if path == "/v1/models":
            cards = [{"id": self.folder, "root": self.folder, "parent": None, "max_model_len": self.max_model_len}]
            cards += [{"id": name, "root": root, "parent": self.folder} for name, root in self.adapters.items()]
            return 200, {"object": "list", "data": cards}
        with self.lock:
            if self.http is None:
                raise ConnectionAbortedError("killed")
            if path == "/v1/load_lora_adapter" and self.lora:
                return self.load(body["lora_name"], body["lora_path"])
            if path == "/v1/unload_lora_adapter" and self.lora:
                if self.adapters.pop(body["lora_name"], None) is None:
                    return 404, f"The lora adapter '{body['lora_name']}' cannot be found."
                return 200, "Success"
            if path == "/v1/completions":
                return self.complete(body)
        return 404, "Not Found"

    def load(self, name: str, folder: str) -> tuple[int, Any]:
        if name in self.adapters:
            return 400, f"The lora adapter '{name}' has already been loaded."
        try:
            with open(f"{folder}/adapter_config.json") as file:
                rank = json.load(file)["r"]
        except OSError:
            return 404, f"Loading lora {name} failed: No adapter found for {folder}"
        if rank > self.max_rank:
            return 500, f"LoRA rank {rank} is greater than max_lora_rank {self.max_rank}."
        inner = name.replace(".", "_")
        if self.model is None:
            self.model = PeftModel.from_pretrained(self.base, folder, adapter_name=inner).eval()
        elif inner not in self.model.peft_config:
            self.model.load_adapter(folder, inner)
        self.adapters[name] = folder
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    @torch.no_grad()
    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        if body["model"] != self.folder and body["model"] not in self.adapters:
            return 404, f"The model `{body['model']}` does not exist."
        if len(body["prompt"]) > self.max_model_len:
            return 400, f"This model's maximum context length is {self.max_model_len} tokens."
        assert body["ignore_eos"] and body["repetition_penalty"] == 1.0
        self.requests.append(body)
        if body["model"] == self.folder:
            off = None if self.model is None else self.model.disable_adapter()
            if off is None:
                row = self.sample(self.base, body)
            else:
                with off:
                    row = self.sample(self.base, body)
        else:
            assert self.model is not None
            self.model.set_adapter(body["model"].replace(".", "_"))
            row = self.sample(self.base, body)
        ids, logprobs = row
        stopped = ids[-1] in body["stop_token_ids"]
        choice: dict[str, Any] = {"index": 0, "text": "", "finish_reason": "stop" if stopped else "length", "logprobs": None}
        if body["logprobs"] is not None:
            choice["logprobs"] = {"token_logprobs": logprobs, "tokens": [f"token_id:{token}" for token in ids]}
        if body["return_token_ids"]:
            choice |= {"token_ids": ids, "prompt_token_ids": body["prompt"]}
        return 200, {"choices": [choice], "model": body["model"]}

    @staticmethod
    def sample(model: Any, body: dict[str, Any]) -> tuple[list[int], list[float]]:
        generator = torch.Generator().manual_seed(body["seed"])
        ids, logprobs, cache = list(body["prompt"]), [], None
        fed = ids
        while True:
            output = model(input_ids=torch.tensor([fed]), past_key_values=cache, use_cache=True)
            logits, cache = output.logits[0, -1].double(), output.past_key_values
            if body["temperature"] == 0:
                token = int(logits.argmax())
            else:
                token = int(torch.multinomial(filtered(logits, body), 1, generator=generator))
            ids.append(token)
            logprobs.append(float(logits.log_softmax(-1)[token]))
            fed = [token]
            if token in body["stop_token_ids"] or len(logprobs) == body["max_tokens"]:
                return ids[len(body["prompt"]) :], logprobs


def filtered(logits: torch.Tensor, body: dict[str, Any]) -> torch.Tensor:
    """Return the probabilities after temperature, top-k, top-p and min-p."""
    p = (logits / body["temperature"]).softmax(-1)
    ranked, order = p.sort(descending=True)
    keep = ranked >= body["min_p"] * ranked[0]
    if body["top_k"] > 0:
        keep[body["top_k"] :] = False
    keep &= ranked.cumsum(0) - ranked < body["top_p"]
    p[order[~keep]] = 0
    return p / p.sum()


class _Hang(Exception):
    """Raised in a hook: wait so many seconds and send no answer."""


def hang(seconds: float) -> None:
    raise _Hang(seconds)
