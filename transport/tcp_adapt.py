"""How the streams of bulk follow their link: how many, how fast, how long a piece, which congestion control."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING

from transport.bulk import PIECE_BYTES
from transport.pace import Pace
from transport.tcp_info import TcpInfo
from transport.tcp_stream import LEAST_PIECE_BYTES, UNPACED, BulkStream

if TYPE_CHECKING:
    from transport.tcp_streams import Bundle

FIRST_STREAMS, MOST_STREAMS = 8, 32
#: What one connection carries in a round trip: half of Linux's least default for a send buffer, 4 MiB, holds data.
_STREAM_WINDOW_BYTES = 2 << 20
#: Beyond this share of so many segments sent again, a loss more than the window is what limits a stream.
_LOSSY, _SEGMENTS = 0.003, 1000
#: Without a loss for so long, a stream loses nothing. BBR pauses after 10 s.
_STEADY_S = 4.0
#: Losses behind a queue are congestion, which more streams make worse; they are told of for a while after it.
_QUEUE_S, _SETTLED_S = 3e-3, 1.0
#: A piece takes a stream this long at most, or the last ones of a message would be waited for.
_PIECE_S = 0.1
_TICK_S, _LOOK_S, _LOOKS = (0.02, 0.25), 0.01, 4
_URGENT_S = 5.0
#: A hello and a welcome are nobody's tokens.
_HANDSHAKE = 2


class Adapting:
    """What is known of the link that a bundle's streams go over, and what follows from it."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self.pace = Pace()
        #: What all streams together deliver, bytes a second.
        self.bytes_per_s = 0.0
        self._paced: tuple[int, int] | None = None
        self._urgent_at = -math.inf
        self._urgent_seen = _HANDSHAKE
        self._tick_at = self._look_at = 0.0
        self._seen_s: deque[float] = deque(maxlen=_LOOKS)
        self._acked: tuple[float, dict[BulkStream, int]] = (0.0, {})
        self._segments = (0, 0)
        self._full_at = -math.inf
        self._lost = (time.monotonic(), 0)
        self._more_at = 0.0

    def begin(self) -> None:
        """There is bulk to send, and was none."""
        self._tick_at = self._look_at = 0.0
        if self._count_urgent(time.monotonic()):
            info = self._bundle.first_info()
            self.pace.begin(0.0 if info is None else info.bytes_per_s)
            self._apply()

    def wait(self, until: float) -> None:
        """No further streams before then."""
        self._more_at = until

    def may_grow(self, now: float) -> bool:
        """Whether further streams may be asked for again."""
        return now >= self._more_at

    def tick(self, now: float) -> None:
        """Look at the link some times a round trip, and once a round trip settle how many streams, how long a piece,
        how fast.
        """
        bundle = self._bundle
        if now < self._look_at or not bundle.sending:
            return
        first = bundle.first_info()
        if first is None:
            self._look_at = now + _TICK_S[1]
            return
        infos = {stream: info for stream in bundle.streams if stream.open and (info := stream.info()) is not None}
        least_s = min([first.min_rtt_s, *(info.min_rtt_s for info in infos.values() if info.min_rtt_s > 0)])
        trip_s = min(_TICK_S[1], max(_TICK_S[0], least_s))
        self._look_at = now + max(_LOOK_S, trip_s / _LOOKS)
        if infos:
            rtts = sorted(info.rtt_s for info in infos.values())
            self._seen_s.append(rtts[len(rtts) // 4])
        if now < self._tick_at:
            return
        self._tick_at = now + trip_s
        if not (bundle.streams or bundle.wide(least_s)):
            return
        since, before = self._acked
        self._acked = (now, {stream: info.acked_bytes for stream, info in infos.items()})
        acked = sum(info.acked_bytes - before.get(stream, 0) for stream, info in infos.items())
        delivered = acked / max(now - since, 1e-3) if since else 0.0
        self.bytes_per_s += 0.3 * (delivered - self.bytes_per_s)
        urgent = self._count_urgent(now)
        if infos and since:
            # A queue stays for a round trip; a machine that was busy for a moment is no queue.
            self.pace.tick(now, rtt_s=min(self._seen_s), least_rtt_s=least_s, delivered=delivered, urgent=urgent)
        self._apply()
        again = sum(info.retransmitted for info in infos.values())
        if again != self._lost[1]:
            self._lost = (now, again)
        for stream, info in infos.items():
            stream.steady(self.pace.rate is not None and now - self._lost[0] > _STEADY_S)
            own = (info.acked_bytes - before.get(stream, info.acked_bytes)) / max(now - since, 1e-3)
            stream.piece_bytes = round(min(PIECE_BYTES, max(LEAST_PIECE_BYTES, own * _PIECE_S)))
        self._grow(now, least_s, infos, again)

    def _count_urgent(self, now: float) -> bool:
        seen = self._bundle.small_messages
        if seen > self._urgent_seen:
            self._urgent_seen = seen
            self._urgent_at = now
        return now - self._urgent_at < _URGENT_S

    def _apply(self) -> None:
        carrying = [stream for stream in self._bundle.streams if stream.open]
        rate = self.pace.rate
        each = UNPACED if rate is None or not carrying else min(UNPACED - 1, max(1, int(rate / len(carrying))))
        if self._paced == (each, len(carrying)):
            return
        self._paced = (each, len(carrying))
        for stream in carrying:
            stream.limit(each)

    def _grow(self, now: float, least_s: float, infos: Mapping[BulkStream, TcpInfo], again: int) -> None:
        """`again`: segments that were sent again, in all."""
        if not self.may_grow(now) or any(stream.connecting for stream in self._bundle.streams):
            return
        have = len(self._bundle.streams)
        sent = sum(info.sent_segments for info in infos.values())
        queue_s = min((info.rtt_s for info in infos.values()), default=0.0) - least_s
        if queue_s > max(_QUEUE_S, 0.1 * least_s):
            # The link is full, whatever the windows: more streams would only lengthen the queue.
            self._full_at = now
        if now - self._full_at < _SETTLED_S + 4 * least_s:
            self._segments = (sent, again)  # a queue that ran over, and not the way, may have lost them
            if now == self._full_at:
                return
        lossy = False
        if sent - self._segments[0] >= _SEGMENTS:
            lossy = again - self._segments[1] > _LOSSY * (sent - self._segments[0])
            self._segments = (sent, again)
        want = max(FIRST_STREAMS, math.ceil(self.bytes_per_s * least_s / _STREAM_WINDOW_BYTES))
        if lossy:
            want = max(want, 2 * have)
        if want > have:
            want = min(max(want, 2 * have), MOST_STREAMS)  # few steps: each new stream starts slowly
        if want > have and self._bundle.open(want):
            self.wait(now + 4 * least_s)
