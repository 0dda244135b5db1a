"""A stand-in for the Hugging Face Hub's HTTP interface: dataset repositories, commits, files by range.

What huggingface_hub asks of the real one to make a repository, upload a folder and read files of a commit. Tokens:
`hf_writer_0000` may write; others read public repositories only. `.arrow` files have a sha256, as large files do.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote

WRITER, READER = "hf_writer_0000", "hf_reader_0000"
_API = re.compile(r"/api/datasets/([^/]+/[^/]+)(?:/(revision|paths-info|preupload|commit)/([^/]+))?")
_RESOLVE = re.compile(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class Hub:
    """Repositories by name: each a list of commits, each {path: bytes}."""

    def __init__(self) -> None:
        self.repos: dict[str, list[dict[str, bytes]]] = {}
        self.sent: list[list[str]] = []  # paths of each commit, as they came
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.lock = threading.Lock()

    def commit_id(self, repo: str, number: int) -> str:
        return hashlib.sha1(f"{repo} {number}".encode()).hexdigest()

    def at(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commits = self.repos[repo]
        for number, files in enumerate(commits):
            if revision == self.commit_id(repo, number) or (revision == "main" and number == len(commits) - 1):
                return self.commit_id(repo, number), files
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, status: int, body: Any, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    @property
    def _may_write(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {WRITER}"

    def _found(self, repo: str, revision: str = "main") -> tuple[str, dict[str, bytes]] | None:
        """The files of a commit; None where the answer was given: that there is none."""
        hub = self.hub
        if repo not in hub.repos or (repo in hub.private and not self._may_write):
            status = 404 if self._may_write else 401
            self._answer(status, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        elif repo in hub.gated and not self._may_write:
            self._answer(403, {"error": "Access is restricted"}, X_Error_Code="GatedRepo")
        elif (found := hub.at(repo, revision)) is None:
            self._answer(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
        else:
            return found
        return None

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        if match := _RESOLVE.fullmatch(path):
            self._file(*match.groups())
        elif match := _API.fullmatch(path):
            found = self._found(match[1], match[3] or "main")
            if found:
                self._answer(200, {"id": match[1], "sha": found[0], "private": False, "siblings": []})
        else:
            self._answer(404, {"error": path})

    do_HEAD = do_GET

    def _file(self, repo: str, revision: str, name: str) -> None:
        found = self._found(repo, revision)
        if found is None:
            return
        if name not in found[1]:
            self._answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
            return
        data = found[1][name]
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not match:
            self._answer(200, data)
        elif int(match[1]) >= len(data):
            self._answer(416, b"")
        else:
            stop = int(match[2]) + 1 if match[2] else len(data)
            self._answer(206, data[int(match[1]) : stop], Content_Range=f"bytes {match[1]}-{stop - 1}/{len(data)}")

    def do_POST(self) -> None:
        path, body = unquote(self.path.partition("?")[0]), self._body()
        if path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif (match := _API.fullmatch(path)) and (found := self._found(match[1], match[3])):
            if match[2] == "paths-info":
                self._paths_info(found[1], body)
            elif not self._may_write:
                self._answer(403, {"error": "you have no write access"})
            elif match[2] == "preupload":
                asked = [one["path"] for one in json.loads(body)["files"]]
                told = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in asked]
                self._answer(200, {"files": told})
            else:
                self._commit(match[1], [json.loads(line) for line in body.splitlines()])

    def _create(self, asked: dict[str, Any]) -> None:
        repo = f"{asked.get('organization') or 'user'}/{asked['name']}"
        if not self._may_write:
            self._answer(403, {"error": "you have no write access"})
        elif repo in self.hub.repos:
            self._answer(409, {"error": "You already created this dataset repo", "url": f"/datasets/{repo}"})
        else:
            self.hub.repos[repo] = [{".gitattributes": b""}]
            if asked.get("visibility") == "private":
                self.hub.private.add(repo)
            self._answer(200, {"url": f"http://{self.headers['Host']}/datasets/{repo}"})

    def _paths_info(self, files: dict[str, bytes], body: bytes) -> None:
        try:
            asked = json.loads(body)["paths"]
        except ValueError:
            asked = parse_qs(body.decode())["paths"]
        told = []
        for name in asked:
            if name in files:
                data = files[name]
                oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
                one: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": oid}
                if name.endswith(".arrow"):
                    one["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
                told.append(one)
        self._answer(200, told)

    def _commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        with self.hub.lock:
            files = dict(self.hub.repos[repo][-1])
            for line in lines:
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    files.pop(line["value"]["path"])
            self.hub.repos[repo].append(files)
            self.hub.sent.append([line["value"]["path"] for line in lines if line["key"] == "file"])
            oid = self.hub.commit_id(repo, len(self.hub.repos[repo]) - 1)
        url = f"http://{self.headers['Host']}/datasets/{repo}/commit/{oid}"
        self._answer(200, {"success": True, "commitOid": oid, "commitUrl": url})


@contextmanager
def serving() -> Iterator[tuple[Hub, str]]:
    """(the Hub, its address)"""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
