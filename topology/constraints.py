"""What a user may ask of a plan. Parsed from an open mapping (JSON, TOML, keyword arguments) into a checked value.

| key | value | means |
|---|---|---|
| `objective` | "latency", "throughput", "first_token", "cost", "balanced" | what to make least or most, at any number of sites; see `topology.objective`. Not given: what `min_latency` says |
| `min_latency` | "low", "medium", "high" | the latency wanted: "low" minimises it at any number of sites; "medium" (default) takes as few sites as fit, then the least latency; "high" tolerates it for throughput over many requests |
| `max_token_latency_ms` | number > 0 | no plan predicted slower than this a token |
| `max_first_token_ms` | number > 0 | no plan predicted to take longer for a prompt of 512 tokens |
| `min_tokens_per_s` | number > 0 | no plan with a lower predicted rate over many requests (`concurrency` of them, where asked) |
| `max_price_per_hour` | number > 0 | the prices of all devices and sites of the plan, standbys and replicas included |
| `sites`, `exclude_sites` | a name or a list of names | where the model may and may not run |
| `regions`, `exclude_regions` | a name or pattern, or a list: `eu-*` | the same by region; `*`, `?` and `[a-c]` as in a shell |
| `max_sites` | integer >= 1 | how many sites may take part |
| `vendors` | a name or a list of names | only devices of these vendors |
| `trusted_only` | true or false | only sites that are marked as trusted |
| `private` | true or false | token ids appear at the submitting site alone: the first and the last stage are there |
| `needs` | "matmul-throughput", "memory-bandwidth", "memory", "low-latency", "low-price" | only devices measured within a factor of two of the best; see `topology.needs` |
| `dtype` | "float32", "bfloat16", "float16", a list of these, or "auto" | what the model runs in, instead of its own; of a list each device takes what pays there, and of "auto" its own dtype or a wider one; see `topology.dtypes` |
| `codes` | "bfloat16", "fp8", "int8" | lossy codes that hidden states may travel in where bandwidth is the limit |
| `context` | integer >= 1 | tokens to size KV caches for; default min(model's, 2048) |
| `concurrency` | integer >= 1 | requests of that context whose KV caches fit at once; default 1 |
| `standbys` | integer >= 0 | devices that hold a shard's weights beside the one that serves it; default 0 |
| `replicas` | integer >= 1, or "auto" | rings of the model, requests are split over them; "auto": as many as help the objective. Not given: one, and with objective "throughput" several on a mesh so large that one ring cannot keep it busy |
| `priority` | integer from -100 to 100 | a job may displace those of lower priority where nothing fits otherwise; default 0 |
| `stages` | integer >= 1 | expert override: exactly so many pipeline stages |
| `shards` | integer >= 1, or a list, one a stage | expert override: exactly so many tensor-parallel shards |

The overrides exist for tests and benchmarks: they force a plan that the planner would not choose, also one across a
link where tensor parallelism does not pay, and are refused where they cannot be met.
"""  # noqa: E501 - a table row cannot be broken

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from topology import checks
from topology.checks import Check, nearest
from topology.errors import ConstraintError
from topology.model import DTYPE_BYTES

#: Values of `min_latency`, and the objective that each stands for.
LATENCIES: Final = {"low": "latency", "medium": "fewest_sites", "high": "throughput"}
#: Values of `objective`. What plans are compared by is one of these, or "fewest_sites" where none was given.
OBJECTIVES: Final = ("latency", "throughput", "first_token", "cost", "balanced")
#: Values of `needs`; `topology.needs` says how each is measured.
NEEDS: Final = ("matmul-throughput", "memory-bandwidth", "memory", "low-latency", "low-price")
#: Lossy codes of hidden states, the most faithful first, and bytes an element: blocks of 128 share a scale of 4 bytes.
CODES: Final = {"bfloat16": 2.0, "int8": 1 + 4 / 128, "fp8": 1 + 4 / 128}
#: Bounds of `priority`.
PRIORITIES: Final = (-100, 100)

__all__ = ["CODES", "LATENCIES", "NEEDS", "OBJECTIVES", "Constraints", "nearest"]


