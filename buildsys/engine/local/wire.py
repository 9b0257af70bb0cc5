"""JSON values, one a line, between qbuild, the supervisor, the workers and the steps."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from buildsys.engine.executor import Order

if TYPE_CHECKING:
    from buildsys.plan.graph import Json


SETTLED = ("claim", "priority", "parts")
_encode = json.JSONEncoder(separators=(",", ":")).encode  # json.dumps would make one per call


def encode(message: Json) -> bytes:
    """One line. What JSON has no form for (a path, a numpy number) is a TypeError."""
    return _encode(message).encode() + b"\n"


class Lines:
    """Puts back together the lines that a stream delivers in pieces."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[Json]:
        """The values that `data` completes."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines]


def order_to_json(order: Order) -> Json:
    """What running it takes; why it runs here and now is settled."""
    found = order._asdict()
    for name in SETTLED:
        del found[name]
    if order.argv:
        found["context"] = {}  # all that a program is told is in its arguments
    return found


def order_from_json(value: Json) -> Order:
    for name in ("argv", "writable"):
        value[name] = tuple(value[name])
    return Order(**value)


def write_order(order: Order) -> int:
    """An open nameless file that holds the order: a process may be given it whatever its size."""
    fd = os.memfd_create("order")
    os.write(fd, encode(order_to_json(order)))
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def read_order(fd: int) -> Order:
    with open(fd, "rb") as file:
        return order_from_json(json.load(file))
