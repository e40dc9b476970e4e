"""The values of entries: msgpack documents, strictly bounded, so that a stranger's value is safe to look at."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, cast

import msgpack

from mesh.gossip.config import MAX_VALUE_BYTES

#: Deeper than any document of ours: capabilities are {"devices": [{"flops": {dtype: number}}]}.
MAX_DEPTH = 8
#: Elements in all: bounds the memory that many tiny elements would blow up to (about 50 bytes each in Python).
MAX_ELEMENTS = 4096

_PLAIN = frozenset({type(None), bool, int, str, bytes})
_ALLOWED = _PLAIN | {float, list, dict}


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
    _check(value)
    return value


def _check(value: dict[str, Any]) -> None:
    """Raise ValueError for what has no place in a value, and for too much of it.

    Level by level, and each container by the set of its elements' types: every entry of every site comes through here.
    """
    count, level = 1, cast("list[dict[str, Any] | list[Any]]", [value])
    for _ in range(MAX_DEPTH):
        deeper: list[dict[str, Any] | list[Any]] = []
        for holder in level:
            if type(holder) is dict:
                if not {*map(type, holder)} <= {str}:
                    raise ValueError("gossip value has a key that is not a string")
                items: Collection[Any] = holder.values()
            else:
                items = holder
            count += len(items)
            kinds = {*map(type, items)}
            if kinds <= _PLAIN:
                continue
            if strange := kinds - _ALLOWED:
                raise ValueError(f"gossip value holds a {min(kind.__name__ for kind in strange)}")
            if not all(math.isfinite(item) for item in items if type(item) is float):
                raise ValueError("gossip value holds a number that is not finite")
            deeper += [item for item in items if type(item) in (dict, list)]
        if count > MAX_ELEMENTS:
            raise ValueError(f"gossip value has more than {MAX_ELEMENTS} elements")
        level = deeper
    if any(level):
        raise ValueError(f"gossip value is nested deeper than {MAX_DEPTH}")
