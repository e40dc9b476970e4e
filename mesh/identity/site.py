"""A site's own identity: what lies in `DATA_DIR/identity`, and everything that is made of it.

key.pem           the private key, mode 0600; never leaves
certificate.pem   signed by the authority
authority.pem     the authority's certificate: the one thing this site trusts
document          the newest cluster document
ring              the gossip keys, mode 0600
directory         certificates of others, so that a restart needs no greetings
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mesh.errors import ConfigError
from mesh.identity.certificate import Anchor, SiteCertificate, check_site, from_pem, make_csr
from mesh.identity.directory import Directory
from mesh.identity.document import MAX_DOCUMENT_BYTES, ClusterDocument
from mesh.identity.errors import Damaged, KeyRevoked
from mesh.identity.invitation import Invitation, read_grant
from mesh.identity.keys import (
    Entropy,
    PrivateKey,
    key_pem,
    load_key,
    new_key,
    open_sealed,
    private_folder,
    read_file,
    save_key,
    seal_to,
    write_private,
)
from mesh.identity.packing import blob, pack, unpack
from mesh.identity.prover import SiteProver
from mesh.identity.ring import MAX_RING_BYTES, KeyRing
from mesh.identity.seal import SiteSealer
from mesh.identity.tokens import Assertions, Principal, verify_token

FOLDER = "identity"
#: A handover is a document and a sealed ring.
MAX_HANDOVER_BYTES = MAX_DOCUMENT_BYTES + MAX_RING_BYTES + 512
_RING_CONTEXT = "ring"
#: The key of a site whose enrolment is under way: a lost answer can be asked for again with the same key.
_PENDING = "pending-key.pem"


class SiteIdentity:
    """The identity of a running site. One thread at a time.

    `wall` gives seconds since 1970; it is injected, as is `entropy`.
    """

    def __init__(
        self,
        *,
        folder: Path,
        key: PrivateKey,
        anchor: Anchor,
        certificate: SiteCertificate,
        document: ClusterDocument,
        document_bytes: bytes,
        ring: KeyRing,
        entropy: Entropy = os.urandom,
    ) -> None:
        """Made by `load`, `Authority.create_cluster` or `Joining.finish`."""
        if certificate.public_key.public_numbers() != key.public_key().public_numbers():
            raise ConfigError(f"{folder}: the certificate is not of the private key; restore both from one backup")
        self.folder = folder
        self.key = key
        self.anchor = anchor
        self.certificate = certificate
        self.document = document
        self.document_bytes = document_bytes
        self.ring = ring
        self.entropy = entropy
        self.directory = Directory(anchor, own=certificate)
        self.directory.set_revoked(document.revoked)
        self.assertions = Assertions(key, certificate, anchor, entropy=entropy, is_revoked=self.directory.is_revoked)

    # ---------------------------------------------------------------- files

    @staticmethod
    def exists(data_dir: Path) -> bool:
        """Whether a data directory holds an identity; for `config.load(has_identity=...)`."""
        return (data_dir / FOLDER / "certificate.pem").is_file()

    @classmethod
    def load(cls, data_dir: Path, now: float, entropy: Entropy = os.urandom) -> SiteIdentity:
        """Read an identity. Raises ConfigError, or IdentityError where a file is not what the authority signed."""
        folder = data_dir / FOLDER
        anchor = Anchor(from_pem(read_file(folder / "authority.pem")))
        certificate = anchor.check(from_pem(read_file(folder / "certificate.pem")), now)
        document_bytes = read_file(folder / "document")
        document = ClusterDocument.check(document_bytes, anchor)
        ring = KeyRing.check(read_file(folder / "ring"), anchor.cluster_id, None)
        identity = cls(
            folder=folder,
            key=load_key(folder / "key.pem"),
            anchor=anchor,
            certificate=certificate,
            document=document,
            document_bytes=document_bytes,
            ring=ring,
            entropy=entropy,
        )
        try:
            identity.directory.load(read_file(folder / "directory"), now)
        except (ConfigError, Damaged):
            pass  # missing or damaged: it is filled again by greetings
        return identity

    def save(self) -> None:
        """Write everything that is not there yet or may have changed. Raises ConfigError."""
        private_folder(self.folder)
        save_key(self.folder / "key.pem", self.key)
        write_private(self.folder / "authority.pem", self.anchor.pem)
        self._save_ring()
        write_private(self.folder / "document", self.document_bytes)
        write_private(self.folder / "certificate.pem", self.certificate.pem)  # last: `exists` looks for it

    def save_directory(self) -> None:
        """Remember others' certificates; call at the end, and now and then. Raises ConfigError."""
        write_private(self.folder / "directory", self.directory.to_bytes())

    def _save_ring(self) -> None:
        write_private(self.folder / "ring", self.ring.to_bytes())

    # ---------------------------------------------------------------- who we are

    @property
    def site(self) -> str:
        """Our own name."""
        return self.certificate.site

    @property
    def cluster(self) -> str:
        """What gossip is to be told as its cluster."""
        return self.anchor.cluster

    @property
    def key_pem(self) -> bytes:
        """Our private key for TLS. Keep it in memory."""
        return key_pem(self.key)

    def entry(self) -> dict[str, Any]:
        """What to publish under "identity": our certificate, and the version of the ring that we hold."""
        return {"certificate": self.certificate.der, "ring": self.ring.version}

    def csr(self) -> bytes:
        """A request for a new certificate of the same key; see `SiteCertificate.wants_renewal`, `Authority.renew`."""
        return make_csr(self.key, self.site)

    def renewed(self, der: bytes, now: float) -> None:
        """Take a new certificate of the same key, and keep it. Raises IdentityError, ConfigError."""
        certificate = self.anchor.check(der, now)
        if certificate.fingerprint != self.certificate.fingerprint or certificate.site != self.site:
            raise Damaged("renewed certificate: of another key or site")
        self.certificate = certificate
        self.directory.own = certificate
        self.assertions = Assertions(
            self.key, certificate, self.anchor, entropy=self.entropy, is_revoked=self.directory.is_revoked
        )
        write_private(self.folder / "certificate.pem", certificate.pem)

    # ---------------------------------------------------------------- for gossip

    def sealer(self, wall: Callable[[], float]) -> SiteSealer:
        """What seals datagrams; one for the life of a daemon. `wall` gives seconds since 1970."""
        return SiteSealer(self, wall=wall)

    def prover(self, wall: Callable[[], float]) -> SiteProver:
        """What signs entries and claims, and checks those of others."""
        return SiteProver(self, wall=wall)

    # ---------------------------------------------------------------- who calls

    def verify_token(self, text: str, now: float) -> Principal:
        """Who holds an API token. Raises IdentityError."""
        return verify_token(text, now, self.anchor, self.document.revoked_tokens)

    def assertion(self, audience: bytes, now: float) -> bytes:
        """Our word for a call to the site whose key has this fingerprint (`directory.site(name).fingerprint`)."""
        return self.assertions.make(audience, now)

    def verify_assertion(self, data: bytes, now: float) -> Principal:
        """Which site calls us; its certificate is known from then on. Raises IdentityError."""
        principal, der = self.assertions.verify(data, now)
        self.directory.learn(der, now)
        return principal

    # ---------------------------------------------------------------- what the authority says

    @property
    def document_entry(self) -> tuple[str, dict[str, Any], int, bytes]:
        """Key, value, version and proof for `publish_cluster`: any site that holds the document can spread it."""
        return "document", {"document": self.document_bytes}, self.document.version, self.document.signature

    def take_document(self, data: bytes) -> bool:
        """Take a cluster document. True if it is newer than ours; it is kept at once. Raises Damaged, ConfigError."""
        document = ClusterDocument.check(data, self.anchor)
        if document.version <= self.document.version:
            return False
        write_private(self.folder / "document", data)
        self.document, self.document_bytes = document, data
        self.directory.set_revoked(document.revoked)
        return True

    @property
    def revoked(self) -> bool:
        """Whether the cluster has put this very site out."""
        return self.directory.is_revoked(self.certificate.fingerprint)

    @property
    def wants_ring(self) -> bool:
        """Whether the document announces a ring that we do not hold yet: ask a peer for a handover."""
        return self.document.ring_version > self.ring.version

    def handover(self, certificate_der: bytes, now: float) -> bytes:
        """Our document and ring for another site, the ring readable with that site's key only.

        Raises IdentityError: a site that was put out gets nothing, nor does one of another cluster.
        """
        certificate = self.anchor.check(certificate_der, now)
        if self.directory.is_revoked(certificate.fingerprint):
            raise KeyRevoked(f"ring: {certificate.site} was put out of the cluster")
        if self.wants_ring:
            raise Damaged("ring: this site waits for the new one itself; ask another")
        return make_handover(self.document_bytes, self.ring, certificate, self.entropy)

    def take(self, handover: bytes, now: float) -> bool:
        """Take what `handover` made for us. True if the ring is newer than ours. Raises Damaged, ConfigError."""
        document_bytes, document, ring = read_handover(handover, self.key, self.anchor)
        if document.version < self.document.version:
            return False
        self.take_document(document_bytes)
        if ring.version <= self.ring.version:
            return False
        self.ring = self.ring.replaced_by(ring, now)
        self._save_ring()
        return True

    def turn_ring(self, now: float, announced: Iterable[int] | None = None) -> bool:
        """Call every second or so: switches to the new key and drops the old one in time. True if it changed.

        `announced` are the "ring" numbers in the "identity" entries of all live members.
        """
        if not self.ring.progress(now, announced):
            return False
        self._save_ring()
        return True


