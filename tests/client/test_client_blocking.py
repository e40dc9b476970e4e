"""The blocking client against a peer that plays its part over real gRPC."""

import socket
import subprocess
import sys
import threading

import pytest
from fake_peer import PLAN, SNAPSHOT, FakePeer

import mesh
from mesh.client.errors import from_rpc
from mesh.client.watchdog import Watchdog
from mesh.errors import BY_CODE
from mesh.wire.errors import STATUS


@pytest.fixture
def client(peer):
    with mesh.connect(peer.address) as connected:
        yield connected


def test_submit_wait_generate(peer, client):
    job = client.submit(model="org/model", strategy="pipeline", constraints={"max_sites": 2})
    assert (job.id, job.model, job.owner, job.last.state) == ("job-1", "org/model", "berlin", "planning")
    assert job.wait() is job
    assert job.status == "ready" and job.plan == PLAN
    generation = job.generate("The", max_tokens=4, temperature=0.5, seed=9)
    assert generation.text == "The sea is wide" and generation.token_ids == [0, 1, 2, 3]
    assert (generation.finish_reason, generation.prompt_tokens, generation.seed) == ("length", 5, 9)
    assert generation.timings == {"decode_tokens_per_s": 50.0}
    assert peer.submitted[0].strategy == "pipeline" and peer.generated[0].temperature == 0.5
    job.cancel()
    assert job.status == "cancelled"


def test_the_documents_are_values(client):
    assert client.status()["site"] == "berlin"
    assert client.topology() == SNAPSHOT
    assert client.plan("org/model") == PLAN


def test_jobs_are_listed_and_found_again(client):
    client.submit("a/b")
    assert [(job.id, job.plan) for job in client.jobs()] == [("job-1", None)]
    assert client.job("job-1").wait().last.plan == PLAN
    with pytest.raises(mesh.JobNotFound, match="no job 'job-9' here"):
        client.job("job-9")


def test_module_level_submit_uses_the_environment(peer, monkeypatch):
    monkeypatch.setenv("MESH_PEER", peer.address)
    assert mesh.submit(model="a/b").wait().generate("x", max_tokens=1).text == "The"


def test_a_stream_yields_chunks_and_then_the_whole(client):
    with client.submit("a/b").stream("x") as stream:
        assert next(stream) == mesh.Chunk("The", [0])
        assert stream.generation.finish_reason == ""
        assert "".join(chunk.text for chunk in stream) == " sea is wide and old."
        assert stream.generation.text == "The sea is wide and old." and stream.generation.finish_reason == "length"


def test_closing_a_stream_cancels_the_request(peer, client):
    with client.submit("mute/after3").stream("x") as stream:
        assert [next(stream).text for _ in range(3)] == ["The", " sea", " is"]
    assert peer.cancelled.wait(5)
    assert list(stream) == []


def test_a_forgotten_stream_cancels_the_request(peer, client):
    stream = client.submit("mute/after3").stream("x")
    next(stream)
    del stream
    assert peer.cancelled.wait(5)


def test_closing_from_another_thread_ends_the_stream(client):
    stream = client.submit("mute/after3").stream("x")
    timer = threading.Timer(0.1, stream.close)
    timer.start()
    assert len(list(stream)) == 3
    timer.join()


def test_silence_in_a_stream_has_a_deadline(peer, client):
    with pytest.raises(mesh.DeadlineExceeded, match=r"did not answer the next token within 0.2 s"):
        client.submit("mute/after3").generate("x", idle_timeout_s=0.2)
    assert peer.cancelled.wait(5)


def test_a_slow_reader_is_not_a_silent_peer(client):
    watchdog = Watchdog(lambda: pytest.fail("expired"), 0.05)
    watchdog.wait_begins()
    watchdog.wait_ends()
    threading.Event().wait(0.12)
    watchdog.stop()
    assert not watchdog.fired


def test_a_stream_that_ends_without_a_reason_is_a_failure(client):
    with pytest.raises(mesh.JobFailed, match="ended after 3 tokens without a reason"):
        client.submit("cut/after3").generate("x")


def test_wait_raises_the_jobs_own_error(client):
    with pytest.raises(mesh.WorkerError, match=r"^cpu:0 ran out of memory$"):
        client.submit("bad/worker").wait()


def test_wait_for_a_cancelled_job_says_so(client):
    job = client.submit("a/b")
    job.cancel()
    with pytest.raises(mesh.JobCancelled, match="job-1 was cancelled"):
        job.wait()


def test_wait_has_a_deadline_and_says_how_far_it_came(peer, client):
    with pytest.raises(mesh.DeadlineExceeded, match=r"job-1 was still loading after 0.3 s, 1048576 of 3145728 bytes"):
        client.submit("slow/load").wait(timeout_s=0.3)
    assert peer.cancelled.wait(5)


def test_a_watch_cut_short_is_an_unreachable_peer(client):
    with pytest.raises(mesh.PeerUnreachable, match="stopped telling about job"):
        client.submit("cut/watch").wait()


def test_errors_of_the_peer_keep_class_and_message_on_one_line(client):
    with pytest.raises(mesh.ModelError, match="no model 'no/model'"):
        client.submit("no/model")
    with pytest.raises(mesh.PlanError, match=r"needs 9 GB, 1 GB available"):
        client.plan("too/big")


def test_mistakes_are_told_before_anything_is_sent(peer, client):
    job = client.submit("a/b")
    with pytest.raises(mesh.RequestError, match="did you mean 'max_tokens'"):
        job.generate("x", max_tokns=3)
    with pytest.raises(mesh.RequestError):
        job.stream("")
    with pytest.raises(mesh.RequestError):
        client.submit("a/b", constraints={"colour": "red"})
    assert not peer.generated and len(peer.submitted) == 1


def test_nobody_there_is_told_with_the_remedy():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(mesh.PeerUnreachable) as caught:
            mesh.connect(address)
    assert str(caught.value) == (
        f"nobody answers at {address}: start a peer there with `mesh up`, or name another with --peer"
    )


def test_a_peer_that_dies_in_mid_stream_is_told_as_lost():
    fake = FakePeer()
    with mesh.Mesh(fake.address) as client, client.submit("mute/after3").stream("x") as stream:
        for _ in range(3):
            next(stream)
        threading.Timer(0.05, fake.stop).start()
        with pytest.raises((mesh.PeerUnreachable, mesh.JobCancelled)):
            next(stream)


def test_a_closed_client_says_so(peer):
    client = mesh.connect(peer.address)
    client.close()
    client.close()
    with pytest.raises(mesh.MeshError, match="is closed: connect again"):
        client.status()


def test_every_error_has_a_code_of_its_own_and_unknown_ones_stay_mesh_errors():
    assert len(BY_CODE) == len({cls.exit_code for cls in BY_CODE.values()}) == 17 - 1
    assert set(STATUS) <= set(BY_CODE.values())

    import grpc

    assert isinstance(from_rpc(grpc.RpcError("odd\nthing"), "h:1", "status", 1.0), mesh.MeshError)


def test_importing_mesh_is_light():
    code = "import sys, mesh, mesh.errors; print(*{'torch','grpc','trio','networkx','transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


def test_the_public_names_are_few_and_all_there():
    assert len(mesh.__all__) <= 30
    for name in mesh.__all__:
        assert getattr(mesh, name).__doc__
    assert set(mesh.__all__) <= set(dir(mesh))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = mesh.nothing
