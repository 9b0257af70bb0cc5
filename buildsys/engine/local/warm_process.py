"""The warm worker itself: imports, then forks a child for every order.

A child is forked twice, so that it becomes the supervisor's child (the nearest subreaper) and
the supervisor learns of its death, its exit status and its resource usage at first hand.
"""

from __future__ import annotations

import gc
import importlib
import os
import socket
from typing import TYPE_CHECKING, NoReturn

from buildsys.engine.local import step_main
from buildsys.engine.local.spawn import die_with_parent
from buildsys.engine.local.wire import encode

if TYPE_CHECKING:
    from buildsys.plan.graph import Json


def main(arguments: list[str]) -> None:
    """arguments: the channel's descriptor, and the modules to import, with commas."""
    channel = socket.socket(fileno=int(arguments[0]))
    channel.set_inheritable(False)
    for module in filter(None, arguments[1].split(",")):
        importlib.import_module(module)
    # A collection in a child would write to, and so copy, every page that it shares.
    gc.collect()
    gc.freeze()
    channel.sendall(encode({"threads": len(os.listdir("/proc/self/task"))}))
    while True:
        message, descriptors, _, _ = socket.recv_fds(channel, 1, 2)
        if not message:
            return
        _serve(channel, *descriptors)


def _serve(channel: socket.socket, order: int, events: int) -> None:
    """Fork a child for the order and tell its pid before it begins."""
    told, tell = os.pipe()
    held, release = os.pipe()
    supervisor = os.getppid()
    first = os.fork()
    if first == 0:
        _fork_again(tell)
        for fd in (channel.fileno(), told, tell, release):
            os.close(fd)
        os.read(held, 1)  # nothing comes: it ends when the worker lets go
        os.close(held)
        _begin(supervisor, order, events)
    os.waitpid(first, 0)
    os.close(tell)
    channel.sendall(os.read(told, 4096) or encode({"error": "the first fork failed"}))
    for fd in (told, held, release, order, events):
        os.close(fd)


def _fork_again(tell: int) -> None:
    """Returns in the grandchild only."""
    answer: Json
    try:
        second = os.fork()
        if second == 0:
            return
        answer = {"pid": second}
    except OSError as error:
        answer = {"error": f"cannot fork: {error}"}
    os.write(tell, encode(answer))
    os._exit(0)


def _begin(supervisor: int, order: int, events: int) -> NoReturn:
    # Only now, because the death of the process in between would have been a parent's death.
    die_with_parent()
    if os.getppid() != supervisor:
        os._exit(1)
    step_main.run(order, events)
