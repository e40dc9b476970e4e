"""What a user of the API is given: one line with the token, and the authority's certificate to know the peers by.

A token proves the user to a peer; the certificate proves the peer to the user, so that the token is never shown to
somebody else. Both are needed for every call, so they travel together.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass

from mesh.identity.certificate import MAX_CERTIFICATE_BYTES, Anchor
from mesh.identity.errors import Damaged
from mesh.identity.packing import blob, from_text, pack, to_text, unpack

PREFIX = "isthmus-access1."
MAX_ACCESS_BYTES = 4096
#: What stands before the two kinds of proof in a call's `authorization`.
USER, PEER = "Bearer ", "Peer "
_WHAT = "access token"


@dataclass(frozen=True)
class Access:
    """A token (of `mesh.identity.tokens`, or a peer's local one) and the authority's certificate."""

    anchor: Anchor
    token: str

    def __repr__(self) -> str:
        return f"Access({self.anchor.cluster})"  # without the token: this ends up in logs

    @property
    def text(self) -> str:
        """One line to hand out."""
        return to_text(PREFIX, pack([self.anchor.der, self.token]))

    @classmethod
    def parse(cls, text: str) -> Access:
        """The inverse of `text`. Raises Damaged."""
        der, token = unpack(from_text(PREFIX, text, _WHAT, MAX_ACCESS_BYTES), 2, _WHAT, MAX_ACCESS_BYTES)
        if type(token) is not str or not token.isascii() or not token.isprintable():
            raise Damaged(f"{_WHAT}: the token in it is not readable")
        return cls(Anchor(blob(der, _WHAT, 1, MAX_CERTIFICATE_BYTES)), token)

    @property
    def proof(self) -> str:
        """The `authorization` of a call."""
        return USER + self.token


def peer_proof(assertion: bytes) -> str:
    """The `authorization` of a peer's call."""
    return PEER + base64.b64encode(assertion).decode()


def read_peer_proof(proof: str) -> bytes:
    """The assertion in a peer's `authorization`. Raises Damaged."""
    try:
        return base64.b64decode(proof.removeprefix(PEER), validate=True)
    except ValueError:
        raise Damaged("peer assertion: not base64") from None
