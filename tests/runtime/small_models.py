"""Tiny random models of many families, shards of them in threads, and the real small model where it was fetched."""

from __future__ import annotations

import functools
import threading
from dataclasses import replace
from pathlib import Path

import torch

from mesh.runtime.assignment import Assignment
from mesh.runtime.stage import StageModel
from topology.heads import kv_span

REAL = Path(__file__).resolve().parents[2] / ".models" / "SmolLM2-135M-Instruct"
GGUF = REAL.with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
LAYERS, COLUMNS, VOCAB = 4, 80, 97
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": COLUMNS,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
SLIDING = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
#: name: (configuration class, settings, whether the fused path covers it)
FAMILIES = {
    "llama with biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}, True),
    "llama 3 rotary, tied": ("LlamaConfig", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}, True),
    "llama, yarn rotary": ("LlamaConfig", {"rope_parameters": YARN}, False),
    "qwen2": ("Qwen2Config", {}, True),
    "qwen2 sliding": ("Qwen2Config", SLIDING, True),
    "qwen3": ("Qwen3Config", {"head_dim": 16}, True),
    "mistral sliding": ("MistralConfig", {"sliding_window": 7, "head_dim": 8}, True),
    "gemma": ("GemmaConfig", {"head_dim": 16}, False),
    "gemma2": ("Gemma2Config", {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16}, False),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16, "sliding_window": 6}, False),
    "smollm3": ("SmolLM3Config", {}, False),
    "granite": ("GraniteConfig", {"embedding_multiplier": 3.0, "residual_multiplier": 0.5}, False),
}


def build(name: str, **changes):
    """A model of the family with random weights, biases and norms."""
    import transformers

    config_class, settings, _ = FAMILIES[name]
    config = getattr(transformers, config_class)(**{**BASE, **settings, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias") or "norm" in key:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def whole(path: Path, **changes) -> Assignment:
    """The assignment of one device that holds all of a tiny model; `changes` make it a shard."""
    assignment = Assignment(
        job="job",
        epoch=(1, "a"),
        model=str(path),
        dtype="float32",
        device="cpu",
        threads=1,
        memory_bytes=0,
        context=64,
        stage=0,
        stages=1,
        start=0,
        end=LAYERS,
        rank=0,
        size=1,
        kv_heads=(0, 3),
        columns=(0, COLUMNS),
        vocabulary=(0, VOCAB),
    )
    return replace(assignment, **changes)


def whole_real(**changes) -> Assignment:
    """The same for the real small model."""
    real = {"end": 30, "columns": (0, 1536), "vocabulary": (0, 49152), "context": 512}
    return whole(REAL, **{**real, **changes})


def shards(a: Assignment, *, cuts: list[int], columns: list[int], vocabulary: list[int]) -> list[Assignment]:
    """Cut one stage into shards at the given KV heads, columns and vocabulary rows (first and last included)."""
    size = len(cuts) - 1
    return [
        replace(
            a,
            rank=rank,
            size=size,
            kv_heads=(cuts[rank], cuts[rank + 1]),
            columns=(columns[rank], columns[rank + 1]),
            vocabulary=(vocabulary[rank], vocabulary[rank + 1]) if a.last else (0, 0),
        )
        for rank in range(size)
    ]


def head_shards(a: Assignment, *, heads: list[int], group: int, columns: list[int], vocabulary: list[int]):
    """The same cut at query heads, each shard with the KV heads that its query heads use."""
    size = len(heads) - 1
    cut = shards(a, cuts=[0] * (size + 1), columns=columns, vocabulary=vocabulary)
    spans = [(heads[rank], heads[rank + 1]) for rank in range(size)]
    return [replace(each, heads=span, kv_heads=kv_span(span, group)) for each, span in zip(cut, spans, strict=True)]


class Meeting:
    """Where threads exchange tensors: the place of `transport.collectives.Group` in one process."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier = threading.Barrier(size)
        self._slots: list[torch.Tensor | None] = [None] * size

    def swap(self, rank: int, tensor: torch.Tensor, timeout_s: float) -> list[torch.Tensor]:
        self._slots[rank] = tensor.clone()
        self._barrier.wait(timeout_s)
        found = list(self._slots)
        self._barrier.wait(timeout_s)
        return found


class ThreadGroup:
    """One rank's view of a meeting."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.meeting, self.rank, self.size = meeting, rank, meeting.size

    def all_reduce_(self, tensor, timeout_s):
        parts = self.meeting.swap(self.rank, tensor, timeout_s)
        tensor.copy_(functools.reduce(torch.add, parts))

    def broadcast_(self, tensor, root, timeout_s):
        tensor.copy_(self.meeting.swap(self.rank, tensor, timeout_s)[root])

    def gather(self, tensor, root, timeout_s):
        parts = self.meeting.swap(self.rank, tensor, timeout_s)
        return parts if self.rank == root else None


class Ring:
    """Stages of shards, turned by hand: tokens in, logits of the last position out."""

    def __init__(self, stages: list[list[Assignment]], *, general: bool = False) -> None:
        self.stages = [[StageModel.load(a, general=general) for a in stage] for stage in stages]

    def step(self, position: int, tokens: list[int], request: str = "r") -> torch.Tensor:
        states: dict = {"tokens": tokens}
        for stage in self.stages:
            states = {"hidden": self._stage(stage, request, position, len(tokens), states)}
        return states["hidden"]

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        position, tokens, found = 0, prompt, []
        for _ in range(count):
            logits = self.step(position, tokens)
            position += len(tokens)
            tokens = [int(logits.argmax())]
            found += tokens
        return found

    @staticmethod
    def _stage(stage, request, position, count, states):
        if len(stage) == 1:
            return stage[0].forward(request, position, **states)
        meeting, results = Meeting(len(stage)), [None] * len(stage)

        def run(rank: int) -> None:
            given = states if rank == 0 else {"count": count}
            group = ThreadGroup(meeting, rank)
            results[rank] = stage[rank].forward(request, position, group=group, timeout_s=20, **given)

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(stage))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return results[0]
