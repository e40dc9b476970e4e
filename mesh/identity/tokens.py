"""Who calls: API tokens for users, assertions for peers. Both end in a `Principal`.

A token is signed by the authority and good at every site until it expires or the cluster document withdraws it. An
assertion is made by a site for one other site and for five minutes; it goes with every gRPC call inside TLS, which
proves the callee but, under grpcio's optional client certificates, not the caller.
"""

from __future__ import annotations

import hmac
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from hashlib import sha256

from mesh.errors import ConfigError, NotAllowed
from mesh.identity.certificate import MAX_CERTIFICATE_BYTES, NAME, Anchor, SiteCertificate
from mesh.identity.document import TOKEN_ID_BYTES
from mesh.identity.errors import Damaged, Expired, ForeignCluster, KeyRevoked, NotYetValid, TokenRevoked
from mesh.identity.keys import FINGERPRINT_BYTES, SIGNATURE_BYTES, Entropy, PrivateKey, sign, verified
from mesh.identity.packing import blob, from_text, moment, pack, to_text, unpack

PREFIX = "isthmus-api1."
#: Each may do what those before it may.
ROLES = ("observe", "submit", "administer")
#: Kerberos' bound on the difference of two clocks (RFC 4120, 7.5.8).
SKEW_S = 300
ASSERTION_S = 300
MAX_TOKEN_BYTES = 512
MAX_ASSERTION_BYTES = 1400
NONCE_BYTES = 16
#: Assertions remembered as good, so that the calls of five minutes cost two signatures less each.
MAX_REMEMBERED = 4096
_TOKEN_CONTEXT = "api token 1"
_ASSERTION_CONTEXT = "peer assertion 1"


@dataclass(frozen=True)
class Principal:
    """Who calls. A user has a token and a role; a peer is a site and may do what peers do for each other.

    `name` is the user's or the site's; `id` is the token's id or the fingerprint of the site's key.
    """

    kind: str
    name: str
    role: str
    id: bytes
    expires_s: int

    def require(self, role: str) -> None:
        """Raises NotAllowed where this role does not reach as far as `role`."""
        if ROLES.index(self.role) < ROLES.index(role):
            raise NotAllowed(f"{self.name} has the role {self.role!r}; this needs {role!r}")


def make_token(
    key: PrivateKey, anchor: Anchor, name: str, role: str, *, expires_s: int, entropy: Entropy
) -> tuple[str, bytes]:
    """A token as text, and its id, by which it can be withdrawn. Raises ConfigError."""
    if not NAME.fullmatch(name):
        raise ConfigError(f"token name {name!r}: write up to 63 letters, digits, '.', '_' or '-'")
    if role not in ROLES:
        raise ConfigError(f"role {role!r}: write one of {', '.join(ROLES)}")
    identifier = entropy(TOKEN_ID_BYTES)
    body = pack([anchor.cluster_id, identifier, name, role, expires_s])
    return to_text(PREFIX, pack([body, sign(key, _TOKEN_CONTEXT, body)])), identifier


def verify_token(text: str, now: float, anchor: Anchor, revoked: Collection[bytes] = ()) -> Principal:
    """Who holds this token. Raises Damaged, ForeignCluster, Expired or TokenRevoked."""
    what = "API token"
    body, signature = unpack(from_text(PREFIX, text, what, MAX_TOKEN_BYTES), 2, what, MAX_TOKEN_BYTES)
    blob(body, what, 1, MAX_TOKEN_BYTES)
    cluster_id, identifier, name, role, expires_s = unpack(body, 5, what, MAX_TOKEN_BYTES)
    if cluster_id != anchor.cluster_id:
        raise ForeignCluster(f"{what}: of another cluster")
    if not verified(anchor.public_key, _TOKEN_CONTEXT, body, blob(signature, what, SIGNATURE_BYTES)):
        raise Damaged(f"{what}: not signed by this cluster's authority")
    blob(identifier, what, TOKEN_ID_BYTES)
    if type(name) is not str or not NAME.fullmatch(name) or role not in ROLES:
        raise Damaged(f"{what}: its name or role is not readable")
    if now > moment(expires_s, what):
        raise Expired(f"{what} of {name}: expired; ask for another with: mesh token create")
    if any(hmac.compare_digest(identifier, gone) for gone in revoked):
        raise TokenRevoked(f"{what} of {name}: withdrawn; ask for another with: mesh token create")
    return Principal("user", name, role, identifier, expires_s)


