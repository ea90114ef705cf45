"""The part of the Hugging Face Hub's protocol that load_dataset uses, served on localhost."""
import contextlib
import hashlib
import http.server
import json
import os
import shutil
import threading
import urllib.parse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


# for `before`: use the Hub, which conftest.py turns off with HF_HUB_OFFLINE
ONLINE = """
import datasets.config, huggingface_hub.constants
datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = False
"""


class Hub(http.server.ThreadingHTTPServer):
    """The server, one for all tests of a process, as the libraries read its address on import.

    It has the dataset `name` with `files`, a dict from path to bytes. `fault(method, path,
    handler)` is called before each answer; if it returns True, it has answered the request.
    `requests` lists (method, path, value of the Range header).
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def entries(self, folder="", recursive=True):
        """The tree entries of the subfolders of `folder` and of its files; if `recursive`, also of
        the files in subfolders."""
        prefix = f"{folder}/" if folder else ""
        below = {path.removeprefix(prefix): body for path, body in self.files.items()
                 if path.startswith(prefix)}
        folders = {path.split("/")[0] for path in below} - below.keys()
        found = [{"type": "file", "path": prefix + path, "size": len(body),
                  "oid": hashlib.sha1(body).hexdigest(),
                  "lfs": {"oid": hashlib.sha256(body).hexdigest(), "size": len(body),
                          "pointerSize": 134}}
                 for path, body in below.items() if recursive or "/" not in path]
        return found + [{"type": "directory", "path": prefix + path, "size": 0, "oid": "0" * 40}
                        for path in sorted(folders)]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self):
        self.request_body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.server.requests.append((self.command, path, self.headers.get("Range")))
        if self.server.fault(self.command, path, self):
            return
        name, files = self.server.name, self.server.files
        api, resolve = f"/api/datasets/{name}", f"/datasets/{name}/resolve/"
        if path == api or path.startswith(f"{api}/revision/"):
            self.send(json.dumps({
                "id": name, "sha": COMMIT, "private": False, "gated": False, "disabled": False,
                "tags": [], "downloads": 0, "likes": 0,
                "siblings": [{"rfilename": file} for file in files]}))
        elif path.startswith(f"{api}/tree/"):
            folder = path.removeprefix(f"{api}/tree/").partition("/")[2]
            found = self.server.entries(folder, "recursive=true" in self.path.lower())
            self.send(json.dumps(found)) if found else self.send_not_found("EntryNotFound")
        elif path.startswith(f"{api}/paths-info/"):
            form = urllib.parse.parse_qs(self.request_body.decode())
            paths = form.get("paths") or json.loads(self.request_body)["paths"]
            self.send(json.dumps([entry for entry in self.server.entries()
                                  if entry["path"] in paths]))
        elif path.startswith(resolve):
            file = path.removeprefix(resolve).partition("/")[2]
            self.send_file(files[file]) if file in files else self.send_not_found("EntryNotFound")
        else:
            self.send_not_found("RepoNotFound")

    do_GET = do_HEAD = do_POST = answer

    def send(self, body, status=200, **headers):
        body = body if isinstance(body, bytes) else body.encode()
        self.send_response(status)
        for key, value in {"Content-Length": len(body), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_file(self, body):
        headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "Accept_Ranges": "bytes"}
        if span := self.headers.get("Range", "").removeprefix("bytes="):
            first = int(span.split("-")[0])
            headers["Content_Range"] = f"bytes {first}-{len(body) - 1}/{len(body)}"
            self.send(body[first:], 206, **headers)
        else:
            self.send(body, **headers)

    def send_not_found(self, code):
        self.send("", 404, X_Error_Code=code)

    def log_message(self, *_):
        pass


HUB = Hub()


@contextlib.contextmanager
def serve(files, name="SamuelYang/bookcorpus", fault=lambda method, path, handler: False):
    """Empty the cache, then serve `files` as the dataset `name` in a `with` block."""
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)
    HUB.name, HUB.files, HUB.fault, HUB.requests = name, files, fault, []
    yield HUB
