"""What names a model: the same bytes give the same root, and nothing that was changed on the way is believed."""

import json
import struct

import msgpack
import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from mesh.errors import ModelError
from mesh.weights.manifest import BLOCK_BYTES, FileEntry, Manifest, TensorEntry, blocks_in, safe_name
from mesh.weights.scan import remember, remembered, scan


def folder(path, rows=700):
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"num_attention_heads": 8, "num_key_value_heads": 4}))
    (path / "tokenizer.json").write_text("{}")
    (path / "notes.pdf").write_bytes(b"private")
    tensors = {f"model.layers.{i}.self_attn.q_proj.weight": numpy.full((rows, 512), i, numpy.float32) for i in range(3)}
    save_file(tensors, path / "model.safetensors")
    return path


def test_the_same_files_have_the_same_root_and_another_byte_gives_another(tmp_path):
    first, second = scan(folder(tmp_path / "a"), "m"), scan(folder(tmp_path / "b"), "another name")
    assert first.root == second.root
    path = tmp_path / "b" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert scan(tmp_path / "b", "m").root != first.root


def test_only_weights_settings_and_vocabularies_are_in_it(tmp_path):
    manifest = scan(folder(tmp_path / "a"), "m")
    assert [file.name for file in manifest.files] == ["model.safetensors", "config.json", "tokenizer.json"]
    assert (manifest.heads, manifest.kv_heads) == (8, 4)
    assert [tensor.rows for tensor in manifest.tensors] == [700] * 3


def test_every_block_fits_its_hash_and_no_other_does(tmp_path):
    path = folder(tmp_path / "a")
    manifest = scan(path, "m")
    data = (path / "model.safetensors").read_bytes()
    assert manifest.blocks == blocks_in(len(data)) + 2
    for block in range(blocks_in(len(data))):
        part = data[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
        assert manifest.fits(block, part)
        assert not manifest.fits(block, part[:-1])
        assert not manifest.fits(block, bytes([part[0] ^ 1]) + part[1:])


def test_what_was_read_once_is_read_again_only_when_a_file_changed(tmp_path):
    path, kept = folder(tmp_path / "a"), tmp_path / "kept"
    assert remembered(kept, path) is None
    manifest = scan(path, "m")
    remember(kept, path, manifest)
    assert remembered(kept, path) == manifest
    (path / "config.json").write_text('{"num_key_value_heads": 2}')
    assert remembered(kept, path) is None


@pytest.mark.parametrize("damage", [b"", b"\xff" * 20, struct.pack("<Q", 1 << 60)])
def test_a_file_that_is_no_model_is_an_error_of_one_line(tmp_path, damage):
    path = folder(tmp_path / "a")
    (path / "model.safetensors").write_bytes(damage)
    with pytest.raises(ModelError) as caught:
        scan(path, "m")
    assert "\n" not in str(caught.value)


def example():
    return Manifest("m", (FileEntry("w", BLOCK_BYTES + 5, 9, b"d" * 64),), (TensorEntry("t", 0, 9, 40, 4),), 4, 2)


def test_a_manifest_survives_its_encoding_and_is_refused_under_another_root():
    manifest = example()
    assert Manifest.decode(manifest.encoded, manifest.root, "m") == manifest
    with pytest.raises(ModelError, match="another's"):
        Manifest.decode(manifest.encoded, bytes(32), "m")


names = st.sampled_from(["w", "../w", "/etc/passwd", "", ".hidden", "a/b", 7, None])
numbers = st.sampled_from([0, 1, 5, -1, BLOCK_BYTES, 1 << 62, 1.5, None, "3"])


@settings(max_examples=50, deadline=None)
@given(name=names, size=numbers, head=numbers, digests=st.sampled_from([b"", b"d" * 32, b"d" * 33, None]), at=numbers)
def test_a_hostile_manifest_is_refused_in_one_way(name, size, head, digests, at):
    import hashlib

    document = [1, BLOCK_BYTES, [[name, size, head, digests]], [["t", 0, at, 1, 1]], 0, 0]
    data = msgpack.packb(document)
    try:
        manifest = Manifest.decode(data, hashlib.sha256(data).digest(), "m")
    except ModelError:
        return
    assert all("/" not in file.name and not file.name.startswith(".") for file in manifest.files)
    assert all(0 <= tensor.offset < manifest.files[0].size for tensor in manifest.tensors)


@given(st.text(max_size=300))
@settings(max_examples=50, deadline=None)
def test_any_name_becomes_one_of_a_folder(name):
    made = safe_name(name)
    assert made and "/" not in made and not made.startswith(".") and len(made) <= 120
