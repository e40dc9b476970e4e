"""Sealed datagrams: `mesh.gossip.sealing.Sealer` with the identity of a site.

Behind gossip's header, all in the clear until the seal:

    sealed   1 | ring key id 4 | sender's key id 8 | boot 8 | counter 6 | AES-256-GCM(time 4, body) + tag 16
    hello    2 | ring key id 4 | salt 16            | AES-256-GCM(certificate, time, echo, signature, padding) + tag 16
    who      3 | ring key id 4 | boot 8 | counter 6 | MAC 16

The key of a sealed datagram comes of the ring key and of ECDH between the sender's and the receiver's own keys, so no
third member can read it or speak as the sender. It also comes of the sender's boot, a random number made at each start:
under one key the counter never repeats, and so neither does the nonce, whatever a restart forgot.

Whoever does not know the receiver's key says hello instead, under the ring key alone and signed; the answer, which
echoes the salt, has the receiver's certificate. Whoever does not know the sender of a sealed datagram asks *who* that
was, in fewer bytes than it got; the sender says hello. All hellos have one size: no answer is larger than its request.
"""

from __future__ import annotations

import hmac
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, TypeVar

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from mesh.errors import IdentityError
from mesh.gossip.sealing import Forged, Malformed, Opened, Replayed, Revoked, Skewed, Stale
from mesh.identity.certificate import MAX_CERTIFICATE_BYTES, SiteCertificate
from mesh.identity.errors import Damaged, Expired, KeyRevoked, NotYetValid
from mesh.identity.keys import SIGNATURE_BYTES, Entropy, agree, derive, sign, verified
from mesh.identity.limit import Limit
from mesh.identity.packing import blob, moment, pack, unpack
from mesh.identity.replay import Once, ReplayGuard
from mesh.identity.tokens import SKEW_S

if TYPE_CHECKING:
    from mesh.identity.site import SiteIdentity

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

SEALED, HELLO, WHO = 1, 2, 3
RING_ID_BYTES = 4
KEY_ID_BYTES = 8
BOOT_BYTES = 8
COUNTER_BYTES = 6
TIME_BYTES = 4
TAG_BYTES = 16
SALT_BYTES = 16
_CLEAR_BYTES = 1 + RING_ID_BYTES + KEY_ID_BYTES + BOOT_BYTES + COUNTER_BYTES
OVERHEAD_BYTES = _CLEAR_BYTES + TIME_BYTES + TAG_BYTES
WHO_BYTES = 1 + RING_ID_BYTES + BOOT_BYTES + COUNTER_BYTES + TAG_BYTES
#: Room for a certificate with the longest names (about 660 bytes), and below a datagram's 1400.
HELLO_BYTES = 1000
_HELLO_CLEAR = 1 + RING_ID_BYTES + SALT_BYTES
_HELLO_BODY = HELLO_BYTES - _HELLO_CLEAR - TAG_BYTES
_ZERO_NONCE = bytes(12)
_LAST_COUNTER = (1 << 8 * COUNTER_BYTES) - 1
_LAST_SECOND = (1 << 8 * TIME_BYTES) - 1

#: Keys kept ready; making one again costs an ECDH, about 60 us.
MAX_KEYS = 16_384
MAX_ADDRESSES = 4096
#: What an address was last known to be is believed this long: another site may have moved there.
ADDRESS_S = 60.0
#: After somebody there could not read us we only say hello to an address, until it answers or this is over.
DOUBT_S = 1.0
#: Own hellos whose answer is awaited, and how long.
MAX_PENDING = 1024
PENDING_S = 30.0
MAX_HELLOS_SEEN = 8192
#: How far back a datagram of ours may lie that somebody asks about.
ASKED_BACK = 65_536
#: Answers: (a second, at once) to one source, and to all. A hello costs about 0.4 ms to answer.
PER_SOURCE = (2.0, 6.0)
OVERALL = (200.0, 1000.0)
MAX_SKEWED = 256
_HELLO_CONTEXT = "hello 1"


