"""A Hub on 127.0.0.1: as much of its HTTP protocol as pushing a model and getting it back takes.

It keeps everything in memory, wants a token for whatever the real one does, and can be told to drop connections or to
refuse. `requests` is what it was asked, in order.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKENS = {"hf_TheTokenOfMeMeMe0123456789": "me", "hf_TheTokenOfGuest0123456789": "guest"}


@dataclass
class Commit:
    oid: str
    message: str
    files: dict[str, bytes | str]
    """Of each path its content, or of a large file its sha256."""


@dataclass
class Repository:
    private: bool
    branches: dict[str, Commit] = field(default_factory=dict)
    commits: list[Commit] = field(default_factory=list)
    """All of them, the one that made the repository first."""

    def commit(self, branch: str, message: str, files: dict[str, bytes | str]) -> Commit:
        made = Commit(secrets.token_hex(20), message, files)
        self.commits.append(made)
        self.branches[branch] = made
        return made

    def at(self, revision: str) -> Commit | None:
        return self.branches.get(revision) or next(
            (c for c in self.commits if c.oid == revision), None
        )


class Refusal(Exception):
    """An answer that is an error, with the Hub's own code for it."""

    def __init__(self, status: int, message: str, code: str = "", **more: str):
        self.status, self.message, self.code, self.more = status, message, code, more


