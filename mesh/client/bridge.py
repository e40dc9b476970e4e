"""From gRPC's threads into trio: a unary call as an awaitable, a server's stream as a channel.

A cancelled trio task cancels its RPC, so that the peer hears of it. Nothing here blocks the trio thread: starting and
cancelling a call only hand work to gRPC's own threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import grpc
import trio

if TYPE_CHECKING:
    from mesh.client.channel import Connection

M = TypeVar("M")


async def unary(connection: Connection, method: Any, request: Any, what: str, deadline_s: float) -> Any:
    """One unary call, as `Connection.call`, awaited."""
    await trio.lowlevel.checkpoint_if_cancelled()
    call = connection.begin(method.future, request, timeout=deadline_s)
    done = trio.Event()
    soon = _soon(trio.lowlevel.current_trio_token())
    call.add_done_callback(lambda _: soon(done.set))
    try:
        await done.wait()
    except trio.Cancelled:
        call.cancel()
        raise
    try:
        return call.result()
    except grpc.FutureCancelledError:  # another task closed the connection
        raise connection.error(call, what, deadline_s) from None
    except grpc.RpcError as error:
        raise connection.error(error, what, deadline_s) from None


class Messages(Generic[M]):
    """The messages of a server's stream. A thread reads them into trio; it ends with the call."""

    def __init__(self, call: Any) -> None:
        self._call = call
        send, self._receive = trio.open_memory_channel[M](math.inf)
        self._failures: list[grpc.RpcError] = []
        self._closed = False
        failures = self._failures
        soon = _soon(trio.lowlevel.current_trio_token())
        # The thread must not keep `self` alive: dropping the last reference is what cancels a forgotten stream.
        trio.lowlevel.start_thread_soon(lambda: _pump(call, send, failures, soon), lambda _: None, "mesh-stream")

    async def receive(self, idle_s: float = math.inf) -> M | None:
        """The next message; None at the end, and once closed here.

        Raises TimeoutError after `idle_s` seconds of silence, `grpc.RpcError` where the call failed.
        """
        try:
            with trio.move_on_after(idle_s):
                return await self._receive.receive()
        except trio.Cancelled:
            self.close()
            raise
        except (trio.EndOfChannel, trio.ClosedResourceError):
            if self._failures and not self._closed:
                raise self._failures[0] from None
            return None
        raise TimeoutError

    def close(self) -> None:
        """Cancel the call if it still runs. May be called twice."""
        self._closed = True
        self._receive.close()
        self._call.cancel()

    def __del__(self) -> None:
        self._call.cancel()


def _pump(
    call: Any, send: trio.MemorySendChannel[Any], failures: list[grpc.RpcError], soon: Callable[..., None]
) -> None:
    """Runs in a thread until the call ends."""
    try:
        for message in call:
            soon(_deliver, send, message)
    except grpc.RpcError as error:
        failures.append(error)
    soon(send.close)


def _deliver(send: trio.MemorySendChannel[Any], message: Any) -> None:
    try:
        send.send_nowait(message)
    except trio.BrokenResourceError:
        pass  # the reader has closed; an exception here would bring trio down


def _soon(token: trio.lowlevel.TrioToken) -> Callable[..., None]:
    """`run_sync_soon` that does not mind a trio that has ended meanwhile."""

    def soon(function: Callable[..., object], *args: object) -> None:
        try:
            token.run_sync_soon(function, *args)
        except trio.RunFinishedError:
            pass

    return soon
