"""A stand-in for the hub: those parts of its HTTP interface that huggingface_hub uses to push and to load.

It keeps repositories in memory. Files of *.safetensors go by LFS, others inside the commit, as on the hub itself.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_mine"


class Hub(ThreadingHTTPServer):
    """repos: id -> {"private", "branches": {name: [commit, newest last]}}; a commit: {"sha", "message", "files"}.

    blobs: sha256 -> content of what came by LFS. requests: (method, path) of all. refuse: a status for every request.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos, self.blobs, self.requests, self.refuse = {}, {}, [], None
        self.url = f"http://127.0.0.1:{self.server_port}"

    def commits(self, repo, branch="main"):
        return self.repos[repo]["branches"][branch]


@contextmanager
def hub():
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _commit(files, message):
    listing = json.dumps([message, {name: hashlib.sha1(content).hexdigest() for name, content in files.items()}])
    return {"sha": hashlib.sha1(listing.encode()).hexdigest(), "message": message, "files": files}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self):
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append((self.command, path))
        if self.server.refuse:
            return self._send(self.server.refuse, {"error": "refused"})
        for method, pattern, answer in self.ROUTES:
            if self.command in method and (match := re.fullmatch(pattern, path)):
                return answer(self, body, *match.groups())
        self._send(404, {"error": f"no such page: {self.command} {path}"})

    def _send(self, status, content=b"", **headers):
        if not isinstance(content, bytes):
            content, headers["Content-Type"] = json.dumps(content).encode(), "application/json"
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _may_write(self):
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self._send(401, {"error": "Invalid username or password."}, X_Error_Message="Invalid username or password.")

    def _found(self, repo, revision="main"):
        """The commit that a revision names, if whoever asks may see it."""
        known = self.server.repos.get(repo)
        if known is None or known["private"] and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        branches = known["branches"]
        for commit in branches[revision][-1:] if revision in branches else sum(branches.values(), []):
            if revision in branches or commit["sha"] == revision:
                return commit
        self._send(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")

    def _create(self, body):
        asked = json.loads(body)
        if not self._may_write():
            return
        if asked["organization"] != "me":
            return self._send(403, {"error": "You don't have the rights to create a model under this namespace"})
        repo = f"{asked['organization']}/{asked['name']}"
        status = 409 if repo in self.server.repos else 200
        private = asked.get("visibility") == "private" or asked.get("private", False)
        self.server.repos.setdefault(repo, {"private": private,
                                            "branches": {"main": [_commit({}, "initial commit")]}})
        self._send(status, {"url": f"{self.server.url}/{repo}"})

    def _branch(self, body, repo, branch):
        if self._may_write():
            branches = self.server.repos[repo]["branches"]
            status = 409 if branch in branches else 200
            branches.setdefault(branch, list(branches["main"]))
            self._send(status, {})

    def _validate(self, body):
        card = json.loads(body)["content"]
        if "license: nonsense" in card:
            return self._send(400, {"errors": [{"message": '"license" must be one of [mit, other]'}], "warnings": []})
        self._send(200, {"errors": [], "warnings": []})

    def _preupload(self, body, repo, revision):
        if self._may_write() and self._found(repo, revision):
            self._send(200, {"files": [{"path": file["path"], "shouldIgnore": False,
                                        "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
                                       for file in json.loads(body)["files"]]})

    def _batch(self, body, repo):
        if self._may_write():
            self._send(200, {"transfer": "basic", "objects": [
                {**item, "actions": {"upload": {"href": f"{self.server.url}/lfs/{item['oid']}"}}}
                for item in json.loads(body)["objects"]]})

    def _put(self, body, oid):
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.blobs[oid] = body
        self._send(200)

    def _commit(self, body, repo, revision):
        if not self._may_write() or not (before := self._found(repo, revision)):
            return
        files, message = dict(before["files"]), ""
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                files[value["path"]] = self.server.blobs[value["oid"]]
        commit = _commit(files, message)
        self.server.commits(repo, revision).append(commit)
        self._send(200, {"commitUrl": f"{self.server.url}/{repo}/commit/{commit['sha']}", "commitOid": commit["sha"]})

    def _info(self, body, repo, _, revision):
        if commit := self._found(repo, revision or "main"):
            self._send(200, {"id": repo, "sha": commit["sha"], "private": self.server.repos[repo]["private"],
                             "siblings": [{"rfilename": name} for name in commit["files"]]})

    def _tree(self, body, repo, revision):
        if commit := self._found(repo, revision):
            self._send(200, [{"type": "file", "path": name, "size": len(content),
                              "oid": hashlib.sha1(content).hexdigest()} for name, content in commit["files"].items()])

    def _resolve(self, body, repo, revision, name):
        if commit := self._found(repo, revision):
            if name not in commit["files"]:
                return self._send(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
            content = commit["files"][name]
            self._send(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=commit["sha"])

    REPO, REVISION = r"([\w.-]+/[\w.-]+)", r"([\w./-]+)"
    ROUTES = [("POST", "/api/repos/create", _create),
              ("POST", f"/api/models/{REPO}/branch/{REVISION}", _branch),
              ("POST", "/api/validate-yaml", _validate),
              ("POST", f"/api/models/{REPO}/preupload/{REVISION}", _preupload),
              ("POST", f"/{REPO}.git/info/lfs/objects/batch", _batch),
              ("PUT", r"/lfs/(\w+)", _put),
              ("POST", f"/api/models/{REPO}/commit/{REVISION}", _commit),
              ("GET", f"/api/models/{REPO}(/revision/{REVISION})?", _info),
              ("GET", f"/api/models/{REPO}/tree/{REVISION}", _tree),
              ("GET HEAD", f"/{REPO}/resolve/([\\w.-]+)/(.+)", _resolve)]
