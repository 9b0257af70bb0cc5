"""The vocabulary (.mllm) and merges files that mllm v1's tokenizers read, from tokenizer.json.

Vocabulary: i32 magic 23333, i32 count, then per token i32 id, i32 bytes, UTF-8 bytes, f32 score
(for BPE the id again); little endian, packed. The runtime sizes its table by the count and
indexes it by id, so ids must be 0..count-1. Merges: one "a b" per line.
Source: mllm v1, tools/convertor/vocab.py and its tokenizers.
"""

from __future__ import annotations

import struct
from os import PathLike
from pathlib import Path

from buildsys.formats.config_file import read_json
from buildsys.formats.errors import FormatError

MAGIC = 23333
_HEAD = struct.Struct("<ii")


def save_vocabulary(path: str | PathLike[str], tokenizer_json: str | PathLike[str]) -> int:
    """Write the vocabulary of a BPE tokenizer.json; returns the number of tokens.

    Tokens stand in the order of the file: the base vocabulary, then the added tokens that it
    lacks. Raises FormatError for holes, for ids used twice and for tokenizers that are not BPE.
    """
    source = Path(tokenizer_json)
    tokens = read_vocabulary(source)
    content = bytearray(_HEAD.pack(MAGIC, len(tokens)))
    for token, number in tokens:
        encoded = token.encode("utf-8")
        content += struct.pack("<ii", number, len(encoded)) + encoded
        content += struct.pack("<f", float(number))
    _write(Path(path), bytes(content))
    return len(tokens)


def save_merges(path: str | PathLike[str], tokenizer_json: str | PathLike[str]) -> int:
    """Write the merges of a BPE tokenizer.json, one "a b" per line; returns their number."""
    source = Path(tokenizer_json)
    merges = _model(source).get("merges")
    if not isinstance(merges, list):
        raise FormatError("is not a list", file=source, field="model.merges")
    lines = [_merge_line(merge, number, source) for number, merge in enumerate(merges)]
    _write(Path(path), "".join(f"{line}\n" for line in lines).encode("utf-8"))
    return len(lines)


def read_vocabulary(tokenizer_json: Path) -> list[tuple[str, int]]:
    """(token, id) pairs of a tokenizer.json whose ids are 0..n-1, in the order of the file."""
    base = _model(tokenizer_json).get("vocab")
    if not isinstance(base, dict) or not all(type(number) is int for number in base.values()):
        message = "is not an object of tokens and integer ids"
        raise FormatError(message, file=tokenizer_json, field="model.vocab")
    tokens: dict[int, str] = {}
    for token, number in [*base.items(), *_added_tokens(tokenizer_json)]:
        if tokens.setdefault(number, token) != token:
            message = f"id {number} is both {tokens[number]!r} and {token!r}"
            raise FormatError(message, file=tokenizer_json, field="added_tokens")
    _check_no_holes(tokens, tokenizer_json)
    return [(token, number) for number, token in tokens.items()]


def read_mllm_vocabulary(path: str | PathLike[str]) -> list[tuple[str, int, float]]:
    """(token, id, score) of a vocabulary file. Raises FormatError when it is damaged."""
    file = Path(path)
    content = _read(file)
    if len(content) < _HEAD.size or _HEAD.unpack_from(content)[0] != MAGIC:
        raise FormatError(f"does not begin with magic {MAGIC} (mllm vocabulary)", file=file)
    count = _HEAD.unpack_from(content)[1]
    tokens: list[tuple[str, int, float]] = []
    at = _HEAD.size
    try:
        for _ in range(count):
            number, length = struct.unpack_from("<ii", content, at)
            token = content[at + 8 : at + 8 + length].decode("utf-8")
            (score,) = struct.unpack_from("<f", content, at + 8 + length)
            tokens.append((token, number, score))
            at += 12 + length
    except (struct.error, UnicodeDecodeError) as error:
        message = f"is damaged after token {len(tokens)} of {count}"
        raise FormatError(message, file=file) from error
    return tokens


def _model(path: Path) -> dict[str, object]:
    content = read_json(path)
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict):
        raise FormatError("is missing", file=path, field="model")
    # Files of old tokenizers versions leave the type out; what has merges is BPE.
    if model.get("type", "BPE" if "merges" in model else None) != "BPE":
        raise FormatError(
            f"is {model.get('type')!r}, not BPE",
            file=path,
            field="model.type",
            remedy="mllm's tokenizer files are written for BPE models (Qwen2, SmolLM2) only.",
        )
    return model


def _added_tokens(path: Path) -> list[tuple[str, int]]:
    content = read_json(path)
    added = content.get("added_tokens") if isinstance(content, dict) else None
    tokens: list[tuple[str, int]] = []
    for entry in added if isinstance(added, list) else []:
        token = entry.get("content") if isinstance(entry, dict) else None
        number = entry.get("id") if isinstance(entry, dict) else None
        if not isinstance(token, str) or type(number) is not int:
            message = f"has the entry {entry!r} without content or id"
            raise FormatError(message, file=path, field="added_tokens")
        tokens.append((token, number))
    return tokens


def _check_no_holes(tokens: dict[int, str], path: Path) -> None:
    hole = next((number for number in range(len(tokens)) if number not in tokens), None)
    if hole is not None:
        raise FormatError(
            f"no token has id {hole}, the highest id is {max(tokens)}",
            file=path,
            field="model.vocab",
            remedy="mllm needs ids without holes: add unused tokens for the missing ids.",
        )


def _merge_line(merge: object, number: int, path: Path) -> str:
    parts = merge.split(" ") if isinstance(merge, str) else merge
    well_formed = (
        isinstance(parts, list)
        and len(parts) == 2
        and all(isinstance(part, str) and part and not set(part) & set(" \r\n") for part in parts)
    )
    if not well_formed or not isinstance(parts, list):
        raise FormatError(
            f"is {merge!r}, not two tokens", file=path, field=f"model.merges[{number}]"
        )
    return " ".join(parts)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise FormatError(f"cannot be read: {error.strerror}", file=path) from error


def _write(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise FormatError(f"cannot be written: {error.strerror}", file=path) from error
