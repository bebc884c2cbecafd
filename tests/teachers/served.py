"""A tiny model behind the formats of the servers that are asked over HTTP, in this process or on a port of its own.

The formats are those of the servers' own documentation and sources: vLLM 0.20 and SGLang 0.5.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

Answer = tuple[int, dict[str, str], bytes]
Fault = Callable[[str, Answer], Answer]


class Served:
    """One model as ``kind``; ``limit``: the most log-probabilities it gives. fault: what becomes of each answer.

    A fault sees the path and the answer, and is asked for every request; ``requests`` keeps what came in.
    """

    def __init__(self, model: Any, kind: str, *, limit: int = 64, fault: Fault | None = None) -> None:
        self.model, self.kind, self.limit, self.fault = model, kind, limit, fault
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.scaled = False  # whether log-probabilities follow the sampling temperature
        self.logits = False  # whether raw logits are given instead
        self.stale = 0.0  # what the answer to a prompt that was seen before is moved by
        self.seen: set[tuple[int, ...]] = set()

    def answer(self, path: str, headers: dict[str, str], content: bytes) -> Answer:
        self.requests.append((path, headers, content))
        plain = self.plain(path, content)
        return plain if self.fault is None else self.fault(path, plain)

    def plain(self, path: str, content: bytes) -> Answer:
        if path == "/v1/models":
            return _json({"object": "list", "data": [{"id": "tiny", "max_model_len": 64}]})
        if path == {"vllm": "/version", "sglang": "/get_model_info"}.get(self.kind):
            return _json({"version": "0.20.2"})
        asked = json.loads(content or b"{}")
        if path == "/generate" and self.kind == "sglang":
            sampling = asked["sampling_params"]
            logp = self.logp(asked["input_ids"], sampling["temperature"])
            return _json(sglang(asked["input_ids"], logp, asked["top_logprobs_num"]))
        if path == "/v1/completions" and self.kind in ("vllm", "openai"):
            if asked.get("model") not in (None, "tiny"):
                return _json({"error": {"message": "The model does not exist.", "code": 404}}, 404)
            k = asked["prompt_logprobs" if self.kind == "vllm" else "logprobs"]
            if k > self.limit:
                told = f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.limit}"
                return _json({"error": {"message": told, "type": "BadRequestError", "code": 400}}, 400)
            made = vllm if self.kind == "vllm" else openai
            return _json(made(asked["prompt"], self.logp(asked["prompt"], asked["temperature"]), k))
        return _json({"detail": "Not Found"}, 404)

    @torch.no_grad()
    def logp(self, ids: list[int], temperature: float) -> Any:
        """Log-probabilities of the next token after each token, [t, v]."""
        logits = self.model(torch.tensor([ids])).logits[0]
        if self.logits:
            return logits
        logits = logits / temperature if self.scaled else logits
        moved = self.stale if tuple(ids) in self.seen else 0.0
        self.seen.add(tuple(ids))
        return torch.log_softmax(logits, -1) - moved


def vllm(ids: list[int], logp: Any, k: int) -> dict[str, Any]:
    """prompt_logprobs as vLLM writes them: the text's own token first, then the K best with their ranks."""
    rows: list[Any] = [None]
    for at, token in enumerate(ids[1:]):
        order = logp[at].argsort(descending=True).tolist()
        chosen = [token, *order[:k]]
        rows.append(
            {
                str(one): {
                    "logprob": float(logp[at, one]),
                    "rank": order.index(one) + 1,
                    "decoded_token": f"w{one}",
                }
                for one in chosen
            }
        )
    choice = {
        "index": 0,
        "text": " w",
        "logprobs": None,
        "finish_reason": "length",
        "prompt_logprobs": rows,
        "prompt_token_ids": ids,
    }
    return {"id": "cmpl-1", "object": "text_completion", "model": "tiny", "choices": [choice]}


def openai(ids: list[int], logp: Any, k: int) -> dict[str, Any]:
    """A completion with echo whose tokens are named by id; the last position is the one that was generated."""
    best = [dict.fromkeys([token, *logp[at].topk(k).indices.tolist()]) for at, token in enumerate(ids[1:])]
    rows = [
        None,
        *({f"token_id:{i}": float(logp[at, i]) for i in chosen} for at, chosen in enumerate(best)),
    ]
    told = {
        "tokens": [f"token_id:{i}" for i in [*ids, 5]],
        "token_logprobs": [None, *(float(logp[at, i]) for at, i in enumerate(ids[1:])), -1.0],
        "top_logprobs": [*rows, {"token_id:5": -1.0}],
        "text_offset": list(range(len(ids) + 1)),
    }
    return {"id": "1", "choices": [{"index": 0, "text": "", "logprobs": told, "finish_reason": "length"}]}


def sglang(ids: list[int], logp: Any, k: int) -> dict[str, Any]:
    """meta_info as SGLang writes it, without the tokens' texts."""
    own = [[None, ids[0], None], *([float(logp[at, i]), i, None] for at, i in enumerate(ids[1:]))]
    best = [logp[at].topk(k) for at in range(len(ids) - 1)]
    rows = [
        None,
        *(
            [[v, i, None] for v, i in zip(one.values.tolist(), one.indices.tolist(), strict=True)]
            for one in best
        ),
    ]
    meta = {"prompt_tokens": len(ids), "input_token_logprobs": own, "input_top_logprobs": rows}
    return {"text": "", "meta_info": meta}


def _json(content: dict[str, Any], status: int = 200) -> Answer:
    return status, {"content-type": "application/json"}, json.dumps(content).encode()


@contextmanager
def on_a_port(served: Served, port: int = 0) -> Iterator[str]:
    """The server on loopback; its address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            length = int(self.headers.get("content-length") or 0)
            headers = {key.lower(): value for key, value in self.headers.items()}
            status, told, body = served.answer(self.path, headers, self.rfile.read(length))
            self.send_response(status)
            for key, value in {"content-length": str(len(body)), **told}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            """Nothing on stderr."""

    open_sockets: list[Any] = []

    class Server(ThreadingHTTPServer):
        daemon_threads = False
        allow_reuse_address = True

        def process_request(self, request: Any, address: Any) -> None:
            open_sockets.append(request)
            super().process_request(request, address)

    server = Server(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        for one in open_sockets:  # as a server that dies does
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        server.server_close()
        thread.join()
