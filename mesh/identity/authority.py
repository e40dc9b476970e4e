"""The cluster's authority: the folder `DATA_DIR/authority` of the site that made the cluster, and what it can do.

    key.pem            the authority's private key, mode 0600
    register.json      site -> fingerprint of its key, when its certificate begins, whether it is revoked
    ring, document     the newest of each
    tokens.json        API tokens given out, without their text
    invitations/       a file each: ID.open until it is used, ID.used after

Every method reads the files anew and writes under one lock, so the command line may work beside a running daemon.
"""

from __future__ import annotations

import fcntl
import hmac
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mesh.errors import ConfigError, IdentityError
from mesh.gossip.config import valid_address
from mesh.identity import ring as rings
from mesh.identity.certificate import (
    BACKDATED_S,
    CLUSTER_ID_BYTES,
    Anchor,
    check_csr,
    check_site,
    from_pem,
    make_authority_certificate,
    make_csr,
    make_site_certificate,
)
from mesh.identity.document import MAX_REVOKED, MAX_REVOKED_TOKENS, MAX_RING_KEYS, ClusterDocument
from mesh.identity.errors import (
    Damaged,
    InvitationExpired,
    InvitationUnknown,
    InvitationUsed,
    KeyRevoked,
    NameTaken,
)
from mesh.identity.invitation import (
    ID_BYTES,
    MAX_ADDRESSES,
    SECRET_BYTES,
    Invitation,
    read_request,
    request_mac,
    secret_hash,
    write_grant,
)
from mesh.identity.keys import (
    Entropy,
    PrivateKey,
    PublicKey,
    fingerprint,
    load_key,
    new_key,
    private_folder,
    read_file,
    save_key,
    write_private,
)
from mesh.identity.ring import KeyRing, commitment
from mesh.identity.site import FOLDER as IDENTITY
from mesh.identity.site import SiteIdentity, make_handover
from mesh.identity.tokens import make_token

FOLDER = "authority"
INVITATION_S = 3600
MAX_INVITATION_S = 30 * 86400
TOKEN_S = 365 * 86400
MAX_TOKEN_S = 10 * 365 * 86400
#: Used and expired invitations are remembered this long, so that who comes late is told what happened.
REMEMBERED_S = 7 * 86400
MAX_INVITATIONS = 1024


@dataclass(frozen=True)
class Issued:
    """One line of the register."""

    site: str
    fingerprint: bytes
    not_before_s: int
    revoked: bool


