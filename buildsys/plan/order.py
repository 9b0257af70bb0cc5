"""Topological order, and the circle that is in the way of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from heapq import heapify, heappop, heappush


def topological(needs: Mapping[str, Sequence[str]]) -> list[str]:
    """Names so that each comes after what it needs, otherwise in the order given.

    What stands on a circle, or behind one, is left out.
    """
    rank = {name: number for number, name in enumerate(needs)}
    names = list(needs)
    waiting = {name: len(set(before)) for name, before in needs.items()}
    after: dict[str, list[str]] = {name: [] for name in needs}
    for name, before in needs.items():
        for each in set(before):
            after[each].append(name)
    ready = [rank[name] for name, count in waiting.items() if count == 0]
    heapify(ready)
    order = []
    while ready:
        name = names[heappop(ready)]
        order.append(name)
        for each in after[name]:
            waiting[each] -= 1
            if waiting[each] == 0:
                heappush(ready, rank[each])
    return order


def find_circle(needs: Mapping[str, Sequence[str]]) -> list[str]:
    """A circle, each name needing the next and the last the first; empty if there is none."""
    ordered = set(topological(needs))
    left = dict.fromkeys(name for name in needs if name not in ordered)
    if not left:
        return []
    # Everything left needs something that is left, so a walk along needs meets itself.
    path: dict[str, int] = {}
    name = next(iter(left))
    while name not in path:
        path[name] = len(path)
        name = next(each for each in needs[name] if each in left)
    return list(path)[path[name] :]