@dataclass(frozen=True, slots=True)
class Constraints:
    """Checked constraints; the module's table says what each means. None or empty stands for "not asked"."""

    min_latency: str = "medium"
    max_token_latency_ms: float | None = None
    sites: tuple[str, ...] = ()
    exclude_sites: tuple[str, ...] = ()
    regions: tuple[str, ...] = ()
    max_sites: int | None = None
    dtype: str | tuple[str, ...] | None = None
    context: int | None = None
    stages: int | None = None
    shards: int | tuple[int, ...] | None = None
    objective: str | None = None
    max_first_token_ms: float | None = None
    min_tokens_per_s: float | None = None
    max_price_per_hour: float | None = None
    exclude_regions: tuple[str, ...] = ()
    vendors: tuple[str, ...] = ()
    trusted_only: bool = False
    private: bool = False
    needs: tuple[str, ...] = ()
    codes: tuple[str, ...] = ()
    concurrency: int | None = None
    standbys: int = 0
    replicas: int | str | None = None
    priority: int = 0

    def __post_init__(self) -> None:
        """Raises ConstraintError: a value built in code is held to the same rules as a parsed one."""
        for name, check in _CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))
        if isinstance(self.shards, tuple) and self.stages is None:
            object.__setattr__(self, "stages", len(self.shards))
        if isinstance(self.shards, tuple) and len(self.shards) != self.stages:
            raise ConstraintError(
                f"shards lists {len(self.shards)} stages but stages is {self.stages}: make them agree"
            )
        for asked, excluded, what in (("sites", "exclude_sites", "site"), ("regions", "exclude_regions", "region")):
            both = sorted(set(getattr(self, asked)) & set(getattr(self, excluded)))
            if both:
                raise ConstraintError(
                    f"{what} {both[0]!r} stands in {asked} and in {excluded}: take it out of one of them"
                )
        if self.objective is not None and self.min_latency not in ("medium", _latency_of(self.objective)):
            raise ConstraintError(
                f"objective {self.objective!r} and min_latency {self.min_latency!r} ask for different plans: "
                f"leave one of them out"
            )

    @classmethod
    def parse(cls, mapping: Mapping[str, Any] | Constraints | None) -> Constraints:
        """Check an open mapping. Raises ConstraintError naming the key; for an unknown one also the nearest known."""
        if mapping is None:
            return cls()
        if isinstance(mapping, Constraints):
            return mapping
        if not isinstance(mapping, Mapping):
            raise ConstraintError(f"constraints must be a mapping of names to values, not {type(mapping).__name__}")
        known = [f.name for f in fields(cls)]
        for key in mapping:
            if key not in known:
                raise ConstraintError(f"unknown constraint {key!r}: {nearest(str(key), known, 'known')}")
        return cls(**{key: value for key, value in mapping.items() if value is not None})

    def to_dict(self) -> dict[str, Any]:
        """A JSON document of what was asked, the inverse of `parse`: constraints at their default are left out."""
        document: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if value != f.default:
                document[f.name] = list(value) if isinstance(value, tuple) else value
        return document

    @property
    def wish(self) -> str:
        """What plans are compared by: one of `OBJECTIVES`, or "fewest_sites"."""
        return self.objective or LATENCIES[self.min_latency]

    @property
    def requests(self) -> int:
        """Requests whose KV caches are held at once."""
        return self.concurrency or 1

    @property
    def forced(self) -> bool:
        """Whether an expert override asks for a certain shape."""
        return self.stages is not None or self.shards is not None

    def width(self, stage: int) -> int | None:
        """The forced number of shards of stage `stage`, or None."""
        return self.shards[stage] if isinstance(self.shards, tuple) else self.shards


def _latency_of(objective: str) -> str:
    return next((latency for latency, known in LATENCIES.items() if known == objective), "medium")


_CHECKS: Final[dict[str, Check]] = {
    "min_latency": checks.word(LATENCIES, optional=False),
    "max_token_latency_ms": checks.amount("milliseconds"),
    "sites": checks.texts,
    "exclude_sites": checks.texts,
    "regions": checks.texts,
    "max_sites": checks.count,
    "dtype": checks.one_or_some(DTYPE_BYTES, "auto"),
    "context": checks.count,
    "stages": checks.count,
    "shards": checks.widths,
    "objective": checks.word(OBJECTIVES),
    "max_first_token_ms": checks.amount("milliseconds"),
    "min_tokens_per_s": checks.amount("tokens a second"),
    "max_price_per_hour": checks.amount("currency units an hour"),
    "exclude_regions": checks.texts,
    "vendors": checks.texts,
    "trusted_only": checks.flag,
    "private": checks.flag,
    "needs": checks.words(NEEDS),
    "codes": checks.words(CODES),
    "concurrency": checks.count,
    "standbys": checks.count_or_none,
    "replicas": checks.replicas,
    "priority": checks.between(*PRIORITIES),
}
