"""What a peer knows, as numbers small enough to compare over a datagram: the means of anti-entropy.

Every site has a *mark*, a hash of its incarnation and of the versions of its entries. A bucket holds the XOR of the
marks of the sites whose hashed names fall into it, and the whole is the XOR of all buckets, so a change of one site
costs the same in a mesh of three and of five thousand. Two peers whose wholes differ compare buckets (three bytes
each), then the rows of buckets that differ (ten bytes a site), and only then look at what really differs. This is a
Merkle tree of two levels; Dynamo (section 4.7) and Cassandra use deeper ones for larger sets. chitchat sends a digest
of everything each time instead, which outgrows its packet at some hundred sites.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, reduce
from hashlib import blake2b
from operator import xor

#: Of the hash of everything. Nobody gains by forging it: whoever could, holds what it stands for.
PRINT_BYTES = 8
#: Of a hashed name: with 8,192 sites two are the same once in eight million meshes.
NAME_BYTES = 6
#: Of a mark and of a bucket where they are compared. Should different things look the same, the next change tells.
MARK_BYTES = 4
BUCKET_BYTES = 3
ROW_BYTES = NAME_BYTES + MARK_BYTES
LEAVES = 256
#: Buckets compared by meshes up to so many sites: a bucket that differs then costs about eight to thirty rows.
LEVELS = ((64, 1), (256, 16), (1024, 64))


@lru_cache(maxsize=16_384)
def name_hash(site: str) -> bytes:
    """What stands for a site in rows. Its first byte tells the bucket."""
    return blake2b(site.encode(), digest_size=NAME_BYTES, person=b"site").digest()


def mark(site: str, incarnation: int, generation: int, versions: dict[str, int]) -> int:
    """The mark of a site: 64 bits over all that peers should agree on about it."""
    known = f"{incarnation} {generation} {sorted(versions.items())} {site}"
    return int.from_bytes(blake2b(known.encode(), digest_size=PRINT_BYTES).digest())


class Fingerprints:
    """The marks of all live sites, by bucket; and the names behind the hashes."""

    def __init__(self) -> None:
        """Empty."""
        self._marks: list[dict[bytes, int]] = [{} for _ in range(LEAVES)]
        self._leaves = [0] * LEAVES
        self._names: dict[bytes, str] = {}
        self._whole = 0
        self._count = 0

    def __len__(self) -> int:
        """Sites that have a mark."""
        return self._count

    def set(self, site: str, value: int | None) -> None:
        """`value` is the mark of the site now, None where it is known but not counted (dead, left)."""
        name = name_hash(site)
        self._names[name] = site
        self._put(name, value)

    def drop(self, site: str) -> None:
        """The site is not known any more."""
        name = name_hash(site)
        self._put(name, None)
        self._names.pop(name, None)

    def site(self, name: bytes) -> str | None:
        """Whose hashed name this is."""
        return self._names.get(name)

    def whole(self) -> bytes:
        """The hash of everything."""
        return self._whole.to_bytes(PRINT_BYTES)

    def level(self) -> int:
        """How many buckets a mesh of this size compares."""
        return next((count for most, count in LEVELS if self._count <= most), LEAVES)

    def buckets(self, count: int) -> bytes:
        """The hashes of `count` buckets, a power of two up to `LEAVES`, three bytes each."""
        width = LEAVES // count
        hashes = []
        for start in range(0, LEAVES, width):
            value = reduce(xor, self._leaves[start : start + width])
            hashes.append((value & 0xFFFFFF).to_bytes(BUCKET_BYTES))
        return b"".join(hashes)

    def differing(self, count: int, theirs: bytes) -> list[int]:
        """The buckets, of `count`, in which another peer's hashes differ from ours."""
        ours = self.buckets(count)
        return [
            number
            for number in range(count)
            if ours[number * BUCKET_BYTES : (number + 1) * BUCKET_BYTES]
            != theirs[number * BUCKET_BYTES : (number + 1) * BUCKET_BYTES]
        ]

    def rows(self, count: int, bucket: int) -> dict[bytes, bytes]:
        """Hashed name -> shortened mark of every site in a bucket."""
        width = LEAVES // count
        return {
            name: (value & 0xFFFFFFFF).to_bytes(MARK_BYTES)
            for leaf in self._marks[bucket * width : (bucket + 1) * width]
            for name, value in leaf.items()
        }

    def _put(self, name: bytes, value: int | None) -> None:
        leaf = self._marks[name[0]]
        old = leaf.pop(name, None)
        if old is not None:
            self._change(name[0], old)
            self._count -= 1
        if value is not None:
            leaf[name] = value
            self._change(name[0], value)
            self._count += 1

    def _change(self, number: int, value: int) -> None:
        self._leaves[number] ^= value
        self._whole ^= value


def split_rows(rows: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Hashed names and shortened marks, from the wire."""
    for start in range(0, len(rows), ROW_BYTES):
        yield rows[start : start + NAME_BYTES], rows[start + NAME_BYTES : start + ROW_BYTES]