def make_handover(document_bytes: bytes, ring: KeyRing, receiver: SiteCertificate, entropy: Entropy) -> bytes:
    """Document and ring, the ring sealed to the receiver's key."""
    return pack([document_bytes, seal_to(receiver.public_key, _RING_CONTEXT, ring.to_bytes(), entropy)])


def read_handover(data: bytes, key: PrivateKey, anchor: Anchor) -> tuple[bytes, ClusterDocument, KeyRing]:
    """The inverse. The ring is held to what the document announces. Raises Damaged."""
    document_bytes, sealed = unpack(data, 2, "handover", MAX_HANDOVER_BYTES)
    document = ClusterDocument.check(blob(document_bytes, "handover", 1, MAX_DOCUMENT_BYTES), anchor)
    ring = open_sealed(key, _RING_CONTEXT, blob(sealed, "handover", 1, MAX_RING_BYTES + 128))
    return document_bytes, document, KeyRing.check(ring, anchor.cluster_id, document)


class Joining:
    """A site on its way in: send `request` to `invitation.addresses`, give the answer to `finish`."""

    def __init__(self, data_dir: Path, invitation: Invitation, site: str) -> None:
        """Raises ConfigError where the data directory has an identity already, or the name cannot be used."""
        if SiteIdentity.exists(data_dir):
            raise ConfigError(f"{data_dir}: has an identity already; leave --invite out, or give another --data-dir")
        if invitation.site and invitation.site != site:
            raise ConfigError(
                f"site {site!r}: the invitation is for {invitation.site!r}; give --site {invitation.site}"
            )
        self.invitation = invitation
        self.site = check_site(site)
        self._folder = data_dir / FOLDER
        private_folder(self._folder)
        pending = self._folder / _PENDING
        if pending.exists():
            self._key = load_key(pending)
        else:
            self._key = new_key()
            save_key(pending, self._key)
        #: Bytes for the authority's site. The same key is used when this is tried again.
        self.request = invitation.request(make_csr(self._key, site))

    def finish(self, grant: bytes, now: float, entropy: Entropy = os.urandom) -> SiteIdentity:
        """Check the answer and keep it. Raises IdentityError, ConfigError."""
        der, handover = read_grant(grant)
        certificate = self.invitation.anchor.check(der, now)
        if certificate.site != self.site:
            raise Damaged(f"grant: for {certificate.site!r} and not for {self.site!r}")
        document_bytes, document, ring = read_handover(handover, self._key, self.invitation.anchor)
        identity = SiteIdentity(
            folder=self._folder,
            key=self._key,
            anchor=self.invitation.anchor,
            certificate=certificate,
            document=document,
            document_bytes=document_bytes,
            ring=ring,
            entropy=entropy,
        )
        identity.save()
        (self._folder / _PENDING).unlink(missing_ok=True)
        return identity
