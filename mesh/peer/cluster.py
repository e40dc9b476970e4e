"""The peer's part in its cluster: what its identity is used for while it runs.

It proves itself to those it calls and checks those who call; it learns others' certificates from gossip, follows the
cluster's document (who is revoked, which ring is in force), fetches new rings from members that have them, and has its
certificate renewed in time. Where the authority's files are here, it also enrols, invites, revokes and rotates.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import grpc
import trio

from mesh.client.credentials import LOCAL_ADDRESS, LOCAL_TOKEN, Credentials
from mesh.errors import ConfigError, IdentityError, MeshError, PeerUnreachable
from mesh.gossip.proof import CLUSTER
from mesh.identity.access import PEER, USER, Access, peer_proof, read_peer_proof
from mesh.identity.authority import Authority
from mesh.identity.certificate import tls_name
from mesh.identity.keys import write_private
from mesh.identity.prover import SiteProver
from mesh.identity.seal import SiteSealer
from mesh.identity.site import SiteIdentity
from mesh.identity.tokens import Principal

logger = logging.getLogger(__name__)

#: Entries of gossip: a site's certificate and the version of the ring it holds; the cluster's document.
ENTRY, DOCUMENT = "identity", "document"
#: How often the ring is looked after, the certificates of others are saved, and a renewal is tried.
TURN_S, SAVE_S, RENEW_S = 1.0, 60.0, 3600.0
#: How long a peer may take to hand over a ring or a certificate.
ASK_S = 5.0


class Gossip(Protocol):
    """The part of the gossip shell that is used here."""

    def publish(self, key: str, value: dict[str, Any]) -> None: ...
    def publish_cluster(self, key: str, value: dict[str, Any], version: int, proof: bytes) -> bool: ...
    def entries(self, key: str) -> dict[str, dict[str, Any]]: ...
    def entry(self, site: str, key: str) -> dict[str, Any] | None: ...
    def members(self) -> Any: ...
    def events(self) -> Any: ...


class Keeper(Protocol):
    """What is asked of another site's peer."""

    async def keys(self, version: int) -> bytes: ...
    async def renew(self, csr: bytes) -> bytes: ...


