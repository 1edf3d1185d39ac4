"""A hub of one's own: the few addresses that huggingface_hub asks for a fetch, over HTTP."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

TOKEN = "hf_a-secret-that-is-nowhere"


def commit_of(text: str) -> str:
    """A commit's name for a test."""
    return hashlib.sha1(text.encode()).hexdigest()


@dataclass
class Repository:
    """A repository: commits by branch, files by commit."""

    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Add a commit; its name."""
        name = commit_of(f"{branch} {len(self.commits)} {sorted(files)}")
        self.commits[name] = files
        self.branches[branch] = name
        return name


@dataclass
class Hub:
    """What the server has, how it misbehaves, and what it was asked."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    # Content that is served instead of the file's own, by path.
    wrong: dict[str, bytes] = field(default_factory=dict)
    # Bytes after which the connection breaks, one for each time, by path.
    breaks: dict[str, list[int]] = field(default_factory=dict)
    # Listed, but gone when asked for.
    gone: set[str] = field(default_factory=set)
    # Called in the middle of a file, by path.
    meanwhile: dict[str, Callable[[], None]] = field(default_factory=dict)
    down: bool = False
    asked: list[str] = field(default_factory=list)
    endpoint: str = ""

    def repository(self, name: str) -> Repository:
        """A new repository, `datasets/owner/name` or `models/owner/name`."""
        return self.repositories.setdefault(name, Repository())

    def downloads(self) -> list[str]:
        """The files that were asked for, with the range where one was."""
        return [line.removeprefix("GET ") for line in self.asked if "/resolve/" in line
                and line.startswith("GET")]  # fmt: skip


def is_lfs(path: str) -> bool:
    """Whether the hub keeps a file in its large file storage, whose name is a SHA-256."""
    return path.endswith((".jsonl", ".safetensors", ".model"))


def blob(content: bytes) -> str:
    """The name that git gives a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Answers for one `Hub`, which `serve` puts on the class."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        path = urlsplit(self.path).path
        wanted = self.headers.get("Range", "")
        self.hub.asked.append(f"{self.command} {path} {wanted}".strip())
        if self.hub.down:
            self._refuse(503)
            return
        api = re.fullmatch(r"/api/(\w+/[^/]+/[^/]+)/(revision|tree)/(.+)", path)
        file = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if api:
            name, revision = api[1], api[3]
        elif file:
            name, revision = f"{'datasets' if file[1] else 'models'}/{file[2]}", file[3]
        else:
            self._refuse(404)
            return
        repository = self.hub.repositories.get(name)
        login = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repository is None or (repository.private and not login):
            self._refuse(404 if login else 401, "RepoNotFound")
            return
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            self._refuse(404, "RevisionNotFound")
            return
        files = repository.commits[commit]
        if api and api[2] == "revision":
            self._send_json({"id": name.partition("/")[2], "sha": commit})
        elif api:
            self._send_json([*({"type": "directory", "path": folder, "oid": "0" * 40}
                             for folder in {p.rpartition("/")[0] for p in files} - {""}),
                            *(_listed(p, content) for p, content in files.items())])  # fmt: skip
        elif repository.gated:
            self._refuse(403, "GatedRepo")
        elif file and (file[4] not in files or file[4] in self.hub.gone):
            self._refuse(404, "EntryNotFound")
        elif file:
            self._send_file(file[4], files[file[4]], commit, wanted, with_body)

    def _refuse(self, status: int, code: str | None = None) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send_json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _send_file(
        self, path: str, content: bytes, commit: str, wanted: str, with_body: bool
    ) -> None:
        served = self.hub.wrong.get(path, content)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        self.send_response(206 if wanted else 200)
        self.send_header("X-Repo-Commit", commit)
        name = hashlib.sha256(content).hexdigest() if is_lfs(path) else blob(content)
        self.send_header("ETag", f'"{name}"')
        if is_lfs(path):
            self.send_header("X-Linked-Etag", f'"{name}"')
            self.send_header("X-Linked-Size", str(len(content)))
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(served) - 1}/{len(served)}")
        self.send_header("Content-Length", str(len(served) - start))
        self.end_headers()
        if not with_body:
            return
        breaks = self.hub.breaks.get(path)
        end = breaks.pop(0) if breaks else len(served)
        middle = (start + end) // 2
        self.wfile.write(served[start:middle])
        self.wfile.flush()
        if path in self.hub.meanwhile:
            self.hub.meanwhile[path]()
        self.wfile.write(served[middle:end])
        if end < len(served):
            self.close_connection = True


def _listed(path: str, content: bytes) -> dict[str, object]:
    found: dict[str, object] = {"type": "file", "path": path, "size": len(content)}
    if not is_lfs(path):
        return {**found, "oid": blob(content)}
    pointer = hashlib.sha256(content).hexdigest()
    lfs = {"oid": pointer, "size": len(content), "pointerSize": 130}
    return {**found, "oid": blob(pointer.encode()), "lfs": lfs}


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub on a port of this machine."""
    hub = Hub()
    handler = type("HandlerOfOne", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
