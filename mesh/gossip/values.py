"""The values of entries: msgpack documents, strictly bounded, so that a stranger's value is safe to look at."""

from __future__ import annotations

import math
from typing import Any

import msgpack

from mesh.gossip.config import MAX_VALUE_BYTES

#: Deeper than any document of ours: capabilities are {"devices": [{"flops": {dtype: number}}]}.
MAX_DEPTH = 8
#: Elements in all: bounds the memory that many tiny elements would blow up to (about 50 bytes each in Python).
MAX_ELEMENTS = 4096


def pack_value(value: dict[str, Any]) -> bytes:
    """Pack a value for gossip.

    Raises ValueError if it is not a dict with string keys made of None, bool, int, finite float, str, bytes, list and
    dict, is nested deeper than `MAX_DEPTH`, or takes more than `MAX_VALUE_BYTES`.
    """
    try:
        data: bytes = msgpack.packb(value, use_bin_type=True)
    except (TypeError, OverflowError, ValueError) as error:
        raise ValueError(f"gossip value cannot be packed: {error}") from None
    unpack_value(data)
    return data


def unpack_value(data: bytes) -> dict[str, Any]:
    """The inverse of `pack_value`. Raises ValueError for everything that `pack_value` would not have made."""
    if len(data) > MAX_VALUE_BYTES:
        raise ValueError(f"gossip value takes {len(data)} bytes, at most {MAX_VALUE_BYTES} are allowed")
    try:
        value = msgpack.unpackb(
            data, raw=False, strict_map_key=True, max_array_len=MAX_ELEMENTS, max_map_len=MAX_ELEMENTS, max_ext_len=0
        )
    except Exception as error:  # msgpack raises half a dozen unrelated classes; for us they all mean the same
        raise ValueError(f"gossip value is not msgpack: {type(error).__name__}") from None
    if type(value) is not dict:
        raise ValueError("gossip value is not a dict")
    if _count(value, 0) > MAX_ELEMENTS:
        raise ValueError(f"gossip value has more than {MAX_ELEMENTS} elements")
    return value


def _count(value: Any, depth: int) -> int:
    """Elements in `value`; raises ValueError for what has no place in one."""
    if depth > MAX_DEPTH:
        raise ValueError(f"gossip value is nested deeper than {MAX_DEPTH}")
    kind = type(value)
    if kind is dict:
        if any(type(key) is not str for key in value):
            raise ValueError("gossip value has a key that is not a string")
        return 1 + sum(_count(item, depth + 1) for item in value.values())
    if kind is list:
        return 1 + sum(_count(item, depth + 1) for item in value)
    if kind is float and not math.isfinite(value):
        raise ValueError("gossip value holds a number that is not finite")
    if value is None or kind in (bool, int, float, str, bytes):
        return 1
    raise ValueError(f"gossip value holds a {kind.__name__}")
