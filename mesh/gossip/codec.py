"""Datagrams: a fixed header, then a sealed msgpack list, the sender first.

    magic "ISTM" | version 1 byte | blake2b-64 of the cluster's name | sealed([sender, message, message, ...])

Requests and answers over reliable streams look the same but for the seal, which the stream brings itself.

The decoder is strict: every field has a type and bounds, nothing may be left over, and whatever is wrong with what
arrived it raises `Malformed` or one of its subclasses (see `sealing`), never anything else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Any, NamedTuple

import msgpack

from mesh.gossip import config
from mesh.gossip.coordinates import Coordinate
from mesh.gossip.fingerprint import BUCKET_BYTES, LEAVES, NAME_BYTES, PRINT_BYTES, ROW_BYTES
from mesh.gossip.members import RANK, STATES, Claim
from mesh.gossip.messages import (
    Ack,
    Buckets,
    Digest,
    Message,
    Nack,
    Page,
    Ping,
    PingRequest,
    Rumour,
    Sender,
    Summary,
    Taken,
    Want,
)
from mesh.gossip.proof import CLUSTER, MAX_PROOF_BYTES, RESERVED_PREFIX
from mesh.gossip.sealing import Foreign, Forged, Malformed, Opened, Sealer, Unsealed

__all__ = ["Codec", "Datagram", "Foreign", "Malformed", "Opened", "Sealer", "Unsealed", "pack_message", "pack_sender"]

MAGIC = b"ISTM"
VERSION = 3
#: msgpack's array 16; its length follows in two bytes.
_LIST = b"\xdc"

#: Messages in one datagram; the smallest takes 3 bytes, so an honest one never comes near.
MAX_MESSAGES = 256
#: The same in one request over a stream; the smallest that is of use there takes 40.
MAX_STREAM_MESSAGES = 8192
#: Names and addresses known to be valid: those of the largest mesh, with some to spare.
REMEMBERED = 2 * config.MAX_MEMBERS
#: Indirect probes may not bind a helper for longer.
MAX_BUDGET_MS = 30_000
#: News is passed on from peer to peer no further than this: twice what a mesh of the largest size needs.
MAX_HOPS = 16


class Datagram(NamedTuple):
    """What was in a datagram. `sender` is None where it was between the sealers; `reply` goes back to its source."""

    sender: Sender | None
    messages: list[Message]
    reply: bytes | None = None


class Codec:
    """Encodes and decodes the datagrams and streams of one cluster."""

    def __init__(self, cluster: str, sealer: Sealer | None = None) -> None:
        """`cluster`: peers of another cluster's name are not heard."""
        self._sealer: Sealer = sealer or Unsealed()
        self._header = MAGIC + bytes([VERSION]) + blake2b(cluster.encode(), digest_size=8).digest()
        self._fixed_bytes = len(self._header) + len(_LIST) + 2

    def room_bytes(self, sender: bytes) -> int:
        """Bytes left for messages in a datagram that starts with the packed `sender`."""
        return config.MAX_DATAGRAM_BYTES - self._fixed_bytes - self._sealer.overhead_bytes - len(sender)

    def stream_room_bytes(self, sender: bytes) -> int:
        """The same in a request over a stream, or its answer."""
        return config.MAX_STREAM_BYTES - self._fixed_bytes - len(sender)

    def join(
        self, sender: bytes, messages: Sequence[bytes], *, address: str = "", site: str = "", now: float = 0.0
    ) -> bytes:
        """One datagram of a packed sender and packed messages, to `site` at `address`. They must fit."""
        return self._header + self._sealer.seal(_body(sender, messages), address=address, site=site, now=now)

    def join_stream(self, sender: bytes, messages: Sequence[bytes]) -> bytes:
        """One request over a stream, or its answer. They must fit."""
        return self._header + _body(sender, messages)

    def decode(self, data: bytes, *, source: str = "", now: float = 0.0) -> Datagram:
        """Take a datagram apart. Raises Malformed or one of its subclasses, nothing else."""
        if len(data) > config.MAX_DATAGRAM_BYTES:
            raise Malformed("datagram too large")
        try:
            opened = self._sealer.open(self._behind_header(data), source=source, now=now)
        except Malformed as refused:
            if refused.reply is not None:
                refused.reply = self._header + refused.reply
            raise
        reply = None if opened.reply is None else self._header + opened.reply
        if not opened.body and (reply is not None or opened.site is not None):
            return Datagram(None, [], reply)
        sender, messages = _parse(opened.body, MAX_MESSAGES)
        if opened.site is not None and opened.site != sender.site:
            raise Forged(f"{opened.site} speaks as {sender.site}")
        return Datagram(sender, messages, reply)

    def decode_stream(self, data: bytes, site: str | None = None) -> Datagram:
        """Take a request over a stream apart, or its answer. `site` is who provably sent it. Raises like `decode`."""
        if len(data) > config.MAX_STREAM_BYTES:
            raise Malformed("stream too large")
        sender, messages = _parse(self._behind_header(data), MAX_STREAM_MESSAGES)
        if site is not None and site != sender.site:
            raise Forged(f"{site} speaks as {sender.site}")
        return Datagram(sender, messages)

    def _behind_header(self, data: bytes) -> bytes:
        if not data.startswith(self._header):
            raise Foreign("another magic, version or cluster")
        return data[len(self._header) :]


