"""The trio shell on real loopback sockets, and on trio's virtual clock where only time matters."""

from __future__ import annotations

import random
import socket
from contextlib import AsyncExitStack

import pytest
import trio

from mesh.errors import AddressInUse, ConfigError
from mesh.gossip.config import GossipConfig
from mesh.gossip.messages import Ping
from mesh.gossip.shell import Gossip, SiteNameTaken, open_gossip


async def until(condition, within_s=3.0):
    with trio.fail_after(within_s):
        while not condition():
            await trio.sleep(0.005)


def free_address() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


async def three(stack: AsyncExitStack) -> list[Gossip]:
    peers: list[Gossip] = []
    for number, site in enumerate(("ams", "fra", "nyc")):
        config = GossipConfig(site, seeds=[peers[0].address] if peers else [], rng=random.Random(number))
        peers.append(await stack.enter_async_context(open_gossip(config)))
        peers[-1].publish("capabilities", {"of": site, "padding": "x" * 3000})
    return peers


async def test_three_peers_meet_in_less_than_a_second_and_leave_in_good_order():
    async with AsyncExitStack() as stack:
        peers = await three(stack)
        await until(lambda: all(len(peer.entries("capabilities")) == 3 for peer in peers), 1.0)
        assert await peers[1].joined(1.0)
        await until(lambda: all(len(peer.rtts()) == 2 for peer in peers), 1.0)
        await until(lambda: len(peers[2].entries("links")) == 3, 3.0)
        assert 0 < peers[0].rtts()["fra"].min_s < 0.1
        assert peers[0].counters()["malformed"] == peers[0].dropped == 0
        with peers[0].events() as events:
            assert await peers[2].leave(1.0)
            with trio.fail_after(1.0):
                async for event in events:
                    if (event.kind, event.site) == ("left", "nyc"):
                        break
        assert {member.site: member.state for member in peers[1].members()}["nyc"] == "left"


async def test_a_peer_that_vanishes_is_reported_dead():
    async with AsyncExitStack() as stack, AsyncExitStack() as doomed:
        peers = await three(stack)
        config = GossipConfig("sfo", seeds=[peers[0].address])
        await doomed.enter_async_context(open_gossip(config))
        await until(lambda: len(peers[1].rtts()) == 3)
        with peers[1].events() as events:
            await doomed.aclose()
            with trio.fail_after(6.0):
                async for event in events:
                    if (event.kind, event.site) == ("dead", "sfo"):
                        break


async def test_delays_lengthen_the_measured_round_trip():
    first, second = free_address(), free_address()
    async with (
        open_gossip(GossipConfig("a", first, delays={second: 0.02})) as one,
        open_gossip(GossipConfig("b", second, seeds=[first], delays={first: 0.03})) as two,
    ):
        await until(lambda: one.rtts() and two.rtts())
        await trio.sleep(0.3)
        assert 0.05 <= one.rtts()["b"].min_s < 0.08
        assert 0.05 <= two.rtts()["a"].min_s < 0.08


async def test_joining_an_address_nobody_listens_on_goes_on_until_somebody_does():
    late = free_address()
    async with open_gossip(GossipConfig("a")) as one:
        one.join([late])
        assert not await one.joined(0.4)
        async with open_gossip(GossipConfig("b", late)) as two:
            assert await one.joined(3.0)
            await until(lambda: len(two.members()) == 2)


async def test_host_names_are_looked_up_beside_everything_else():
    async with open_gossip(GossipConfig("a")) as one:
        port = one.address.rpartition(":")[2]
        async with open_gossip(GossipConfig("b", seeds=[f"localhost:{port}"])) as two:
            assert await two.joined(3.0)


async def test_a_second_peer_of_the_same_name_fails_to_join_in_words():
    async with open_gossip(GossipConfig("a")) as one, open_gossip(GossipConfig("a", seeds=[one.address])) as two:
        with pytest.raises(SiteNameTaken, match=f"'a' is already in the mesh, at {one.address}"):
            await two.joined(3.0)


async def test_a_port_that_is_taken_is_an_error_in_words():
    async with open_gossip(GossipConfig("a")) as one:
        with pytest.raises(AddressInUse, match=one.address):
            async with open_gossip(GossipConfig("b", one.address)):
                pass


