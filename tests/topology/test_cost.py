"""The cost model against arithmetic done by hand."""

from dataclasses import replace

import pytest
from meshes import LLAMA_70B, SMOL, cpu, gpu, mesh, site

from topology import Constraints, Snapshot, partition
from topology.cost import LAYER_OVERHEAD_S, TOKEN_BYTES, decode_s, fit, least_bytes
from topology.islands import tensor_parallel_rtt_s
from topology.picture import look

ROOMY = 4 * 10**9


def test_one_device_takes_its_weights_over_its_bandwidth() -> None:
    plan = partition(Snapshot((site("a", cpu(memory=ROOMY)),), ()), SMOL, {"context": 2})
    weights = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536) + 49152 * 576
    cache = 30 * 2 * 192 * 1  # one token: half of the context
    assert plan.predicted.compute_ms == pytest.approx(1e3 * (4 * (weights + cache) / 15e9 + 30 * LAYER_OVERHEAD_S))
    assert plan.predicted.network_ms == 0
    assert plan.predicted.tokens_per_s == pytest.approx(1e3 / plan.predicted.token_ms)


def test_a_slow_processor_bounds_decoding_by_arithmetic() -> None:
    slow = cpu(memory=ROOMY, flops={"float32": 1e9})
    node = look(Snapshot((site("a", slow),), ()), SMOL, Constraints()).nodes["a"][0]
    assert node.speed == 2e9


def test_a_pipeline_pays_one_hop_a_stage_and_only_a_tokens_id_closes_the_ring() -> None:
    snapshot = mesh(
        [site(n, cpu(memory=300 * 2**20)) for n in "abcd"],
        dict.fromkeys(["a-b", "a-c", "a-d", "b-c", "b-d", "c-d"], 50.0),
        bandwidth=1e6,
    )
    plan = partition(snapshot, SMOL)
    hops = len(plan.stages)
    assert hops == 4
    assert plan.predicted.network_ms == pytest.approx(hops * 25 + 1e3 * (576 * 4 * 3 + TOKEN_BYTES) / 1e6)


def test_tensor_parallelism_pays_two_one_shot_exchanges_a_layer() -> None:
    snapshot = Snapshot((site("a", cpu("x", ROOMY), cpu("y", ROOMY), local_rtt_s=1e-4, local_bandwidth=1e9),), ())
    plan = partition(snapshot, SMOL, strategy="tensor_parallelism")
    gather_s = 0.5e-4 + 49152 * 4 / 1e9
    assert plan.predicted.network_ms == pytest.approx(1e3 * (30 * 2 * (0.5e-4 + 576 * 4 / 1e9) + gather_s))


def test_the_slowest_shard_of_each_phase_sets_the_pace() -> None:
    """2 + 1 KV-head groups over equal devices: attention takes two thirds, the MLP one half."""
    nodes = look(Snapshot((site("a", cpu("x", ROOMY), cpu("y", ROOMY)),), ()), SMOL, Constraints()).nodes["a"]
    picture = look(Snapshot((site("a", cpu("x", ROOMY), cpu("y", ROOMY)),), ()), SMOL, Constraints())
    alone = fit(picture, SMOL, 2, nodes[:1], "speed", first=True, last=False)
    both = fit(picture, SMOL, 2, nodes, "speed", first=True, last=False)
    assert alone is not None
    assert both is not None
    attention = 4 * (2 * 576 * 576 + 2 * 576 * 192 + 2 * 192) / 15e9
    mlp = 4 * 3 * 576 * 1536 / 15e9
    assert alone.layer_s == pytest.approx(attention + mlp + LAYER_OVERHEAD_S)
    assert both.layer_s == pytest.approx(attention * 2 / 3 + mlp / 2 + LAYER_OVERHEAD_S)


def test_the_threshold_for_tensor_parallelism_is_that_of_the_notes() -> None:
    """70B in float16 at 1.5 TB/s over 4 devices: about 0.85 ms."""
    assert tensor_parallel_rtt_s(LLAMA_70B, 1.5e12, 4) == pytest.approx(0.85e-3, rel=0.05)
    assert decode_s(LLAMA_70B, 1.5e12) == pytest.approx(0.093, rel=0.02)


@pytest.mark.parametrize(
    ("rtt_ms", "pipeline_s", "tensor_s"),
    [(1, 0.002, 0.08), (10, 0.02, 0.8), (50, 0.1, 4.0), (100, 0.2, 8.0)],
)
def test_latency_floors_of_70b_over_four_sites(rtt_ms: float, pipeline_s: float, tensor_s: float) -> None:
    """80 layers, one-shot: L * r for tensor parallelism; four hops of r / 2 around a ring of four."""
    pairs = dict.fromkeys(["a-b", "a-c", "a-d", "b-c", "b-d", "c-d"], rtt_ms)
    snapshot = mesh([site(n, gpu(memory=60 * 10**9)) for n in "abcd"], pairs, bandwidth=1e12)
    chain = partition(snapshot, LLAMA_70B, {"stages": 4, "shards": 1})
    split = partition(snapshot, LLAMA_70B, {"stages": 1, "shards": 4})
    assert chain.predicted.network_ms / 1e3 == pytest.approx(pipeline_s, rel=0.02)
    assert split.predicted.network_ms / 1e3 == pytest.approx(tensor_s, rel=0.02)


def test_a_tied_head_on_the_embedding_s_device_is_counted_once() -> None:
    snapshot = Snapshot((site("a", cpu(memory=ROOMY)),), ())
    tied = partition(snapshot, SMOL).stages[0].shards[0].memory_bytes
    untied = partition(snapshot, replace(SMOL, tied_embeddings=False)).stages[0].shards[0].memory_bytes
    assert untied - tied == SMOL.embedding_bytes


def test_memory_grows_with_the_context_by_the_kv_cache() -> None:
    snapshot = Snapshot((site("a", cpu(memory=ROOMY)),), ())
    small, large = (partition(snapshot, SMOL, {"context": n}).stages[0].shards[0].memory_bytes for n in (1024, 4096))
    assert large - small >= SMOL.kv_bytes_per_token(30) * 3072
    assert least_bytes(SMOL, 1024) < small
