from __future__ import annotations

import random
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial

import httpx
import pytest
import trio
import trio.testing
from prometheus_client.parser import text_string_to_metric_families
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from mesh.errors import AddressInUse, ConfigError
from mesh.peer.http import build_app, serve
from mesh.peer.metrics import DeviceMemory


class Daemon:
    """An observer with fixed answers."""

    site = "berlin"

    def __init__(self, state: str = "serving") -> None:
        self._state = state
        self.tokens = 7

    def state(self) -> str:
        return self._state

    def members(self) -> Mapping[str, str]:
        return {"berlin": "alive", "oslo": "alive", "rome": "suspect"}

    def jobs(self) -> Mapping[str, str]:
        return {"job-1": "serving", "job-2": "failed"}

    def rtts_s(self) -> Mapping[str, float]:
        return {"oslo": 0.05, 'odd"\n\\name': 0.1}

    def devices(self) -> Mapping[str, DeviceMemory]:
        return {"cpu0": DeviceMemory(200, 50)}

    def tokens_total(self) -> int:
        return self.tokens

    def recoveries_total(self) -> int:
        return 2

    def code_errors(self):
        return {"job-1": 0.0066}

    def calls_refused_total(self):
        return {"identity": 2}

    def gossip_refused_total(self):
        return {"forged": 3, "replayed": 0}


def _client(daemon: Daemon) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(build_app(daemon)), base_url="http://peer")


def _samples(text: str) -> dict[tuple[str, str], float]:
    return {
        (sample.name, next(iter(sample.labels.values()), "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_health_tells_site_state_members_and_jobs() -> None:
    async with _client(Daemon()) as client:
        response = await client.get("/health")
    assert response.status_code == 200
    assert response.json() == {
        "site": "berlin",
        "state": "serving",
        "members": {"berlin": "alive", "oslo": "alive", "rome": "suspect"},
        "jobs": {"job-1": "serving", "job-2": "failed"},
    }


@pytest.mark.parametrize("state", ["starting", "leaving"])
async def test_a_peer_that_does_not_serve_is_not_healthy(state: str) -> None:
    async with _client(Daemon(state)) as client:
        response = await client.get("/health")
    assert (response.status_code, response.json()["state"]) == (503, state)


async def test_metrics_are_read_anew_at_each_scrape() -> None:
    daemon = Daemon()
    async with _client(daemon) as client:
        first = await client.get("/metrics")
        daemon.tokens = 9
        second = await client.get("/metrics")
    assert first.headers["content-type"].startswith("text/plain")
    assert _samples(first.text) == {
        ("isthmus_members", "alive"): 2,
        ("isthmus_members", "suspect"): 1,
        ("isthmus_members", "dead"): 0,
        ("isthmus_members", "left"): 0,
        ("isthmus_link_rtt_seconds", "oslo"): 0.05,
        ("isthmus_link_rtt_seconds", 'odd"\n\\name'): 0.1,
        ("isthmus_device_memory_bytes", "cpu0"): 200,
        ("isthmus_device_memory_free_bytes", "cpu0"): 50,
        ("isthmus_jobs", "serving"): 1,
        ("isthmus_jobs", "failed"): 1,
        ("isthmus_tokens_total", ""): 7,
        ("isthmus_recoveries_total", ""): 2,
        ("isthmus_code_error_ratio", "job-1"): 0.0066,
        ("isthmus_gossip_refused_total", "forged"): 3,
        ("isthmus_gossip_refused_total", "replayed"): 0,
        ("isthmus_calls_refused_total", "identity"): 2,
    }
    assert _samples(second.text)[("isthmus_tokens_total", "")] == 9


async def test_metrics_come_as_openmetrics_when_asked() -> None:
    async with _client(Daemon()) as client:
        response = await client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert response.text.endswith("# EOF\n")


async def test_unknown_pages_and_methods_are_refused() -> None:
    async with _client(Daemon()) as client:
        assert (await client.get("/nothing")).status_code == 404
        assert (await client.post("/health")).status_code == 405


@asynccontextmanager
async def _served(routes: list[Route] | None = None, grace_s: float = 2.0) -> AsyncIterator[tuple[str, trio.Event]]:
    shutdown = trio.Event()
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            run = partial(serve, build_app(Daemon(), routes or []), "127.0.0.1:0", shutdown=shutdown, grace_s=grace_s)
            address: str = await nursery.start(run)
            yield address, shutdown
            shutdown.set()


async def test_it_serves_on_a_free_port_and_ends_when_told() -> None:
    async with _served() as (address, _), httpx.AsyncClient() as client:
        assert (await client.get(f"http://{address}/health")).status_code == 200
        assert (await client.get(f"http://{address}/metrics")).status_code == 200
    host, _, port = address.rpartition(":")
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind((host, int(port)))


async def test_a_request_under_way_is_finished_after_shutdown() -> None:
    started, go_on = trio.Event(), trio.Event()

    async def slow(request: Request) -> Response:
        started.set()
        await go_on.wait()
        return PlainTextResponse("done")

    answers: list[str] = []

    async def ask(address: str) -> None:
        async with httpx.AsyncClient() as client:
            answers.append((await client.get(f"http://{address}/slow")).text)

    async with trio.open_nursery() as nursery, _served([Route("/slow", slow)]) as (address, shutdown):
        nursery.start_soon(ask, address)
        await started.wait()
        shutdown.set()
        await trio.testing.wait_all_tasks_blocked()
        go_on.set()
    assert answers == ["done"]


async def test_a_request_that_never_ends_holds_nothing_up() -> None:
    started = trio.Event()

    async def endless(request: Request) -> Response:
        started.set()
        await trio.sleep_forever()
        raise AssertionError

    async with trio.open_nursery() as nursery:

        async def ask(address: str) -> None:
            async with httpx.AsyncClient() as client:
                with pytest.raises(httpx.HTTPError):
                    await client.get(f"http://{address}/endless")

        async with _served([Route("/endless", endless)], grace_s=0.05) as (address, _):
            nursery.start_soon(ask, address)
            await started.wait()


async def test_noise_and_clients_that_vanish_change_nothing() -> None:
    generator = random.Random(5)
    async with _served() as (address, _):
        host, _, port = address.rpartition(":")
        for _ in range(30):
            async with await trio.open_tcp_stream(host, int(port)) as stream:
                try:
                    await stream.send_all(generator.randbytes(generator.randrange(1, 2000)))
                except trio.BrokenResourceError:
                    pass  # refused while we were still talking
        async with httpx.AsyncClient() as client:
            assert (await client.get(f"http://{address}/health")).status_code == 200


async def test_a_port_in_use_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        bind = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(AddressInUse, match=rf"^http={bind} is in use; .*--http$"):
            await serve(build_app(Daemon()), bind)


@pytest.mark.parametrize("bind", ["127.0.0.1", "203.0.113.7:0", "no such host:1", "127.0.0.1:99999"])
async def test_an_address_that_is_not_ours_is_one_line(bind: str) -> None:
    with pytest.raises(ConfigError, match=r"^http="):
        await serve(build_app(Daemon()), bind)


async def test_cancelling_ends_it_at_once() -> None:
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            await nursery.start(serve, build_app(Daemon()), "127.0.0.1:0")
            nursery.cancel_scope.cancel()
