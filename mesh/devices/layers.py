"""What a decoder layer costs a device while it decodes: real layers of made-up weights, in the code that workers run.

Three stacks of layers of the llama family, each larger than a cache: a narrow model's, a quarter shard of the same, and
a wide model's. Their times a layer are fitted with `layer_s + row_s * rows + bytes / bandwidth`
(`topology.snapshot.Decoding`) by non-negative least squares of relative errors: the shard tells what does not shrink,
the wide one what a byte costs where rows are long. Measured on one core of an AMD EPYC (Zen 4), float32: products of
576 columns read 12 GB/s, of 2048 columns 18.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mesh.devices.calibration import Busy
from topology.snapshot import Decoding

#: A fitted bandwidth is held to this, as `topology.picture` holds it: a device so fast is bound by its calls alone.
_MOST_BANDWIDTH = 1e15
_HEAD_DIM = 64
#: Positions in the KV cache while it is measured: few, what more of them cost is bytes.
_POSITION = 16


@dataclass(frozen=True, slots=True)
class Sample:
    """Layers to measure: hidden size, KV heads of two query heads each, MLP columns, and the shard's share of both."""

    hidden: int
    kv_heads: int
    columns: int
    share: int = 1

    @property
    def rows(self) -> int:
        """Output rows of all matrices of one layer's shard."""
        return 4 * _HEAD_DIM * self.kv_heads // self.share + 2 * self.columns // self.share + 2 * self.hidden

    @property
    def weights(self) -> int:
        """Weights in the matrices of one layer's shard."""
        attention = self.hidden * 6 * _HEAD_DIM * self.kv_heads
        return (attention + 3 * self.hidden * self.columns) // self.share


#: The narrow one is about that of a model of 150 million parameters, the wide one that of half a billion.
_CPU = (Sample(512, 4, 1536), Sample(512, 4, 1536, 4), Sample(1536, 12, 4096))
#: On a GPU small layers cost their launches; the wide one is that of seven billion parameters.
_GPU = (Sample(1024, 8, 2816), Sample(1024, 8, 2816, 4), Sample(4096, 32, 11008))
#: Weights of a stack: beyond the caches (a CPU's last level, a GPU's second) by a good measure.
_CPU_BYTES, _GPU_BYTES = 128 * 2**20, 2**29
#: Small layers would need hundreds to fill that; so many evict one another's code and buffers as well.
_MOST_LAYERS = 24
#: One small layer takes well below a millisecond. Where it takes this long, threads wait for one another's turn on the
#: cores of a busy machine: nothing would be learned, and it would take minutes.
_LAYER_S = 0.01
#: The three stacks of a dtype take about a second; after this long no more is begun.
_PATIENCE_S = 4.0
#: Layers of the narrow model, rests and their length: about the pause of a stage of three on sites 20 ms apart. On an
#: EPYC in a virtual machine a step of ten layers takes 2 ms longer after any rest from 10 to 80 ms.
_WAKING_LAYERS, _WAKINGS, _REST_S = 10, 9, 0.03
#: More than this is not waking.
_MOST_WAKING_S = 0.05
#: The stacks take turns: whoever else uses the machine for a while must not spoil the figure of one of them alone.
_ROUNDS = 3


