"""Where gRPC's threads meet trio: a handler thread runs its work as a trio task; the end of a call ends that task.

The server side uses grpcio's thread pool; `grpc.aio` does not run under trio. Work handed to trio with a token runs as
a system task, which the RPC's own cancellation does not reach, so each call carries a scope that its end cancels.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing
from typing import Any, TypeVar

import grpc
import trio
from trio.lowlevel import TrioToken

from mesh.errors import JobCancelled, MeshError, PeerUnreachable
from mesh.wire.errors import abort

Reply = TypeVar("Reply")
#: Sends the items of a stream; its return is the end of the stream.
Producer = Callable[[trio.MemorySendChannel[Reply]], Awaitable[None]]
logger = logging.getLogger(__name__)

#: Items that wait between a stream's task and its handler thread; beyond it the task waits (back-pressure).
STREAM_BUFFER = 64


class Bridge:
    """Runs async functions for handler threads."""

    def __init__(self) -> None:
        """Call inside `trio.run`: the token of the running loop is kept."""
        self._token: TrioToken = trio.lowlevel.current_trio_token()

    def call(self, context: grpc.ServicerContext, work: Callable[[], Awaitable[Reply]]) -> Reply:
        """Run `work` in trio and return its result; a MeshError becomes the status of the call."""
        scope = trio.CancelScope()

        async def run() -> Reply:
            with scope:
                return await work()
            raise JobCancelled("the caller went away")

        if not context.add_callback(lambda: self._cancel(scope)):
            abort(context, JobCancelled("the caller went away"))
        try:
            return trio.from_thread.run(run, trio_token=self._token)
        except MeshError as error:
            abort(context, error)
        except (trio.RunFinishedError, trio.Cancelled):
            abort(context, PeerUnreachable("this peer is stopping"))
        except Exception as error:
            logger.exception("a call failed")
            abort(context, MeshError(f"the peer failed: {type(error).__name__}: {error}"))
        raise AssertionError("abort returned")

    def stream(self, context: grpc.ServicerContext, produce: Producer[Reply]) -> Iterator[Reply]:
        """Yield what `produce` sends into the channel it is given, until it returns; the call's end cancels it."""
        scope = trio.CancelScope()
        send, receive = trio.open_memory_channel[Any](STREAM_BUFFER)

        async def pump() -> None:
            # Nothing may escape: an exception in a system task would bring the whole daemon down.
            async with send:
                with scope:
                    try:
                        await produce(send)
                    except MeshError as error:
                        await send.send(error)
                    except Exception as error:
                        logger.exception("a stream failed")
                        await send.send(MeshError(f"the peer failed: {type(error).__name__}: {error}"))

        def start() -> None:
            trio.lowlevel.spawn_system_task(pump)

        if not context.add_callback(lambda: self._cancel(scope)):
            return
        try:
            trio.from_thread.run_sync(start, trio_token=self._token)
            while True:
                item = trio.from_thread.run(receive.receive, trio_token=self._token)
                if isinstance(item, MeshError):
                    abort(context, item)
                yield item
        except trio.EndOfChannel:
            return
        except (trio.RunFinishedError, trio.Cancelled):
            abort(context, PeerUnreachable("this peer is stopping"))
        finally:
            self._cancel(scope)

    def _cancel(self, scope: trio.CancelScope) -> None:
        try:
            self._token.run_sync_soon(scope.cancel)
        except trio.RunFinishedError:
            pass  # the loop has ended, and the task with it


def each(source: Callable[[], AsyncGenerator[Reply, None]]) -> Producer[Reply]:
    """The producer that sends every item of an async generator, and closes it at the end."""

    async def produce(send: trio.MemorySendChannel[Reply]) -> None:
        async with aclosing(source()) as items:
            async for item in items:
                await send.send(item)

    return produce
