"""Sums of ranks of one host, over memory that they share: each has a board that it writes and the others read.

Everything goes in turns. In a turn a rank writes its board, says so by a counter, and waits until all others have said
the same; then it reads theirs. A board has two sides, used in turns: who writes a side again has seen everybody say
that the turn between is written, and so that this side has been read. No other locking is needed.

    short   one turn: every rank writes its tensor, and adds those of all
    long    pieces; in turn t every rank writes piece t, and the sum of its slice of piece t-1 over all ranks

Both add in the order of the ranks, as all algorithms of `transport.collectives` do. Sealed, what is on a board is
encrypted by its writer, under a key that the ranks told each other over their sealed channels, once for each who reads
it: whoever else can read this host's memory files sees nothing.

A rank that waits looks at the counter, then lets others have its core between looks, then sleeps until it is rung.
"""

from __future__ import annotations

import os
import struct
import time
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cryptography.exceptions import InvalidTag

from transport.base import ChannelBroken
from transport.seal import KEY_BYTES, TAG_BYTES, Seal
from transport.segment import DATA_AT, Attached, Segment, available, fence, pack, unpack
from transport.tensors import add_in_order, as_bytes, wide

if TYPE_CHECKING:
    import torch

#: A long tensor goes in pieces of this size. Measured for 2 to 4 ranks on two cores: a quarter takes twice as long, as
#: each piece costs some 50 us of Python and of waiting; with four times as much the boards fall out of the cache.
PIECE_BYTES = 1 << 20
#: Up to here one turn costs less than two, although every rank then adds everything: measured as above.
SHORT_BYTES = 128 << 10
#: Nonces tell the receiver by one byte, of which one value means everybody.
MOST_RANKS = 200
_EVERYBODY = 255

#: Words of 8 bytes at the beginning of a segment, each in a cache line of its own where others wait for it: turns
#: written; whether the owner sleeps; and for both sides, what the turn was.
_TURN, _ASLEEP, _WHAT = 0, 8, 16

#: Looks before others are let on the core, and between looks at the clock.
_LOOKS, _YIELDS = 40, 16
_CODE = struct.Struct("<Q")

#: Called with the rank that is waited for when it has not come for a while: sleeps a while, or raises.
Pause = Callable[[int], None]


class BoardUnavailable(Exception):
    """The ranks cannot share memory: they exchange messages instead. One line: why."""


@dataclass(slots=True)
class _Side:
    """A short tensor's place on one side of all boards: where ours is written, and all ranks' as tensors."""

    own: torch.Tensor
    parts: list[torch.Tensor]
    sealed: tuple[memoryview, memoryview] | None
    opened: list[tuple[Seal, memoryview, memoryview]]


@dataclass(slots=True)
class _Short:
    """What a turn with a short tensor needs, made once for each shape and dtype. `plain`: added as it is."""

    code: int
    header: bytes
    plain: bool
    sides: list[_Side]


