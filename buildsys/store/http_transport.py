"""A shared cache behind a plain web server: GET, HEAD and PUT (nginx with dav_methods PUT, or any
other). The standard library's client: its waits are its own, and it needs nothing installed."""

from __future__ import annotations

import base64
import http.client
import threading
import urllib.parse

from buildsys.store.transport import CHUNK, CONNECT_SECONDS, READ_SECONDS, Take

ABSENT = frozenset({404, 410})
BROKEN = (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError)


class Refused(OSError):
    """An answer that is neither the content nor "not there"."""


class HttpTransport:
    """One connection per thread, kept open. A password may stand in the URL."""

    def __init__(self, url: str) -> None:
        found = urllib.parse.urlsplit(url)
        if not found.hostname:
            raise ValueError(f"{url} names no host")
        self._host, self._port = found.hostname, found.port
        self._encrypted = found.scheme == "https"
        self._root = found.path.rstrip("/")
        self._headers = {}
        if found.username is not None:
            words = [urllib.parse.unquote(word or "") for word in (found.username, found.password)]
            token = base64.b64encode(":".join(words).encode()).decode()
            self._headers["Authorization"] = f"Basic {token}"
        self._local = threading.local()

    def read(self, name: str, take: Take) -> bool:
        answer = self._ask("GET", name)
        if answer.status in ABSENT:
            answer.read()
            return False
        self._expect(answer, 200, name)
        while chunk := answer.read(CHUNK):
            take(chunk)
        return True

    def exists(self, name: str) -> bool:
        answer = self._ask("HEAD", name)
        answer.read()
        if answer.status not in ABSENT:
            self._expect(answer, 200, name)
        return answer.status == 200

    def upload(self, path: str, name: str) -> None:
        answer = self._ask("PUT", name, path)
        answer.read()
        if answer.status // 100 != 2:
            self._expect(answer, 200, name)

    def _ask(self, method: str, name: str, path: str | None = None) -> http.client.HTTPResponse:
        """One request; once more where a kept connection had been closed meanwhile."""
        kept = getattr(self._local, "connection", None)
        if kept is not None:
            try:
                return self._send(kept, method, name, path)
            except BROKEN:
                kept.close()
        self._local.connection = None
        connection = self._connect()
        answer = self._send(connection, method, name, path)
        self._local.connection = connection
        return answer

    def _connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._encrypted else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=CONNECT_SECONDS)
        connection.connect()
        connection.sock.settimeout(READ_SECONDS)
        return connection

    def _send(
        self, connection: http.client.HTTPConnection, method: str, name: str, path: str | None
    ) -> http.client.HTTPResponse:
        target = f"{self._root}/{name}"
        if path is None:
            connection.request(method, target, headers=self._headers)
        else:
            with open(path, "rb") as body:
                size = body.seek(0, 2)
                body.seek(0)
                headers = {**self._headers, "Content-Length": str(size)}
                connection.request(method, target, body, headers)
        return connection.getresponse()

    def _expect(self, answer: http.client.HTTPResponse, status: int, name: str) -> None:
        if answer.status != status:
            self._local.connection.close()
            self._local.connection = None
            raise Refused(f"{answer.status} {answer.reason} for {name}")
