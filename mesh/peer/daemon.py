"""The peer daemon: what `mesh up` runs. Wires the parts together, starts them in order, and stops them in reverse.

    data directory -> devices -> gossip -> workers, jobs -> control (gRPC), HTTP -> join -> ... -> leave

The daemon itself never touches a tensor; workers do, in processes of their own.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

import grpc
import trio

from mesh.address import join_address, split_address
from mesh.devices.local import LocalDevice, discover
from mesh.errors import ConfigError, MeshError
from mesh.gossip import Gossip, GossipConfig, open_gossip
from mesh.gossip.absent import Known
from mesh.gossip.distances import LINKS
from mesh.jobs.ledger import Ledger
from mesh.jobs.model import SubprocessInspector
from mesh.peer.bridge import Bridge
from mesh.peer.calls import RemotePeer
from mesh.peer.cluster import open_cluster
from mesh.peer.config import PeerConfig
from mesh.peer.control import MeshServicer, PeerServicer, Secured, serve
from mesh.peer.datadir import DataDir
from mesh.peer.guard import Guard
from mesh.peer.holdings import HELD
from mesh.peer.http import build_app
from mesh.peer.http import serve as serve_http
from mesh.peer.measuring import Measuring
from mesh.peer.office import IdentityServicer
from mesh.peer.peer import Peer
from mesh.peer.places import free_port, local_host, reachable
from mesh.peer.relaying import Relaying, keep_detours
from mesh.peer.service import PeerService
from mesh.peer.view import MeshView
from mesh.peer.weights import open_weights
from mesh.peer.workers import WorkerPool
from mesh.wire.v1 import peer_pb2

logger = logging.getLogger(__name__)

#: A peer told to join says so when nobody answered for this long; it goes on trying.
JOIN_COMPLAINT_S = 5.0
#: The name of the mesh of peers without an identity.
DEFAULT_CLUSTER = "isthmus"
#: How often whom this peer knows is written down, if that changed.
REMEMBER_S = 5.0
#: How long a request of gossip's reliable path may take.
STREAM_S = 5.0
#: How long calls in progress may go on while the server stops.
STOP_S = 0.2


def run(config: PeerConfig) -> None:
    """Run a peer until SIGTERM or SIGINT. Raises the MeshError that kept it from starting."""
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stderr)
    for chatty in ("hypercorn", "mesh.http"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # It writes a trace for every malformed message that anybody sends; the caller is told anyway.
    logging.getLogger("grpc._common").setLevel(logging.CRITICAL)
    with DataDir(config.data_dir) as data:
        try:
            trio.run(_guarded, config, data)
        except BaseExceptionGroup as group:
            raise _bare(group) from None


def _bare(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one error that a user should read, out of the nurseries it crossed; the group itself where there is none."""
    found, _ = group.split(MeshError)
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]  # type: ignore[assignment]
    return found or group


async def _guarded(config: PeerConfig, data: DataDir) -> None:
    stop, up = trio.Event(), trio.Event()
    async with trio.open_nursery() as nursery:
        await nursery.start(_signals, stop, up, nursery.cancel_scope)
        try:
            async with open_peer(config, data) as peer:
                up.set()
                print(f"{config.site} is up at {peer.address}", flush=True)
                await stop.wait()
                await peer.leave()
        except MeshError:
            # Ctrl-C in a terminal reaches the processes of the start as well: they fail because we are to end.
            if up.is_set() or not stop.is_set():
                raise
        nursery.cancel_scope.cancel()


