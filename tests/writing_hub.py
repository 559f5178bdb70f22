"""A hub on localhost that can be written to: the part of the Hugging Face Hub's HTTP protocol that a push goes through.

No server that speaks it installs from PyPI (hf-local-hub is a client for a Go program that its wheel does not carry,
and olah a read-only mirror), so this is the smallest one, written from huggingface_hub's own source (2.4.0 and 1.31.0:
hf_api.py, _commit_api.py, lfs.py, utils/_http.py). State lies in a folder, so that a hub that was killed can be started
again on what it had. Covered, for models named owner/name:

- POST /api/repos/create, POST /api/validate-yaml, POST /api/models/{repo}/branch/{branch};
- GET /api/models/{repo}[/revision/{rev}], GET /api/models/{repo}/tree/{rev} with pages by `Link`;
- POST /api/models/{repo}/preupload/{rev}: large or small, by .gitattributes, size and a sample;
- POST /{repo}.git/info/lfs/objects/batch (basic and multipart), PUT of objects and parts, completion, verify. An object
  counts as there when all of it has arrived and its SHA-256 is right;
- POST /api/models/{repo}/commit/{rev}: NDJSON with header (parentCommit), file, lfsFile, deletedFile; `create_pr=1`
  makes refs/pr/N; 412 if the branch moved on;
- HEAD and GET /{repo}/resolve/{rev}/{file}, large files through a redirect to another host, with `Range: bytes=N-`;
- who may: a login that may write in its own names, one that may only read, none; 401, 403, 404 as on the hub.

Not covered: Xet, git itself, gated repositories, discussions, quotas, data sets and spaces.
"""

import argparse
import base64
import hashlib
import json
import logging
import os
import re
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from threading import RLock, Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml
from flask import Flask, Response, redirect, request
from werkzeug.serving import BaseWSGIServer, make_server

TOKEN = "hf_writer" + "x" * 30
READ_TOKEN = "hf_reader" + "x" * 30
OWN_NAMES = ("me", "my-org")
LARGE = 10_000_000
ATTRIBUTES = "*.safetensors filter=lfs diff=lfs merge=lfs -text\n*.bin filter=lfs diff=lfs merge=lfs -text\n"
Files = dict[str, dict[str, Any]]  # path -> {"oid": blob id, "size": bytes, "lfs": SHA-256 or None}


@dataclass
class Fault:
    """Something that goes wrong at a step: `create`, `info`, `tree`, `yaml`, `preupload`, `batch`, `put`, `commit` ...

    status: the answer instead; cut: drop the connection after so many bytes of the body; slow: seconds to wait between
    two pieces of the body; times: how often.
    """

    step: str
    status: int | None = None
    cut: int | None = None
    slow: float = 0.0
    times: int = 10**6


@dataclass(frozen=True)
class Seen:
    """A request, for tests to look at. received: bytes of its body that arrived."""

    step: str
    path: str
    status: int
    received: int


