"""Strict reading of the small msgpack lists that certificates' companions are made of: invitations, documents, tokens.

Every reader names what it reads in its one error class, `Damaged`. Sizes are checked before anything is parsed.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from typing import Any

import msgpack

from mesh.identity.errors import Damaged

#: Timestamps stay in a range that every library can print (year 2200 at most).
MAX_TIME_S = 7_258_118_400
_CHECK_BYTES = 4


def pack(fields: list[Any]) -> bytes:
    """A msgpack list."""
    data: bytes = msgpack.packb(fields, use_bin_type=True)
    return data


def unpack(data: object, count: int, what: str, limit_bytes: int) -> list[Any]:
    """The msgpack list of `count` fields that is `data`, all of it. Raises Damaged."""
    if type(data) is not bytes or not 0 < len(data) <= limit_bytes:
        raise Damaged(f"{what}: not between 1 and {limit_bytes} bytes")
    try:
        fields = msgpack.unpackb(
            data, raw=False, strict_map_key=True, max_array_len=1024, max_map_len=0, max_ext_len=0, max_str_len=4096
        )
    except Exception as error:  # msgpack raises half a dozen unrelated classes; for us they all mean the same
        raise Damaged(f"{what}: not readable ({type(error).__name__})") from None
    if type(fields) is not list or len(fields) != count:
        raise Damaged(f"{what}: not a list of {count} fields")
    return fields


def blob(value: object, what: str, low: int, high: int | None = None) -> bytes:
    """A field of `low` to `high` bytes (exactly `low` without `high`). Raises Damaged."""
    if type(value) is not bytes or not low <= len(value) <= (low if high is None else high):
        raise Damaged(f"{what}: a field has the wrong size")
    return value


def number(value: object, what: str, low: int, high: int) -> int:
    """An integer field from `low` to `high`. Raises Damaged."""
    if type(value) is not int or not low <= value <= high:
        raise Damaged(f"{what}: a number is out of bounds")
    return value


def moment(value: object, what: str) -> int:
    """A point in time in whole seconds since 1970. Raises Damaged."""
    return number(value, what, 0, MAX_TIME_S)


def listing(value: object, what: str, most: int) -> list[Any]:
    """A field that is a list of at most `most`. Raises Damaged."""
    if type(value) is not list or len(value) > most:
        raise Damaged(f"{what}: a list is missing or too long")
    return value


def to_text(prefix: str, data: bytes) -> str:
    """One line to copy: the prefix, then base64url of the bytes and of a check sum, which finds slips in copying."""
    check = hashlib.sha256(prefix.encode() + data).digest()[:_CHECK_BYTES]
    return prefix + base64.urlsafe_b64encode(data + check).rstrip(b"=").decode()


def from_text(prefix: str, text: object, what: str, limit_bytes: int) -> bytes:
    """The inverse of `to_text`; white space around it is ignored. Raises Damaged."""
    if type(text) is not str or len(text) > 2 * limit_bytes + len(prefix) + 64:
        raise Damaged(f"{what}: too long to be one")
    line = text.strip()
    if not line.startswith(prefix):
        raise Damaged(f"{what}: does not start with {prefix!r}; copy all of it")
    body = line[len(prefix) :]
    try:
        data = base64.b64decode((body + "=" * (-len(body) % 4)).encode("ascii"), altchars=b"-_", validate=True)
    except (ValueError, binascii.Error):
        raise Damaged(f"{what}: holds a character that does not belong there; copy all of it") from None
    if not _CHECK_BYTES < len(data) <= limit_bytes + _CHECK_BYTES:
        raise Damaged(f"{what}: a part is missing; copy all of it")
    data, check = data[:-_CHECK_BYTES], data[-_CHECK_BYTES:]
    if hashlib.sha256(prefix.encode() + data).digest()[:_CHECK_BYTES] != check or to_text(prefix, data) != line:
        raise Damaged(f"{what}: a part is missing or changed; copy all of it")
    return data
