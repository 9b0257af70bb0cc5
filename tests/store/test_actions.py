"""Action records: what another machine may say, and what it may not."""

from __future__ import annotations

import json

import pytest

from buildsys.store.actions import Action, BadRecord, Entry, decode, encode, seal, unseal
from tests.store.conftest import key_of

KEY = key_of("step")
ENTRY = Entry("dir/f", key_of("content"), 7, True)
ACTION = Action((ENTRY,), ("dir",), {"notes": {"a": [1]}}, {"host": "h"})


def test_record_says_what_was_put_in() -> None:
    action, content = decode(KEY, unseal(seal(encode(KEY, ACTION, packed=["x"]))))
    assert action == ACTION
    assert content["packed"] == ["x"]


def test_record_of_another_key_is_refused() -> None:
    with pytest.raises(BadRecord, match="another key"):
        decode(key_of("other"), encode(KEY, ACTION))


@pytest.mark.parametrize("at", [0, 40, 64, 65, 100, -1])
def test_any_changed_byte_breaks_the_seal(at: int) -> None:
    data = bytearray(seal(encode(KEY, ACTION)))
    data[at] ^= 1
    with pytest.raises(BadRecord):
        unseal(bytes(data))


@pytest.mark.parametrize(
    "path", ["../f", "/etc/passwd", "a/../../f", "", "a//b", "./f", "a/", "a\0b", "..", 7, None]
)
@pytest.mark.parametrize("where", ["files", "folders"])
def test_path_that_leads_out_of_the_staging_folder_is_refused(path: object, where: str) -> None:
    content = json.loads(encode(KEY, ACTION))
    content["action"][where] = [path] if where == "folders" else [[path, *ENTRY[1:]]]
    with pytest.raises(BadRecord):
        decode(KEY, json.dumps(content).encode())


@pytest.mark.parametrize(
    "row",
    [
        ["f", "../../x", 1, False],
        ["f", ENTRY.digest.upper() + "G", 1, False],
        ["f", ENTRY.digest, -1, False],
        ["f", ENTRY.digest, "1", False],
        ["f", ENTRY.digest, 1, 0o777],
        ["f", ENTRY.digest],
        "f",
    ],
)
def test_entry_without_digest_size_or_mode_is_refused(row: object) -> None:
    content = json.loads(encode(KEY, ACTION))
    content["action"]["files"] = [row]
    with pytest.raises(BadRecord):
        decode(KEY, json.dumps(content).encode())


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b"\xff", b"null", b'{"v": 2}'])
def test_what_is_no_record_is_refused(text: bytes) -> None:
    with pytest.raises(BadRecord):
        decode(KEY, text)
