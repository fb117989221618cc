"""A Hub on loopback: the endpoints that huggingface_hub's client uses to push and to load models, over real HTTP.

Repositories are in memory, as commits with whole trees, so that a pinned revision gives what it gave. Large files go
through the LFS protocol (batch, upload, verify, redirect at download), small ones inside the commit, as on the Hub.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


TOKEN, READ_TOKEN, USER = "hf_right", "hf_read", "tester"
_LFS = (".safetensors", ".png", ".bin")
_ROOT = Path(__file__).parents[1]
# The library reads where its Hub is when it is imported. This process imports once what takes seconds, and runs each
# program in a fork of itself.
_CLIENT = """
import json
import os
import sys
import warm

for line in sys.stdin:
    folder, files, code = json.loads(line)
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        for i in (0, 1):
            os.dup2(os.open(files[i], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), i + 1)
        exec(compile(code, "program", "exec"), {"__name__": "__main__"})
        sys.exit()
    print(os.waitpid(child, 0)[1], flush=True)
"""


@dataclass
class Repo:
    """A repository: trees of `path -> bytes` by commit, and commits by branch, newest last."""

    private: bool = False
    trees: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, list[str]] = field(default_factory=lambda: {"main": []})
    messages: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, tree: dict[str, bytes], message: str) -> str:
        payload = json.dumps([branch, message, len(self.trees), sorted((k, git_oid(v)) for k, v in tree.items())])
        commit = hashlib.sha1(payload.encode()).hexdigest()
        self.trees[commit], self.messages[commit] = tree, message
        self.branches[branch].append(commit)
        return commit

    def resolve(self, revision: str) -> str | None:
        return (
            self.branches[revision][-1] if revision in self.branches else revision if revision in self.trees else None
        )


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class LoopbackHub(ThreadingHTTPServer):
    """The server; `dies_at` names where it breaks off, once and for all: `"upload"` or `"commit"`."""

    daemon_threads = True
    request_queue_size = 128  # of five, a client that uploads in five threads loses one where this thread gets no turn

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}  # uploaded, by sha256
        self.requests: list[str] = []
        self.dies_at: str | None = None
        self.dead = False
        self.lock = threading.Lock()
        self.home = tempfile.TemporaryDirectory()
        self.client: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not self.dead:
            super().handle_error(request, client_address)

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """For a process that is to use this Hub, with a home of its own."""
        keep = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("HF_", "HUGGING")) and not key.lower().endswith("_proxy")  # none knows this Hub
        }
        more = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
        # An answer may take longer than the client's ten seconds where others have the machine.
        more |= {"HF_HUB_ETAG_TIMEOUT": "300", "HF_HUB_DOWNLOAD_TIMEOUT": "300"}
        return keep | more | {"HF_HUB_DISABLE_TELEMETRY": "1"} | ({"HF_TOKEN": token} if token else {})

    def run(self, folder: Path, code: str) -> str:
        """What `code` prints where it runs in `folder` with this Hub, in a process of its own."""
        if self.client is None:
            path = os.pathsep.join(map(str, (_ROOT, _ROOT / "tests")))
            env = self.environment(Path(self.home.name)) | {"PYTHONPATH": path}
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self.client = subprocess.Popen([sys.executable, "-c", _CLIENT], env=env, **pipes)
        said = [Path(self.home.name) / name for name in ("stdout", "stderr")]
        self.client.stdin.write(json.dumps([str(folder), [str(path) for path in said], textwrap.dedent(code)]) + "\n")
        self.client.stdin.flush()
        assert self.client.stdout.readline() == "0\n", "".join(path.read_text()[-4000:] for path in said)
        return said[0].read_text()

    def server_close(self) -> None:
        super().server_close()
        if self.client is not None:
            self.client.communicate()
        self.home.cleanup()


@contextmanager
def serve() -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()


class _Dead(Exception):
    pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LoopbackHub

    def log_message(self, *args: Any) -> None:
        pass

    # --- what all requests share

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (_Dead, ConnectionError):
            self.close_connection = True

    def _route(self, method: str) -> None:
        if self.server.dead:
            self.close_connection = True
            return
        path = unquote(urlsplit(self.path).path)
        with self.server.lock:
            self.server.requests.append(f"{method} {path}")
            for verb, pattern, handler in _ROUTES:
                match = re.fullmatch(pattern, path)
                if verb == method and match:
                    if method != "GET":
                        self._read_body(handler.__name__)
                    return handler(self, *match.groups())
        self._error(404, "no such endpoint")

    def do_GET(self) -> None:
        self._route("GET")

    def do_HEAD(self) -> None:
        self._route("GET")

    def do_POST(self) -> None:
        self._route("POST")

    def do_PUT(self) -> None:
        self._route("PUT")

    def _read_body(self, name: str) -> None:
        """Reads the request's body, or half of it where the server is to die."""
        if self.server.dies_at == name:
            self.rfile.read(20)
            self.server.dead = True
            raise _Dead
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            self.body = b"".join(parts)
        else:
            self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, data: Any, status: int = 200) -> None:
        self._send(status, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}) | headers
        self._send(status, json.dumps({"error": message}).encode(), headers)

    # --- who may do what

    @property
    def _token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _may_not_write(self) -> bool:
        if self._token == TOKEN:
            return False
        if self._token == READ_TOKEN:
            self._error(403, "Forbidden: this token has no right to write.")
        else:
            self._error(401, "Invalid credentials in Authorization header" if self._token else "Log in first.")
        return True

    def _repo(self, name: str) -> Repo | None:
        repo = self.server.repos.get(name)
        if self._token not in (None, TOKEN, READ_TOKEN):
            self._error(401, "Invalid credentials in Authorization header")
        elif repo is None or (repo.private and self._token is None):
            self._error(404 if self._token else 401, "Repository not found", "RepoNotFound")
        else:
            return repo
        return None

    def _tree(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        repo = self._repo(name)
        if repo is None:
            return None
        commit = repo.resolve(revision)
        if commit is None:
            self._error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            return None
        return commit, repo.trees[commit]

    # --- endpoints

    def who(self) -> None:
        if not self._may_not_write():
            self._json({"type": "user", "name": USER, "orgs": []})

    def create(self) -> None:
        if self._may_not_write():
            return
        asked = json.loads(self.body)
        name = f"{asked['organization'] or USER}/{asked['name']}"
        if name.split("/")[0] != USER:
            return self._error(403, f"You have no right to make a repository of {asked['organization']}.")
        known = name in self.server.repos
        if not known:
            private = asked.get("visibility") == "private" or asked.get("private") is True
            repo = self.server.repos[name] = Repo(private)
            repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        self._json({"url": f"{self.server.url}/{name}", "name": name}, 409 if known else 200)

    def validate(self) -> None:
        self._json({"errors": [], "warnings": []})

    def info(self, name: str, revision: str | None) -> None:
        if found := self._tree(name, revision or "main"):
            files = [{"rfilename": path} for path in sorted(found[1])]
            private = self.server.repos[name].private
            self._json({"_id": "0", "id": name, "sha": found[0], "private": private, "siblings": files, "tags": []})

    def tree(self, name: str, revision: str, folder: str | None) -> None:
        if found := self._tree(name, revision):
            prefix = f"{folder.strip('/')}/" if folder and folder.strip("/") else ""
            files = [(path, data) for path, data in sorted(found[1].items()) if path.startswith(prefix)]
            if prefix and not files:
                return self._error(404, "Entry not found", "EntryNotFound")
            self._json([{"type": "file", "path": p, "size": len(d), "oid": git_oid(d)} | _lfs(p, d) for p, d in files])

    def branch(self, name: str, branch: str) -> None:
        if self._may_not_write() or (found := self._tree(name, "main")) is None:
            return
        repo = self.server.repos[name]
        if branch in repo.branches:
            return self._error(409, "Reference already exists")
        repo.branches[branch] = [found[0]]
        self._json({})

    def preupload(self, name: str, revision: str) -> None:
        if self._may_not_write() or (found := self._tree(name, revision)) is None:
            return
        files = []
        for asked in json.loads(self.body)["files"]:
            path, old = asked["path"], found[1].get(asked["path"])
            large = path.endswith(_LFS)
            oid = None if old is None else hashlib.sha256(old).hexdigest() if large else git_oid(old)
            files.append(
                {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}
            )
        self._json({"files": files, "commitOid": found[0]})

    def batch(self, name: str) -> None:
        if self._may_not_write() or self._repo(name) is None:
            return
        objects = []
        for asked in json.loads(self.body)["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.server.blobs:
                upload = {"href": f"{self.server.url}/lfs/{asked['oid']}"}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{self.server.url}/lfs/verify"}}
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._error(400, "the content is not what was announced")
        self.server.blobs[oid] = self.body
        self._send(200)

    def verify(self) -> None:
        asked = json.loads(self.body)
        blob = self.server.blobs.get(asked["oid"])
        self._json({}, 200 if blob is not None and len(blob) == asked["size"] else 404)

    def commit(self, name: str, revision: str) -> None:
        if self._may_not_write() or (found := self._tree(name, revision)) is None:
            return
        lines = [json.loads(line) for line in self.body.splitlines()]
        header, tree = lines[0]["value"], dict(found[1])
        if header.get("parentCommit") not in (None, found[0]):
            return self._error(412, "A commit has happened since. Please refresh and try again.")
        for line in lines[1:]:
            path = line["value"]["path"]
            if line["key"] == "file":
                tree[path] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                tree[path] = self.server.blobs[line["value"]["oid"]]
            elif line["key"] == "deletedFile":
                del tree[path]
            else:
                return self._error(400, f"unknown operation {line['key']}")
        commit = self.server.repos[name].commit(revision, tree, header["summary"])
        url = f"{self.server.url}/{name}/commit/{commit}"
        self._json({"success": True, "commitOid": commit, "commitUrl": url, "pullRequestUrl": None})

    def file(self, name: str, revision: str, path: str) -> None:
        if (found := self._tree(name, revision)) is None:
            return
        commit, tree = found
        here = {"X-Repo-Commit": commit}
        if path not in tree:
            return self._error(404, "Entry not found", "EntryNotFound", **here)
        data = tree[path]
        if path.endswith(_LFS):
            digest = hashlib.sha256(data).hexdigest()
            self.server.blobs.setdefault(digest, data)
            linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
            # Storage is another host than the Hub, so the client sends no token there.
            storage = f"http://localhost:{self.server.server_address[1]}/lfs/{digest}"
            return self._send(302, b"", here | linked | {"Location": storage})
        self._send(200, data, here | {"ETag": f'"{git_oid(data)}"', "Content-Length": str(len(data))})

    def download(self, oid: str) -> None:
        if self._token is not None:
            return self._error(400, "a token was sent to the storage")
        data = self.server.blobs[oid]
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if start:
            first = int(start[1])
            return self._send(206, data[first:], {"Content-Range": f"bytes {first}-{len(data) - 1}/{len(data)}"})
        self._send(200, data, {"ETag": f'"{oid}"'})


def _lfs(path: str, data: bytes) -> dict[str, Any]:
    if not path.endswith(_LFS):
        return {}
    return {"lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}}


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    ("GET", r"/api/whoami-v2", _Handler.who),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate),
    ("GET", rf"/api/models/{_NAME}(?:/revision/(.+))?", _Handler.info),
    ("GET", rf"/api/models/{_NAME}/tree/([^/]+)(/.*)?", _Handler.tree),
    ("POST", rf"/api/models/{_NAME}/branch/(.+)", _Handler.branch),
    ("POST", rf"/api/models/{_NAME}/preupload/(.+)", _Handler.preupload),
    ("POST", rf"/api/models/{_NAME}/commit/(.+)", _Handler.commit),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/lfs/([0-9a-f]{64})", _Handler.upload),
    ("POST", r"/lfs/verify", _Handler.verify),
    ("GET", r"/lfs/([0-9a-f]{64})", _Handler.download),
    ("GET", rf"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.file),
]
