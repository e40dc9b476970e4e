"""What leaves a peer: messages gathered by address into sealed datagrams, and requests over reliable streams."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from mesh.gossip.codec import MAX_STREAM_MESSAGES, Codec
from mesh.gossip.config import MAX_MEMBERS

#: Streams under way at most; the rest counts as failed at once.
MAX_STREAMS = 64
#: Addresses whose site is remembered.
MAX_PLACES = 4 * MAX_MEMBERS


class Datagram(NamedTuple):
    """Bytes to be sent to "host:port"."""

    address: str
    data: bytes


class StreamRequest(NamedTuple):
    """Bytes to be asked of `site` at "host:port" over a reliable stream; the answer belongs to `token`."""

    address: str
    site: str
    data: bytes
    token: int


class Post:
    """See the module."""

    def __init__(self, codec: Codec, counters: Counter[str], *, head: Callable[[], bytes], streaming: bool) -> None:
        """`head()` is how every datagram starts, packed; `streaming`: somebody carries out `streams`."""
        self._codec = codec
        self._counters = counters
        self._head = head
        self._streaming = streaming
        self._outbox: dict[str, list[bytes]] = {}
        self._replies: list[Datagram] = []
        self._places: dict[str, str] = {}
        self._asking: list[StreamRequest] = []
        self._asked: dict[int, StreamRequest] = {}
        self._tokens = 0
        self.serving = False

    # ---------------------------------------------------------------- who is where, for the sealer

    def place(self, address: str, site: str) -> None:
        """Remember that a site is at an address."""
        if self._places.get(address) != site:
            if len(self._places) >= MAX_PLACES:
                self._places.clear()
            self._places[address] = site

    def site(self, address: str) -> str:
        """Who is at an address, "" where nobody is known to be."""
        return self._places.get(address, "")

    # ---------------------------------------------------------------- datagrams

    def queue(self, address: str, *packed: bytes) -> None:
        """Send these messages with the next datagrams. Without any, a datagram still takes along what travels."""
        self._outbox.setdefault(address, []).extend(packed)

    def reply(self, address: str, data: bytes) -> None:
        """Send a datagram as it is."""
        self._replies.append(Datagram(address, data))

    def discard(self) -> None:
        """Send nothing of what waits."""
        self._outbox, self._replies = {}, []

    def datagrams(self, now: float, ride: Callable[[int], list[bytes]]) -> list[Datagram]:
        """What is to be sent now. `ride(room)` gives packed messages that fill the last datagram to each address."""
        if not self._outbox and not self._replies:
            return []
        outbox, self._outbox = self._outbox, {}
        sent, self._replies = self._replies, []
        head = self._head()
        room = self._codec.room_bytes(head)
        for address, messages in outbox.items():
            load: list[bytes] = []
            left = room
            for message in messages:
                if len(message) > left and load:
                    sent.append(self._sealed(address, head, load, now))
                    load, left = [], room
                load.append(message)
                left -= len(message)
            load += ride(left)
            if load:
                sent.append(self._sealed(address, head, load, now))
        self._counters["sent"] += len(sent)
        self._counters["sent_bytes"] += sum([len(datagram.data) for datagram in sent])
        return sent

    def _sealed(self, address: str, head: bytes, load: list[bytes], now: float) -> Datagram:
        site = self._places.get(address, "")
        return Datagram(address, self._codec.join(head, load, address=address, site=site, now=now))

    # ---------------------------------------------------------------- streams

    def streams(self) -> list[StreamRequest]:
        """Requests to be made over reliable streams."""
        asking, self._asking = self._asking, []
        return asking

    def ask(self, address: str, site: str, packed: Iterable[bytes]) -> bool:
        """Queue a request over a stream, as much of it as goes into one. False: no streams, or too many under way."""
        if not self._streaming or len(self._asked) >= MAX_STREAMS:
            return False
        self._tokens += 1
        request = StreamRequest(address, site, self._stream(packed), self._tokens)
        self._asked[request.token] = request
        self._asking.append(request)
        self._counters["streams_asked"] += 1
        return True

    def asked(self, token: int) -> StreamRequest | None:
        """The request that an answer belongs to, once."""
        return self._asked.pop(token, None)

    @contextmanager
    def answering(self, address: str, answer: list[bytes]) -> Iterator[None]:
        """What is queued for `address` meanwhile is put into `answer`; what others are sent goes its own way."""
        outbox, self._outbox = self._outbox, {}
        self.serving = True
        try:
            yield
        finally:
            self.serving = False
            answer += self._outbox.pop(address, [])
            for other, messages in self._outbox.items():
                outbox.setdefault(other, []).extend(messages)
            self._outbox = outbox

    def answer(self, packed: Iterable[bytes]) -> bytes:
        """The answer to another's request, as much of it as goes into one."""
        return self._stream(packed)

    def _stream(self, packed: Iterable[bytes]) -> bytes:
        head = self._head()
        room_bytes = self._codec.stream_room_bytes(head)
        fitting: list[bytes] = []
        for message in packed:
            room_bytes -= len(message)
            if room_bytes < 0 or len(fitting) >= MAX_STREAM_MESSAGES:
                break
            fitting.append(message)
        return self._codec.join_stream(head, fitting)
