"""What a stage costs: seconds a token, seconds of prefill, bytes of memory. Pure arithmetic on measured figures.

A stage of n shards, with all-reduces after attention and after the MLP, takes for one layer and one token

    max over shards (attention bytes / speed) + max over shards (MLP bytes / speed) + 2 all-reduces + overhead

The two maxima stand apart because the all-reduce between them makes every shard wait for the slowest: a shard that got
one KV-head group too many cannot make up for it with fewer MLP columns. `speed` is the roofline at a batch of one,
min(memory bandwidth, FLOP/s * bytes of a weight / 2). An all-reduce is a one-shot exchange: the slowest one-way latency
in the island, plus n-1 vectors through the narrowest path. The KV cache is read at half of the planned context, its
mean while it fills. Prefill is the roofline too, for `PREFILL_TOKENS` tokens.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from topology.headcuts import HeadCut
from topology.heads import kv_span
from topology.model import LOGIT_BYTES, PREFILL_CHUNK, ModelSpec
from topology.picture import Node, Path, Picture
from topology.shares import CUT_UNIT, cut, cut_unit, ranges
from topology.sharing import Demand, share

#: Prompt length behind `Predicted.first_token_ms`.
PREFILL_TOKENS: Final = 512
#: Time of a layer that does not shrink with its slice: Python, dispatch, kernel launches. For devices that nobody
#: measured (`Node.layer_s`). Measured: 200 us at best and
#: 234 us in the median for a Llama layer of hidden size 32 (transformers 5, torch 2.13, one thread of an AMD EPYC).
LAYER_OVERHEAD_S: Final = 200e-6
#: Bytes of what the last stage hands to the first: a token's id, not its hidden state. Measured with its frame and
#: seal, three stages in a ring (docs/benchmarks.md).
TOKEN_BYTES: Final = 62

#: How an island is shared out. "speed": the least time of decoding, as far as memory allows; "prefill": the least time
#: of prefill (`topology.sharing`). "memory": in proportion to memory, for models that fit no other way. "roomy": as
#: "memory", and the device with most memory leads.
POLICIES: Final = ("speed", "memory", "roomy")


@dataclass(frozen=True, slots=True)
class Fit:
    """An island in a certain place of the ring: who takes what share, what a layer costs, how many layers fit.

    `layer_bytes` (weights and KV cache of one layer) and `fixed_bytes` (embedding, head, activations) are by shard.
    `layer_s` is computing and `layer_network_s` all-reduces of one layer and one token; `head_s` and `head_network_s`
    come once a token on the last stage. `prefill_*` are the same for `PREFILL_TOKENS` tokens.
    """

    nodes: tuple[Node, ...]
    policy: str
    heads: tuple[tuple[int, int], ...]
    kv_heads: tuple[tuple[int, int], ...]
    columns: tuple[tuple[int, int], ...]
    vocabulary: tuple[tuple[int, int], ...]
    layer_bytes: tuple[int, ...]
    fixed_bytes: tuple[int, ...]
    capacity: int
    layer_s: float
    layer_network_s: float
    head_s: float
    head_network_s: float
    prefill_layer_s: float
    prefill_layer_network_s: float


def overhead_s(nodes: Sequence[Node]) -> float:
    """Seconds of a layer that do not shrink with a shard's slice, of the slowest of the nodes."""
    return max(LAYER_OVERHEAD_S if node.layer_s is None else node.layer_s for node in nodes)


def width(span: tuple[int, int]) -> int:
    """Length of a half-open range."""
    return span[1] - span[0]


def attention_bytes(model: ModelSpec, kv_heads: int, heads: int | None = None) -> int:
    """Weight bytes of q, k, v and o of one layer for so many KV heads and query heads; None: all that use those."""
    count = kv_heads * model.heads // model.kv_heads if heads is None else heads
    return math.ceil(2 * model.hidden * model.head_dim * (count + kv_heads) * model.weight_bytes)


def mlp_bytes(model: ModelSpec, columns: int) -> int:
    """Weight bytes of gate, up and down of one layer for so many columns."""
    return math.ceil(3 * model.hidden * columns * model.weight_bytes)


def kv_bytes(model: ModelSpec, kv_heads: int, tokens: int) -> int:
    """KV-cache bytes of one layer for so many KV heads and tokens."""
    return 2 * kv_heads * model.head_dim * model.element_bytes * tokens


def activation_bytes(model: ModelSpec, kv_heads: int, columns: int, context: int, heads: int | None = None) -> int:
    """Working memory of one shard while it computes `PREFILL_CHUNK` tokens: streams, heads, MLP, mask."""
    tokens = min(PREFILL_CHUNK, context)
    count = kv_heads * model.heads // model.kv_heads if heads is None else heads
    elements = 4 * model.hidden + 2 * (count + kv_heads) * model.head_dim + 3 * columns
    in_float32 = 4 * model.hidden  # the norms compute in float32
    return tokens * (elements * model.element_bytes + in_float32 + context * model.element_bytes)


