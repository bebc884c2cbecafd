"""A stand-in for the hub: the few endpoints that huggingface_hub calls for an upload, as its client calls them."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_standInTokenOfTheTests"
REGULAR = 1000
"""Files of more bytes go by LFS, as on the hub."""


class Hub:
    """What the stand-in was asked and holds. failing: how many LFS uploads are answered with 500 from now on."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.tokens: set[str | None] = set()
        self.created: dict[str, Any] | None = None
        self.objects: dict[str, bytes] = {}
        self.uploads = 0
        self.failing = 0
        self.files: dict[str, dict[str, bytes]] = {}
        self.refuse = 0

    def answer(self, method: str, path: str, body: bytes, url: str) -> tuple[int, Any]:
        content = (
            json.loads(body) if body[:1] == b"{" and "ndjson" not in path and b"\n{" not in body else None
        )
        if self.refuse and path.startswith("/api/"):
            return self.refuse, {"error": "no"}
        if path == "/api/repos/create":
            first, self.created = self.created is None, content
            return (200 if first else 409), {
                "url": f"{url}/{content['organization'] or 'me'}/{content['name']}"
            }
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if "/branch/" in path:
            return 200, {}
        if "/preupload/" in path:
            found = [
                {"path": f["path"], "uploadMode": "lfs" if f["size"] > REGULAR else "regular", "shouldIgnore": False,
                 "oid": None}
                for f in content["files"]
            ]  # fmt: skip
            return 200, {"files": found}
        if path.endswith("/info/lfs/objects/batch"):
            return 200, {
                "transfer": "basic",
                "objects": [self._object(one, url) for one in content["objects"]],
            }
        if path.startswith("/lfs/"):
            if self.failing:
                self.failing -= 1
                return 400, {"error": "full"}
            assert hashlib.sha256(body).hexdigest() == path.rpartition("/")[2]
            self.objects[path.rpartition("/")[2]] = body
            self.uploads += 1
            return 200, {}
        if "/commit/" in path:
            return 200, self._commit(body, path.rpartition("/")[2], url)
        return 404, {"error": path}

    def _object(self, one: dict[str, Any], url: str) -> dict[str, Any]:
        if one["oid"] in self.objects:
            return one
        return one | {"actions": {"upload": {"href": f"{url}/lfs/{one['oid']}", "header": {}}}}

    def _commit(self, body: bytes, revision: str, url: str) -> dict[str, Any]:
        files: dict[str, bytes] = {}
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
        self.files[revision] = files
        return {"success": True, "commitOid": "0" * 40, "commitUrl": f"{url}/me/made/commit/{'0' * 40}"}


@contextmanager
def hub_on_a_port() -> Iterator[tuple[Hub, str]]:
    """The stand-in, and its address."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            hub.calls.append((self.command, self.path))
            if self.path.startswith("/api/"):
                hub.tokens.add(self.headers.get("authorization"))
            status, answer = hub.answer(self.command, self.path, body, url)
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = handle_any

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub, url
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