class HubServer:
    """The server, on a port of its own, until `close`.

    Attributes:
        drop_from: From which request on, counted from 0 since `recover`, connections are dropped; None for never.
        answer_with: A status to answer everything with, repeating the request's headers as a careless server might.
        before: Called with every request before it is answered.
        tamper: Called with every request and what it would be answered, status, content and headers; returns others.
            Of a content of None in their place the first half is sent, and the connection closed.
    """

    def __init__(self):
        self.lock = threading.Lock()
        self.clear()
        hub = self

        class Handler(_Handler):
            server_hub = hub

        # Large files lie on another origin than the Hub, as they do there: the client sends no token to that one.
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2)]
        for server in self._servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, daemon=True).start()
        self.url, self.storage = (
            f"http://127.0.0.1:{server.server_port}" for server in self._servers
        )

    def clear(self):
        """Forget everything."""
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.recover()

    def recover(self):
        """Forget the requests, and whatever was to go wrong."""
        self.requests: list[str] = []
        self.drop_from: int | None = None
        self.answer_with: int | None = None
        self.before: Callable[[str], None] | None = None
        self.tamper: (
            Callable[[str, int, bytes, dict[str, str]], tuple[int, bytes | None, dict[str, str]]]
            | None
        ) = None

    def close(self):
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def hold(self, repo_id: str, files: dict[str, bytes]):
        """Have a repository with these files, as if somebody had pushed them."""
        stored: dict[str, bytes | str] = dict(files)
        for path in [path for path in files if path.endswith(".safetensors")]:
            stored[path] = hashlib.sha256(files[path]).hexdigest()
            self.blobs[stored[path]] = files[path]
        made = self.repositories[repo_id] = Repository(private=False)
        made.commit("main", "all of it", stored)

    def content(self, stored: bytes | str) -> bytes:
        return stored if isinstance(stored, bytes) else self.blobs[stored]

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """What a revision holds, large files filled in."""
        return {
            path: self.content(stored)
            for path, stored in self.repositories[repo_id].at(revision).files.items()
        }

    # --- what can be asked ---------------------------------------------------------------------------------------

    def whoami(self, user, **_):
        if user is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return {"type": "user", "name": user, "fullname": user, "orgs": [], "auth": {}}

    def create(self, user, body, **_):
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        repo_id = f"{body.get('organization') or user}/{body['name']}"
        if not repo_id.startswith(f"{user}/"):
            raise Refusal(
                403, f'You don\'t have the rights to create a model under the namespace "{repo_id}"'
            )
        if repo_id in self.repositories:
            raise Refusal(409, "You already created this model repo", url=f"{self.url}/{repo_id}")
        made = self.repositories[repo_id] = Repository(private=body.get("visibility") == "private")
        made.commit("main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return {"url": f"{self.url}/{repo_id}"}

    def info(self, user, repo_id, revision="main", **_):
        repository, commit = self._found(user, repo_id, revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        return {
            "id": repo_id,
            "sha": commit.oid,
            "private": repository.private,
            "siblings": siblings,
        }

    def branch(self, user, repo_id, revision, body, **_):
        repository, start = self._writable(user, repo_id, body.get("startingPoint", "main"))
        if revision in repository.branches:
            raise Refusal(409, "Reference already exists")
        repository.branches[revision] = start
        return {}

    def validate_yaml(self, body, **_):
        block = re.match(r"---\n(.*?)\n---\n", body["content"], re.DOTALL)
        try:
            data = yaml.safe_load(block[1]) if block else {}
        except yaml.YAMLError as error:
            raise Refusal(400, f"Invalid metadata: {error}") from error
        relations = ("adapter", "merge", "quantized", "finetune", None)
        if not isinstance(data, dict) or data.get("base_model_relation") not in relations:
            raise Refusal(400, "Invalid metadata")
        return {"errors": [], "warnings": []}

    def preupload(self, user, repo_id, revision, body, query, **_):
        _, commit = self._pushable(user, repo_id, revision, query)
        answers = []
        for file in body["files"]:
            large = file["path"].endswith(".safetensors") or b"\0" in base64.b64decode(
                file["sample"]
            )
            stored = commit.files.get(file["path"])
            oid = _git_oid(stored) if isinstance(stored, bytes) else stored
            mode = "lfs" if large else "regular"
            answers.append(
                {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}
            )
        return {"files": answers}

    def lfs_batch(self, user, repo_id, body, **_):
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        objects = []
        for wanted in body["objects"]:
            actions = {
                "upload": {"href": f"{self.storage}/lfs/{wanted['oid']}"},
                "verify": {"href": f"{self.url}/{repo_id}.git/info/lfs/verify"},
            }
            new = {} if wanted["oid"] in self.blobs else {"actions": actions}
            objects.append({"oid": wanted["oid"], "size": wanted["size"], **new})
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, oid, raw, **_):
        if hashlib.sha256(raw).hexdigest() != oid:
            raise Refusal(400, "The content has another sha256")
        self.blobs[oid] = raw
        return {}

    def lfs_verify(self, body, **_):
        if len(self.blobs.get(body["oid"], b"")) != body["size"]:
            raise Refusal(404, "No such object")
        return {}

    def commit(self, user, repo_id, revision, raw, query, **_):
        repository, parent = self._pushable(user, repo_id, revision, query)
        header, *operations = [json.loads(line) for line in raw.splitlines()]
        if header["value"].get("parentCommit", parent.oid) != parent.oid:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(parent.files)
        for operation in operations:
            kind, value = operation["key"], operation["value"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                if value["oid"] not in self.blobs:
                    raise Refusal(400, f"LFS pointer to a file that does not exist: {value['oid']}")
                files[value["path"]] = value["oid"]
            elif kind == "deletedFile":
                if value["path"] not in files:
                    raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
                del files[value["path"]]
            else:
                raise Refusal(400, f"Unknown operation {kind}")
        number = sum(name.startswith("refs/pr/") for name in repository.branches) + 1
        branch = f"refs/pr/{number}" if "create_pr" in query else revision
        made = repository.commit(branch, header["value"]["summary"], files)
        answer = {"commitUrl": f"{self.url}/{repo_id}/commit/{made.oid}", "commitOid": made.oid}
        request = (
            {"pullRequestUrl": f"{self.url}/{repo_id}/discussions/{number}"}
            if "create_pr" in query
            else {}
        )
        return answer | request

    def tree(self, user, repo_id, revision, path="", **_):
        _, commit = self._found(user, repo_id, revision)
        if path:  # folders of further chat templates, of which there are none here
            raise Refusal(404, "Entry not found", "EntryNotFound")
        entries = []
        for name, stored in sorted(commit.files.items()):
            size = len(self.content(stored))
            entry = {
                "type": "file",
                "path": name,
                "size": size,
                "oid": _git_oid(self.content(stored)),
            }
            if isinstance(stored, str):
                entry["lfs"] = {"oid": stored, "size": size, "pointerSize": 134}
            entries.append(entry)
        return entries

    def resolve(self, user, repo_id, revision, path, **_):
        """The content of a file and its headers; of a large one, where it is to be had."""
        _, commit = self._found(user, repo_id, revision)
        if path not in commit.files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        stored = commit.files[path]
        headers = {"X-Repo-Commit": commit.oid}
        if isinstance(stored, bytes):
            return stored, headers | {"ETag": f'"{_git_oid(stored)}"'}
        size = str(len(self.blobs[stored]))
        return None, headers | {
            "X-Linked-ETag": f'"{stored}"',
            "X-Linked-Size": size,
            "Location": f"{self.storage}/lfs/{stored}",
        }

    # --- who may do what -----------------------------------------------------------------------------------------

    def _found(self, user, repo_id, revision):
        repository = self.repositories.get(repo_id)
        if repository is None or (repository.private and not repo_id.startswith(f"{user}/")):
            raise Refusal(401 if user is None else 404, "Repository not found", "RepoNotFound")
        commit = repository.at(revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repository, commit

    def _writable(self, user, repo_id, revision):
        result = self._found(user, repo_id, revision)
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        if not repo_id.startswith(f"{user}/"):
            raise Refusal(
                403, "Authorization error: pass `create_pr=1` to open a pull request instead."
            )
        return result

    def _pushable(self, user, repo_id, revision, query):
        if "create_pr" in query and user is not None:
            return self._found(user, repo_id, revision)
        return self._writable(user, repo_id, revision)


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


_ROUTES = [
    ("GET", r"/api/whoami-v2", HubServer.whoami),
    ("POST", r"/api/repos/create", HubServer.create),
    ("POST", r"/api/validate-yaml", HubServer.validate_yaml),
    ("POST", r"/api/models/(?P<repo_id>[^/]+/[^/]+)/branch/(?P<revision>[^/]+)", HubServer.branch),
    (
        "POST",
        r"/api/models/(?P<repo_id>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)",
        HubServer.preupload,
    ),
    ("POST", r"/api/models/(?P<repo_id>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", HubServer.commit),
    ("GET", r"/api/models/(?P<repo_id>[^/]+/[^/]+)", HubServer.info),
    ("GET", r"/api/models/(?P<repo_id>[^/]+/[^/]+)/revision/(?P<revision>[^/]+)", HubServer.info),
    (
        "GET",
        r"/api/models/(?P<repo_id>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(/(?P<path>.+))?",
        HubServer.tree,
    ),
    ("POST", r"/(?P<repo_id>[^/]+/[^/]+)\.git/info/lfs/objects/batch", HubServer.lfs_batch),
    ("POST", r"/(?P<repo_id>[^/]+/[^/]+)\.git/info/lfs/verify", HubServer.lfs_verify),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", HubServer.lfs_put),
    (
        "GET",
        r"/(?P<repo_id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)",
        HubServer.resolve,
    ),
]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_hub: HubServer

    def do_GET(self):
        self._answer("GET")

    def do_HEAD(self):
        self._answer("GET")

    def do_POST(self):
        self._answer("POST")

    def do_PUT(self):
        self._answer("PUT")

    def log_message(self, *_):
        pass

    def _answer(self, method: str):
        hub, url = self.server_hub, urlsplit(self.path)
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if url.path == "/api/agent-harnesses":  # the client asks once a day, whatever it does
            return self._send(404, b"", {})
        with hub.lock:
            number = len(hub.requests)
            hub.requests.append(f"{self.command} {url.path}")
        if hub.before is not None:
            hub.before(hub.requests[number])
        if hub.drop_from is not None and number >= hub.drop_from:
            self.close_connection = True
            self.connection.shutdown(2)
            return None
        if hub.answer_with is not None:
            said = json.dumps({"error": f"refused: {dict(self.headers)}"}).encode()
            return self._send(
                hub.answer_with, said, {"X-Error-Message": str(self.headers.get("Authorization"))}
            )
        if url.path.startswith("/lfs/") and "Authorization" in self.headers:
            return self._send(400, b"This is not the Hub: keep your token.", {})
        if method == "GET" and url.path.startswith("/lfs/"):
            return self._send(200, hub.blobs[url.path.removeprefix("/lfs/")], {})
        try:
            status, content, headers = self._route(method, url, raw)
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.message, "X-Error-Code": refusal.code}
            status, content = (
                refusal.status,
                json.dumps({"error": refusal.message, **refusal.more}).encode(),
            )
        self._send(status, content, headers)

    def _route(self, method: str, url, raw: bytes):
        hub = self.server_hub
        authorization = self.headers.get("Authorization", "")
        user = TOKENS.get(authorization.removeprefix("Bearer "))
        if authorization and user is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        for verb, pattern, call in _ROUTES:
            result = re.fullmatch(pattern, url.path)
            if verb == method and result:
                named = {
                    key: unquote(value)
                    for key, value in result.groupdict().items()
                    if value is not None
                }
                json_body = (
                    "json" in self.headers.get("Content-Type", "") and call is not HubServer.commit
                )
                body = json.loads(raw) if raw and json_body else {}
                with hub.lock:
                    answer = call(
                        hub, user=user, body=body, raw=raw, query=parse_qs(url.query), **named
                    )
                if call is not HubServer.resolve:
                    return 200, json.dumps(answer).encode(), {"Content-Type": "application/json"}
                content, headers = answer
                return (302, b"", headers) if content is None else (200, content, headers)
        raise Refusal(404, f"No such endpoint: {method} {url.path}")

    def _send(self, status: int, content: bytes, headers: dict[str, str]):
        sent: bytes | None = content
        if self.server_hub.tamper is not None:
            request = f"{self.command} {urlsplit(self.path).path}"
            status, sent, headers = self.server_hub.tamper(request, status, content, headers)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, " ".join(value.split()))
        self.send_header("Content-Length", str(len(content if sent is None else sent)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if sent is None else sent)
        self.close_connection = self.close_connection or sent is None