def _body(sender: bytes, messages: Sequence[bytes]) -> bytes:
    return b"".join([_LIST, (len(messages) + 1).to_bytes(2), sender, *messages])


def _parse(body: bytes, most: int) -> tuple[Sender, list[Message]]:
    objects = _objects(body, most)
    return _sender(objects[0]), [_message(item) for item in objects[1:]]


def pack_sender(sender: Sender) -> bytes:
    """The head of a datagram's body."""
    return _pack(list(sender))


def pack_message(message: Message) -> bytes:
    """One message, as it stands in the body."""
    return _PACKERS[type(message)](message)


#: One packer for all: making one takes longer than what it does for a ping. It holds nothing between two calls.
_PACKER = msgpack.Packer(use_bin_type=True)


def _pack(value: Any) -> bytes:
    packed: bytes = _PACKER.pack(value)
    return packed


def _pack_claim(claim: Claim) -> list[Any]:
    return [claim.site, claim.address, RANK[claim.state], claim.incarnation, claim.accuser, claim.proof]


_PACKERS: dict[type, Callable[[Any], bytes]] = {
    Ping: lambda m: _pack([0, *m] if m.asker else [0, m.seq, m.target]),
    Ack: lambda m: _pack([1, *m]),
    Nack: lambda m: _pack([2, *m]),
    PingRequest: lambda m: _pack([3, *m]),
    Rumour: lambda m: _pack([4, *_pack_claim(m.claim), m.news]),
    Buckets: lambda m: _pack([5, *m]),
    Summary: lambda m: _pack([6, *m]),
    Want: lambda m: _pack([7, *m]),
    Digest: lambda m: _pack([8, *m]),
    Page: lambda m: _pack([9, *m]),
    Taken: lambda m: _pack([10, *m]),
}


def _refuse_extension(code: int, data: bytes) -> Any:
    raise Malformed(f"msgpack extension {code}")


def _objects(body: bytes, most: int) -> list[Any]:
    """The msgpack list that is `body`, all of it. Containers cannot claim more elements than a body may have."""
    try:
        objects = msgpack.unpackb(
            body,
            raw=False,
            strict_map_key=True,
            ext_hook=_refuse_extension,
            max_array_len=most + 1,
            max_map_len=config.MAX_KEYS_PER_SITE,
            max_ext_len=0,
        )
    except Malformed:
        raise
    except Exception as error:  # msgpack raises half a dozen unrelated classes; for us they all mean the same
        raise Malformed(f"not msgpack: {type(error).__name__}") from None
    if type(objects) is not list or not objects:
        raise Malformed("not a list of messages")
    return objects


def _fields(item: Any, count: int) -> list[Any]:
    if type(item) is not list or len(item) != count:
        raise Malformed("not a list of the right length")
    return item


