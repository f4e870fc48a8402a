"""The part of the Hugging Face hub's interface that the real client needs, on this machine."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "a" * 32
"""What opens private repositories, and may write."""


@dataclass
class Repository:
    """One repository: its commits, the newest last, each with all files."""

    private: bool = False
    gated: bool = False
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{}])
    messages: list[str] = field(default_factory=list)

    def sha(self, revision: str) -> str | None:
        """Return the hash of a branch or commit."""
        shas = [hashlib.sha1(b"%d" % n).hexdigest() for n in range(len(self.commits))]
        return shas[-1] if revision == "main" else revision if revision in shas else None

    def files(self, sha: str) -> dict[str, bytes]:
        """Return the files of a commit."""
        shas = [hashlib.sha1(b"%d" % n).hexdigest() for n in range(len(self.commits))]
        return self.commits[shas.index(sha)]


class Hub:
    """A server; `repositories` is what is on it, `requests` what it was asked for."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        hub = self

        class Handler(_Handler):
            """Answers for this hub."""

            served = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    @property
    def endpoint(self) -> str:
        """The address."""
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "Hub":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def downloads(self) -> list[str]:
        """Return the files whose content was asked for."""
        asked = [path for verb, path in self.requests if verb == "GET" and "/resolve/" in path]
        return sorted({path.split("/resolve/")[1].partition("/")[2] for path in asked})


class _Handler(BaseHTTPRequestHandler):
    served: Hub

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def do_HEAD(self) -> None:
        self._dispatch()

    def do_GET(self) -> None:
        self._dispatch()

    def do_POST(self) -> None:
        self._dispatch()

    def _dispatch(self) -> None:
        path = unquote(urlsplit(self.path).path)
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b""
        self.served.requests.append((self.command, path))
        routes: list[tuple[str, Callable[..., None]]] = [
            (r"/api/repos/create", self._create),
            (r"/api/validate-yaml", lambda body: self._json({"errors": [], "warnings": []})),
            (r"/api/models/([^/]+/[^/]+)/revision/(.+)", self._info),
            (r"/api/models/([^/]+/[^/]+)()", self._info),
            (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", self._tree),
            (r"/api/models/([^/]+/[^/]+)/preupload/(.+)", self._preupload),
            (r"/api/models/([^/]+/[^/]+)/commit/(.+)", self._commit),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve),
        ]
        for pattern, answer in routes:
            if found := re.fullmatch(pattern, path):
                answer(*found.groups(), body)
                return
        self._refuse(404, "")

    def _trusted(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repository(self, name: str, revision: str) -> tuple[Repository, str] | None:
        repository = self.served.repositories.get(name)
        if repository is None or (repository.private and not self._trusted()):
            self._refuse(404 if self._trusted() else 401, "RepoNotFound")
            return None
        sha = repository.sha(revision or "main")
        if sha is None:
            self._refuse(404, "RevisionNotFound")
            return None
        return repository, sha

    def _info(self, name: str, revision: str, body: bytes) -> None:
        if found := self._repository(name, revision):
            repository, sha = found
            files = [{"rfilename": path} for path in repository.files(sha)]
            self._json({"id": name, "sha": sha, "private": repository.private, "siblings": files})

    def _tree(self, name: str, revision: str, body: bytes) -> None:
        if found := self._repository(name, revision):
            repository, sha = found
            self._json(
                [
                    {"type": "file", "path": p, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                    for p, d in repository.files(sha).items()
                ]
            )

    def _resolve(self, name: str, revision: str, path: str, body: bytes) -> None:
        if not (found := self._repository(name, revision)):
            return
        repository, sha = found
        if repository.gated and not self._trusted():
            self._refuse(403, "GatedRepo")
            return
        data = repository.files(sha).get(path)
        if data is None:
            self._refuse(404, "EntryNotFound")
            return
        etag = f'"{hashlib.sha1(data).hexdigest()}"'
        self._send(200, data, {"X-Repo-Commit": sha, "ETag": etag})

    def _create(self, body: bytes) -> None:
        if not self._trusted():
            self._refuse(403, "")
            return
        wanted = json.loads(body)
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.served.repositories:
            self._send(409, json.dumps({"url": f"{self.served.endpoint}/{name}"}).encode())
            return
        private = wanted.get("visibility") == "private" or wanted.get("private") is True
        self.served.repositories[name] = Repository(private=private)
        self._json({"url": f"{self.served.endpoint}/{name}"})

    def _preupload(self, name: str, revision: str, body: bytes) -> None:
        files = json.loads(body)["files"]
        how = {"uploadMode": "regular", "shouldIgnore": False}
        self._json({"files": [{"path": file["path"], **how} for file in files]})

    def _commit(self, name: str, revision: str, body: bytes) -> None:
        if not (found := self._repository(name, revision)):
            return
        repository, sha = found
        files = dict(repository.files(sha))
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repository.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        repository.commits.append(files)
        new = repository.sha("main")
        url = f"{self.served.endpoint}/{name}/commit/{new}"
        self._json({"success": True, "commitOid": new, "commitUrl": url})

    def _json(self, content: Any) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code} if code else {})

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
