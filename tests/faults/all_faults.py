"""Every fault there is: importing a file of scenarios registers them."""

from tests.faults import disks, killing, scattering, sharing, tampering
from tests.faults.registry import FAULTS

__all__ = ["FAULTS", "disks", "killing", "scattering", "sharing", "tampering"]
