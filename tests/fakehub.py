"""A small Hub on 127.0.0.1 for tests, standard library only; everything is kept in memory.

    with FakeHub() as hub: ...   # and HF_ENDPOINT=hub.url, HF_TOKEN=anything, HF_HOME=an empty folder

Covers what huggingface_hub 2.4, diffusers 0.42, transformers 5.23 and datasets 5.2 ask for: whoami, creating
repositories, their information, trees and refs at any revision, branches, tags, commits (with ``parentCommit`` and
``create_pr``), LFS uploads and downloads with ranges. Not covered: Xet, multipart uploads, gated repositories.

``lfs=True`` sends weights and pictures through LFS, as the real Hub does (the client then needs
``HF_HUB_DISABLE_XET=1``); ``lfs=False`` takes every file inline, which works with Xet on, too.
"""

import base64
import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_ENDINGS = (".safetensors", ".png", ".parquet", ".arrow")
FRONT_MATTER = re.compile(r"\s*---[ \t]*\n(.*?)\n---[ \t]*(\n|$)", re.DOTALL)


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())


class HubError(Exception):
    def __init__(self, status: int, code: str, message: str):
        self.status, self.code, self.message = status, code, message


class Repository:
    """Commits of one repository; a commit holds a dictionary of paths and sha256 of contents."""

    def __init__(self, kind: str, name: str, private: bool):
        self.kind, self.name, self.private = kind, name, private
        self.commits: dict[str, dict] = {}
        self.refs: dict[str, str] = {}  # branches, tags and pull requests
        self.tags: set[str] = set()
        self.number_of_prs = 0

    def commit(self, ref: str, files: dict[str, str], title: str) -> str:
        parent = self.refs.get(ref)
        sha = hashlib.sha1(json.dumps([parent, files, title, time.time_ns()]).encode()).hexdigest()
        self.commits[sha] = {"files": files, "parent": parent, "title": title, "date": now()}
        self.refs[ref] = sha
        return sha

    def resolve(self, revision: str) -> str:
        revision = revision.removeprefix("refs/heads/")
        sha = self.refs.get(revision, revision)
        if sha not in self.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def files(self, revision: str = "main") -> dict[str, str]:
        return self.commits[self.resolve(revision)]["files"]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: "FakeHub"

    def log_message(self, *args):
        pass

    # Plumbing

    def body(self) -> bytes:
        if "chunked" not in (self.headers.get("Transfer-Encoding") or "").lower():
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0].strip() or b"0", 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(parts)

    def reply(self, content, status: int = 200, headers: dict | None = None, kind: str = "application/json"):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def need_token(self):
        if not (self.headers.get("Authorization") or "").startswith("Bearer "):
            raise HubError(401, "Unauthorized", "Invalid username or password.")

    def handle_any(self):
        body = self.body()
        try:
            if self.hub.failure is not None and self.command in ("POST", "PUT"):
                raise self.hub.failure
            with self.hub.lock:
                self.route(urlsplit(self.path), body)
        except HubError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": error.message}
            self.reply({"error": error.message}, error.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    # Routes

    def route(self, url, body: bytes):
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        query = parse_qs(url.query)
        if parts[0] == "_lfs":
            return self.lfs_object(parts[1:], body)
        if url.path.endswith(".git/info/lfs/objects/batch"):
            return self.lfs_batch(json.loads(body))
        if parts[:2] == ["api", "whoami-v2"]:
            self.need_token()
            token = {"displayName": "test", "role": "write"}
            auth = {"type": "access_token", "accessToken": token}
            return self.reply({"type": "user", "id": "0", "name": "user", "orgs": [], "auth": auth})
        if parts[:2] == ["api", "validate-yaml"]:
            return self.reply({"errors": [], "warnings": []})
        if parts[:3] == ["api", "repos", "create"]:
            return self.create(json.loads(body))
        if parts[0] == "api" and parts[1] in ("models", "datasets") and len(parts) >= 4:
            return self.repository_api(parts[1][:-1], "/".join(parts[2:4]), parts[4:], query, body)
        kind = "model"
        if parts[0] == "datasets":
            kind, parts = "dataset", parts[1:]
        if len(parts) > 4 and parts[2] == "resolve":
            return self.download(self.find(kind, "/".join(parts[:2])), parts[3], "/".join(parts[4:]))
        raise HubError(404, "NotImplemented", f"no route for {self.command} {url.path}")

    def find(self, kind: str, name: str) -> Repository:
        repository = self.hub.repositories.get((kind, name))
        if repository is None or (repository.private and "Authorization" not in self.headers):
            raise HubError(401, "RepoNotFound", f"Repository Not Found: {name}")
        return repository

    def create(self, wanted: dict):
        self.need_token()
        kind = wanted.get("type") or "model"
        name = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
        if name.split("/")[0] != "user":
            raise HubError(403, "Forbidden", "You don't have the rights to create a model under this namespace")
        answer = {"url": f"{self.hub.url}/{'datasets/' if kind == 'dataset' else ''}{name}", "name": name, "id": name}
        if (kind, name) in self.hub.repositories:
            return self.reply({"error": "You already created this repo", **answer}, 409)
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        repository = self.hub.repositories[kind, name] = Repository(kind, name, private)
        attributes = b"".join(b"*%s filter=lfs diff=lfs merge=lfs -text\n" % e.encode() for e in LFS_ENDINGS)
        repository.commit("main", {".gitattributes": self.hub.store(attributes)}, "initial commit")
        return self.reply(answer)

    def repository_api(self, kind: str, name: str, rest: list[str], query: dict, body: bytes):
        repository = self.find(kind, name)
        verb = rest[0] if rest else ""
        revision = rest[1] if len(rest) > 1 else "main"
        if self.command == "GET":
            if verb in ("", "revision"):
                return self.reply(self.information(repository, revision))
            if verb == "tree":
                return self.reply(self.tree(repository, revision, "/".join(rest[2:]), query))
            if verb == "refs":
                listed = {"branches": [], "tags": [], "converts": []}
                for ref, sha in repository.refs.items():
                    group = "tags" if ref in repository.tags else "branches"
                    listed[group].append({"name": ref, "ref": f"refs/{group}/{ref}", "targetCommit": sha})
                return self.reply(listed)
        if self.command == "POST" and verb == "paths-info":
            form = body.decode()
            paths = json.loads(form)["paths"] if form.startswith("{") else parse_qs(form).get("paths", [])
            files = repository.files(revision)
            return self.reply([self.entry(path, files[path]) for path in paths if path in files])
        if self.command != "POST":
            raise HubError(404, "NotImplemented", f"no route for {self.command} {self.path}")
        self.need_token()
        content = {} if verb == "commit" else json.loads(body or b"{}")
        if verb == "branch":
            if revision in repository.refs:
                return self.reply({"error": "Reference already exists"}, 409)
            repository.refs[revision] = repository.resolve(content.get("startingPoint") or "main")
            return self.reply({})
        if verb == "tag":
            repository.refs[content["tag"]] = repository.resolve(revision)
            repository.tags.add(content["tag"])
            return self.reply({})
        if verb == "preupload":
            there = repository.files(revision)
            modes = [
                {
                    "path": file["path"],
                    "shouldIgnore": False,
                    "oid": self.git_oid(there[file["path"]]) if file["path"] in there else None,
                    "uploadMode": "lfs" if self.hub.is_lfs(file["path"]) else "regular",
                }
                for file in content["files"]
            ]
            return self.reply({"files": modes})
        if verb == "commit":
            return self.commit(repository, revision, query, [json.loads(line) for line in body.splitlines() if line])
        raise HubError(404, "NotImplemented", f"no route for {self.command} {self.path}")

    def commit(self, repository: Repository, ref: str, query: dict, lines: list[dict]):
        header = next(line["value"] for line in lines if line["key"] == "header")
        parent, url = repository.resolve(ref), None
        if query.get("create_pr") == ["1"]:
            repository.number_of_prs += 1
            ref = f"refs/pr/{repository.number_of_prs}"
            repository.refs[ref] = parent
            url = f"{self.hub.url}/{repository.name}/discussions/{repository.number_of_prs}"
        elif header.get("parentCommit") and header["parentCommit"] != parent:
            raise HubError(412, "PreconditionFailed", "A commit has happened since. Please refresh and try again.")
        files = dict(repository.files(ref))
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = self.hub.store(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.contents:
                    raise HubError(400, "LfsMissing", f"{value['path']} was not uploaded")
                files[value["path"]] = value["oid"]
            elif line["key"] == "deletedFile":
                files.pop(value["path"])
        sha = repository.commit(ref, files, header["summary"])
        prefix = "datasets/" if repository.kind == "dataset" else ""
        answer = {"success": True, "commitOid": sha, "hookOutput": "", "pullRequestUrl": url}
        answer["commitUrl"] = f"{self.hub.url}/{prefix}{repository.name}/commit/{sha}"
        self.reply({name: value for name, value in answer.items() if value is not None})

    # Files

    def git_oid(self, sha256: str) -> str:
        data = self.hub.contents[sha256]
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def entry(self, path: str, sha256: str) -> dict:
        size = len(self.hub.contents[sha256])
        entry = {"type": "file", "path": path, "size": size, "oid": self.git_oid(sha256)}
        return entry | ({"lfs": {"oid": sha256, "size": size, "pointerSize": 134}} if self.hub.is_lfs(path) else {})

    def information(self, repository: Repository, revision: str) -> dict:
        sha, files = repository.resolve(revision), repository.files(revision)
        card = {}
        if "README.md" in files:
            found = FRONT_MATTER.match(self.hub.contents[files["README.md"]].decode())
            card = yaml.safe_load(found[1]) if found else {}
        return {
            "_id": hashlib.md5(repository.name.encode()).hexdigest()[:24],
            "id": repository.name,
            "modelId": repository.name,
            "author": "user",
            "sha": sha,
            "lastModified": now(),
            "createdAt": now(),
            "private": repository.private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": list(card.get("tags") or []),
            "siblings": [{"rfilename": path} for path in sorted(files)],
            "cardData": card or None,
            **({"model-index": card["model-index"]} if "model-index" in card else {}),
        }

    def tree(self, repository: Repository, revision: str, folder: str, query: dict) -> list[dict]:
        prefix = folder.strip("/") + "/" if folder.strip("/") else ""
        recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries, folders = [], set()
        for path, sha256 in sorted(repository.files(revision).items()):
            if not path.startswith(prefix):
                continue
            inside = path[len(prefix) :].split("/")
            folders |= {prefix + "/".join(inside[:depth]) for depth in range(1, len(inside) if recursive else 2)}
            if recursive or len(inside) == 1:
                entries.append(self.entry(path, sha256))
        if prefix and not entries and not folders:
            raise HubError(404, "EntryNotFound", f"{folder} does not exist")
        files = {entry["path"] for entry in entries}
        return [{"type": "directory", "path": f, "oid": "0", "size": 0} for f in sorted(folders - files)] + entries

    def download(self, repository: Repository, revision: str, path: str):
        sha, files = repository.resolve(revision), repository.files(revision)
        if path not in files:
            headers = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": sha}
            return self.reply({"error": "Entry not found"}, 404, headers)
        data, lfs = self.hub.contents[files[path]], self.hub.is_lfs(path)
        etag = f'"{files[path] if lfs else self.git_oid(files[path])}"'
        headers = {"ETag": etag, "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if lfs:
            headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(len(data))}
        wanted = re.match(r"bytes=(\d+)-(\d*)$", self.headers.get("Range") or "")
        if wanted and self.command == "GET" and data:
            start, stop = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{stop}/{len(data)}"
            return self.reply(data[start : stop + 1], 206, headers, "application/octet-stream")
        return self.reply(data, 200, headers, "application/octet-stream")

    def lfs_batch(self, wanted: dict):
        self.need_token()
        objects = []
        for item in wanted["objects"]:
            reply = {"oid": item["oid"], "size": item["size"], "authenticated": True}
            if item["oid"] not in self.hub.contents:
                reply["actions"] = {"upload": {"href": f"{self.hub.url}/_lfs/{item['oid']}", "header": {}}}
            objects.append(reply)
        self.reply({"transfer": "basic", "objects": objects})

    def lfs_object(self, parts: list[str], body: bytes):
        if self.command != "PUT" or hashlib.sha256(body).hexdigest() != parts[0]:
            raise HubError(400, "BadSha", "not the announced content")
        self.hub.store(body)
        self.reply(b"")


class FakeHub:
    """The server: ``with FakeHub() as hub: hub.url``."""

    def __init__(self, lfs: bool = True):
        self.lfs = lfs
        self.lock = threading.RLock()
        self.contents: dict[str, bytes] = {}
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.failure: HubError | None = None  # answer to every write, where set
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def store(self, data: bytes) -> str:
        sha256 = hashlib.sha256(data).hexdigest()
        self.contents[sha256] = data
        return sha256

    def is_lfs(self, path: str) -> bool:
        return self.lfs and path.endswith(LFS_ENDINGS)

    def read(self, name: str, path: str, revision: str = "main", kind: str = "model") -> bytes:
        """Content of a file, as a test sees it."""
        return self.contents[self.repositories[kind, name].files(revision)[path]]

    def write(self, name: str, path: str, text: str | None, kind: str = "model") -> None:
        """Write a file as somebody does on the Hub's pages; None deletes it."""
        repository = self.repositories[kind, name]
        files = dict(repository.files())
        files.pop(path, None)
        repository.commit("main", files | ({} if text is None else {path: self.store(text.encode())}), f"Edit {path}")

    def __enter__(self) -> "FakeHub":
        # by default it takes up to half a second to notice that it is to shut down
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.server.shutdown()
        self.server.server_close()
