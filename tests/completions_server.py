"""A small server with vLLM's part of the OpenAI API, in a process of its own: `python completions_server.py FOLDER`.

What it says is a function of the prompt: after token t, token (3 t + 1) mod V is most probable, then the next ones. The
file FOLDER/behaviour.json changes how it answers; FOLDER/requests.log has a line per request.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock

VOCABULARY = 257
CLASSES = [" bad", " good"]


def log_probs(token: int, count: int) -> dict[int, float]:
    """The `count` most probable tokens after a token: 1/2, 1/4, … of the mass."""
    return {(3 * token + 1 + place) % VOCABULARY: -(place + 1) * math.log(2) for place in range(count)}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    folder: Path
    count = 0
    lock = Lock()

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        path = self.folder / "behaviour.json"
        behaviour = json.loads(path.read_text()) if path.exists() else {}
        with self.lock:
            Handler.count += 1
            number = Handler.count
            with (self.folder / "requests.log").open("a") as log:
                log.write(json.dumps({"time": time.time(), "key": self.headers.get("Authorization")}) + "\n")
        if number > behaviour.get("dies_after", math.inf):
            os._exit(1)
        if number > behaviour.get("hangs_after", math.inf):
            time.sleep(1000)
        if number > behaviour.get("drips_after", math.inf):
            self.drip()
        elif number > behaviour.get("busy_after", math.inf) or number <= behaviour.get("busy_first", 0):
            self.answer(429, {"error": "slow down"}, {"Retry-After": behaviour.get("retry_after", "0")})
        elif "status" in behaviour:
            self.answer(behaviour["status"], {"error": behaviour.get("error", "no")})
        elif "body" in behaviour:
            self.answer(200, behaviour["body"])
        else:
            cut = number % behaviour.get("cut_every", number + 1) == 0
            self.answer(200, {"choices": [self.choice(asked, behaviour)]}, behaviour.get("headers"), cut)

    def choice(self, asked: dict, behaviour: dict) -> dict:
        if asked.get("prompt_logprobs") and not behaviour.get("no_prompt_logprobs"):
            said: list = [None]
            for before, token in zip(asked["prompt"], asked["prompt"][1:], strict=False):
                count = min(asked["prompt_logprobs"], behaviour.get("at_most", 100))
                given = log_probs(before, count)
                given.setdefault(token, -30.0)  # vLLM adds the prompt's own token
                given[token] = behaviour.get("log_prob", given[token])
                said.append({str(key): {"logprob": each, "rank": 1} for key, each in given.items()})
            return {"text": "", "prompt_logprobs": said}
        if asked.get("logprobs") and isinstance(asked["prompt"], str):
            top = top_of(asked["prompt"])
            top[" the"] = behaviour.get("log_prob", top[" the"])
            top |= behaviour.get("top", {})
            return {"text": "", "logprobs": {"top_logprobs": [top]}}
        return {"text": ""}

    def drip(self) -> None:
        """An answer that goes on and never ends."""
        self.send_response(200)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        with suppress(OSError):
            while True:
                self.wfile.write(b" ")
                time.sleep(0.05)

    def answer(self, status: int, body: object, headers: dict | None = None, cut: bool = False) -> None:
        """`cut`: half of the body comes, then the connection ends. A header that is None is left out."""
        content = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = cut or self.close_connection

    def log_message(self, *_: object) -> None:
        pass


def top_of(prompt: str) -> dict[str, float]:
    """The class by the prompt's exclamation marks; of a question nothing is said about classes."""
    if "?" in prompt:
        return {" the": math.log(0.9)}
    if "!!" in prompt:
        return {CLASSES[1]: math.log(0.7), " the": math.log(0.2)}
    good = 0.6 if "!" in prompt else 0.1
    return {CLASSES[1]: math.log(good), CLASSES[0]: math.log(0.9 - good), " the": math.log(0.1)}


class Process:
    """A server in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start it, again where it runs or died, at another port."""
        if self._process is not None:
            self.stop()
        (self.folder / "port").unlink(missing_ok=True)
        self._process = subprocess.Popen([sys.executable, __file__, str(self.folder)])
        while not (self.folder / "port").exists() or not (self.folder / "port").read_text():
            assert self._process.poll() is None
            time.sleep(0.02)
        self.url = f"http://127.0.0.1:{(self.folder / 'port').read_text()}/v1"

    def stop(self) -> None:
        """Kill it."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def behave(self, **how: object) -> None:
        """Change how it answers."""
        (self.folder / "behaviour.json").write_text(json.dumps(how))

    @property
    def requests(self) -> list[dict[str, object]]:
        """What it was asked."""
        return [json.loads(line) for line in (self.folder / "requests.log").read_text().splitlines()]

    def settings(self, **settings: object) -> dict[str, object]:
        """`server:` of a teacher that asks it."""
        return {"url": self.url, "retries": 2, **settings}

    def section(self, **settings: object) -> object:
        """The same as the library takes it."""
        from kdpipe.teachers.server import ServerSection

        return ServerSection(**self.settings(**settings))


@contextmanager
def running(folder: Path) -> Iterator[Process]:
    """A server that is stopped at the end."""
    process = Process(folder)
    try:
        yield process
    finally:
        process.stop()


if __name__ == "__main__":
    Handler.folder = Path(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    (Handler.folder / "port").write_text(str(server.server_port))
    server.serve_forever()
