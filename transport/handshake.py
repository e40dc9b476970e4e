"""How a channel begins: the connector's hello, the acceptor's welcome, and the keys that follow. Pure.

The two ends share a channel key (32 bytes) that came over the authenticated control plane, and a hello that names the
channel. Each end adds 16 random bytes, so the keys of a connection are fresh even if the same channel is opened again;
no nonce is ever used twice under one key. The connector may send right behind its hello: its direction needs its own
random bytes only. The acceptor's direction needs both, so a recorded welcome proves nothing.

    hello    magic, sealed?, random, length, hello, proof
    welcome  magic, random, proof

The proof is an HMAC over all before it, under a key derived beside the sealing key. Without a channel key it is zeros.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from typing import NamedTuple

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from transport.base import FIRST_MESSAGE_BYTES, FrameError
from transport.frames import KEY_BYTES

RANDOM_BYTES = 16
_PROOF_BYTES = 16
_HELLO = struct.Struct(f"<8sB{RANDOM_BYTES}sH")
_HELLO_MAGIC = b"ISTHMH\x00\x01"
_WELCOME_MAGIC = b"ISTHMW\x00\x01"
_WELCOME_BYTES = len(_WELCOME_MAGIC) + RANDOM_BYTES + _PROOF_BYTES
MAX_HELLO_BYTES = FIRST_MESSAGE_BYTES - _HELLO.size - _PROOF_BYTES


class Keys(NamedTuple):
    """One direction: what seals its frames (None: unsealed) and what proves its handshake message."""

    seal: bytes | None
    proof: bytes


class Hello(NamedTuple):
    """A hello that was read but not believed yet: `check_hello` does that, with the key the name leads to."""

    name: bytes
    random: bytes
    sealed: bool
    message: bytes


def write_hello(name: bytes, key: bytes | None, random: bytes) -> tuple[bytes, Keys]:
    """The connector's first message, and the keys of its direction. Raises ValueError for a bad key or long name."""
    if len(name) > MAX_HELLO_BYTES:
        raise ValueError(f"a hello of {len(name)} bytes exceeds {MAX_HELLO_BYTES}")
    keys = _derive(key, random, b"connector", name)
    message = _HELLO.pack(_HELLO_MAGIC, key is not None, random, len(name)) + name
    return message + _proof(keys.proof, key, message), keys


def read_hello(message: memoryview) -> Hello:
    """Take a hello apart. Raises FrameError for anything else."""
    if message.nbytes < _HELLO.size + _PROOF_BYTES:
        raise FrameError("not a hello: too short")
    magic, sealed, random, length = _HELLO.unpack_from(message)
    if magic != _HELLO_MAGIC or sealed > 1 or message.nbytes != _HELLO.size + length + _PROOF_BYTES:
        raise FrameError("not a hello of this version")
    return Hello(bytes(message[_HELLO.size : _HELLO.size + length]), random, bool(sealed), bytes(message))


def check_hello(hello: Hello, key: bytes | None) -> Keys:
    """The keys of the connector's direction. Raises FrameError when the hello was not made with this key."""
    if hello.sealed != (key is not None):
        raise FrameError("one end seals and the other does not")
    keys = _derive(key, hello.random, b"connector", hello.name)
    body, proof = hello.message[:-_PROOF_BYTES], hello.message[-_PROOF_BYTES:]
    if not hmac.compare_digest(proof, _proof(keys.proof, key, body)):
        raise FrameError("the hello's proof does not hold: another key")
    return keys


def write_welcome(hello: Hello, key: bytes | None, random: bytes) -> tuple[bytes, Keys]:
    """The acceptor's first message, and the keys of its direction."""
    keys = _derive(key, hello.random + random, b"acceptor", hello.name)
    message = _WELCOME_MAGIC + random
    return message + _proof(keys.proof, key, message), keys


def read_welcome(message: memoryview, name: bytes, key: bytes | None, random: bytes) -> Keys:
    """The keys of the acceptor's direction; `random` is the connector's. Raises FrameError when it is not genuine."""
    if message.nbytes != _WELCOME_BYTES or message[: len(_WELCOME_MAGIC)] != _WELCOME_MAGIC:
        raise FrameError("not a welcome of this version")
    theirs = bytes(message[len(_WELCOME_MAGIC) : -_PROOF_BYTES])
    keys = _derive(key, random + theirs, b"acceptor", name)
    if not hmac.compare_digest(bytes(message[-_PROOF_BYTES:]), _proof(keys.proof, key, bytes(message[:-_PROOF_BYTES]))):
        raise FrameError("the welcome's proof does not hold: another key")
    return keys


def _derive(key: bytes | None, salt: bytes, direction: bytes, name: bytes) -> Keys:
    if key is None:
        return Keys(None, bytes(KEY_BYTES))
    if len(key) != KEY_BYTES:
        raise ValueError(f"a channel key has {KEY_BYTES} bytes, not {len(key)}")
    info = b"isthmus channel v1 " + direction + b" " + name
    material = HKDF(algorithm=SHA256(), length=2 * KEY_BYTES, salt=salt, info=info).derive(key)
    return Keys(material[:KEY_BYTES], material[KEY_BYTES:])


def _proof(secret: bytes, key: bytes | None, message: bytes) -> bytes:
    return bytes(_PROOF_BYTES) if key is None else hmac.new(secret, message, hashlib.sha256).digest()[:_PROOF_BYTES]
