"""Decoding on one device: this runtime beside transformers' `generate`, and what a worker's memory is.

    python -m benchmarks.decode [--model FOLDER] [--threads 1] [--tokens 64] [--rounds 3] [--json]

Both run in this process on the same threads, in turns, so that what else the machine does hits both alike; the best
round of each counts. Memory is that of a fresh process that loads the model and decodes, as a worker does.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.command import command
from mesh.runtime.assignment import Assignment

PROMPT = 32
DEFAULT_MODEL = Path(__file__).resolve().parents[1] / ".models" / "SmolLM2-135M-Instruct"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__)
    parser.add_argument("--model", default=str(DEFAULT_MODEL))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", action="append", choices=("float32", "bfloat16"))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--memory-of", choices=("float32", "bfloat16"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(json.dumps(_memory(options.model, options.memory_of, options.threads)))
        return
    results = [_measure(options, dtype) for dtype in options.dtype or ("float32", "bfloat16")]
    if options.json:
        print(json.dumps(results))
        return
    for result in results:
        print(
            f"{result['dtype']:9} {result['threads']} threads: decode {result['mesh_tokens_per_s']:.1f} tokens/s,"
            f" transformers {result['transformers_tokens_per_s']:.1f} (x{result['speedup']:.2f});"
            f" prefill {result['mesh_prefill_tokens_per_s']:.0f};"
            f" memory {result['rss_bytes'] / 1e6:.0f} MB, of it weights {result['weight_bytes'] / 1e6:.0f}"
        )


def whole(model: str, dtype: str, threads: int) -> Assignment:
    """The assignment of one CPU that holds the whole model."""
    config: dict[str, Any] = json.loads((Path(model) / "config.json").read_text())
    return Assignment(
        job="benchmark",
        epoch=(1, "benchmark"),
        model=model,
        dtype=dtype,
        device="cpu",
        threads=threads,
        memory_bytes=0,
        context=1024,
        stage=0,
        stages=1,
        start=0,
        end=config["num_hidden_layers"],
        rank=0,
        size=1,
        kv_heads=(0, config["num_key_value_heads"]),
        columns=(0, config["intermediate_size"]),
        vocabulary=(0, config["vocab_size"]),
    )


def _measure(options: argparse.Namespace, dtype: str) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    from mesh.runtime.stage import StageModel

    stage = StageModel.load(whole(options.model, dtype, options.threads))
    reference = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, dtype))
    prompt = list(range(100, 100 + PROMPT))
    ids = torch.tensor([prompt])
    ours, theirs, prefill = [], [], []
    made: list[list[int]] = [[], []]
    for turn in range(options.rounds + 1):  # the first one warms up
        begun = time.perf_counter()
        logits = stage.forward("r", 0, tokens=prompt)
        made[0] = [int(logits.argmax())]
        started = time.perf_counter()
        for place in range(options.tokens - 1):
            logits = stage.forward("r", PROMPT + place, tokens=made[0][-1:])
            made[0].append(int(logits.argmax()))
        ended = time.perf_counter()
        begun_reference = time.perf_counter()
        one = reference.generate(ids, max_new_tokens=1, do_sample=False, eos_token_id=None, pad_token_id=0)
        started_reference = time.perf_counter()
        del one
        found = reference.generate(
            ids, max_new_tokens=options.tokens, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        ended_reference = time.perf_counter()
        made[1] = found[0, PROMPT:].tolist()
        if turn:
            prefill.append(PROMPT / (started - begun))
            ours.append((options.tokens - 1) / (ended - started))
            first = started_reference - begun_reference
            theirs.append((options.tokens - 1) / (ended_reference - started_reference - first))
    command = [sys.executable, "-m", "benchmarks.decode", "--model", options.model, "--memory-of", dtype]
    command += ["--threads", str(options.threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    memory = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=600, env=environment).stdout)
    return {
        "dtype": dtype,
        "threads": options.threads,
        "tokens": options.tokens,
        "mesh_tokens_per_s": max(ours),
        "transformers_tokens_per_s": max(theirs),
        "speedup": max(ours) / max(theirs),
        "mesh_prefill_tokens_per_s": max(prefill),
        "same_tokens": made[0] == made[1],
        **memory,
    }


def _memory(model: str, dtype: str, threads: int) -> dict[str, int]:
    import psutil

    from mesh.runtime.stage import StageModel

    stage = StageModel.load(whole(model, dtype, threads))
    for place in range(8):
        stage.forward("r", place, tokens=[100 + place])
    info = psutil.Process().memory_full_info()
    return {"rss_bytes": info.rss, "uss_bytes": info.uss, "weight_bytes": stage.weight_bytes}


if __name__ == "__main__":
    command(main)
