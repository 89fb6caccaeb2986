"""A Hugging Face hub on this machine: the part of its HTTP interface that pushing and loading weights speaks.

Repositories with commits and branches; small files come inside a commit, .safetensors by way of LFS, as on the hub
itself, from where they are served through a redirect. What is asked without the token is refused.
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


class HubServer(ThreadingHTTPServer):
    """Listens on a free port of localhost; `requests` are the lines "METHOD path" that came in."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.commits: dict[str, dict[str, dict[str, str]]] = {}  # repository: commit: path: SHA-256
        self.branches: dict[str, dict[str, str]] = {}  # repository: branch: commit
        self.private: dict[str, bool] = {}
        self.messages: dict[str, str] = {}  # of commits
        self.blobs: dict[str, bytes] = {}
        self.large: set[str] = set()
        self.requests: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def files(self, repository: str, revision: str) -> dict[str, bytes]:
        """What a commit or branch holds."""
        commit = self.branches[repository].get(revision, revision)
        return {path: self.blobs[sha] for path, sha in self.commits[repository][commit].items()}

    def commit(self, repository: str, branch: str, files: dict[str, str], message: str) -> str:
        """Puts a commit at the tip of a branch."""
        oid = hashlib.sha1(json.dumps([repository, branch, files, message, len(self.messages)]).encode()).hexdigest()
        self.commits[repository][oid], self.branches[repository][branch] = files, oid
        self.messages[oid] = message
        return oid


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self._body()
        self.server.requests.append(f"{self.command} {path}")
        if path.startswith("/lfs/"):  # addresses that are signed on the hub itself, so without the token
            return self._blob(path.removeprefix("/lfs/"), body)
        if self.headers.get("authorization") != f"Bearer {TOKEN}":
            return self._fail(401, "RepoNotFound", "Invalid username or password.")
        for pattern, method in _ROUTES.items():
            if (found := re.fullmatch(pattern, f"{self.command} {path}")) is not None:
                return method(self, *found.groups(), body=body)
        return self._fail(404, "EntryNotFound", f"no such address: {self.command} {path}")

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("content-length", 0)))

    def _send(self, code: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, content: Any, code: int = 200) -> None:
        self._send(code, json.dumps(content).encode(), Content_Type="application/json")

    def _fail(self, code: int, kind: str, message: str, **headers: str) -> None:
        self._send(code, json.dumps({"error": message}).encode(), X_Error_Code=kind, X_Error_Message=message, **headers)

    def _blob(self, sha: str, body: bytes) -> None:
        if self.command == "PUT":
            if hashlib.sha256(body).hexdigest() != sha:
                return self._fail(400, "BadRequest", "the content is not that of the SHA-256")
            self.server.blobs[sha] = body
            return self._send(200)
        return self._send(200, self.server.blobs[sha], ETag=f'"{sha}"')

    # --- The hub's own addresses ---
    def _create(self, *, body: bytes) -> None:
        asked = json.loads(body)
        organisation = asked.get("organization")
        name = f"{organisation}/{asked['name']}" if organisation else asked["name"]
        address = {"url": f"{self.server.address}/{name}", "name": name, "id": name}
        if name in self.server.commits:
            return self._json({"error": "You already created this model repo", **address}, 409)
        self.server.commits[name], self.server.branches[name] = {}, {}
        self.server.private[name] = bool(asked.get("private")) or asked.get("visibility") == "private"
        self.server.blobs[hashlib.sha256(b"").hexdigest()] = b""
        self.server.commit(name, "main", {".gitattributes": hashlib.sha256(b"").hexdigest()}, "initial commit")
        return self._json(address)

    def _branch(self, repository: str, branch: str, *, body: bytes) -> None:
        branches = self.server.branches[repository]
        if branch in branches:
            return self._fail(409, "Conflict", f"the branch {branch} is there already")
        branches[branch] = branches[(json.loads(body) if body else {}).get("startingPoint", "main")]
        return self._json({})

    def _validate(self, *, body: bytes) -> None:
        fits = json.loads(body)["content"].startswith("---\n")
        self._json({"errors": [] if fits else [{"message": "no metadata"}], "warnings": []}, 200 if fits else 400)

    def _preupload(self, repository: str, revision: str, *, body: bytes) -> None:
        if revision not in self.server.branches[repository]:
            return self._fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        return self._json({"files": files})

    def _batch(self, repository: str, *, body: bytes) -> None:
        objects = []
        for item in json.loads(body)["objects"]:
            upload = {"upload": {"href": f"{self.server.address}/lfs/{item['oid']}"}}
            objects.append({**item, **({} if item["oid"] in self.server.blobs else {"actions": upload})})
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, repository: str, revision: str, *, body: bytes) -> None:
        if revision not in self.server.branches[repository]:
            return self._fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = dict(self.server.commits[repository][self.server.branches[repository][revision]])
        message = ""
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                content = base64.b64decode(value["content"])
                files[value["path"]] = hashlib.sha256(content).hexdigest()
                self.server.blobs[files[value["path"]]] = content
            elif line["key"] == "lfsFile":
                assert value["oid"] in self.server.blobs, "committed before it was uploaded"
                files[value["path"]] = value["oid"]
                self.server.large.add(value["oid"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = self.server.commit(repository, revision, files, message)
        return self._json({"commitUrl": f"{self.server.address}/{repository}/commit/{oid}", "commitOid": oid})

    def _tree(self, repository: str, revision: str, *, body: bytes) -> None:
        commit = self.server.branches[repository].get(revision, revision)
        if commit not in self.server.commits[repository]:
            return self._fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = self.server.commits[repository][commit].items()
        return self._json(
            [{"type": "file", "path": p, "oid": sha, "size": len(self.server.blobs[sha])} for p, sha in files]
        )

    def _info(self, repository: str, revision: str = "main", *, body: bytes) -> None:
        if repository not in self.server.commits:
            return self._fail(404, "RepoNotFound", "Repository not found")
        commit = self.server.branches[repository].get(revision, revision)
        if commit not in self.server.commits[repository]:
            return self._fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        siblings = [{"rfilename": path} for path in self.server.commits[repository][commit]]
        return self._json({"id": repository, "sha": commit, "siblings": siblings, "tags": []})

    def _resolve(self, repository: str, revision: str, path: str, *, body: bytes) -> None:
        if repository not in self.server.commits:
            return self._fail(404, "RepoNotFound", "Repository not found")
        commit = self.server.branches[repository].get(revision, revision)
        if commit not in self.server.commits[repository]:
            return self._fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        sha = self.server.commits[repository][commit].get(path)
        if sha is None:
            return self._fail(404, "EntryNotFound", "Entry not found", X_Repo_Commit=commit)
        told = {"X_Repo_Commit": commit, "ETag": f'"{sha}"'}
        if sha in self.server.large:
            size = str(len(self.server.blobs[sha]))
            told |= {"X_Linked_ETag": f'"{sha}"', "X_Linked_Size": size}
            # Another host, as on the hub itself: the client follows redirects within one by itself.
            elsewhere = self.server.address.replace("127.0.0.1", "localhost")
            return self._send(302, Location=f"{elsewhere}/lfs/{sha}", **told)
        return self._send(200, self.server.blobs[sha], **told)


_REPO = r"([\w.-]+/[\w.-]+)"
_ROUTES = {
    r"POST /api/repos/create": _Handler._create,
    r"POST /api/validate-yaml": _Handler._validate,
    rf"POST /api/models/{_REPO}/branch/(.+)": _Handler._branch,
    rf"POST /api/models/{_REPO}/preupload/(.+)": _Handler._preupload,
    rf"POST /{_REPO}\.git/info/lfs/objects/batch": _Handler._batch,
    rf"POST /api/models/{_REPO}/commit/(.+)": _Handler._commit,
    rf"GET /api/models/{_REPO}/tree/([^/]+)": _Handler._tree,
    rf"GET /api/models/{_REPO}/revision/([^/]+)": _Handler._info,
    rf"GET /api/models/{_REPO}": _Handler._info,
    rf"(?:GET|HEAD) /{_REPO}/resolve/([^/]+)/(.+)": _Handler._resolve,
}
