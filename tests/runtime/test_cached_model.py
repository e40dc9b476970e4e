"""A model of which only a shard's blocks are there loads as the whole one does, and says where a block is missing."""

import pytest
import torch
from small_models import COLUMNS, FAMILIES, LAYERS, VOCAB, build, shards, whole

from mesh.errors import ModelMissing
from mesh.runtime.checkpoint import Safetensors
from mesh.runtime.stage import StageModel
from mesh.weights.cache import Cache
from mesh.weights.ranges import spans, wanted
from mesh.weights.scan import scan


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """By family, once: a folder with random weights."""
    kept = {}

    def get(name):
        if name not in kept:
            kept[name] = tmp_path_factory.mktemp("model")
            build(name).save_pretrained(kept[name])
        return kept[name]

    return get


def cuts(path):
    """The unequal shards of two stages."""
    first = whole(path, stage=0, stages=2, end=2)
    last = whole(path, stage=1, stages=2, start=2, end=LAYERS)
    return [
        *shards(first, cuts=[0, 2, 3], columns=[0, 50, COLUMNS], vocabulary=[0, 0, 0]),
        *shards(last, cuts=[0, 1, 3], columns=[0, 10, COLUMNS], vocabulary=[0, 40, VOCAB]),
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_shard_reads_no_byte_that_was_not_foreseen(folder, name, monkeypatch):
    path = folder(name)
    manifest = scan(path, "m")
    read = []
    pread = Safetensors._pread

    def watched(self, stored, into, offset):
        read.append((stored.offset + offset, len(into)))
        pread(self, stored, into, offset)

    monkeypatch.setattr(Safetensors, "_pread", watched)
    for part in cuts(path):
        read.clear()
        StageModel.load(part, general=not FAMILIES[name][2])
        foreseen = sorted((start, end) for _, start, end in spans(manifest, part))
        for start, length in read:
            assert any(low <= start and start + length <= high for low, high in foreseen), (name, part, start)
        assert sum(length for _, length in read) >= 0.95 * sum(high - low for low, high in foreseen)


def test_a_shard_loads_from_a_cache_that_holds_its_blocks_alone(folder, tmp_path):
    path = folder("llama with biases")
    manifest = scan(path, "m")
    cached = Cache(tmp_path, lambda used: 1 << 40).open(manifest)
    part = whole(str(cached.folder))
    with pytest.raises(Exception, match=r"damaged or truncated|config"):
        StageModel.load(part)
    for block in wanted(manifest, None):
        file, offset, length = manifest.place(block)
        with (path / manifest.files[file].name).open("rb") as source:
            source.seek(offset)
            assert cached.write(block, source.read(length))
    if len(cached.have) < manifest.blocks:
        with pytest.raises(ModelMissing, match="is not here"):
            StageModel.load(part)
    for block in wanted(manifest, part):
        file, offset, length = manifest.place(block)
        with (path / manifest.files[file].name).open("rb") as source:
            source.seek(offset)
            cached.write(block, source.read(length))
    ours = StageModel.load(part).forward("r", 0, tokens=[1, 2, 3])
    torch.testing.assert_close(ours, StageModel.load(whole(path)).forward("r", 0, tokens=[1, 2, 3]))
