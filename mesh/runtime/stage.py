"""One shard of one stage, ready to run: weights, KV caches and the step itself.

    stage = StageModel.load(assignment)
    logits = stage.forward("request", 0, tokens=[1, 2, 3])            # a stage that is first and last
    hidden = stage.forward("request", 0, hidden=states, group=group)  # in the middle of a pipeline

Every shard of a stage makes the same calls in the same order; `group` sums what they computed. The embedding lies with
the first stage's lead alone, and so do the hidden states that arrive from the stage before: the lead broadcasts them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Protocol

import torch

from mesh.errors import ModelError, RequestError
from mesh.runtime.assignment import Assignment
from mesh.runtime.cache import KVCache, Sequence
from mesh.runtime.fused import AllReduce
from mesh.runtime.fused_model import FusedModel
from mesh.runtime.shape import shape_of
from mesh.runtime.shard import TORCH_DTYPES
from mesh.runtime.source import ModelSource, open_model
from mesh.runtime.work import Work, step_work

Progress = Callable[[int, int], None]


class Collectives(Protocol):
    """What a step needs of `transport.collectives.Group`."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    def all_reduce_(self, tensor: torch.Tensor, timeout_s: float | None) -> object: ...
    def broadcast_(self, tensor: torch.Tensor, root: int, timeout_s: float | None) -> object: ...
    def gather(self, tensor: torch.Tensor, root: int, timeout_s: float | None) -> list[torch.Tensor] | None: ...


class Engine(Protocol):
    """What both paths, `FusedModel` and `NativeModel`, give a stage."""

    kv_heads: int
    head_dim: int
    hidden: int
    vocab: int

    @property
    def nbytes(self) -> int: ...
    def load(self, progress: Progress) -> None: ...
    def embed(self, tokens: list[int]) -> torch.Tensor: ...
    def run(
        self, x: torch.Tensor, position: int, sequence: Sequence, all_reduce: AllReduce | None, *, logits: bool
    ) -> torch.Tensor: ...


