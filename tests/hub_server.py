"""A small Hub on loopback: what huggingface_hub's real client asks of the real one, over HTTP.

Repositories with branches, tags and pull requests; small files in the commit itself, weights and pictures through LFS;
metadata of cards checked; tokens that may write here and not there. Uploads can be held, so that a client is killed in
the middle of one.
"""

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


LARGE = (".safetensors", ".png")  # what the Hub's default .gitattributes sends through LFS


@dataclass
class Repository:
    """Files of each commit by path, and the commits that branches and tags stand at."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    references: dict[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], reference: str = "main") -> str:
        told = [f"{path} {hashlib.sha1(data).hexdigest()}" for path, data in sorted(files.items())]
        name = hashlib.sha1("\n".join([str(len(self.commits)), *told]).encode()).hexdigest()
        self.commits[name] = files
        self.references[reference] = name
        return name

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit that a branch, a tag or the commit's own name stands for, and its files."""
        name = self.references.get(revision, revision)
        return (name, self.commits[name]) if name in self.commits else None


class Hub:
    """The server; `url` is what `HF_ENDPOINT` has to be.

    Args:
        writers: for each token the owners under whose names it may write; by default any token may write anywhere.
    """

    def __init__(self, writers: dict[str, set[str]] | None = None):
        self.writers = writers
        self.repositories: dict[str, Repository] = {}  # "datasets/org/name" and the like
        self.large: dict[str, bytes] = {}  # what came through LFS, by SHA-256
        self.uploads: list[str] = []  # SHA-256 of each LFS upload, in order
        self.hold_after: int | None = None  # so many LFS uploads come through, the next wait until this is None again
        self.requests: list[str] = []
        self.lock = threading.RLock()
        self.passing = threading.Condition(self.lock)
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def forget(self) -> None:
        """As if nobody had ever written or asked anything."""
        with self.lock:
            for held in (self.repositories, self.large, self.uploads, self.requests):
                held.clear()

    def files(self, key: str, revision: str = "main") -> dict[str, bytes]:
        """What a repository holds, e.g. `models/org/name`."""
        with self.lock:
            return dict(self.repositories[key].at(revision)[1])

    def may_write(self, token: str | None, key: str) -> bool:
        return self.writers is None or key.split("/")[1] in self.writers.get(token, ())

    def passes(self) -> bool:
        return self.hold_after is None or len(self.uploads) < self.hold_after

    def release(self) -> None:
        with self.passing:
            self.hold_after = None
            self.passing.notify_all()

    def close(self) -> None:
        self.release()
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    """One connection of a client."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    @property
    def token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def answer(self, status: int, body: object = None, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.answer(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def route(self, table: list) -> None:
        """Answers by the first entry (pattern, method of this class) whose pattern is the whole path."""
        place = unquote(urlsplit(self.path).path)
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {place}")
            for pattern, method in table:
                if found := re.fullmatch(pattern, place):
                    return method(self, *found.groups())
        self.answer(404, {"error": f"No such place: {place}"})

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    # Reading

    def do_GET(self):
        repository = r"/api/(\w+/[^/]+/[^/]+)"
        self.route(
            [
                ("/api/whoami-v2", Handler.who),
                (rf"{repository}/auth-check(/write)?", Handler.check),
                (rf"{repository}(?:/revision/(.+))?", Handler.info),
                (rf"{repository}/tree/([^/]+)(?:/(.*))?", Handler.tree),
                (rf"{repository}/variables", lambda self, key: self.answer(200, {})),
                (r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", Handler.resolve),
            ]
        )

    do_HEAD = do_GET

    def find(self, key: str, revision: str | None = None) -> tuple[str, dict[str, bytes]] | None:
        """The commit asked for and its files; otherwise answers why not."""
        repository = self.hub.repositories.get(key)
        if repository is None or (repository.private and not self.token):
            return self.refuse(404 if self.token else 401, "RepoNotFound", "Repository not found")
        if (commit := repository.at(revision or "main")) is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def who(self) -> None:
        owners = sorted(self.hub.writers.get(self.token, ())) if self.hub.writers is not None else ["me"]
        if not self.token or (self.hub.writers is not None and self.token not in self.hub.writers):
            return self.answer(401, {"error": "Invalid credentials in Authorization header"})
        self.answer(200, {"type": "user", "name": "me", "orgs": [{"name": name} for name in owners if name != "me"]})

    def check(self, key: str, write: str | None) -> None:
        if self.find(key) and (not write or self.writable(key)):
            self.answer(200, {})

    def info(self, key: str, revision: str | None) -> None:
        if commit := self.find(key, revision):
            told = {"id": key.split("/", 1)[1], "sha": commit[0], "private": self.hub.repositories[key].private}
            self.answer(200, told | {"siblings": [{"rfilename": path} for path in commit[1]], "tags": []})

    def tree(self, key: str, revision: str, folder: str | None) -> None:
        if commit := self.find(key, revision):
            files = [entry(path, data) for path, data in commit[1].items() if path.startswith(folder or "")]
            self.answer(200, files)

    def resolve(self, kind: str | None, repo_id: str, revision: str, path: str) -> None:
        if commit := self.find(f"{kind or 'models'}/{repo_id}", revision):
            name, files = commit
            if path not in files:
                return self.refuse(404, "EntryNotFound", "Entry not found")
            told = entry(path, files[path])
            headers = {"X_Repo_Commit": name, "ETag": f'"{told["oid"]}"'}
            if "lfs" in told:
                headers |= {"X_Linked_ETag": f'"{told["lfs"]["oid"]}"', "X_Linked_Size": str(told["size"])}
            self.answer(200, files[path], **headers)

    # Writing

    def do_POST(self):
        self.content = self.body()
        repository = r"/api/(\w+/[^/]+/[^/]+)"
        if not self.token:
            return self.answer(401, {"error": "Invalid username or password."})
        self.route(
            [
                ("/api/repos/create", Handler.create),
                ("/api/validate-yaml", Handler.validate),
                (rf"{repository}/preupload/([^/]+)", Handler.preupload),
                (rf"{repository}/commit/([^/]+)", Handler.commit),
                (rf"{repository}/(branch|tag)/(.+)", Handler.refer),
                (rf"{repository}/variables", Handler.set_variable),
                (r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", Handler.batch),
                ("/lfs/verify", Handler.verify),
            ]
        )

    def do_PUT(self):
        data, oid = self.body(), self.path.rpartition("/")[2]
        with self.hub.passing:
            self.hub.passing.wait_for(lambda: self.hub.passes())
            assert hashlib.sha256(data).hexdigest() == oid
            self.hub.large[oid] = data
            self.hub.uploads.append(oid)
        self.answer(200, {})

    def writable(self, key: str) -> bool:
        """Whether the client may write there; otherwise answers that it may not."""
        if not self.hub.may_write(self.token, key):
            self.answer(403, {"error": f"Forbidden: you must have write rights under {key.split('/')[1]}"})
            return False
        return True

    def create(self) -> None:
        asked = json.loads(self.content)
        kind = asked.get("type") or "model"
        owner, name = asked.get("organization") or "me", asked["name"]
        key = f"{kind}s/{owner}/{name}"
        if not self.writable(key):
            return
        exists = key in self.hub.repositories
        if not exists:
            private = asked.get("private") or asked.get("visibility") == "private"
            self.hub.repositories[key] = Repository(private=bool(private))
            self.hub.repositories[key].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        prefix = "" if kind == "model" else f"{kind}s/"
        url = f"{self.hub.url}/{prefix}{owner}/{name}"
        self.answer(409 if exists else 200, {"url": url, "error": "You already created this repo"})

    def validate(self) -> None:
        content = json.loads(self.content)["content"]
        found = re.match(r"\A---\r?\n(.*?)\r?\n---(\r?\n|\Z)", content, flags=re.DOTALL)
        errors = []
        try:
            metadata = yaml.safe_load(found[1]) if found else {}
            if "model-index" in metadata and not all("name" in m and "results" in m for m in metadata["model-index"]):
                errors.append('"model-index[0]" needs "name" and "results"')
            if metadata.get("license") == "other" and not metadata.get("license_name"):
                errors.append('"license_name" is required when "license" is "other"')
        except (yaml.YAMLError, AttributeError, TypeError) as error:
            errors.append(f"YAML metadata: {error}")
        self.answer(400 if errors else 200, {"errors": [{"message": text} for text in errors], "warnings": []})

    def preupload(self, key: str, revision: str) -> None:
        if not self.writable(key) or not (commit := self.find(key, revision)):
            return
        files = []
        for asked in json.loads(self.content)["files"]:
            path = asked["path"]
            told = {"path": path, "uploadMode": "lfs" if path.endswith(LARGE) else "regular", "shouldIgnore": False}
            if path in commit[1]:
                known = entry(path, commit[1][path])
                told["oid"] = known.get("lfs", known)["oid"]
            files.append(told)
        self.answer(200, {"files": files})

    def batch(self, kind: str | None, repo_id: str) -> None:
        if not self.writable(f"{kind or 'models'}/{repo_id}"):
            return
        objects = []
        for asked in json.loads(self.content)["objects"]:
            upload = {"href": f"{self.hub.url}/lfs/{asked['oid']}"}
            actions = {"upload": upload, "verify": {"href": f"{self.hub.url}/lfs/verify"}}
            objects.append(asked if asked["oid"] in self.hub.large else asked | {"actions": actions})
        self.answer(200, {"transfer": "basic", "objects": objects})

    def verify(self) -> None:
        asked = json.loads(self.content)
        right = len(self.hub.large.get(asked["oid"], b"")) == asked["size"]
        self.answer(200 if right else 404, {})

    def commit(self, key: str, revision: str) -> None:
        if not self.writable(key) or not (before := self.find(key, revision)):
            return
        files = dict(before[1])
        for line in map(json.loads, self.content.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] == "deletedFile":
                files.pop(value["path"], None)
            elif line["key"] == "deletedFolder":
                files = {path: data for path, data in files.items() if not path.startswith(value["path"])}
        repository, told = self.hub.repositories[key], {}
        if parse_qs(urlsplit(self.path).query).get("create_pr") == ["1"]:
            number = 1 + sum(reference.startswith("refs/pr/") for reference in repository.references)
            revision, told = f"refs/pr/{number}", {"pullRequestUrl": f"{self.hub.url}/{key}/discussions/{number}"}
        name = repository.commit(files, revision)
        url = f"{self.hub.url}/{key}/commit/{name}"
        self.answer(200, {"success": True, "commitOid": name, "commitUrl": url, "hookOutput": ""} | told)

    def refer(self, key: str, what: str, name: str) -> None:
        if not self.writable(key):
            return
        start = name if what == "tag" else json.loads(self.content or b"{}").get("startingPoint") or "main"
        name = json.loads(self.content)["tag"] if what == "tag" else name
        if commit := self.find(key, start):
            exists = name in self.hub.repositories[key].references
            self.hub.repositories[key].references.setdefault(name, commit[0])
            self.answer(409 if exists else 200, {"error": "Reference already exists"} if exists else {})

    def set_variable(self, key: str) -> None:
        if self.writable(key):
            asked = json.loads(self.content)
            self.hub.repositories[key].variables[asked["key"]] = asked["value"]
            self.answer(200, {name: {"value": value} for name, value in self.hub.repositories[key].variables.items()})


def environment(hub: Hub, home: Path, token: str | None = "any") -> dict[str, str]:
    """Variables of a process that talks to this Hub, with a cache of its own in `home`."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    told = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    told |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return inherited | told | ({"HF_TOKEN": token} if token else {})


def entry(path: str, data: bytes) -> dict:
    """A file as the Hub lists it: Git's name of its content, and the SHA-256 of what went through LFS."""
    told = {"type": "file", "path": path, "size": len(data)}
    if path.endswith(LARGE):
        oid = hashlib.sha256(data).hexdigest()
        return told | {
            "oid": hashlib.sha1(oid.encode()).hexdigest(),
            "lfs": {"oid": oid, "size": len(data), "pointerSize": 134},
        }
    return told | {"oid": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}
