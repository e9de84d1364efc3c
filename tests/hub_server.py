"""A small Hugging Face Hub on 127.0.0.1, for tests without internet.

    hub = HubServer()
    hub.start()
    subprocess.run([sys.executable, "-c", code], env=hub.environment(tmp_path / "home"))

Clients read the endpoint when they are imported, so each needs its own process. `ROUTES` lists the calls that are
answered. As on the real Hub:

- A commit is a full snapshot. It is read and checked completely before its branch moves, and stays readable by its id.
- Large files are uploaded before the commit, stay when it fails, and are not requested again in the same repository.
- A new repository has a first commit with `.gitattributes`, and `README.md` in a Space.
- Without access to a repository, clients get the same answer as for a missing one: 404, or 401 without a token.

What differs: uploads use LFS, as for clients without Xet, in one part. Listings have one page. State lives as long as
the object.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote

from huggingface_hub.utils.sha import git_hash


LFS_SUFFIXES = (".bin", ".parquet", ".png", ".pt", ".safetensors")  # some of the Hub's
PREFIXES = {"model": "", "dataset": "datasets/", "space": "spaces/"}
ORGANIZATION = "org"  # every user belongs to it

# Method, path, right that the caller needs on the repository, method of `HubServer`.
_API = "/api/{type}s/{repo}"
ROUTES = [
    ("POST", "/api/repos/create", None, "_create_repo"),
    ("POST", "/api/validate-yaml", None, "_validate_yaml"),
    ("GET", _API, "read", "_info"),
    ("GET", _API + "/revision/{revision}", "read", "_info"),
    ("GET", _API + "/tree/{revision}", "read", "_tree"),
    ("GET", _API + "/tree/{revision}/{path}", "read", "_tree"),
    ("GET", _API + "/refs", "read", "_refs"),
    ("PUT", _API + "/settings", "write", "_settings"),
    ("POST", _API + "/branch/{name}", "write", "_create_branch"),
    ("POST", _API + "/tag/{revision}", "write", "_create_tag"),
    ("POST", _API + "/preupload/{revision}", "write", "_preupload"),
    ("POST", _API + "/commit/{revision}", "write", "_commit"),
    ("POST", "/{prefix}{repo}.git/info/lfs/objects/batch", "write", "_lfs_batch"),
    ("PUT", "/lfs/{type}/{repo}/{oid}", "upload", "_lfs_upload"),
    ("GET", "/{prefix}{repo}/resolve/{revision}/{path}", "read", "_resolve"),
]
_FIELDS = {
    "type": "model|dataset|space",
    "prefix": "(?:datasets/|spaces/)?",
    "repo": "[^/]+(?:/[^/]+)?",
    "oid": "[0-9a-f]{64}",
    "path": ".+",
}


def _pattern(path: str) -> re.Pattern:
    return re.compile(re.sub(r"{(\w+)}", lambda name: f"(?P<{name[1]}>{_FIELDS.get(name[1], '[^/]+')})", path))


_PATTERNS = [(method, _pattern(path), access, answer) for method, path, access, answer in ROUTES]


@dataclass
class Reply:
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class Refusal(Exception):
    """Error answer; its code tells clients what is missing."""

    def __init__(self, status: int, message: str, code: str | None = None, **body):
        super().__init__(message)
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.reply = _json({"error": message, **body}, status, headers)


@dataclass(frozen=True)
class File:
    content: bytes
    is_lfs: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def blob_id(self) -> str:
        """Return git's hash; for a large file the hash of its pointer."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        return git_hash(pointer.encode() if self.is_lfs else self.content)

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.blob_id

    @property
    def facts(self) -> dict:
        """Return size and hashes as in listings."""
        size = len(self.content)
        lfs = {"lfs": {"oid": self.sha256, "sha256": self.sha256, "size": size, "pointerSize": 134}}
        return {"size": size, **(lfs if self.is_lfs else {})}


@dataclass(frozen=True)
class Commit:
    oid: str
    date: str
    files: dict[str, File]