def least_bytes(model: ModelSpec, context: int, requests: int = 1) -> int:
    """No plan takes less: all layers with their KV cache and the embedding (with the head, where it is not tied)."""
    layers = model.layers * (model.layer_bytes + kv_bytes(model, model.kv_heads, context * requests))
    return layers + model.embedding_bytes * (1 if model.tied_embeddings else 2)


def needed_bytes(model: ModelSpec, context: int, stages: int, requests: int = 1) -> int:
    """What `stages` stages of one shard take together: what a person is told the model needs."""
    extra = model.embedding_bytes if model.tied_embeddings and stages > 1 else 0
    working = activation_bytes(model, model.kv_heads, model.intermediate, context)
    return least_bytes(model, context, requests) + extra + stages * working + 2 * LOGIT_BYTES * model.vocab


def decode_s(model: ModelSpec, speed: float) -> float:
    """Seconds a token on one device of that speed, with all weights in its memory: T_decode of the planning notes."""
    return (model.layers * model.layer_bytes + model.embedding_bytes) / speed


def fit(
    picture: Picture,
    model: ModelSpec,
    context: int,
    island: tuple[Node, ...],
    policy: str,
    *,
    first: bool,
    last: bool,
    requests: int = 1,
    layers: int = 0,
) -> Fit | None:
    """Share an island out. None where it cannot work: more devices than query heads, no path, not even one layer.

    `requests` KV caches of `context` tokens are held at once. Shares by speed hold `layers` layers at least, or None.
    """
    nodes = tuple(sorted(island, key=lambda node: (-node.usable_bytes, node.rank))) if policy == "roomy" else island
    count = len(nodes)
    worst = slowest_path(picture, nodes)
    if count > model.heads or count > model.intermediate or not worst.reachable:
        return None
    busy = beside(nodes)
    shares = _shares(model, context, busy, policy, first=first, last=last, requests=requests, layers=layers)
    if shares is None:
        return None
    heads, kv_heads, columns, vocabulary = shares
    norms = 2 * model.row_bytes
    layer_bytes = tuple(
        attention_bytes(model, width(g), width(q))
        + mlp_bytes(model, width(c))
        + norms
        + kv_bytes(model, width(g), context * requests)
        for q, g, c in zip(heads, kv_heads, columns, strict=True)
    )
    fixed_bytes = tuple(
        ends_bytes(model, rank, width(rows), first=first, last=last)
        + activation_bytes(model, width(g), width(c), context, width(q))
        for rank, (rows, q, g, c) in enumerate(zip(vocabulary, heads, kv_heads, columns, strict=True))
    )
    capacity = min(
        (node.usable_bytes - fixed) // layer for node, fixed, layer in zip(nodes, fixed_bytes, layer_bytes, strict=True)
    )
    if capacity < max(layers, 1):
        return None
    ranks = range(count)
    cached = [kv_bytes(model, width(g), context) / 2 for g in kv_heads]
    read = [attention_bytes(model, width(g), width(q)) for g, q in zip(kv_heads, heads, strict=True)]
    attention_s = max((read[i] + cached[i]) / busy[i].speed for i in ranks)
    mlp_s = max(mlp_bytes(model, width(columns[i])) / busy[i].speed for i in ranks)
    head_s = max(width(vocabulary[i]) * busy[i].row_s for i in ranks) if last else 0.0
    gather_s = worst.transfer_s(model.vocab * LOGIT_BYTES) if last and count > 1 else 0.0
    tokens = min(PREFILL_TOKENS, context)
    return Fit(
        nodes=nodes,
        policy=policy,
        heads=heads,
        kv_heads=kv_heads,
        columns=columns,
        vocabulary=vocabulary,
        layer_bytes=layer_bytes,
        fixed_bytes=fixed_bytes,
        capacity=capacity,
        layer_s=attention_s + mlp_s + overhead_s(busy),
        layer_network_s=2 * _all_reduce_s(worst, count, model.activation_bytes),
        head_s=head_s,
        head_network_s=gather_s,
        prefill_layer_s=overhead_s(busy)
        + max(_prefill_s(model, busy[i], width(kv_heads[i]), 0, tokens, heads=width(heads[i])) for i in ranks)
        + max(_prefill_s(model, busy[i], 0, width(columns[i]), tokens) for i in ranks),
        prefill_layer_network_s=2 * _all_reduce_s(worst, count, tokens * model.activation_bytes),
    )


