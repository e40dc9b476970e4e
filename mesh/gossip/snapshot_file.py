"""Whom a peer knew, as bytes to be kept over a restart (serf#333: live peers alone are not enough).

    "ISTK" | version 1 byte | blake2b-128 of the rest | msgpack [cluster, [[site, address, incarnation, state], ...]]

Reading is strict and bounded: what was cut short, damaged or written for another cluster is refused as a whole, because
a peer that starts from half of what it knew would not notice.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from typing import Any

import msgpack

from mesh.gossip import config
from mesh.gossip.absent import Known
from mesh.gossip.members import RANK, STATES

MAGIC = b"ISTK\x01"
HASH_BYTES = 16
#: Members and as many absent ones, each with the longest name and address.
MAX_KNOWN = 2 * config.MAX_MEMBERS
MAX_BYTES = MAX_KNOWN * (config.MAX_NAME_BYTES + config.MAX_ADDRESS_BYTES + 24) + 256


class BadSnapshot(ValueError):
    """Bytes that are no snapshot of this cluster. One line says why."""


def encode(cluster: str, known: Iterable[Known]) -> bytes:
    """At most the first `MAX_KNOWN` of those known, as bytes."""
    rows = [[site, address, incarnation, RANK[state]] for site, address, incarnation, state in known][:MAX_KNOWN]
    body: bytes = msgpack.packb([cluster, rows])
    return MAGIC + blake2b(body, digest_size=HASH_BYTES).digest() + body


def decode(cluster: str, data: bytes) -> list[Known]:
    """The inverse. Raises BadSnapshot, nothing else."""
    start = len(MAGIC) + HASH_BYTES
    if len(data) > MAX_BYTES:
        raise BadSnapshot(f"snapshot of known peers: {len(data)} bytes are more than {MAX_BYTES}")
    if data[: len(MAGIC)] != MAGIC:
        raise BadSnapshot("snapshot of known peers: another format")
    body = data[start:]
    if blake2b(body, digest_size=HASH_BYTES).digest() != data[len(MAGIC) : start]:
        raise BadSnapshot("snapshot of known peers: damaged or cut short")
    try:
        written = msgpack.unpackb(body, raw=False, max_array_len=MAX_KNOWN, max_map_len=0, max_ext_len=0)
    except Exception as error:  # msgpack raises of many classes for what is not msgpack
        raise BadSnapshot(f"snapshot of known peers: {type(error).__name__}") from None
    if type(written) is not list or len(written) != 2 or type(written[1]) is not list:
        raise BadSnapshot("snapshot of known peers: not a list of peers")
    if written[0] != cluster:
        raise BadSnapshot(f"snapshot of known peers: of cluster {written[0]!r:.80}, not {cluster!r}")
    known = {peer.site: peer for peer in map(_peer, written[1])}
    return [known[site] for site in sorted(known)]


def _peer(row: Any) -> Known:
    if type(row) is not list or len(row) != 4:
        raise BadSnapshot("snapshot of known peers: a peer has four fields")
    site, address, incarnation, rank = row
    if not config.valid_name(site) or not config.valid_address(address):
        raise BadSnapshot(f"snapshot of known peers: {site!r:.80} at {address!r:.80} is not a site at host:port")
    if type(incarnation) is not int or not 0 < incarnation <= config.MAX_COUNTER:
        raise BadSnapshot(f"snapshot of known peers: incarnation of {site} out of bounds")
    if type(rank) is not int or not 0 <= rank < len(STATES):
        raise BadSnapshot(f"snapshot of known peers: state of {site} out of bounds")
    return Known(site, address, incarnation, STATES[rank])
