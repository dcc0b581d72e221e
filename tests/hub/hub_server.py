"""A Hugging Face Hub on this machine: as much of its HTTP API as huggingface_hub, transformers and diffusers call.

It stands in for the network, not for the client: tests run the real client against it, in processes of their own,
because the client reads the address of the Hub when it is imported.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_owner"
_LARGE = (".safetensors", ".png", ".jpg")  # what a new repository's .gitattributes gives to LFS


@dataclass
class Repository:
    """A model, or a Space: its commits, each with the whole content, and the names of some of them."""

    private: bool = False
    commits: dict[str, dict[str, StoredFile]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, StoredFile]) -> str:
        """Adds a commit, and moves a branch to it."""
        identity = json.dumps([len(self.commits), sorted((name, file.oid) for name, file in files.items())])
        oid = hashlib.sha1(identity.encode()).hexdigest()
        self.commits[oid] = files
        self.names[branch] = oid
        return oid

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch, a tag or a hash stands for."""
        return self.names.get(revision) or (revision if revision in self.commits else None)


@dataclass
class StoredFile:
    """A file, as a git blob or as a pointer to an LFS object."""

    content: bytes
    is_lfs: bool

    @property
    def oid(self) -> str:
        """What git or LFS calls it."""
        if self.is_lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


