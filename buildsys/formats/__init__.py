"""Bytes on disk: readers and streamed writers. No mathematics; imports nothing of qbuild."""
