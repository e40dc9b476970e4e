"""What a running plan has loaded where, how much of it another plan would keep, and how long the rest would take."""

from __future__ import annotations

from topology.candidate import Candidate
from topology.cost import attention_bytes, mlp_bytes, width
from topology.picture import UNMEASURED_BANDWIDTH
from topology.plan import Plan
from topology.search import Search

Span = tuple[int, int]


class Loaded:
    """The layer weights of one plan, embedding and head apart. What was worked out for a candidate is remembered."""

    def __init__(self, search: Search, previous: Plan) -> None:
        model = previous.model
        self._search, self._sites = search, previous.sites
        self._head_bytes, self._kv_bytes = attention_bytes(model, 0, 1), attention_bytes(model, 1, 0)
        self._column_bytes = mlp_bytes(model, model.intermediate) / model.intermediate
        self.whole_bytes = model.layers * self._layer((0, model.kv_heads), (0, model.heads), (0, model.intermediate))
        #: By `site/device`: layers, KV heads, query heads and columns, of shards and of standbys.
        self._spans: dict[str, tuple[Span, tuple[Span, Span, Span]]] = {}
        self._dtypes: dict[str, str] = {}
        self.bytes_by_device: dict[str, float] = {}
        for stage in previous.stages:
            for shard in stage.shards:
                spans = (shard.kv_heads, shard.query_heads(model), shard.columns)
                self._spans[shard.key], self._dtypes[shard.key] = ((stage.start, stage.end), spans), shard.dtype
                layer = self._layer(*spans)
                self.bytes_by_device[shard.key] = (stage.end - stage.start) * layer
        for standby in previous.standbys:
            stage = previous.stages[standby.stage]
            shard = stage.shards[standby.rank]
            spans = (shard.kv_heads, shard.query_heads(model), shard.columns)
            self._spans[standby.key], self._dtypes[standby.key] = ((stage.start, stage.end), spans), shard.dtype
        self._kept: dict[tuple[object, ...], dict[str, float]] = {}
        self._widest: dict[str, float] = {}

    def _layer(self, kv_heads: Span, heads: Span, columns: Span) -> float:
        each = ((self._kv_bytes, kv_heads), (self._head_bytes, heads), (self._column_bytes, columns))
        return sum(size * max(width(span), 0) for size, span in each)

    def kept_by_device(self, candidate: Candidate) -> dict[str, float]:
        """Bytes that are already where the candidate wants them, by `site/device`."""
        known = self._kept.get(candidate.identity)
        if known is not None:
            return known
        total: dict[str, float] = {}
        start = 0
        for each, layers in zip(candidate.fits, candidate.counts, strict=True):
            for rank, node in enumerate(each.nodes):
                if node.key in self._spans and self._dtypes[node.key] == node.dtype:
                    (old_start, old_end), spans = self._spans[node.key]
                    common = min(start + layers, old_end) - max(start, old_start)
                    if common > 0:
                        wanted = (each.kv_heads[rank], each.heads[rank], each.columns[rank])
                        layer = self._layer(*(_common(a, b) for a, b in zip(wanted, spans, strict=True)))
                        total[node.key] = common * layer
            start += layers
        self._kept[candidate.identity] = total
        return total

    def kept_bytes(self, candidate: Candidate) -> float:
        """The same of all devices together."""
        return sum(self.kept_by_device(candidate).values())

    def moving_s(self, candidate: Candidate) -> float:
        """Seconds until every device has the weights that it lacks, one after the other over the widest paths."""
        kept = self.kept_by_device(candidate)
        took_s = 0.0
        for each, layers in zip(candidate.fits, candidate.counts, strict=True):
            for rank, node in enumerate(each.nodes):
                size = layers * self._layer(each.kv_heads[rank], each.heads[rank], each.columns[rank])
                took_s += (size - kept.get(node.key, 0.0)) / self._bandwidth(node.site)
        return took_s

    def _bandwidth(self, site: str) -> float:
        """Bytes/s of the widest path to a site from any that has weights."""
        if site not in self._widest:
            picture = self._search.picture
            sources = [name for name in self._sites if name in picture.nodes] or list(picture.sites)
            paths = [picture.path(name, site) for name in sources]
            self._widest[site] = max((p.bandwidth for p in paths if p.reachable), default=UNMEASURED_BANDWIDTH)
        return self._widest[site]


def _common(a: Span, b: Span) -> Span:
    return max(a[0], b[0]), min(a[1], b[1])
