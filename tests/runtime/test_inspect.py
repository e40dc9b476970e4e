"""Inspection: what a model is in one line of JSON, and in one line why it is none."""

import json
import os

import pytest
from small_models import build

from mesh.errors import ModelError
from mesh.runtime import inspect as inspection
from mesh.runtime.inspect import inspect_model, main
from topology.model import ModelSpec


@pytest.fixture
def folder(tmp_path):
    from test_text import bytewise

    path = tmp_path / "tiny"
    build("qwen3").save_pretrained(path)
    bytewise().save(str(path / "tokenizer.json"))
    return path


def test_a_folder_is_described_as_it_is(folder, tmp_path, capsys):
    assert main([str(folder), "--cache", str(tmp_path / "cache")]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert ModelSpec.from_dict(answer["spec"]) == ModelSpec(
        name="tiny",
        layers=4,
        hidden=48,
        heads=6,
        kv_heads=3,
        head_dim=16,
        intermediate=80,
        vocab=97,
        tied_embeddings=False,
        dtype="float32",
        context=256,
    )
    assert answer["path"] == answer["tokenizer"] == str(folder)
    assert answer["eos"] == [2]


def test_an_answer_is_kept_until_the_model_changes(folder, tmp_path, monkeypatch):
    first = inspect_model(str(folder), tmp_path / "cache")
    calls = []
    look = inspection._inspect
    monkeypatch.setattr(inspection, "_inspect", lambda *given: calls.append(1) or look(*given))
    assert inspect_model(str(folder), tmp_path / "cache") == first
    assert not calls
    os.utime(folder / "config.json", ns=(1, 1))
    inspect_model(str(folder), tmp_path / "cache")
    assert calls


def _config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "no-such-family"}, "unknown to transformers"),
        ({"model_type": "bert", "architectures": ["BertModel"]}, "BertModel is not a decoder-only language model"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "is not a decoder-only language model"),
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "is not a decoder-only language model"),
        ({"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]}, "cannot be cut into shards yet"),
        (
            {"model_type": "opt", "architectures": ["OPTForCausalLM"]},
            "publishes no tensor- and pipeline-parallel plans",
        ),
        ({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}, "cannot be cut into shards yet"),
        ({"quantization_config": {"quant_method": "gptq"}}, "is quantised"),
    ],
)
def test_models_that_cannot_be_served_say_why(folder, tmp_path, changes, reason, capsys):
    _config(folder, **changes)
    assert main([str(folder), "--cache", str(tmp_path / "cache")]) == ModelError.exit_code
    answer = json.loads(capsys.readouterr().out)
    assert answer["error"] == "model"
    assert reason in answer["message"]
    assert "\n" not in answer["message"]


def test_a_model_without_a_tokenizer_says_so(tmp_path):
    build("qwen2").save_pretrained(tmp_path / "bare")
    with pytest.raises(ModelError, match="tokenizer"):
        inspect_model(str(tmp_path / "bare"), tmp_path / "cache")


def test_a_hub_that_does_not_answer_is_given_up_in_seconds(tmp_path, monkeypatch):
    import time

    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # `make test` sets the variable it is read from
    begun = time.monotonic()
    with pytest.raises(ModelError, match="nobody/nothing is neither a path nor in the local cache"):
        inspect_model("nobody/nothing", tmp_path)
    assert time.monotonic() - begun < 5
