"""A Hugging Face hub on this machine: the part of its HTTP interface that pushing and loading weights speaks.

Repositories with commits and branches, whose files come inside a commit. What is asked without the token is refused.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_this_test"
REPO = r"([\w.-]+/[\w.-]+)"


class HubServer(ThreadingHTTPServer):
    """Listens on a free port of localhost."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.branches: dict[str, dict[str, str]] = {}  # repository: branch: commit
        self.commits: dict[str, dict[str, bytes]] = {}  # commit: path: content
        self.messages: dict[str, str] = {}  # of commits
        self.private: dict[str, bool] = {}
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def files(self, repository: str, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches[repository][revision]]


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.headers.get("authorization") != f"Bearer {TOKEN}":
            return self._fail(401, "RepoNotFound")
        for pattern, method in _ROUTES.items():
            if (found := re.fullmatch(pattern, f"{self.command} {path}")) is not None:
                return method(self, body, *found.groups())
        return self._fail(404, "EntryNotFound")

    do_HEAD = do_POST = do_GET

    def _send(self, content: bytes, code: int = 200, **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, **content: Any) -> None:
        self._send(json.dumps(content).encode(), Content_Type="application/json")

    def _fail(self, code: int, kind: str, **headers: str) -> None:
        self._send(json.dumps({"error": kind}).encode(), code, X_Error_Code=kind, X_Error_Message=kind, **headers)

    # --- The hub's own addresses ---
    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
        if name not in self.server.branches:
            self.server.branches[name], self.server.commits[name] = {"main": name}, {}
            self.server.private[name] = bool(asked.get("private")) or asked.get("visibility") == "private"
        self._json(url=f"{self.server.address}/{name}", name=name, id=name)

    def _branch(self, body: bytes, repository: str, branch: str) -> None:
        branches = self.server.branches[repository]
        branches.setdefault(branch, branches["main"])
        self._json()

    def _preupload(self, body: bytes, repository: str, branch: str) -> None:
        paths = [file["path"] for file in json.loads(body)["files"]]
        self._json(files=[{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths])

    def _commit(self, body: bytes, repository: str, branch: str) -> None:
        lines, oid = [json.loads(line) for line in body.splitlines()], hashlib.sha1(body).hexdigest()
        added = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines[1:]}
        self.server.commits[oid] = self.server.files(repository, branch) | added
        self.server.branches[repository][branch] = oid
        self.server.messages[oid] = lines[0]["value"]["summary"]
        self._json(commitUrl=f"{self.server.address}/{repository}/commit/{oid}", commitOid=oid)

    def _resolve(self, body: bytes, repository: str, revision: str, path: str) -> None:
        branches = self.server.branches.get(repository)
        commit = (branches or {}).get(revision, revision)
        files = self.server.commits.get(commit)
        if branches is None or files is None or path not in files:
            kind = "RepoNotFound" if branches is None else "RevisionNotFound" if files is None else "EntryNotFound"
            return self._fail(404, kind, X_Repo_Commit=commit)
        self._send(files[path], X_Repo_Commit=commit, ETag=f'"{hashlib.sha256(files[path]).hexdigest()}"')


_ROUTES = {
    r"POST /api/repos/create": _Handler._create,
    r"POST /api/validate-yaml": lambda handler, body: handler._json(),
    rf"POST /api/models/{REPO}/branch/(.+)": _Handler._branch,
    rf"POST /api/models/{REPO}/preupload/(.+)": _Handler._preupload,
    rf"POST /api/models/{REPO}/commit/(.+)": _Handler._commit,
    rf"(?:GET|HEAD) /{REPO}/resolve/([^/]+)/(.+)": _Handler._resolve,
}