@pytest.mark.parametrize("address", ["256.0.0.1:1", "192.0.2.1:7700"])
async def test_an_address_that_is_not_ours_is_an_error_in_words(address):
    with pytest.raises(ConfigError, match=f"listen {address}"):
        async with open_gossip(GossipConfig("a", address)):
            pass


async def test_a_socket_that_is_bound_already_is_used_and_stays_open():
    with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as bound:
        await bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        async with open_gossip(GossipConfig("a"), sock=bound) as one:
            assert one.address == f"127.0.0.1:{port}"
            async with open_gossip(GossipConfig("b", seeds=[one.address])) as two:
                assert await two.joined(2.0)
        assert bound.getsockname()[1] == port


async def test_noise_on_the_port_is_counted_and_changes_nothing():
    async with open_gossip(GossipConfig("a")) as one:
        host, port = one.address.split(":")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
            for size in (0, 1, 13, 100, 1400, 9000):
                stranger.sendto(random.Random(size).randbytes(size), (host, int(port)))
        await until(lambda: one.dropped == 6)
        assert len(one.members()) == 1


async def test_what_the_block_raises_comes_out_as_it_is():
    with pytest.raises(KeyError):
        async with open_gossip(GossipConfig("a")):
            raise KeyError("mine")


async def test_events_end_when_the_gossip_ends():
    async with open_gossip(GossipConfig("a")) as one:
        manager = one.events()
        events = manager.__enter__()
    with pytest.raises(trio.EndOfChannel):
        await events.receive()
    manager.__exit__(None, None, None)


async def test_wrong_values_and_addresses_are_refused_at_once():
    async with open_gossip(GossipConfig("a")) as one:
        with pytest.raises(ValueError, match="gossip value"):
            one.publish("k", {"v": float("nan")})
        with pytest.raises(ConfigError, match="nowhere"):
            one.join(["nowhere"])


async def test_alone_a_peer_sleeps(autojump_clock):
    async with open_gossip(GossipConfig("a", seeds=["127.0.0.1:9"])) as one:
        await trio.sleep(60.0)
        assert one.counters()["sent"] < 30
        assert not await one.joined(30.0)
        assert await one.leave(1.0)


async def test_streams_are_carried_by_whoever_runs_the_gossip():
    peers: dict[str, Gossip] = {}
    carried: list[tuple[str, str]] = []

    async def exchange(address: str, site: str, data: bytes) -> bytes:
        carried.append((address, site))
        await trio.sleep(0.01)
        return peers[address].serve_stream(data, "127.0.0.1:1")

    async with open_gossip(GossipConfig("a"), exchange=exchange) as one:
        for key in ("x", "y"):
            one.publish(key, {"v": "x" * 30_000})
        async with open_gossip(GossipConfig("b", seeds=[one.address]), exchange=exchange) as two:
            peers |= {one.address: one, two.address: two}
            await until(lambda: two.entry("a", "x") and two.entry("a", "y"))
    assert carried
    assert one.counters()["streams_asked"] + two.counters()["streams_asked"] == len(carried)


async def test_a_stream_that_fails_or_hangs_is_given_up(autojump_clock):
    async def exchange(address: str, site: str, data: bytes) -> bytes:
        if site == "hangs":
            await trio.sleep_forever()
        raise ConnectionResetError("no")

    async with open_gossip(GossipConfig("a"), exchange=exchange) as one:
        for site in ("fails", "hangs"):
            assert one._core.ask("127.0.0.1:9", site, [Ping(1, site)])
        one._pump()
        await trio.sleep(1.0)
        assert (one.counters()["stream_errors"], one.counters()["streams_failed"]) == (1, 1)
        await trio.sleep(10.0)
        assert one.counters()["streams_failed"] == 2


async def test_what_was_known_is_called_after_a_restart():
    async with open_gossip(GossipConfig("a")) as one:
        async with open_gossip(GossipConfig("b", seeds=[one.address])) as two:
            await until(lambda: len(two.members()) == 2)
            known = two.known()
        async with open_gossip(GossipConfig("b", incarnation=2)) as again:
            again.remember(known)
            assert await again.joined(3.0)


async def test_every_kind_of_refusal_has_a_counter_from_the_start():
    async with open_gossip(GossipConfig("a")) as one:
        assert {"malformed", "foreign", "forged", "replayed", "revoked", "skewed", "stale"} <= one.counters().keys()
