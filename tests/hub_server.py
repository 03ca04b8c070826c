"""The Hugging Face Hub over HTTP, of files that lie in `FOLDER/models/OWNER/NAME` or `FOLDER/datasets/OWNER/NAME`.

Every repository has one commit, which is `main` too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

from kdpipe.fingerprint import digest_file

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_FILE = re.compile(r"/(?P<datasets>datasets/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
_TOLD = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/?]+)"
    r"(?:/(?P<what>tree|revision)/(?P<revision>[^/?]+)(?:/(?P<under>[^?]+))?)?(?:\?.*)?"
)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, folder: Path, commit: str, cut: str, *arguments: object) -> None:
        self.folder, self.commit, self.cut = folder, commit, cut
        super().__init__(*arguments)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if found := _FILE.fullmatch(self.path):
            repository = self.folder / ("datasets" if found["datasets"] else "models") / found["name"]
            self.send_file(repository, found["revision"], found["file"])
        elif found := _TOLD.fullmatch(self.path):
            repository = self.folder / found["kind"] / found["name"]
            self.tell(repository, found["revision"] or "main", found["what"], found["under"] or "")
        else:
            self.refuse("RepoNotFound")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.refuse("EntryNotFound")

    def send_file(self, repository: Path, revision: str, name: str) -> None:
        path = repository / name
        if self.exists(repository, revision, path.is_file()):
            headers = {"ETag": f'"{digest_file(path)}"', "X-Repo-Commit": self.commit}
            self.answer(path.read_bytes(), headers, cut=name == self.cut)

    def tell(self, repository: Path, revision: str, what: str | None, under: str) -> None:
        if not self.exists(repository, revision, (repository / under).is_dir()):
            return
        files = sorted(path for path in (repository / under).rglob("*") if path.is_file())
        names = [path.relative_to(repository).as_posix() for path in files]
        tree = [
            {"type": "file", "path": name, "size": path.stat().st_size, "oid": digest_file(path)}
            for name, path in zip(names, files, strict=True)
        ]
        about = {
            "id": repository.relative_to(repository.parents[1]).as_posix(),
            "sha": self.commit,
            "siblings": [{"rfilename": name} for name in names],
        }
        self.answer(json.dumps(tree if what == "tree" else about).encode())

    def exists(self, repository: Path, revision: str, what: bool) -> bool:
        """Whether it does; otherwise it is said, as the Hub does, what does not."""
        if not repository.is_dir():
            self.refuse("RepoNotFound")
        elif revision not in ("main", self.commit):
            self.refuse("RevisionNotFound")
        elif not what:
            self.refuse("EntryNotFound")
        else:
            return True
        return False

    def refuse(self, code: str) -> None:
        self.answer(b"{}", {"X-Error-Code": code}, status=404)

    def answer(self, body: bytes, headers: dict[str, str] | None = None, status: int = 200, cut: bool = False) -> None:
        """`cut`: half of the body comes, then the connection ends."""
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
            self.close_connection = cut or self.close_connection

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def hub(folder: Path, commit: str = COMMIT, cut: str = "") -> Iterator[dict[str, str]]:
    """The environment of a process that asks it, with a cache of its own; the file named `cut` never comes whole."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, folder, commit, cut))
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(folder / "home")}
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
