"""Which steps go to the next stage as bulk, so that others' tokens need not wait behind a prompt. Pure.

A chunk of a prompt may be megabytes of hidden states, a decoding step is kilobytes. As bulk the chunk lets everything
else pass, at some cost to its own first token. So a prompt travels as bulk only where another request decodes, and
where its chunks take the link for long.

Order holds within a priority and not between the two, so a prompt that began as bulk stays so to its last chunk,
however short that is. Its decoding steps may follow otherwise: the first is sent when its token has come round the
ring, and so when every chunk has been through every stage. What may overtake is its end, where somebody stops it: then
END says that more is to come, the receiver skips what comes, and a second END, which is bulk itself, is the last of it.
"""

from __future__ import annotations

import math
from typing import Final

from mesh.runtime.frames import Step

#: A chunk that is through sooner holds nobody up for long. 8 MiB, a chunk of a 70B model, take 67 ms at 1 Gbit/s: there
#: bulk spared others 0.15 to 0.2 s, and cost the first token up to 0.15 s where its sender computed meanwhile. At
#: 100 Mbit/s they take 0.7 s, and others were spared 1 to 2 s.
LONG_S: Final = 0.1


class Priorities:
    """The steps that one lead sends, over a link of so many bytes a second; 0 where nothing is to be bulk."""

    def __init__(self, bytes_per_s: float) -> None:
        self._long_bytes = LONG_S * bytes_per_s if bytes_per_s > 0 else math.inf
        self._bulk: set[int] = set()
        self._drawing: set[int] = set()
        self._decoding: set[int] = set()

    def bulk(self, step: Step, size_bytes: int) -> bool:
        """Whether this step, with hidden states of that size, goes as bulk. To be asked once for each, in order."""
        number = step.number
        if number in self._drawing:
            self._decoding.add(number)
            self._bulk.discard(number)
            return False
        if step.draw:
            self._drawing.add(number)
        if step.position == 0 and size_bytes >= self._long_bytes and self._decoding:
            self._bulk.add(number)
        return number in self._bulk

    def end(self, number: int) -> bool:
        """A request is over. Whether steps of it may still be on their way as bulk."""
        self._drawing.discard(number)
        self._decoding.discard(number)
        overtaken = number in self._bulk
        self._bulk.discard(number)
        return overtaken
