"""A stand-in for the Hugging Face hub: the requests of its HTTP interface that an upload and a download make, as
huggingface_hub makes them. It is not the hub, and knows nothing but what is here.

It keeps repositories in memory, refuses a commit of files of Git LFS whose bytes it has not got, says which
files .gitignore names, and answers requests that a test names with errors. Bytes go to a storage of their own, at
another address, which takes no token.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_SENTINELofthetests"
LFS_BYTES = 4096
"""Files of more bytes go by Git LFS (here; there it is some kinds of file as well)."""
PART_BYTES = 100_000
"""Files of more bytes than this go in parts of so many."""
ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


@dataclass
class Fault:
    """Answers `times` requests, whose "METHOD path" the pattern finds, with a status after some seconds; 0 = the
    connection is cut."""

    pattern: str
    status: int
    times: int = 1
    message: str = ""
    seconds: float = 0.0


@dataclass
class Repository:
    """branches: name -> (commit, files). history: messages of commits, oldest first."""

    private: bool
    branches: dict[str, tuple[str, dict[str, bytes]]] = field(default_factory=dict)
    history: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        self.history.append(message)
        name = hashlib.sha1(f"{len(self.history)} {message}".encode()).hexdigest()
        self.branches[branch] = name, files
        return name


class Hub:
    """`with Hub() as hub:` runs it at hub.url, and its storage at hub.storage_url. role: of the token."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.lfs: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.role = "write"
        self.lock = threading.Lock()
        hub = self

        class Handler(_Handler):
            owner = hub

        self.server, self.storage = (ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2))
        self.url, self.storage_url = (f"http://127.0.0.1:{one.server_port}" for one in (self.server, self.storage))
        servers = (self.server, self.storage)
        self._threads = [threading.Thread(target=one.serve_forever, args=(0.02,), daemon=True) for one in servers]

    def __enter__(self) -> Hub:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for server, thread in zip((self.server, self.storage), self._threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()

    def make(self, name: str, *, private: bool = True, files: dict[str, bytes] | None = None) -> Repository:
        """A repository, as the hub makes one."""
        made = self.repositories[name] = Repository(private)
        made.commit("main", {".gitattributes": ATTRIBUTES, **(files or {})}, "initial commit")
        return made

    def files(self, name: str, branch: str = "main") -> dict[str, bytes]:
        """Files of a branch, without what every repository begins with."""
        return {path: data for path, data in self.repositories[name].branches[branch][1].items() if path[0] != "."}

    def said(self, pattern: str) -> list[str]:
        """The requests that a pattern finds, as "METHOD path"."""
        return [line for line, _ in self.requests if re.search(pattern, line)]


class _Handler(BaseHTTPRequestHandler):
    owner: Hub
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # an answer is one packet
    disable_nagle_algorithm = True

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_PUT = do_HEAD = do_GET

    def _answer(self) -> None:
        data = self._body()
        path = unquote(urlsplit(self.path).path)
        line = f"{self.command} {path}"
        hub = self.owner
        with hub.lock:
            hub.requests.append((f"{self.command} {unquote(self.path)}", dict(self.headers)))
            fault = next((one for one in hub.faults if one.times and re.search(one.pattern, line)), None)
            if fault is not None:
                fault.times -= 1
        if fault is not None:
            return self._fail(fault)
        with hub.lock:
            token, stored = self.headers.get("Authorization"), self.server is hub.storage
            if stored and token is not None:
                return self._send(400, {"error": "two ways to sign"}, "the storage was sent a token")
            if not (stored or path.startswith("/complete/")) and token != f"Bearer {TOKEN}":
                return self._send(401, {"error": "no"}, "Invalid credentials in Authorization header")
            for method, pattern, handle in STORAGE if stored else ROUTES:
                found = re.fullmatch(pattern, path)
                if found and method == ("GET" if self.command == "HEAD" else self.command):
                    return handle(self, data, **found.groupdict())
            self._send(404, {"error": f"the stand-in knows no {line}"}, "unknown")

    def _fail(self, fault: Fault) -> None:
        time.sleep(fault.seconds)
        if fault.status == 0:
            self.close_connection = True
            self.connection.close()
            return
        self._send(fault.status, {"error": fault.message}, fault.message)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _send(self, status: int, body: Any, message: str = "", code: str = "", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        said = {"X-Error-Message": message, "X-Error-Code": code}
        for name, value in {
            "Content-Length": str(len(data)),
            **{k: v for k, v in said.items() if v},
            **headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _branch(self, repo: str, branch: str) -> tuple[str, dict[str, bytes]] | None:
        """(commit, files) of a branch or commit; None after an answer that there is none."""
        found = self.owner.repositories.get(repo)
        if found is None:
            self._send(404, {"error": "Repository not found"}, "Repository not found", "RepoNotFound")
            return None
        if branch in found.branches:
            return found.branches[branch]
        by_commit = {commit: (commit, files) for commit, files in found.branches.values()}
        if branch not in by_commit:
            self._send(404, {"error": "Invalid rev id"}, "Invalid rev id", "RevisionNotFound")
        return by_commit.get(branch)

    def whoami(self, data: bytes) -> None:
        self._send(200, {"type": "user", "name": "someone", "auth": {"accessToken": {"role": self.owner.role}}})

    def create(self, data: bytes) -> None:
        asked = json.loads(data)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.owner.repositories:
            return self._send(409, {"error": "You already created this model repo", "url": f"{self.owner.url}/{name}"})
        self.owner.make(name, private=asked.get("visibility") == "private" or bool(asked.get("private")))
        self._send(200, {"url": f"{self.owner.url}/{name}", "name": name})

    def info(self, data: bytes, repo: str, branch: str = "main") -> None:
        if found := self._branch(repo, branch or "main"):
            blobs = "blobs" in urlsplit(self.path).query
            siblings = [_sibling(path, content) if blobs else {"rfilename": path} for path, content in found[1].items()]
            private = self.owner.repositories[repo].private
            self._send(200, {"id": repo, "sha": found[0], "private": private, "siblings": siblings})

    def make_branch(self, data: bytes, repo: str, branch: str) -> None:
        if found := self._branch(repo, "main"):
            if branch in self.owner.repositories[repo].branches:
                return self._send(409, {"error": "Reference already exists"})
            self.owner.repositories[repo].branches[branch] = found
            self._send(200, {})

    def tree(self, data: bytes, repo: str, branch: str) -> None:
        if found := self._branch(repo, branch):
            self._send(200, [_entry(path, content) for path, content in found[1].items()])

    def resolve(self, data: bytes, repo: str, branch: str, path: str) -> None:
        if found := self._branch(repo, branch):
            if path not in found[1]:
                return self._send(404, b"", "Entry not found", "EntryNotFound")
            named = {"ETag": f'"{_oid(found[1][path])}"', "X-Repo-Commit": found[0]}
            self._send(200, found[1][path], **named)

    def validate(self, data: bytes) -> None:
        front = re.match(r"---\n(.*?\n)---\n", json.loads(data)["content"], re.S)
        facts = yaml.safe_load(front[1]) if front else {}
        if str(facts.get("license", "mit")) not in ("mit", "apache-2.0"):
            return self._send(
                400, {"errors": [{"message": '"license" must be one of mit, apache-2.0'}], "warnings": []}
            )
        self._send(200, {"errors": [], "warnings": []})

    def preupload(self, data: bytes, repo: str, branch: str) -> None:
        if found := self._branch(repo, branch):
            ignored = found[1].get(".gitignore", b"").decode().split()
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["size"] > LFS_BYTES else "regular",
                    "shouldIgnore": _is_ignored(file["path"], ignored),
                    "oid": _oid(found[1][file["path"]]) if file["path"] in found[1] else None,
                }
                for file in json.loads(data)["files"]
            ]
            self._send(200, {"files": files})

    def batch(self, data: bytes, repo: str) -> None:
        objects = []
        for asked in json.loads(data)["objects"]:
            oid, size = asked["oid"], asked["size"]
            answer: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.owner.lfs:
                href = f"{self.owner.storage_url}/lfs/{oid}"
                header: dict[str, str] = {}
                if size > PART_BYTES:
                    count = -(-size // PART_BYTES)
                    header = {"chunk_size": str(PART_BYTES)}
                    header |= {str(number): f"{href}/{number}" for number in range(1, count + 1)}
                    href = f"{self.owner.url}/complete/{oid}"
                answer["actions"] = {"upload": {"href": href, "header": header}}
            objects.append(answer)
        self._send(200, {"transfer": "multipart", "objects": objects})

    def put(self, data: bytes, oid: str, part: str = "") -> None:
        if part:
            self.owner.parts[oid, int(part)] = data
            return self._send(200, b"", ETag=f'"{part}"')
        self._store(oid, data)

    def complete(self, data: bytes, oid: str) -> None:
        parts = json.loads(data)["parts"]
        self._store(oid, b"".join(self.owner.parts.pop((oid, part["partNumber"])) for part in parts))

    def _store(self, oid: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != oid:
            return self._send(400, {"error": "wrong hash"}, "wrong hash")
        self.owner.lfs[oid] = data
        self._send(200, {})

    def commit(self, data: bytes, repo: str, branch: str) -> None:
        found = self._branch(repo, branch)
        if found is None:
            return
        head, *lines = [json.loads(line) for line in data.splitlines()]
        if head["value"].get("parentCommit", found[0]) != found[0]:
            return self._send(412, {"error": "A commit has happened since. Please refresh and try again."})
        files = dict(found[1])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.owner.lfs:
                    return self._send(400, {"error": "LFS pointer to nothing"}, "LFS pointer pointed to nothing")
                files[value["path"]] = self.owner.lfs[value["oid"]]
            else:
                del files[value["path"]]
        oid = self.owner.repositories[repo].commit(branch, files, head["value"]["summary"])
        self._send(200, {"commitOid": oid, "commitUrl": f"{self.owner.url}/{repo}/commit/{oid}"})


def _oid(data: bytes) -> str:
    if len(data) > LFS_BYTES:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _is_ignored(path: str, patterns: list[str]) -> bool:
    """Whether .gitignore names a file, by its path or its name."""
    return any(fnmatch(path, pattern) or fnmatch(path.rpartition("/")[2], pattern) for pattern in patterns)


def _sibling(path: str, data: bytes) -> dict[str, Any]:
    """A file as repo_info tells of it: an upload asks for that."""
    entry: dict[str, Any] = {"rfilename": path, "size": len(data), "blobId": _oid(data)}
    if len(data) > LFS_BYTES:
        entry |= {"blobId": "0" * 40, "lfs": {"sha256": _oid(data), "size": len(data), "pointerSize": 130}}
    return entry


def _entry(path: str, data: bytes) -> dict[str, Any]:
    """A file as list_repo_tree tells of it: a download asks for that."""
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": _oid(data)}
    if len(data) > LFS_BYTES:
        entry |= {"oid": "0" * 40, "lfs": {"oid": _oid(data), "size": len(data), "pointerSize": 130}}
    return entry


REPO = r"(?P<repo>[^/]+/[^/]+)"
ROUTES: list[tuple[str, str, Any]] = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create),
    ("GET", f"/api/models/{REPO}", _Handler.info),
    ("GET", f"/api/models/{REPO}/revision/(?P<branch>.+)", _Handler.info),
    ("POST", f"/api/models/{REPO}/branch/(?P<branch>.+)", _Handler.make_branch),
    ("GET", f"/api/models/{REPO}/tree/(?P<branch>.+)", _Handler.tree),
    ("GET", rf"/{REPO}/resolve/(?P<branch>[^/]+)/(?P<path>.+)", _Handler.resolve),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("POST", f"/api/models/{REPO}/preupload/(?P<branch>.+)", _Handler.preupload),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    ("POST", "/complete/(?P<oid>[0-9a-f]{64})", _Handler.complete),
    ("POST", f"/api/models/{REPO}/commit/(?P<branch>.+)", _Handler.commit),
]
STORAGE: list[tuple[str, str, Any]] = [
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", _Handler.put),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})/(?P<part>\d+)", _Handler.put),
]
