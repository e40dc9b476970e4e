"""What the whole model says in one process: transformers in float32, greedy. The yardstick of every drill.

Run as its own process, so that a drill never loads a tensor itself:

    python -m simulations.reference MODEL < requests.json

`requests.json` is a list of `{"prompt": text | messages | token ids, "max_tokens": n}`; the reply is a JSON list of
token id lists. An end-of-sequence token ends an answer and is its last token, unless `"ignore_eos": true`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any


def reference_tokens(model: str, requests: Sequence[dict[str, Any]], *, timeout_s: float = 300.0) -> list[list[int]]:
    """The greedy tokens of each request, computed in a subprocess. RuntimeError carries the last line it printed."""
    command = [sys.executable, "-m", "simulations.reference", model]
    result = subprocess.run(
        command, input=json.dumps(list(requests)), capture_output=True, text=True, timeout=timeout_s, check=False
    )
    if result.returncode != 0:
        last = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
        raise RuntimeError(f"the reference run of {model} failed: {last[-1]}")
    tokens: list[list[int]] = json.loads(result.stdout.splitlines()[-1])
    return tokens


def _answer(model: Any, tokenizer: Any, request: dict[str, Any]) -> list[int]:
    import torch

    prompt = request["prompt"]
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    elif prompt and isinstance(prompt[0], dict):
        text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = list(prompt)
    inputs = torch.tensor([ids])
    count = request["max_tokens"]
    if request.get("ignore_eos"):
        return _without_end(model, inputs, count)
    with torch.inference_mode():
        output = model.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=count, do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
    return [int(token) for token in output[0, inputs.shape[1] :]]


def _without_end(model: Any, inputs: Any, count: int) -> list[int]:
    import torch

    # A loop of its own: telling `generate` to go on past the end works by changing the logits.
    tokens: list[int] = []
    cache = None
    with torch.inference_mode():
        for _ in range(count):
            output = model(inputs, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            tokens.append(int(output.logits[0, -1].argmax()))
            inputs = torch.tensor([[tokens[-1]]])
    return tokens


def main() -> int:
    """Read requests, print answers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # One thread: a token is a string of small products, and where cores are shared, threads that wait for each other at
    # every one of them are many times slower than one alone.
    torch.set_num_threads(1)
    path = sys.argv[1]
    requests = json.load(sys.stdin)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    print(json.dumps([_answer(model, tokenizer, request) for request in requests]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
