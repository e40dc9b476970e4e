"""The fused path for the llama family (see `shape.FAMILIES`): the decoder layers in as few operations as torch allows.

q, k and v are one matrix, gate and up another; one row's norm is a dot product; a decoding step's query heads attend as
rows of their KV head, so that no key is copied. What it computes is what transformers' modules compute, and the tests
hold it to that. It exists because importing those modules costs a worker 130 MB and 2 s, and because a step through
them takes longer: `python -m benchmarks.decode` measures how much.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from mesh.runtime.assignment import Assignment
from mesh.runtime.cache import Sequence
from mesh.runtime.matrix import Matrix
from mesh.runtime.shape import TP_PLAN, Shape, inverse_frequencies
from mesh.runtime.shard import TORCH_DTYPES, Cut, Held, Piece, cut_of, fill
from mesh.runtime.source import ModelSource
from topology.heads import blocks

AllReduce = Callable[[torch.Tensor], None]
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_OUT = ("self_attn.o_proj",)
_DOWN = ("mlp.down_proj",)


class FusedLayer:
    """One decoder layer's blocks. `ranges` are what it was cut to: `cut_to` of its assignment."""

    def __init__(self, index: int, shape: Shape, source: ModelSource, a: Assignment, held: Held) -> None:
        self.ranges = cut_to(a, shape)
        self._cuts: dict[str, Cut] = {}
        self._vectors: dict[str, torch.Tensor] = {}
        self._prefix = f"model.layers.{index}."
        self._shape = shape
        self.qkv = self._matrix(_QKV, source, a, held)
        self.out = self._matrix(_OUT, source, a, held)
        self.gate_up = self._matrix(_GATE_UP, source, a, held)
        self.down = self._matrix(_DOWN, source, a, held)
        self.input_norm = self._vector("input_layernorm", source, a, held)
        self.post_norm = self._vector("post_attention_layernorm", source, a, held)
        self.q_norm = self._vector("self_attn.q_norm", source, a, held) if shape.qk_norm else None
        self.k_norm = self._vector("self_attn.k_norm", source, a, held) if shape.qk_norm else None

    @property
    def nbytes(self) -> int:
        """Bytes of weights held."""
        matrices = (self.qkv, self.out, self.gate_up, self.down)
        return sum(m.nbytes for m in matrices) + sum(v.nbytes for v in self._vectors.values())

    def pieces(self) -> dict[str, Piece]:
        """What this layer holds, by tensor name, for a layer that is cut otherwise."""
        found = {name: Piece(Cut(), lambda v=vector: v) for name, vector in self._vectors.items()}  # type: ignore[misc]
        stacks = ((_QKV, self.qkv), (_OUT, self.out), (_GATE_UP, self.gate_up), (_DOWN, self.down))
        for modules, matrix in stacks:
            row = 0
            for module in modules:
                name = f"{self._prefix}{module}.weight"
                cut = self._cuts[name]
                rows = cut.stop - cut.start if cut.dim == 0 else matrix.shape[0]

                def block(matrix: Matrix = matrix, row: int = row, rows: int = rows) -> torch.Tensor:
                    return matrix.dense()[row : row + rows]

                found[name] = Piece(cut, block)
                row += rows
        return found

    def _matrix(self, modules: tuple[str, ...], source: ModelSource, a: Assignment, held: Held) -> Matrix:
        weight = self._stack(modules, "weight", source, a, held)
        biased = f"{self._prefix}{modules[0]}.bias" in source
        if biased and TP_PLAN[f"layers.*.{modules[0]}"] == "rowwise" and not a.leads:
            biased = False  # summed over the shards, a bias may be added only once
        return Matrix(weight, self._stack(modules, "bias", source, a, held) if biased else None)

    def _stack(
        self, modules: tuple[str, ...], kind: str, source: ModelSource, a: Assignment, held: Held
    ) -> torch.Tensor:
        blocks = []
        for module in modules:
            name = f"{self._prefix}{module}.{kind}"
            whole = source.shape(name)
            plan, shape = TP_PLAN[f"layers.*.{module}"], self._shape
            cut = cut_of(module, kind, whole, plan=plan, kv_heads=shape.kv_heads, group=shape.group, a=a)
            self._cuts[name] = cut
            blocks.append((name, cut, cut.shape(whole)))
        rows = sum(size[0] for _, _, size in blocks)
        stack = torch.empty((rows, *blocks[0][2][1:]), dtype=TORCH_DTYPES[a.dtype], device=a.device)
        first = 0
        for name, cut, size in blocks:
            fill(stack[first : first + size[0]], source, name, cut, held)
            first += size[0]
        return stack

    def _vector(self, module: str, source: ModelSource, a: Assignment, held: Held) -> torch.Tensor:
        name = f"{self._prefix}{module}.weight"
        vector = torch.empty(source.shape(name), dtype=TORCH_DTYPES[a.dtype], device=a.device)
        fill(vector, source, name, Cut(), held)
        self._vectors[name] = vector
        return vector


def cut_to(a: Assignment, shape: Shape) -> tuple[object, ...]:
    """What a layer's blocks depend on: query heads, KV heads, MLP columns, and whether it adds biases."""
    return (a.query_heads(shape.group), a.kv_heads, a.columns, a.leads)


