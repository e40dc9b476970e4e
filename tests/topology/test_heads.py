"""Ranges of query heads: the KV heads they need, and blocks in which every KV head serves equally many."""

from hypothesis import given, settings
from hypothesis import strategies as st

from topology.heads import belong, blocks, kv_span, whole_groups
from topology.plan import Shard, _shard


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(0, 30), st.integers(0, 30))
def test_blocks_pair_every_query_head_with_its_own_kv_head(group: int, start: int, count: int) -> None:
    heads = (start, start + count)
    kv_heads = kv_span(heads, group)
    pairs = [
        (start + block.heads[0] + i, kv_heads[0] + block.kv_heads[0] + i // block.group)
        for block in blocks(heads, group)
        for i in range(block.heads[1] - block.heads[0])
    ]
    assert pairs == [(head, head // group) for head in range(*heads)]
    assert len(blocks(heads, group)) <= 3
    assert belong(heads, kv_heads, group)


def test_whole_groups_are_one_block() -> None:
    assert whole_groups((2, 5), 4) == (8, 20)
    (block,) = blocks((8, 20), 4)
    assert (block.heads, block.kv_heads, block.group) == ((0, 12), (0, 3), 4)


def test_query_heads_of_other_kv_heads_do_not_belong() -> None:
    assert belong((3, 5), (1, 2), 3)
    assert not belong((3, 5), (1, 3), 3)
    assert not belong((3, 7), (1, 2), 3)


def test_a_shard_of_an_older_document_has_all_query_heads_of_its_kv_heads() -> None:
    document = {"site": "a", "device": "cpu0", "kv_heads": [0, 2], "columns": [0, 8], "vocabulary": [0, 0]}
    shard = _shard({**document, "memory_bytes": 1})
    assert shard.heads is None
    assert _shard({**document, "memory_bytes": 1, "heads": [0, 5]}) == Shard(
        "a", "cpu0", (0, 2), (0, 8), (0, 0), 1, heads=(0, 5)
    )
