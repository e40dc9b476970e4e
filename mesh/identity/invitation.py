"""How a site joins: an invitation is carried over by hand, an enrolment travels to the authority's site and back.

The invitation is a text of one line with the authority's certificate in it, so the joiner knows from the start whom to
believe and can open TLS at once. Its secret never travels: the request carries a MAC under it over the joiner's own
certificate request, so whoever reads or relays one can do nothing with it. The private key stays where it was made.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass

from mesh.gossip.config import valid_address
from mesh.identity.certificate import MAX_CERTIFICATE_BYTES, MAX_REQUEST_BYTES, NAME, Anchor
from mesh.identity.document import MAX_DOCUMENT_BYTES
from mesh.identity.errors import Damaged
from mesh.identity.packing import blob, from_text, listing, moment, pack, to_text, unpack

PREFIX = "isthmus1."
ID_BYTES = 8
SECRET_BYTES = 32
MAX_ADDRESSES = 4
MAX_INVITATION_BYTES = 2048
MAX_ENROLMENT_BYTES = 2048
MAX_GRANT_BYTES = MAX_DOCUMENT_BYTES + 4096
_WHAT = "invitation"


@dataclass(frozen=True)
class Invitation:
    """What a joiner is handed. `issuer` is the site to call, `site` the only name it is good for ("": any free one)."""

    anchor: Anchor
    issuer: str
    addresses: tuple[str, ...]
    id: bytes
    secret: bytes
    expires_s: int
    site: str = ""

    def __repr__(self) -> str:
        return f"Invitation({self.anchor.cluster}, {self.id.hex()})"  # without the secret: this ends up in logs

    @property
    def text(self) -> str:
        """One line to carry over."""
        fields = [self.anchor.der, self.issuer, list(self.addresses), self.id, self.secret, self.expires_s, self.site]
        return to_text(PREFIX, pack(fields))

    @classmethod
    def parse(cls, text: str) -> Invitation:
        """The inverse of `text`. Raises Damaged."""
        der, issuer, addresses, identifier, secret, expires_s, site = unpack(
            from_text(PREFIX, text, _WHAT, MAX_INVITATION_BYTES), 7, _WHAT, MAX_INVITATION_BYTES
        )
        places = listing(addresses, _WHAT, MAX_ADDRESSES)
        if not places or not all(valid_address(place) for place in places):
            raise Damaged(f"{_WHAT}: its addresses are not HOST:PORT")
        if type(issuer) is not str or type(site) is not str or not NAME.fullmatch(issuer):
            raise Damaged(f"{_WHAT}: a name in it is not readable")
        if site and not NAME.fullmatch(site):
            raise Damaged(f"{_WHAT}: a name in it is not readable")
        return cls(
            Anchor(blob(der, _WHAT, 1, MAX_CERTIFICATE_BYTES)),
            issuer,
            tuple(places),
            blob(identifier, _WHAT, ID_BYTES),
            blob(secret, _WHAT, SECRET_BYTES),
            moment(expires_s, _WHAT),
            site,
        )

    def request(self, csr: bytes) -> bytes:
        """What the joiner sends: which invitation, the certificate request, and the MAC that binds them."""
        return pack([self.id, csr, request_mac(secret_hash(self.secret), self.anchor.cluster_id, self.id, csr)])


def secret_hash(secret: bytes) -> bytes:
    """What the authority keeps of an invitation's secret."""
    return hmac.digest(b"isthmus invitation", secret, "sha256")


def request_mac(hashed: bytes, cluster_id: bytes, identifier: bytes, csr: bytes) -> bytes:
    """32 bytes that only the holder of the secret can make for this certificate request."""
    return hmac.digest(hashed, b"isthmus enrolment 1\0" + cluster_id + identifier + csr, "sha256")


def read_request(data: bytes) -> tuple[bytes, bytes, bytes]:
    """Id, certificate request and MAC of an enrolment. Raises Damaged."""
    identifier, csr, mac = unpack(data, 3, "enrolment", MAX_ENROLMENT_BYTES)
    return (
        blob(identifier, "enrolment", ID_BYTES),
        blob(csr, "enrolment", 1, MAX_REQUEST_BYTES),
        blob(mac, "enrolment", 32),
    )


def write_grant(certificate: bytes, handover: bytes) -> bytes:
    """The answer to an enrolment: the site's certificate, and what `SiteIdentity.take` reads."""
    return pack([certificate, handover])


def read_grant(data: bytes) -> tuple[bytes, bytes]:
    """The inverse of `write_grant`. Raises Damaged."""
    certificate, handover = unpack(data, 2, "grant", MAX_GRANT_BYTES)
    return blob(certificate, "grant", 1, MAX_CERTIFICATE_BYTES), blob(handover, "grant", 1, MAX_GRANT_BYTES)