async def _signals(
    stop: trio.Event,
    up: trio.Event,
    starting: trio.CancelScope,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """The first signal asks to leave, or ends the start; a second one ends at once, as if nobody were listening."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as received:
        task_status.started()
        async for number in received:
            if stop.is_set():
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            stop.set()
            if not up.is_set():
                starting.cancel()


@asynccontextmanager
async def open_peer(config: PeerConfig, data: DataDir) -> AsyncIterator[Peer]:
    """A running peer for the length of the block. Raises the MeshError that keeps it from starting."""
    host, port = free_port(*split_address(config.listen))
    devices = await discover(config, config.data_dir)
    cluster = open_cluster(config.data_dir, config.site)
    advertise = config.advertise or join_address(reachable(host), port)
    gossip_config = GossipConfig(
        site=config.site,
        address=join_address(host, port),
        advertise=advertise,
        incarnation=data.next_incarnation(),
        seeds=config.join,
        cluster=DEFAULT_CLUSTER if cluster is None else cluster.identity.cluster,
        delays={address: rtt_ms / 2000.0 for address, rtt_ms in config.emulate.items()},
        cut=config.cut,
    )

    async def exchange(address: str, site: str, data: bytes) -> bytes:
        # The delay of a drill, there and back; no more than the datagrams have.
        await trio.sleep(config.emulate.get(address, 0.0) / 1000.0)
        return await view.stream(site, address).gossip(data, STREAM_S)

    def delay_s(site: str) -> float:
        return config.emulate.get(_address_of(gossip, site), 0.0) / 2000.0

    async with (
        open_gossip(
            gossip_config,
            sealer=None if cluster is None else cluster.sealer,
            prover=None if cluster is None else cluster.prover,
            exchange=exchange,
        ) as gossip,
        trio.open_nursery() as nursery,
        WorkerPool.open(host=reachable(host), backends=_backends(config, devices)) as pool,
        open_weights(
            config.site,
            config.data_dir / "weights",
            SubprocessInspector(config.data_dir / "models"),
            host=reachable(host),
            limit_bytes=config.weights_cache_bytes,
            rate_bytes_per_s=config.weights_rate_bytes_per_s,
            models=config.models,
            withhold=config.withhold,
            delay_s=delay_s,
            publish=lambda rows: gossip.publish(HELD, rows),
            held=lambda: gossip.entries(HELD),
            sent=gossip.transferred,
        ) as weights,
    ):
        peer: Peer

        # The parts report to the peer, which is made of them: it is bound when the first report comes.
        def publish_load() -> None:
            peer.publish_load()

        def publish_jobs() -> None:
            peer.publish_jobs()

        async def displace(request: peer_pb2.DisplaceRequest) -> None:
            await ledger.displace(request)

        async def measure(site: str, backends: Sequence[str]) -> str:
            return await measuring.choose(site, backends)

        async def relay(request: peer_pb2.RelayRequest) -> peer_pb2.RelayReply:
            return await relaying.open(request)

        service = PeerService(
            config.site,
            pool,
            devices,
            delay_s=delay_s,
            on_load=publish_load,
            inspector=weights.inspect,
            displace=displace,
            measure=measure,
            relay=relay,
            cut=lambda site: view.own_address(site) in config.cut,
            seal_inside=config.seal == "on",
            weights=weights,
        )
        credentials = no_credentials if cluster is None else cluster.credentials
        view = MeshView(
            config.site,
            gossip,
            service,
            lambda site, at: RemotePeer(at, credentials(site)),
            weights.offer,
            cut=config.cut,
        )
        weights.attach(
            view,
            view.remote,
            stepping=lambda: service.stepping,
            cut=lambda site: view.own_address(site) in config.cut,
        )
        relaying = Relaying(config.site, reachable(host), config.relay_mbps, view.own_address, delay_s)
        measuring = Measuring(
            config.site,
            gossip,
            lambda site: view.remote(site).answer,
            host=reachable(host),
            backends=_backends(config, devices),
            busy=lambda: service.busy,
            enabled=config.probes,
        )
        ledger = Ledger(config.site, view, weights.inspect, nursery, publish_jobs)
        guard = None if cluster is None else Guard(cluster.authenticate)
        peer = Peer(
            config=config,
            gossip=gossip,
            ledger=ledger,
            view=view,
            service=service,
            devices=devices,
            cluster=cluster,
            guard=guard,
            weights=weights,
        )
        gossip.remember(data.known_peers(gossip_config.cluster))
        gossip.publish("capabilities", _capabilities(config, devices))
        peer.publish_load()
        bridge = Bridge()
        secured = None
        if cluster is not None and guard is not None:
            office = IdentityServicer(bridge, cluster, gossip, guard, advertise)
            secured = Secured(cluster, guard, office)
        mesh_servicer = MeshServicer(bridge, ledger, view, peer.status, peer.elsewhere, credentials=credentials)
        peer_servicer = PeerServicer(bridge, service, gossip, measuring, secured, weights=weights)
        server = serve(mesh_servicer, peer_servicer, host, port, secured=secured)
        try:
            nursery.start_soon(service.run)
            nursery.start_soon(measuring.run)
            nursery.start_soon(relaying.run)
            nursery.start_soon(keep_detours, gossip, view, view.remote)
            if cluster is not None:
                cluster.leave_token(join_address(local_host(host), port))
                nursery.start_soon(cluster.run, gossip, view.remote)
            nursery.start_soon(_watch_members, gossip, ledger, view)
            nursery.start_soon(_remember, gossip, data, config.site, gossip_config.cluster)
            if config.http is not None:
                logger.info("HTTP at %s", await nursery.start(serve_http, build_app(peer), config.http))
            if config.join:
                nursery.start_soon(_complain_if_alone, gossip, config.join)
            yield peer
        finally:
            with trio.CancelScope(shield=True):
                # gRPC's handlers wait for this loop, so the loop must run on while gRPC stops.
                await trio.to_thread.run_sync(_stop, server)
                view.close()
                if cluster is not None:
                    cluster.remove_token()
            nursery.cancel_scope.cancel()


def no_credentials(site: str) -> None:
    """Peers without identities call each other plainly."""


def _backends(config: PeerConfig, devices: list[LocalDevice]) -> tuple[str, ...]:
    """What this site's workers listen on.

    UCX pays where it finds RDMA or device memory. Between CPU workers of one machine it was measured slower than plain
    TCP (2.3 KB all-reduce of two ranks: 52 against 28 us), and importing it costs every worker memory.
    """
    if config.transport != "auto":
        return (config.transport,)
    return ("tcp",) if all(local.device.kind == "cpu" for local in devices) else ("ucx", "tcp")


def _stop(server: grpc.Server) -> None:
    server.stop(STOP_S).wait(STOP_S * 5)


def _capabilities(config: PeerConfig, devices: list[LocalDevice]) -> dict[str, Any]:
    rtts_s = [local.local_rtt_s for local in devices if local.local_rtt_s is not None]
    between = {"local_rtt_s": max(rtts_s)} if rtts_s else {}
    devices_told = [asdict(local.device) for local in devices]
    return {"region": config.region, "devices": devices_told, "relays": config.relay_mbps > 0, **between}


def _address_of(gossip: Gossip, site: str) -> str:
    return next((member.address for member in gossip.members() if member.site == site), "")


async def _watch_members(gossip: Gossip, ledger: Ledger, view: MeshView) -> None:
    with gossip.events() as events:
        async for event in events:
            if (event.kind, event.key) == ("updated", LINKS):
                view.told(event.site)
            if event.kind in ("dead", "left"):
                for coordinator in ledger:
                    coordinator.site_left(event.site)


async def _remember(gossip: Gossip, data: DataDir, site: str, cluster: str) -> None:
    """Keep whom this peer knows, so that a restart finds the mesh without its seeds."""
    kept: list[Known] = []
    while True:
        await trio.sleep(REMEMBER_S)
        known = gossip.known()
        if known != kept:
            data.keep_known_peers(cluster, known)
            try:
                data.record_incarnation(next((each.incarnation for each in known if each.site == site), 0))
            except ConfigError as error:
                logger.warning("%s", error)
            kept = known


async def _complain_if_alone(gossip: Gossip, seeds: tuple[str, ...]) -> None:
    if not await gossip.joined(JOIN_COMPLAINT_S):
        logger.warning("nobody answers at %s yet; still trying", ", ".join(seeds))
