"""How a channel begins: the connector's hello, the acceptor's welcome, and the keys that follow. Pure.

The two ends share a channel key (32 bytes), which the owner of a job draws for each channel and epoch and gives to the
two peers over the authenticated control plane: so it stands for their identities. Each end adds an ephemeral X25519 key
(RFC 7748). The sealing keys come by HKDF (RFC 5869) from what both ephemeral keys share, with the channel key as salt,
bound to the transcript of the handshake. Who learns the channel key later, but has only recorded, opens nothing; who
breaks X25519 but does not have the channel key, neither.

    hello    magic, sealed?, ephemeral key, length, name, proof under the channel key
    welcome  magic, ephemeral key, proof under a key that only the two ends can derive

So nothing is sealed before the welcome: a connector holds back what it has to send. A recorded hello opens a channel
that its sender cannot use; a recorded welcome proves nothing. Where sealing is off, both ends prove themselves all the
same, and only the frames are left open. Without a channel key proofs are zeros and nothing is sealed.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from transport.base import FIRST_MESSAGE_BYTES, FrameError
from transport.seal import KEY_BYTES

#: What an end draws for its ephemeral key.
RANDOM_BYTES = 32
_PROOF_BYTES = 16
_HELLO = struct.Struct("<8sB32sH")
_HELLO_MAGIC = b"ISTHMH\x00\x02"
_WELCOME = struct.Struct("<8s32s")
_WELCOME_MAGIC = b"ISTHMW\x00\x02"
MAX_HELLO_BYTES = FIRST_MESSAGE_BYTES - _HELLO.size - _PROOF_BYTES


class Keys(NamedTuple):
    """What seals the frames of each direction; None where nothing is sealed."""

    connector: bytes | None
    acceptor: bytes | None


class Hello(NamedTuple):
    """A hello that was read but not believed yet: `answer_hello` does that, with the key the name leads to."""

    name: bytes
    public: bytes
    sealed: bool
    message: bytes


def write_hello(name: bytes, key: bytes | None, random: bytes, *, seal: bool = True) -> bytes:
    """The connector's first message. `random`: RANDOM_BYTES, also for `read_welcome`, and used for nothing else.

    seal: whether frames will be sealed, which both ends have to want alike.

    Raises ValueError for a bad key or a long name.
    """
    if len(name) > MAX_HELLO_BYTES:
        raise ValueError(f"a hello of {len(name)} bytes exceeds {MAX_HELLO_BYTES}")
    if key is not None and len(key) != KEY_BYTES:
        raise ValueError(f"a channel key has {KEY_BYTES} bytes, not {len(key)}")
    message = _HELLO.pack(_HELLO_MAGIC, key is not None and seal, _public(key, random), len(name)) + name
    return message + _proof(key, b"hello", message)


def read_hello(message: memoryview) -> Hello:
    """Take a hello apart. Raises FrameError for anything else."""
    if message.nbytes < _HELLO.size + _PROOF_BYTES:
        raise FrameError("not a hello: too short")
    magic, sealed, public, length = _HELLO.unpack_from(message)
    if magic != _HELLO_MAGIC or sealed > 1 or message.nbytes != _HELLO.size + length + _PROOF_BYTES:
        raise FrameError("not a hello of this version")
    return Hello(bytes(message[_HELLO.size : _HELLO.size + length]), public, bool(sealed), bytes(message))


def answer_hello(hello: Hello, key: bytes | None, random: bytes, *, seal: bool = True) -> tuple[bytes, Keys]:
    """The acceptor's first message, and the keys. Raises FrameError when the hello was not made with this key."""
    if hello.sealed != (key is not None and seal):
        raise FrameError("one end seals and the other does not")
    body, proof = hello.message[:-_PROOF_BYTES], hello.message[-_PROOF_BYTES:]
    if not hmac.compare_digest(proof, _proof(key, b"hello", body)):
        raise FrameError("the hello's proof does not hold: another key")
    message = _WELCOME.pack(_WELCOME_MAGIC, _public(key, random))
    keys, secret = _agree(key, random, hello.public, hello.message + message)
    return message + _proof(secret, b"welcome", message), keys if hello.sealed else Keys(None, None)


def read_welcome(message: memoryview, hello: bytes, key: bytes | None, random: bytes) -> Keys:
    """The keys, from the welcome to `hello`, which was written with `key` and `random`.

    Raises FrameError when it is not genuine.
    """
    if message.nbytes != _WELCOME.size + _PROOF_BYTES:
        raise FrameError("not a welcome: another length")
    magic, public = _WELCOME.unpack_from(message)
    if magic != _WELCOME_MAGIC:
        raise FrameError("not a welcome of this version")
    body = bytes(message[: _WELCOME.size])
    keys, secret = _agree(key, random, public, hello + body)
    if not hmac.compare_digest(bytes(message[_WELCOME.size :]), _proof(secret, b"welcome", body)):
        raise FrameError("the welcome's proof does not hold: another key")
    return keys if read_hello(memoryview(hello)).sealed else Keys(None, None)


def _public(key: bytes | None, random: bytes) -> bytes:
    if len(random) != RANDOM_BYTES:
        raise ValueError(f"an ephemeral key takes {RANDOM_BYTES} random bytes, not {len(random)}")
    return (
        bytes(RANDOM_BYTES)
        if key is None
        else X25519PrivateKey.from_private_bytes(random).public_key().public_bytes_raw()
    )


def _agree(key: bytes | None, random: bytes, theirs: bytes, transcript: bytes) -> tuple[Keys, bytes | None]:
    """The sealing keys, and the one that proves the welcome."""
    if key is None:
        if theirs != bytes(RANDOM_BYTES):
            raise FrameError("an unsealed handshake with a key in it")
        return Keys(None, None), None
    try:
        shared = X25519PrivateKey.from_private_bytes(random).exchange(X25519PublicKey.from_public_bytes(theirs))
    except ValueError:
        raise FrameError("an ephemeral key that no honest end draws") from None
    info = b"isthmus channel v2 " + hashlib.sha256(transcript).digest()
    made = HKDF(algorithm=SHA256(), length=3 * KEY_BYTES, salt=key, info=info).derive(shared)
    return Keys(made[:KEY_BYTES], made[KEY_BYTES : 2 * KEY_BYTES]), made[2 * KEY_BYTES :]


def _proof(secret: bytes | None, what: bytes, message: bytes) -> bytes:
    """Of who has `secret`, about `message`; zeros without one."""
    if secret is None:
        return bytes(_PROOF_BYTES)
    return hmac.digest(secret, b"isthmus " + what + b" v2 " + message, hashlib.sha256)[:_PROOF_BYTES]
