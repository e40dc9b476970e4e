"""A stage's steps: caches that grow and forget, reloads that keep what they can, and mistakes with names."""

from dataclasses import replace

import pytest
import torch
from small_models import COLUMNS, VOCAB, Ring, build, shards, whole

from mesh.errors import ModelError, RequestError
from mesh.runtime.checkpoint import Safetensors
from mesh.runtime.stage import StageModel

PROMPT = [5, 17, 33, 60, 8]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    build("llama with biases").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    build("gemma").save_pretrained(path)
    return path


@pytest.fixture
def reads(monkeypatch):
    """Names of the tensors that are read from disk."""
    names = []
    read = Safetensors.read_into

    def counted(self, out, name, start):
        names.append(name)
        read(self, out, name, start)

    monkeypatch.setattr(Safetensors, "read_into", counted)
    return names


def test_requests_do_not_see_each_other(folder):
    stage = StageModel.load(whole(folder))
    alone = stage.forward("a", 0, tokens=PROMPT)
    stage.forward("b", 0, tokens=[9, 9, 9])
    stage.forward("b", 3, tokens=[1])
    stage.drop("a")
    torch.testing.assert_close(stage.forward("a", 0, tokens=PROMPT), alone)


def test_the_cache_doubles_up_to_the_context_and_frees_what_is_dropped(folder):
    stage = StageModel.load(whole(folder, context=150))
    sizes = []
    for position in range(0, 150, 10):
        stage.forward("r", position, tokens=[3] * 10)
        sizes.append(stage.kv_bytes)
    assert sizes[0] < sizes[7] < sizes[-1] == sizes[0] * 150 // 64
    with pytest.raises(RequestError, match="151 positions exceed the context of 150"):
        stage.forward("r", 150, tokens=[3])
    stage.drop("r")
    assert stage.kv_bytes == 0


def test_a_step_may_go_back_and_take_another_turn(folder):
    stage = StageModel.load(whole(folder))
    stage.forward("r", 0, tokens=PROMPT)
    expected = stage.forward("r", 5, tokens=[7])
    stage.forward("r", 5, tokens=[1, 2, 3])
    torch.testing.assert_close(stage.forward("r", 5, tokens=[7]), expected)


def test_a_step_may_not_leave_positions_out(folder):
    with pytest.raises(RequestError, match="position 3 given, but only 0 are filled"):
        StageModel.load(whole(folder)).forward("r", 3, tokens=[1])


@pytest.mark.parametrize("tokens", [[], [VOCAB], [-1]])
def test_tokens_that_do_not_exist_are_refused(folder, tokens):
    with pytest.raises(RequestError, match="token"):
        StageModel.load(whole(folder)).forward("r", 0, tokens=tokens)


def test_progress_ends_at_the_total(folder):
    seen = []
    stage = StageModel.load(whole(folder), lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > 0
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert stage.weight_bytes >= sum(
        p.numel() * 4 for k, p in build("llama with biases").named_parameters() if "layers" in k
    )


def test_a_longer_run_of_layers_reads_only_the_new_ones(folder, reads):
    stage = StageModel.load(whole(folder, stage=0, stages=2, end=2))
    reads.clear()
    stage = stage.reload(whole(folder))
    assert {name.split(".")[2] for name in reads if ".layers." in name} == {"2", "3"}
    expected = StageModel.load(whole(folder)).forward("r", 0, tokens=PROMPT)
    torch.testing.assert_close(stage.forward("r", 0, tokens=PROMPT), expected)


@pytest.mark.parametrize("path", ["folder", "gemma"])
def test_a_shard_that_becomes_whole_and_back_computes_the_same(path, request):
    path = request.getfixturevalue(path)
    expected = StageModel.load(whole(path)).forward("r", 0, tokens=PROMPT)
    cut = {"cuts": [0, 2, 3], "columns": [0, 50, COLUMNS], "vocabulary": [0, 60, VOCAB]}
    halves = shards(whole(path), **cut)
    for half in halves:
        stage = StageModel.load(half).reload(whole(path))
        torch.testing.assert_close(stage.forward("r", 0, tokens=PROMPT), expected, atol=1e-5, rtol=1e-5)
    ring = Ring([halves])
    ring.stages = [[StageModel.load(whole(path)).reload(half) for half in halves]]
    torch.testing.assert_close(ring.step(0, PROMPT), expected, atol=1e-4, rtol=1e-4)


def test_a_wider_shard_reads_only_what_it_lacks(folder, monkeypatch):
    halves = shards(whole(folder), cuts=[0, 2, 3], columns=[0, 50, COLUMNS], vocabulary=[0, 60, VOCAB])
    stage = StageModel.load(halves[0])
    rows = {}
    read = Safetensors.read_into

    def counted(self, out, name, start):
        rows[name] = tuple(out.shape)
        read(self, out, name, start)

    monkeypatch.setattr(Safetensors, "read_into", counted)
    stage.reload(whole(folder))
    assert rows["model.layers.0.mlp.gate_proj.weight"] == (30, 48)
    assert rows["model.layers.0.self_attn.o_proj.weight"] == (48, 16)


def test_bfloat16_stays_close_to_float32(folder):
    exact = StageModel.load(whole(folder)).forward("r", 0, tokens=PROMPT)
    rough = StageModel.load(whole(folder, dtype="bfloat16")).forward("r", 0, tokens=PROMPT)
    assert rough.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(exact, rough, dim=0) > 0.99


def test_layers_the_model_does_not_have_are_refused(folder):
    with pytest.raises(ModelError, match="has 4 layers; 0:5 was asked for"):
        StageModel.load(whole(folder, end=5))


def test_a_model_that_does_not_fit_its_settings_is_refused(folder):
    with pytest.raises(ModelError, match="gate_proj"):
        StageModel.load(replace(whole(folder), columns=(0, 200)))