def beside(nodes: tuple[Node, ...]) -> tuple[Node, ...]:
    """The nodes as slow as they are while the others of their sites compute with them."""
    sites = Counter(node.site for node in nodes)
    return tuple(_slowed(node) if sites[node.site] > 1 and node.together > 1 else node for node in nodes)


def _slowed(node: Node) -> Node:
    factor = node.together
    layer_s = None if node.layer_s is None else node.layer_s * factor
    return replace(node, speed=node.speed / factor, layer_s=layer_s, row_s=node.row_s * factor)


def ends_bytes(model: ModelSpec, rank: int, rows: int, *, first: bool, last: bool) -> int:
    """Bytes a shard holds besides layers: the embedding (lead of the first stage), the last norm, head rows, logits.

    A tied head that is a slice of an embedding on the same shard is counted once.
    """
    embeds = first and rank == 0
    size = model.embedding_bytes if embeds else 0
    if last:
        if not (embeds and model.tied_embeddings):
            size += rows * model.row_bytes
        size += model.row_bytes + LOGIT_BYTES * (2 * model.vocab if rank == 0 else rows)
    return size


def slowest_path(picture: Picture, nodes: tuple[Node, ...]) -> Path:
    """The path that bounds a collective among the nodes: their worst one-way latency with their least bandwidth."""
    if len(nodes) < 2:
        return Path(0.0, float("inf"), 0.0)
    sites = Counter(node.site for node in nodes)  # devices of a site share its paths, and there are many
    paths = [picture.path(a, b) for a in sites for b in sites if a != b or sites[a] > 1]
    return Path(
        max(path.one_way_s for path in paths),
        min(path.bandwidth for path in paths),
        max(path.rtt_s for path in paths),
        all(path.measured for path in paths),
    )


