"""Choosing the next token. For a given seed, token i's random number is a function of (seed, i) and of nothing else.

So any stage, standby or replacement that continues a request draws the same token, and a stream can be resumed. The
number is the top 53 bits of BLAKE2b over the pair. It is turned into a token by walking the probabilities in the order
of token ids, not of likelihood: where two plans differ in the last bits of a logit, each boundary of that walk moves by
as little, whereas a sort would swap whole intervals between tokens that are almost equally likely.

Order of operations as in transformers: temperature, then top-k, then top-p. Everything is computed in float64.
"""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import torch

from mesh.errors import RequestError

#: Candidates that are sorted first when looking for the top-p set; nearly always it lies among them.
_LIKELY = 1024


def sample(
    logits: torch.Tensor,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    index: int = 0,
) -> int:
    """The token id for place `index` of a request, from logits [vocab].

    `temperature` 0 is greedy: the lowest id among the highest logits. `top_k` 0 and `top_p` 1 leave all tokens in.
    Raises RequestError where an option is out of bounds or no logit is finite.
    """
    if not (temperature >= 0 and 0 < top_p <= 1 and top_k >= 0):
        raise RequestError(f"temperature {temperature} must be >= 0, top_p {top_p} in (0, 1], top_k {top_k} >= 0")
    values = logits.detach().to("cpu", torch.float32).numpy()
    if temperature == 0 or top_k == 1:
        best = int(values.argmax())
        if not np.isfinite(values[best]):
            raise RequestError("the model gave no finite logits: its weights may be damaged")
        return best
    scaled = values.astype(np.float64)
    peak = scaled.max()
    if not np.isfinite(peak):
        raise RequestError("the model gave no finite logits: its weights may be damaged")
    with np.errstate(over="ignore"):  # a tiny temperature sends all but the best to minus infinity, as it should
        weights = np.exp((scaled - peak) / temperature)
    if 0 < top_k < weights.size:
        weights[weights < np.partition(weights, -top_k)[-top_k]] = 0.0
    if top_p < 1:
        weights[weights < _smallest_kept(weights, top_p)] = 0.0
    walk = np.cumsum(weights)
    token = int(np.searchsorted(walk, uniform(seed, index) * walk[-1], side="right"))
    # Rounding may carry the walk past its end: then it is the last token that is in.
    return min(token, int(np.flatnonzero(weights)[-1]))


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) with 53 random bits: a pure function of seed (any integer) and index."""
    digest = hashlib.blake2b(struct.pack("<QQ", seed & (2**64 - 1), index & (2**64 - 1)), digest_size=8).digest()
    return float((int.from_bytes(digest, "little") >> 11) * 2.0**-53)


def _smallest_kept(weights: np.ndarray, top_p: float) -> float:
    """The weight of the last token of the smallest set that holds `top_p` of the mass. Ties are all kept."""
    target = top_p * weights.sum()
    if weights.size > _LIKELY:
        likely = np.sort(np.partition(weights, -_LIKELY)[-_LIKELY:])[::-1]
        mass = np.cumsum(likely)
        if mass[-1] >= target:
            return float(likely[np.searchsorted(mass, target)])
    ordered = np.sort(weights)[::-1]
    mass = np.cumsum(ordered)
    return float(ordered[min(np.searchsorted(mass, target), ordered.size - 1)])
