"""What the cache keeps: bits that stay true over kills and power cuts, and models within a limit, oldest out first."""

import fcntl
import hashlib
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.errors import ModelError, ModelMissing
from mesh.weights import have
from mesh.weights.cache import Cache, Occupant, victims
from mesh.weights.have import BlockMap, HaveFile, parse
from mesh.weights.manifest import BLOCK_BYTES, FileEntry, Manifest
from mesh.weights.presence import HAVE_FILE, Presence

ROOTS = st.binary(min_size=1, max_size=2)


def model(name, *sizes):
    """A manifest and the bytes of its blocks, one file of `sizes` blocks each."""
    files, blocks = [], []
    for number, size in enumerate(sizes):
        data = [bytes([number, block, ord(name[0]), 0]) * (BLOCK_BYTES // 4) for block in range(size)]
        data[-1] = data[-1][:100]
        length = (size - 1) * BLOCK_BYTES + 100
        files.append(FileEntry(f"f{number}", length, 0, b"".join(hashlib.sha256(each).digest() for each in data)))
        blocks += data
    return Manifest(name, tuple(files), ()), blocks


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 40), st.lists(st.integers(0, 39)), st.lists(st.integers(0, 39)))
def test_a_block_map_is_the_set_it_was_told(blocks, added, discarded):
    found, known = BlockMap(blocks), set()
    for block in added:
        if block < blocks:
            found.add(block)
            known.add(block)
        else:
            with pytest.raises(IndexError):
                found.add(block)
    for block in discarded:
        found.discard(block)
        known.discard(block)
    assert (set(found), len(found)) == (known, len(known))
    assert set(BlockMap(blocks, found.bits)) == known
    assert set(BlockMap(blocks, found.bits + b"\xff")) == known


@settings(max_examples=40, deadline=None)
@given(
    held=st.dictionaries(ROOTS, st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=6),
    need=st.integers(0, 20),
    limit=st.integers(0, 40),
    kept=st.sets(ROOTS, max_size=3),
)
def test_eviction_makes_room_takes_the_oldest_first_and_spares_what_is_kept(held, need, limit, kept):
    occupants = [Occupant(root, size, float(used)) for root, (size, used) in held.items()]
    chosen = victims(occupants, need, limit, kept)
    spared = sum(each.bytes for each in occupants if each.root in kept)
    if chosen is None:
        assert spared + need > limit
        return
    assert not kept & set(chosen)
    left = [each for each in occupants if each.root not in chosen]
    assert sum(each.bytes for each in left) + need <= limit
    used = {each.root: each.used_at for each in occupants}
    oldest = [each.used_at for each in left if each.root not in kept and each.bytes]
    assert all(used[root] <= other for root in chosen for other in oldest)


def test_what_was_written_is_there_after_a_kill(tmp_path):
    manifest, blocks = model("m", 3, 2)
    cached = Cache(tmp_path, lambda used: 1 << 40).open(manifest)
    assert cached.write(1, blocks[1]) and cached.write(4, blocks[4])
    # No close, no sync: what a killed process leaves.
    again = Cache(tmp_path, lambda used: 1 << 40).models[manifest.root]
    assert sorted(again.have) == [1, 4] and again.check() == 0
    assert again.read(1) == blocks[1] and again.read(0) is None
    assert (again.folder / "f0").stat().st_size == manifest.files[0].size


def test_a_block_that_is_not_what_its_hash_says_is_not_kept(tmp_path):
    manifest, blocks = model("m", 3)
    cached = Cache(tmp_path, lambda used: 1 << 40).open(manifest)
    assert not cached.write(0, blocks[1])
    assert not cached.write(0, blocks[0][:-1])
    assert 0 not in cached.have


def test_after_a_power_cut_only_what_its_hash_confirms_is_believed(tmp_path, monkeypatch):
    manifest, blocks = model("m", 3)
    cached = Cache(tmp_path, lambda used: 1 << 40).open(manifest)
    for block, data in enumerate(blocks):
        cached.write(block, data)
    with (cached.folder / "f0").open("r+b") as file:
        file.seek(BLOCK_BYTES)
        file.write(bytes(BLOCK_BYTES))  # the bit reached the disk, the block did not
    monkeypatch.setattr(have, "boot_id", lambda: b"another run of the machine")
    again = Cache(tmp_path, lambda used: 1 << 40).models[manifest.root]
    assert again.check() == 1
    assert sorted(again.have) == [0, 2]


@pytest.mark.parametrize("content", [b"", b"ISTHAVE1", b"nonsense" * 20])
def test_a_damaged_file_of_bits_counts_as_empty(tmp_path, content):
    (tmp_path / "have").write_bytes(content)
    assert len(HaveFile(tmp_path / "have", 30).map) == 0
    assert parse(content)[1] == b""


def test_a_full_cache_evicts_the_model_wanted_longest_ago_but_none_that_is_open(tmp_path):
    cache = Cache(tmp_path, lambda used: 5 * BLOCK_BYTES)
    made = []
    for number, name in enumerate(("eldest", "open", "new")):
        manifest, blocks = model(name, 2, 1)
        cached = cache.open(manifest)
        for block, data in enumerate(blocks):
            cached.write(block, data)
        os.utime(cached.home / HAVE_FILE, (1000 + number, 1000 + number))
        made.append(cached)
    old, opened, new = made
    os.utime(opened.home / HAVE_FILE, (1, 1))
    reader = Presence.of(opened.folder)
    wanted, _ = model("wanted", 7)
    assert cache.reserve(wanted, range(2)) == [old.manifest.root]
    cache.settle(wanted.root)
    assert not old.home.exists() and opened.home.exists() and new.home.exists()
    reader.close()
    assert cache.reserve(wanted, range(3)) == [opened.manifest.root]
    cache.settle(wanted.root)
    with pytest.raises(ModelError, match="raise weights_cache"):
        cache.reserve(wanted, range(6))


def test_a_hole_is_an_error_and_not_zeros_until_the_block_has_come(tmp_path):
    manifest, blocks = model("m", 3)
    cached = Cache(tmp_path, lambda used: 1 << 40).open(manifest)
    cached.write(0, blocks[0])
    reader = Presence.of(cached.folder)
    path = cached.folder / "f0"
    reader.check(path, 0, BLOCK_BYTES)
    with pytest.raises(ModelMissing, match="f0 is not here from MiB 0 on"):
        reader.check(path, BLOCK_BYTES - 1, 2)
    cached.write(1, blocks[1])
    reader.check(path, BLOCK_BYTES - 1, 2)
    with pytest.raises(ModelMissing):
        reader.check(cached.folder / "other", 0, 1)
    reader.close()


def test_a_folder_that_is_not_of_the_cache_is_read_as_ever(tmp_path):
    assert Presence.of(tmp_path) is None


def test_what_is_damaged_in_the_cache_is_removed_at_the_next_start(tmp_path):
    manifest, _ = model("m", 1)
    cached = Cache(tmp_path, lambda used: 1 << 40).open(manifest)
    (cached.home / "manifest").write_bytes(b"damaged")
    (tmp_path / "junk").mkdir()
    assert Cache(tmp_path, lambda used: 1 << 40).models == {}
    assert not cached.home.exists()


def test_the_lock_of_a_reader_goes_with_it(tmp_path):
    manifest, _ = model("m", 1)
    cache = Cache(tmp_path, lambda used: 1 << 40)
    cached = cache.open(manifest)
    reader = Presence.of(cached.folder)
    assert cache.in_use(manifest.root)
    reader.close()
    assert not cache.in_use(manifest.root)
    descriptor = os.open(cached.home / "lock", os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(descriptor)
