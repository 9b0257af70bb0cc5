"""A folder of this machine as a device: for boards that build for themselves, and to try things."""

from __future__ import annotations


class LocalTransport:
    """Runs scripts by this machine's shell."""

    def __init__(self) -> None:
        self.name = "this machine"

    def connect(self) -> None:
        return

    def argv(self, script: str) -> list[str]:
        return ["/bin/sh", "-c", script]

    def environment(self) -> dict[str, str] | None:
        return None

    def facts_script(self) -> str:
        return ""

    def explain(self, said: str) -> str:
        return said

    def close(self) -> None:
        return
