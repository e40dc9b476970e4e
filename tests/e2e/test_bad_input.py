"""Whatever is wrong with what a user gives: one line, a class and an exit code of its own, and a peer that goes on."""

import contextlib
import json
import os
import random
import shutil
import socket

import gguf
import grpc
import numpy
import psutil
import pytest
from drills import READY_TIMEOUT_S, SPEED, converged
from small import COMMAND_S, CONFIG, below, command, ended, eventually, refused, tensors, write_model

import mesh
from mesh.runtime.inspect import inspect_model
from mesh.wire.v1 import mesh_pb2, mesh_pb2_grpc, peer_pb2
from simulations.processes import SiteSpec, free_ports

#: gRPC, gossip and the clients' own connections come and go by this many descriptors.
DESCRIPTORS = 6


@pytest.fixture(scope="module")
def peer():
    """A peer of one small device, and a client of it."""
    site = SiteSpec("solo", (f"cpu,threads=1,memory=600MiB,{SPEED}",))
    with converged([site], transport="tcp") as (fleet, client):
        yield fleet, client


@pytest.fixture(scope="module")
def job(peer, tiny):
    """A small model that is up while all else goes wrong around it."""
    job = peer[1].submit(tiny, constraints={"context": 64})
    job.wait(READY_TIMEOUT_S)
    return job


@pytest.fixture(scope="module")
def usual(job):
    """What it says, and what the daemon holds once it has said it."""
    return tokens(job)


@pytest.fixture
def unharmed(peer, job, usual):
    """After each mistake the daemon is the one it was, has no process or descriptor more, and its job still serves."""
    fleet, client = peer
    daemon = psutil.Process(fleet.pid("solo"))
    before, open_before = below(daemon.pid), daemon.num_fds()
    yield
    fleet.check()
    eventually(lambda: set(below(daemon.pid)) <= set(before), what="the end of every process that came up")
    eventually(lambda: daemon.num_fds() <= open_before + DESCRIPTORS, what="the closing of every descriptor")
    assert [entry for entry in client.jobs() if entry.state not in ("failed", "cancelled")] == [job.refresh()]
    assert tokens(job) == usual


def tokens(job):
    return job.generate("The sea is", max_tokens=8, ignore_eos=True, temperature=1.0, seed=3).token_ids


# -- models


def nothing(folder, small, real):
    return folder / "nothing-here"


def unknown_id(folder, small, real):
    return "nobody/has-this-model"


def no_model(folder, small, real):
    path = folder / "notes.txt"
    path.write_text("not a model")
    return path


def empty_folder(folder, small, real):
    return folder


def encoder(folder, small, real):
    config = {
        "architectures": ["BertForMaskedLM"], "model_type": "bert", "vocab_size": 64, "hidden_size": 16,
        "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64,
    }  # fmt: skip
    return write_model(folder / "bert", small, config=config)


def encoder_decoder(folder, small, real):
    config = {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "d_model": 16, "vocab_size": 64}
    return write_model(folder / "t5", small, config=config)


def unknown_family(folder, small, real):
    return write_model(folder / "family", small, config={**CONFIG, "model_type": "unheard-of"})


def absurd_settings(folder, small, real):
    return write_model(folder / "absurd", small, config={**CONFIG, "num_hidden_layers": -3, "hidden_size": "wide"})


def broken_settings(folder, small, real):
    path = write_model(folder / "settings", small)
    (path / "config.json").write_text('{"model_type": "llama", ')
    return path


def no_tokenizer(folder, small, real):
    path = write_model(folder / "mute", small)
    (path / "tokenizer.json").unlink()
    return path


def broken_tokenizer(folder, small, real):
    path = write_model(folder / "tokenizer", small)
    (path / "tokenizer.json").write_text('{"version": "1.0"')
    return path


def truncated_weights(folder, small, real):
    path = folder / "truncated"
    shutil.copytree(real, path, ignore=shutil.ignore_patterns("*.safetensors"))
    with (real / "model.safetensors").open("rb") as whole, (path / "model.safetensors").open("wb") as part:
        part.write(whole.read(3 << 20))
    return path


def corrupt_weights(folder, small, real):
    path = write_model(folder / "corrupt", small)
    with (path / "model.safetensors").open("r+b") as file:
        file.seek(8)
        file.write(os.urandom(512))
    return path


def empty_weights(folder, small, real):
    path = write_model(folder / "empty", small)
    (path / "model.safetensors").write_bytes(b"")
    return path


