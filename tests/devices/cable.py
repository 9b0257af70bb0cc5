"""The cable between a client and a device: a TCP proxy that can be cut after a number of bytes."""

from __future__ import annotations

import contextlib
import socket
import threading


class Cable:
    """A TCP proxy on loopback; cut, it drops every connection and takes no new one."""

    def __init__(self, port: int, target: int) -> None:
        """port: 0 for any free one; `port` then says which."""
        self.target = target
        self.lock = threading.Lock()
        self.left: int | None = None
        self.whole = True
        self.holds = False
        self.held, self.released = threading.Event(), threading.Event()
        self.ends: list[socket.socket] = []
        self.listener = socket.create_server(("127.0.0.1", port))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut_after(self, count: int) -> None:
        """Cut once `count` more bytes have gone to the device."""
        with self.lock:
            self.left = count

    def cut(self) -> None:
        with self.lock:
            self.whole, self.left = False, None
            for end in self.ends:
                with contextlib.suppress(OSError):  # it was closed already
                    end.shutdown(socket.SHUT_RDWR)
            self.ends.clear()

    def hold_after(self, count: int) -> None:
        """Let nothing more through once `count` more bytes have gone to the device."""
        with self.lock:
            self.left, self.holds = count, True

    def wait_until_held(self) -> None:
        self.held.wait()

    def mend(self) -> None:
        with self.lock:
            self.whole, self.left, self.holds = True, None, False
        self.held.clear()
        self.released.set()

    def _accept(self) -> None:
        while True:
            host, _ = self.listener.accept()
            with self.lock:
                if not self.whole:
                    host.close()
                    continue
                device = socket.create_connection(("127.0.0.1", self.target))
                self.ends += [host, device]
            threading.Thread(target=self._pass, args=(host, device, True), daemon=True).start()
            threading.Thread(target=self._pass, args=(device, host, False), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, counted: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 18):
                if counted and not self._allowed(len(data)):
                    return
                sink.sendall(data)
        # Not closed: that sends nothing while the other thread waits in recv.
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _allowed(self, count: int) -> bool:
        with self.lock:
            if self.left is None:
                return True
            self.left -= count
            if self.left > 0:
                return True
            holds = self.holds
        if holds:
            self.released.clear()
            self.held.set()
            self.released.wait()
            return True
        self.cut()
        return False