@dataclass
class WritingHub:
    """The hub's state in `root`, and what tests may make go wrong or look at."""

    root: Path
    page: int = 1000  # entries of a tree on one page
    part: int | None = None  # bytes of a part: then objects arrive in parts
    corrupted: str = ""  # a file that is stored otherwise than it was sent
    die_after: int | None = None  # bytes of objects after which the process is killed
    faults: list[Fault] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    url: str = ""
    log: bool = False

    def __post_init__(self) -> None:
        self.lock = RLock()
        for name in ("objects", "blobs", "parts"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        state = self.root / "repos.json"
        self.repos: dict[str, dict[str, Any]] = json.loads(state.read_text()) if state.exists() else {}

    def save(self) -> None:
        partial = self.root / "repos.partial"
        partial.write_text(json.dumps(self.repos))
        partial.replace(self.root / "repos.json")

    def create(self, repo: str, private: bool = False) -> None:
        """A new repository, as the hub makes it: one commit with a .gitattributes."""
        self.repos[repo] = {"private": private, "refs": {}, "commits": {}, "prs": 0}
        self.edit(repo, {".gitattributes": ATTRIBUTES.encode()})

    def edit(self, repo: str, files: Mapping[str, bytes], revision: str = "main") -> str:
        """A commit that someone else makes."""
        with self.lock:
            tree = dict(self.tree(repo, revision)) if revision in self.repos[repo]["refs"] else {}
            tree |= {name: self.small(data) for name, data in files.items()}
            return self.commit(repo, revision, tree)

    def small(self, data: bytes) -> dict[str, Any]:
        oid = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
        (self.root / "blobs" / oid).write_bytes(data)
        return {"oid": oid, "size": len(data), "lfs": None}

    def large(self, sha256: str, size: int) -> dict[str, Any]:
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        return {**self.small(pointer), "size": size, "lfs": sha256}

    def commit(self, repo: str, ref: str, tree: Files) -> str:
        entry = self.repos[repo]
        parent = entry["refs"].get(ref)
        text = json.dumps([parent, tree, len(entry["commits"])]).encode()
        oid = hashlib.sha1(text, usedforsecurity=False).hexdigest()
        entry["commits"][oid] = {"parent": parent, "tree": tree}
        entry["refs"][ref] = oid
        self.save()
        return oid

    def resolve(self, repo: str, revision: str) -> str | None:
        entry = self.repos[repo]
        return entry["refs"].get(revision) or (revision if revision in entry["commits"] else None)

    def tree(self, repo: str, revision: str = "main") -> Files:
        oid = self.resolve(repo, revision)
        assert oid is not None
        found: Files = self.repos[repo]["commits"][oid]["tree"]
        return found

    def read(self, repo: str, name: str, revision: str = "main") -> bytes:
        return self.path_of(self.tree(repo, revision)[name]).read_bytes()

    def path_of(self, entry: Mapping[str, Any]) -> Path:
        return self.root / "objects" / entry["lfs"] if entry["lfs"] else self.root / "blobs" / entry["oid"]

    def note(self, seen: Seen) -> None:
        self.seen.append(seen)
        if self.log:
            print(f"hub: {seen.status} {seen.step:<9} {seen.received:>9} bytes  {seen.path}", flush=True)

    def received(self, step: str = "put") -> int:
        """Bytes that arrived at a step."""
        return sum(seen.received for seen in self.seen if seen.step == step)


class _Refused(Exception):  # noqa: N818
    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class _Cut(Exception):  # noqa: N818
    """The connection is dropped."""


def make_app(hub: WritingHub) -> Flask:
    app = Flask(__name__)

    @app.route("/", defaults={"_": ""}, methods=["GET", "POST", "PUT", "HEAD"])
    @app.route("/<path:_>", methods=["GET", "POST", "PUT", "HEAD"])
    def everything(_: str) -> Response:
        call = _Call(hub)
        try:
            response = call.answer()
        except _Refused as refusal:
            headers = {"X-Error-Message": refusal.message} | ({"X-Error-Code": refusal.code} if refusal.code else {})
            response = Response(json.dumps({"error": refusal.message}), refusal.status, headers)
        except _Cut:
            hub.note(Seen(call.step, request.path, 0, call.received))
            request.environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            return Response(status=500)
        hub.note(Seen(call.step, request.path, response.status_code, call.received))
        return response

    return app


class _Call:
    """One request."""

    def __init__(self, hub: WritingHub) -> None:
        self.hub = hub
        self.step = ""
        self.received = 0

    def answer(self) -> Response:
        # the path as it was sent: a branch may hold slashes
        path = urlsplit(request.environ.get("RAW_URI", request.path)).path
        match [request.method, *(unquote(part) for part in path.strip("/").split("/"))]:
            case ["POST", "api", "repos", "create"]:
                return self.at("create", self.create)
            case ["POST", "api", "validate-yaml"]:
                return self.at("yaml", self.validate)
            case ["GET", "api", "models", owner, name]:
                return self.at("info", self.info, f"{owner}/{name}", "main")
            case ["GET", "api", "models", owner, name, "revision", revision]:
                return self.at("info", self.info, f"{owner}/{name}", revision)
            case ["GET", "api", "models", owner, name, "tree", revision]:
                return self.at("tree", self.list, f"{owner}/{name}", revision)
            case ["POST", "api", "models", owner, name, "branch", branch]:
                return self.at("branch", self.branch, f"{owner}/{name}", branch)
            case ["POST", "api", "models", owner, name, "preupload", revision]:
                return self.at("preupload", self.preupload, f"{owner}/{name}", revision)
            case ["POST", "api", "models", owner, name, "commit", revision]:
                return self.at("commit", self.commit, f"{owner}/{name}", revision)
            case ["POST", owner, git, "info", "lfs", "objects", "batch"]:
                return self.at("batch", self.batch, f"{owner}/{git.removesuffix('.git')}")
            case ["PUT", "storage", oid]:
                return self.at("put", self.put, self.hub.root / "objects" / oid, oid)
            case ["PUT", "storage", oid, part]:
                return self.at("put", self.put, self.hub.root / "parts" / f"{oid}-{part}", "")
            case ["POST", "complete", oid]:
                return self.at("complete", self.complete, oid)
            case ["POST", "verify"]:
                return self.at("verify", self.verify)
            case ["GET" | "HEAD", "storage", oid]:
                return self.at("get", self.send, self.hub.root / "objects" / oid, {"ETag": f'"{oid}"'})
            case ["GET" | "HEAD", owner, name, "resolve", revision, *file]:
                return self.at("resolve", self.file, f"{owner}/{name}", revision, "/".join(file))
        raise _Refused(404, "Sorry, we can't find the page you are looking for.")

    def at(self, step: str, act: Any, *arguments: Any) -> Response:
        self.step = step
        self.fault = next((f for f in self.hub.faults if f.step == step and f.times > 0), None)
        if self.fault is not None:
            self.fault.times -= 1
            if self.fault.status is not None:
                self.body()
                raise _Refused(self.fault.status, "Something went wrong")
        response: Response = act(*arguments)
        return response

    def pieces(self) -> Iterator[bytes]:
        """The body as it arrives, with what the fault does to it."""
        while piece := request.stream.read(65536):
            self.received += len(piece)
            yield piece
            if self.fault is not None and self.fault.slow:
                time.sleep(self.fault.slow)
            if self.fault is not None and self.fault.cut is not None and self.received > self.fault.cut:
                raise _Cut

    def body(self) -> bytes:
        return b"".join(self.pieces())

    # who may

    def token(self) -> str:
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in ("", TOKEN, READ_TOKEN):
            raise _Refused(401, "Invalid credentials in Authorization header")
        return token

    def open(self, repo: str) -> dict[str, Any]:
        token = self.token()
        entry = self.hub.repos.get(repo)
        if entry is None or (entry["private"] and not (token and repo.split("/")[0] in OWN_NAMES)):
            raise _Refused(404 if token else 401, "Repository not found", "RepoNotFound")
        return entry

    def may_write(self, repo: str) -> None:
        token = self.token()
        if not token:
            raise _Refused(401, "Invalid username or password.")
        if token != TOKEN or repo.split("/")[0] not in OWN_NAMES:
            raise _Refused(403, f"You don't have the rights to write to {repo}")

    def commit_of(self, repo: str, revision: str) -> str:
        self.open(repo)
        oid = self.hub.resolve(repo, revision)
        if oid is None:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid

    # steps

    def create(self) -> Response:
        asked = json.loads(self.body())
        repo = f"{asked.get('organization') or OWN_NAMES[0]}/{asked['name']}"
        self.may_write(repo)
        if repo in self.hub.repos:
            raise _Refused(409, "You already created this model repo")
        self.hub.create(repo, asked.get("private") is True or asked.get("visibility") == "private")
        return _json({"url": f"{self.hub.url}/{repo}", "name": repo})

    def validate(self) -> Response:
        text = json.loads(self.body())["content"]
        match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
        try:
            data = yaml.safe_load(match[1]) if match else {}
        except yaml.YAMLError as error:
            return _json({"errors": [{"message": str(error)}]}, 400)
        wrong = []
        if data.get("license") == "other" and not (data.get("license_name") and data.get("license_link")):
            wrong.append("license: other needs license_name and license_link")
        for model in data.get("model-index", []):
            for result in model["results"]:
                if not {"type", "name"} <= result["dataset"].keys() or not result["task"].get("type"):
                    wrong.append("model-index: dataset.type, dataset.name and task.type are required")
                if not all({"type", "value"} <= metric.keys() for metric in result["metrics"]):
                    wrong.append("model-index: metrics.type and metrics.value are required")
        return _json({"errors": [{"message": message} for message in wrong], "warnings": []}, 400 if wrong else 200)

    def info(self, repo: str, revision: str) -> Response:
        oid = self.commit_of(repo, revision)
        siblings = [{"rfilename": name} for name in sorted(self.hub.tree(repo, oid))]
        return _json(
            {"id": repo, "sha": oid, "private": self.hub.repos[repo]["private"], "siblings": siblings, "tags": []}
        )

    def list(self, repo: str, revision: str) -> Response:
        tree = sorted(self.hub.tree(repo, self.commit_of(repo, revision)).items())
        start = int(request.args.get("cursor", "0"))
        entries = []
        for name, entry in tree[start : start + self.hub.page]:
            listed = {"type": "file", "path": name, "size": entry["size"], "oid": entry["oid"]}
            if entry["lfs"]:
                listed["lfs"] = {"oid": entry["lfs"], "size": entry["size"], "pointerSize": 130}
            entries.append(listed)
        response = _json(entries)
        if start + self.hub.page < len(tree):
            following = f"{request.base_url}?recursive=true&cursor={start + self.hub.page}"
            response.headers["Link"] = f'<{following}>; rel="next"'
        return response

    def branch(self, repo: str, branch: str) -> Response:
        self.may_write(repo)
        with self.hub.lock:
            refs = self.hub.repos[repo]["refs"]
            if branch in refs:
                raise _Refused(409, f"Reference already exists: {branch}")
            refs[branch] = refs["main"]
            self.hub.save()
        return _json({})

    def preupload(self, repo: str, revision: str) -> Response:
        oid = self.commit_of(repo, revision)
        if "create_pr" not in request.args:
            self.may_write(repo)
        tree = self.hub.tree(repo, oid)
        attributes = self.hub.read(repo, ".gitattributes", oid).decode()
        patterns = [line.split()[0] for line in attributes.splitlines() if "filter=lfs" in line]
        answers = []
        for file in json.loads(self.body())["files"]:
            sample = base64.b64decode(file["sample"])
            large = (
                any(fnmatch(file["path"], pattern) for pattern in patterns) or file["size"] > LARGE or b"\0" in sample
            )
            there = tree.get(file["path"], {})
            known = {"oid": there["lfs"] or there["oid"]} if there else {}
            mode = "lfs" if large else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **known})
        return _json({"files": answers})

    def batch(self, repo: str) -> Response:
        self.open(repo)
        asked = json.loads(self.body())
        if "ref" in asked:  # a pull request's objects name none
            self.may_write(repo)
        objects = []
        for wanted in asked["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            answer: dict[str, Any] = {"oid": oid, "size": size}
            if not (self.hub.root / "objects" / oid).exists():
                verify = {"href": f"{self.hub.url}/verify"}
                upload: dict[str, Any] = {"href": f"{self.hub.url}/storage/{oid}"}
                if self.hub.part is not None and size > self.hub.part:
                    parts = range(1, -(-size // self.hub.part) + 1)
                    urls = {f"{n:05d}": f"{self.hub.url}/storage/{oid}/{n}" for n in parts}
                    upload = {
                        "href": f"{self.hub.url}/complete/{oid}",
                        "header": {"chunk_size": str(self.hub.part), **urls},
                    }
                answer["actions"] = {"upload": upload, "verify": verify}
            objects.append(answer)
        return _json({"transfer": "multipart" if self.hub.part else "basic", "objects": objects})

    def put(self, path: Path, oid: str) -> Response:
        """An object or a part: in its place only when all of it is there and it is what it is said to be."""
        partial = path.with_suffix(f".{time.monotonic_ns()}.partial")
        digest = hashlib.sha256()
        with partial.open("wb") as file:
            for piece in self.pieces():
                file.write(piece)
                digest.update(piece)
                dead = self.hub.die_after
                if dead is not None and self.hub.received() + self.received > dead:
                    os.kill(os.getpid(), signal.SIGKILL)
        if oid and digest.hexdigest() != oid:
            partial.unlink()
            raise _Refused(400, "The object is not what its id says")
        partial.replace(path)
        return Response(status=200, headers={"ETag": f'"{digest.hexdigest()}"'})

    def complete(self, oid: str) -> Response:
        asked = json.loads(self.body())
        data = b""
        for part in asked["parts"]:
            piece = (self.hub.root / "parts" / f"{oid}-{part['partNumber']}").read_bytes()
            if part["etag"].strip('"') != hashlib.sha256(piece).hexdigest():
                raise _Refused(400, "A part is not what its etag says")
            data += piece
        if hashlib.sha256(data).hexdigest() != oid:
            raise _Refused(400, "The object is not what its id says")
        (self.hub.root / "objects" / oid).write_bytes(data)
        return _json({})

    def verify(self) -> Response:
        asked = json.loads(self.body())
        path = self.hub.root / "objects" / asked["oid"]
        if not path.exists() or path.stat().st_size != asked["size"]:
            raise _Refused(404, "The object has not arrived")
        return _json({})

    def commit(self, repo: str, revision: str) -> Response:
        lines = [json.loads(line) for line in self.body().splitlines()]
        proposed = request.args.get("create_pr") == "1"
        if not proposed:
            self.may_write(repo)
        elif not self.token():
            raise _Refused(401, "Invalid username or password.")
        with self.hub.lock:
            head = self.commit_of(repo, revision)
            if revision not in self.hub.repos[repo]["refs"]:
                raise _Refused(400, "Commits go to a branch")
            parent = lines[0]["value"].get("parentCommit")
            if not lines[0]["value"]["summary"]:
                raise _Refused(400, "A commit needs a summary")
            if parent is not None and not proposed and parent != head:
                raise _Refused(412, "A commit has happened since. Please refresh and try again.")
            tree = dict(self.hub.tree(repo, parent if parent is not None and proposed else head))
            for line in lines[1:]:
                self.apply(tree, line["key"], line["value"])
            ref, extra = revision, {}
            if proposed:
                self.hub.repos[repo]["prs"] += 1
                number = self.hub.repos[repo]["prs"]
                ref = f"refs/pr/{number}"
                extra = {"pullRequestUrl": f"{self.hub.url}/{repo}/discussions/{number}"}
            oid = self.hub.commit(repo, ref, tree)
        return _json({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", **extra})

    def apply(self, tree: Files, key: str, value: Mapping[str, Any]) -> None:
        path = value["path"]
        if key == "file":
            data = base64.b64decode(value["content"])
            tree[path] = self.hub.small(data + b"\n" if path == self.hub.corrupted else data)
        elif key == "lfsFile":
            if not (self.hub.root / "objects" / value["oid"]).exists():
                raise _Refused(400, f"The object of {path} has not arrived")
            tree[path] = self.hub.large(value["oid"], value["size"])
        elif key == "deletedFile":
            if tree.pop(path, None) is None:
                raise _Refused(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        else:
            raise _Refused(400, f"unknown operation {key}")

    def file(self, repo: str, revision: str, name: str) -> Response:
        oid = self.commit_of(repo, revision)
        entry = self.hub.tree(repo, oid).get(name)
        if entry is None:
            raise _Refused(404, "Entry not found", "EntryNotFound")
        if entry["lfs"] is None:
            return self.send(self.hub.path_of(entry), {"ETag": f'"{entry["oid"]}"', "X-Repo-Commit": oid})
        response: Any = redirect(f"{self.hub.url.replace('127.0.0.1', 'localhost')}/storage/{entry['lfs']}")
        headers = {"X-Linked-Size": str(entry["size"]), "X-Linked-ETag": f'"{entry["lfs"]}"', "X-Repo-Commit": oid}
        response.headers.update(headers)
        return response  # type: ignore[no-any-return]

    def send(self, path: Path, headers: Mapping[str, str]) -> Response:
        if not path.exists():
            raise _Refused(404, "no such object")
        size = path.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        end = min(int(asked[2]) + 1, size) if asked and asked[2] else size
        extra = {"Content-Length": str(end - start), "Accept-Ranges": "bytes"}
        if asked:
            extra["Content-Range"] = f"bytes {start}-{end - 1}/{size}"

        def body() -> Iterator[bytes]:
            with path.open("rb") as file:
                file.seek(start)
                left = end - start
                while left > 0 and (piece := file.read(min(1 << 20, left))):
                    left -= len(piece)
                    yield piece

        # a HEAD's answer tells the length too: a body that is never read, not an empty one
        return Response(body(), 206 if asked else 200, {**headers, **extra, "Content-Type": "application/octet-stream"})


def _json(value: Any, status: int = 200) -> Response:
    return Response(json.dumps(value), status, {"Content-Type": "application/json"})


def make_hub_server(hub: WritingHub, port: int = 0) -> BaseWSGIServer:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = make_server("127.0.0.1", port, make_app(hub), threaded=True)
    hub.url = f"http://127.0.0.1:{server.port}"
    return server


@contextmanager
def writing_hub(root: Path, **settings: Any) -> Iterator[WritingHub]:
    """A hub on a free port, until the block ends."""
    hub = WritingHub(root, **settings)
    server = make_hub_server(hub)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def main() -> None:
    """A hub as a process of its own, which can be killed: prints its URL."""
    parser = argparse.ArgumentParser(description="A hub on localhost; its login is in HF_TOKEN of this file's TOKEN.")
    parser.add_argument("root", type=Path)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--die-after", type=int, help="kill the process after so many bytes of objects")
    parser.add_argument("--slow", type=float, default=0.0, help="seconds to wait after each 64 kB of an object")
    parser.add_argument("--log", action="store_true", help="print every request")
    arguments = parser.parse_args()
    hub = WritingHub(arguments.root, die_after=arguments.die_after, log=arguments.log)
    if arguments.slow:
        hub.faults.append(Fault("put", slow=arguments.slow))
    server = make_hub_server(hub, arguments.port)
    print(hub.url, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
