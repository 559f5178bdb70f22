"""A hub on localhost: the part of the Hugging Face Hub's HTTP protocol by which a client fetches a model.

Covered, for models named org/name:
- GET /api/models/{repo}/revision/{rev}: the commit and the list of files;
- GET /api/models/{repo}/tree/{rev}: their sizes and blob ids, on one page;
- HEAD and GET /{repo}/resolve/{rev}/{file}, with ETag, X-Repo-Commit, Content-Length and
  `Range: bytes=N-` or `bytes=N-M`;
- refusals with the status, X-Error-Code and X-Error-Message by which the client tells them apart. As on the real hub,
  a repository that is private or does not exist is 401 without a login and 404 with one, and a gated one lists its
  files to everyone but gives them to nobody.

Not covered: redirects to file storage elsewhere, LFS and Xet, further pages, datasets, uploads.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

TOKEN = "hf_secret_dummy"  # the one login this hub knows
WHATEVER = b"{}"  # what a name that is only listed gives
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


@dataclass
class Repo:
    """A repository, and what is wrong with it."""

    revisions: Mapping[str, Path]
    """Branch or tag -> the folder that it serves. A revision's commit is accepted in its place."""
    private: bool = False
    """Shown to a login only."""
    gated: bool = False
    """Whoever asks has not accepted the terms."""
    status: int | None = None
    """Answer every request with this status, as a hub that is down or that limits the rate."""
    page: bool = False
    """Answer with a web page and status 200, as a proxy's login page, or a wrong endpoint."""
    cuts: int = 0
    """Drop the connection in the middle of the weights so many times."""
    whole: bool = False
    """Ignore ranges, and send whole files."""
    listed: tuple[str, ...] = ()
    """Names that the list of files holds besides the files."""

    def commit(self, revision: str) -> str:
        return _sha1(str(self.revisions[revision]).encode())


@dataclass(frozen=True)
class Request:
    """What a client asked for, for tests to look at."""

    method: str
    path: str
    start: int
    """The first byte asked for."""
    status: int
    sent: int = 0
    """How many bytes the answer has."""


class HubServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, repos: Mapping[str, Repo]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos = repos
        self.requests: list[Request] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def hub_server(repos: Mapping[str, Repo]) -> Iterator[HubServer]:
    """The repositories served on a free port, until the block ends."""
    with HubServer(repos) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def client_environment(home: Path, variables: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without the user's own hub, login and proxy."""
    theirs = ("HF_", "HUGGING", "TRANSFORMERS_OFFLINE", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
    inherited = {name: value for name, value in os.environ.items() if not name.upper().startswith(theirs)}
    own = {"HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return {**inherited, **own, "HF_HUB_DISABLE_PROGRESS_BARS": "1", **variables}


class _RefusedError(Exception):
    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def do_GET(self) -> None:
        try:
            match [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]:
                case ["api", "models", org, name, "revision", revision]:
                    self._send_info(f"{org}/{name}", revision)
                case ["api", "models", org, name]:
                    self._send_info(f"{org}/{name}", "main")
                case ["api", "models", org, name, "tree", revision]:
                    self._send_tree(f"{org}/{name}", revision)
                case [org, name, "resolve", revision, *file]:
                    self._send_file(f"{org}/{name}", revision, "/".join(file))
                case _:
                    raise _RefusedError(404, "", "Sorry, we can't find the page you are looking for.")
        except _RefusedError as refusal:
            headers = {"X-Error-Message": refusal.message} | ({"X-Error-Code": refusal.code} if refusal.code else {})
            self._send_json({"error": refusal.message}, refusal.status, headers)

    do_HEAD = do_GET  # noqa: N815

    def _open(self, repo_id: str, revision: str) -> tuple[Repo, Path, str]:
        """The repository, the revision's folder and its commit, or the refusal that the hub answers with."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in ("", TOKEN):
            raise _RefusedError(401, "", "Invalid credentials in Authorization header")
        repo = self.server.repos.get(repo_id)
        if repo is None or (repo.private and not token):
            raise _RefusedError(404 if token else 401, "RepoNotFound", "Repository not found")
        if repo.status is not None:
            raise _RefusedError(repo.status, "", "Internal Error - We're working hard to fix this as soon as possible!")
        for name, folder in repo.revisions.items():
            if revision in (name, repo.commit(name)):
                return repo, folder, repo.commit(name)
        raise _RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def _send_info(self, repo_id: str, revision: str) -> None:
        repo, folder, commit = self._open(repo_id, revision)
        if repo.page:
            self._send(b"<html>Welcome to the network</html>", 200, {"Content-Type": "text/html"})
            return
        siblings = [{"rfilename": name, **self._blob(folder / name)} for name in _files(folder)]
        siblings += [{"rfilename": name} for name in repo.listed]
        self._send_json({"id": repo_id, "sha": commit, "private": repo.private, "siblings": siblings})

    def _send_tree(self, repo_id: str, revision: str) -> None:
        repo, folder, _ = self._open(repo_id, revision)
        files = {name: (folder / name).read_bytes() for name in _files(folder)} | dict.fromkeys(repo.listed, WHATEVER)
        self._send_json(
            [{"type": "file", "path": name, "size": len(data), "oid": _sha1(data)} for name, data in files.items()]
        )

    def _send_file(self, repo_id: str, revision: str, name: str) -> None:
        repo, folder, commit = self._open(repo_id, revision)
        if repo.gated:
            status = 403 if "Authorization" in self.headers else 401
            raise _RefusedError(status, "GatedRepo", f"Access to model {repo_id} is restricted.")
        if name not in (*_files(folder), *repo.listed):
            raise _RefusedError(404, "EntryNotFound", "Entry not found")
        data = WHATEVER if name in repo.listed else (folder / name).read_bytes()
        headers = {"ETag": f'"{_sha1(data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        stop = None
        if repo.cuts and self.command == "GET" and name.endswith(".safetensors"):
            repo.cuts -= 1
            stop = len(data) // 2
        asked = None if repo.whole else _RANGE.fullmatch(self.headers.get("Range", ""))
        if asked is None:
            self._send(data, 200, headers, stop)
            return
        start, end = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
        self._send(data[start : end + 1], 206, headers, None if stop is None else max(stop - start, 0))

    def _start(self) -> int:
        asked = _RANGE.fullmatch(self.headers.get("Range", ""))
        return int(asked[1]) if asked else 0

    def _blob(self, path: Path) -> dict[str, object]:
        """What the hub tells of a file when it is asked for blobs."""
        if "blobs=" not in self.path:
            return {}
        data = path.read_bytes()
        blob = {"size": len(data), "blobId": _sha1(b"blob %d\0" % len(data) + data)}
        if path.suffix != ".safetensors":
            return blob
        lfs = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 130}
        return {**blob, "lfs": lfs}

    def _send_json(self, value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, body: bytes, status: int, headers: Mapping[str, str], cut: int | None = None) -> None:
        """The answer; with `cut`, only so many bytes of its body before the connection is dropped."""
        sent = 0 if self.command == "HEAD" else len(body)
        self.server.requests.append(Request(self.command, urlsplit(self.path).path, self._start(), status, sent))
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on the tests' stderr."""


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _sha1(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()