def decoding(
    torch: Any,
    torch_device: str,
    dtype: str,
    free_bytes: int,
    typical_s: Callable[[Callable[[], object]], float],
    *,
    clock: Callable[[], float] = time.monotonic,
) -> Decoding | None:
    """Measure a device in one dtype; None where it cannot run them, for want of memory say: a quarter is taken at most.

    `typical_s` gives the seconds of a run that it repeats. Raises Busy where others use the machine so much
    that it would take long.
    """
    element = getattr(torch, dtype).itemsize
    samples, wanted = (_CPU, _CPU_BYTES) if torch_device == "cpu" else (_GPU, _GPU_BYTES)
    room = free_bytes // 4 // len(samples)
    counts = [
        min(max(wanted // size, 1), _MOST_LAYERS, room // size) for size in (s.weights * element for s in samples)
    ]
    if not all(counts):
        return None
    end = clock() + _PATIENCE_S
    try:
        probe = stack(torch, torch_device, dtype, samples[1], 1)
        probe()  # loads kernels and touches pages
        began = clock()
        probe()
        if clock() - began > _LAYER_S:
            raise Busy
        runs = []
        for pair in zip(samples, counts, strict=True):
            runs.append(stack(torch, torch_device, dtype, *pair))
            _hurry(clock, end)
        rounds: list[list[float]] = []
        while not rounds or (len(rounds) < _ROUNDS and clock() < end):
            rounds.append([])
            for run in runs:
                rounds[-1].append(typical_s(run))
                if len(rounds) == 1:
                    _hurry(clock, end)
    except (RuntimeError, TypeError, NotImplementedError):  # out of memory, or an operation it lacks
        return None
    typical = [statistics.median(times) / count for times, count in zip(zip(*rounds, strict=True), counts, strict=True)]
    return fit(list(zip(samples, typical, strict=True)), element)


def waking_s(
    torch: Any,
    dtype: str,
    free_bytes: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> float:
    """Seconds more that a step takes on a CPU that has waited for it: as a stage does, between two tokens.

    A core that slept has to be woken, to gain speed, and to fill its caches. Each step after a rest is held against the
    one that follows it at once, so that what else changes does not count. 0.0 where there is no memory to measure in.
    """
    sample = _CPU[0]
    size_bytes = sample.weights * getattr(torch, dtype).itemsize
    layers = min(_WAKING_LAYERS, free_bytes // 4 // size_bytes)
    if not layers:
        return 0.0
    try:
        run = stack(torch, "cpu", dtype, sample, layers)
        run()
        more = []
        for _ in range(_WAKINGS):
            sleep(_REST_S)
            began = clock()
            run()
            woken = clock()
            run()
            more.append((woken - began) - (clock() - woken))
    except (RuntimeError, TypeError, NotImplementedError):
        return 0.0
    return min(max(statistics.median(more), 0.0), _MOST_WAKING_S)


def _hurry(clock: Callable[[], float], end: float) -> None:
    if clock() > end:
        raise Busy


def fit(measured: list[tuple[Sample, float]], element_bytes: int) -> Decoding:
    """The three figures that explain seconds a layer best, none of them negative."""
    import numpy as np
    from scipy.optimize import nnls

    equations = np.array(
        [[1e-6 / s, 1e-9 * each.rows / s, 1e-12 * each.weights * element_bytes / s] for each, s in measured]
    )
    layer_us, row_ns, byte_ps = (float(value) for value in nnls(equations, np.ones(len(measured)))[0])
    return Decoding(layer_us * 1e-6, row_ns * 1e-9, min(1e12 / max(byte_ps, 1e-9), _MOST_BANDWIDTH))


class _Weights:
    """Tensors of given shapes whose numbers are of no matter."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._shapes = shapes

    def names(self) -> frozenset[str]:
        return frozenset(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> Any:
        raise NotImplementedError

    def read_into(self, out: Any, name: str, start: tuple[int, ...]) -> None:
        out.fill_(0.001)

    def close(self) -> None:
        pass


def stack(  # noqa: PLR0917 - what to build, and one thing to do with it
    torch: Any,
    torch_device: str,
    dtype: str,
    sample: Sample,
    layers: int,
    all_reduce: Callable[[Any], None] | None = None,
) -> Callable[[], object]:
    """One decoding step through so many layers; `all_reduce` takes the hidden state, twice a layer."""
    from mesh.runtime.assignment import Assignment
    from mesh.runtime.cache import KVCache
    from mesh.runtime.fused import FusedLayer, FusedStack
    from mesh.runtime.shape import Shape
    from mesh.runtime.source import ModelSource

    groups, columns = sample.kv_heads // sample.share, sample.columns // sample.share
    shape = Shape(
        layers=layers,
        hidden=sample.hidden,
        heads=2 * sample.kv_heads,
        kv_heads=sample.kv_heads,
        head_dim=_HEAD_DIM,
        intermediate=sample.columns,
        vocab=1,
        eps=1e-5,
        tied=True,
        qk_norm=False,
        rope=(("rope_theta", 1e4), ("rope_type", "default")),
        windows=(None,) * layers,
    )
    assignment = Assignment(
        job="calibration",
        epoch=(0, ""),
        model="",
        dtype=dtype,
        device=torch_device,
        threads=0,
        memory_bytes=0,
        context=2 * _POSITION,
        stage=0,
        stages=1,
        start=0,
        end=layers,
        rank=0,
        size=1,
        kv_heads=(0, groups),
        columns=(0, columns),
        vocabulary=(0, 0),
    )
    heads, kv = 2 * sample.kv_heads * _HEAD_DIM, sample.kv_heads * _HEAD_DIM
    blocks = {
        "self_attn.q_proj": (heads, sample.hidden),
        "self_attn.k_proj": (kv, sample.hidden),
        "self_attn.v_proj": (kv, sample.hidden),
        "self_attn.o_proj": (sample.hidden, heads),
        "mlp.gate_proj": (sample.columns, sample.hidden),
        "mlp.up_proj": (sample.columns, sample.hidden),
        "mlp.down_proj": (sample.hidden, sample.columns),
        "input_layernorm": (sample.hidden,),
        "post_attention_layernorm": (sample.hidden,),
    }
    names = {
        f"model.layers.{index}.{module}.weight": size for index in range(layers) for module, size in blocks.items()
    }
    source = ModelSource(Path("calibration"), {}, _Weights(names), gguf=False)
    layered = FusedStack(shape, assignment)
    for index in range(layers):
        layered.layers[index] = FusedLayer(index, shape, source, assignment, {})
    options = {"dtype": getattr(torch, dtype), "device": torch.device(torch_device)}
    cache = KVCache(layers=layers, kv_heads=groups, head_dim=_HEAD_DIM, context=2 * _POSITION, **options)
    sequence = cache.open("calibration", 0, _POSITION + 1)
    for buffer in sequence.buffers:
        buffer.zero_()  # what lies in fresh memory may be no numbers, or slow ones
    x = torch.full((1, sample.hidden), 0.1, **options)
    return lambda: layered.run(x, _POSITION, sequence, all_reduce)
