"""Is there room? A program that finds none says so in its log, which then has no room either."""

from __future__ import annotations

import os

LITTLE = 1 << 20  # bytes


def shortage(folder: str) -> str:
    """What is wanting on the disk of a folder, for a person; empty where nothing is."""
    found = os.statvfs(folder)
    free = found.f_bavail * found.f_frsize
    if free < LITTLE:
        return f"the disk of {folder} is full: {free >> 10} KiB are free"
    if found.f_files and not found.f_favail:
        return f"the disk of {folder} is full: it takes no more files"
    return ""
