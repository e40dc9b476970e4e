"""The `--device` option: `cpu,threads=1,memory=200MiB`, `cuda:1,name=big`.

A spec names one device and may narrow it. Where any spec is given, discovery is replaced: the site has these devices
and no others. `flops=` and `bandwidth=` state a speed instead of measuring one, for drills with made-up hardware.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from mesh.devices.units import parse_bytes
from mesh.errors import ConfigError

#: Kinds of device, in the order in which discovery lists them.
KINDS = ("cuda", "rocm", "mps", "xpu", "cpu")
KEYS = ("name", "threads", "memory", "flops", "bandwidth")
#: What a device may be called: it appears in plans, metrics labels and file names.
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
_MOST_THREADS = 1024
_MOST_DEVICES = 1024
_SPEED_BOUNDS = (1e3, 1e18)


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """One `--device` option. None means: as discovered or measured.

    `index` counts devices of one kind (always 0 for cpu and mps). `flops` is FLOP/s in every dtype, `bandwidth` is
    bytes/s.
    """

    kind: str
    index: int = 0
    name: str | None = None
    threads: int | None = None
    memory_bytes: int | None = None
    flops: float | None = None
    bandwidth: float | None = None

    def __str__(self) -> str:
        parts = [self.kind if self.kind in ("cpu", "mps") else f"{self.kind}:{self.index}"]
        if self.name is not None:
            parts.append(f"name={self.name}")
        if self.threads is not None:
            parts.append(f"threads={self.threads}")
        if self.memory_bytes is not None:
            parts.append(f"memory={self.memory_bytes}B")
        if self.flops is not None:
            parts.append(f"flops={self.flops!r}")
        if self.bandwidth is not None:
            parts.append(f"bandwidth={self.bandwidth!r}")
        return ",".join(parts)


def nearest(word: str, known: Iterable[str]) -> str:
    """`, did you mean X?` where a known word is close, else `; known are X, Y`. For error messages."""
    words = list(known)
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else f"; known are {', '.join(words)}"


def parse_spec(text: str) -> DeviceSpec:
    """Read one spec, `KIND[:INDEX][,KEY=VALUE]...`. Raises ConfigError that names the key and the nearest known one."""
    head, *pairs = (part.strip() for part in text.split(","))
    kind, colon, number = head.partition(":")
    if kind not in KINDS:
        raise ConfigError(f"device {text!r}: unknown kind {kind!r}{nearest(kind, KINDS)}")
    if colon and kind in ("cpu", "mps"):
        raise ConfigError(f"device {text!r}: {kind} takes no index; write {kind} and repeat --device for more")
    if colon and not (number.isascii() and number.isdigit() and int(number) < _MOST_DEVICES):
        raise ConfigError(f"device {text!r}: index {number!r} is not a number; write such as {kind}:0")
    spec = DeviceSpec(kind, int(number) if colon else 0)
    seen: set[str] = set()
    for pair in pairs:
        key, equals, value = (part.strip() for part in pair.partition("="))
        if key not in KEYS:
            raise ConfigError(f"device {text!r}: unknown key {key!r}{nearest(key, KEYS)}")
        if not equals or not value:
            raise ConfigError(f"device {text!r}: key {key!r} has no value; write {key}=VALUE")
        if key in seen:
            raise ConfigError(f"device {text!r}: key {key!r} is given twice; give it once")
        seen.add(key)
        try:
            spec = _with(spec, key, value)
        except ValueError as error:
            raise ConfigError(f"device {text!r}: {key}: {error}") from None
    return spec


def parse_specs(texts: Sequence[str]) -> tuple[DeviceSpec, ...]:
    """Read every `--device` option of a site and give each device a name: see `named`. Raises ConfigError."""
    return named([parse_spec(text) for text in texts])


def named(specs: Sequence[DeviceSpec]) -> tuple[DeviceSpec, ...]:
    """The same specs, each with a name. CPUs are cpu0, cpu1, ... in order; others are kind and index, such as cuda1.

    Raises ConfigError where two devices have one name, which includes one accelerator given twice without names.
    """
    taken = {spec.name for spec in specs if spec.name is not None}
    names: list[str] = []
    cpus = (name for number in range(len(specs) + len(taken)) if (name := f"cpu{number}") not in taken)
    for spec in specs:
        name = spec.name or (next(cpus) if spec.kind == "cpu" else f"{spec.kind}{spec.index}")
        if name in names or (spec.name is None and name in taken):
            raise ConfigError(f"device {str(spec)!r}: two devices are named {name!r}; tell them apart with name=")
        names.append(name)
    return tuple(replace(spec, name=name) for spec, name in zip(specs, names, strict=True))


def _with(spec: DeviceSpec, key: str, value: str) -> DeviceSpec:
    """The spec with one key set. Raises ValueError without naming the key."""
    if key == "name":
        if not NAME.fullmatch(value):
            raise ValueError(f"{value!r} is not a name; use up to 32 of a-z, 0-9, '-' and '_', a letter or digit first")
        return replace(spec, name=value)
    if key == "threads":
        if not (value.isascii() and value.isdigit() and 1 <= int(value) <= _MOST_THREADS):
            raise ValueError(f"{value!r} is not a number of threads; write 1 to {_MOST_THREADS}")
        return replace(spec, threads=int(value))
    if key == "memory":
        return replace(spec, memory_bytes=parse_bytes(value))
    if key == "flops":
        return replace(spec, flops=_speed(value, "FLOP/s, such as 50e9"))
    return replace(spec, bandwidth=_bandwidth(value))


def _bandwidth(value: str) -> float:
    """Bytes per second, from a plain number or a size such as `10GB` or `10GB/s`."""
    try:
        return _speed(value, "")
    except ValueError:
        try:
            return float(parse_bytes(value.removesuffix("/s")))
        except ValueError:
            raise ValueError(f"{value!r} is not a bandwidth; write bytes per second, such as 10GB/s or 10e9") from None


def _speed(value: str, wanted: str) -> float:
    try:
        speed = float(value)
    except ValueError:
        raise ValueError(f"{value!r} is not a number; write {wanted}") from None
    if not math.isfinite(speed) or not _SPEED_BOUNDS[0] <= speed <= _SPEED_BOUNDS[1]:
        raise ValueError(f"{value!r} is out of bounds; write {wanted}, between 1e3 and 1e18")
    return speed