class SiteSealer:
    """Seals and opens the datagrams of one site.

    `wall` gives seconds since 1970. `counters` counts hellos_sent, hellos_received, asked ("who?" sent),
    answered ("who?" received), rings_unknown. `skewed` has, for a log line, whose clock is wrong and by how many
    seconds it is ahead of ours. `behind` is the address of a peer that sealed with a ring key we never had, as a hint
    to ask for a handover; whoever reads it sets it back to None.
    """

    overhead_bytes = OVERHEAD_BYTES

    def __init__(self, identity: SiteIdentity, *, wall: Callable[[], float], entropy: Entropy | None = None) -> None:
        self._identity = identity
        self._directory = identity.directory
        self._wall = wall
        self._entropy = entropy or identity.entropy
        self._cluster_id = identity.anchor.cluster_id
        self._boot = self._entropy(BOOT_BYTES)
        self._counter = 0
        self._secrets: _Recent[bytes, bytes] = _Recent(MAX_KEYS)
        self._sending: _Recent[tuple[bytes, bytes], AESGCM] = _Recent(MAX_KEYS)
        self._receiving: _Recent[tuple[bytes, bytes, bytes], AESGCM] = _Recent(MAX_KEYS)
        self._addresses: _Recent[str, tuple[str, float]] = _Recent(MAX_ADDRESSES)
        self._doubted: _Recent[str, float] = _Recent(MAX_ADDRESSES)
        self._pending: _Recent[bytes, tuple[str, float]] = _Recent(MAX_PENDING)
        self._former_rings: _Recent[bytes, None] = _Recent(16)
        self._replays = ReplayGuard()
        self._hellos = Once(MAX_HELLOS_SEEN)
        self._asked: _Recent[int, None] = _Recent(MAX_PENDING)
        self._hello_limit = Limit(PER_SOURCE, OVERALL)
        self._who_limit = Limit(PER_SOURCE, OVERALL)  # apart: anybody can use this one up, also in another's name
        self.counters: Counter[str] = Counter()
        self.skewed: dict[str, float] = {}
        self.behind: str | None = None

    # ---------------------------------------------------------------- sealing

    def seal(self, body: bytes, *, address: str, site: str, now: float) -> bytes:
        """See `Sealer.seal`."""
        wall = self._wall()
        # what was proven to live at this address counts for more than what membership believes: sites move
        receiver = self._directory.site(self._site_at(address, wall) or site)
        if wall < self._doubted.get(address, 0.0) <= wall + DOUBT_S:
            receiver = None
        if receiver is None or receiver.fingerprint == self._directory.own.fingerprint:
            return self._hello(b"", address, wall)
        ring_id = self._identity.ring.active
        if self._counter >= _LAST_COUNTER:
            self._boot, self._counter = self._entropy(BOOT_BYTES), 0
            self._sending.clear()
        self._counter += 1
        cipher = self._sending.get((ring_id, receiver.fingerprint))
        if cipher is None:
            own = self._directory.own
            cipher = AESGCM(self._key(ring_id, receiver, own.fingerprint, receiver.fingerprint, self._boot))
            self._sending.put((ring_id, receiver.fingerprint), cipher)
        counter = self._counter.to_bytes(COUNTER_BYTES)
        clear = b"".join([b"\x01", ring_id, self._directory.own.key_id, self._boot, counter])
        return clear + cipher.encrypt(_nonce(counter), _seconds(wall).to_bytes(TIME_BYTES) + body, clear)

    def _key(self, ring_id: bytes, peer: SiteCertificate, sender: bytes, receiver: bytes, boot: bytes) -> bytes:
        secret = self._secrets.get(peer.fingerprint)
        if secret is None:
            secret = agree(self._identity.key, peer.public_key)
            self._secrets.put(peer.fingerprint, secret)
        info = b"isthmus datagram 1\0" + self._cluster_id + ring_id + sender + receiver + boot
        return derive(secret, self._ring_key(ring_id), info)

    def _ring_key(self, ring_id: bytes) -> bytes:
        key = self._identity.ring.keys[ring_id]
        self._former_rings.put(ring_id, None)
        return key

    def _site_at(self, address: str, wall: float) -> str:
        site, until_s = self._addresses.get(address) or ("", 0.0)
        return site if wall < until_s <= wall + ADDRESS_S else ""

    # ---------------------------------------------------------------- opening

    def open(self, data: bytes, *, source: str, now: float) -> Opened:
        """See `Sealer.open`."""
        kind = data[0] if data else 0
        if kind == SEALED and len(data) > OVERHEAD_BYTES:
            return self._open_sealed(data, source)
        if kind == HELLO and len(data) == HELLO_BYTES:
            return self._open_hello(data, source)
        if kind == WHO and len(data) == WHO_BYTES:
            return self._open_who(data, source)
        raise Malformed("not a sealed datagram")

    def _open_sealed(self, data: bytes, source: str) -> Opened:
        ring_id, rest = data[1:5], data[5:]
        key_id, boot, counter = rest[:8], rest[8:16], rest[16:22]
        wall = self._wall()
        self._check_ring(ring_id, source)
        if self._directory.is_revoked_id(key_id):
            raise Revoked("from a key that was put out")
        if key_id == self._directory.own.key_id:
            raise Replayed("our own datagram")
        sender = self._directory.by_key_id(key_id)
        if sender is None:
            return self._ask_who(ring_id, boot, counter, source, wall)
        cipher = self._receiving.get((ring_id, key_id, boot))
        known = cipher is not None
        if cipher is None:
            own = self._directory.own.fingerprint
            cipher = AESGCM(self._key(ring_id, sender, sender.fingerprint, own, boot))
        try:
            plain = cipher.decrypt(_nonce(counter), data[_CLEAR_BYTES:], data[:_CLEAR_BYTES])
        except InvalidTag:
            refused = Forged(f"not sealed by {sender.site} for this site")
            if self._who_limit.allows(source, wall):  # it may have been for who was at our address before
                refused.reply = self._who(ring_id, boot, counter)
            raise refused from None
        if not known:
            self._receiving.put((ring_id, key_id, boot), cipher)
        sealed_s = int.from_bytes(plain[:TIME_BYTES])
        self._check_clock(sender, sealed_s, wall)
        if not self._replays.take(key_id, boot, int.from_bytes(counter), sealed_s):
            raise Replayed(f"from {sender.site}, and was here before")
        self._addresses.put(source, (sender.site, wall + ADDRESS_S))
        return Opened(plain[TIME_BYTES:], sender.site)

    def _check_ring(self, ring_id: bytes, source: str) -> None:
        if ring_id in self._identity.ring.keys:
            return
        if ring_id in self._former_rings:
            raise Stale("under a ring key that was dropped")
        self.counters["rings_unknown"] += 1
        self.behind = source
        raise Forged("under a ring key that this site does not have")

    def _check_clock(self, sender: SiteCertificate, sealed_s: int, wall: float) -> None:
        ahead_s = sealed_s - wall
        if abs(ahead_s) > SKEW_S:
            self._note_skew(sender.site, ahead_s)
            raise Skewed(f"the clock of {sender.site} is {ahead_s:+.0f} s from ours")
        try:
            sender.check_time(wall)
        except NotYetValid as error:
            self._note_skew(sender.site, sender.not_before_s - wall)
            raise Skewed(str(error)) from None
        except Expired as error:
            raise Stale(str(error)) from None
        self.skewed.pop(sender.site, None)

    def _note_skew(self, site: str, ahead_s: float) -> None:
        if site in self.skewed or len(self.skewed) < MAX_SKEWED:
            self.skewed[site] = ahead_s

    # ---------------------------------------------------------------- hello

    def _hello(self, echo: bytes, address: str, wall: float) -> bytes:
        self.counters["hellos_sent"] += 1
        ring_id, salt, own = self._identity.ring.active, self._entropy(SALT_BYTES), self._directory.own
        signed = self._hello_message(own.fingerprint, ring_id, salt, _seconds(wall), echo)
        plain = pack([own.der, _seconds(wall), echo, sign(self._identity.key, _HELLO_CONTEXT, signed)])
        length = len(plain).to_bytes(2)
        if not echo:
            self._pending.put(salt, (address, wall + PENDING_S))
        clear = bytes([HELLO]) + ring_id + salt
        padded = (length + plain).ljust(_HELLO_BODY, b"\0")
        return clear + AESGCM(self._hello_key(ring_id, salt)).encrypt(_ZERO_NONCE, padded, clear)

    def _hello_key(self, ring_id: bytes, salt: bytes) -> bytes:
        """A key for one hello, which is why its nonce may be zero."""
        return derive(self._ring_key(ring_id), salt, b"isthmus hello 1\0" + self._cluster_id + ring_id)

    def _hello_message(self, sender: bytes, ring_id: bytes, salt: bytes, sealed_s: int, echo: bytes) -> bytes:
        return pack([self._cluster_id, sender, ring_id, salt, sealed_s, echo])

    def _open_hello(self, data: bytes, source: str) -> Opened:
        ring_id, salt, wall = data[1:5], data[5:21], self._wall()
        self._check_ring(ring_id, source)
        cipher = AESGCM(self._hello_key(ring_id, salt))
        try:
            padded = cipher.decrypt(_ZERO_NONCE, data[_HELLO_CLEAR:], data[:_HELLO_CLEAR])
        except InvalidTag:
            raise Forged("hello: not under the ring key") from None
        try:
            size = int.from_bytes(padded[:2])
            if any(padded[2 + size :]):
                raise Damaged("hello: something behind it")
            der, sealed_s, echo, signature = unpack(padded[2 : 2 + size], 4, "hello", _HELLO_BODY)
            blob(der, "hello", 1, MAX_CERTIFICATE_BYTES)
            blob(signature, "hello", SIGNATURE_BYTES)
            moment(sealed_s, "hello")
            if echo != b"":
                blob(echo, "hello", SALT_BYTES)
        except Damaged as error:
            raise Malformed(str(error)) from None
        sender = self._learn(der, wall)
        message = self._hello_message(sender.fingerprint, ring_id, salt, sealed_s, echo)
        if not verified(sender.public_key, _HELLO_CONTEXT, message, signature):
            raise Forged(f"hello: {sender.site} did not sign it")
        if sender.fingerprint == self._directory.own.fingerprint:
            raise Replayed("hello: our own")
        self._check_clock(sender, sealed_s, wall)
        if not self._hellos.take(salt, sealed_s):
            raise Replayed(f"hello: from {sender.site}, and was here before")
        self.counters["hellos_received"] += 1
        if echo:
            return self._answered(sender, echo, source, wall)
        if self._site_at(source, wall) != sender.site:
            self._addresses.drop(source)
        reply = self._hello(salt, source, wall) if self._hello_limit.allows(source, wall) else None
        return Opened(b"", sender.site, reply)

    def _answered(self, sender: SiteCertificate, echo: bytes, source: str, wall: float) -> Opened:
        pending = self._pending.get(echo)
        if pending is None or wall > pending[1]:
            raise Replayed(f"hello: {sender.site} answers what was not asked")
        self._pending.drop(echo)
        for address in {pending[0], source}:
            self._addresses.put(address, (sender.site, wall + ADDRESS_S))
            self._doubted.drop(address)
        return Opened(b"", sender.site)

    def _learn(self, der: bytes, wall: float) -> SiteCertificate:
        try:
            return self._directory.learn(der, wall)
        except KeyRevoked as error:
            raise Revoked(str(error)) from None
        except NotYetValid as error:
            raise Skewed(str(error)) from None
        except Expired as error:
            raise Stale(str(error)) from None
        except IdentityError as error:
            raise Forged(str(error)) from None

    # ---------------------------------------------------------------- who

    def _ask_who(self, ring_id: bytes, boot: bytes, counter: bytes, source: str, wall: float) -> Opened:
        if not self._who_limit.allows(source, wall):
            raise Forged("from a key that this site does not know")
        return Opened(b"", None, self._who(ring_id, boot, counter))

    def _who(self, ring_id: bytes, boot: bytes, counter: bytes) -> bytes:
        self.counters["asked"] += 1
        clear = bytes([WHO]) + ring_id + boot + counter
        return clear + self._who_mac(ring_id, clear)

    def _who_mac(self, ring_id: bytes, clear: bytes) -> bytes:
        key = derive(self._ring_key(ring_id), b"", b"isthmus who 1\0" + self._cluster_id)
        return hmac.digest(key, clear, "sha256")[:TAG_BYTES]

    def _open_who(self, data: bytes, source: str) -> Opened:
        ring_id, boot, clear, wall = data[1:5], data[5:13], data[:-TAG_BYTES], self._wall()
        counter = int.from_bytes(data[13:19])
        self._check_ring(ring_id, source)
        if not hmac.compare_digest(self._who_mac(ring_id, clear), data[-TAG_BYTES:]):
            raise Forged("who: not under the ring key")
        if boot != self._boot or not self._counter - ASKED_BACK < counter <= self._counter or counter in self._asked:
            raise Replayed("who: asks about nothing that we just sent")
        self._asked.put(counter, None)
        if not self._hello_limit.allows(source, wall):
            raise Replayed("who: asked too often")
        self.counters["answered"] += 1
        self._addresses.drop(source)
        self._doubted.put(source, wall + DOUBT_S)
        return Opened(b"", None, self._hello(b"", source, wall))


def _seconds(wall: float) -> int:
    """What fits the field, also under a clock that is wrong by a century."""
    return min(max(int(wall), 0), _LAST_SECOND)


def _nonce(counter: bytes) -> bytes:
    """96 bits that do not repeat under one key: the key is of one sender, one receiver, one start and one ring key."""
    return bytes(12 - COUNTER_BYTES) + counter


class _Recent(OrderedDict[K, V]):
    """A dict of bounded size that forgets what was not used for longest."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def put(self, key: K, value: V) -> None:
        self[key] = value
        self.move_to_end(key)
        if len(self) > self._most:
            self.popitem(last=False)

    def drop(self, key: K) -> None:
        self.pop(key, None)
