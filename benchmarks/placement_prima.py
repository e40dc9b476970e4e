"""prima.cpp's home: four machines on one Wi-Fi, and a model that is fastest on one of them.

The case gives memory, the GPU and the Wi-Fi (prima.cpp, arXiv:2504.08791, tables 1 to 3). Memory bandwidth is what
decides the speed of decoding and is not in the file: data-sheet figures stand here. The model has four bits a weight,
as prima.cpp ran it; `topology.partition` plans it on all four machines and is free to use them.
"""

from __future__ import annotations

import itertools
import time
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from benchmarks.placement_case import CaseError, Name, Rate, Size, first_problem
from topology import Device, Link, ModelSpec, NoFeasiblePlan, Plan, Site, Snapshot, partition

#: Bytes/s by GPU, from data sheets; Apple's figure is of the memory that CPU and GPU share.
GPU_BYTES_PER_S: Final = {"Metal": 68e9, "RTX3070": 448e9, "2080Ti": 616e9}
#: Two channels of DDR4-3200, and the LPDDR5 of a telephone: the processors' own memory.
CPU_BYTES_PER_S: Final = 40e9
#: Neither bounds a batch of one: above bandwidth over bytes a weight in every case.
GPU_FLOPS: Final = 10e12
CPU_FLOPS: Final = 0.5e12
#: Llama-3-8B (config.json of meta-llama/Meta-Llama-3-8B) in Q4_K: 4.9 GB over 8.03e9 weights.
MODEL: Final = ModelSpec(
    "Llama3-8B", 32, 4096, 32, 8, 128, 14336, 128256, False, "float16", 8192, bytes_per_parameter=0.61
)
CONTEXT: Final = 1024
GIB: Final = 2**30


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Machine(_Part):
    """A machine: memory that is free for a model, and its GPU (its own memory, or shared where `vram_gib` is null)."""

    id: Name
    ram_gib: Size
    gpu: str | None = None
    vram_gib: Size | None = None


class Network(_Part):
    """Ranges of the Wi-Fi's bandwidth (Mbit/s) and latency (ms)."""

    wifi_mbps: tuple[Size, Size]
    latency_ms: tuple[Rate, Rate]


class Home(_Part):
    """The case."""

    case: str = ""
    devices: Annotated[tuple[Machine, ...], Field(min_length=1)]
    network: Network
    token_latency_ms: dict[str, dict[str, Any]] = {}

    def snapshot(self) -> Snapshot:
        """A site a machine, joined by the Wi-Fi at the middle of its ranges; the latency is taken for a round trip."""
        sites: list[Site] = []
        for place, machine in enumerate(self.devices):
            if any(site.name == machine.id for site in sites):
                raise CaseError(f"$.devices[{place}].id: {machine.id!r} is taken")
            if machine.gpu is not None and machine.gpu not in GPU_BYTES_PER_S:
                raise CaseError(f"$.devices[{place}].gpu: the memory bandwidth of {machine.gpu!r} is not known here")
            devices = []
            if machine.gpu is not None:
                memory = machine.ram_gib if machine.vram_gib is None else machine.vram_gib
                devices.append(_device(machine.gpu, "gpu", memory, GPU_BYTES_PER_S[machine.gpu], GPU_FLOPS))
            if machine.gpu is None or machine.vram_gib is not None:
                devices.append(_device("cpu", "cpu", machine.ram_gib, CPU_BYTES_PER_S, CPU_FLOPS))
            sites.append(Site(machine.id, "home", tuple(devices)))
        bandwidth = sum(self.network.wifi_mbps) / 2 * 1e6 / 8
        rtt_s = sum(self.network.latency_ms) / 2 / 1e3
        pairs = itertools.permutations([site.name for site in sites], 2)
        return Snapshot(tuple(sites), tuple(Link(a, b, rtt_s, bandwidth=bandwidth) for a, b in pairs))


def _device(name: str, kind: str, gib: float, bandwidth: float, flops: float) -> Device:
    memory = int(gib * GIB)
    # The file's memory is what is free; nothing else runs there that could need a reserve.
    return Device(name, kind, "", memory, memory, {"float16": flops}, bandwidth, reserve=0.0)


def parse(document: dict[str, Any]) -> Home:
    """The case in a document. Raises CaseError with the JSON path of the first thing wrong."""
    try:
        return Home.model_validate(document)
    except ValidationError as error:
        raise CaseError(first_problem(error)) from None


def answer(document: dict[str, Any]) -> dict[str, Any]:
    """The plan for the 8B model and what others measured, as a document. Raises CaseError."""
    began = time.monotonic()
    home = parse(document)
    try:
        plan = partition(home.snapshot(), MODEL, {"context": CONTEXT, "objective": "latency"})
    except NoFeasiblePlan as error:
        raise CaseError(f"$.devices: {error}") from None
    return {
        "case": home.case,
        "model": MODEL.name,
        "stages": stages(plan),
        "devices": len(plan.shards),
        "token_ms": plan.predicted.token_ms,
        "network_ms_per_token": plan.predicted.network_ms,
        "published_token_ms": home.token_latency_ms.get(MODEL.name, {}),
        "seconds": round(time.monotonic() - began, 3),
        "why": list(plan.why),
    }


def stages(plan: Plan) -> list[dict[str, Any]]:
    """Layers and devices of each stage."""
    return [
        {
            "layers": [stage.start, stage.end],
            "shards": [{"site": shard.site, "device": shard.device} for shard in stage.shards],
        }
        for stage in plan.stages
    ]
