"""Whose certificates this site knows, and whose keys the cluster has put out.

A name belongs to one key at a time. The authority gives a name to another key only after it revoked the first, and
dates the new certificate later, so of two the later one counts wherever they arrive first.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from mesh.errors import IdentityError
from mesh.identity.certificate import MAX_CERTIFICATE_BYTES, Anchor, SiteCertificate
from mesh.identity.errors import Damaged, KeyRevoked, NameTaken
from mesh.identity.packing import blob, listing, pack, unpack

#: More than the largest mesh; one takes about 2 KB.
MAX_CERTIFICATES = 8192
MAX_DIRECTORY_BYTES = 1 << 20
#: As many as fit `MAX_DIRECTORY_BYTES`.
MAX_SAVED = 1024


class Directory:
    """Certificates by site and by key."""

    def __init__(self, anchor: Anchor, own: SiteCertificate) -> None:
        """`own` is always known."""
        self.anchor = anchor
        self.own = own
        self._by_site: dict[str, SiteCertificate] = {}
        self._by_key_id: dict[bytes, SiteCertificate] = {}
        self._by_der: dict[bytes, SiteCertificate] = {}
        self._revoked: frozenset[bytes] = frozenset()
        self._revoked_ids: frozenset[bytes] = frozenset()

    def __iter__(self) -> Iterator[SiteCertificate]:
        return iter(list(self._by_site.values()))

    def __len__(self) -> int:
        return len(self._by_site)

    def site(self, name: str) -> SiteCertificate | None:
        """The certificate of a site, or None."""
        return self.own if name == self.own.site else self._by_site.get(name)

    def by_key_id(self, key_id: bytes) -> SiteCertificate | None:
        """The certificate whose key datagrams call by these 8 bytes, or None."""
        return self._by_key_id.get(key_id)

    def is_revoked(self, fingerprint: bytes) -> bool:
        """Whether the key was put out."""
        return fingerprint in self._revoked

    def is_revoked_id(self, key_id: bytes) -> bool:
        """The same by the 8 bytes in datagrams."""
        return key_id in self._revoked_ids

    def set_revoked(self, fingerprints: Collection[bytes]) -> None:
        """Replace the list of keys that were put out, and forget their certificates."""
        self._revoked = frozenset(fingerprints)
        self._revoked_ids = frozenset(mark[:8] for mark in self._revoked)
        for certificate in self:
            if certificate.fingerprint in self._revoked:
                self._drop(certificate)

    def learn(self, der: bytes, now: float) -> SiteCertificate:
        """Take a certificate, from wherever it came.

        Raises Damaged, ForeignCluster, NotYetValid, Expired, KeyRevoked, or NameTaken where a later certificate gave
        the name to another key.
        """
        held = self._by_der.get(der)
        if held is not None:
            held.check_time(now)
            return held
        certificate = self.anchor.check(der, now)
        if certificate.fingerprint in self._revoked:
            raise KeyRevoked(f"{certificate.site} was put out of the cluster")
        if certificate.fingerprint == self.own.fingerprint:
            return self.own
        if certificate.site == self.own.site:
            raise NameTaken(f"{certificate.site} is this site's own name; the other key must be revoked")
        known = self._by_site.get(certificate.site)
        if known is not None:
            same = known.fingerprint == certificate.fingerprint
            if certificate.not_before_s < known.not_before_s:
                if same:
                    return known
                raise NameTaken(f"{certificate.site} has a later certificate with another key")
            if not same and certificate.not_before_s == known.not_before_s:
                raise NameTaken(f"{certificate.site} has another key")
            self._drop(known)
        if certificate.key_id in self._by_key_id or certificate.key_id == self.own.key_id:
            raise NameTaken(f"{certificate.site}: its key has the same short name as another site's; make a new key")
        while len(self._by_site) >= MAX_CERTIFICATES:
            self._drop(next(iter(self._by_site.values())))
        self._by_site[certificate.site] = self._by_key_id[certificate.key_id] = certificate
        self._by_der[certificate.der] = certificate
        return certificate

    def to_bytes(self) -> bytes:
        """The certificates known, for a file; those learnt last where there are too many."""
        return pack([[certificate.der for certificate in self][-MAX_SAVED:]])

    def load(self, data: bytes, now: float) -> None:
        """Take what `to_bytes` gave; what is not valid any more is left out. Raises Damaged."""
        (certificates,) = unpack(data, 1, "directory", MAX_DIRECTORY_BYTES)
        for der in listing(certificates, "directory", MAX_SAVED):
            blob(der, "directory", 1, MAX_CERTIFICATE_BYTES)
            try:
                self.learn(der, now)
            except Damaged:
                raise
            except IdentityError:
                continue

    def _drop(self, certificate: SiteCertificate) -> None:
        self._by_site.pop(certificate.site, None)
        self._by_key_id.pop(certificate.key_id, None)
        self._by_der.pop(certificate.der, None)
