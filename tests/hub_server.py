"""A Hugging Face Hub on loopback, for tests: a real HTTP server with the faults of real ones.

It speaks what `huggingface_hub` needs to fetch a model: the listing (`/api/models/...`), `HEAD` and `GET` of
`/{owner}/{name}/resolve/{revision}/{file}`, `Range` requests, and the redirect of large files to a second origin (the
Hub's CDN); and to upload one by the protocol of before Xet. Every request is recorded in `HubServer.requests`.

    with HubServer() as server:
        server.add_repo("owner/name", folder)
        server.cut("model.safetensors", after=15_000_000)      # once: drop the connection there
        subprocess.run(..., env=server.environment(home=tmp_path))
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import socket
import struct
import sys
import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LORA_REPO = "2kxx/Qscorer_lora_5_1"
BASE_REPO = "MAGAer13/mplug-owl2-llama2-7b"

LFS_SUFFIXES = (".bin", ".safetensors", ".model")
TOKEN = "hf_loopback"  # the only token this Hub accepts


@dataclass(frozen=True)
class StoredFile:
    """One file of a commit: what is served, and what the listing says of it."""

    content: bytes
    lfs: bool
    git_sha1: str
    sha256: str

    @classmethod
    def of(cls, name: str, content: bytes) -> StoredFile:
        git_sha1 = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return cls(content, name.endswith(LFS_SUFFIXES), git_sha1, hashlib.sha256(content).hexdigest())

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_sha1

    def listing(self, name: str) -> dict[str, Any]:
        entry: dict[str, Any] = {"rfilename": name, "size": len(self.content), "blobId": self.git_sha1}
        return {**entry, "lfs": self.pointer("sha256")} if self.lfs else entry

    def tree_entry(self, name: str) -> dict[str, Any]:
        """The same in the words of the other listing, which snapshot_download asks for."""
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(self.content), "oid": self.git_sha1}
        return {**entry, "lfs": self.pointer("oid")} if self.lfs else entry

    def pointer(self, name_of_hash: str) -> dict[str, Any]:
        return {name_of_hash: self.sha256, "size": len(self.content), "pointerSize": 134}


@dataclass
class Repo:
    """A repository: its commits (sha -> name -> file), its branches and tags, and its gate."""

    commits: dict[str, dict[str, StoredFile]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False

    def commit_of(self, revision: str) -> str | None:
        sha = self.refs.get(revision, revision)
        return sha if sha in self.commits else None


@dataclass(frozen=True)
class Request:
    """One request. `host` is "hub" or "cdn"; `sent` lists the sizes of the pieces of content."""

    host: str
    method: str
    path: str
    range: str | None
    authorized: bool
    sent: list[int] = field(default_factory=list)


@dataclass
class Fault:
    """What goes wrong when the content of a file is sent; `times` counts down, None is for ever.

    Kinds: "cut" and "reset" the connection, or "hang" until the server closes, after so many bytes; "corrupt": other
    bytes of the same length; "short": a complete answer with the first bytes only; "status": an HTTP error.
    """

    kind: str
    after: int
    times: int | None
    status: int


class HubServer(AbstractContextManager):
    """The Hub and its CDN on two ports of 127.0.0.1. Use it as a context manager."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.uploads: dict[str, bytes] = {}  # large files by SHA-256, sent and not yet committed
        self.faults: dict[str, list[Fault]] = {}
        self.listing_status: int | None = None  # answer every listing with this error
        self.sizes_listed = True
        self.released = threading.Event()  # ends every hanging answer
        self._hub = _listen(self, "hub")
        self._cdn = _listen(self, "cdn")

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening: from now on connections are refused."""
        self.released.set()
        for server in (self._hub, self._cdn):
            server.shutdown()
            server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._hub.server_address[1]}"

    @property
    def cdn(self) -> str:
        return f"http://127.0.0.1:{self._cdn.server_address[1]}"

    def environment(self, home: Path, **extra: str) -> dict[str, str]:
        """Environment of a process that knows this Hub only, with its cache under `home`/hf."""
        inherited = ("PATH", "PYTHONPATH", "SYSTEMROOT", "TMPDIR", "LD_LIBRARY_PATH")
        env = {key: os.environ[key] for key in inherited if key in os.environ}
        env.update({k: v for k, v in os.environ.items() if k.startswith(("COV_", "COVERAGE_"))})
        env.update(HOME=str(home), HF_HOME=str(home / "hf"), HF_ENDPOINT=self.endpoint)
        env.update(HF_HUB_DISABLE_TELEMETRY="1", NO_PROXY="*", no_proxy="*")
        return {**env, **extra}

    def add_repo(
        self, repo_id: str, files: Path | dict[str, bytes], gated: bool = False, extra: dict[str, bytes] | None = None
    ) -> str:
        """Commit a folder (or name -> bytes) to `main`; returns the commit's sha."""
        if isinstance(files, Path):
            found = sorted(path for path in files.rglob("*") if path.is_file())
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in found}
        stored = {name: StoredFile.of(name, c) for name, c in {**files, **(extra or {})}.items()}
        repo = self.repos.setdefault(repo_id, Repo())
        seed = repr([repo_id, len(repo.commits), sorted((n, f.etag) for n, f in stored.items())])
        sha = hashlib.sha1(seed.encode()).hexdigest()
        repo.commits[sha] = stored
        repo.refs["main"] = sha
        repo.gated = gated
        return sha

    def file(self, repo_id: str, name: str, revision: str = "main") -> StoredFile:
        repo = self.repos[repo_id]
        return repo.commits[repo.refs.get(revision, revision)][name]

    def cut(self, name: str, after: int, times: int | None = 1, *, reset: bool = False) -> None:
        """Drop the connection after `after` bytes of an answer (`reset`: with a TCP reset)."""
        self.fault(name, "reset" if reset else "cut", after, times)

    def fail(self, name: str, status: int, times: int | None = 1) -> None:
        """Answer with an HTTP error."""
        self.fault(name, "status", 0, times, status)

    def fault(self, name: str, kind: str, after: int = 0, times: int | None = None, status: int = 503) -> None:
        self.faults.setdefault(name, []).append(Fault(kind, after, times, status))

    def take_fault(self, name: str) -> Fault | None:
        for fault in self.faults.get(name, []):
            if fault.times is None:
                return fault
            if fault.times > 0:
                fault.times -= 1
                return fault
        return None

    def contents_of(self, name: str) -> list[Request]:
        """The `GET` requests that were answered with content of the file `name`, in order."""
        return [r for r in self.requests if r.method == "GET" and r.sent and r.path.endswith(name)]


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    hub: HubServer
    role: str

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that go away, which some tests make them do."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def _listen(hub: HubServer, role: str) -> _Listener:
    server = _Listener(("127.0.0.1", 0), _Handler)
    server.hub, server.role = hub, role
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return server


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Listener

    def log_message(self, format: str, *args: object) -> None:  # the tests read `requests`
        return

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path, hub = unquote(url.path), self.server.hub
        authorization = self.headers.get("Authorization")
        known = authorization == f"Bearer {TOKEN}"
        self.request_seen = Request(self.server.role, self.command, path, self.headers.get("Range"), known)
        hub.requests.append(self.request_seen)
        if authorization is not None and not self.request_seen.authorized:
            self._error(401, message="Invalid credentials in Authorization header")
        elif self.server.role == "cdn" and not path.startswith("/lfs/"):
            self._send(200, b"<html>Welcome to our free network</html>", {})
        elif self.server.role == "cdn":
            sha256, name = path.removeprefix("/lfs/").split("/", 1)
            found = (f for r in hub.repos.values() for c in r.commits.values() for f in c.values())
            self._send_file(name, next(f for f in found if f.sha256 == sha256), {})
        elif path.startswith("/api/models/"):
            self._answer_listing(path.removeprefix("/api/models/"), parse_qs(url.query))
        elif "/resolve/" in path:
            self._answer_resolve(*path[1:].split("/resolve/", 1))
        else:
            self._error(404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """What an upload asks for: a new repository, how each file is to come, where large ones go, and the commit."""
        path, hub = unquote(urlsplit(self.path).path), self.server.hub
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        self.request_seen = Request(self.server.role, self.command, path, None, known)
        hub.requests.append(self.request_seen)
        if not known:
            return self._error(401, message="Invalid username or password.")
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo_id = f"{asked['organization']}/{asked['name']}"
            if repo_id not in hub.repos:
                hub.add_repo(repo_id, {".gitattributes": b""})
            return self._json({"url": f"{hub.endpoint}/{repo_id}"})
        if path == "/api/validate-yaml":
            has_header = json.loads(body)["content"].startswith("---\n")
            return self._json({"warnings": [] if has_header else [{"message": "empty metadata"}]})
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = ["lfs" if name.endswith(LFS_SUFFIXES) else "regular" for name in names]
            told = [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in zip(names, modes, strict=True)]
            return self._json({"files": told})
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            places = [{"upload": {"href": f"{hub.cdn}/upload/{each['oid']}"}} for each in objects]
            found = [{**each, "actions": place} for each, place in zip(objects, places, strict=True)]
            return self._json({"transfer": "basic", "objects": found})
        repo_id = path.removeprefix("/api/models/").partition("/commit/")[0]
        sha = self._commit(repo_id, [json.loads(line) for line in body.splitlines()])
        return self._json({"commitUrl": f"{hub.endpoint}/{repo_id}/commit/{sha}", "commitOid": sha})

    def _commit(self, repo_id: str, operations: list[dict[str, Any]]) -> str:
        repo, hub = self.server.hub.repos[repo_id], self.server.hub
        files = {name: file.content for name, file in repo.commits[repo.refs["main"]].items()}
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = hub.uploads[value["oid"]]
        return hub.add_repo(repo_id, files)

    def do_PUT(self) -> None:
        """A large file, sent where `objects/batch` said."""
        self.request_seen = Request(self.server.role, self.command, self.path, None, False)
        content = self.rfile.read(int(self.headers["Content-Length"]))
        name = self.path.removeprefix("/upload/")
        if hashlib.sha256(content).hexdigest() != name:
            return self._error(400, message="the content is not what was announced")
        self.server.hub.uploads[name] = content
        return self._send(200, b"", {})

    def _answer_listing(self, path: str, query: dict[str, list[str]]) -> None:
        hub = self.server.hub
        is_tree = "/tree/" in path
        repo_id, _, rest = path.partition("/tree/" if is_tree else "/revision/")
        repo_id, is_check = repo_id.removesuffix("/auth-check"), repo_id.endswith("/auth-check")
        repo = hub.repos.get(repo_id)
        if hub.listing_status is not None:
            return self._error(hub.listing_status)
        if repo is None:
            return self._error(404, "RepoNotFound", "Repository not found")
        if is_check:
            return self._refuse_gated(repo_id) if self._is_closed(repo) else self._json({})
        sha = repo.commit_of(rest or "main")
        if sha is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {rest}")
        if is_tree:
            return self._json([f.tree_entry(n) for n, f in sorted(repo.commits[sha].items())])
        siblings = [f.listing(name) for name, f in sorted(repo.commits[sha].items())]
        if "blobs" not in query or not hub.sizes_listed:
            siblings = [{"rfilename": entry["rfilename"]} for entry in siblings]
        gated = "manual" if repo.gated else False
        return self._json({"id": repo_id, "sha": sha, "gated": gated, "siblings": siblings})

    def _answer_resolve(self, repo_id: str, rest: str) -> None:
        hub = self.server.hub
        repo = hub.repos.get(repo_id)
        if repo is None:
            return self._error(404, "RepoNotFound", "Repository not found")
        if self._is_closed(repo):
            return self._refuse_gated(repo_id)
        revision, _, name = rest.partition("/")
        sha = repo.commit_of(revision)
        if sha is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if name not in repo.commits[sha]:
            return self._error(404, "EntryNotFound", "Entry not found")
        file = repo.commits[sha][name]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{file.etag}"'}
        if not file.lfs:
            return self._send_file(name, file, headers)
        linked = {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
        where = {"X-Repo-Commit": sha, "Location": f"{hub.cdn}/lfs/{file.sha256}/{name}"}
        return self._send(302, b"", linked | where)

    def _is_closed(self, repo: Repo) -> bool:
        return repo.gated and not self.request_seen.authorized

    def _refuse_gated(self, repo_id: str) -> None:
        message = f"Access to model {repo_id} is restricted. You must be authenticated."
        self._error(401, "GatedRepo", message)

    def _send_file(self, name: str, file: StoredFile, headers: dict[str, str]) -> None:
        fault = self.server.hub.take_fault(name) if self.command == "GET" else None
        content, kind = file.content, fault.kind if fault else None
        if fault is not None and kind == "status":
            return self._error(fault.status)
        if kind == "corrupt":
            content = bytes([content[0] ^ 0xFF]) + content[1:]
        if fault is not None and kind == "short":
            content = content[: fault.after]
        start, status = 0, 200
        if self.request_seen.range is not None:
            start, status = int(self.request_seen.range.removeprefix("bytes=").split("-")[0]), 206
            if start >= len(content):
                return self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        headers.update({"Accept-Ranges": "bytes", "ETag": f'"{file.etag}"'})
        limit = fault.after if fault is not None and kind in ("cut", "reset", "hang") else None
        self._send(status, content[start:], headers, limit)
        if kind == "hang":
            self.server.hub.released.wait()
        if kind == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if limit is not None:
            self.close_connection = True
        return None

    def _send(self, status: int, body: bytes, headers: dict[str, str], limit: int | None = None) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        view = memoryview(body)[: len(body) if limit is None else limit]
        sent = self.request_seen.sent
        try:
            for start in range(0, len(view), 1 << 18):
                self.wfile.write(view[start : start + (1 << 18)])
                if status in (200, 206):
                    sent.append(len(view[start : start + (1 << 18)]))
            self.wfile.flush()
        except (BrokenPipeError, ConnectionResetError):  # the client went away, as some tests want
            self.close_connection = True

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str | None = None, message: str | None = None) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        self._send(status, b"", {key: value for key, value in headers.items() if value})


def serve_published_layout(
    tmp_path: Path, golden: Path, tokenizer_model: Path | None = None
) -> tuple[HubServer, dict[str, str]]:
    """Serve the tiny golden LoRA layout and its base under the published names, with a tokenizer if one is given.

    Returns the running server, and the environment of a process that knows no other Hub and caches under `tmp_path`.
    """
    server = HubServer()
    tokenizer = {} if tokenizer_model is None else {"tokenizer.model": tokenizer_model.read_bytes()}
    server.add_repo(BASE_REPO, golden / "base", extra=tokenizer)
    server.add_repo(LORA_REPO, golden / "official_lora_layout")
    return server, server.environment(tmp_path)
