"""Real peers on loopback for drills: `mesh up` as its own process, as far from the others as the drill says.

A `Fleet` starts one daemon a site, each in a process group of its own, with a data directory that vanishes afterwards
and a port that was free. Distances are emulated by the daemons themselves (configuration key `emulate`): every site is
told the round trip to every other site's address.

Nothing outlives a drill. `Fleet.close` ends every group; and should the drill itself be killed, a *guardian* process
notices that its standard input closed, and ends them in its place.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import mesh
from mesh.errors import MeshError

#: A peer that was asked to leave gets this long before its group is killed.
LEAVE_TIMEOUT_S = 8.0
#: How often a drill asks a peer for its picture: the answer costs the peer a few milliseconds.
POLL_S = 0.2

#: The command line of a peer, in the interpreter that runs the drill.
MESH = (sys.executable, "-c", "import sys; from mesh.cli import main; sys.exit(main())")

# Reads process group numbers, one a line. "+n" watches group n, "-n" forgets it; at the end of input all are killed and
# the folder of the drill is removed.
_GUARDIAN = """
import os, shutil, signal, sys
groups = set()
for line in sys.stdin:
    (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass
shutil.rmtree(sys.argv[1], ignore_errors=True)
"""


class DrillError(MeshError):
    """A drill cannot go on: a peer died or did not come up. One line, with the last words of the peer's log."""

    code = "drill"


@dataclass(frozen=True, slots=True)
class SiteSpec:
    """A site of a drill. `devices` are `--device` specifications, such as `cpu,threads=1,memory=400MiB`.

    `settings` are configuration keys of this site's peer alone.
    """

    name: str
    devices: tuple[str, ...] = ("cpu,threads=1",)
    region: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)


