"""Signatures of entries and claims: `mesh.gossip.proof.Prover` with the identity of a site.

Third parties must be able to check what a site said that they never talked to. So every site publishes its certificate
under "identity" (see `SiteIdentity.entry`); such an entry proves itself, because the certificate in it is signed by the
authority and the entry by the certificate's key.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import msgpack

from mesh.errors import IdentityError
from mesh.gossip.proof import CLUSTER, IDENTITY
from mesh.identity.document import ENTRY, MAX_DOCUMENT_BYTES, ClusterDocument
from mesh.identity.keys import sign, verified

if TYPE_CHECKING:
    from mesh.identity.site import SiteIdentity

#: Proofs remembered as good: five per member of a mesh of 1,600.
MAX_REMEMBERED = 8192
#: An entry is at most a value of 32 KiB and its names.
MAX_MESSAGE_BYTES = 40_000
_CONTEXT = "proof 1"


class SiteProver:
    """Signs as one site, and verifies by the certificates that it knows."""

    def __init__(self, identity: SiteIdentity, *, wall: Callable[[], float]) -> None:
        """`wall` gives seconds since 1970."""
        self._identity = identity
        self._directory = identity.directory
        self._wall = wall
        self._good: OrderedDict[bytes, None] = OrderedDict()

    def sign(self, message: bytes) -> bytes:
        """64 bytes."""
        return sign(self._identity.key, _CONTEXT, message)

    def verify(self, site: str, message: bytes, proof: bytes) -> bool:
        """Whether `site` signed `message`. False also while its certificate is not known."""
        if len(message) > MAX_MESSAGE_BYTES:
            return False
        if site == CLUSTER:
            return self._is_document(message, proof)
        certificate = self._directory.site(site)
        if certificate is None or not self._holds(certificate.fingerprint, site, message, proof):
            fresh = self._in_entry(site, message)
            if fresh is None:
                return False
            return self.admit(site, fresh) and self._verify_known(site, message, proof)
        return True

    def knows(self, site: str) -> bool:
        """Whether the certificate of `site` is known."""
        return site == CLUSTER or self._directory.site(site) is not None

    def admit(self, site: str, der: bytes) -> bool:
        """Learn the certificate of `site`. False where it is not that site's, not valid, or revoked."""
        try:
            certificate = self._directory.learn(der, self._wall())
        except IdentityError:
            return False
        return certificate.site == site

    def _verify_known(self, site: str, message: bytes, proof: bytes) -> bool:
        certificate = self._directory.site(site)
        return certificate is not None and self._holds(certificate.fingerprint, site, message, proof)

    def _holds(self, mark: bytes, site: str, message: bytes, proof: bytes) -> bool:
        digest = sha256(mark + len(proof).to_bytes(4) + proof + message).digest()
        if digest in self._good:
            self._good.move_to_end(digest)
            return True
        certificate = self._directory.site(site)
        if certificate is None or not verified(certificate.public_key, _CONTEXT, message, proof):
            return False
        self._good[digest] = None
        if len(self._good) > MAX_REMEMBERED:
            self._good.popitem(last=False)
        return True

    def _is_document(self, message: bytes, proof: bytes) -> bool:
        """The only entry of "@cluster" is the document, which carries its own signature; the proof repeats that."""
        fields = _entry(message)
        if fields is None or fields[1:5] != [self._identity.cluster, CLUSTER, 1, ENTRY]:
            return False
        data = _value(fields[6]).get("document")
        if type(data) is not bytes or len(data) > MAX_DOCUMENT_BYTES:
            return False
        try:
            document = ClusterDocument.check(data, self._identity.anchor)
        except IdentityError:
            return False
        return document.version == fields[5] and document.signature == proof

    def _in_entry(self, site: str, message: bytes) -> bytes | None:
        """The certificate in `site`'s own "identity" entry, if that is what the message is."""
        fields = _entry(message)
        if fields is None or fields[2] != site or fields[4] != IDENTITY:
            return None
        der = _value(fields[6]).get("certificate")
        return der if type(der) is bytes else None


def _entry(message: bytes) -> list[Any] | None:
    """The seven fields of `mesh.gossip.proof.entry_message`, or None."""
    try:
        fields = msgpack.unpackb(message, raw=False, max_array_len=16, max_map_len=0, max_ext_len=0)
    except Exception:  # msgpack raises half a dozen unrelated classes; for us they all mean the same
        return None
    if type(fields) is not list or len(fields) != 7 or fields[0] != "isthmus entry" or type(fields[6]) is not bytes:
        return None
    return fields


def _value(data: bytes) -> dict[Any, Any]:
    try:
        value = msgpack.unpackb(data, raw=False, max_array_len=16, max_map_len=16, max_ext_len=0)
    except Exception:  # as above
        return {}
    return value if type(value) is dict else {}
