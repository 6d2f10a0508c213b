"""A stand-in of the hub's API that stores what is committed in a folder."""

import base64
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

TOKEN = "hf_of_a_test"


class Hub:
    """State of the stand-in.

    Attributes:
        folder: Files of each repository, below its name.
        url: Its address.
        created: Body of each request to create a repository.
        commits: Number of commits.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.url = folder, ""
        self.created: list[dict] = []
        self.commits = 0

    def tree(self, repository: str) -> list[dict]:
        """Return the files of a repository as the hub lists them."""
        folder = self.folder / repository
        return [
            {"type": "file", "path": file.relative_to(folder).as_posix(), "size": 1, "oid": "0"}
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        ]

    def commit(self, repository: str, lines: list[dict]) -> None:
        self.commits += 1
        for line in lines:
            value = line["value"]
            if line["key"] == "deletedFile":
                (self.folder / repository / value["path"]).unlink()
            if line["key"] != "file":
                continue
            content = base64.b64decode(value["content"])
            file = self.folder / repository / value["path"]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:  # noqa: C901  a method per verb
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                found = b""
                while size := int(self.rfile.readline(), 16):
                    found += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return found
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def answer(self, content: object, status: int = 200) -> None:
            text = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def allowed(self) -> bool:
            if self.headers.get("Authorization") == f"Bearer {TOKEN}":
                return True
            self.body()
            self.answer({"error": "Invalid credentials"}, 401)
            return False

        def do_GET(self):
            if not self.allowed():
                return
            path = unquote(self.path).partition("?")[0]
            if path.endswith("/tree/main"):
                self.answer(hub.tree(path.removeprefix("/api/models/").removesuffix("/tree/main")))
            else:
                self.answer({"name": "org", "type": "user", "orgs": []})

        def do_POST(self):
            if not self.allowed():
                return
            path, body = unquote(self.path), self.body()
            repository = path.removeprefix("/api/models/").rpartition("/commit/")[0]
            if path == "/api/validate-yaml":
                self.answer({"errors": [], "warnings": []})
            elif path == "/api/repos/create":
                hub.created.append(json.loads(body))
                self.answer({"url": f"{hub.url}/org/model", "id": "org/model"})
            elif "/preupload/" in path:
                self.answer({"files": [_mode(each) for each in json.loads(body)["files"]]})
            else:
                assert "/commit/" in path, path
                hub.commit(repository, [json.loads(line) for line in body.splitlines()])
                url = f"{hub.url}/{repository}/commit/{hub.commits}"
                self.answer({"commitUrl": url, "commitOid": f"{hub.commits}", "success": True})

    return Handler


def _mode(file: dict) -> dict:
    # Large files would go to a storage with a protocol of its own, that of hf_xet.
    return {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}


@contextmanager
def hub_server(folder: Path):
    """Serve a stand-in until the block ends."""
    hub = Hub(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
