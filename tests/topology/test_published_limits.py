"""The cost formulas against arithmetic and measurements that others published. Skipped where those are absent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from meshes import gpu, site

from topology import Constraints, ModelSpec, Snapshot
from topology.cost import decode_s, fit
from topology.islands import tensor_parallel_rtt_s
from topology.picture import Path as Way
from topology.picture import look
from topology.ring import ring_s

PUBLISHED = Path(__file__).parents[2] / ".." / "shared" / "data" / "placement"

#: config.json of meta-llama/Meta-Llama-3-8B, meta-llama/Llama-2-70b-hf and bigscience/bloom.
MODELS = {
    "Llama-3-8B": ModelSpec("8b", 32, 4096, 32, 8, 128, 14336, 128256, False, "float16", 8192),
    "Llama-2-70B": ModelSpec("70b", 80, 8192, 64, 8, 128, 28672, 32000, False, "float16", 4096),
    "BLOOM-176B": ModelSpec("176b", 70, 14336, 112, 112, 128, 57344, 250880, True, "float16", 2048),
}
#: Wide enough that only latency counts.
BOUNDLESS = 1e12


def published(name: str) -> dict[str, Any]:
    path = PUBLISHED / name
    if not path.exists():
        pytest.skip("needs ../shared/data, figures of others that are not part of the project")
    return json.loads(path.read_text())


def hops_s(count: int, rtt_s: float, bytes_: float = 0.0, bandwidth: float = BOUNDLESS) -> float:
    """A ring of `count` places, all of them equally far apart."""
    hop = Way(rtt_s / 2, bandwidth, rtt_s).transfer_s(bytes_)
    return ring_s([[hop] * count for _ in range(count)], range(count))


def test_tensor_parallelism_has_the_published_latency_floor() -> None:
    for row in published("physical_limits.json")["rows"]:
        model = MODELS[row["model"]]
        one = site("a", *(gpu(f"gpu{i}", memory=10**12) for i in range(4)))
        one = type(one)(one.name, one.region, one.devices, row["rtt_s"], BOUNDLESS)
        picture = look(Snapshot((one,), ()), model, Constraints())
        found = fit(picture, model, 128, picture.nodes["a"], "speed", first=True, last=True)
        assert found is not None
        floor = row["tp4_latency_floor_s_per_token"]["one_shot"]
        assert model.layers * found.layer_network_s == pytest.approx(floor, rel=1e-3)


def test_a_pipeline_waits_one_hop_a_stage_and_one_more_for_a_client_outside() -> None:
    for row in published("physical_limits.json")["rows"]:
        assert MODELS[row["model"]].activation_bytes == row["activation_bytes_per_token_fp16"]
        for stages, expected in row["pp_network_s_per_token"].items():
            assert hops_s(int(stages) + 1, row["rtt_s"]) == pytest.approx(expected)


def test_replaying_beats_copying_the_cache_from_the_published_depth_on() -> None:
    for name, row in published("physical_limits.json")["kv_recovery"].items():
        model = MODELS[name]
        depth = model.activation_bytes / model.kv_bytes_per_token(1)
        assert depth == pytest.approx(row["replay_beats_kv_copy_above_layers"])


def test_tensor_parallelism_pays_below_the_published_round_trip() -> None:
    published("physical_limits.json")
    model = MODELS["Llama-2-70B"]
    # The rule of the file, with its example: about 0.85 ms over four devices of 1.5 TB/s.
    limit_s = tensor_parallel_rtt_s(model, 1.5e12, 4)
    assert limit_s == pytest.approx(decode_s(model, 1.5e12) * 0.75 / 80)
    assert limit_s == pytest.approx(0.85e-3, rel=0.05)


def test_petals_steps_lengthen_with_latency_as_the_hops_say() -> None:
    """Client and three servers: four hops. From the measured step at one network to that at another, within 9 %."""
    rows = [row for row in published("petals_network_sweep.json")["rows"] if row["setup"].startswith("3 servers")]
    size = MODELS["BLOOM-176B"].activation_bytes

    def network_s(row: dict[str, Any]) -> float:
        return hops_s(4, row["rtt_ms"] / 1e3, size, row["bandwidth_mbit"] * 1e6 / 8)

    for length in (0, 1):
        for before in rows:
            for after in rows:
                predicted = 1 / before["inference"][length] + network_s(after) - network_s(before)
                assert predicted == pytest.approx(1 / after["inference"][length], rel=0.09)
