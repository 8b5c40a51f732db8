"""A stand-in for the Hugging Face Hub on loopback, over files made by the tests.

It speaks the Hub's HTTP interface as huggingface_hub does. Served: the list of branches, a
revision's files with their git and LFS hashes (paged), HEAD and GET of a file. Weights are LFS
files: the hub answers with a redirect to a second server, as the real one does, which serves them
by hash, whole or in ranges. Hashes come from the content. `faults` makes the next matching requests
fail; `log` and `sent` tell what was asked for and how much went out.
"""

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

LFS = (".safetensors", ".bin")
CODES = {404: "EntryNotFound", 401: "RepoNotFound", 403: "GatedRepo"}


@dataclass
class Listed:
    """A file that is listed with a size but has no content: enough for a plan."""

    size: int
    sha256: str


@dataclass
class Fault:
    """What to do to the next `times` requests whose "METHOD path" matches.

    what: a status code, or to the body: "cut", "short", "corrupt".
    """

    pattern: str
    what: int | str
    times: int = 1


@dataclass
class Hub:
    """with Hub({repo: {branch: folder or {name: bytes | Listed}}}) as hub: ... hub.url ..."""

    repos: dict
    page: int = 4  # files per page of a listing
    token: str | None = None  # what Authorization must carry, if anything
    faults: list = field(default_factory=list)
    log: list = field(default_factory=list)
    sent: dict = field(default_factory=dict)  # bytes of bodies by file name

    def __enter__(self):
        self.files = {
            repo: {branch: _content(files) for branch, files in branches.items()}
            for repo, branches in self.repos.items()
        }
        self.commits = {
            repo: {
                branch: hashlib.sha1(f"{repo} {branch}".encode()).hexdigest() for branch in branches
            }
            for repo, branches in self.files.items()
        }
        self.blobs = {
            _sha256(data): (name, data)
            for branches in self.files.values()
            for files in branches.values()
            for name, data in files.items()
        }
        self.servers = [
            ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (kind,), {"hub": self}))
            for kind in (_Api, Storage)
        ]
        for server in self.servers:
            threading.Thread(
                target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
            ).start()
        self.url, self.storage = (
            f"http://127.0.0.1:{server.server_port}" for server in self.servers
        )
        return self

    def __exit__(self, *error):
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def fault(self, request: str):
        """The fault, if any, that this request meets."""
        for fault in self.faults:
            if fault.times and re.search(fault.pattern, request):
                fault.times -= 1
                return fault.what
        return None


def _content(files) -> dict:
    return (
        {path.name: path.read_bytes() for path in sorted(files.iterdir()) if path.is_file()}
        if isinstance(files, Path)
        else dict(files)
    )


def _sha256(data) -> str:
    return data.sha256 if isinstance(data, Listed) else hashlib.sha256(data).hexdigest()


def _size(data) -> int:
    return data.size if isinstance(data, Listed) else len(data)


def _oid(data) -> str:
    """Git's name of a blob."""
    return hashlib.sha1(
        _sha256(data).encode() if isinstance(data, Listed) else b"blob %d\0" % len(data) + data
    ).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        request = f"{self.command} {unquote(self.path)}"
        self.hub.log.append(request)
        fault = self.hub.fault(request)
        if isinstance(fault, int):
            self.refuse(fault, CODES.get(fault))
        else:
            self.serve(fault)

    def reply(self, status: int, headers: dict, body: bytes = b"", promised: int | None = None):
        self.send_response(status)
        for name, value in (
            {"Content-Length": len(body) if promised is None else promised} | headers
        ).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def refuse(self, status: int, code: str | None = None):
        self.reply(
            status, {"X-Error-Code": code, "X-Error-Message": "as the test asked"} if code else {}
        )

    def body(self, name: str, data: bytes, headers: dict, fault):
        """A file or the range of it that is asked for, spoilt as a fault says."""
        start, status = 0, 200
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop, status = int(found[1]), min(int(found[2] or len(data)) + 1, len(data)), 206
            headers = headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
            data = data[start:stop]
        whole = len(data)
        if fault in ("cut", "short"):
            data = data[: whole // 2]
        elif fault == "corrupt":
            data = data[: whole // 2] + bytes([data[whole // 2] ^ 1]) + data[whole // 2 + 1 :]
        if self.command == "GET":
            self.hub.sent[name] = self.hub.sent.get(name, 0) + len(data)
        self.reply(status, headers, data, whole if fault == "cut" else len(data))
        if fault == "cut":  # the connection ends before the promised bytes
            self.close_connection = True


class _Api(_Handler):
    def serve(self, fault):
        path, query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        if self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self.refuse(401, "RepoNotFound")
        routes = (
            (r"/api/models/(.+)/refs", self.refs),
            (r"/api/models/(.+)/tree/([^/]+)", self.tree),
            (r"/(.+)/resolve/([^/]+)/(.+)", self.resolve),
        )
        for pattern, route in routes:
            if found := re.fullmatch(pattern, path):
                repo, *rest = map(unquote, found.groups())
                if repo not in self.hub.files:
                    return self.refuse(401, "RepoNotFound")
                return route(repo, *rest, query=query, fault=fault)
        return self.refuse(404)

    def json(self, value, headers=None):
        self.reply(
            200, {"Content-Type": "application/json"} | (headers or {}), json.dumps(value).encode()
        )

    def refs(self, repo, query, fault):
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit}
            for name, commit in self.hub.commits[repo].items()
        ]
        self.json({"branches": branches, "converts": [], "tags": []})

    def branch(self, repo, revision):
        return next(
            (name for name, commit in self.hub.commits[repo].items() if revision in (name, commit)),
            None,
        )

    def tree(self, repo, revision, query, fault):
        branch = self.branch(repo, revision)
        if branch is None:
            return self.refuse(404, "RevisionNotFound")
        cursor = int(query.get("cursor", ["0"])[0])
        records = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": "runs"}] + [
            {"type": "file", "oid": _oid(data), "size": _size(data), "path": name}
            | (
                {"lfs": {"oid": _sha256(data), "size": _size(data), "pointerSize": 134}}
                if name.endswith(LFS)
                else {}
            )
            for name, data in self.hub.files[repo][branch].items()
        ]
        more = cursor + self.hub.page < len(records)
        link = {}
        if more:
            following = f"/api/models/{repo}/tree/{revision}?cursor={cursor + self.hub.page}"
            link = {"Link": f'<{self.hub.url}{following}>; rel="next"'}
        self.json(records[cursor : cursor + self.hub.page], link)

    def resolve(self, repo, revision, name, query, fault):
        branch = self.branch(repo, revision)
        data = None if branch is None else self.hub.files[repo][branch].get(name)
        if data is None:
            return self.refuse(404, "RevisionNotFound" if branch is None else "EntryNotFound")
        headers = {"X-Repo-Commit": self.hub.commits[repo][branch]}
        if name.endswith(LFS):
            sha = _sha256(data)
            linked = {
                "Location": f"{self.hub.storage}/{sha}",
                "X-Linked-Etag": f'"{sha}"',
                "X-Linked-Size": len(data),
            }
            return self.reply(302, headers | linked)
        return self.body(name, data, headers | {"ETag": f'"{_oid(data)}"'}, fault)


class Storage(_Handler):
    def serve(self, fault):
        if "Authorization" in self.headers:
            return self.refuse(400)  # tokens must not leave the hub
        name, data = self.hub.blobs[urlsplit(self.path).path[1:]]
        return self.body(name, data, {"Accept-Ranges": "bytes"}, fault)
