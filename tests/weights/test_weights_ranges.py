"""Which bytes a shard needs: everything the loader reads, and of what is cut by rows no more than that."""

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.weights.manifest import BLOCK_BYTES, FileEntry, Manifest, TensorEntry
from mesh.weights.near import nearest
from mesh.weights.ranges import layer_of, layers_present, spans, wanted
from topology.snapshot import Link

LAYERS, HEADS, KV, WIDTH, COLUMNS, VOCAB = 4, 8, 4, 64, 96, 200
NAMES = {
    "transformers": ("model.layers.{}.self_attn.{}_proj.weight", "model.layers.{}.mlp.{}_proj.weight",
                     "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"),
    "llama.cpp": ("blk.{}.attn_{}.weight", "blk.{}.ffn_{}.weight", "token_embd.weight", "output.weight",
                  "output_norm.weight"),
}  # fmt: skip


def manifest(style="transformers", *, tied=False):
    attention, mlp, embedding, head, norm = NAMES[style]
    shapes = [(embedding, VOCAB)]
    for layer in range(LAYERS):
        shapes += [(attention.format(layer, name), rows) for name, rows in (("q", 64), ("k", 32), ("v", 32))]
        shapes += [(attention.format(layer, "o" if style == "transformers" else "output"), 64)]
        shapes += [(mlp.format(layer, name), rows) for name, rows in (("gate", 96), ("up", 96), ("down", 64))]
    shapes += [(norm, 1)] + ([] if tied else [(head, VOCAB)])
    tensors, at = [], 50
    for name, rows in shapes:
        tensors.append(TensorEntry(name, 0, at, rows * 100, rows))
        at += rows * 100
    size = at
    return Manifest("m", (FileEntry("w", size, 50, bytes(32) * -(-size // BLOCK_BYTES)),), tuple(tensors), HEADS, KV)


def part(start=0, end=LAYERS, kv=(0, KV), columns=(0, COLUMNS), vocabulary=(0, VOCAB), leads=True, heads=None):
    return SimpleNamespace(
        start=start, end=end, kv_heads=kv, heads=heads, columns=columns, vocabulary=vocabulary,
        first=start == 0, last=end == LAYERS, leads=leads,
    )  # fmt: skip


def named(made, found):
    """Bytes taken of each tensor."""
    taken = {}
    for file, start, end in found:
        tensor = next(t for t in made.tensors if t.offset <= start and end <= t.offset + t.size and t.file == file)
        taken[tensor.name] = end - start
    return taken


@pytest.mark.parametrize("style", NAMES)
def test_the_whole_model_is_all_of_it(style):
    made = manifest(style)
    assert sum(named(made, spans(made, part())).values()) == sum(tensor.size for tensor in made.tensors)


@pytest.mark.parametrize("style", NAMES)
def test_a_stage_takes_its_layers_and_a_shard_its_rows(style):
    made = manifest(style)
    attention, mlp, *_ = NAMES[style]
    taken = named(made, spans(made, part(1, 3, kv=(1, 2), columns=(10, 40))))
    assert {layer_of(name) for name in taken if layer_of(name) is not None} == {1, 2}
    assert taken[attention.format(1, "q")] == 64 * 100 // KV
    assert taken[attention.format(2, "k")] == 32 * 100 // KV
    assert taken[mlp.format(1, "up")] == 30 * 100
    assert taken[mlp.format(1, "down")] == 64 * 100  # cut by columns: those lie in every row
    assert not any(name in taken for name in NAMES[style][2:4])


@pytest.mark.parametrize("style", NAMES)
def test_query_heads_that_share_a_kv_head_are_cut_apart_and_their_kv_head_is_taken_by_both(style):
    made = manifest(style)
    attention, *_ = NAMES[style]
    taken = named(made, spans(made, part(kv=(1, 2), heads=(3, 4))))
    assert taken[attention.format(0, "q")] == 64 * 100 // HEADS
    assert taken[attention.format(0, "k")] == 32 * 100 // KV


@pytest.mark.parametrize("style", NAMES)
def test_embedding_and_head_go_where_they_are_read(style):
    made = manifest(style)
    _, _, embedding, head, _ = NAMES[style]
    first, last = named(made, spans(made, part(0, 2))), named(made, spans(made, part(2, 4, vocabulary=(50, 100))))
    assert (first.get(embedding), first.get(head)) == (VOCAB * 100, None)
    assert (last.get(embedding), last.get(head)) == (None, 50 * 100)
    assert embedding not in named(made, spans(made, part(0, 2, leads=False)))


def test_a_tied_head_is_rows_of_the_embedding():
    made = manifest(tied=True)
    assert named(made, spans(made, part(2, 4, vocabulary=(50, 100))))["model.embed_tokens.weight"] == 5000
    assert named(made, spans(made, part()))["model.embed_tokens.weight"] == VOCAB * 100


def test_what_is_not_known_by_name_is_taken_whole():
    tensors = tuple(TensorEntry(name, 0, i * 10, 10, 2) for i, name in enumerate(("model.layers.0.mlp.experts.w", "x")))
    made = Manifest("m", (FileEntry("w", 20, 0, bytes(32)),), tensors, HEADS, KV)
    assert sum(end - start for _, start, end in spans(made, part(0, 1, kv=(0, 1), columns=(0, 1)))) == 20


def test_uncut_takes_every_tensor_of_the_layers_whole():
    made = manifest()
    taken = named(made, spans(made, part(1, 2, kv=(0, 1), columns=(0, 1)), cut=False))
    sizes = {tensor.name: tensor.size for tensor in made.tensors}
    assert all(taken[name] == sizes[name] for name in taken)
    assert "lm_head.weight" in taken


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_shards_that_cover_a_stage_cover_its_bytes(data):
    made = manifest(data.draw(st.sampled_from(list(NAMES))), tied=data.draw(st.booleans()))
    cut = data.draw(st.integers(0, LAYERS))
    groups = data.draw(st.integers(0, KV))
    column = data.draw(st.integers(0, COLUMNS))
    word = data.draw(st.integers(0, VOCAB))
    covered = set()
    for start, end in ((0, cut), (cut, LAYERS)):
        if start < end:
            for lead, kv, columns, words in (
                (True, (0, groups), (0, column), (0, word)),
                (False, (groups, KV), (column, COLUMNS), (word, VOCAB)),
            ):
                shard = part(start, end, kv, columns, words, lead)
                for _, low, high in spans(made, shard):
                    covered.update(range(low, high))
    assert len(covered) == sum(tensor.size for tensor in made.tensors)


def test_layers_are_told_in_runs_of_those_that_are_whole():
    size = BLOCK_BYTES
    tensors = tuple(TensorEntry(f"model.layers.{i}.w", 0, i * size, size, 1) for i in range(6))
    made = Manifest("m", (FileEntry("w", 6 * size, 0, bytes(32) * 6),), tensors)
    assert layers_present(made, {0, 1, 4}.__contains__) == [(0, 2), (4, 5)]
    assert wanted(made, part(4, 5)) == [4]
    assert wanted(made, None) == []


def test_the_nearest_source_is_the_one_whose_block_is_here_first():
    links = [
        Link("here", "far", 0.2, bandwidth=1e9),
        Link("here", "thin", 0.001, bandwidth=1e6),
        Link("here", "near", 0.01, bandwidth=1e8),
        Link("here", "cut", 0.001, reachable=False),
    ]
    sites = ["cut", "far", "here", "near", "new", "thin"]
    assert nearest("here", sites, links) == ["near", "far", "thin", "new", "cut"]