class Assertions:
    """Makes a site's own assertions, and checks those of others. Both remember, within bounds."""

    def __init__(
        self,
        key: PrivateKey,
        certificate: SiteCertificate,
        anchor: Anchor,
        *,
        entropy: Entropy,
        is_revoked: Callable[[bytes], bool],
    ) -> None:
        """`is_revoked` tells of a fingerprint whether the cluster has put the key out; it is asked every time."""
        self._key = key
        self._certificate = certificate
        self._anchor = anchor
        self._entropy = entropy
        self._is_revoked = is_revoked
        self._made: OrderedDict[bytes, tuple[float, bytes]] = OrderedDict()
        self._known: OrderedDict[bytes, tuple[SiteCertificate, int]] = OrderedDict()

    def make(self, audience: bytes, now: float) -> bytes:
        """For a call to the site whose key has the fingerprint `audience`. The same one serves for two minutes."""
        held = self._made.get(audience)
        if held is not None and 0 <= now - held[0] < ASSERTION_S * 0.4:
            return held[1]
        nonce, issued_s = self._entropy(NONCE_BYTES), int(now)
        message = _assertion_message(self._anchor, self._certificate.fingerprint, audience, issued_s, nonce)
        signature = sign(self._key, _ASSERTION_CONTEXT, message)
        made = pack([self._certificate.der, audience, issued_s, nonce, signature])
        self._made[audience] = (now, made)
        while len(self._made) > MAX_REMEMBERED:
            self._made.popitem(last=False)
        return made

    def verify(self, data: bytes, now: float) -> tuple[Principal, bytes]:
        """Who made an assertion for us, and its certificate (DER).

        Raises Damaged, ForeignCluster, NotYetValid, Expired or KeyRevoked.
        """
        what = "peer assertion"
        if type(data) is not bytes or len(data) > MAX_ASSERTION_BYTES:
            raise Damaged(f"{what}: wrong size")
        digest = sha256(data).digest()
        known = self._known.get(digest)
        certificate, issued_s = self._check(data, what) if known is None else known
        certificate.check_time(now)
        if self._is_revoked(certificate.fingerprint):
            raise KeyRevoked(f"{what}: {certificate.site} was put out of the cluster")
        if issued_s - now > SKEW_S:
            raise NotYetValid(f"{what}: the clock of {certificate.site} is {issued_s - now:.0f} s ahead of ours")
        if now - issued_s > ASSERTION_S + SKEW_S:
            raise Expired(f"{what}: of {certificate.site}, {now - issued_s:.0f} s old, or its clock is behind")
        if known is None:
            self._known[digest] = (certificate, issued_s)
            while len(self._known) > MAX_REMEMBERED:
                self._known.popitem(last=False)
        principal = Principal("peer", certificate.site, "administer", certificate.fingerprint, issued_s + ASSERTION_S)
        return principal, certificate.der

    def _check(self, data: bytes, what: str) -> tuple[SiteCertificate, int]:
        der, audience, issued_s, nonce, signature = unpack(data, 5, what, MAX_ASSERTION_BYTES)
        certificate = self._anchor.check(blob(der, what, 1, MAX_CERTIFICATE_BYTES), None)
        if not hmac.compare_digest(blob(audience, what, FINGERPRINT_BYTES), self._certificate.fingerprint):
            raise Damaged(f"{what}: made for another site")
        moment(issued_s, what)
        message = _assertion_message(
            self._anchor, certificate.fingerprint, audience, issued_s, blob(nonce, what, NONCE_BYTES)
        )
        if not verified(certificate.public_key, _ASSERTION_CONTEXT, message, blob(signature, what, SIGNATURE_BYTES)):
            raise Damaged(f"{what}: {certificate.site} did not sign it")
        return certificate, issued_s


def _assertion_message(anchor: Anchor, maker: bytes, audience: bytes, issued_s: int, nonce: bytes) -> bytes:
    return pack([anchor.cluster_id, maker, audience, issued_s, nonce])