class StageModel:
    """One shard. Not safe for use from two threads at once."""

    def __init__(self, a: Assignment, source: ModelSource, engine: Engine) -> None:
        self.assignment = a
        self._source = source
        self._engine = engine
        # Shards of a stage may hold weights in different dtypes: they exchange what they compute in one.
        self._wire = TORCH_DTYPES[a.wire_dtype or a.dtype]
        self._cache = KVCache(
            layers=a.end - a.start,
            kv_heads=a.kv_heads[1] - a.kv_heads[0],
            head_dim=engine.head_dim,
            context=a.context,
            dtype=TORCH_DTYPES[a.dtype],
            device=torch.device(a.device),
        )
        self._work = step_work(a, source.config, engine.hidden, engine.head_dim)

    @classmethod
    def load(cls, a: Assignment, progress: Progress | None = None, *, general: bool = False) -> StageModel:
        """Open the model and read this shard's slices. `progress(done_bytes, total_bytes)` is called along the way.

        `general` forces transformers' own modules where the fused path would do. Raises ModelError.
        """
        if a.threads > 0:
            torch.set_num_threads(a.threads)
        source = open_model(a.model)
        try:
            engine = _engine(source, a, general)
            return cls._loaded(a, source, engine, progress)
        except BaseException:
            source.close()
            raise

    def reload(self, a: Assignment, progress: Progress | None = None) -> StageModel:
        """The shard that `a` describes, keeping every slice held here that it needs. This one is spent afterwards.

        All requests are forgotten: a new assignment means a new epoch, which starts them again.
        """
        self.drop_all()
        old = self.assignment
        if (a.model, a.dtype, a.device) != (old.model, old.dtype, old.device):
            self.close()
            return StageModel.load(a, progress, general=not isinstance(self._engine, FusedModel))
        if a.threads > 0:
            torch.set_num_threads(a.threads)
        engine: Engine
        if isinstance(self._engine, FusedModel):
            shape = shape_of(self._source.config)
            assert shape is not None
            engine = FusedModel(shape, self._source, a, keep=self._engine)
        else:
            from mesh.runtime.native import NativeModel

            assert isinstance(self._engine, NativeModel)
            engine = NativeModel(self._source, a, keep=self._engine)
        return self._loaded(a, self._source, engine, progress)

    @classmethod
    def _loaded(cls, a: Assignment, source: ModelSource, engine: Engine, progress: Progress | None) -> StageModel:
        with torch.inference_mode():
            engine.load(progress or (lambda done, total: None))
        if not isinstance(engine, FusedModel) or not a.first:
            source.close()  # the fused path may look embeddings up; reading opens the file again
        _trim()
        return cls(a, source, engine)

    @torch.inference_mode()
    def forward(
        self,
        request: str,
        position: int,
        *,
        tokens: list[int] | None = None,
        hidden: torch.Tensor | None = None,
        count: int | None = None,
        group: Collectives | None = None,
        logits: bool = True,
        timeout_s: float | None = None,
    ) -> torch.Tensor:
        """One step of `request`: n positions from `position` on, which must not lie beyond those already filled.

        The lead of the first stage is given `tokens` [n], the lead of a later one `hidden` [n, hidden]. Other shards of
        the stage may give either, or just `count`: they only need to know n, the states come from the lead.

        Gives hidden states [n, hidden] in the shard's dtype; on the last stage the lead gives float32 logits [vocab] of
        the last position, and an empty tensor where `logits` is False (a chunk of a prompt that is not the last); the
        other shards of the last stage give an empty tensor. Raises RequestError, DeadlineExceeded per collective.
        """
        a, engine = self.assignment, self._engine
        shared = group if group is not None and group.size > 1 else None
        if a.size > 1 and shared is None:
            raise ModelError(f"stage {a.stage} has {a.size} shards and was given no group to sum them")
        x = self._input(tokens, hidden, count, shared, timeout_s)
        sequence = self._cache.open(request, position, x.shape[0])

        def all_reduce(tensor: torch.Tensor) -> None:
            assert shared is not None
            sent = tensor.to(self._wire)
            shared.all_reduce_(sent, timeout_s)
            if sent is not tensor:
                tensor.copy_(sent)

        found = engine.run(x, position, sequence, None if shared is None else all_reduce, logits=a.last and logits)
        sequence.filled = position + x.shape[0]
        if not a.last:
            return found
        if not logits:
            return found.new_empty(0)
        if shared is None:
            return found.float()
        parts = shared.gather(found.to(self._wire), 0, timeout_s)
        if parts is None or not a.leads:
            return found.new_empty(0)
        return torch.cat([part.to("cpu", torch.float32) for part in parts])

    def drop(self, request: str) -> None:
        """Free a request's keys and values."""
        self._cache.drop(request)

    def drop_all(self) -> None:
        """Free all keys and values."""
        self._cache.clear()

    def close(self) -> None:
        """Close the model's files."""
        self._source.close()

    def work(self, position: int) -> Work | None:
        """What a decoding step at this position takes; None for an accelerator, whose steps end after they return."""
        if self._work is None or not self.assignment.device.startswith("cpu"):
            return None
        step, position_bytes = self._work
        return step._replace(size_bytes=step.size_bytes + position * position_bytes)

    @property
    def hidden(self) -> int:
        """Elements of one position's hidden state."""
        return self._engine.hidden

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights held."""
        return self._engine.nbytes

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values held."""
        return self._cache.nbytes

    def _input(
        self,
        tokens: list[int] | None,
        hidden: torch.Tensor | None,
        count: int | None,
        group: Collectives | None,
        timeout_s: float | None,
    ) -> torch.Tensor:
        a, engine = self.assignment, self._engine
        if a.leads and a.first:
            if not tokens:
                raise RequestError("a step needs at least one token")
            if not all(0 <= token < engine.vocab for token in tokens):
                raise RequestError(f"token ids must lie in 0..{engine.vocab - 1}")
            x = engine.embed(tokens)
        elif a.leads:
            if hidden is None or hidden.dim() != 2 or hidden.shape[0] == 0 or hidden.shape[1] != engine.hidden:
                raise RequestError(f"stage {a.stage} needs hidden states [n, {engine.hidden}] from the stage before")
            x = hidden.to(device=a.device, dtype=TORCH_DTYPES[a.dtype])
        else:
            n = len(tokens) if tokens is not None else hidden.shape[0] if hidden is not None else count
            if not n:
                raise RequestError("a shard needs to know how many positions a step has")
            x = torch.empty((n, engine.hidden), dtype=TORCH_DTYPES[a.dtype], device=a.device)
        if group is not None:
            sent = x.to(self._wire).contiguous()
            group.broadcast_(sent, 0, timeout_s)
            x = sent.to(x.dtype)
        return x


def _trim() -> None:
    """Give what loading used for a while back to the system: 45 MB for the small model. glibc alone needs the hint."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):
        pass


def _engine(source: ModelSource, a: Assignment, general: bool) -> Engine:
    shape = None if general else shape_of(source.config)
    layers = source.config.get("num_hidden_layers") if shape is None else shape.layers
    if isinstance(layers, int) and not 0 <= a.start < a.end <= layers:
        raise ModelError(f"{source.path} has {layers} layers; {a.start}:{a.end} was asked for")
    if shape is not None:
        return FusedModel(shape, source, a)
    from mesh.runtime.native import NativeModel

    return NativeModel(source, a)
