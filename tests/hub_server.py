"""A small Hugging Face Hub on the loopback: what `huggingface_hub` asks of it to create, upload, list and download.

    server = HubServer()          # answers at server.endpoint; the token TOKEN may write
    server.repos["me/adapter"]    # every commit: {name: bytes}
    server.faults["PUT"] = 2      # the next two PUTs are cut in the middle of their body

Its paths and fields are those that `huggingface_hub` 2.4 sends and reads, with Xet switched off (HF_HUB_DISABLE_XET).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_may_write"


class HubServer(ThreadingHTTPServer):
    """Attributes:
    repos: name, or name@branch -> commits, each {path: content}, the last one is its head.
    private: The repositories that nobody else may see.
    blobs: sha256 -> content that was uploaded by LFS.
    faults: HTTP method or part of a path -> how many more of such requests lose their connection.
    silences: Part of a path -> how many more POSTs to it are carried out and not answered.
    refusals: Part of a path -> the status that POSTs to it get.
    requests: "METHOD path" of each request that came.
    messages: Summary and description of each commit.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, list[dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.blobs: dict[str, bytes] = {}
        self.faults: dict[str, int] = {}
        self.silences: dict[str, int] = {}
        self.refusals: dict[str, int] = {}
        self.requests: list[str] = []
        self.messages: list[str] = []
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def stop(self) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """A client that goes away is part of the tests."""


def blob_id(content: bytes) -> str:
    """Git's name of a file."""
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def is_lfs(path: str) -> bool:
    return path.endswith(".safetensors")


def commit_id(repo: str, commits: list) -> str:
    return hashlib.sha1(f"{repo} {len(commits)}".encode()).hexdigest()


def at_branch(repo: str, branch: str) -> str:
    """The name of `HubServer.repos`."""
    return repo if branch == "main" else f"{repo}@{branch}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args):
        pass

    # ---- answers ----

    def answer(
        self, status: int, content=b"", headers: dict[str, str] | None = None, error: str | None = None
    ) -> None:
        silence = next((name for name, left in self.server.silences.items() if left and name in self.line), None)
        if silence is not None:
            self.server.silences[silence] -= 1
            self.close_connection = True
            raise ConnectionAbortedError
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers = {"Content-Type": "application/json", **(headers or {})}
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        if error is not None:
            self.send_header("X-Error-Message", error)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def body(self) -> bytes:
        length = int(self.headers.get("Content-Length", 0))
        with self.server.lock:
            fault = next((name for name, left in self.server.faults.items() if left and name in self.line), None)
            if fault is not None:
                self.server.faults[fault] -= 1
        if fault is not None:
            self.rfile.read(length // 2)
            self.close_connection = True
            raise ConnectionAbortedError
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(length)
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def may_write(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self.answer(401, {"error": "Invalid credentials"}, error="Invalid credentials in Authorization header")
        return False

    # ---- requests ----

    def do_POST(self):
        path = self.start()
        content = self.body()
        # As the Hub: anybody may have a card validated.
        if path == "/api/validate-yaml":
            return self.validate(json.loads(content)["content"])
        if not self.may_write():
            return None
        if status := next((self.server.refusals[name] for name in self.server.refusals if name in path), None):
            return self.answer(status, {"error": "not today"}, error="not today")
        if path == "/api/repos/create":
            return self.create(json.loads(content))
        if found := re.fullmatch(r"/api/models/(.+?)/preupload/(.+)", path):
            return self.preupload(at_branch(found[1], found[2]), json.loads(content))
        if found := re.fullmatch(r"/(.+?)\.git/info/lfs/objects/batch", path):
            return self.lfs_batch(json.loads(content))
        if path == "/lfs/verify":
            known = json.loads(content)["oid"] in self.server.blobs
            return self.answer(200 if known else 404, {})
        if found := re.fullmatch(r"/api/models/(.+?)/commit/(.+)", path):
            return self.commit(at_branch(found[1], found[2]), [json.loads(line) for line in content.splitlines()])
        return self.answer(404, {"error": "no such path"})

    def do_PUT(self):
        path = self.start()
        content = self.body()
        oid = path.removeprefix("/lfs/")
        if hashlib.sha256(content).hexdigest() != oid:
            return self.answer(400, {"error": "the content has another hash"})
        self.server.blobs[oid] = content
        return self.answer(200)

    def do_GET(self):
        path = self.start()
        if found := re.fullmatch(r"/api/models/(.+?)/tree/([^/]+)", path):
            commits = self.server.repos.get(found[1])
            return self.missing_repo() if commits is None else self.answer(200, self.tree(commits[-1]))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            if found[1] not in self.server.repos:
                return self.missing_repo()
            commits = self.server.repos.get(at_branch(found[1], found[2] or "main"))
            if commits is None:
                return self.answer(404, {}, {"X-Error-Code": "RevisionNotFound"}, "Invalid rev id")
            return self.answer(200, self.info(found[1], commits))
        if found := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path):
            return self.resolve(found[1], found[3])
        return self.answer(404, {"error": "no such path"})

    do_HEAD = do_GET

    def start(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.line = f"{self.command} {path}"
        self.server.requests.append(self.line)
        return path

    # ---- what the Hub does ----

    def validate(self, card: str) -> None:
        data = yaml.safe_load(card.split("---")[1])
        base = data.get("base_model", "")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
            return self.answer(400, {"errors": [{"message": f'"base_model" {base!r} is no model id'}]})
        return self.answer(200, {"errors": [], "warnings": []})

    def create(self, asked: dict) -> None:
        repo = f"{asked['organization'] or 'me'}/{asked['name']}"
        url = {"url": f"{self.server.endpoint}/{repo}", "name": repo}
        if repo in self.server.repos:
            return self.answer(409, {**url, "error": "You already created this model repo"})
        if asked.get("visibility") == "private":
            self.server.private.add(repo)
        # As the Hub's own first commit.
        self.server.repos[repo] = [{".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}]
        return self.answer(200, url)

    def preupload(self, repo: str, asked: dict) -> None:
        commits = self.server.repos.get(repo)
        if commits is None:
            return self.missing_repo()
        files = []
        for file in asked["files"]:
            old = commits[-1].get(file["path"])
            oid = None if old is None else hashlib.sha256(old).hexdigest() if is_lfs(file["path"]) else blob_id(old)
            mode = "lfs" if is_lfs(file["path"]) else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return self.answer(200, {"files": files})

    def lfs_batch(self, asked: dict) -> None:
        objects = []
        for wanted in asked["objects"]:
            one = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.server.blobs:
                upload = {"href": f"{self.server.endpoint}/lfs/{wanted['oid']}"}
                one["actions"] = {"upload": upload, "verify": {"href": f"{self.server.endpoint}/lfs/verify"}}
            objects.append(one)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def commit(self, repo: str, lines: list[dict]) -> None:
        commits = self.server.repos.get(repo)
        if commits is None:
            return self.missing_repo()
        files = dict(commits[-1])
        self.server.messages += [lines[0]["value"]["summary"], lines[0]["value"]["description"]]
        for line in lines[1:]:
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                files.pop(line["value"]["path"])
            elif line["key"] == "lfsFile" and line["value"]["oid"] in self.server.blobs:
                files[line["value"]["path"]] = self.server.blobs[line["value"]["oid"]]
            else:
                return self.answer(400, {"error": f"cannot commit {line}"})
        commits.append(files)
        oid = commit_id(repo, commits)
        url = f"{self.server.endpoint}/{repo}/commit/{oid}"
        return self.answer(200, {"success": True, "commitOid": oid, "commitUrl": url})

    def tree(self, files: dict[str, bytes]) -> list[dict]:
        entries = []
        for path, content in files.items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
            if is_lfs(path):
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 100}
            entries.append(entry)
        return entries

    def info(self, repo: str, commits: list[dict[str, bytes]]) -> dict:
        return {
            "_id": "0",
            "id": repo,
            "modelId": repo,
            "sha": commit_id(repo, commits),
            "private": repo in self.server.private,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": [{"rfilename": path} for path in commits[-1]],
        }

    def resolve(self, repo: str, path: str) -> None:
        commits = self.server.repos.get(repo)
        if commits is None:
            return self.missing_repo()
        commit = {"X-Repo-Commit": commit_id(repo, commits)}
        if path not in commits[-1]:
            return self.answer(404, b"", {**commit, "X-Error-Code": "EntryNotFound"}, error="Entry not found")
        content = commits[-1][path]
        etag = hashlib.sha256(content).hexdigest() if is_lfs(path) else blob_id(content)
        return self.answer(200, content, {**commit, "ETag": f'"{etag}"', "Accept-Ranges": "none"})

    def missing_repo(self) -> None:
        self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}, "Repository not found")
