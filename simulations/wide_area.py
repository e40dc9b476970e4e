"""Wide-area links on one machine: network namespaces, and a process that carries packets between them.

Unlike `transport.emulate`, which holds back whole messages, this is a link as TCP sees it: packets of 1500 bytes, a
rate, a delay, losses, and a router's queue. It needs Linux, the right to make namespaces (root, or `unshare -r`), TUN
devices, and a C compiler, because a packet every 12 us (1 Gbit/s) leaves Python no time. `tc netem` would do the same
and is missing from many kernels.
"""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

_SOURCE = Path(__file__).with_name("wide_area.c")
_CLONE_NEWNET = 0x40000000
_START_S = 10.0
#: The shortest queue of a router: some tens of packets, whatever the link.
_LEAST_QUEUE_BYTES = 64 * 1024

NEAR_HOST, FAR_HOST = "10.99.0.1", "10.99.0.2"


def far_host(link: int) -> str:
    """The address at the far end of a link, by its place among the links."""
    return f"10.99.{link}.2"


class WideAreaUnavailable(Exception):
    """Links cannot be emulated here. One line: what is missing."""


@dataclass(frozen=True)
class Line:
    """A link, the same both ways. rate: bits a second. loss: share of packets, 0 to 1.

    queue_bytes: what the router holds before it drops; None: one bandwidth-delay product, the rule of thumb.
    """

    rate: float
    rtt_s: float
    loss: float = 0.0
    queue_bytes: int | None = None

    def __post_init__(self) -> None:
        if not (1e4 <= self.rate <= 1e11 and 0 <= self.rtt_s <= 10 and 0 <= self.loss < 1):
            raise ValueError(f"no such link: {self}")

    @property
    def product_bytes(self) -> int:
        """The bandwidth-delay product."""
        return round(self.rate / 8 * self.rtt_s)

    def __str__(self) -> str:
        return f"{self.rate / 1e6:g} Mbit/s, {self.rtt_s * 1e3:g} ms, {self.loss:.2%} loss"


class WideArea:
    """Running links from one near namespace, each to a far one. Give one to `enter` in a process of its own.

    `far` is the first of `fars`; at the end of link i is `far_host(i)`.
    """

    def __init__(self, line: Line, *more: Line, seed: int = 1) -> None:
        self.lines = (line, *more)
        self._seed = seed
        self.near = self.far = ""
        self.fars: tuple[str, ...] = ()
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="isthmus-wide-area-")
        program = _compiled(Path(self._folder.name))
        figures = [figure for number, line in enumerate(self.lines) for figure in _figures(line, self._seed + number)]
        self._process = subprocess.Popen(
            [str(program), *(str(round(figure)) for figure in figures)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None and self._process.stderr is not None
        ready, _, _ = select.select([self._process.stdout], [], [], _START_S)
        said = self._process.stdout.readline().split() if ready else []
        if len(said) != len(self.lines) + 2:
            self._process.kill()
            why = self._process.stderr.read().strip() or "no answer"
            raise WideAreaUnavailable(f"the right to make network namespaces and TUN devices is missing ({why})")
        number, *spaces = said
        self.near, *fars = (f"/proc/{number}/fd/{space}" for space in spaces)
        self.fars, self.far = tuple(fars), fars[0]

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def _figures(line: Line, seed: int) -> tuple[float, ...]:
    queue = max(_LEAST_QUEUE_BYTES, line.product_bytes) if line.queue_bytes is None else line.queue_bytes
    return line.rate, line.rtt_s / 2 * 1e9, line.loss * 1e6, queue, seed


def enter(space: str) -> None:
    """Move the calling thread, and all it starts from here on, into a namespace. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(space, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.setns(descriptor, _CLONE_NEWNET) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), space)
    finally:
        os.close(descriptor)


def _compiled(folder: Path) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if sys.platform != "linux" or compiler is None:
        raise WideAreaUnavailable("emulated links need Linux and a C compiler (cc)")
    program = folder / "wide_area"
    built = subprocess.run(
        [compiler, "-O2", "-o", str(program), str(_SOURCE)], capture_output=True, text=True, timeout=60, check=False
    )
    if built.returncode != 0:
        raise WideAreaUnavailable(f"the emulator does not compile: {built.stderr.strip().splitlines()[-1:]}")
    return program
