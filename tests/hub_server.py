"""A small Hub on loopback: what huggingface_hub's real client asks of the real one, for repositories of some files.

Every upload takes the Hub's own way for small files: create, preupload, commit. It knows no users: any token may
write.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """Files of each commit by path; the last one is `main`."""

    private: bool = False
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)

    def commit(self, files: dict[str, bytes]) -> str:
        name = hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits.append((name, files))
        return name

    def at(self, revision: str) -> tuple[str, dict[str, bytes]]:
        return next((commit for commit in self.commits if commit[0] == revision), self.commits[-1])


class Hub:
    """The server; `url` is what `HF_ENDPOINT` has to be."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}  # "datasets/org/name" and the like
        self.lock = threading.Lock()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def answer(self, status: int, body: object = None, **headers: str) -> None:
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                place = unquote(urlsplit(self.path).path)
                with hub.lock:
                    if not self.headers.get("Authorization"):
                        self.answer(401, {"error": "Invalid username or password."})
                    elif place == "/api/repos/create":
                        self.create(json.loads(body))
                    elif re.fullmatch(r"/api/\w+/[^/]+/[^/]+/preupload/[^/]+", place):
                        plan = {"uploadMode": "regular", "shouldIgnore": False}
                        self.answer(200, {"files": [{"path": f["path"]} | plan for f in json.loads(body)["files"]]})
                    elif found := re.fullmatch(r"/api/(\w+/[^/]+/[^/]+)/commit/[^/]+", place):
                        self.commit(found[1], body)
                    else:
                        self.answer(404, {"error": f"No such place: {place}"})

            def create(self, asked: dict) -> None:
                kind = asked.get("type") or "model"
                owner, name = asked.get("organization") or "me", asked["name"]
                key = f"{kind}s/{owner}/{name}"
                exists = key in hub.repositories
                if not exists:
                    private = asked.get("private") or asked.get("visibility") == "private"
                    hub.repositories[key] = Repository(private=bool(private))
                    hub.repositories[key].commit({})
                prefix = "" if kind == "model" else f"{kind}s/"
                url = f"{hub.url}/{prefix}{owner}/{name}"
                self.answer(409 if exists else 200, {"url": url, "error": "You already created this repo"})

            def commit(self, key: str, body: bytes) -> None:
                repository = hub.repositories[key]
                files = dict(repository.at("main")[1])
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                    elif line["key"] == "deletedFile":
                        files.pop(line["value"]["path"], None)
                name = repository.commit(files)
                url = f"{hub.url}/{key}/commit/{name}"
                self.answer(200, {"success": True, "commitOid": name, "commitUrl": url, "hookOutput": ""})

            def do_GET(self):
                place = unquote(urlsplit(self.path).path)
                with hub.lock:
                    if found := re.fullmatch(r"/api/(\w+/[^/]+/[^/]+)(?:/revision/([^/]+))?", place):
                        self.info(found[1], found[2] or "main")
                    elif found := re.fullmatch(r"/api/(\w+/[^/]+/[^/]+)/tree/([^/]+)(?:/.*)?", place):
                        _, files = hub.repositories[found[1]].at(found[2])
                        self.answer(200, [entry(path, data) for path, data in files.items()])
                    elif found := re.fullmatch(r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", place):
                        self.resolve(f"{found[1] or 'models'}/{found[2]}", found[3], found[4])
                    else:
                        self.answer(404, {"error": f"No such place: {place}"})

            do_HEAD = do_GET

            def info(self, key: str, revision: str) -> None:
                if key not in hub.repositories:
                    return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
                name, files = hub.repositories[key].at(revision)
                told = {"id": key.split("/", 1)[1], "sha": name, "private": hub.repositories[key].private}
                self.answer(200, told | {"siblings": [{"rfilename": path} for path in files], "tags": []})

            def resolve(self, key: str, revision: str, path: str) -> None:
                name, files = hub.repositories[key].at(revision)
                if path not in files:
                    return self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
                data = files[path]
                self.answer(200, data, X_Repo_Commit=name, ETag=f'"{hashlib.sha1(data).hexdigest()}"')

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def files(self, key: str) -> dict[str, bytes]:
        """What `main` of a repository holds, e.g. of `datasets/org/name`."""
        with self.lock:
            return dict(self.repositories[key].at("main")[1])

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def entry(path: str, data: bytes) -> dict:
    return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
