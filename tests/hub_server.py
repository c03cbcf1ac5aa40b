"""A Hub on loopback: the part of the Hub's HTTP API that the real `huggingface_hub` client uses.

Commits, branches, tags, pull requests, large files over git-LFS, tokens, private repositories. No
Xet: a client with `hf_xet` needs HF_HUB_DISABLE_XET=1.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

USER, TOKEN, READ_TOKEN = "someone", "hf_write", "hf_read"
RELATIONS = {"adapter", "finetune", "merge", "quantized"}
Files = dict[str, bytes]


class RefusalError(Exception):
    """An error response, worded as the Hub words it."""

    def __init__(self, status: int, message: str, code: str = "", body: Any = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, body


@dataclass
class Repo:
    """One repository: its commits by id, its refs, and who may read it."""

    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, files: Files, message: str = "") -> str:
        """Make `ref` point to a commit of `files`."""
        listing = sorted((path, git_oid(data)) for path, data in files.items())
        text = f"{len(self.commits)} {message} {listing}".encode()
        oid = hashlib.sha1(text, usedforsecurity=False).hexdigest()
        self.commits[oid], self.messages[oid], self.refs[ref] = dict(files), message, oid
        return oid

    def resolve(self, revision: str) -> str:
        """The commit that a branch, tag or commit id refers to."""
        oid = self.refs.get(revision, revision)
        if oid not in self.commits:
            raise RefusalError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid

    def at(self, revision: str) -> Files:
        """The files of a revision."""
        return self.commits[self.resolve(revision)]


@dataclass
class Hub:
    """The server's state, and hooks for tests to make it fail.

    Attributes:
        repos: by `org/name`.
        blobs: large files by SHA-256.
        requests: `METHOD path` of every request, in order.
        on_upload: called with each large file's id and data before it is stored; may raise.
    """

    repos: dict[str, Repo] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    on_upload: Callable[[str, bytes], None] = lambda _oid, _data: None
    url: str = ""


@contextmanager
def serve() -> Iterator[Hub]:
    """Run a hub on a free port of 127.0.0.1 until the block exits."""
    hub = Hub()
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def git_oid(data: bytes) -> str:
    """A file's git object id."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def is_large(path: str) -> bool:
    """Which of the files used here the Hub's default .gitattributes sends to LFS."""
    return path.endswith((".safetensors", ".png"))


