"""A tiny Llama with random weights on disk, plans for it, and real worker processes in one pool."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from pathlib import Path

import torch
import trio
from safetensors.torch import save_file

from mesh.peer.workers import WorkerPool
from mesh.runtime.assignment import Assignment
from mesh.runtime.protocol import Neighbour
from mesh.wire.v1 import peer_pb2

LAYERS, HIDDEN, HEADS, KV_HEADS, COLUMNS, VOCAB = 4, 32, 4, 2, 48, 80
#: Shards of a stage: (KV heads, MLP columns) of each.
WHOLE = (((0, KV_HEADS), (0, COLUMNS)),)
HALVES = (((0, 1), (0, 20)), ((1, 2), (20, COLUMNS)))


def write_model(folder: Path) -> Path:
    """The model's folder. Weights are large enough for greedy tokens to differ from step to step."""
    torch.manual_seed(7)
    dim = HIDDEN // HEADS
    tensors = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        for name, shape in {
            "self_attn.q_proj": (HEADS * dim, HIDDEN),
            "self_attn.k_proj": (KV_HEADS * dim, HIDDEN),
            "self_attn.v_proj": (KV_HEADS * dim, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HEADS * dim),
            "mlp.gate_proj": (COLUMNS, HIDDEN),
            "mlp.up_proj": (COLUMNS, HIDDEN),
            "mlp.down_proj": (HIDDEN, COLUMNS),
        }.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = shape
    weights = {name: torch.randn(shape) * 0.3 for name, shape in tensors.items()}
    norms = [f"model.layers.{layer}.{name}" for layer in range(LAYERS) for name in ("input", "post_attention")]
    weights |= {f"{name}_layernorm.weight": torch.ones(HIDDEN) for name in norms} | {
        "model.norm.weight": torch.ones(HIDDEN)
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": COLUMNS,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class Crew:
    """Real workers for one plan: `cuts` are the stages' boundaries in layers, `shards` how each stage is split."""

    def __init__(self, pool: WorkerPool, model: Path, job: str = "job") -> None:
        self.pool = pool
        self.model = model
        self.job = job
        self.epoch = (0, "owner")
        self.plan: dict[str, Assignment] = {}

    async def deploy(self, cuts: Sequence[int], shards=None, *, names=None, delay_s=0.0, context=512) -> None:
        """Prepare and connect under the next epoch. `names` are the devices, in order."""
        self.epoch = (self.epoch[0] + 1, "owner")
        self.plan = {}
        stages = len(cuts) - 1
        names = iter(names or (f"dev{number}" for number in range(99)))
        for stage in range(stages):
            split = (shards or [WHOLE] * stages)[stage]
            for rank, (kv_heads, columns) in enumerate(split):
                rows = (VOCAB * rank // len(split), VOCAB * (rank + 1) // len(split))
                self.plan[next(names)] = Assignment(
                    job=self.job, epoch=self.epoch, model=str(self.model), dtype="float32", device="cpu", threads=1,
                    memory_bytes=64 << 20, context=context, stage=stage, stages=stages, start=cuts[stage],
                    end=cuts[stage + 1], rank=rank, size=len(split), kv_heads=kv_heads, columns=columns,
                    vocabulary=rows if stage == stages - 1 else (0, 0),
                )  # fmt: skip
        addresses: dict[str, dict[str, bytes]] = {}

        async def prepare(name: str) -> None:
            addresses[name] = await self.pool.prepare(self.plan[name], name=name)

        async with trio.open_nursery() as nursery:
            for name in self.plan:
                nursery.start_soon(prepare, name)
        ends = self.neighbours(addresses, delay_s)
        async with trio.open_nursery() as nursery:
            for name in self.plan:
                nursery.start_soon(self.pool.connect, self.job, self.epoch, name, ends[name])

    def neighbours(self, addresses, delay_s) -> dict[str, list[Neighbour]]:
        leads = [name for name, a in self.plan.items() if a.leads]
        wires = []
        if len(leads) > 1:
            wires = [(a, b, "next", "previous", delay_s) for a, b in zip(leads, [*leads[1:], leads[0]], strict=True)]
        for a, one in self.plan.items():
            for b, other in self.plan.items():
                if one.stage == other.stage and one.rank < other.rank:
                    wires.append((a, b, "shard", "shard", 0.0))
        ends: dict[str, list[Neighbour]] = {name: [] for name in self.plan}
        for number, (a, b, role_a, role_b, delay) in enumerate(wires):
            (backend, address), *_ = addresses[b].items()
            key, hello = secrets.token_bytes(32), f"{self.job}/{self.epoch[0]}/{number}".encode()
            ranks = self.plan[a].rank, self.plan[b].rank
            ends[a].append(Neighbour(role_a, ranks[1], f"s/{b}", backend, address, key, hello, True, delay, not delay))
            ends[b].append(Neighbour(role_b, ranks[0], f"s/{a}", backend, b"", key, hello, True, delay, not delay))
        return ends

    async def start(self, prompt, count, *, request="r", done=(), **options) -> None:
        lead = next(iter(self.plan))
        await self.pool.start(
            peer_pb2.StartRequest(
                job=self.job, epoch=peer_pb2.Epoch(counter=self.epoch[0], owner=self.epoch[1]), device=lead,
                request=request, tokens=[*prompt, *done], prompt_tokens=len(prompt), max_tokens=count,
                **{"top_p": 1.0, **options},
            )
        )  # fmt: skip

    async def event(self) -> peer_pb2.WorkerEvent:
        """What a worker reports next under the present epoch."""
        while True:
            event = await self.pool.events.receive()
            if event.message.epoch.counter == self.epoch[0]:
                return event.message

    async def failure(self) -> peer_pb2.WorkerEvent:
        """The next failure that is reported."""
        while not (message := await self.event()).HasField("failure"):
            pass
        return message

    async def tokens(self, limit=10**9) -> list[int]:
        """The tokens of the only request, until it ends or `limit` of them came."""
        found: list[int] = []
        index = 0
        while True:
            message = await self.event()
            assert not message.HasField("failure"), message.failure.reason
            if message.HasField("token"):
                index = message.token.index if not found else index + 1
                assert message.token.index == index, "a token was lost or came twice"
                found.append(message.token.token)
                if message.token.finish_reason or len(found) >= limit:
                    return found
