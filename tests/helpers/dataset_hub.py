"""The part of the Hub's API that `datasets.load_dataset` uses, as a local server for a folder of repositories."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class DatasetHub:
    """Serves `root/<owner>/<name>/...` as data sets. `requested` is the list of requested files."""

    def __init__(self, root: Path):
        hub, self.requested = self, []

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                body = b""
                if self.command == "POST":
                    body = self.rfile.read(int(self.headers["Content-Length"]))
                path = self.path.split("?")[0]
                if match := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
                    return self.send_file(root / match[1] / match[2], match[2])
                match = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/[^/]+/?(.*))?", path)
                folder = root / match[1] if match else None
                if folder is None or not folder.is_dir():
                    return self.send({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
                files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
                if match[2] == "paths-info":
                    form = "urlencoded" in self.headers.get("Content-Type", "")
                    paths = parse_qs(body.decode())["paths"] if form else json.loads(body)["paths"]
                    return self.send([entry(name, files[name]) for name in paths if name in files])
                if match[2] == "tree":
                    prefix = f"{match[3]}/" if match[3] else ""
                    if prefix and not any(name.startswith(prefix) for name in files):
                        return self.send({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
                    return self.send([entry(name, p) for name, p in files.items() if name.startswith(prefix)])
                siblings = [{"rfilename": name} for name in files]
                return self.send({"id": match[1], "sha": COMMIT, "private": False, "siblings": siblings, "tags": []})

            do_HEAD = do_POST = do_GET

            def send_file(self, file, name):
                if not file.is_file():
                    return self.send({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
                if self.command == "GET":
                    hub.requested.append(name)
                return self.send(file.read_bytes(), 200, {"ETag": f'"{digest(file)}"', "X-Repo-Commit": COMMIT})

            def send(self, content, status=200, headers=None):
                body = content if isinstance(content, bytes) else json.dumps(content).encode()
                start, end = 0, len(body)
                if status == 200 and (wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))):
                    start, end = int(wanted[1]), min(int(wanted[2] or end) + 1, end)
                    status, headers = 206, {**(headers or {}), "Content-Range": f"bytes {start}-{end - 1}/{len(body)}"}
                self.send_response(status)
                for key, value in {"Content-Length": str(end - start), **(headers or {})}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body[start:end])

            def log_message(self, *_):
                pass

        def entry(name, file):
            return {"type": "file", "path": name, "size": file.stat().st_size, "oid": digest(file)}

        def digest(file):
            return hashlib.sha1(file.read_bytes()).hexdigest()

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