class HubServer(ThreadingHTTPServer):
    """The Hub.

    Attributes:
        repositories: The models by name.
        objects: Uploaded LFS objects by hash; kept even if no commit follows.
        uploads: How often each of them was uploaded.
        failing_upload: Which of the coming uploads fails, once; `None` for none.
        requests: Methods and paths of all requests.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.lock = threading.RLock()
        self.clear()

    def clear(self) -> None:
        """Forgets everything."""
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.uploads: Counter[str] = Counter()
        self.failing_upload: int | None = None
        self.requests: list[tuple[str, str]] = []

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.server_port}"

    def page(self, name: str) -> str:
        """Where people look at a repository."""
        return f"{self.url}/{name.replace(':', '/')}"

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """Variables that make a client use this Hub, with a cache of its own."""
        variables = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_ETAG_TIMEOUT": "300",  # on a busy machine, even this Hub may answer late
            "HF_HUB_DOWNLOAD_TIMEOUT": "300",
            "NO_PROXY": "127.0.0.1",
        }
        return {**variables, "HF_TOKEN": token} if token else variables

    def add(self, name: str, files: dict[str, Path], private: bool = False) -> str:
        """Adds a commit with files as if they had been pushed; returns its hash."""
        repository = self.repositories.setdefault(name, Repository(private))
        stored = {path: StoredFile(file.read_bytes(), path.endswith(_LARGE)) for path, file in files.items()}
        return repository.commit("main", stored)

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """The content of a model."""
        repository = self.repositories[name]
        return {path: file.content for path, file in repository.commits[repository.resolve(revision)].items()}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def do_GET(self) -> None:
        self._answer(_GET)

    def do_HEAD(self) -> None:
        self._answer(_GET)

    def do_POST(self) -> None:
        self._answer(_POST)

    def do_PUT(self) -> None:
        self._answer(_PUT)

    def do_DELETE(self) -> None:
        self._answer({})

    def log_message(self, *args: Any) -> None:
        pass

    def _answer(self, routes: dict[str, Any]) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = _plain_path(unquote(urlsplit(self.path).path))
        with self.server.lock:
            self.server.requests.append((self.command, path))
            for pattern, function in routes.items():
                if match := re.fullmatch(pattern, path):
                    return function(self, **match.groupdict())
        return self.send(404, {"error": f"no route {self.command} {path}"})

    @property
    def is_owner(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def json(self) -> Any:
        return json.loads(self.body)

    def send(self, status: int, content: Any = None, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def fail(self, status: int, code: str, message: str) -> None:
        self.send(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    def repository(self, name: str) -> Repository | None:
        """A model that the client may see; otherwise the answer is sent."""
        found = self.server.repositories.get(name)
        if found is None or (found.private and not self.is_owner):
            # As the Hub: whoever is not logged in does not learn whether it exists.
            self.fail(404 if self.is_owner else 401, "RepoNotFound", "Repository not found")
            return None
        return found

    def owned(self, name: str) -> Repository | None:
        """A model that the client may write to; otherwise the answer is sent."""
        if not self.is_owner:
            self.send(401, {"error": "Invalid username or password."})
            return None
        return self.repository(name)

    def commit_of(self, name: str, revision: str) -> tuple[Repository, str] | None:
        repository = self.repository(name)
        if repository is None:
            return None
        oid = repository.resolve(revision)
        if oid is None:
            self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repository, oid


def _create(request: _Handler) -> None:
    if not request.is_owner:
        return request.send(401, {"error": "Invalid username or password."})
    content = request.json()
    name = f"{content.get('organization') or 'owner'}/{content['name']}"
    if content.get("type") == "space":
        if not content.get("sdk"):
            return request.send(400, {"error": "a Space needs an sdk"})
        name = f"spaces:{name}"
    url = request.server.page(name)
    if name in request.server.repositories:
        return request.send(409, {"error": "You already created this repo", "url": url})
    repository = Repository(private=bool(content.get("private")) or content.get("visibility") == "private")
    repository.commit("main", {".gitattributes": StoredFile(b"*.safetensors filter=lfs\n", False)})
    request.server.repositories[name] = repository
    return request.send(200, {"url": url, "name": name, "id": name})


def _validate_card(request: _Handler) -> None:
    content = request.json()["content"]
    errors = [] if content.startswith("---\n") else [{"message": "no metadata"}]
    request.send(200 if not errors else 400, {"errors": errors, "warnings": []})


def _branch(request: _Handler, name: str, branch: str) -> None:
    if (repository := request.owned(name)) is None:
        return
    if branch in repository.names:
        return request.send(409, {"error": "Reference already exists"})
    start = (request.json() or {}).get("startingPoint") or "main"
    repository.names[branch] = repository.resolve(start)
    request.send(201, {})


def _preupload(request: _Handler, name: str, revision: str) -> None:
    if (repository := request.owned(name)) is None:
        return
    stored = repository.commits[repository.resolve(revision)]
    answers = []
    for file in request.json()["files"]:
        answer = {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(_LARGE) else "regular"}
        answers.append(
            {**answer, "shouldIgnore": False, "oid": stored[file["path"]].oid if file["path"] in stored else None}
        )
    request.send(200, {"files": answers})


def _batch(request: _Handler, name: str) -> None:
    if request.owned(name) is None:
        return
    objects = []
    for item in request.json()["objects"]:
        answer = {"oid": item["oid"], "size": item["size"]}
        if item["oid"] not in request.server.objects:
            answer["actions"] = {"upload": {"href": f"{request.server.url}/lfs/{item['oid']}", "header": {}}}
        objects.append(answer)
    request.send(200, {"transfer": "basic", "objects": objects})


def _upload(request: _Handler, oid: str) -> None:
    if request.server.failing_upload is not None:
        request.server.failing_upload -= 1
        if request.server.failing_upload == 0:
            request.server.failing_upload = None
            return request.send(400, {"error": "upload failed"})  # of 5xx, the client would try again by itself
    if hashlib.sha256(request.body).hexdigest() != oid:
        return request.send(400, {"error": "wrong hash"})
    request.server.objects[oid] = request.body
    request.server.uploads[oid] += 1
    request.send(200, {})


def _commit(request: _Handler, name: str, revision: str) -> None:
    if (repository := request.owned(name)) is None:
        return
    files = dict(repository.commits[repository.resolve(revision)])
    for line in request.body.splitlines():
        operation = json.loads(line)
        value = operation["value"]
        if operation["key"] == "file":
            files[value["path"]] = StoredFile(base64.b64decode(value["content"]), False)
        elif operation["key"] == "lfsFile":
            if value["oid"] not in request.server.objects:
                return request.send(400, {"error": f"{value['path']} was not uploaded"})
            files[value["path"]] = StoredFile(request.server.objects[value["oid"]], True)
        elif operation["key"] == "deletedFile":
            files.pop(value["path"])
    oid = repository.commit(revision, files)
    request.send(200, {"commitOid": oid, "commitUrl": f"{request.server.page(name)}/commit/{oid}"})


def _info(request: _Handler, name: str, revision: str | None = None) -> None:
    if (found := request.commit_of(name, revision or "main")) is None:
        return
    repository, oid = found
    siblings = [{"rfilename": path} for path in sorted(repository.commits[oid])]
    content = {"_id": oid, "id": name, "modelId": name, "sha": oid, "private": repository.private, "tags": []}
    request.send(200, {**content, "siblings": siblings, "downloads": 0, "likes": 0})


def _tree(request: _Handler, name: str, revision: str, folder: str | None = None) -> None:
    if (found := request.commit_of(name, revision)) is None:
        return
    repository, oid = found
    entries = []
    for path, file in sorted(repository.commits[oid].items()):
        if folder is None or path.startswith(f"{folder.strip('/')}/"):
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(file.content), "oid": file.oid}
            if file.is_lfs:
                entry["lfs"] = {"oid": file.oid, "size": len(file.content), "pointerSize": 134}
            entries.append(entry)
    request.send(200, entries)


def _refs(request: _Handler, name: str) -> None:
    if (repository := request.repository(name)) is not None:
        branches = [
            {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": oid}
            for branch, oid in repository.names.items()
        ]
        request.send(200, {"branches": branches, "tags": [], "converts": []})


def _resolve(request: _Handler, name: str, revision: str, path: str) -> None:
    if (found := request.commit_of(name, revision)) is None:
        return
    repository, oid = found
    file = repository.commits[oid].get(path)
    if file is None:
        return request.fail(404, "EntryNotFound", "Entry not found")
    headers = {"X-Repo-Commit": oid, "ETag": f'"{file.oid}"', "Accept-Ranges": "bytes"}
    if file.is_lfs:
        headers |= {"X-Linked-Size": str(len(file.content)), "X-Linked-ETag": f'"{file.oid}"'}
    request.send(200, file.content, headers)


def _whoami(request: _Handler) -> None:
    if not request.is_owner:
        return request.send(401, {"error": "Invalid username or password."})
    request.send(200, {"type": "user", "name": "owner", "orgs": [], "auth": {"type": "access_token"}})


def _plain_path(path: str) -> str:
    """The path of a Space as that of a model whose owner has `spaces:` before the name."""
    path = re.sub(r"^/api/spaces/", "/api/models/spaces:", path)
    return re.sub(r"^/spaces/", "/spaces:", path)


_NAME, _REVISION = r"(?P<name>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
_GET = {
    "/api/whoami-v2": _whoami,
    rf"/api/models/{_NAME}": _info,
    rf"/api/models/{_NAME}/refs": _refs,
    rf"/api/models/{_NAME}/revision/{_REVISION}": _info,
    rf"/api/models/{_NAME}/tree/{_REVISION}(?P<folder>/.*)?": _tree,
    rf"/{_NAME}/resolve/{_REVISION}/(?P<path>.+)": _resolve,
}
_POST = {
    "/api/repos/create": _create,
    "/api/validate-yaml": _validate_card,
    rf"/api/models/{_NAME}/branch/(?P<branch>[^/]+)": _branch,
    rf"/api/models/{_NAME}/preupload/{_REVISION}": _preupload,
    rf"/api/models/{_NAME}/commit/{_REVISION}": _commit,
    rf"/{_NAME}\.git/info/lfs/objects/batch": _batch,
}
_PUT = {"/lfs/(?P<oid>[0-9a-f]{64})": _upload}
