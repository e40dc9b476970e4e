"""A channel: named messages to and from one neighbour, over one pipe, sealed, in order, with a deadline on every wait.

The step loop of a worker drives it synchronously. Nothing here blocks except `receive`, and that spins first: see
`transport.waiting`. Kinds below 128 are ordinary messages; kinds 128 to 199 are lanes, given only to who asks for the
kind, so that a collective and an activation on one channel do not steal each other's messages.

Messages are of two priorities. What is sent as bulk (weights, copies of a KV cache) is taken apart, sealed piece by
piece as the pipe has room, and overtaken by everything else. Order holds within a priority, not between the two.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, cast

from transport.base import (
    Buffer,
    ChannelBroken,
    ChannelClosed,
    DeadlineExceeded,
    Fabric,
    FrameError,
    Pipe,
    Ticket,
    TransportError,
)
from transport.buffers import Landings
from transport.deadlines import PATIENCE_S, Watches, Way, allowance_s
from transport.device_buffers import CudaStaging, DeviceBuffer, Landed, OnDevice, Staging, device_buffer
from transport.emulate import DelayLine
from transport.fragments import Incoming, Outgoing
from transport.frames import (
    BULK_LANE,
    CHUNK_BYTES,
    FIRST_INTERNAL_KIND,
    FIRST_LANE_KIND,
    FRAGMENT,
    GOODBYE,
    HEARTBEAT,
    PART,
    Frame,
    FrameReader,
    FrameWriter,
    check_size,
    kind_of,
)
from transport.handshake import RANDOM_BYTES, read_welcome, write_hello
from transport.tickets import Held, again, flat
from transport.waiting import SPIN_S

Clock = Callable[[], int]
Entropy = Callable[[int], bytes]
#: What seals here and what opens here: 32 bytes each, or None in an unsealed channel.
Keys = tuple[bytes | None, bytes | None]

_SPIN_NS = round(SPIN_S * 1e9)
#: Heartbeats in one interval of tolerated silence: one may be late, one may be lost in a busy neighbour.
_BEATS = 3

#: What is watched on every channel; the words of the error.
_WAYS = ("messages to it", "bulk to it", "a message from it", "bulk from it")

#: Arrived messages that nobody asked for yet. Beyond this no bulk is taken, so that its sender waits.
_STASH_BYTES = 64 << 20

#: Pieces of a long sealed message that may be under way before the next one is sealed, if that helps.
_PARTS_BYTES = 2 << 20
#: Memory kept for the next long message that comes in pieces.
_LANDINGS_BYTES = 65 << 20


class Message(NamedTuple):
    """What a neighbour sent. `payload` belongs to the receiver; it stays valid as long as it is held."""

    kind: int
    meta: bytes
    payload: memoryview


class Channel:
    """One end of a channel. Not thread safe: the thread that drives the fabric uses it.

    Made by `connect_channel` and `Acceptor.poll`. A connector's messages are held until the neighbour has answered and
    both know the keys. Methods raise ChannelClosed after a goodbye from either end and
    ChannelBroken after anything worse; messages that arrived before are delivered first.
    """

    def __init__(
        self,
        fabric: Fabric,
        pipe: Pipe,
        keys: Keys | Callable[[memoryview], Keys],
        *,
        name: str,
        delay_s: float = 0.0,
        silence_s: float | None = None,
        patience_s: float = PATIENCE_S,
        sealed: bool = False,
        clock: Clock = time.monotonic_ns,
    ) -> None:
        self.fabric = fabric
        self.name = name
        self._pipe = pipe
        self._writer: FrameWriter | None = None
        self._reader: FrameReader | None = None
        self._bulk_writer: FrameWriter | None = None
        self._bulk_reader: FrameReader | None = None
        self._incoming, self._parts = Incoming(), Incoming(Landings(_LANDINGS_BYTES).take)
        self._welcome = None if isinstance(keys, tuple) else keys
        if isinstance(keys, tuple):
            self._use(keys)
        self._held_bulk: list[Outgoing] = []
        self._stashed_bytes = 0
        self._held: deque[tuple[int, bytes, Buffer, Held]] = deque()
        self._held_bytes = 0
        self._line: DelayLine[Message] | None = DelayLine(delay_s) if delay_s > 0 else None
        self._stash: deque[Message] = deque()
        self._sealed = sealed
        self._goodbye = False
        self._ended: TransportError | None = None
        self._clock = clock
        self._silence_ns = None if silence_s is None else round(silence_s * 1e9)
        self._heard_ns = self._beat_ns = self._listened_ns = self._began_ns = clock()
        self._watches = Watches(patience_s, _WAYS)
        self._look_every_ns = round(self._watches.every_s * 1e9)
        self._look_ns = self._began_ns + self._look_every_ns
        self._bulk_bytes = self._taken = self._assembled = 0
        self._staging: Staging | None = None

    # -- sending

    def send(self, meta: bytes, payload: Buffer | OnDevice = b"", *, kind: int = 0, bulk: bool = False) -> Ticket:
        """Queue one message; never blocks. `payload` must not change until the ticket is done. What has
        `__cuda_array_interface__` goes straight from the device where `takes_device` says so, else through the host.

        kind: 0 to 199. bulk: let everything else go first, and over a wide link over streams of its own; what has not
        left when the channel is closed may be lost. Raises ChannelClosed, ChannelBroken, or ValueError for a message
        that is too long.
        """
        if self._ended is not None:
            raise again(self._ended)
        if kind >= FIRST_INTERNAL_KIND:
            raise ValueError(f"kind {kind} belongs to the channel itself; use 0 to {FIRST_INTERNAL_KIND - 1}")
        if not isinstance(payload, (bytes, memoryview, bytearray)):
            return self._send_device(kind, meta, payload, bulk)
        if not bulk:
            return self._send(kind, meta, payload)
        source = Outgoing(self._bulk_writer, kind, meta, payload, self._clock)
        self._bulk_bytes += source.left_bytes
        if source.writer is None:
            self._held_bulk.append(source)
        else:
            self._send_bulk(source)
        return source

    def _send_device(self, kind: int, meta: bytes, payload: OnDevice, bulk: bool) -> Ticket:
        device = device_buffer(payload)
        if device is None:
            raise TypeError(f"{type(payload).__name__} has neither bytes nor __cuda_array_interface__")
        if self.takes_device and not bulk:
            self.staging.settle(device)
            return self._send(kind, meta, cast(Buffer, device))
        ticket = self.send(meta, self.staging.to_host(device), kind=kind, bulk=bulk)
        self.staging.lend(ticket)
        return ticket

    @property
    def takes_device(self) -> bool:
        """Whether memory of a device is sent, and may be received into, without passing through the host."""
        return not self._sealed and getattr(self._pipe, "takes_device", False)

    @property
    def staging(self) -> Staging:
        """What copies between host and device. Raises TransportError where there is no CUDA."""
        if self._staging is None:
            self._staging = CudaStaging()
        return self._staging

    @staging.setter
    def staging(self, staging: Staging) -> None:
        self._staging = staging

    def _send_bulk(self, source: Outgoing) -> None:
        try:
            self._pipe.send_bulk(source)
        except TransportError as error:
            source.cancel()
            raise type(error)(f"{self.name}: {error}") from None

    def _send(self, kind: int, meta: bytes, payload: Buffer) -> Ticket:
        if self._writer is None:
            held = Held()
            self._held_bytes += check_size(meta, payload)
            self._held.append((kind, meta, payload, held))
            return held
        if self._sealed and check_size(meta, payload) > CHUNK_BYTES:
            return self._send_parts(kind, meta, payload)
        now_ns = self._clock()
        self._beat_ns = now_ns
        try:
            ticket = self._pipe.send(self._writer.write(kind, meta, payload, now_ns))
        except TransportError as error:
            raise type(error)(f"{self.name}: {error}") from None
        self._writer.sent(ticket)
        return ticket

    def _send_parts(self, kind: int, meta: bytes, payload: Buffer) -> Ticket:
        """Seal a long message piece by piece, while what is sealed already leaves.

        Beyond a few pieces under way, the next one waits for them, but no longer than sealing took.
        """
        source = Outgoing(self._writer, kind, meta, payload, self._clock)
        pipe, clock, progress = self._pipe, self._clock, self.fabric.progress
        began_ns = clock()
        try:
            while (parts := source.pull_part()) is not None:
                source.sent(pipe.send(parts))
                progress()
                self._beat_ns = now_ns = clock()
                until_ns = 2 * now_ns - began_ns
                while pipe.pending_bytes > _PARTS_BYTES and now_ns < until_ns:
                    progress()
                    now_ns = clock()
                began_ns = clock()
        except TransportError as error:
            raise type(error)(f"{self.name}: {error}") from None
        return source

    def _use(self, keys: Keys) -> None:
        ours, theirs = keys
        self._writer, self._reader = FrameWriter(ours), FrameReader(theirs)
        self._bulk_writer, self._bulk_reader = FrameWriter(ours, BULK_LANE), FrameReader(theirs, BULK_LANE)

    def _begin(self, keys: Keys) -> None:
        """The neighbour has answered: send what was held."""
        self._use(keys)
        self._welcome = None
        held, self._held_bulk = self._held_bulk, []
        for source in held:
            source.writer = self._bulk_writer
            self._send_bulk(source)
        while self._held:
            kind, meta, payload, ticket = self._held.popleft()
            ticket.sent = self._send(kind, meta, payload)
        self._held_bytes = 0

    @property
    def pending_bytes(self) -> int:
        """Bytes sent that have not left yet. Send less, or wait, while this grows."""
        return self._held_bytes + self._pipe.pending_bytes

    @property
    def bulk_pending_bytes(self) -> int:
        """The same of bulk: what the link, or the other end's memory, has no room for yet."""
        return sum(source.left_bytes for source in self._held_bulk) + self._pipe.bulk_pending_bytes

    def allowance_s(self, size_bytes: int) -> float:
        """How long a message of `size_bytes`, and what waits before it, may take before something must be wrong."""
        waiting = self.pending_bytes + self.bulk_pending_bytes + size_bytes
        rate = max(self._watches.rate, self._pipe.bytes_per_s or 0.0)
        return allowance_s(waiting, self._pipe.least_rtt_s or 0.0, rate, self._watches.patience_s)

    @property
    def sealed(self) -> bool:
        """Whether frames are encrypted."""
        return self._sealed

    @property
    def established(self) -> bool:
        """True once the neighbour answered the hello (always true at the accepting end)."""
        return self._reader is not None

    # -- receiving

    def poll(self, kind: int | None = None) -> Message | None:
        """The next message without blocking, or None. kind: None for ordinary messages (0 to 127), or one lane."""
        if self._stash:
            found = self._unstash(kind)
            if found is not None:
                return found
        self.fabric.progress()
        return self._arrived(kind)

    def _arrived(self, kind: int | None) -> Message | None:
        """As `poll`, of what the fabric has brought in."""
        pull = self._pull if self._line is None else self._due
        while (message := pull()) is not None:
            if message.kind == kind or (kind is None and message.kind < FIRST_LANE_KIND):
                return message
            self._put_aside(message)
        return None

    def stashed(self, kind: int) -> Message | None:
        """As `poll` of a lane, among what has arrived but for which nobody asked; nothing more is taken in."""
        return self._unstash(kind) if self._stash else None

    def check(self) -> None:
        """Notice the end of the channel without taking a message: what a sender that waits calls.

        Raises ChannelClosed or ChannelBroken. Messages that arrive meanwhile are kept for `poll`.
        """
        message = self._pull() if self._line is None else self._due()
        if message is not None:
            self._put_aside(message)

    def _put_aside(self, message: Message) -> None:
        self._stash.append(message)
        self._stashed_bytes += message.payload.nbytes

    def receive(self, timeout_s: float | None = None, kind: int | None = None, *, size_bytes: int = 0) -> Message:
        """Wait for the next message: spin, then sleep.

        timeout_s: None for what a message of `size_bytes` may take on this link. Raises DeadlineExceeded after that;
        the channel lives on.
        """
        message = self.poll(kind)
        if message is not None:
            return message
        if timeout_s is None:
            timeout_s = self.allowance_s(size_bytes)
        deadline_ns = time.monotonic_ns() + round(timeout_s * 1e9)
        # What arrives while this polls is given at once; after `Fabric.wait` it takes another turn of the fabric.
        # Nothing here is looked at until something has moved: half a look is what a message waits for on average.
        progress, clock = self.fabric.progress, time.monotonic_ns
        spin_end_ns = min(deadline_ns, clock() + _SPIN_NS)
        while clock() < spin_end_ns:
            if (progress() or self._line is not None) and (message := self._arrived(kind)) is not None:
                return message
        while True:
            left_s = (deadline_ns - time.monotonic_ns()) / 1e9
            if left_s <= 0:
                raise DeadlineExceeded(f"{self.name}: nothing arrived within {timeout_s:g} s; it is overloaded or gone")
            due_s = self.due_s
            self.fabric.wait(left_s if due_s is None else min(left_s, due_s))
            message = self.poll(kind)
            if message is not None:
                return message

    def receive_into(self, buffer: Buffer | OnDevice, timeout_s: float | None = None) -> bytes:
        """Wait for the next message, put its payload into `buffer`, give its metadata. timeout_s: as in `receive`.

        Where `takes_device` says so, what has `__cuda_array_interface__` is received into without a copy on the host;
        if the wait then ends while the message arrives, the channel is aborted, because the memory is in use.

        Raises FrameError when the payload's size is not the buffer's; the channel is then aborted.
        """
        if not isinstance(buffer, (bytes, memoryview, bytearray)):
            return self._receive_into_device(buffer, timeout_s)
        target = flat(buffer)
        message = self.receive(timeout_s, size_bytes=target.nbytes)
        if message.payload.nbytes != target.nbytes:
            self.abort()
            raise FrameError(f"{self.name}: sent {message.payload.nbytes} bytes where {target.nbytes} were due")
        target[:] = message.payload
        return message.meta

    def _receive_into_device(self, buffer: OnDevice, timeout_s: float | None) -> bytes:
        device = device_buffer(buffer)
        if device is None:
            raise TypeError(f"{type(buffer).__name__} has neither bytes nor __cuda_array_interface__")
        pipe: Any = self._pipe
        lands = self.takes_device and self._line is None and not self._stash
        if lands:
            pipe.land(device)
        try:
            message = self.receive(timeout_s, size_bytes=device.nbytes)
        finally:
            if lands:
                pipe.land(None)
                if pipe.is_landing:
                    self.abort()
        if cast(Any, message.payload) is device:
            return message.meta
        if message.payload.nbytes != device.nbytes:
            self.abort()
            raise FrameError(f"{self.name}: sent {message.payload.nbytes} bytes where {device.nbytes} were due")
        self.staging.to_device(message.payload, device)
        return message.meta

    def _landed(self, data: Landed) -> tuple[memoryview, DeviceBuffer | None]:
        """A message that was received into a device: what of it is on the host, and the rest.

        A lane's or a piece of bulk was not the one that was waited for: it is brought to the host.
        """
        if kind_of(data.head) < FIRST_LANE_KIND:
            return data.head, data.payload
        return memoryview(bytearray(b"".join((data.head, self.staging.to_host(data.payload))))), None

    @property
    def due_s(self) -> float | None:
        """Seconds until `poll` has something to do although nothing arrives: a held message, a heartbeat. Or None."""
        due_ns = self._line.due_ns if self._line is not None else None
        if self._silence_ns is not None and self._ended is None:
            beat_ns = min(self._beat_ns + self._silence_ns // _BEATS, self._heard_ns + self._silence_ns)
            due_ns = beat_ns if due_ns is None else min(due_ns, beat_ns)
        return None if due_ns is None else max(0.0, (due_ns - self._clock()) / 1e9)

    def _unstash(self, kind: int | None) -> Message | None:
        for index, message in enumerate(self._stash):
            if message.kind == kind or (kind is None and message.kind < FIRST_LANE_KIND):
                del self._stash[index]
                self._stashed_bytes -= message.payload.nbytes
                return message
        return None

    def _due(self) -> Message | None:
        """The next message that has passed the delay line."""
        line, now_ns = self._line, self._clock()
        assert line is not None
        # The line is filled first, so that messages start to count when they arrive, then emptied of what is due.
        ended: TransportError | None = None
        try:
            while self._pull() is not None:
                pass
        except TransportError as error:
            ended = error
        message = line.take(now_ns)
        if message is None and ended is not None and not len(line):
            raise ended
        return message

    def _pull(self) -> Message | None:
        """The next message of the pipe. With a delay line it goes there, and what is returned says only that it was."""
        while True:
            if self._ended is not None:
                raise again(self._ended)
            try:
                data: Any = self._pipe.take(self._stashed_bytes < _STASH_BYTES)
            except TransportError as error:
                self._ended = self._named(error)
                continue
            if data is None:
                if self._silence_ns is not None:
                    self._beat()
                if (now_ns := self._clock()) >= self._look_ns:
                    self._look(now_ns)
                return None
            self._taken += 1
            device: DeviceBuffer | None = None
            try:
                if isinstance(data, Landed):
                    data, device = self._landed(data)
                if self._reader is None:
                    assert self._welcome is not None
                    self._begin(self._welcome(data))
                    continue
                frame: Frame | None
                claimed = kind_of(data)
                if claimed == FRAGMENT:
                    assert self._bulk_reader is not None
                    frame = self._incoming.add(self._bulk_reader.read(data, place=self._incoming.place))
                    self._assembled += frame is not None
                elif claimed == PART:
                    frame = self._parts.add(self._reader.read(data, place=self._parts.place))
                    self._assembled += frame is not None
                elif device is not None:
                    frame = self._reader.read(data, device.nbytes)._replace(payload=cast(memoryview, device))
                else:
                    frame = self._reader.read(data)
            except FrameError as error:
                self._pipe.abort()
                self._ended = ChannelBroken(f"{self.name}: {error}")
                raise again(self._ended) from None
            if self._silence_ns is not None:
                self._heard_ns = self._clock()
            if frame is None:
                continue
            kind, meta, payload, stamp_ns = frame
            if kind >= FIRST_INTERNAL_KIND:
                if kind == HEARTBEAT:
                    continue
                if kind == GOODBYE:
                    self._goodbye = True
                    continue
                self._pipe.abort()
                self._ended = ChannelBroken(f"{self.name}: sent a frame of unknown kind {kind}")
                raise again(self._ended)
            message = Message(kind, meta, payload)
            if self._line is not None:
                self._line.put(message, stamp_ns, self._clock())
            return message

    def _beat(self) -> None:
        """Called when the pipe is empty: send a heartbeat if one is due, and judge the neighbour's silence."""
        assert self._silence_ns is not None
        now_ns = self._clock()
        if now_ns - self._listened_ns > self._silence_ns // 2:
            self._heard_ns = now_ns  # this end was busy elsewhere: that was not the neighbour's silence
        self._listened_ns = now_ns
        if now_ns - self._heard_ns > self._silence_ns:
            self._pipe.abort()
            self._ended = ChannelBroken(f"{self.name}: silent for more than {self._silence_ns / 1e9:g} s")
            raise again(self._ended)
        if now_ns - self._beat_ns >= self._silence_ns // _BEATS and self._writer is not None:
            self._send(HEARTBEAT, b"", b"")

    def _look(self, now_ns: int) -> None:
        """Called now and then when the pipe is empty: whether all that is under way keeps to its deadline.

        Raises ChannelBroken where it does not, after telling the neighbour, if it can be told.
        """
        self._look_ns = now_ns + self._look_every_ns
        pipe, bulk = self._pipe, self.bulk_pending_bytes
        taking = self._stashed_bytes < _STASH_BYTES  # else nothing arrives because of this end
        missing = pipe.missing_bytes if taking else 0
        rest = self._incoming.waiting_bytes + self._parts.waiting_bytes if taking else 0
        grain = pipe.grain_bytes
        ways = (
            Way(pipe.pending_bytes, pipe.left_bytes, grain=grain),
            Way(bulk, self._bulk_bytes - bulk),
            Way(missing, -missing, self._taken, grain),
            Way(rest, -rest, self._assembled),
        )
        rtt_s = pipe.least_rtt_s or 0.0
        why = self._watches.late(now_ns * 1e-9, ways, rtt_s, pipe.bytes_per_s)
        if why is None and self._reader is None and (now_ns - self._began_ns) * 1e-9 > self.allowance_s(0):
            why = "it never answered the hello"
        if why is not None:
            pipe.abort()
            self._ended = ChannelBroken(f"{self.name}: {why}; the link or the neighbour stalls")
            raise again(self._ended)

    # -- the end

    def close(self) -> None:
        """Say goodbye behind what was sent, without waiting; what is held before the neighbour answered is dropped.

        Idempotent.
        """
        if self._ended is None:
            try:
                if self._writer is not None:
                    self._send(GOODBYE, b"", b"")
            except TransportError:
                pass  # it is gone: nobody to say goodbye to
            if self._ended is None:
                self._ended = ChannelClosed(f"{self.name}: closed at this end")
        self._drop()
        self._pipe.close()

    def abort(self) -> None:
        """Drop everything; the neighbour sees ChannelBroken. Idempotent."""
        if self._ended is None:
            self._ended = ChannelBroken(f"{self.name}: aborted at this end")
        self._drop()
        self._pipe.abort()

    def _drop(self) -> None:
        self._stash.clear()
        self._stashed_bytes = 0
        self._incoming, self._parts = Incoming(), Incoming()
        for source in self._held_bulk:
            source.cancel()
        self._held_bulk.clear()
        self._held.clear()
        self._held_bytes = 0
        if self._line is not None:
            self._line = DelayLine(self._line.delay_ns / 1e9)

    def _named(self, error: TransportError) -> TransportError:
        """The pipe's error under the neighbour's name. A sealed channel believes only a sealed goodbye."""
        kind = type(error)
        reason = str(error)
        if kind is ChannelClosed and self._sealed and not self._goodbye:
            kind, reason = ChannelBroken, f"ended without a sealed goodbye ({error})"
        if not self.established and kind is ChannelBroken:
            reason += "; it never answered the hello"
        return kind(f"{self.name}: {reason}")


def connect_channel(
    fabric: Fabric,
    address: bytes,
    *,
    name: str,
    key: bytes | None,
    hello: bytes,
    seal: bool = True,
    delay_s: float = 0.0,
    silence_s: float | None = None,
    patience_s: float = PATIENCE_S,
    clock: Clock = time.monotonic_ns,
    entropy: Entropy = os.urandom,
) -> Channel:
    """Begin a channel to an Acceptor that expects `hello`. Returns at once; messages may be sent right away, and leave
    once the neighbour has answered, which is seen when the channel is polled.

    name: the neighbour's, for errors. key: 32 bytes shared with the acceptor, by which the ends prove themselves and,
    with `seal`, seal what they send; None for neither. hello: names the channel, at most MAX_HELLO_BYTES, readable by
    anybody on the way. delay_s: emulated one-way delay of what arrives here. silence_s: break the channel when a
    neighbour that also has it set stays silent for longer while this end polls; None (off) where a neighbour may
    compute for long. patience_s: what the neighbour may take beside the time on the wire, before what is under way to
    or from it counts as stalled. Raises AddressError for a bad address.
    """
    random = entropy(RANDOM_BYTES)
    message = write_hello(hello, key, random, seal=seal)
    try:
        pipe = fabric.connect(address)
        pipe.send((message,))
    except TransportError as error:
        raise type(error)(f"{name}: {error}") from None

    def welcomed(data: memoryview) -> Keys:
        keys = read_welcome(data, message, key, random)
        return keys.connector, keys.acceptor

    return Channel(
        fabric,
        pipe,
        welcomed,
        name=name,
        delay_s=delay_s,
        silence_s=silence_s,
        patience_s=patience_s,
        sealed=key is not None and seal,
        clock=clock,
    )
