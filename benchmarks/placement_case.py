"""Helix' cases as JSON, into a pool of machines and wires. What is wrong is said with its place in the file.

The format is that of the cases made from Helix' artifact (Mei et al., ASPLOS 2025): nodes with a type, profiles of the
types by the number of layers held, links with bytes/s and a one-way latency in ms, and what a token weighs on them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from mesh.errors import ConfigError
from topology.flow import SINK, SOURCE, Machine, Pool, Wire


class CaseError(ConfigError):
    """A case file is missing, no JSON, or of another format. Names the place."""


def _name(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError("must be a whole number or a name")
    return str(value)


Name = Annotated[str, BeforeValidator(_name)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]
Count = Annotated[int, Field(ge=1, le=100_000, strict=True)]
Size = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Model(_Part):
    """The model of a case. Bytes are of one token."""

    name: str = ""
    layers: Count
    activation_bytes_per_token: Size
    token_bytes: Size


class Node(_Part):
    """A machine and the profile it follows."""

    id: Name
    type: Name


class Profile(_Part):
    """What a type of machine passes, by the number of layers it holds."""

    max_layers: Annotated[int, Field(ge=0, le=100_000, strict=True)]
    tokens_per_s_by_layer_count: dict[str, Rate]

    @model_validator(mode="after")
    def _complete(self) -> Profile:
        missing = [k for k in range(1, self.max_layers + 1) if str(k) not in self.tokens_per_s_by_layer_count]
        if missing:
            raise ValueError(f"tokens_per_s_by_layer_count lacks {missing[0]} layers of max_layers {self.max_layers}")
        return self

    @property
    def rates(self) -> tuple[float, ...]:
        """Tokens/s with 1, 2, ... layers."""
        return tuple(self.tokens_per_s_by_layer_count[str(k)] for k in range(1, self.max_layers + 1))


class Case(_Part):
    """A case in Helix' format."""

    case: str = ""
    model: Model
    nodes: Annotated[tuple[Node, ...], Field(min_length=1)]
    links: tuple[tuple[Name, Name, Rate, Rate], ...]
    links_bidirectional_except_source_sink: Annotated[bool, Field(strict=True)] = True
    device_profiles: dict[str, Profile]

    def pool(self) -> Pool:
        """Machines and wires. Raises CaseError for a name that leads nowhere."""
        known: set[str] = set()
        for place, node in enumerate(self.nodes):
            if node.id in known or node.id in (SOURCE, SINK):
                raise CaseError(f"$.nodes[{place}].id: {node.id!r} is taken: every node needs an id of its own")
            if node.type not in self.device_profiles:
                raise CaseError(f"$.nodes[{place}].type: {node.type!r} has no entry in device_profiles")
            known.add(node.id)
        machines = tuple(Machine(node.id, self.device_profiles[node.type].rates) for node in self.nodes)
        return Pool(self.model.layers, machines, tuple(self._wires(known)))

    def _wires(self, known: set[str]) -> list[Wire]:
        wires: dict[tuple[str, str], Wire] = {}
        turned: dict[tuple[str, str], Wire] = {}
        for place, (a, b, bytes_per_s, latency_ms) in enumerate(self.links):
            for end, other, name in ((0, SOURCE, a), (1, SINK, b)):
                if name not in known and name != other:
                    raise CaseError(f"$.links[{place}][{end}]: {name!r} is no node of the case")
            if (a, b) in wires:
                raise CaseError(f"$.links[{place}]: the link {a} -> {b} is given twice")
            if a == b:
                raise CaseError(f"$.links[{place}]: a link of {a} with itself")
            outside = a == SOURCE or b == SINK
            size = self.model.token_bytes if outside else self.model.activation_bytes_per_token
            if bytes_per_s == 0:
                continue
            rate, ms = bytes_per_s / size, latency_ms + 1e3 * size / bytes_per_s
            wires[a, b] = Wire(a, b, rate, ms)
            if self.links_bidirectional_except_source_sink and not outside:
                turned[b, a] = Wire(b, a, rate, ms)
        # A direction that the file gives itself goes before one turned round.
        return list({**turned, **wires}.values())


def read_document(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CaseError."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CaseError(f"{path}: {error.strerror or error}: name a readable case file") from None
    except UnicodeDecodeError:
        raise CaseError(f"{path}: not UTF-8 text, so no JSON") from None
    except json.JSONDecodeError as error:
        raise CaseError(f"{path}: line {error.lineno} column {error.colno}: no JSON: {error.msg}") from None
    except RecursionError:
        raise CaseError(f"{path}: no case: nested too deep") from None
    if not isinstance(document, dict):
        raise CaseError(f"{path}: $: must be an object, not {type(document).__name__}")
    return document


def parse_case(document: dict[str, Any]) -> Case:
    """The case in a document. Raises CaseError with the JSON path of the first thing wrong."""
    try:
        return Case.model_validate(document)
    except ValidationError as error:
        raise CaseError(first_problem(error)) from None


def first_problem(error: ValidationError) -> str:
    """`$.path[3].to: what is wrong` for the first of pydantic's errors."""
    first = error.errors(include_url=False, include_input=False)[0]
    steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in first["loc"] if step != "[key]")
    return f"${''.join(steps)}: {first['msg'].removeprefix('Value error, ')}"
