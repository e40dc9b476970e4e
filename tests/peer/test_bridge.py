"""gRPC handlers run in trio: results, errors, streams, and what happens when the caller goes away."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import grpc
import pytest
import trio
import trio.lowlevel

from mesh.client.channel import Connection
from mesh.errors import JobNotFound, MeshError
from mesh.peer.bridge import Bridge, each
from mesh.wire.v1 import mesh_pb2, mesh_pb2_grpc


class Servicer(mesh_pb2_grpc.MeshServicer):
    def __init__(self, bridge):
        self.bridge = bridge
        self.work = None
        self.source = None

    def Status(self, request, context):
        return self.bridge.call(context, self.work)

    def Watch(self, request, context):
        yield from self.bridge.stream(context, each(self.source))


@asynccontextmanager
async def serving():
    server = grpc.server(ThreadPoolExecutor(4))
    servicer = Servicer(Bridge())
    mesh_pb2_grpc.add_MeshServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    connection = Connection(f"127.0.0.1:{port}")
    try:
        with trio.fail_after(10):
            yield servicer, connection
    finally:
        connection.close()
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(server.stop(0).wait, 5)


def status(connection, timeout_s=5.0):
    return connection.call(connection.stub.Status, mesh_pb2.StatusRequest(), "status", timeout_s)


async def test_a_call_runs_in_trio_and_answers():
    async with serving() as (servicer, connection):
        home = threading.get_ident()

        async def work():
            await trio.lowlevel.checkpoint()
            return mesh_pb2.Document(json=str(threading.get_ident() == home))

        servicer.work = work
        assert (await trio.to_thread.run_sync(status, connection)).json == "True"


async def test_an_error_keeps_its_class_and_words():
    async with serving() as (servicer, connection):

        async def work():
            raise JobNotFound("no job 'x'")

        servicer.work = work
        with pytest.raises(JobNotFound, match="no job 'x'"):
            await trio.to_thread.run_sync(status, connection)


async def test_a_defect_in_a_handler_ends_the_call_and_nothing_else():
    async with serving() as (servicer, connection):

        async def broken():
            raise ValueError("a defect")

        async def source():
            yield mesh_pb2.JobStatus(job="one")
            raise ValueError("a defect")

        servicer.work, servicer.source = broken, source
        with pytest.raises(MeshError):
            await trio.to_thread.run_sync(status, connection)
        with pytest.raises(grpc.RpcError):
            await trio.to_thread.run_sync(lambda: list(connection.stub.Watch(mesh_pb2.JobRef())))

        async def fine():
            return mesh_pb2.Document(json="fine")

        servicer.work = fine
        assert (await trio.to_thread.run_sync(status, connection)).json == "fine"


async def test_a_caller_that_goes_away_ends_the_task():
    async with serving() as (servicer, connection):
        ended = trio.Event()

        async def work():
            try:
                await trio.sleep_forever()
            finally:
                ended.set()

        servicer.work = work
        with pytest.raises(MeshError):
            await trio.to_thread.run_sync(status, connection, 0.2)
        await ended.wait()


async def test_a_stream_arrives_in_order_and_closing_it_closes_the_source():
    async with serving() as (servicer, connection):
        closed = trio.Event()

        async def source():
            try:
                for number in range(10**9):
                    yield mesh_pb2.JobStatus(epoch=number)
            finally:
                closed.set()

        servicer.source = source

        def read():
            call = connection.stub.Watch(mesh_pb2.JobRef())
            numbers = [next(call).epoch for _ in range(500)]
            call.cancel()
            return numbers

        assert await trio.to_thread.run_sync(read) == list(range(500))
        await closed.wait()


async def test_a_source_that_cannot_begin_is_an_error_of_the_call():
    async with serving() as (servicer, connection):

        def source():
            raise JobNotFound("no such job")

        servicer.source = source

        def read():
            try:
                list(connection.stub.Watch(mesh_pb2.JobRef()))
            except grpc.RpcError as error:
                return connection.error(error, "watch", 1.0)
            return None

        assert isinstance(await trio.to_thread.run_sync(read), JobNotFound)
