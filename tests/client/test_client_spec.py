"""What a submission may say."""

import json
from pathlib import Path

import pytest

from mesh.client.address import resolve
from mesh.client.spec import job_spec, model_name
from mesh.errors import ConfigError, RequestError
from topology.constraints import Constraints


def test_a_hub_id_is_sent_as_it_is():
    assert model_name("HuggingFaceTB/SmolLM2-135M-Instruct") == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_a_local_path_is_made_absolute_and_keeps_its_suffix(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "org" / "model").mkdir(parents=True)
    (tmp_path / "blob").touch()
    (tmp_path / "m.gguf").symlink_to("blob")
    assert model_name("org/model") == str(tmp_path / "org" / "model")
    assert model_name(Path("org/model")) == str(tmp_path / "org" / "model")
    assert model_name("m.gguf") == str(tmp_path / "m.gguf")
    assert model_name("./not/here") == str(tmp_path / "not" / "here")
    assert model_name("~/x.gguf") == str(tmp_path / "x.gguf")
    assert model_name("/data/on/the/peers") == "/data/on/the/peers"


def test_an_empty_model_is_refused():
    with pytest.raises(RequestError, match="the model is empty"):
        job_spec(" ")


def test_constraints_travel_as_json_from_a_mapping_and_from_a_value():
    wanted = {"max_sites": 2, "sites": ["a", "b"]}
    assert json.loads(job_spec("m", constraints={"sites": ("b", "a"), "max_sites": 2}).constraints_json) == wanted
    assert json.loads(job_spec("m", constraints=Constraints.parse(wanted)).constraints_json) == wanted
    assert job_spec("m").constraints_json == "{}"


def test_unknown_strategy_and_constraint_name_the_nearest():
    with pytest.raises(RequestError, match="did you mean 'tensor_parallelism'"):
        job_spec("m", "tensor_parallel")
    with pytest.raises(RequestError, match="min_latency"):
        job_spec("m", constraints={"min_latencies": "low"})


def test_the_address_comes_from_the_argument_then_the_environment_then_the_default(monkeypatch):
    monkeypatch.delenv("MESH_PEER", raising=False)
    assert resolve(None) == "127.0.0.1:7700"
    monkeypatch.setenv("MESH_PEER", "peer.example:1")
    assert resolve(None) == "peer.example:1"
    assert resolve("[::1]:7700") == "[::1]:7700"


@pytest.mark.parametrize("address", ["", "host", "host:", ":1", "host:0", "host:65536", "a b:1", "unix:/x", "::1:7700"])
def test_a_malformed_address_is_a_config_error(address):
    with pytest.raises(ConfigError, match="is not HOST:PORT"):
        resolve(address)
