"""P-256 keys: making, keeping, signing, agreeing. P-256 because gRPC's TLS takes no Ed25519 certificates.

A key's fingerprint is SHA-256 over its SubjectPublicKeyInfo: a certificate can be encoded again so that its own hash
changes (Nebula CVE-2026-25793), a key cannot.
"""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Callable
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from mesh.errors import ConfigError
from mesh.identity.errors import Damaged
from mesh.peer.datadir import write_atomically

PrivateKey = ec.EllipticCurvePrivateKey
PublicKey = ec.EllipticCurvePublicKey
#: Gives so many unpredictable bytes: os.urandom, or a test's own.
Entropy = Callable[[int], bytes]

FINGERPRINT_BYTES = 32
SIGNATURE_BYTES = 64
POINT_BYTES = 65
#: A key file is 241 bytes; nothing larger is read.
MAX_FILE_BYTES = 1 << 20
_ECDSA = ec.ECDSA(hashes.SHA256())
#: The order of the group of P-256 (SEC 2, 2.4.2).
_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


def new_key() -> PrivateKey:
    """A fresh private key."""
    return ec.generate_private_key(ec.SECP256R1())


def fingerprint(key: PublicKey) -> bytes:
    """32 bytes that name a public key, whatever certificate it stands in."""
    return hashlib.sha256(
        key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    ).digest()


def public_point(key: PublicKey) -> bytes:
    """65 bytes: the uncompressed point."""
    return key.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)


def from_point(point: bytes) -> PublicKey:
    """The inverse of `public_point`. Raises Damaged where the point is not on the curve."""
    try:
        return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), point)
    except ValueError:
        raise Damaged("public key: not a point of P-256") from None


def sign(key: PrivateKey, context: str, message: bytes) -> bytes:
    """64 bytes, r and s. `context` keeps a signature for one use from serving another."""
    r, s = decode_dss_signature(key.sign(_in_context(context, message), _ECDSA))
    return r.to_bytes(32) + s.to_bytes(32)


def verified(key: PublicKey, context: str, message: bytes, signature: bytes) -> bool:
    """Whether `signature` is of `message` in `context` by `key`. Never raises."""
    if len(signature) != SIGNATURE_BYTES:
        return False
    r, s = int.from_bytes(signature[:32]), int.from_bytes(signature[32:])
    if not (0 < r < _ORDER and 0 < s < _ORDER):
        return False
    try:
        key.verify(encode_dss_signature(r, s), _in_context(context, message), _ECDSA)
    except InvalidSignature:
        return False
    return True


def _in_context(context: str, message: bytes) -> bytes:
    """Begins unlike DER (0x30), so that no signature here can pass for one of a certificate or the reverse."""
    return b"isthmus " + context.encode() + b"\0" + message


def agree(key: PrivateKey, other: PublicKey) -> bytes:
    """The 32 bytes that only the holders of these two keys can compute (ECDH)."""
    return key.exchange(ec.ECDH(), other)


def derive(secret: bytes, salt: bytes, info: bytes, size: int = 32) -> bytes:
    """A key made of a secret (HKDF-SHA256, RFC 5869)."""
    return HKDF(hashes.SHA256(), size, salt, info).derive(secret)


def seal_to(receiver: PublicKey, context: str, data: bytes, entropy: Entropy) -> bytes:
    """Encrypt so that only the holder of `receiver`'s private key can read: ECDH with a key made for this one message.

    It does not say who sealed.
    """
    ephemeral = new_key()
    point = public_point(ephemeral.public_key())
    nonce = entropy(12)
    key = _sealing_key(agree(ephemeral, receiver), point, receiver, context)
    return point + nonce + AESGCM(key).encrypt(nonce, data, None)


def open_sealed(key: PrivateKey, context: str, data: bytes) -> bytes:
    """The inverse of `seal_to`. Raises Damaged."""
    if len(data) < POINT_BYTES + 12 + 16:
        raise Damaged(f"{context}: too short")
    point, nonce, rest = data[:POINT_BYTES], data[POINT_BYTES : POINT_BYTES + 12], data[POINT_BYTES + 12 :]
    try:
        secret = agree(key, from_point(point))
        return AESGCM(_sealing_key(secret, point, key.public_key(), context)).decrypt(nonce, rest, None)
    except Damaged:
        raise
    except Exception:  # InvalidTag, or a point of low order
        raise Damaged(f"{context}: not sealed to this site's key, or changed on the way") from None


def _sealing_key(secret: bytes, point: bytes, receiver: PublicKey, context: str) -> bytes:
    return derive(secret, point, b"isthmus seal " + context.encode() + b"\0" + fingerprint(receiver))


def private_folder(path: Path) -> None:
    """Make a folder that only its owner can enter. Raises ConfigError."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.chmod(0o700)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be made private ({error.strerror}); give another data directory") from None


def write_private(path: Path, content: bytes) -> None:
    """Replace a file as a whole; only its owner can read it, at no moment anybody else. Raises ConfigError."""
    try:
        write_atomically(path, content, mode=0o600)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); check the data directory") from None


def read_file(path: Path) -> bytes:
    """A small file. Raises ConfigError where it is missing, unreadable or too large."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check the data directory") from None
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: is not a file of an identity; check the data directory")
    return content


def save_key(path: Path, key: PrivateKey) -> None:
    """Write a private key, mode 0600. Raises ConfigError."""
    write_private(path, key_pem(key))


def key_pem(key: PrivateKey) -> bytes:
    """A private key as PKCS #8 in PEM, for its file and for TLS."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def load_key(path: Path) -> PrivateKey:
    """Read a private key. Raises ConfigError, also where others than its owner can read the file."""
    content = read_file(path)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise ConfigError(
            f"{path}: private key with mode {mode:04o}; others may have read it: chmod 600, or replace it"
        )
    try:
        key = serialization.load_pem_private_key(content, None)
    except (ValueError, TypeError):
        raise ConfigError(f"{path}: not a private key; restore it from a backup") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ConfigError(f"{path}: not a P-256 key; restore it from a backup")
    return key
