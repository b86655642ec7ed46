"""A small server with the part of the Hugging Face Hub's HTTP interface that uploads and downloads use.

It listens on 127.0.0.1, keeps repositories in memory, and records every request.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

REPOSITORY = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)?")
LICENSES = {"apache-2.0", "mit", "cc-by-4.0", "llama3.2", "unknown", "other"}
"""Some of the identifiers in https://huggingface.co/docs/hub/repositories-licenses."""


def refused_metadata(text: str) -> list[str]:
    """What the Hub refuses in a card, as far as its messages in public issues say.

    "base_model" and "datasets" that are no names of repositories, an unknown "license", and entries
    of "model-index" that lack a required field or have null in place of a text
    (https://github.com/huggingface/hub-docs/blob/main/modelcard.md).
    """
    head = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    if head is None:
        return []
    data = yaml.safe_load(head[1])
    if not isinstance(data, dict):
        return ["metadata must be a mapping"]
    found = []
    for key in ("base_model", "datasets", "source_datasets"):
        values = data.get(key, [])
        for one in [values] if isinstance(values, str) else values:
            if not isinstance(one, str) or not REPOSITORY.fullmatch(one):
                found.append(f'"{key}" with value {one!r} is not valid')
    if data.get("license", "mit") not in LICENSES:
        found.append(f'"license" must be one of {sorted(LICENSES)}')
    if data.get("license") == "other" and not isinstance(data.get("license_name", ""), str):
        found.append('"license_name" must be a string')
    if not all(isinstance(tag, str) for tag in data.get("tags", [])):
        found.append('"tags" must be strings')
    return found + _refused_results(data.get("model-index", []))


def _refused_results(index: list[dict[str, Any]]) -> list[str]:
    found = []
    for entry in index:
        if not (isinstance(entry.get("name"), str) and entry["name"]):
            found.append('"model-index[0].name" must be a string')
        for result in entry["results"]:
            texts = [result["task"].get("type"), *result["dataset"].values()]
            texts += [metric.get("type") for metric in result["metrics"]]
            if not {"type", "name"} <= result["dataset"].keys() or not all(
                isinstance(one, str) and one for one in texts
            ):
                found.append('"model-index[0].results" lacks a required text')
            if any(metric.get("value") is None for metric in result["metrics"]):
                found.append('"model-index[0].results[0].metrics[0].value" is required')
    return found


