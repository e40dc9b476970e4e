"""Models for tests of weights: folders of a few blocks, and what their files hold."""

import json

import numpy
from safetensors.numpy import save_file


def write_folder(path, *, layers=4, rows=1024, seed=0):
    """A folder with `layers` matrices of 2 MiB."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "num_key_value_heads": 1}))
    random = numpy.random.default_rng(seed)
    tensors = {
        f"model.layers.{i}.mlp.down_proj.weight": random.standard_normal((rows, 512)).astype(numpy.float32)
        for i in range(layers)
    }
    save_file(tensors, path / "model.safetensors")
    return path


def assignment(start, end, layers=4):
    """An assignment's document for whole layers."""
    return {
        "job": "j", "epoch": [1, "o"], "model": "m", "dtype": "float32", "device": "cpu", "threads": 1,
        "memory_bytes": 0, "context": 8, "stage": 0 if start == 0 else 1, "stages": 2 if end < layers or start else 1,
        "start": start, "end": end, "rank": 0, "size": 1, "kv_heads": [0, 1], "columns": [0, 8],
        "vocabulary": [0, 8],
    }  # fmt: skip
