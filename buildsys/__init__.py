"""qbuild: make for NPU model deployment."""

__version__ = "0.1.0"
