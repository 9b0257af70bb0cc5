"""What goes wrong with devices, as errors for people."""

from __future__ import annotations

from buildsys.errors import QbuildError

TRANSPORT_FAILED = 3
TIMED_OUT = 124


class DeviceError(QbuildError):
    """The device cannot be reached, was lost, or does not hold what it was given."""

    exit_code = TRANSPORT_FAILED


class LinkLost(DeviceError):
    """A command's end mark did not come back: whatever it said, it is not known to have ended."""


class DeviceRefused(QbuildError):
    """What is to be deployed does not fit the device, or must not go there. Nothing was sent."""

    exit_code = 2


class CommandFailed(DeviceError):
    """A command on the device ended, with an exit code other than 0."""

    def __init__(self, message: str, code: int, said: str, remedy: str | None = None) -> None:
        super().__init__(message, remedy=remedy)
        self.code = code
        self.said = said