class FusedStack:
    """A run of layers of one shard. Hidden states are [n, hidden] in the shard's dtype."""

    def __init__(self, shape: Shape, a: Assignment) -> None:
        self.shape = shape
        self.layers: dict[int, FusedLayer] = {}
        self._device = torch.device(a.device)
        self._frequencies = inverse_frequencies(shape).to(self._device)
        self._start = a.start
        heads = a.query_heads(shape.group)
        self._queries = heads[1] - heads[0]
        self._blocks = blocks(heads, shape.group)

    def run(self, x: torch.Tensor, position: int, sequence: Sequence, all_reduce: AllReduce | None) -> torch.Tensor:
        """Take hidden states of positions `position` on through the layers; keys and values go to `sequence`."""
        count = x.shape[0]
        total = position + count
        cos, sin = self._rotation(position, count, x.dtype)
        masks: dict[int | None, torch.Tensor | None] = {}
        for offset, layer in enumerate(self.layers.values()):
            window = self.shape.windows[self._start + offset]
            if window is not None and total <= window:
                window = None
            if count > 1 and window not in masks:
                masks[window] = self._mask(position, count, window)
            attended = self._attend(layer, x, cos, sin, position, sequence.buffers[offset], window, masks.get(window))
            projected = layer.out(attended)
            if all_reduce is not None:
                all_reduce(projected)
            x = x + projected
            gate_up = layer.gate_up(rms_norm(x, layer.post_norm, self.shape.eps))
            half = gate_up.shape[1] // 2
            projected = layer.down(functional.silu(gate_up[:, :half]).mul_(gate_up[:, half:]))
            if all_reduce is not None:
                all_reduce(projected)
            x = x + projected
        return x

    def _attend(  # noqa: PLR0917 - an inner step of `run`, with what is the same for all layers
        self,
        layer: FusedLayer,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        position: int,
        buffer: torch.Tensor,
        window: int | None,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        count, dim = x.shape[0], self.shape.head_dim
        kv = buffer.shape[1]
        if kv == 0:  # a shard may hold MLP columns alone
            return x.new_empty((count, 0))
        queries = self._queries
        heads = layer.qkv(rms_norm(x, layer.input_norm, self.shape.eps)).view(count, queries + 2 * kv, dim)
        turned = heads[:, : queries + kv]
        if layer.q_norm is not None and layer.k_norm is not None:
            eps = self.shape.eps
            turned = torch.cat(
                (_norm(turned[:, :queries], layer.q_norm, eps), _norm(turned[:, queries:], layer.k_norm, eps)), 1
            )
        # Rotary embedding: the half that rotate_half would negate is negated in `sin` instead.
        turned = torch.addcmul(turned * cos, torch.roll(turned, dim // 2, -1), sin)
        total = position + count
        buffer[0, :, position:total] = turned[:, queries:].transpose(0, 1)
        buffer[1, :, position:total] = heads[:, queries + kv :].transpose(0, 1)
        first = total - window if window is not None and count == 1 else 0
        keys, values = buffer[:, None, :, first:total].unbind(0)
        if len(self._blocks) == 1:
            return _attended(turned[:, :queries], keys, values, mask)
        # A cut group has fewer query heads than a whole one, and torch wants as many for every KV head of a call.
        parts = []
        for block in self._blocks:
            (q0, q1), (k0, k1) = block.heads, block.kv_heads
            parts.append(_attended(turned[:, q0:q1], keys[:, k0:k1], values[:, k0:k1], mask))
        return torch.cat(parts, 1)

    def _rotation(self, position: int, count: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of the angles, [count, 1, head_dim]; once a step, not once a layer."""
        positions = torch.arange(position, position + count, device=self._device, dtype=torch.float32)
        angles = torch.outer(positions, self._frequencies)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), -1)[:, None].to(dtype), torch.cat((-sin, sin), -1)[:, None].to(dtype)

    def _mask(self, position: int, count: int, window: int | None) -> torch.Tensor | None:
        """bool [count, position + count], True where a query may look; None where plain causal does."""
        if position == 0 and window is None:
            return None
        queries = torch.arange(position, position + count, device=self._device)[:, None]
        keys = torch.arange(position + count, device=self._device)
        allowed = keys <= queries
        return allowed if window is None else allowed & (keys > queries - window)


def _attended(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """[n, heads * dim] of queries [n, heads, dim] and keys, values [1, KV heads, total, dim].

    Equally many query heads, one after the other, belong to every KV head.
    """
    count, heads, dim = queries.shape
    kv = keys.shape[1]
    if count == 1:
        rows = queries.reshape(1, kv, heads // kv, dim)
        return functional.scaled_dot_product_attention(rows, keys, values).view(1, heads * dim)
    attended = functional.scaled_dot_product_attention(
        queries.transpose(0, 1)[None],
        keys,
        values,
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=heads > kv,
    )
    return attended[0].transpose(0, 1).reshape(count, heads * dim)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm of [n, hidden], in float32 as transformers does it. One row on a CPU: a dot product, half the time."""
    if x.shape[0] == 1 and x.device.type == "cpu":
        row = x[0].float()
        scale = (torch.dot(row, row).item() / row.shape[0] + eps) ** -0.5
        scaled: torch.Tensor = x * scale if x.dtype == torch.float32 else (row * scale).to(x.dtype)[None]
        return scaled.mul_(weight)
    return _norm(x, weight, eps)


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    normed: torch.Tensor = weight * wide.to(x.dtype)
    return normed
