"""What a shard computes for a token, predicted from calibration and used, in CPU time: of use on a busy machine too.

    python -m benchmarks.honest_layers [--model FOLDER] [--json]

One process and one thread calibrate as a daemon does and then decode with the real model's shards, whole and cut in
three (two KV heads and one), without anybody to exchange with. What others do on the machine is not in CPU time, but
for the caches and the memory that they share.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.command import command
from benchmarks.decode import DEFAULT_MODEL, whole
from mesh.cli.tables import table
from topology import Device, ModelSpec, Site, Snapshot
from topology.constraints import Constraints
from topology.cost import attention_bytes, kv_bytes, mlp_bytes, overhead_s
from topology.picture import Node, look

PROMPT, TOKENS = 32, 32
#: KV heads and share of the MLP columns and of the head's rows, of three.
SHARDS = (3, 2, 1)


@dataclass(frozen=True, slots=True)
class Computed:
    """Milliseconds a token of one shard that holds `thirds` of every layer and of the head."""

    dtype: str
    thirds: int
    predicted_ms: float
    used_ms: float


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.honest_layers", description=__doc__)
    parser.add_argument("--model", default=str(DEFAULT_MODEL))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = measure(options.model)
    if options.json:
        print(json.dumps([asdict(each) for each in found]))
        return 0
    rows = [
        [
            each.dtype,
            f"{each.thirds}/3",
            f"{each.predicted_ms:.1f}",
            f"{each.used_ms:.1f}",
            f"{each.predicted_ms / each.used_ms - 1:+.0%}",
        ]
        for each in found
    ]
    table(["dtype", "shard", "predicted ms", "CPU time ms", "error"], rows)
    return 0


def measure(path: str) -> list[Computed]:
    """Calibrate, then decode with each shard in each dtype."""
    import torch

    from mesh.devices import layers
    from mesh.devices.calibration import calibrate

    dtypes = ("float32", "bfloat16")
    speed = calibrate(
        torch, "cpu", threads=1, dtypes=dtypes, free_bytes=2**32, clock=time.thread_time, layers=layers.decoding
    )
    device = Device("cpu", "cpu", "", 2**40, 2**40, speed.flops, speed.memory_bandwidth, 0.0, decoding=speed.decoding)
    found = []
    for dtype in [each for each in dtypes if each in speed.decoding]:
        model = _spec(path, dtype)
        picture = look(Snapshot((Site("here", "", (device,)),), ()), model, Constraints())
        found += [
            Computed(
                dtype, thirds, _predicted_ms(model, picture.nodes["here"][0], thirds), _used_ms(path, dtype, thirds)
            )
            for thirds in SHARDS
        ]
    return found


def _spec(path: str, dtype: str) -> ModelSpec:
    config: dict[str, Any] = json.loads((Path(path) / "config.json").read_text())
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    return ModelSpec(
        name="the model",
        layers=config["num_hidden_layers"],
        hidden=hidden,
        heads=heads,
        kv_heads=config["num_key_value_heads"],
        head_dim=config.get("head_dim") or hidden // heads,
        intermediate=config["intermediate_size"],
        vocab=config["vocab_size"],
        tied_embeddings=bool(config.get("tie_word_embeddings")),
        dtype=dtype,
        context=config["max_position_embeddings"],
    )


def _predicted_ms(model: ModelSpec, node: Node, thirds: int) -> float:
    groups = model.kv_heads * thirds // 3
    read = attention_bytes(model, groups) + mlp_bytes(model, model.intermediate * thirds // 3)
    read += kv_bytes(model, groups, PROMPT + TOKENS // 2)
    head = model.vocab * thirds // 3 * model.row_bytes
    return 1e3 * (model.layers * (read / node.speed + overhead_s([node])) + head / node.speed)


def _used_ms(path: str, dtype: str, thirds: int) -> float:
    import torch

    from mesh.runtime.stage import StageModel

    a = whole(path, dtype, 1)
    cuts = {key: (0, getattr(a, key)[1] * thirds // 3) for key in ("kv_heads", "columns", "vocabulary")}
    stage = StageModel.load(replace(a, **cuts))  # type: ignore[arg-type]
    group: Any = None if thirds == 3 else _Nobody()
    times = []
    with torch.inference_mode():
        tokens = list(range(3, 3 + PROMPT))
        stage.forward("r", 0, tokens=tokens, count=PROMPT, group=group, logits=False, timeout_s=1.0)
        for place in range(PROMPT, PROMPT + TOKENS):
            began = time.thread_time()
            stage.forward("r", place, tokens=[5], count=1, group=group, logits=True, timeout_s=1.0)
            times.append(time.thread_time() - began)
    return 1e3 * sorted(times)[TOKENS // 4]


class _Nobody:
    """A group whose other rank adds nothing and takes no time."""

    rank, size = 0, 2

    def all_reduce_(self, tensor: Any, timeout_s: float | None) -> object:
        return tensor

    def broadcast_(self, tensor: Any, root: int, timeout_s: float | None) -> object:
        return tensor

    def gather(self, tensor: Any, root: int, timeout_s: float | None) -> list[Any]:
        return [tensor]


if __name__ == "__main__":
    command(main)