def _number(value: Any, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise Malformed("number out of bounds")
    return value


# The same names and addresses come with every datagram: what was found valid is remembered. What was not raises.
@lru_cache(maxsize=REMEMBERED)
def _checked_name(value: str) -> str:
    if not config.valid_name(value) or value.startswith(RESERVED_PREFIX):
        raise Malformed("not a name")
    return value


@lru_cache(maxsize=REMEMBERED)
def _checked_address(value: str) -> str:
    if not config.valid_address(value):
        raise Malformed("not an address")
    return value


def _name(value: Any) -> str:
    if type(value) is not str:
        raise Malformed("not a name")
    return _checked_name(value)


def _owner(value: Any) -> str:
    return CLUSTER if value == CLUSTER else _name(value)


def _proof(value: Any) -> bytes:
    if type(value) is not bytes or len(value) > MAX_PROOF_BYTES:
        raise Malformed("not a proof")
    return value


def _key(value: Any) -> str:
    if not config.valid_name(value, config.MAX_KEY_BYTES):
        raise Malformed("not a key")
    return str(value)


def _optional_name(value: Any) -> str:
    return "" if value == "" else _name(value)


def _address(value: Any) -> str:
    if type(value) is not str:
        raise Malformed("not an address")
    return _checked_address(value)


def _counter(value: Any) -> int:
    return _number(value, 1, config.MAX_COUNTER)


def _sequence(value: Any) -> int:
    return _number(value, 0, 2**32 - 1)


def _claim(fields: list[Any]) -> Claim:
    site, address, rank, incarnation, accuser, proof = fields
    state = STATES[_number(rank, 0, len(STATES) - 1)]
    who = _name(site), _address(address)
    return Claim(*who, state, _counter(incarnation), _optional_name(accuser), _proof(proof))


def _sender(item: Any) -> Sender:
    site, address, incarnation, left, fingerprint, proof = _fields(item, 6)
    if type(left) is not bool or type(fingerprint) is not bytes or len(fingerprint) != PRINT_BYTES:
        raise Malformed("bad sender")
    return Sender(_name(site), _address(address), _counter(incarnation), left, fingerprint, _proof(proof))


def _ping(item: list[Any]) -> Message:
    if len(item) == 3:
        return Ping(_sequence(item[1]), _optional_name(item[2]))
    _, seq, target, asker, asker_seq = _fields(item, 5)
    return Ping(_sequence(seq), _name(target), _name(asker), _sequence(asker_seq))


def _ack(item: list[Any]) -> Message:
    _, seq, where = _fields(item, 3)
    if where != b"":
        try:
            Coordinate.unpack(where)
        except ValueError as error:
            raise Malformed(str(error)) from None
    return Ack(_sequence(seq), bytes(where))


def _nack(item: list[Any]) -> Message:
    return Nack(_sequence(_fields(item, 2)[1]))


def _ping_request(item: list[Any]) -> Message:
    _, seq, target, address, budget_ms = _fields(item, 5)
    return PingRequest(_sequence(seq), _name(target), _address(address), _number(budget_ms, 1, MAX_BUDGET_MS))


def _rumour(item: list[Any]) -> Message:
    fields = _fields(item, 8)
    if type(fields[7]) is not bool:
        raise Malformed("bad rumour")
    return Rumour(_claim(fields[1:7]), fields[7])


def _bucket_count(value: Any) -> int:
    count = _number(value, 1, LEAVES)
    if LEAVES % count:
        raise Malformed("not a number of buckets")
    return count


def _packed(value: Any, step: int, low: int, high: int) -> bytes:
    """Bytes that hold `low` to `high` things of `step` bytes."""
    if type(value) is not bytes or len(value) % step or not low * step <= len(value) <= high * step:
        raise Malformed("not packed as it should be")
    return value


def _buckets(item: list[Any]) -> Message:
    _, total, hashes = _fields(item, 3)
    total = _bucket_count(total)
    return Buckets(total, _packed(hashes, BUCKET_BYTES, total, total))


def _summary(item: list[Any]) -> Message:
    _, total, buckets, rows = _fields(item, 4)
    total, buckets = _bucket_count(total), _packed(buckets, 1, 1, LEAVES)
    if max(buckets) >= total or len(set(buckets)) < len(buckets):
        raise Malformed("not these buckets")
    return Summary(total, buckets, _packed(rows, ROW_BYTES, 0, config.MAX_MEMBERS))


def _want(item: list[Any]) -> Message:
    return Want(_packed(_fields(item, 2)[1], NAME_BYTES, 1, config.MAX_MEMBERS))


def _digest(item: list[Any]) -> Message:
    _, site, incarnation, generation, versions, answer = _fields(item, 6)
    if type(versions) is not dict or type(answer) is not bool or len(versions) > config.MAX_KEYS_PER_SITE:
        raise Malformed("bad digest")
    held = {_key(key): _counter(version) for key, version in versions.items()}
    return Digest(_owner(site), _counter(incarnation), _number(generation, 0, config.MAX_COUNTER), held, answer)


def _page(item: list[Any]) -> Message:
    _, owner, generation, key, version, part, parts, data, proof, hops = _fields(item, 10)
    if type(data) is not bytes or not 0 < len(data) <= config.PAGE_BYTES:
        raise Malformed("bad page")
    parts = _number(parts, 1, config.MAX_PAGES)
    place = _owner(owner), _counter(generation), _key(key), _counter(version)
    return Page(*place, _number(part, 0, parts - 1), parts, data, _proof(proof), _number(hops, 0, MAX_HOPS))


def _taken(item: list[Any]) -> Message:
    return Taken(_address(_fields(item, 2)[1]))


_PARSERS = (_ping, _ack, _nack, _ping_request, _rumour, _buckets, _summary, _want, _digest, _page, _taken)


def _message(item: Any) -> Message:
    if type(item) is not list or not item or type(item[0]) is not int or not 0 <= item[0] < len(_PARSERS):
        raise Malformed("unknown message")
    return _PARSERS[item[0]](item)
