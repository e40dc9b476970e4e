"""Models and meshes that the tests of this folder plan for. Speeds are round figures of plausible hardware."""

from __future__ import annotations

from collections.abc import Mapping

from topology import Device, Link, ModelSpec, Plan, Site, Snapshot
from topology.heads import belong

MIB = 2**20

#: SmolLM2-135M: config.json of HuggingFaceTB/SmolLM2-135M-Instruct.
SMOL = ModelSpec("smol", 30, 576, 9, 3, 64, 1536, 49152, True, "float32", 8192)
#: Llama-3-70B: config.json of meta-llama/Meta-Llama-3-70B.
LLAMA_70B = ModelSpec("llama-70b", 80, 8192, 64, 8, 128, 28672, 128256, False, "float16", 8192)
#: A toy that is planned quickly: 6 layers, 4 KV heads.
TOY = ModelSpec("toy", 6, 64, 8, 4, 8, 192, 1000, True, "float32", 64)


def cpu(name: str = "cpu", memory: int = 430 * MIB, speed: float = 15e9, **other: object) -> Device:
    """A CPU device; `speed` is its memory bandwidth in bytes/s."""
    values = {"free_bytes": memory, "flops": {"float32": 60e9, "bfloat16": 60e9, "float16": 60e9}, **other}
    return Device(name, "cpu", "test", memory, memory_bandwidth=speed, **values)


def gpu(name: str = "gpu0", memory: int = 80 * 10**9, speed: float = 2e12) -> Device:
    """A data-centre GPU."""
    return Device(name, "cuda", "test", memory, memory, {"float16": 600e12, "float32": 60e12}, speed)


def site(name: str, *devices: Device, region: str = "", **other: float) -> Site:
    """A site with the devices, a small CPU by default."""
    return Site(name, region, devices or (cpu(),), **other)


def mesh(sites: list[Site], rtts_ms: Mapping[str, float], **link: object) -> Snapshot:
    """A snapshot from round trips by pair: {"a-b": 20} gives both directions."""
    links = []
    for pair, rtt_ms in rtts_ms.items():
        a, b = pair.split("-")
        links += [Link(a, b, rtt_ms / 1e3, **link), Link(b, a, rtt_ms / 1e3, **link)]
    return Snapshot(tuple(sites), tuple(links))


def assert_sound(plan: Plan, snapshot: Snapshot, *, reserve: bool = True) -> None:
    """Every layer, KV-head group, column and head row is held exactly once, and no device beyond its memory."""
    model = plan.model
    devices = {f"{s.name}/{d.name}": d for s in snapshot.sites for d in s.devices}
    assert_covers([(stage.start, stage.end) for stage in plan.stages], model.layers)
    keys = [shard.key for stage in plan.stages for shard in stage.shards]
    assert len(keys) == len(set(keys))
    for index, stage in enumerate(plan.stages):
        assert_covers([shard.query_heads(model) for shard in stage.shards], model.heads)
        assert all(belong(s.query_heads(model), s.kv_heads, model.heads // model.kv_heads) for s in stage.shards)
        if len(stage.shards) <= model.kv_heads:
            assert_covers([shard.kv_heads for shard in stage.shards], model.kv_heads)
        assert_covers([shard.columns for shard in stage.shards], model.intermediate)
        if index == len(plan.stages) - 1:
            assert_covers([shard.vocabulary for shard in stage.shards], model.vocab)
        else:
            assert all(shard.vocabulary == (0, 0) for shard in stage.shards)
        for rank, shard in enumerate(stage.shards):
            device = devices[shard.key]
            room = device.free_bytes - (device.reserve * device.memory_bytes if reserve else 0)
            assert least_memory(plan, index, rank) < shard.memory_bytes <= room


def assert_covers(ranges: list[tuple[int, int]], total: int) -> None:
    """The ranges are non-empty and follow each other from 0 to `total`."""
    assert [start for start, _ in ranges] == [0, *[end for _, end in ranges[:-1]]]
    assert ranges[-1][1] == total
    assert all(start < end for start, end in ranges)


def least_memory(plan: Plan, index: int, rank: int) -> int:
    """Weights and KV cache of a shard, counted anew from the tensors' shapes."""
    model, stage = plan.model, plan.stages[index]
    shard = stage.shards[rank]
    groups, columns, rows = (b - a for a, b in (shard.kv_heads, shard.columns, shard.vocabulary))
    heads = shard.query_heads(model)[1] - shard.query_heads(model)[0]
    q_and_o = 2 * model.hidden * heads * model.head_dim
    k_and_v = 2 * model.hidden * groups * model.head_dim
    layer = q_and_o + k_and_v + 3 * model.hidden * columns + 2 * model.hidden
    cache = 2 * groups * model.head_dim * plan.context
    elements = (stage.end - stage.start) * (layer + cache)
    embeds = index == 0 and rank == 0
    if embeds:
        elements += model.vocab * model.hidden
    if not (embeds and model.tied_embeddings):
        elements += rows * model.hidden
    return elements * model.element_bytes
