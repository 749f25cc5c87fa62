"""A stand-in for the hub: the part of its HTTP API that a push uses, on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


@dataclass
class Hub:
    """What the stand-in has been told, and how it answers."""

    url: str = ""
    repos: dict[str, bool] = field(default_factory=dict)
    """Id → whether it is private."""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    """sha256 → bytes that were uploaded apart from the commit."""
    commits: int = 0
    token: str = "hf_good"
    may_write: bool = True


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined]

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, value: object = None) -> None:
        body = json.dumps({} if value is None else value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def refused(self) -> bool:
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self.answer(401, {"error": "Invalid username or password."})
            return True
        if not self.hub.may_write and self.command == "POST":
            self.answer(403, {"error": "You don't have the rights to create a model under this namespace"})
            return True
        return False

    def do_GET(self) -> None:
        if self.refused():
            return
        repo = self.path.split("?")[0].removeprefix("/api/models/").removesuffix("/revision/main")
        if repo in self.hub.repos:
            self.answer(200, {"id": repo, "private": self.hub.repos[repo], "siblings": []})
        else:
            self.answer(404, {"error": "Repository not found"})

    def do_PUT(self) -> None:
        content = self.body()
        self.hub.stored[hashlib.sha256(content).hexdigest()] = content
        self.answer(200)

    def do_POST(self) -> None:
        content = self.body()
        if self.refused():
            return
        hub, path = self.hub, self.path.split("?")[0]
        if path == "/api/repos/create":
            asked = json.loads(content)
            repo = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
            there = repo in hub.repos
            hub.repos.setdefault(repo, bool(asked.get("private")) or asked.get("visibility") == "private")
            self.answer(409 if there else 200, {"url": f"{hub.url}/{repo}", "id": repo, "name": repo})
        elif path.endswith("/preupload/main"):
            files = json.loads(content)["files"]
            modes = [
                {
                    "path": f["path"], "shouldIgnore": False, "oid": None,
                    "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                }
                for f in files
            ]  # fmt: skip
            self.answer(200, {"files": modes})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {
                    "oid": o["oid"],
                    "size": o["size"],
                    "actions": {"upload": {"href": f"{hub.url}/put/{o['oid']}", "header": {}}},
                }
                for o in json.loads(content)["objects"]
            ]
            self.answer(200, {"transfer": "basic", "objects": objects})
        elif path.endswith("/commit/main"):
            repo = path.removeprefix("/api/models/").removesuffix("/commit/main")
            self.commit(repo, [json.loads(line) for line in content.splitlines() if line.strip()])
            self.answer(
                200, {"success": True, "commitOid": "0" * 40, "commitUrl": f"{hub.url}/{repo}/commit/{'0' * 40}"}
            )
        else:
            self.answer(200)

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        self.hub.commits += 1
        files = self.hub.files.setdefault(repo, {})
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The stand-in, at HF_ENDPOINT, with a token that it knows."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    stand_in = Hub(url=f"http://127.0.0.1:{server.server_port}")
    server.hub = stand_in  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", stand_in.url)
    monkeypatch.setenv("HF_TOKEN", stand_in.token)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    yield stand_in
    server.shutdown()
    server.server_close()