class Cluster:
    """One site's identity at work. Made by `open_cluster`; used from trio's thread, but for what says otherwise."""

    def __init__(
        self, identity: SiteIdentity, authority: Authority | None, *, wall: Callable[[], float] = time.time
    ) -> None:
        """`authority` where its files are in this data directory."""
        self.identity = identity
        self.authority = authority
        self.wall = wall
        self.sealer = SiteSealer(identity, wall=wall)
        self.prover = SiteProver(identity, wall=wall)
        self._local = secrets.token_urlsafe(32)
        self._asserting = threading.Lock()

    # ---------------------------------------------------------------- proving and checking, from gRPC's threads

    @property
    def server_credentials(self) -> grpc.ServerCredentials:
        """TLS under this site's certificate."""
        return grpc.ssl_server_credentials([(self.identity.key_pem, self.identity.certificate.pem)])

    def credentials(self, site: str) -> Credentials:
        """For calls to one site's peer. From any thread; the call fails while that site's certificate is unknown."""

        def proof() -> str:
            known = self.identity.directory.site(site)
            if known is None:
                raise PeerUnreachable(f"the certificate of {site} is not known here yet")
            with self._asserting:
                return peer_proof(self.identity.assertion(known.fingerprint, self.wall()))

        return Credentials(self.identity.anchor.pem, proof, tls_name(site))

    def authenticate(self, proof: str) -> Principal:
        """Who shows this `authorization`. One thread at a time. Raises IdentityError."""
        now = self.wall()
        if proof.startswith(PEER):
            return self.identity.verify_assertion(read_peer_proof(proof), now)
        token = proof.removeprefix(USER)
        if secrets.compare_digest(token.encode(), self._local.encode()):
            return Principal("user", "local", "administer", b"", int(now) + 1)
        return self.identity.verify_token(token, now)

    def describe(self) -> dict[str, Any]:
        """For `mesh status` and `mesh members`."""
        document = self.identity.document
        return {
            "cluster": self.identity.cluster,
            "ring": self.identity.ring.version,
            "document": document.version,
            "authority": self.authority is not None,
            "revoked": sorted(document.revoked.values()),
            "clocks_off_s": dict(self.sealer.skewed),
        }

    def describe_member(self, site: str) -> dict[str, Any]:
        """What is known of a member's identity."""
        own = site == self.identity.site
        certificate = self.identity.certificate if own else self.identity.directory.site(site)
        if certificate is None:
            return {"fingerprint": None, "certificate_days": None}
        days = (certificate.not_after_s - self.wall()) / 86400
        return {"fingerprint": certificate.fingerprint.hex()[:16], "certificate_days": round(days, 1)}

    # ---------------------------------------------------------------- files for users of this account

    def leave_token(self, address: str) -> None:
        """Write an access token that is good here while this peer runs, for `mesh` commands of the same account."""
        folder = self.identity.folder.parent
        write_private(folder / LOCAL_TOKEN, Access(self.identity.anchor, self._local).text.encode())
        write_private(folder / LOCAL_ADDRESS, address.encode())

    def remove_token(self) -> None:
        """Undo `leave_token`, and remember the certificates of others for the next start."""
        folder = self.identity.folder.parent
        for name in (LOCAL_TOKEN, LOCAL_ADDRESS):
            (folder / name).unlink(missing_ok=True)
        self._save()

    # ---------------------------------------------------------------- while the peer runs

    async def run(self, gossip: Gossip, peer: Callable[[str], Keeper]) -> None:
        """Keep identity, document and ring up to date. Runs until cancelled. `peer(site)` gives another's calls."""
        self._publish(gossip)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._listen, gossip)
            nursery.start_soon(self._turn, gossip, peer)
            nursery.start_soon(self._renew, gossip, peer)
            nursery.start_soon(self._save_at_times)

    def took_office(self, gossip: Gossip) -> None:
        """The authority here has written something new: take it over and tell the mesh. Raises MeshError."""
        assert self.authority is not None
        self.identity.take_document(self.authority.document_bytes)
        self.identity.take(self.authority.handover(self.identity.certificate.der, self.wall()), self.wall())
        self._publish(gossip)

    def _publish(self, gossip: Gossip) -> None:
        self._publish_entry(gossip)
        gossip.publish_cluster(*self.identity.document_entry)

    def _publish_entry(self, gossip: Gossip) -> None:
        gossip.publish(ENTRY, {**self.identity.entry(), "authority": self.authority is not None})

    async def _listen(self, gossip: Gossip) -> None:
        with gossip.events() as events:
            for site in [member.site for member in gossip.members()]:
                self._learn(gossip, site)
            self._obey(gossip)
            async for event in events:
                if event.kind == "updated" and event.key == ENTRY:
                    self._learn(gossip, event.site)
                elif event.kind == "updated" and event.site == CLUSTER:
                    self._obey(gossip)

    def _learn(self, gossip: Gossip, site: str) -> None:
        """Take a site's certificate from its entry; what the authority did not sign is left out."""
        der = (gossip.entry(site, ENTRY) or {}).get("certificate")
        if site == self.identity.site or not isinstance(der, bytes):
            return
        try:
            self.identity.directory.learn(der, self.wall())
        except MeshError as error:
            logger.warning("the certificate that %s publishes is left out: %s", site, error)

    def _obey(self, gossip: Gossip) -> None:
        """Take the newest document of the cluster."""
        document = (gossip.entry(CLUSTER, DOCUMENT) or {}).get("document")
        if not isinstance(document, bytes):
            return
        before = set(self.identity.document.revoked.values())
        try:
            if self.identity.take_document(document):
                for site in sorted(set(self.identity.document.revoked.values()) - before):
                    logger.warning("%s was put out of the cluster", site)
        except MeshError as error:
            logger.warning("a cluster document is left out: %s", error)
        if self.identity.revoked:
            logger.error("this site was put out of the cluster: the others do not hear it any more")

    async def _turn(self, gossip: Gossip, peer: Callable[[str], Keeper]) -> None:
        while True:
            await trio.sleep(TURN_S)
            present = {member.site for member in gossip.members() if member.state in ("alive", "suspect")}
            held = {site: _version(entry) for site, entry in gossip.entries(ENTRY).items() if site in present}
            held[self.identity.site] = self.identity.ring.version
            if self.identity.wants_ring:
                wanted = self.identity.document.ring_version
                await self._fetch([site for site, version in sorted(held.items()) if version >= wanted], gossip, peer)
            elif (address := self.sealer.behind) is not None:
                # Somebody seals under keys that came while we were away: nobody's gossip can tell us of them.
                self.sealer.behind = None
                there = [member.site for member in gossip.members() if member.address == address]
                await self._fetch(there, gossip, peer)
            announced = [held.get(site, 0) for site in present | {self.identity.site}]
            if self.identity.turn_ring(self.wall(), announced):
                self._publish_entry(gossip)

    async def _fetch(self, sites: Iterable[str], gossip: Gossip, peer: Callable[[str], Keeper]) -> None:
        """Ask those that hold the new ring for it, until one gives it."""
        for site in sites:
            try:
                with trio.fail_after(ASK_S):
                    handover = await peer(site).keys(self.identity.document.ring_version)
                if self.identity.take(handover, self.wall()):
                    logger.info("gossip keys of version %d, from %s", self.identity.ring.version, site)
                    self._publish_entry(gossip)
                    return
            except (MeshError, trio.TooSlowError) as error:
                logger.warning("%s did not hand over the gossip keys: %s", site, error)

    async def _renew(self, gossip: Gossip, peer: Callable[[str], Keeper]) -> None:
        while True:
            if self.identity.certificate.wants_renewal(self.wall()):
                try:
                    self.identity.renewed(await self._renewal(gossip, peer), self.wall())
                    self._publish_entry(gossip)
                    logger.info("the certificate was renewed")
                except (MeshError, trio.TooSlowError) as error:
                    logger.warning("the certificate of this site was not renewed yet: %s", error)
            await trio.sleep(RENEW_S)

    async def _renewal(self, gossip: Gossip, peer: Callable[[str], Keeper]) -> bytes:
        identity = self.identity
        if self.authority is not None:
            return self.authority.renew(identity.csr(), identity.site, identity.certificate.fingerprint, self.wall())
        issuers = [site for site, entry in gossip.entries(ENTRY).items() if entry.get("authority") is True]
        if not issuers:
            raise PeerUnreachable("the peer with the cluster's authority is not in the mesh now")
        with trio.fail_after(ASK_S):
            return await peer(min(issuers)).renew(identity.csr())

    async def _save_at_times(self) -> None:
        while True:
            await trio.sleep(SAVE_S)
            self._save()

    def _save(self) -> None:
        try:
            self.identity.save_directory()
        except ConfigError as error:
            logger.warning("%s", error)


def _version(entry: dict[str, Any]) -> int:
    version = entry.get("ring")
    return version if isinstance(version, int) else 0


def open_cluster(data_dir: Path, site: str, *, wall: Callable[[], float] = time.time) -> Cluster | None:
    """The cluster of a data directory; None where it holds no identity.

    Raises ConfigError where the identity is another site's or its files are damaged, IdentityError where it is expired.
    """
    if not SiteIdentity.exists(data_dir):
        return None
    identity = SiteIdentity.load(data_dir, wall(), os.urandom)
    if identity.site != site:
        own = identity.site
        raise ConfigError(f"site {site!r}: {data_dir} holds the identity of {own!r}; give --site {own}")
    if identity.revoked:
        raise IdentityError(f"{identity.site} was put out of its cluster: ask for an invitation and a new --data-dir")
    authority = Authority.load(data_dir) if Authority.exists(data_dir) else None
    return Cluster(identity, authority, wall=wall)
