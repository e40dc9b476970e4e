"""A model so small that loading it costs nothing, and eyes on what a peer holds: processes, descriptors, answers.

The weights are random: what counts here is that a stream says the same whatever happens around it. Tokens are drawn
with a seed, since a random model's greedy text soon repeats itself and would hide a lost token.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time

import numpy
import psutil
from safetensors.numpy import save_file

from simulations.processes import MESH

LAYERS, HIDDEN, COLUMNS, VOCAB = 6, 48, 96, 49152
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "float32",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": COLUMNS,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
#: One line to the user, with its exit code, and nothing else.
ERROR_LINE = re.compile(r"error: [^\n]+\n")
COMMAND_S = 60.0


def tensors():
    """Random weights by the names transformers gives them."""
    random = numpy.random.default_rng(7)

    def matrix(rows, columns):
        return (random.standard_normal((rows, columns)) * 0.3).astype(numpy.float32)

    found = {"model.embed_tokens.weight": matrix(VOCAB, HIDDEN), "model.norm.weight": numpy.ones(HIDDEN, numpy.float32)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        for name in ("q", "k", "v", "o"):
            found[f"{at}self_attn.{name}_proj.weight"] = matrix(HIDDEN, HIDDEN)
        for name in ("gate", "up"):
            found[f"{at}mlp.{name}_proj.weight"] = matrix(COLUMNS, HIDDEN)
        found[f"{at}mlp.down_proj.weight"] = matrix(HIDDEN, COLUMNS)
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{at}{name}.weight"] = numpy.ones(HIDDEN, numpy.float32)
    return found


def write_model(folder, tokenizer, *, config=None, weights=None):
    """A folder as transformers would save it, with the tokenizer of the model at `tokenizer`."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(tokenizer / name, folder / name)
    save_file(tensors() if weights is None else weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def eventually(holds, timeout_s=30.0, what="what was waited for"):
    """Wait until `holds()` is true; its value."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = holds()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not come about within {timeout_s:g} s: {value!r}")
        time.sleep(0.05)


def workers(pid):
    """The worker processes below a daemon."""
    return [process for process in below(pid) if "mesh.runtime.worker" in " ".join(_words(process))]


def below(pid):
    """Every process below a daemon."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _words(process):
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []


def member(client, site):
    """The state in which the client's peer holds a site; None where it knows none."""
    return next((m["state"] for m in client.status()["members"] if m["site"] == site), None)


def command(*arguments):
    """A `mesh` command that runs beside the test, with its output in pipes and a process group of its own."""
    return subprocess.Popen(
        [*MESH, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(process, timeout_s=COMMAND_S):
    """Exit code, standard output and standard error of a command, which must have left no process of its group."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    assert "Traceback" not in err, err
    assert not group(process.pid), "a process of the command's group lives on"
    return process.returncode, out, err


def group(number):
    """The processes of a process group."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == number and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue
    return found


def refused(*arguments, code, out=""):
    """The one line with which a command refuses, whose exit code must be `code`."""
    status, printed, err = ended(command(*arguments))
    assert (status, re.sub(r" at [\d.:]+", "", printed)) == (code, out), err
    assert ERROR_LINE.fullmatch(err), err
    return err.removeprefix("error: ").strip()


def python(code, *arguments):
    """A Python process of its own, for a client that is going to be killed."""
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