class Authority:
    """The authority of a cluster, from its files."""

    def __init__(self, folder: Path, entropy: Entropy = os.urandom) -> None:
        """Made by `load` or `create_cluster`."""
        self.folder = folder
        self._entropy = entropy
        self._key: PrivateKey = load_key(folder / "key.pem")
        self.anchor = Anchor(from_pem(read_file(folder / "authority.pem")))
        if fingerprint(self._key.public_key()) != self.anchor.fingerprint:
            raise ConfigError(f"{folder}: the certificate is not of the private key; restore both from one backup")

    # ---------------------------------------------------------------- making and loading

    @staticmethod
    def exists(data_dir: Path) -> bool:
        """Whether this data directory is the authority's."""
        return (data_dir / FOLDER / "authority.pem").is_file()

    @classmethod
    def load(cls, data_dir: Path, entropy: Entropy = os.urandom) -> Authority:
        """Open the authority of a data directory. Raises ConfigError where there is none."""
        if not cls.exists(data_dir):
            raise ConfigError(f"{data_dir}: the cluster's authority is not here; ask the site that made the cluster")
        return cls(data_dir / FOLDER, entropy)

    @classmethod
    def create_cluster(
        cls, data_dir: Path, cluster: str, site: str, now: float, entropy: Entropy = os.urandom
    ) -> SiteIdentity:
        """Make a cluster: its authority, and the identity of its first site. Raises ConfigError."""
        check_site(site)
        if SiteIdentity.exists(data_dir) or cls.exists(data_dir):
            raise ConfigError(f"{data_dir}: has an identity already; give another --data-dir")
        key, cluster_id = new_key(), entropy(CLUSTER_ID_BYTES)
        anchor = Anchor(make_authority_certificate(key, cluster, cluster_id, now))
        folder = data_dir / FOLDER
        private_folder(folder)
        private_folder(folder / "invitations")
        save_key(folder / "key.pem", key)
        ring = KeyRing.of(cluster_id, 1, [entropy(rings.KEY_BYTES)], now)
        document = ClusterDocument(1, int(now), 1, ring.commitments(), int(now))
        write_private(folder / "ring", ring.to_bytes())
        write_private(folder / "document", document.signed(key, anchor))
        write_private(folder / "register.json", json.dumps({"issuer": site, "sites": {}}).encode())
        site_key = new_key()
        # the certificate comes last: with it the authority exists, and everything else is there by then
        write_private(folder / "authority.pem", anchor.pem)
        authority = cls(folder, entropy)
        certificate = authority.issue(make_csr(site_key, site), site, now)
        identity = SiteIdentity(
            folder=data_dir / IDENTITY,
            key=site_key,
            anchor=anchor,
            certificate=anchor.check(certificate, now),
            document=authority.document,
            document_bytes=authority.document_bytes,
            ring=ring,
            entropy=entropy,
        )
        identity.save()
        return identity

    # ---------------------------------------------------------------- sites

    def issue(self, csr: bytes, site: str, now: float) -> bytes:
        """A certificate (DER) for the key of a request, under the name `site`. Also renews one of the same key.

        Raises Damaged, NameTaken or KeyRevoked.
        """
        asked, key = check_csr(csr)
        if asked != site:
            raise Damaged(f"certificate request: for {asked!r} and not for {site!r}")
        with self._locked():
            return self._issue(key, site, now)

    def _issue(self, key: PublicKey, site: str, now: float) -> bytes:
        register = self._register()
        mark = fingerprint(key)
        if mark in self.document.revoked:
            raise KeyRevoked(f"site {site!r}: its key was put out of the cluster; make a new one")
        for other in self._issued(register):
            if other.fingerprint == mark and other.site != site:
                raise NameTaken(f"site {site!r}: its key is already that of {other.site!r}; make a new one")
        begins_s = int(now) - BACKDATED_S
        held = register["sites"].get(site)
        if held is not None:
            if not held["revoked"] and held["fingerprint"] != mark.hex():
                raise NameTaken(f"site {site!r} belongs to another key; choose another --site, or: mesh revoke {site}")
            begins_s = max(begins_s, held["not_before_s"] + 1)  # of two certificates for a name the later one counts
        der = make_site_certificate(self._key, self.anchor, site, key, begins_s)
        register["sites"][site] = {"fingerprint": mark.hex(), "not_before_s": begins_s, "revoked": False}
        self._write("register.json", json.dumps(register).encode())
        return der

    def renew(self, csr: bytes, site: str, fingerprint_: bytes, now: float) -> bytes:
        """A new certificate for a site that is in the register with this very key. Raises IdentityError."""
        asked, key = check_csr(csr)
        with self._locked():
            held = self._register()["sites"].get(site)
            mark = fingerprint(key)
            if held is None or asked != site or mark != fingerprint_ or held["fingerprint"] != mark.hex():
                raise Damaged(f"renewal: site {site!r} has another key")
            return self._issue(key, site, now)

    def sites(self) -> list[Issued]:
        """Everybody that ever had a certificate, by name."""
        return sorted(self._issued(self._register()), key=lambda issued: issued.site)

    @property
    def issuer(self) -> str:
        """The site whose data directory this is."""
        return str(self._register()["issuer"])

    # ---------------------------------------------------------------- invitations

    def invite(
        self, now: float, addresses: Sequence[str], *, site: str | None = None, ttl_s: float = INVITATION_S
    ) -> str:
        """An invitation as text: good once, for `ttl_s`, for `site` or for any free name. Raises ConfigError.

        `addresses` are where the authority's site can be reached by the joiner.
        """
        if site is not None:
            check_site(site)
        if not 0 < ttl_s <= MAX_INVITATION_S:
            raise ConfigError(f"invitation: {ttl_s:g} s is not between 1 s and {MAX_INVITATION_S // 86400} days")
        if not 0 < len(addresses) <= MAX_ADDRESSES or not all(valid_address(address) for address in addresses):
            raise ConfigError(f"invitation: give 1 to {MAX_ADDRESSES} addresses HOST:PORT that the new site can reach")
        with self._locked():
            self._sweep(now)
            invitation = Invitation(
                self.anchor,
                self.issuer,
                tuple(addresses),
                self._entropy(ID_BYTES),
                self._entropy(SECRET_BYTES),
                int(now + ttl_s),
                site or "",
            )
            record = {
                "secret_hash": secret_hash(invitation.secret).hex(),
                "expires_s": invitation.expires_s,
                "site": invitation.site,
            }
            write_private(self._invitation(invitation.id, "open"), json.dumps(record).encode())
        return invitation.text

    def redeem(self, request: bytes, now: float) -> bytes:
        """Answer an enrolment. The grant goes back to the joiner; nothing in it but its own key's owner can use.

        Asked again by the same key before the invitation's end, because an answer was lost, it grants the same site
        again. Raises InvitationUnknown, InvitationExpired, InvitationUsed, NameTaken, KeyRevoked or Damaged.
        """
        identifier, csr, mac = read_request(request)
        with self._locked():
            path, used = self._invitation(identifier, "open"), self._invitation(identifier, "used")
            again = used.exists()
            record = self._read_json(used if again else path, missing=InvitationUnknown("invitation: not known here"))
            expected = request_mac(bytes.fromhex(record["secret_hash"]), self.anchor.cluster_id, identifier, csr)
            if not hmac.compare_digest(expected, mac):
                raise InvitationUnknown("invitation: not known here")  # in the same words: its id is no secret
            asked, key = check_csr(csr)
            mark = fingerprint(key).hex()
            if again and record.get("fingerprint") != mark:
                raise InvitationUsed("invitation: another site has used it; ask for a new one with: mesh invite")
            if now > record["expires_s"]:
                raise InvitationExpired("invitation: expired; ask for a new one with: mesh invite")
            if record["site"] not in ("", asked) or (again and record["used_by"] != asked):
                raise NameTaken(f"site {asked!r}: the invitation is for {record['site'] or record['used_by']!r}")
            self._check_free(asked, key)
            if not again:
                try:
                    path.rename(used)  # from here on it is used, whatever happens
                except FileNotFoundError:
                    raise InvitationUsed("invitation: another site has used it; ask for a new one") from None
                record |= {"fingerprint": mark, "used_by": asked, "used_s": int(now)}
                write_private(used, json.dumps(record).encode())
            certificate = self._issue(key, asked, now)
            return write_grant(certificate, self._handover(certificate, now))

    def _check_free(self, site: str, key: PublicKey) -> None:
        """Refuse before the invitation is spent: a joiner with a wrong name can try again with another."""
        held = self._register()["sites"].get(site)
        if held is not None and not held["revoked"] and held["fingerprint"] != fingerprint(key).hex():
            raise NameTaken(f"site {site!r} belongs to another key; choose another --site")

    def withdraw(self, identifier: bytes) -> bool:
        """End an invitation that nobody has used. False if there is none."""
        with self._locked():
            try:
                self._invitation(identifier, "open").unlink()
            except FileNotFoundError:
                return False
            return True

    def _invitation(self, identifier: bytes, state: str) -> Path:
        return self.folder / "invitations" / f"{identifier.hex()}.{state}"

    def _sweep(self, now: float) -> None:
        """Forget invitations that ended long ago. Raises ConfigError where too many are open."""
        files = list((self.folder / "invitations").glob("*.*"))
        for path in files:
            record = self._read_json(path, missing=ConfigError(f"{path}: vanished"))
            if now > record["expires_s"] + REMEMBERED_S:
                path.unlink(missing_ok=True)
        if len(files) > MAX_INVITATIONS:
            raise ConfigError(f"{self.folder}: {len(files)} invitations; wait until some have expired")

    # ---------------------------------------------------------------- document and ring

    @property
    def document_bytes(self) -> bytes:
        """The newest cluster document as it travels."""
        return read_file(self.folder / "document")

    @property
    def document(self) -> ClusterDocument:
        """The newest cluster document."""
        return ClusterDocument.check(self.document_bytes, self.anchor)

    def revoke(self, site: str, now: float) -> ClusterDocument:
        """Put a site's key out, for good, and turn the ring. The name is free afterwards. Raises IdentityError."""
        with self._locked():
            register = self._register()
            held = register["sites"].get(site)
            if held is None:
                raise IdentityError(f"site {site!r} never had a certificate of this cluster; see: mesh members")
            if held["revoked"]:
                return self.document
            if site == register["issuer"]:
                raise IdentityError(f"site {site!r} holds the authority itself and cannot be put out")
            document = self.document
            revoked = {**document.revoked, bytes.fromhex(held["fingerprint"]): site}
            if len(revoked) > MAX_REVOKED:
                raise IdentityError(f"{MAX_REVOKED} sites are revoked already; make a new cluster")
            # the document first: it is what shuts the site out, and a crash after it is healed by asking again
            if revoked != document.revoked:
                document = self._publish(replace(document, revoked=revoked), now, turn=True)
            held["revoked"] = True
            self._write("register.json", json.dumps(register).encode())
            return document

    def rotate(self, now: float) -> ClusterDocument:
        """Bring a new ring key in. Raises IdentityError where several are still on their way in."""
        with self._locked():
            if len(self._ring(now).keys) >= MAX_RING_KEYS:
                raise IdentityError("ring: earlier rotations are still under way; try again in two minutes")
            return self._publish(self.document, now, turn=True)

    def _publish(self, document: ClusterDocument, now: float, *, turn: bool) -> ClusterDocument:
        ring = self._ring(now)
        if turn and len(ring.keys) < MAX_RING_KEYS:
            secrets = list(ring.keys.values())
            while True:
                secret = self._entropy(rings.KEY_BYTES)
                if commitment(self.anchor.cluster_id, secret)[: rings.ID_BYTES] not in ring.keys:
                    break
            turned = KeyRing.of(self.anchor.cluster_id, ring.version + 1, [*secrets, secret], now)
            ring = ring.replaced_by(turned, now)
            self._write("ring", ring.to_bytes())
        if ring.version != document.ring_version:
            document = replace(document, ring_version=ring.version, ring=ring.commitments(), rotated_s=int(now))
        document = replace(document, version=document.version + 1, issued_s=int(now))
        self._write("document", document.signed(self._key, self.anchor))
        return self.document

    def _ring(self, now: float) -> KeyRing:
        """The newest ring, as far as it has turned by time alone."""
        ring = KeyRing.check(read_file(self.folder / "ring"), self.anchor.cluster_id, None)
        while ring.progress(now):
            self._write("ring", ring.to_bytes())
        return ring

    def handover(self, certificate: bytes, now: float) -> bytes:
        """The newest document and ring for one site; see `SiteIdentity.take`. Raises IdentityError."""
        with self._locked():
            return self._handover(certificate, now)

    def _handover(self, certificate: bytes, now: float) -> bytes:
        checked = self.anchor.check(certificate, None)
        if checked.fingerprint in self.document.revoked:
            raise KeyRevoked(f"ring: {checked.site} was put out of the cluster")
        ring = self._ring(now)
        if ring.version != self.document.ring_version:  # a crash came between the two files
            self._publish(self.document, now, turn=False)
        return make_handover(self.document_bytes, ring, checked, self._entropy)

    # ---------------------------------------------------------------- API tokens

    def create_token(self, name: str, role: str, now: float, ttl_s: float = TOKEN_S) -> str:
        """An API token as text. It is not kept; only its id is. Raises ConfigError."""
        if not 0 < ttl_s <= MAX_TOKEN_S:
            raise ConfigError(f"token: {ttl_s:g} s is not between 1 s and {MAX_TOKEN_S // (365 * 86400)} years")
        text, identifier = make_token(
            self._key, self.anchor, name, role, expires_s=int(now + ttl_s), entropy=self._entropy
        )
        with self._locked():
            tokens = [token for token in self.tokens() if token["expires_s"] > now]
            tokens.append({"id": identifier.hex(), "name": name, "role": role, "expires_s": int(now + ttl_s)})
            self._write("tokens.json", json.dumps(tokens).encode())
        return text

    def tokens(self) -> list[dict[str, Any]]:
        """Tokens given out: id, name, role, expires_s."""
        path = self.folder / "tokens.json"
        return list(json.loads(read_file(path))) if path.exists() else []

    def revoke_token(self, identifier: bytes, now: float) -> ClusterDocument:
        """Withdraw a token by its id, everywhere. Raises IdentityError where there is none."""
        with self._locked():
            live = {bytes.fromhex(token["id"]) for token in self.tokens() if token["expires_s"] > now}
            if identifier not in live:
                raise IdentityError(f"token {identifier.hex()}: there is none; see: mesh token list")
            document = self.document
            # what has expired needs no withdrawal any more
            gone = [token for token in document.revoked_tokens if token in live and token != identifier]
            if len(gone) >= MAX_REVOKED_TOKENS:
                raise IdentityError(f"{MAX_REVOKED_TOKENS} tokens are withdrawn already; wait until some expire")
            return self._publish(replace(document, revoked_tokens=(*gone, identifier)), now, turn=False)

    # ---------------------------------------------------------------- files

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process and one thread at a time."""
        try:
            descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"{self.folder}: cannot be locked ({error.strerror})") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _register(self) -> dict[str, Any]:
        path = self.folder / "register.json"
        return self._read_json(path, missing=ConfigError(f"{path}: is missing; restore it from a backup"))

    @staticmethod
    def _issued(register: dict[str, Any]) -> Iterator[Issued]:
        for site, held in register["sites"].items():
            yield Issued(site, bytes.fromhex(held["fingerprint"]), held["not_before_s"], held["revoked"])

    @staticmethod
    def _read_json(path: Path, missing: Exception) -> dict[str, Any]:
        if not path.exists():
            raise missing
        try:
            return dict(json.loads(read_file(path)))
        except ValueError:
            raise ConfigError(f"{path}: damaged; restore it from a backup") from None

    def _write(self, name: str, content: bytes) -> None:
        write_private(self.folder / name, content)