class Handler(BaseHTTPRequestHandler):
    """Handles one request: finds the route, answers JSON or bytes, words errors as the Hub does."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    ROUTES = (
        ("POST", r"/api/repos/create", "create_repo"),
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<branch>[^/]+)", "create_branch"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/refs", "list_refs"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)", "tree"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/revision/(?P<revision>[^/]+)", "model_info"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)", "model_info"),
        ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_upload"),
        ("POST", r"/lfs/verify", "lfs_verify"),
        ("HEAD", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "download"),
        ("GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "download"),
    )

    def answer(self) -> None:
        """Route the request."""
        split = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(split.query).items()}
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"{self.command} {split.path}")
        try:
            for method, pattern, name in self.ROUTES:
                found = re.fullmatch(pattern, split.path)
                if method == self.command and found:
                    parts = {key: unquote(value) for key, value in found.groupdict().items()}
                    getattr(self, name)(**parts)
                    return
            raise RefusalError(404, f"No route {self.command} {split.path}")
        except RefusalError as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
            value = refusal.body or {"error": refusal.message}
            self.send(json.dumps(value).encode(), refusal.status, headers)
        except ConnectionAbortedError:  # a test drops the connection
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815

    def send(self, data: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Send bytes."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def json(self, value: Any, headers: dict[str, str] | None = None) -> None:
        """Send JSON."""
        self.send(json.dumps(value).encode(), headers=headers)

    def log_message(self, *_: Any) -> None:
        """Keep test output clean."""

    def token(self) -> str | None:
        """The request's token; an unknown one is rejected."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        if token not in {None, TOKEN, READ_TOKEN}:
            raise RefusalError(401, "Invalid credentials in Authorization header")
        return token

    def may_write(self, repo: str) -> None:
        """Reject users without write access to `repo`."""
        if self.token() is None:
            raise RefusalError(401, "Invalid username or password.")
        if self.token() != TOKEN or repo.split("/")[0] != USER:
            raise RefusalError(403, f"You don't have the rights to write to {repo}")

    def readable(self, repo: str) -> Repo:
        """A repository that exists and that the token can read."""
        found, token = self.hub.repos.get(repo), self.token()
        if found is None or (found.private and token is None):
            raise RefusalError(404 if token else 401, "Repository not found", "RepoNotFound")
        return found

    def whoami(self) -> None:
        """The user a token belongs to."""
        if self.token() is None:
            raise RefusalError(401, "Invalid username or password.")
        self.json({"type": "user", "name": USER, "orgs": []})

    def create_repo(self) -> None:
        """Create a repository with an empty first commit."""
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        self.may_write(name)
        answer = {"url": f"{self.hub.url}/{name}", "name": name, "id": "1"}
        if name in self.hub.repos:
            message = "You already created this model repo"
            raise RefusalError(409, message, body={"error": message, **answer})
        repo = self.hub.repos[name] = Repo(private=asked.get("visibility") == "private")
        repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        self.json(answer)

    def validate_yaml(self) -> None:
        """The parts of the Hub's rules for card metadata that can be checked offline."""
        content = json.loads(self.body)["content"]
        found = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        data = yaml.safe_load(found[1]) if found else {}
        errors: list[str] = []
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", data.get("base_model", "gpt2")):
            errors.append('"base_model" with value is not valid. Use a model id from hf.co/models')
        if data.get("base_model_relation", "adapter") not in RELATIONS:
            errors.append('"base_model_relation" must be one of [adapter, merge, quantized, ...]')
        if not re.fullmatch(r"[a-z0-9.-]+", data.get("license", "mit")):
            errors.append('"license" must be one of [apache-2.0, mit, ...]')
        body = {"errors": [{"message": text} for text in errors], "warnings": []}
        if errors:
            raise RefusalError(400, "Invalid metadata", body=body)
        self.json(body)

    def preupload(self, repo: str, revision: str) -> None:
        """How each file is to be uploaded."""
        if not self.query.get("create_pr"):
            self.may_write(repo)
        files = self.readable(repo).at(revision)
        listed = []
        for asked in json.loads(self.body)["files"]:
            path = asked["path"]
            entry = {"path": path, "shouldIgnore": False}
            entry["uploadMode"] = "lfs" if is_large(path) else "regular"
            if path in files:
                data = files[path]
                large = is_large(path)
                entry["oid"] = hashlib.sha256(data).hexdigest() if large else git_oid(data)
            listed.append(entry)
        self.json({"files": listed})

    def lfs_batch(self, repo: str) -> None:
        """Upload URLs for large files; those already stored need no upload."""
        self.readable(repo)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            entry = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.blobs:
                upload = {"href": f"{self.hub.url}/lfs/{asked['oid']}"}
                entry["actions"] = {
                    "upload": upload,
                    "verify": {"href": f"{self.hub.url}/lfs/verify"},
                }
            objects.append(entry)
        self.json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        """Store a large file whose bytes match its id."""
        self.hub.on_upload(oid, self.body)
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise RefusalError(400, "The file does not match its SHA-256")
        self.hub.blobs[oid] = self.body
        self.send(b"")

    def lfs_verify(self) -> None:
        """Whether a large file arrived complete."""
        asked = json.loads(self.body)
        if len(self.hub.blobs.get(asked["oid"], b"")) != asked["size"]:
            raise RefusalError(404, "Object not found")
        self.json({})

    def commit(self, repo: str, revision: str) -> None:
        """Apply the operations of one commit, or of a pull request's first one."""
        found, asks_pr = self.readable(repo), bool(self.query.get("create_pr"))
        if not asks_pr:
            self.may_write(repo)
        elif self.token() is None:
            raise RefusalError(401, "Invalid username or password.")
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        files = dict(found.at(revision))
        for operation in operations:
            self.apply(operation["key"], operation["value"], files)
        number = sum(ref.startswith("refs/pr/") for ref in found.refs) + 1
        ref = f"refs/pr/{number}" if asks_pr else revision
        oid = found.commit(ref, files, header["value"]["summary"])
        answer = {
            "success": True,
            "commitOid": oid,
            "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}",
        }
        if asks_pr:
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/{number}"
        self.json(answer)

    def apply(self, key: str, value: dict[str, Any], files: Files) -> None:
        """Apply one operation of a commit."""
        if key == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile" and value["oid"] in self.hub.blobs:
            files[value["path"]] = self.hub.blobs[value["oid"]]
        elif key == "deletedFile":
            del files[value["path"]]
        else:
            raise RefusalError(400, f"Cannot apply {key} {value['path']}")

    def create_branch(self, repo: str, branch: str) -> None:
        """Create a branch from main."""
        self.may_write(repo)
        found = self.readable(repo)
        if branch in found.refs:
            raise RefusalError(409, "Reference already exists")
        found.refs[branch] = found.refs["main"]
        self.send(b"")

    def list_refs(self, repo: str) -> None:
        """List the branches."""
        refs = self.readable(repo).refs.items()
        listed = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": oid} for n, oid in refs]
        self.json({"branches": listed, "tags": [], "converts": [], "pullRequests": []})

    def model_info(self, repo: str, revision: str = "main") -> None:
        """Metadata of a repository at a revision."""
        found = self.readable(repo)
        siblings = [{"rfilename": path} for path in sorted(found.at(revision))]
        self.json(
            {
                "id": repo,
                "modelId": repo,
                "sha": found.resolve(revision),
                "private": found.private,
                "siblings": siblings,
                "tags": [],
            }
        )

    def tree(self, repo: str, revision: str) -> None:
        """The files of a revision with their sizes and ids."""
        entries = []
        for path, data in sorted(self.readable(repo).at(revision).items()):
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data)}
            entry["oid"] = git_oid(data)
            if is_large(path):
                digest = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 130}
            entries.append(entry)
        self.json(entries)

    def download(self, repo: str, revision: str, path: str) -> None:
        """One file, with the headers that the client's cache relies on."""
        found = self.readable(repo)
        files, commit = found.at(revision), found.resolve(revision)
        if path not in files:
            raise RefusalError(404, "Entry not found", "EntryNotFound")
        data = files[path]
        etag = hashlib.sha256(data).hexdigest() if is_large(path) else git_oid(data)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"'}
        if is_large(path):
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
        self.send(data, headers=headers)