class Fleet:
    """The peers of a drill, by site name. A context manager: inside it the peers run, after it none is left.

    `rtts_ms` holds emulated round trips by unordered pair of sites; a pair that is not there is as near as loopback is.
    `cut` holds pairs that cannot exchange anything.
    `settings` are configuration keys for every peer (`transport`, `reserve`). `command` is what `up --config FILE` is
    appended to.
    """

    def __init__(
        self,
        sites: Sequence[SiteSpec],
        *,
        rtts_ms: Mapping[frozenset[str], float] | None = None,
        cut: Collection[frozenset[str]] = (),
        settings: Mapping[str, Any] | None = None,
        http: bool = False,
        command: Sequence[str] = MESH,
    ) -> None:
        self.sites = {site.name: site for site in sites}
        self._rtts_ms = dict(rtts_ms or {})
        self._cut = frozenset(cut)
        self._settings = dict(settings or {})
        self._command = tuple(command)
        ports = free_ports(len(sites) * (2 if http else 1))
        self._addresses = {site.name: f"127.0.0.1:{port}" for site, port in zip(sites, ports, strict=False)}
        web = ports[len(sites) :]
        self._http = {site.name: f"127.0.0.1:{port}" for site, port in zip(sites, web, strict=False)}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._root = Path()
        self._guardian: subprocess.Popen[str] | None = None

    def __enter__(self) -> Fleet:
        self._root = Path(tempfile.mkdtemp(prefix="isthmus-drill-"))
        self._guardian = subprocess.Popen(
            [sys.executable, "-c", _GUARDIAN, str(self._root)],
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            for name in self.sites:
                self.start(name)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def address(self, site: str) -> str:
        """Where the site's peer listens, `host:port`."""
        return self._addresses[site]

    def http_address(self, site: str) -> str:
        """Where the site's peer serves `/health` and `/metrics`, `host:port`. KeyError unless asked for."""
        return self._http[site]

    def data_dir(self, site: str) -> Path:
        """The site's data directory; it survives a kill and a second start."""
        return self._root / site

    def log(self, site: str) -> str:
        """What the site's peer has written to its standard output and error."""
        path = self._root / f"{site}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def alive(self, site: str) -> bool:
        """Whether the site's daemon process runs."""
        process = self._processes.get(site)
        return process is not None and process.poll() is None

    def pid(self, site: str) -> int:
        """The process number of the site's daemon, which is also its process group."""
        return self._processes[site].pid

    def start(self, site: str) -> None:
        """Start the site's daemon (again). Returns at once; `wait_converged` tells when it is ready."""
        if self.alive(site):
            raise DrillError(f"{site}: the peer runs already")
        config = self._root / f"{site}.toml"
        config.write_text(_toml(self._configuration(site)))
        with (self._root / f"{site}.log").open("ab") as log:
            process = subprocess.Popen(
                [*self._command, "up", "--config", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=self._environment(),
            )
        self._processes[site] = process
        self._watch("+", process.pid)

    def kill(self, site: str) -> None:
        """Kill -9 the whole site, its daemon and its workers together: what a power cut looks like to the others."""
        self._end_group(self._processes[site])

    def pause(self, site: str) -> None:
        """Stop the daemon and its workers where they stand, without closing anything (SIGSTOP)."""
        os.killpg(self.pid(site), signal.SIGSTOP)

    def resume(self, site: str) -> None:
        """Let a paused site go on."""
        os.killpg(self.pid(site), signal.SIGCONT)

    def leave(self, site: str, timeout_s: float = LEAVE_TIMEOUT_S) -> int:
        """Ask the site's daemon to leave (SIGTERM) and return its exit code. DrillError when it has not in time."""
        process = self._processes[site]
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise DrillError(
                f"{site}: the peer had not left {timeout_s:g} s after SIGTERM{self._last_words(site)}"
            ) from None
        self._end_group(process)
        return code

    def check(self) -> None:
        """Raise DrillError if a daemon has ended that nobody ended on purpose."""
        for site, process in self._processes.items():
            code = process.poll()
            if code is not None and code != -signal.SIGKILL:
                raise DrillError(f"{site}: the peer ended with exit code {code}{self._last_words(site)}")

    def close(self) -> None:
        """End every peer, gracefully first, then its whole group, and remove the data directories. Idempotent."""
        running = [process for process in self._processes.values() if process.poll() is None]
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGCONT)
                process.terminate()
        deadline = time.monotonic() + LEAVE_TIMEOUT_S
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        for process in self._processes.values():
            self._end_group(process)
        if self._guardian is not None and self._guardian.stdin is not None:
            self._guardian.stdin.close()
            self._guardian.wait(LEAVE_TIMEOUT_S)
            self._guardian = None
        if self._root != Path():
            shutil.rmtree(self._root, ignore_errors=True)

    def _end_group(self, process: subprocess.Popen[bytes]) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(LEAVE_TIMEOUT_S)
        self._watch("-", process.pid)

    def _watch(self, sign: str, group: int) -> None:
        # A guardian that somebody killed must not end the drill with a broken pipe.
        if self._guardian is not None and self._guardian.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._guardian.stdin.write(f"{sign}{group}\n")
                self._guardian.stdin.flush()

    def _configuration(self, site: str) -> dict[str, Any]:
        others = [name for name in self.sites if name != site]
        distances = {
            self._addresses[name]: self._rtts_ms[frozenset((site, name))]
            for name in others
            if frozenset((site, name)) in self._rtts_ms
        }
        unreached = [self._addresses[name] for name in others if frozenset((site, name)) in self._cut]
        spec = self.sites[site]
        return {
            "site": site,
            "listen": self._addresses[site],
            # Everyone knows everyone's address, so the order of starting does not matter.
            "join": [self._addresses[name] for name in others],
            "data_dir": str(self.data_dir(site)),
            "device": list(spec.devices),
            **({"region": spec.region} if spec.region else {}),
            **({"http": self._http[site]} if site in self._http else {}),
            **self._settings,
            **spec.settings,
            **({"cut": unreached} if unreached else {}),
            **({"emulate": distances} if distances else {}),
        }

    @staticmethod
    def _environment() -> dict[str, str]:
        """The drill's own, without the `MESH_*` variables of whoever runs it: they would win over the configuration."""
        own = {key: value for key, value in os.environ.items() if not key.startswith("MESH_")}
        return {**own, "TOKENIZERS_PARALLELISM": "false"}

    def _last_words(self, site: str) -> str:
        lines = [line for line in self.log(site).splitlines() if line.strip()]
        return f": {lines[-1].strip()}" if lines else ""


def wait_converged(fleet: Fleet, site: str, timeout_s: float) -> mesh.Snapshot:
    """The snapshot of `site`'s peer, once all peers see each other and it holds every site and every link as measured.

    A peer that was started again counts only as what it is now: others may go on for a while with what it was before.
    Raises DrillError when a daemon ends meanwhile, or when the picture is not complete in time; says what is missing.
    """
    deadline = time.monotonic() + timeout_s
    missing = f"an answer from {site}"
    with contextlib.ExitStack() as stack:
        clients = {name: stack.enter_context(mesh.Mesh(fleet.address(name))) for name in fleet.sites}
        while time.monotonic() < deadline:
            fleet.check()
            try:
                missing = _unseen({name: client.status()["members"] for name, client in clients.items()})
                snapshot = clients[site].topology()
            except (mesh.PeerUnreachable, mesh.DeadlineExceeded) as error:
                missing = str(error)
            else:
                missing = missing or _unmeasured(snapshot, fleet.sites)
                if not missing:
                    return snapshot
            time.sleep(POLL_S)
    raise DrillError(f"the sites did not find each other within {timeout_s:g} s: {missing}")


def _unseen(members: Mapping[str, list[dict[str, Any]]]) -> str:
    """The first peer whose present incarnation another one does not hold for alive; empty if there is none."""
    seen = {name: {row["site"]: (row["state"], row["incarnation"]) for row in rows} for name, rows in members.items()}
    for name in seen:
        for observer, states in seen.items():
            if states.get(name) != ("alive", seen[name].get(name, ("", 0))[1]):
                return f"{observer} does not see {name}"
    return ""


def _unmeasured(snapshot: mesh.Snapshot, sites: Iterable[str]) -> str:
    """What the snapshot lacks: sites without a device, links without a measurement; empty if nothing."""
    names = sorted(sites)
    ready = {site.name for site in snapshot.sites if site.devices}
    measured = {(link.source, link.target) for link in snapshot.links if link.measured and link.reachable}
    absent = [f"the devices of {name}" for name in names if name not in ready]
    absent += [f"the link {a} -> {b}" for a in names for b in names if a != b and (a, b) not in measured]
    return f"missing {', '.join(absent)}" if absent else ""


def free_ports(count: int) -> list[int]:
    """Ports of loopback free for TCP and UDP alike. They are let go again: another process may be faster."""
    with contextlib.ExitStack() as held:
        ports: list[int] = []
        while len(ports) < count:
            stream = held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            stream.bind(("127.0.0.1", 0))
            port = stream.getsockname()[1]
            datagram = held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            try:
                datagram.bind(("127.0.0.1", port))
            except OSError:
                continue
            ports.append(port)
        return ports


@contextlib.contextmanager
def ending_on_signals() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise SystemExit, so that `with Fleet(...)` cleans up as it does after Ctrl-C."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _toml(values: Mapping[str, Any]) -> str:
    """The few kinds of values a peer's configuration has. JSON's strings, numbers and lists are TOML's too."""
    flat = {key: value for key, value in values.items() if not isinstance(value, Mapping)}
    tables = {key: value for key, value in values.items() if isinstance(value, Mapping)}
    lines = [f"{key} = {json.dumps(value)}" for key, value in flat.items()]
    for key, table in tables.items():
        lines += [f"[{key}]", *(f"{json.dumps(name)} = {json.dumps(value)}" for name, value in table.items())]
    return "\n".join(lines) + "\n"
