"""Models on disk: slices are what was stored, damage is named, and GGUF gives what transformers makes of it."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_models import BASE, build, whole

from mesh.errors import ModelError
from mesh.runtime.shard import Cut, Piece, fill
from mesh.runtime.source import open_model
from mesh.runtime.stage import StageModel


@pytest.fixture
def folder(tmp_path):
    build("qwen2").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dim", "start", "stop"), [(0, 3, 9), (1, 5, 6), (None, 0, 0), (0, 4, 4)])
def test_a_block_is_the_block_that_was_stored(tmp_path, dtype, dim, start, stop):
    matrix = torch.randn(12, 10)
    save_file({"w": matrix.to(dtype)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    cut = Cut(dim, start, stop)
    out = torch.empty(cut.shape((12, 10)))
    fill(out, open_model(str(tmp_path)), "w", cut, {})
    wanted = matrix.to(dtype).float()
    torch.testing.assert_close(out, wanted if dim is None else wanted.narrow(dim, start, stop - start))


@pytest.mark.parametrize("held", [(0, 2), (3, 5), (2, 9), (0, 12), (8, 12), (10, 12)])
def test_what_is_held_is_copied_and_the_rest_is_read(tmp_path, held):
    matrix = torch.randn(12, 10)
    save_file({"w": matrix}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    out = torch.empty(6, 10)
    piece = Piece(Cut(0, *held), lambda: matrix[held[0] : held[1]])
    fill(out, open_model(str(tmp_path)), "w", Cut(0, 3, 9), {"w": piece})
    torch.testing.assert_close(out, matrix[3:9])


def test_a_model_in_several_files_is_one_model(tmp_path):
    model = build("qwen2")
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    logits = StageModel.load(whole(tmp_path)).forward("r", 0, tokens=[4, 5])
    with torch.no_grad():
        torch.testing.assert_close(logits, model(torch.tensor([[4, 5]])).logits[0, -1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_truncated_file_is_named(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged or truncated"):
        StageModel.load(whole(folder))


def test_a_damaged_header_is_named(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[20:40] = b"\xff" * 20
    path.write_bytes(data)
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged or truncated"):
        StageModel.load(whole(folder))


def test_numbers_that_are_not_finite_are_named(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-64:] = b"\xff" * 64
    path.write_bytes(data)
    with pytest.raises(ModelError, match="not finite"):
        StageModel.load(whole(folder))


def test_a_file_that_shrinks_after_opening_is_an_error_and_no_crash(folder):
    source = open_model(str(folder))
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    out = torch.empty(source.shape("lm_head.weight"))
    with pytest.raises(ModelError, match="is truncated"):
        source.read_into(out, "lm_head.weight", (0, 0))


def test_a_missing_tensor_is_named(folder):
    from safetensors.torch import load_file

    path = folder / "model.safetensors"
    tensors = {key: value for key, value in load_file(path).items() if "layers.1.mlp.up" not in key}
    save_file(tensors, path)
    with pytest.raises(ModelError, match=r"no tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        StageModel.load(whole(folder))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (None, "has no config.json"),
        ("{", "is damaged"),
        ("{}", "names no model_type"),
        ('{"model_type": "llama"}', "holds no .safetensors files"),
    ],
)
def test_a_folder_that_is_no_model_says_why(tmp_path, config, reason):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ModelError, match=reason):
        open_model(str(tmp_path))


@pytest.mark.parametrize("name", ["nowhere", "./a/b", "/nowhere/at/all"])
def test_a_model_that_does_not_exist_says_what_to_give(name):
    with pytest.raises(ModelError, match=r"give a folder, a \.gguf file or a Hugging Face id"):
        open_model(name)


def _write_gguf(path, family, kind):
    """A small GGUF file written with llama.cpp's own library, q and k permuted as its converter does for llama."""
    import gguf

    model = build("llama 3 rotary, tied") if family == "llama" else build(family)
    writer = gguf.GGUFWriter(path, family)
    writer.add_context_length(256)
    writer.add_embedding_length(BASE["hidden_size"])
    writer.add_block_count(BASE["num_hidden_layers"])
    writer.add_feed_forward_length(BASE["intermediate_size"])
    writer.add_head_count(BASE["num_attention_heads"])
    writer.add_head_count_kv(BASE["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_token_list([f"t{index}" for index in range(BASE["vocab_size"])])
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == family)
    names = gguf.get_tensor_name_map(arch, BASE["num_hidden_layers"])
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and family == "llama":
            continue
        module, suffix = name.rsplit(".", 1)
        data = tensor.numpy()
        if family == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = data.shape[0] // 8
            data = data.reshape(heads, 2, 4, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)
        short = f"{names.get_name(module)}.{suffix}"
        if kind is not None and data.ndim == 2 and data.shape[1] % 32 == 0:
            quantised = gguf.quantize(np.ascontiguousarray(data), kind)
            writer.add_tensor(short, quantised, raw_dtype=kind)
        else:
            writer.add_tensor(short, np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", [None, "Q8_0", "F16"])
def test_gguf_gives_what_transformers_makes_of_it(tmp_path, family, kind):
    import gguf
    import transformers
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = tmp_path / "model.gguf"
    _write_gguf(path, family, None if kind is None else gguf.GGMLQuantizationType[kind])
    source = open_model(str(path))
    config = transformers.CONFIG_MAPPING[family].from_dict(source.config)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    expected = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    assert set(expected) <= source.names()
    for name, tensor in expected.items():
        out = torch.empty(source.shape(name))
        source.read_into(out, name, (0,) * out.dim())
        torch.testing.assert_close(out, tensor, msg=name, rtol=0, atol=0)
    name = "model.layers.1.self_attn.k_proj.weight"
    block = torch.empty(16, 48)
    source.read_into(block, name, (8, 0))
    torch.testing.assert_close(block, expected[name][8:], rtol=0, atol=0)
    stage = StageModel.load(whole(path))
    assert stage.forward("r", 0, tokens=[1, 2, 3]).shape == (97,)


@pytest.mark.parametrize("keep", [0, 3, 100, -4000])
def test_a_truncated_gguf_file_is_named(tmp_path, keep):
    path = tmp_path / "model.gguf"
    _write_gguf(path, "qwen2", None)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model\.gguf"):
        StageModel.load(whole(path))


def test_the_dtype_is_the_checkpoints(folder):
    source = open_model(str(folder))
    assert source.default_dtype() == "float32"
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**document, "dtype": "bfloat16"}))
    assert open_model(str(folder)).default_dtype() == "bfloat16"