@dataclass
class Repository:
    """A repository: visibility and files."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)
    """Files that were committed as LFS objects."""
    commits: int = 0

    @property
    def revision(self) -> str:
        return hashlib.sha1(str(sorted(self.files.items())).encode()).hexdigest()


@dataclass
class Hub:
    """The state of the server."""

    url: str = ""
    tokens: dict[str, str] = field(default_factory=lambda: {"secret-of-ada": "ada"})
    """Users by access token."""
    repositories: dict[str, Repository] = field(default_factory=dict)
    """By name; those of data sets begin with datasets/."""
    objects: dict[str, bytes] = field(default_factory=dict)
    """LFS objects by SHA-256."""
    requests: list[tuple[str, str]] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    """Bodies of all requests but LFS objects."""
    refused: dict[str, int] = field(default_factory=dict)
    """Status to answer with, by the beginning of a path."""
    slow_put: threading.Event | None = None
    """Uploads of LFS objects wait for this event, except the first."""
    first_put: threading.Lock = field(default_factory=threading.Lock)
    """Acquired by the first upload while `slow_put` is set; several can begin at the same time."""

    def asked(self, method: str, part: str) -> list[str]:
        """The paths of requests that contain a text."""
        return [path for verb, path in self.requests if verb == method and part in path]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        del format, args

    def answer(self, status: int, data: Any = None, **headers: str) -> None:
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", headers.pop("length", str(len(body))))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def user(self) -> str | None:
        return self.hub.tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def begin(self) -> tuple[str, bytes] | None:
        path = self.path.partition("?")[0]
        self.hub.requests.append((self.command, path))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(self._chunks())
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.command != "PUT":
            self.hub.bodies.append(body)
        for start, status in self.hub.refused.items():
            if path.startswith(start):
                self.answer(status, {"error": "refused by the stub"})
                return None
        return path, body

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def repository(self, path: str) -> tuple[str, Repository] | None:
        """The repository that a path of the API is about, and its name; answers 401 or 404 itself."""
        found = re.match(r"/(?:api/)?(?:models/|(datasets/))?([^/]+/[^/]+?)(?:\.git)?(?=/|$)", path)
        assert found, path
        name = (found[1] or "") + found[2]
        repository = self.hub.repositories.get(name)
        if repository is not None and (not repository.private or self.user()):
            return name, repository
        status = 404 if self.user() else 401
        self.answer(status, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        return None

    def do_GET(self) -> None:
        if (begun := self.begin()) is None:
            return
        path, _ = begun
        if path == "/api/whoami-v2":
            user = self.user()
            self.answer(200 if user else 401, {"name": user, "type": "user", "orgs": []})
        elif (found := self.repository(path)) is not None:
            self._read(path, *found)

    do_HEAD = do_GET

    def _read(self, path: str, name: str, repository: Repository) -> None:
        short = name.removeprefix("datasets/")
        if "/resolve/" in path:
            file = path.partition("/resolve/")[2].partition("/")[2]
            if file not in repository.files:
                self.answer(
                    404, {}, X_Error_Code="EntryNotFound", X_Repo_Commit=repository.revision
                )
                return
            body = repository.files[file]
            etag = f'"{hashlib.sha256(body).hexdigest()}"'
            self.answer(200, body, ETag=etag, X_Repo_Commit=repository.revision)
        elif "/tree/" in path:
            inside = path.partition("/tree/")[2].partition("/")[2]
            rows = [
                {"type": "file", "path": file, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                for file, body in repository.files.items() if file.startswith(inside)
            ]  # fmt: skip
            if inside and not rows:
                self.answer(404, {}, X_Error_Code="EntryNotFound")
            else:
                self.answer(200, rows)
        else:
            siblings = [{"rfilename": file} for file in repository.files]
            self.answer(200, {"id": short, "modelId": short, "sha": repository.revision, "private": repository.private,
                              "siblings": siblings, "tags": [], "downloads": 0, "likes": 0})  # fmt: skip

    def do_POST(self) -> None:
        if (begun := self.begin()) is None:
            return
        path, body = begun
        if path == "/api/validate-yaml":
            errors = refused_metadata(json.loads(body)["content"])
            self.answer(400 if errors else 200, {"errors": [{"message": one} for one in errors], "warnings": []})  # fmt: skip
            return
        if self.user() is None:
            self.answer(401, {"error": "Invalid credentials in Authorization header"})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif (found := self.repository(path)) is not None:
            self._write(path, body, *found)

    def _create(self, wanted: dict[str, Any]) -> None:
        kind = "datasets/" if wanted.get("type") == "dataset" else ""
        name = f"{kind}{wanted.get('organization') or self.user()}/{wanted['name']}"
        if not name.startswith(f"{kind}{self.user()}/"):
            self.answer(403, {"error": "You don't have the rights to create a model here"})
            return
        status = 409 if name in self.hub.repositories else 200
        private = wanted.get("private") is True or wanted.get("visibility") == "private"
        self.hub.repositories.setdefault(name, Repository(private))
        self.answer(status, {"url": f"{self.hub.url}/{name}", "error": "You already created this"})

    def _write(self, path: str, body: bytes, name: str, repository: Repository) -> None:
        if "/preupload/" in path:
            files = []
            for one in json.loads(body)["files"]:
                large = one["path"].endswith(".safetensors") or one["size"] > 10_000_000
                there = repository.files.get(one["path"])
                oid = None
                if there is not None:
                    blob = b"blob %d\0" % len(there) + there
                    oid = hashlib.sha256(there).hexdigest() if large else hashlib.sha1(blob).hexdigest()  # fmt: skip
                files.append({"path": one["path"], "uploadMode": "lfs" if large else "regular",
                              "shouldIgnore": False, "oid": oid})  # fmt: skip
            self.answer(200, {"files": files})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = []
            for one in json.loads(body)["objects"]:
                entry = {"oid": one["oid"], "size": one["size"]}
                if one["oid"] not in self.hub.objects:
                    href = f"{self.hub.url}/lfs/{one['oid']}"
                    entry["actions"] = {"upload": {"href": href, "header": {}}}
                objects.append(entry)
            self.answer(200, {"transfer": "basic", "objects": objects})
        else:
            assert "/commit/" in path, path
            self._commit([json.loads(line) for line in body.splitlines()], name, repository)

    def _commit(self, lines: list[dict[str, Any]], name: str, repository: Repository) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
                repository.large.discard(value["path"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    self.answer(400, {"error": "LFS pointer to a missing object"})
                    return
                repository.files[value["path"]] = self.hub.objects[value["oid"]]
                repository.large.add(value["path"])
            elif line["key"] == "deletedFile":
                del repository.files[value["path"]]
        repository.commits += 1
        url = f"{self.hub.url}/{name}/commit/{repository.revision}"
        self.answer(200, {"success": True, "commitOid": repository.revision, "commitUrl": url})

    def do_PUT(self) -> None:
        if (begun := self.begin()) is None:
            return
        path, body = begun
        if self.hub.slow_put is not None and not self.hub.first_put.acquire(blocking=False):
            self.hub.slow_put.wait(60)
        oid = path.rpartition("/")[2]
        if hashlib.sha256(body).hexdigest() != oid:
            self.answer(400, {"error": "the object has another SHA-256"})
            return
        self.hub.objects[oid] = body
        self.answer(200, b"", ETag=f'"{oid}"')


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Run the server, and yield its state."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
