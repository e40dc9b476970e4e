"""`mesh plan --cluster`: an answer without any mesh, and mistakes in the files as one line each."""

import copy
import itertools
import json

import pytest

from mesh.cli import main

DEVICE = {
    "name": "gpu0",
    "vendor": "nvidia",
    "kind": "cuda",
    "memory_bytes": 80 * 10**9,
    "flops": {"bfloat16": 3e14},
    "memory_bandwidth_bytes_per_s": 2e12,
    "price_per_hour": 2.0,
}
CLUSTER = {
    "sites": [
        {"name": "fra", "region": "eu", "devices": [DEVICE, {**DEVICE, "name": "gpu1", "memory_bytes": 40 * 10**9}]},
        {"name": "nyc", "region": "us", "devices": [DEVICE]},
        {"name": "sfo", "region": "us", "devices": [DEVICE]},
    ],
    "links": [
        {"from": "fra", "to": "nyc", "rtt_ms": 88, "bandwidth_bytes_per_s": 125e6, "loss": 0},
        {"from": "nyc", "to": "sfo", "rtt_ms": 70, "bandwidth_bytes_per_s": 125e6, "loss": 0},
    ],
}
MODEL = {
    "layers": 80,
    "hidden": 8192,
    "heads": 64,
    "kv_heads": 8,
    "head_dim": 128,
    "intermediate": 28672,
    "vocab": 128256,
    "tied_embeddings": False,
    "bytes_per_parameter": 2,
}
SHAPE = {
    "model_type": "mistral",
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "vocab_size": 128256,
    "torch_dtype": "bfloat16",
    "max_position_embeddings": 8192,
}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs `mesh plan` on the documents; the peer that would be asked is nobody."""
    monkeypatch.setenv("MESH_PEER", "127.0.0.1:1")

    def command(*arguments, cluster=CLUSTER, model=MODEL):
        for name, document in (("cluster.json", cluster), ("model.json", model)):
            (tmp_path / name).write_text(document if isinstance(document, str) else json.dumps(document))
        places = ["--cluster", str(tmp_path / "cluster.json"), "--model", str(tmp_path / "model.json")]
        code = main(["plan", *places, *arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return command


def test_the_command_of_the_documentation_gives_every_key(run):
    code, out, err = run("--objective", "latency", "--context", "2048", "--batch", "1", "--json")
    assert (code, err) == (0, "")
    answer = json.loads(out)
    assert set(answer) >= {"stages", "ring", "standbys", "replicas", "predicted", "pareto", "why", "seconds"}
    stages = answer["stages"]
    assert stages[0]["layers"][0] == 0 and stages[-1]["layers"][1] == 80
    assert all(a["layers"][1] == b["layers"][0] for a, b in itertools.pairwise(stages))
    for stage in stages:
        assert sum(shard["share"] for shard in stage["shards"]) == pytest.approx(1)
    assert answer["ring"] == [stage["shards"][0]["site"] for stage in stages]
    predicted = answer["predicted"]
    assert {"token_ms", "first_token_ms", "tokens_per_s", "network_ms_per_token", "memory_bytes"} <= set(predicted)
    held = {f"{s['site']}/{s['device']}" for stage in stages for s in stage["shards"]}
    assert set(predicted["memory_bytes"]) == held and answer["seconds"] >= 0


def test_the_same_files_give_the_same_answer(run):
    first, second = (json.loads(run("--objective", "latency", "--json")[1]) for _ in range(2))
    assert {**first, "seconds": 0} == {**second, "seconds": 0}


def test_people_get_a_table_and_the_pairs_without_a_link(run):
    code, out, _ = run()
    assert code == 0 and "predicted:" in out
    assert "no link is given for 1 of 3 pairs of sites (fra - sfo): they count as unreachable" in out


def test_a_plan_never_crosses_a_pair_without_a_link(run):
    code, out, _ = run("-c", "sites=fra,sfo", "--json")
    assert (code, out) == (6, "")
    ring = json.loads(run("--json")[1])["ring"]
    assert {"fra", "sfo"} != set(ring)


def test_constraints_narrow_an_offline_plan(run):
    answer = json.loads(run("--json", "-c", "sites=nyc,sfo", "-c", "stages=2")[1])
    assert sorted(answer["ring"]) == ["nyc", "sfo"]


def test_a_folder_with_a_configuration_is_a_model(run, tmp_path, capsys):
    folder = tmp_path / "mistral-big"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SHAPE))
    (tmp_path / "c.json").write_text(json.dumps(CLUSTER))
    assert main(["plan", str(folder), "--cluster", str(tmp_path / "c.json"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["model"] == "mistral-big"
    assert {**json.loads(run("--json")[1]), "model": "", "seconds": 0, "why": []} == {
        **answer,
        "model": "",
        "seconds": 0,
        "why": [],
    }


def test_four_bits_a_weight_fit_where_sixteen_do_not(run):
    answer = json.loads(run("--json", "-c", "sites=fra", model={**MODEL, "bytes_per_parameter": 0.5})[1])
    assert set(answer["ring"]) == {"fra"}
    assert run("--json", "-c", "sites=fra")[0] == 6


def broken(**change):
    document = copy.deepcopy(CLUSTER)
    document["sites"][1]["devices"] = [{**DEVICE, **change}]
    return document


@pytest.mark.parametrize(
    ("documents", "arguments", "code", "says"),
    [
        ({"cluster": broken(memory_bytes=-5)}, (), 2, "cluster.json: sites[1].devices[0].memory_bytes: "),
        ({"cluster": broken(memory=5)}, (), 2, "did you mean 'memory_bytes'?"),
        ({"cluster": "{"}, (), 2, "cluster.json is not JSON"),
        ({"cluster": "[" * 100_000}, (), 2, "cluster.json"),
        ({"cluster": '{"sites": [{"name": NaN}]}'}, (), 2, "sites[0]"),
        ({"model": {**MODEL, "layers": 0}}, (), 5, "model.json: layers: "),
        ({"model": "no"}, (), 5, "model.json is not JSON"),
        ({}, ("--objective", "latencyy"), 3, "latency"),
        ({}, ("-c", "sites=berlin"), 3, "berlin"),
        ({}, ("-c", "max_site=1"), 3, "did you mean 'max_sites'"),
        ({}, ("--context", "0"), 2, "--context"),
        ({}, ("--batch", "none"), 2, "--batch"),
        ({}, ("--peer", "127.0.0.1:1"), 2, "--cluster plans without a mesh"),
        ({}, ("extra",), 2, "give the model once"),
        ({}, ("-c", "sites=nyc"), 6, "no feasible plan for model: memory"),
        ({}, ("--schema", "clusterr"), 2, "did you mean 'cluster'?"),
    ],
)
def test_a_mistake_is_one_line_and_the_exit_code_of_its_kind(run, documents, arguments, code, says):
    got, out, err = run(*arguments, **documents)
    assert (got, out) == (code, "") and err.count("\n") == 1 and says in err


def test_files_that_are_not_there_are_named(tmp_path, capsys):
    (tmp_path / "c.json").write_text(json.dumps(CLUSTER))
    assert main(["plan", "--cluster", str(tmp_path / "none.json"), "--model", "x"]) == 2
    assert "none.json: No such file" in capsys.readouterr().err
    assert main(["plan", "--cluster", str(tmp_path / "c.json"), "--model", str(tmp_path)]) == 5
    assert "has no config.json" in capsys.readouterr().err
    assert main(["plan", "--cluster", str(tmp_path / "c.json"), "--model", str(tmp_path / "gone")]) == 5


@pytest.mark.parametrize("name", ["cluster", "model"])
def test_the_schema_of_each_file_can_be_printed(capsys, name):
    assert main(["plan", "--schema", name]) == 0
    assert json.loads(capsys.readouterr().out)["additionalProperties"] is False
