"""The general path: transformers' own modules, cut by their own tensor- and pipeline-parallel plans.

The model is built without weights, reduced to the layers of this shard, and its linear modules get their blocks; hooks
sum the outputs of the "rowwise" ones over the shards. The forward pass is transformers', so masks, rotary embeddings,
soft caps and scalings are whatever the family needs. Keys and values go to our own cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from mesh.errors import ModelError
from mesh.runtime.assignment import Assignment
from mesh.runtime.cache import Sequence
from mesh.runtime.fused import AllReduce
from mesh.runtime.plans import layer_plan
from mesh.runtime.shard import TORCH_DTYPES, Cut, Piece, cut_of, fill
from mesh.runtime.source import ModelSource
from topology.heads import blocks


class NativeModel:
    """The layers of one shard, with the embedding, the last norm and the head where the shard has them."""

    def __init__(self, source: ModelSource, a: Assignment, keep: NativeModel | None = None) -> None:
        from transformers import CONFIG_MAPPING, AutoModelForCausalLM

        self._all_reduce: AllReduce | None = None
        self._repeats: torch.Tensor | None = None
        self._source = source
        self._a = a
        self._kept = {} if keep is None else keep._held
        self._held: dict[str, Piece] = {}
        config = CONFIG_MAPPING[source.config["model_type"]].from_dict(source.config)
        self._plan = layer_plan(config, str(source.path))
        with torch.device("meta"):
            self._model = AutoModelForCausalLM.from_config(config, dtype=TORCH_DTYPES[a.dtype])
        self._model.eval()
        self._base = self._model.base_model
        self._prefix = f"{self._model.base_model_prefix}."
        self.kv_heads = int(config.num_key_value_heads)
        self._group = int(config.num_attention_heads) // self.kv_heads
        self._blocks = blocks(a.query_heads(self._group), self._group)
        self.head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        self.vocab, self.hidden = int(config.vocab_size), int(config.hidden_size)
        self._reduce()

    def _reduce(self) -> None:
        """Leave in the model only what this shard runs; make its buffers real; hook the modules to be summed."""
        a, base, config = self._a, self._base, self._model.config
        base.layers = nn.ModuleList(base.layers[a.start : a.end])
        config.num_hidden_layers = a.end - a.start
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[a.start : a.end]
        if not (a.first and a.leads):
            base.embed_tokens = nn.Identity()
        if not a.last:
            base.norm = nn.Identity()
        self._head = a.last and a.vocabulary[0] < a.vocabulary[1]
        if not self._head:
            self._model.set_output_embeddings(nn.Identity())
        for module in self._model.modules():
            if module._non_persistent_buffers_set:
                for name in module._non_persistent_buffers_set:
                    buffer = module._buffers[name]
                    if buffer is not None:
                        module._buffers[name] = torch.empty_like(buffer, device=a.device)
                self._model._init_weights(module)
        for layer in base.layers:
            for path, module in layer.named_modules():
                if self._plan.get(f"layers.*.{path}") == "rowwise":
                    module.register_forward_hook(self._sum)
            self._regroup(layer.self_attn)

    def _regroup(self, attention: nn.Module) -> None:
        """Tell attention how many of this shard's query heads use a KV head, where groups were cut.

        Where that is not the same for all, keys and values come from the cache once for every query head.
        """
        groups = {block.group for block in self._blocks}
        if groups <= {self._group}:
            return
        if not hasattr(attention, "num_key_value_groups"):
            raise ModelError(f"{self._source.path}: its family is cut between KV heads only: ask for fewer shards")
        if len(groups) > 1:
            counts = [block.group for block in self._blocks for _ in range(*block.kv_heads)]
            self._repeats = torch.repeat_interleave(
                torch.arange(len(counts), device=self._a.device), torch.tensor(counts, device=self._a.device)
            )
        attention.num_key_value_groups = 1 if len(groups) > 1 else groups.pop()  # type: ignore[assignment]

    def load(self, progress: Callable[[int, int], None]) -> None:
        """Give every remaining parameter its block. `progress(done, total)` counts bytes."""
        wanted = list(self._wanted())
        total = sum(block.nbytes for *_, block in wanted)
        done = 0
        progress(done, total)
        for module, kind, name, key, cut, meta in wanted:
            held = {} if key not in self._kept else {name: self._kept[key]}
            block = torch.empty(meta.shape, dtype=meta.dtype, device=self._a.device)
            fill(block, self._source, name, cut, held)
            self._kept.pop(key, None)
            module._parameters[kind] = nn.Parameter(block, requires_grad=False)
            self._held[key] = Piece(cut, lambda block=block: block)  # type: ignore[misc]
            done += block.nbytes
            progress(done, total)
        self._kept = {}
        self._check_entrance()
        progress(total, total)

    def _wanted(self) -> Iterator[tuple[nn.Module, str, str, str, Cut, torch.Tensor]]:
        """Per parameter: its module and kind, its name in the checkpoint, a key, its cut, and an empty block's shape.

        The key tells a tied head from the embedding, which have one name.
        """
        tied = bool(self._model.config.tie_word_embeddings)
        head = self._model.get_output_embeddings() if self._head else None
        for path, module in list(self._model.named_modules()):
            for kind, parameter in list(module._parameters.items()):
                if parameter is None:
                    continue
                key, cut = self._locate(path, kind, tuple(parameter.shape), module is head)
                if cut is None:
                    module._parameters[kind] = None  # summed over the shards, a bias may be added only once
                    continue
                name = f"{self._prefix}embed_tokens.weight" if module is head and tied and kind == "weight" else key
                shape = cut.shape(tuple(parameter.shape))
                yield module, kind, name, key, cut, torch.empty(shape, dtype=parameter.dtype, device="meta")

    @property
    def nbytes(self) -> int:
        """Bytes of weights held."""
        return sum(piece.tensor().nbytes for piece in self._held.values())

    def _check_entrance(self) -> None:
        """Whether hidden states from the stage before enter the layers unchanged.

        Some families scale what they take for embeddings. With no layers and no norm the model must be the identity.
        """
        if self._a.first:
            return
        base = self._base
        if hasattr(base, "embedding_multiplier"):  # granite
            base.embedding_multiplier = 1.0
        layers, norm = base.layers, base.norm
        base.layers, base.norm = nn.ModuleList(), nn.Identity()
        base.config.num_hidden_layers = 0
        try:
            states = torch.ones((1, 1, self.hidden), dtype=TORCH_DTYPES[self._a.dtype], device=self._a.device)
            positions = torch.zeros((1, 1), dtype=torch.long, device=self._a.device)
            found = base(inputs_embeds=states, position_ids=positions, use_cache=False).last_hidden_state
        finally:
            base.layers, base.norm = layers, norm
            base.config.num_hidden_layers = len(layers)
        if not torch.equal(found, states):
            raise ModelError(f"{self._source.path}: its family scales hidden states; it runs as a single stage only")

    def embed(self, tokens: list[int]) -> torch.Tensor:
        """Hidden states [n, hidden] of token ids; on the first stage's lead only."""
        ids = torch.tensor([tokens], device=self._a.device)
        states: torch.Tensor = self._base.embed_tokens(ids)[0]
        return states

    def run(
        self, x: torch.Tensor, position: int, sequence: Sequence, all_reduce: AllReduce | None, *, logits: bool
    ) -> torch.Tensor:
        """Hidden states through the layers, or with `logits` through norm and head: [rows held of the vocabulary]."""
        self._all_reduce = all_reduce
        given = {
            "inputs_embeds": x[None],
            "position_ids": torch.arange(position, position + x.shape[0], device=x.device)[None],
            "past_key_values": _cache(sequence, position, self._a.start, self._repeats),
            "use_cache": True,
        }
        try:
            if logits and self._head:
                found: torch.Tensor = self._model(**given, logits_to_keep=1).logits[0, 0]
                return found
            states: torch.Tensor = self._base(**given).last_hidden_state[0]
            return x.new_empty(0) if logits else states
        finally:
            self._all_reduce = None

    def _sum(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if self._all_reduce is not None:
            output = output.contiguous()
            self._all_reduce(output)
        return output

    def _locate(self, path: str, kind: str, whole: tuple[int, ...], head: bool) -> tuple[str, Cut | None]:
        """A parameter's name in the checkpoint, and the block of it that is this shard's; None where it has none."""
        parts = path.removeprefix(self._prefix).split(".")
        if parts[0] != "layers":
            return f"{path}.{kind}", Cut(0, *self._a.vocabulary) if head else Cut()
        module = ".".join(parts[2:])
        name = f"{self._prefix}layers.{int(parts[1]) + self._a.start}.{module}.{kind}"
        plan = self._plan.get(f"layers.*.{module}")
        if plan is None and len(whole) > 1 and self._a.size > 1:
            raise ModelError(f"{self._source.path}: its tensor-parallel plan leaves out {module}")
        if plan == "rowwise" and kind == "bias" and not self._a.leads:
            return name, None
        return name, cut_of(module, kind, whole, plan=plan, kv_heads=self.kv_heads, group=self._group, a=self._a)


def _cache(sequence: Sequence, position: int, start: int, repeats: torch.Tensor | None) -> Any:
    """A transformers Cache over our buffers. Sliding layers keep all positions; their masks hide the old ones.

    `repeats`: for each query head the KV head that attention is to be given, where it cannot work that out.
    """
    from transformers.cache_utils import Cache, DynamicLayer

    class Layer(DynamicLayer):  # type: ignore[misc]
        def __init__(self, buffer: torch.Tensor) -> None:
            super().__init__()
            self._buffer = buffer
            self._filled = position
            self.is_initialized = True

        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            stop = self._filled + key_states.shape[-2]
            self._buffer[0, :, self._filled : stop] = key_states[0]
            self._buffer[1, :, self._filled : stop] = value_states[0]
            self._filled = stop
            if repeats is not None:
                keys, values = (each[None, :, :stop].index_select(1, repeats) for each in self._buffer)
                return keys, values
            return self._buffer[0:1, :, :stop], self._buffer[1:2, :, :stop]

        def get_seq_length(self) -> int:
            return self._filled

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return self._filled + query_length, 0

    class Offset(Cache):  # type: ignore[misc]
        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            found: tuple[torch.Tensor, torch.Tensor] = self.layers[layer_idx - start].update(key_states, value_states)
            return found

    return Offset(layers=[Layer(buffer) for buffer in sequence.buffers])