class Board:
    """The boards of all ranks, seen from one. Made by each, then `join` with everybody's offers.

    Every rank calls the same operations in the same order; one that does not is found out. spin_s: how long a rank
    waits awake. Raises BoardUnavailable where this host cannot.
    """

    def __init__(self, rank: int, size: int, *, seal: bool, spin_s: float) -> None:
        if not available() or size > MOST_RANKS:
            raise BoardUnavailable("no shared memory of this kind on this machine, or too many ranks")
        self.rank, self.size = rank, size
        self._key = os.urandom(KEY_BYTES) if seal else None
        self._spin_s = spin_s
        #: Of a side: a piece in slices, each with its tag, and behind it one slice's sum.
        self._piece = PIECE_BYTES
        self._sums_at = -(-(PIECE_BYTES + size * 2 * TAG_BYTES) // 4096) * 4096
        self._side_bytes = self._sums_at + -(-(PIECE_BYTES // size + TAG_BYTES + 64) // 4096) * 4096
        try:
            self.segment = Segment(2 * self._side_bytes)
        except OSError as error:
            raise BoardUnavailable(f"no segment of memory: {error}") from None
        self._words = self.segment.memory[:DATA_AT].cast("Q")
        self._turn = 0
        self._others: list[tuple[int, memoryview, Attached]] = []
        self._keys: dict[int, bytes] = {}
        self._short: dict[tuple[torch.dtype, torch.Size], _Short] = {}
        self._rooms: list[list[torch.Tensor]] = []
        self._memories: list[list[memoryview]] = []

    # -- meeting

    def offer(self) -> bytes:
        """What each other rank needs, to be sent over a channel that keeps a secret where this board is sealed."""
        key = None if self._key is None else self._key.hex()
        return pack({**self.segment.offer(), "key": key})

    def join(self, offers: Sequence[bytes]) -> None:
        """Attach to the boards of all ranks, given their offers in order. Raises BoardUnavailable."""
        import torch

        self._add_two = torch.add
        attached: dict[int, Attached] = {}
        try:
            for rank, data in enumerate(offers):
                if rank == self.rank:
                    continue
                offer = unpack(data)
                if (offer.get("key") is None) != (self._key is None):
                    raise ValueError("one rank seals and another does not")
                if self._key is not None:
                    self._keys[rank] = bytes.fromhex(str(offer["key"]))
                attached[rank] = Attached(offer, self.segment.size)
        except (OSError, ValueError) as error:
            for other in attached.values():
                other.close()
            raise BoardUnavailable(f"rank {rank}: {error}") from None
        self._others = [(rank, other.memory[:DATA_AT].cast("Q"), other) for rank, other in attached.items()]
        memories = [self.segment.memory if rank == self.rank else attached[rank].memory for rank in range(self.size)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that others' boards are not for us to write is the intention
            self._rooms = [
                [
                    torch.frombuffer(memory, dtype=torch.uint8, offset=DATA_AT + side * self._side_bytes)[
                        : self._side_bytes
                    ]
                    for memory in memories
                ]
                for side in range(2)
            ]
        self._memories = [
            [memory[DATA_AT + side * self._side_bytes :][: self._side_bytes] for memory in memories]
            for side in range(2)
        ]
        if self._key is not None:
            self._open_seals()

    def _open_seals(self) -> None:
        """For each pair of ranks and direction a seal, and one from each to everybody, in nonces that never meet."""
        assert self._key is not None
        self._to = {rank: Seal(self._key, lane=rank) for rank, _, _ in self._others}
        self._to_all = Seal(self._key, lane=_EVERYBODY)
        self._from = {rank: Seal(key, lane=self.rank) for rank, key in self._keys.items()}
        self._from_all = {rank: Seal(key, lane=_EVERYBODY) for rank, key in self._keys.items()}

    def close(self) -> None:
        """Release the descriptors and the memory. Idempotent."""
        self.segment.close()
        for _, _, other in self._others:
            other.close()
        # A mapping keeps a descriptor of its file for as long as there is a view of it.
        self._words = memoryview(b"")
        self._others, self._rooms, self._memories = [], [], []
        self._short.clear()

    # -- operations

    def all_reduce_(self, tensor: torch.Tensor, pause: Pause) -> None:
        """Replace `tensor`, on the CPU, by the sum over all ranks. Raises ChannelBroken, and what `pause` raises."""
        kept = self._short.get((tensor.dtype, tensor.shape))
        if kept is None:
            nbytes = tensor.numel() * tensor.element_size()
            if nbytes > SHORT_BYTES:
                self._long(tensor, nbytes, pause)
                return
            kept = self._remember(tensor, nbytes)
        turn = self._turn + 1
        side = kept.sides[turn & 1]
        side.own.copy_(tensor)
        if side.sealed is not None:
            self._to_all.seal_into(side.sealed[0], kept.header, side.sealed[1])
        self._say(turn, kept.code)
        self._hear(turn, kept.code, pause)
        for seal, room, plain in side.opened:
            _open(seal, room, kept.header, plain)
        parts = side.parts
        if not kept.plain:
            add_in_order(parts, tensor)
            return
        self._add_two(parts[0], parts[1], out=tensor)
        for part in parts[2:]:
            tensor.add_(part)

    def broadcast_(self, tensor: torch.Tensor, root: int, pause: Pause) -> None:
        """Replace `tensor`, contiguous and on the CPU, by the root's. Raises as `all_reduce_`."""
        flat = tensor.view(-1)
        step = self._piece // tensor.element_size()
        for at in range(0, max(1, flat.numel()), step):
            piece = flat[at : at + step]
            nbytes = piece.numel() * piece.element_size()
            code = _code(2 + root, tensor, nbytes)
            turn = self._turn + 1
            room = self._memories[turn & 1][root][: nbytes + (TAG_BYTES if self._key else 0)]
            data = as_bytes(piece)
            if self.rank == root:
                if self._key is None:
                    room[:] = data
                else:
                    self._to_all.seal_into(data, _CODE.pack(code), room)
            self._say(turn, code)
            self._hear(turn, code, pause)
            if self.rank != root:
                if self._key is None:
                    data[:] = room
                else:
                    _open(self._from_all[root], room, _CODE.pack(code), data)

    # -- the two ways

    def _remember(self, tensor: torch.Tensor, nbytes: int) -> _Short:
        """Views for tensors of this shape and dtype, made once: a decode step brings the same ones all the time."""
        import torch

        if len(self._short) >= 64:
            self._short.clear()
        sides = []
        for rooms, memories in zip(self._rooms, self._memories, strict=True):

            def seen(room: torch.Tensor) -> torch.Tensor:
                return room[:nbytes].view(tensor.dtype).view(tensor.shape)

            if self._key is None:
                parts = [seen(room) for room in rooms]
                sides.append(_Side(parts[self.rank], parts, None, []))
                continue
            plains = [torch.empty(nbytes, dtype=torch.uint8) for _ in range(self.size)]
            parts = [seen(plain) for plain in plains]
            views = [as_bytes(plain) for plain in plains]
            sealed = [memory[: nbytes + TAG_BYTES] for memory in memories]
            opened = [(self._from_all[rank], sealed[rank], views[rank]) for rank, _, _ in self._others]
            sides.append(_Side(parts[self.rank], parts, (views[self.rank], sealed[self.rank]), opened))
        code = _code(1, tensor, nbytes)
        kept = _Short(code, _CODE.pack(code), wide(tensor.dtype) == tensor.dtype, sides)
        self._short[tensor.dtype, tensor.shape] = kept
        return kept

    def _long(self, tensor: torch.Tensor, nbytes: int, pause: Pause) -> None:
        import torch

        flat = tensor.view(-1) if tensor.is_contiguous() else tensor.contiguous().view(-1)
        code = _code(0, tensor, nbytes)
        pieces = torch.split(flat, self._piece // tensor.element_size())
        before: Sequence[torch.Tensor] = ()
        for piece in (*pieces, None):
            turn = self._turn + 1
            slices = () if piece is None else torch.tensor_split(piece, self.size)
            if piece is not None:
                self._write(turn & 1, slices, code)
            if before:
                self._add(turn & 1, before, code)
            self._say(turn, code)
            self._hear(turn, code, pause)
            if before:
                self._collect(turn & 1, before, code)
            before = slices
        if flat.data_ptr() != tensor.data_ptr():
            tensor.copy_(flat.view(tensor.shape))

    def _write(self, side: int, slices: Sequence[torch.Tensor], code: int) -> None:
        """Our piece on our board, slice by slice."""
        at = 0
        for rank, part in enumerate(slices):
            nbytes = part.numel() * part.element_size()
            if rank == self.rank:
                pass  # nobody else reads it
            elif self._key is None:
                self._place(side, self.rank, at, part).copy_(part)
            else:
                room = self._memories[side][self.rank][at : at + nbytes + TAG_BYTES]
                self._to[rank].seal_into(as_bytes(part), _CODE.pack(code), room)
            at = _after(at, nbytes)

    def _add(self, side: int, slices: Sequence[torch.Tensor], code: int) -> None:
        """The sum of our slice of the piece before, which lies on the other side: into place, and on our board."""
        import torch

        at = 0
        for part in slices[: self.rank]:
            at = _after(at, part.numel() * part.element_size())
        own = slices[self.rank]
        nbytes = own.numel() * own.element_size()
        parts = []
        for rank in range(self.size):
            if rank == self.rank:
                parts.append(own)
            elif self._key is None:
                parts.append(self._place(side ^ 1, rank, at, own))
            else:
                plain = torch.empty_like(own)
                room = self._memories[side ^ 1][rank][at : at + nbytes + TAG_BYTES]
                _open(self._from[rank], room, _CODE.pack(code), as_bytes(plain))
                parts.append(plain)
        add_in_order(parts, own)
        if self._key is None:
            self._place(side, self.rank, self._sums_at, own).copy_(own)
        else:
            room = self._memories[side][self.rank][self._sums_at : self._sums_at + nbytes + TAG_BYTES]
            self._to_all.seal_into(as_bytes(own), _CODE.pack(code), room)

    def _collect(self, side: int, slices: Sequence[torch.Tensor], code: int) -> None:
        """The sums of the others' slices, from their boards into place."""
        for rank, _, _ in self._others:
            part = slices[rank]
            if self._key is None:
                part.copy_(self._place(side, rank, self._sums_at, part))
            else:
                nbytes = part.numel() * part.element_size()
                room = self._memories[side][rank][self._sums_at : self._sums_at + nbytes + TAG_BYTES]
                _open(self._from_all[rank], room, _CODE.pack(code), as_bytes(part))

    def _place(self, side: int, rank: int, at: int, like: torch.Tensor) -> torch.Tensor:
        """A rank's board from `at` on, as a tensor like `like`."""
        return self._rooms[side][rank][at : at + like.numel() * like.element_size()].view(like.dtype)

    # -- turns

    def _say(self, turn: int, code: int) -> None:
        """Our side of this turn is written."""
        words = self._words
        words[_WHAT + (turn & 1)] = code
        fence()
        words[_TURN] = self._turn = turn
        fence()
        for _, theirs, other in self._others:
            if theirs[_ASLEEP]:
                other.ring()

    def _hear(self, turn: int, code: int, pause: Pause) -> None:
        """Wait until all others have written theirs, and see that they mean the same."""
        for rank, words, _ in self._others:
            for _ in range(_LOOKS):
                if words[_TURN] >= turn:
                    break
            else:
                self._wait(rank, words, turn, pause)
            if words[_WHAT + (turn & 1)] != code:
                raise ChannelBroken(
                    f"rank {rank} called another collective than this one; the shards run different code"
                )

    def _wait(self, rank: int, words: memoryview, turn: int, pause: Pause) -> None:
        end = time.perf_counter() + self._spin_s
        while True:
            for _ in range(_YIELDS):
                os.sched_yield()
                if words[_TURN] >= turn:
                    return
            if time.perf_counter() >= end:
                break
        while True:
            self._words[_ASLEEP] = 1
            fence()
            try:
                if words[_TURN] >= turn:
                    return
                pause(rank)
            finally:
                self._words[_ASLEEP] = 0
            if words[_TURN] >= turn:
                return


def _open(seal: Seal, room: memoryview, header: bytes, plain: memoryview) -> None:
    try:
        seal.open_into(room, header, plain)
    except InvalidTag:
        raise ChannelBroken("the seal of another rank's board does not hold: tampered with, or not in step") from None


def _code(operation: int, tensor: torch.Tensor, nbytes: int) -> int:
    """What a turn is about, in 64 bits: the ranks have to agree on it."""
    return (nbytes & 0xFFFFFFFF) << 32 | zlib.crc32(f"{operation} {tensor.dtype} {nbytes}".encode())


def _after(at: int, nbytes: int) -> int:
    """Where the next slice begins: behind a tag, aligned for any dtype."""
    return at + -(-(nbytes + TAG_BYTES) // 16) * 16
