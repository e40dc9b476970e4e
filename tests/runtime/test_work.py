"""What a decoding step takes, by the sizes that calibration is fitted to."""

from dataclasses import replace

from mesh.runtime.assignment import Assignment
from mesh.runtime.work import Decoded, Work, step_work

CONFIG = {"num_attention_heads": 8, "num_key_value_heads": 4}
WHOLE = Assignment(
    job="j", epoch=(1, ""), model="m", dtype="bfloat16", device="cpu", threads=1, memory_bytes=0, context=8, stage=0,
    stages=1, start=2, end=5, rank=0, size=1, kv_heads=(0, 4), columns=(0, 32), vocabulary=(0, 100),
)  # fmt: skip


def test_a_step_of_whole_layers_reads_all_their_matrices_and_the_head():
    # A layer: q 8x2 rows, k and v 4x2 each, gate and up 32 each, o and down 16 each; three layers and a head of 100.
    work, position_bytes = step_work(WHOLE, CONFIG, hidden=16, head_dim=2)
    assert work.layers == 3
    assert work.rows == 3 * (16 + 8 + 8 + 64 + 16 + 16) + 100
    assert work.size_bytes == 2 * (3 * (16 * 16 + 2 * 8 * 16 + 16 * 16 + 3 * 32 * 16) + 100 * 16)
    assert position_bytes == 2 * 3 * 2 * 4 * 2


def test_a_shard_of_a_stage_before_the_last_has_its_share_and_no_head():
    shard = replace(WHOLE, stages=2, kv_heads=(2, 4), columns=(0, 16), heads=(4, 7))
    work, position_bytes = step_work(shard, CONFIG, hidden=16, head_dim=2)
    assert work.rows == 3 * (6 + 4 + 4 + 32 + 32)
    assert position_bytes == 2 * 3 * 2 * 2 * 2


def test_a_model_that_does_not_tell_its_heads_has_no_known_work():
    assert step_work(WHOLE, {}, hidden=16, head_dim=2) is None


def test_reports_are_sums_and_what_lies_between_two_is_their_difference():
    first = Decoded().after(0.5, Work(3, 10, 100))
    second = first.after(0.25, Work(3, 10, 101))
    assert second == Decoded(2, 0.75, 6, 20, 201)
    assert second.since(first) == Decoded(1, 0.25, 3, 10, 101)
