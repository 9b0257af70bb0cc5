"""Real servers for the shared cache, in this process: a web server, and moto's S3."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Shelf(BaseHTTPRequestHandler):
    """GET, HEAD and PUT of whole objects, kept in memory, like nginx with dav_methods PUT."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server = self._server()
        server.asked.append(f"PUT {self.path}")
        if server.read_only:
            self._send(403, b"")
            return
        server.shelf[self.path] = body
        self._send(201, b"")

    def _answer(self, *, with_body: bool) -> None:
        server = self._server()
        server.asked.append(f"{self.command} {self.path}")
        content = server.shelf.get(self.path)
        if content is None:
            self._send(404, b"")
        else:
            self._send(200, content, with_body=with_body)

    def _send(self, status: int, content: bytes, *, with_body: bool = True) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def _server(self) -> WebServer:
        assert isinstance(self.server, WebServer)
        return self.server

    def log_message(self, *words: object) -> None:
        """The test's output is no place for it."""


class WebServer(ThreadingHTTPServer):
    """shelf: path -> content; asked: every request so far."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Shelf)
        self.shelf: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.read_only = False
        self.url = f"http://127.0.0.1:{self.server_port}/qbuild"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}).start()

    def stop(self) -> None:
        self.shutdown()
        self.server_close()