def missing_tensor(folder, small, real):
    weights = tensors()
    del weights["model.layers.4.mlp.down_proj.weight"]
    return write_model(folder / "gap", small, weights=weights)


def wrong_shape(folder, small, real):
    weights = tensors()
    weights["model.layers.4.mlp.down_proj.weight"] = numpy.zeros((5, 7), numpy.float32)
    return write_model(folder / "shape", small, weights=weights)


def missing_part(folder, small, real):
    path = write_model(folder / "parts", small)
    names = dict.fromkeys(tensors(), "model-00001-of-00002.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return path


def gguf_file(path, architecture="llama"):
    """A GGUF file with a llama's settings and one tensor."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tensor("token_embd.weight", numpy.zeros((64, 16), numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def unknown_architecture(folder, small, real):
    return gguf_file(folder / "strange.gguf", "unheard-of")


def truncated_gguf(folder, small, real):
    path = gguf_file(folder / "short.gguf")
    os.truncate(path, path.stat().st_size - 1000)
    return path


def truncated_gguf_header(folder, small, real):
    path = gguf_file(folder / "header.gguf")
    os.truncate(path, 100)
    return path


def gapped_gguf(folder, small, real):
    return gguf_file(folder / "gap.gguf")


def false_gguf(folder, small, real):
    path = folder / "false.gguf"
    path.write_bytes(os.urandom(4096))
    return path


#: What the user reads. Through a peer, each costs the seconds in which its inspector or its worker starts.
MODELS = {
    nothing: "no model at .*nothing-here",
    no_model: "notes.txt is neither a folder nor a .gguf file",
    encoder: "BertForMaskedLM is not a decoder",
    truncated_weights: "model.safetensors is damaged or truncated",
    missing_tensor: r"model\.layers\.4\.mlp\.down_proj\.weight",
    wrong_shape: r"model\.layers\.4\.mlp\.down_proj\.weight",
    truncated_gguf: "short.gguf.*(truncated|damaged)",
    unknown_architecture: "unheard-of",
}
#: The same inspection without a peer around it.
MORE_MODELS = {
    unknown_id: "nobody/has-this-model",
    empty_folder: "config.json",
    encoder_decoder: "T5ForConditionalGeneration is not a decoder",
    unknown_family: "unheard-of is unknown",
    absurd_settings: "config.json is damaged",
    broken_settings: "config.json",
    no_tokenizer: "no tokenizer",
    broken_tokenizer: "tokenizer.json",
    corrupt_weights: "model.safetensors is damaged or truncated",
    empty_weights: "model.safetensors is damaged or truncated",
    missing_part: "model-00001-of-00002.safetensors is missing",
    truncated_gguf_header: "header.gguf.*(truncated|damaged)",
    gapped_gguf: "gap.gguf",
    false_gguf: "false.gguf",
}


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_a_model_that_cannot_be_served_is_refused_with_the_reason(peer, unharmed, tiny, model, tmp_path, make):
    _, client = peer
    job = client.submit(make(tmp_path, tiny, model), constraints={"context": 64})
    with pytest.raises(mesh.ModelError, match=MODELS[make]) as caught:
        job.wait(READY_TIMEOUT_S)
    assert "\n" not in str(caught.value)
    status = job.refresh()
    assert (status.state, status.error) == ("failed", str(caught.value))
    with pytest.raises(mesh.ModelError):
        job.generate("hello", max_tokens=1)


@pytest.mark.parametrize("make", MORE_MODELS, ids=lambda make: make.__name__)
def test_an_inspection_says_what_is_wrong_with_a_model(tiny, model, tmp_path, monkeypatch, make):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(mesh.ModelError, match=MORE_MODELS[make]) as caught:
        inspect_model(str(make(tmp_path, tiny, model)), tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert not any((tmp_path / "cache").iterdir()) if (tmp_path / "cache").exists() else True


@pytest.mark.parametrize("name", ["\0", "x" * 5000, "--help", "a\nb"], ids=["nul", "long", "option", "lines"])
def test_a_name_that_is_none_is_refused(peer, unharmed, name):
    fleet, client = peer
    with pytest.raises((mesh.RequestError, mesh.ModelError)) as caught:
        client.submit(name).wait(READY_TIMEOUT_S)
    assert "\n" not in str(caught.value)
    # And where a client does not look at it first.
    with grpc.insecure_channel(fleet.address("solo")) as channel:
        stub = mesh_pb2_grpc.MeshStub(channel)
        with pytest.raises(grpc.RpcError) as refused:
            stub.Plan(mesh_pb2.JobSpec(model=name, strategy="auto"), timeout=COMMAND_S)
    assert dict(refused.value.trailing_metadata())["mesh-error"] in ("request", "model")


def test_the_command_line_says_so_in_one_line_and_a_code(peer, unharmed, tmp_path):
    fleet, _ = peer
    address = fleet.address("solo")
    assert "nothing-here" in refused("submit", tmp_path / "nothing-here", "--peer", address, code=5)
    assert "nothing-here" in refused("plan", tmp_path / "nothing-here", "--peer", address, code=5)
    code, out, err = ended(command("submit", tmp_path / "nothing-here", "--peer", address, "--json"))
    assert (code, out) == (5, "")
    assert json.loads(err)["error"] == "model"


# -- constraints


@pytest.mark.parametrize(
    ("constraints", "reason"),
    [
        ({"sites": ["elsewhere"]}, "elsewhere"),
        ({"exclude_sites": ["solo"]}, "solo|site"),
        ({"stages": 3}, "stages"),
        ({"max_token_latency_ms": 1e-6}, "max_token_latency_ms"),
        ({"context": 100_000_000}, "memory|context"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_constraint_that_cannot_be_met_is_an_error_of_the_plan(peer, unharmed, tiny, constraints, reason):
    _, client = peer
    with pytest.raises(mesh.PlanError, match=reason) as caught:
        client.plan(tiny, constraints=constraints)
    assert "\n" not in str(caught.value)
    with pytest.raises(mesh.PlanError, match=reason):
        client.submit(tiny, constraints=constraints).wait(READY_TIMEOUT_S)


def test_a_constraint_that_does_not_exist_names_the_nearest(peer, unharmed, tiny):
    fleet, client = peer
    with pytest.raises(mesh.RequestError, match="min_latency"):
        client.submit(tiny, constraints={"min_latencyy": "low"})
    with pytest.raises(mesh.RequestError, match="low"):
        client.submit(tiny, constraints={"min_latency": "lowest"})
    with pytest.raises(mesh.RequestError, match="strategy"):
        client.submit(tiny, "tensor-parallel")
    assert "max_sites" in refused("submit", tiny, "-c", "max_site=2", "--peer", fleet.address("solo"), code=3)
    reason = refused("plan", tiny, "-c", "sites=elsewhere", "--peer", fleet.address("solo"), code=6)
    assert "elsewhere" in reason


# -- requests


@pytest.mark.parametrize(
    ("prompt", "options", "reason"),
    [
        ("", {}, "empty"),
        ([], {}, "empty"),
        ("word " * 200, {}, "context of this job holds 64"),
        ([5] * 64, {}, "context of this job holds 64"),
        ([1, 49152], {}, "49152"),
        ([1, -4], {}, "-4"),
        ([1, 2**40], {}, str(2**40)),
        ([{"role": "user"}], {}, "content"),
        ("x", {"max_tokens": 0}, "max_tokens"),
        ("x", {"temperature": -1.0}, "temperature"),
        ("x", {"temperature": float("nan")}, "temperature"),
        ("x", {"top_p": 0.0}, "top_p"),
        ("x", {"top_k": -1}, "top_k"),
        ("x", {"stop": [""]}, "stop"),
        ("x", {"max_token": 3}, "max_tokens"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_with_the_reason(job, unharmed, prompt, options, reason):
    with pytest.raises(mesh.RequestError, match=reason) as caught:
        job.generate(prompt, **options)
    assert "\n" not in str(caught.value)


def test_an_unknown_job_and_a_peer_that_is_not_there(peer, unharmed):
    fleet, client = peer
    with pytest.raises(mesh.JobNotFound, match="deadbeef"):
        client.job("deadbeef")
    assert "deadbeef" in refused("generate", "deadbeef", "x", "--peer", fleet.address("solo"), code=7)
    assert "deadbeef" in refused("cancel", "deadbeef", "--peer", fleet.address("solo"), code=7)
    (port,) = free_ports(1)
    with pytest.raises(mesh.PeerUnreachable, match=str(port)):
        mesh.connect(f"127.0.0.1:{port}")
    assert str(port) in refused("status", "--peer", f"127.0.0.1:{port}", code=4)
    assert "HOST:PORT" in refused("status", "--peer", "not-an-address", code=2)


# -- messages that no client of ours sends


def payloads(rng):
    """Bytes for the methods of a peer: random ones, and well-formed messages with nonsense in them."""
    epoch = peer_pb2.Epoch(counter=2**63, owner="x" * 1000)
    yield from (rng.randbytes(rng.randrange(200)) for _ in range(12))
    yield mesh_pb2.JobSpec(model="x", strategy="auto", constraints_json="[" * 100_000).SerializeToString()
    yield mesh_pb2.JobSpec(model="\0", strategy="auto", constraints_json='{"context": 1e400}').SerializeToString()
    yield peer_pb2.PrepareRequest(job="x", epoch=epoch, device="cpu0", assignment=b"\x81\xa3job").SerializeToString()
    yield peer_pb2.PrepareRequest(job="x", epoch=epoch, assignment=rng.randbytes(999)).SerializeToString()


def test_messages_that_make_no_sense_are_refused(peer, job, unharmed):
    fleet, _ = peer
    rng = random.Random(9)
    with grpc.insecure_channel(fleet.address("solo")) as channel:
        for service in (mesh_pb2.DESCRIPTOR, peer_pb2.DESCRIPTOR):
            for name, methods in service.services_by_name.items():
                for method in methods.methods:
                    call = channel.unary_stream(f"/{service.package}.{name}/{method.name}")
                    for payload in payloads(rng):
                        answers = call(payload, timeout=1.0)
                        with contextlib.suppress(grpc.RpcError):
                            next(iter(answers), None)
                        answers.cancel()


# -- peers that cannot start


@contextlib.contextmanager
def taken(kind):
    with socket.socket(socket.AF_INET, kind) as holder:
        holder.bind(("127.0.0.1", 0))
        if kind is socket.SOCK_STREAM:
            holder.listen()
        yield f"127.0.0.1:{holder.getsockname()[1]}"


def up(tmp_path, *arguments, code, out=""):
    """The line with which a peer refuses to start, and what it had printed until then."""
    base = ("--data-dir", tmp_path / "data", "--device", f"cpu,threads=1,memory=100MiB,{SPEED}")
    listen = () if "--listen" in arguments else ("--listen", "127.0.0.1:0")
    return refused("up", *base, *listen, *arguments, code=code, out=out)


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM], ids=["tcp", "udp"])
def test_a_peer_whose_port_is_taken_does_not_start(tmp_path, kind):
    with taken(kind) as address:
        assert address in up(tmp_path, "--listen", address, code=10)


def test_a_peer_whose_http_port_is_taken_does_not_start(tmp_path):
    with taken(socket.SOCK_STREAM) as address:
        assert f"http={address}" in up(tmp_path, "--http", address, code=10)


def test_a_second_peer_on_one_data_directory_does_not_start(peer, unharmed, tmp_path):
    fleet, _ = peer
    reason = up(tmp_path, "--data-dir", fleet.data_dir("solo"), code=11)
    assert str(fleet.pid("solo")) in reason


def test_a_second_peer_of_one_name_does_not_start(peer, unharmed, tmp_path):
    fleet, _ = peer
    # Only the mesh can tell, so it is up first.
    reason = up(tmp_path, "--site", "solo", "--join", fleet.address("solo"), code=2, out="solo is up\n")
    assert fleet.address("solo") in reason


@pytest.mark.parametrize("key", ["--listen", "--http"])
def test_a_peer_beyond_loopback_needs_an_identity(tmp_path, key):
    assert "identity" in up(tmp_path, key, "0.0.0.0:0", code=12)


def test_a_data_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in up(tmp_path, "--data-dir", tmp_path / "file" / "data", code=2)
    assert "/proc/nowhere" in up(tmp_path, "--data-dir", "/proc/nowhere", code=2)
    if os.geteuid():
        (tmp_path / "closed").mkdir(mode=0o500)
        assert "closed" in up(tmp_path, "--data-dir", tmp_path / "closed", code=2)


def test_a_configuration_that_is_wrong_names_its_key(tmp_path):
    assert "memory" in up(tmp_path, "--device", "cpu,memory=lots", code=2)
    assert "listen" in up(tmp_path, "--listen", "here", code=2)
    assert "join" in up(tmp_path, "--join", "127.0.0.1:0", code=2)
    (tmp_path / "peer.toml").write_text('lisen = "127.0.0.1:0"\n')
    assert "listen" in up(tmp_path, "--config", tmp_path / "peer.toml", code=2)
    assert "missing.toml" in up(tmp_path, "--config", tmp_path / "missing.toml", code=2)


def test_a_device_that_is_not_there_is_named(tmp_path):
    reason = refused(
        "up", "--data-dir", tmp_path / "data", "--listen", "127.0.0.1:0", "--device", "cuda:7", code=2
    )  # fmt: skip
    assert "cuda:7" in reason