@dataclass
class Repo:
    type: str
    id: str
    is_private: bool
    sdk: str | None
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)  # SHA-256 -> large file, in a commit or not

    def at(self, revision: str) -> Commit:
        """Return the commit of a branch, a tag or an id."""
        commit = self.commits.get(self.branches.get(revision) or self.tags.get(revision) or revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit


@dataclass
class Call:
    """Request with its body."""

    fields: dict[str, str]  # of the route
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes
    user: str | None
    repo: Repo | None = None

    @property
    def json(self) -> dict:
        return json.loads(self.body or b"{}")

    @property
    def commit(self) -> Commit:
        """Return the commit in the path, or the newest."""
        return self.repo.at(self.fields.get("revision", "main"))


class HubServer:
    """The server and its state, kept across `stop` and `start`.

    Attributes:
        requests: "METHOD /path" of all requests in order, without queries.
    """

    def __init__(self):
        self.users = {"hf_test": "tester"}  # token -> name
        self.requests: list[str] = []
        self._repos: dict[tuple[str, str], Repo] = {}
        self._lock = threading.RLock()
        self._connections: set[socket.socket] = set()
        self._num_bytes_read = 0
        self._last_byte: int | None = None
        self._port = 0
        self._server: _Server | None = None

    # ---- what tests use ---------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Serve; after `stop` on the same port and without `fail_after`."""
        self._last_byte = None
        deadline = time.monotonic() + 300
        while True:
            try:
                self._server = _Server(("127.0.0.1", self._port), _Handler)
                break
            except OSError:  # the thread in which the server dies may not have closed the port yet
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        self._server.hub = self
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Close the port and all connections; open requests get no answer."""
        with self._lock:
            server, self._server = self._server, None
            connections = list(self._connections)
        if server is None:
            return
        for connection in connections:
            with contextlib.suppress(OSError):  # the client may have closed it
                connection.shutdown(socket.SHUT_RDWR)
        server.shutdown()
        server.server_close()

    def fail_after(self, num_bytes: int) -> None:
        """Stop without an answer after `num_bytes` more of request bodies."""
        with self._lock:
            self._last_byte = self._num_bytes_read + num_bytes

    def environment(self, home: Path, token: str | None = "hf_test") -> dict[str, str]:
        """Return the environment for a client, with caches in `home`."""
        kept = {name: value for name, value in os.environ.items() if not re.match("HF_|HUGGING|TRANSFORMERS_", name)}
        no_proxy = ",".join(filter(None, [kept.get("no_proxy") or kept.get("NO_PROXY"), "127.0.0.1"]))
        return {
            **kept,
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": no_proxy,
            "no_proxy": no_proxy,
            **({"HF_TOKEN": token} if token else {}),
        }

    def count_commits(self, repo_id: str) -> int:
        """Return the number of commits of a model's repository, on all branches."""
        return len(self._repos["model", repo_id].commits)

    def files(self, repo_id: str, repo_type: str = "model", revision: str = "main") -> dict[str, bytes]:
        """Return path -> content, without access checks."""
        with self._lock:
            commit = self._repos[repo_type, repo_id].at(revision)
        return {path: file.content for path, file in commit.files.items()}

    # ---- who may do what --------------------------------------------------------------------------------------------

    def _answer(self, method: str, path: str, query: str, headers, body: bytes) -> Reply:
        token = (headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.users:
            raise Refusal(401, "Invalid credentials in Authorization header")
        routes = ((pattern.fullmatch(path), *route) for asked, pattern, *route in _PATTERNS if asked == method)
        match, access, answer = next(filter(lambda route: route[0], routes), (None, None, None))
        if match is None:
            raise Refusal(404, "Sorry, we can't find the page you are looking for.")
        fields = {name: unquote(value) for name, value in match.groupdict().items()}
        call = Call(fields, parse_qs(query), headers, body, self.users.get(token))
        with self._lock:
            if access:
                types = {prefix: repo_type for repo_type, prefix in PREFIXES.items()}
                repo_type = fields.get("type") or types[fields["prefix"]]
                call.repo = self._find(repo_type, fields["repo"], call.user, access)
            reply = getattr(self, answer)(call)
        return reply if isinstance(reply, Reply) else _json(reply)

    def _find(self, repo_type: str, repo_id: str, user: str | None, access: str) -> Repo:
        repo = self._repos.get((repo_type, repo_id))
        is_member = self._belongs(user, repo_id.partition("/")[0])
        if repo is None or (repo.is_private and not is_member and access != "upload"):
            # The code counts: clients take a bare 401 for a missing repository only where the address is https.
            status, message = (404, "Repository not found") if user else (401, "Invalid username or password.")
            raise Refusal(status, message, "RepoNotFound")
        if access == "write" and user is None:
            raise Refusal(401, "Invalid username or password.")
        if access == "write" and not is_member:
            raise Refusal(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        return repo

    def _belongs(self, user: str | None, namespace: str) -> bool:
        return user is not None and namespace in (user, ORGANIZATION)

    # ---- repositories -----------------------------------------------------------------------------------------------

    def _create_repo(self, call: Call) -> dict:
        if call.user is None:
            raise Refusal(401, "Invalid username or password.")
        repo_type, namespace = call.json.get("type") or "model", call.json.get("organization") or call.user
        if not self._belongs(call.user, namespace):
            what = f"You don't have the rights to create a {repo_type} under the namespace"
            raise Refusal(403, f'{what} "{namespace}"')
        repo_id = f"{namespace}/{call.json['name']}"
        is_private, sdk = call.json.get("visibility") == "private", call.json.get("sdk")
        repo = self._repos[repo_type, repo_id] = Repo(repo_type, repo_id, is_private, sdk)
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        files = {".gitattributes": File(attributes.encode())}
        if repo_type == "space":
            files["README.md"] = File(f"---\ntitle: {repo_id}\nsdk: {sdk}\n---\n".encode())
        self._record(repo, "main", files)
        return {"url": f"{self.url}/{PREFIXES[repo_type]}{repo_id}", "name": repo_id, "private": is_private}

    def _settings(self, call: Call) -> dict:
        if "visibility" in call.json:
            call.repo.is_private = call.json["visibility"] == "private"
        return {"private": call.repo.is_private}

    def _refs(self, call: Call) -> dict:
        def listed(refs: dict[str, str], kind: str) -> list[dict]:
            return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid} for name, oid in refs.items()]

        branches, tags = listed(call.repo.branches, "heads"), listed(call.repo.tags, "tags")
        return {"branches": branches, "tags": tags, "converts": [], "pullRequests": []}

    def _create_branch(self, call: Call) -> dict:
        call.repo.branches[call.fields["name"]] = call.repo.at(call.json.get("startingPoint", "main")).oid
        return {}

    def _create_tag(self, call: Call) -> dict:
        call.repo.tags[call.json["tag"]] = call.commit.oid
        return {}

    # ---- reading ----------------------------------------------------------------------------------------------------

    def _info(self, call: Call) -> dict:
        repo, commit = call.repo, call.commit
        files = sorted(commit.files.items())
        return {
            "id": repo.id,
            "sha": commit.oid,
            "lastModified": commit.date,
            "private": repo.is_private,
            "tags": [],
            "siblings": [{"rfilename": path, "blobId": file.blob_id, **file.facts} for path, file in files],
            **({"sdk": repo.sdk} if repo.type == "space" else {}),
        }

    def _tree(self, call: Call) -> list[dict]:
        folder = call.fields.get("path", "").strip("/")
        is_recursive = call.query.get("recursive", [""])[0].lower() in ("true", "1")
        start = f"{folder}/" if folder else ""
        below = [entry for entry in _entries(call.commit) if entry["path"].startswith(start)]
        if folder and not below:
            raise Refusal(404, f"{folder} does not exist on {call.commit.oid}", "EntryNotFound")
        return [entry for entry in below if is_recursive or "/" not in entry["path"].removeprefix(start)]

    def _resolve(self, call: Call) -> Reply:
        headers = {"X-Repo-Commit": call.commit.oid, "Accept-Ranges": "bytes"}
        file = call.commit.files.get(call.fields["path"])
        if file is None:
            refusal = Refusal(404, "Entry not found", "EntryNotFound")
            refusal.reply.headers |= headers  # so that clients remember that the file is missing
            raise refusal
        headers |= {"ETag": f'"{file.etag}"', "Content-Type": "application/octet-stream"}
        if file.is_lfs:
            headers |= {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(len(file.content))}
        content, size = file.content, len(file.content)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", call.headers.get("Range") or "")
        if not asked:
            return Reply(content, 200, headers)
        start, stop = int(asked[1]), min(int(asked[2] or size) + 1, size)
        return Reply(content[start:stop], 206, headers | {"Content-Range": f"bytes {start}-{stop - 1}/{size}"})

    # ---- writing ----------------------------------------------------------------------------------------------------

    def _validate_yaml(self, call: Call) -> dict:
        summary = re.search(r"^short_description: *(.*)$", call.json["content"], re.MULTILINE)
        if summary and len(summary[1]) > 60:  # one thing of those that the Hub refuses
            fault = '"short_description" length must be less than or equal to 60 characters long'
            raise Refusal(400, "Invalid metadata in README.md", errors=[{"message": fault}], warnings=[])
        return {"errors": [], "warnings": []}

    def _preupload(self, call: Call) -> dict:
        answers = []
        for asked in call.json["files"]:
            is_large = asked["path"].endswith(LFS_SUFFIXES)
            present = call.commit.files.get(asked["path"])
            answer = {"path": asked["path"], "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
            answers.append({**answer, "oid": present and present.etag})
        return {"files": answers, "commitOid": call.commit.oid}

    def _lfs_batch(self, call: Call) -> dict:
        repo, objects = call.repo, []
        for asked in call.json["objects"]:
            objects.append({"oid": asked["oid"], "size": asked["size"]})
            if asked["oid"] not in repo.uploads:
                upload = {"href": f"{self.url}/lfs/{repo.type}/{repo.id}/{asked['oid']}"}
                objects[-1] |= {"authenticated": True, "actions": {"upload": upload}}
        return {"transfer": "basic", "objects": objects}

    def _lfs_upload(self, call: Call) -> dict:
        if hashlib.sha256(call.body).hexdigest() != call.fields["oid"]:
            raise Refusal(400, "The content does not match its hash")
        call.repo.uploads[call.fields["oid"]] = call.body
        return {}

    def _commit(self, call: Call) -> dict:
        repo, branch = call.repo, call.fields["revision"]
        if branch not in repo.branches:
            raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        _, *operations = [(line["key"], line["value"]) for line in map(json.loads, call.body.splitlines())]
        files = dict(repo.at(branch).files)
        for key, value in operations:
            path = value["path"]
            if key == "file":
                files[path] = File(base64.b64decode(value["content"], validate=True))
            elif key == "lfsFile":
                if value["oid"] not in repo.uploads:
                    raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {path}")
                files[path] = File(repo.uploads[value["oid"]], is_lfs=True)
            elif files.pop(path, None) is None:  # a deletion
                raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        commit = self._record(repo, branch, files)
        url = f"{self.url}/{PREFIXES[repo.type]}{repo.id}/commit/{commit.oid}"
        return {"success": True, "commitOid": commit.oid, "commitUrl": url, "hookOutput": ""}

    def _record(self, repo: Repo, branch: str, files: dict[str, File]) -> Commit:
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
        oid = hashlib.sha1(f"{repo.type} {repo.id} {branch} {len(repo.commits)} {date}".encode()).hexdigest()
        commit = repo.commits[oid] = Commit(oid, date, files)
        repo.branches[branch] = oid
        return commit

    # ---- bytes ------------------------------------------------------------------------------------------------------

    def _count(self, num_bytes: int) -> None:
        """Count bytes of a body, and stop where `fail_after` said."""
        with self._lock:
            self._num_bytes_read += num_bytes
            is_over = self._last_byte is not None and self._num_bytes_read >= self._last_byte
        if is_over:
            self.stop()


class _Server(ThreadingHTTPServer):
    request_queue_size = 64
    hub: HubServer

    def handle_error(self, request, client_address) -> None:
        """Print nothing about broken connections."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        with self.server.hub._lock:
            self.end_if_stopped()
            self.server.hub._connections.add(self.connection)

    def finish(self) -> None:
        self.server.hub._connections.discard(self.connection)
        super().finish()

    def end_if_stopped(self) -> None:
        if self.server.hub._server is not self.server:
            raise ConnectionAbortedError

    def answer(self) -> None:
        hub, (path, _, query) = self.server.hub, self.path.partition("?")
        hub.requests.append(f"{self.command} {path}")
        body = b"".join(self.read_body(int(self.headers.get("Content-Length") or 0)))
        method = "GET" if self.command == "HEAD" else self.command
        try:
            with hub._lock:
                self.end_if_stopped()
                reply = hub._answer(method, path, query, self.headers, body)
        except Refusal as refusal:
            reply = refusal.reply
        self.send_response(reply.status)
        for name, value in {**reply.headers, "Content-Length": str(len(reply.body))}.items():
            self.send_header(name, value.encode("ascii", "replace").decode())
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def read_body(self, length: int) -> Iterator[bytes]:
        while length:
            piece = self.rfile.read(min(length, 1 << 16)) if length > 0 else b""
            if not piece:
                raise ConnectionAbortedError
            self.server.hub._count(len(piece))
            yield piece
            length -= len(piece)

    def log_message(self, *_) -> None:
        """Print nothing."""


def _json(value, status: int = 200, headers: dict[str, str] | None = None) -> Reply:
    return Reply(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})


def _entries(commit: Commit) -> Iterator[dict]:
    """Yield folders and files in the form of listings."""
    folders = {str(folder) for path in commit.files for folder in Path(path).parents} - {"."}
    for path in sorted({*folders, *commit.files}):
        entry = {"type": "directory", "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0}
        if file := commit.files.get(path):
            entry = {"type": "file", "oid": file.blob_id, **file.facts}
        yield {**entry, "path": path}
