"""The yardstick: `transformers.generate` on the whole model, in one process, in float32, on so many threads.

    python -m benchmarks.whole MODEL THREADS PROMPT_TOKENS NEW_TOKENS

prints one JSON line with `prefill_tokens_per_s`, `decode_tokens_per_s` and `memory_bytes`, each the best of `RUNS`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.command import command

RUNS = 3
TIMEOUT_S = 600.0


def measure(model: Path, *, threads: int, prompt_tokens: int, new_tokens: int) -> dict[str, float]:
    """Run it in a process of its own. Raises RuntimeError with the last line it printed."""
    numbers = (str(threads), str(prompt_tokens), str(new_tokens))
    command = [sys.executable, "-m", "benchmarks.whole", str(model), *numbers]
    result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if result.returncode:
        raise RuntimeError((result.stderr.strip().splitlines() or ["no output"])[-1])
    figures: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return figures


def main() -> int:
    """Measure in this process."""
    import psutil
    import torch
    from transformers import AutoModelForCausalLM

    path, (threads, prompt_tokens, new_tokens) = sys.argv[1], (int(text) for text in sys.argv[2:5])
    torch.set_num_threads(threads)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    long, short = torch.arange(3, 3 + prompt_tokens)[None], torch.arange(3, 19)[None]

    def seconds(prompt: torch.Tensor, count: int) -> float:
        started = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                prompt, attention_mask=torch.ones_like(prompt), min_new_tokens=count, max_new_tokens=count,
                do_sample=False, pad_token_id=0,
            )  # fmt: skip
        return time.perf_counter() - started

    seconds(short, 2)  # the first call sets things up
    prefill_s = min(seconds(long, 1) for _ in range(RUNS))
    first_s = min(seconds(short, 1) for _ in range(RUNS))
    decode_s = min(seconds(short, new_tokens) for _ in range(RUNS)) - first_s
    figures = {
        "prefill_tokens_per_s": prompt_tokens / prefill_s,
        "decode_tokens_per_s": (new_tokens - 1) / decode_s,
        "memory_bytes": psutil.Process().memory_info().rss,
    }
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    command(main)
