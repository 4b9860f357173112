"""A web server for tests, that does as it is told."""

import contextlib
import http.server
import os
import re
import threading
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from dali_pipelines.files import Source, fetch, read_bytes


class Server:
    """Serves a folder, with byte ranges."""

    def __init__(self, folder: Path):
        self.requests: Counter[str] = Counter()
        """Names that were asked for with GET, and how often."""
        self.sent = 0
        """Bytes of bodies."""
        self.cuts = 0
        """So many of the next answers are cut off in the middle."""
        self.ranges = True
        self.instead: Callable[[http.server.BaseHTTPRequestHandler], None] | None = None
        """Answers in place of this server."""
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self):
                self._answer(has_body=False)

            def do_GET(self):
                self._answer(has_body=True)

            def _answer(self, has_body: bool) -> None:
                if server.instead:
                    return server.instead(self)
                name = urllib.parse.unquote(self.path.lstrip("/"), errors="surrogateescape")
                try:
                    data = (folder / name).read_bytes()
                except OSError:
                    self.send_error(404)
                    return
                wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if server.ranges else None
                self.send_response(206 if wanted else 200)
                if server.ranges:
                    self.send_header("Accept-Ranges", "bytes")
                if wanted:
                    first, last = int(wanted[1]), min(int(wanted[2]), len(data) - 1)
                    self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
                    data = data[first : last + 1]
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if has_body:
                    server.requests[name] += 1
                    if server.cuts > 0:
                        server.cuts -= 1
                        data = data[: len(data) // 2]
                    server.sent += len(data)  # before a client that has them can look
                    self.wfile.write(data)

            def log_message(self, *arguments):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def stop(self) -> None:
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()


@contextlib.contextmanager
def serve(folder: str | os.PathLike) -> Iterator[Server]:
    server = Server(Path(folder))
    try:
        yield server
    finally:
        server.stop()


def fill(url: str, size: int, cache: str, rounds: int, barrier) -> None:
    """Reads parts of a file of `size` bytes at the same moments as others; in a process of its own."""
    for number in range(rounds):
        barrier.wait(30)
        source = fetch(Source(url, number, size - number), cache, problem=lambda _: "")
        if len(read_bytes(source)) != size - number:
            os._exit(3)