def _shares(
    model: ModelSpec,
    context: int,
    nodes: tuple[Node, ...],
    policy: str,
    *,
    first: bool,
    last: bool,
    requests: int,
    layers: int,
) -> tuple[tuple[tuple[int, int], ...], ...] | None:
    """Ranges of query heads, KV heads, MLP columns and head rows by shard; None where a shard has no room at all."""
    nobody = tuple((0, 0) for _ in nodes)
    if policy in ("speed", "prefill"):
        found = share(_demand(model, context, nodes, policy, first=first, last=last, requests=requests, layers=layers))
        if found is None:
            return None
        groups, parts, rows = found
        unit, row_unit = cut_unit(model.intermediate, len(nodes)), cut_unit(model.vocab, len(nodes))
        return (
            *_heads(model, groups),
            ranges(parts, unit, model.intermediate),
            ranges(rows, row_unit, model.vocab) if last else nobody,
        )
    embeds = [model.embedding_bytes if first and rank == 0 else 0 for rank in range(len(nodes))]
    room = [max(float(node.usable_bytes - embed), 1.0) for node, embed in zip(nodes, embeds, strict=True)]
    vocabulary = tuple(cut(model.vocab, room, unit=CUT_UNIT)) if last else nobody
    room = [
        node.usable_bytes
        - ends_bytes(model, rank, width(vocabulary[rank]), first=first, last=last)
        - activation_bytes(model, 1, model.intermediate // len(nodes), context)
        for rank, node in enumerate(nodes)
    ]
    if min(room) <= 0:
        return None
    units = cut(model.kv_heads if len(nodes) <= model.kv_heads else model.heads, room)
    heads, kv_heads = _heads(model, [width(each) for each in units])
    # KV-head groups are coarse: columns even out what they leave uneven.
    attention = [
        attention_bytes(model, width(g), width(q)) + kv_bytes(model, width(g), context * requests)
        for q, g in zip(heads, kv_heads, strict=True)
    ]
    whole = sum(attention) + mlp_bytes(model, model.intermediate)
    target = [whole * space / sum(room) - used for space, used in zip(room, attention, strict=True)]
    columns = tuple(cut(model.intermediate, [max(value, 1.0) for value in target], unit=CUT_UNIT))
    return heads, kv_heads, columns, vocabulary


def _heads(model: ModelSpec, shares: list[int]) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Ranges of query heads and of KV heads: shares of whole groups, or of query heads where there are too few."""
    group = model.heads // model.kv_heads
    heads = ranges(shares, group if len(shares) <= model.kv_heads else 1, model.heads)
    return heads, tuple(kv_span(span, group) for span in heads)


def _demand(
    model: ModelSpec,
    context: int,
    nodes: tuple[Node, ...],
    policy: str,
    *,
    first: bool,
    last: bool,
    requests: int,
    layers: int,
) -> Demand:
    """What `topology.sharing` must know: everything is linear in groups, columns and rows."""
    unit, row_unit = cut_unit(model.intermediate, len(nodes)), cut_unit(model.vocab, len(nodes))
    group = attention_bytes(model, 1)
    heads = (
        _head_cut(model, context, nodes, policy, requests=requests, layers=layers)
        if len(nodes) > model.kv_heads
        else None
    )
    columns = mlp_bytes(model, unit)
    if policy == "prefill":
        tokens = min(PREFILL_TOKENS, context)
        group_s = [_prefill_s(model, node, 1, 0, tokens) for node in nodes]
        column_s = [_prefill_s(model, node, 0, unit, tokens) for node in nodes]
    else:
        group_s = [(group + kv_bytes(model, 1, context) / 2) / node.speed for node in nodes]
        column_s = [columns / node.speed for node in nodes]
    base = activation_bytes(model, 0, 0, context) + layers * 2 * model.row_bytes
    ends = [ends_bytes(model, rank, 0, first=first, last=last) for rank in range(len(nodes))]
    more = [ends_bytes(model, rank, row_unit, first=first, last=last) for rank in range(len(nodes))]
    return Demand(
        layers=layers,
        groups=model.kv_heads,
        columns=-(-model.intermediate // unit),
        rows=-(-model.vocab // row_unit) if last else 0,
        group_s=group_s,
        column_s=column_s,
        row_s=[row_unit * node.row_s for node in nodes],
        room=[node.usable_bytes - base - end for node, end in zip(nodes, ends, strict=True)],
        group_bytes=layers * (group + kv_bytes(model, 1, context * requests))
        + activation_bytes(model, 1, 0, context)
        - activation_bytes(model, 0, 0, context),
        column_bytes=layers * columns
        + activation_bytes(model, 0, unit, context)
        - activation_bytes(model, 0, 0, context),
        row_bytes=[a - b for a, b in zip(more, ends, strict=True)],
        heads=heads,
    )


def _head_cut(
    model: ModelSpec, context: int, nodes: tuple[Node, ...], policy: str, *, requests: int, layers: int
) -> HeadCut:
    """The sharing of query heads over more devices than there are KV heads."""
    sizes = attention_bytes(model, 0, 1), attention_bytes(model, 1, 0)
    cached = kv_bytes(model, 1, context) / 2
    line = [sizes[0] / node.speed for node in nodes], [(sizes[1] + cached) / node.speed for node in nodes]
    lines: tuple[tuple[list[float], list[float]], ...] = (line,)
    if policy == "prefill":
        tokens = min(PREFILL_TOKENS, context)
        computed = [_attention_operations(model, *each, tokens) for each in ((0, 1), (1, 0))]
        lines = (
            ([computed[0] / node.flops for node in nodes], [computed[1] / node.flops for node in nodes]),
            ([sizes[0] / node.speed for node in nodes], [sizes[1] / node.speed for node in nodes]),
        )
    nothing = activation_bytes(model, 0, 0, context)
    return HeadCut(
        heads=model.heads,
        group=model.heads // model.kv_heads,
        lines=lines,
        head_bytes=layers * sizes[0] + activation_bytes(model, 0, 0, context, 1) - nothing,
        kv_bytes=layers * (sizes[1] + kv_bytes(model, 1, context * requests))
        + activation_bytes(model, 1, 0, context, 0)
        - nothing,
    )


def all_reduces_s(picture: Picture, model: ModelSpec, nodes: tuple[Node, ...], tokens: int = 1) -> float:
    """Seconds of both all-reduces of one layer over an island."""
    return 2 * _all_reduce_s(slowest_path(picture, nodes), len(nodes), tokens * model.activation_bytes)


def _all_reduce_s(worst: Path, count: int, size_bytes: int) -> float:
    return worst.transfer_s((count - 1) * size_bytes) if count > 1 else 0.0


def _prefill_s(
    model: ModelSpec, node: Node, kv_heads: int, columns: int, tokens: int, *, heads: int | None = None
) -> float:
    count = kv_heads * model.heads // model.kv_heads if heads is None else heads
    weights = attention_bytes(model, kv_heads, count) + mlp_bytes(model, columns)
    operations = _attention_operations(model, kv_heads, count, tokens)
    operations += 2 * mlp_bytes(model, columns) / model.weight_bytes * tokens
    return max(operations / node.flops, weights / node.speed)


def _attention_operations(model: ModelSpec, kv_heads: int, heads: int, tokens: int) -> float:
    # Scores and their product with the values, over the lower triangle: 2 * 2 * T^2/2 operations a head element.
    scores = 2 * tokens**2 * heads * model.head_dim
    return 2 * attention_bytes(model, kv_heads, heads) / model.weight_bytes * tokens + scores
