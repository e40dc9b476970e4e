"""The real small model, whole and cut: the greedy tokens of transformers' `generate` in float32, exactly.

The expected tokens lie in smollm2_greedy.json; `python tests/runtime/test_smollm.py` makes that file again.
"""

import json
from pathlib import Path

import pytest
from small_models import GGUF, REAL, Ring, head_shards, shards, whole_real

from mesh.runtime.stage import StageModel

GOLDEN = Path(__file__).with_name("smollm2_greedy.json")
PROMPTS = (
    "Gravity is",
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time, in a small village by the sea,",
    "Three things to know about tensor parallelism: first,",
    "<|im_start|>user\nName five kinds of bread.<|im_end|>\n<|im_start|>assistant\n",
)
pytestmark = pytest.mark.skipif(not REAL.is_dir(), reason="run scripts/fetch_small_model.py first")


def _pipeline(*borders):
    edges = (0, *borders, 30)
    return [whole_real(stage=i, stages=len(edges) - 1, start=edges[i], end=edges[i + 1]) for i in range(len(edges) - 1)]


TWO = {"cuts": [0, 2, 3], "columns": [0, 1000, 1536], "vocabulary": [0, 30000, 49152]}
THREE = {"cuts": [0, 1, 2, 3], "columns": [0, 512, 1024, 1536], "vocabulary": [0, 16384, 32768, 49152]}
FOUR = {"columns": [0, 512, 900, 1200, 1536], "vocabulary": [0, 20000, 20000, 40000, 49152]}
PLANS = {
    "one device": [[whole_real()]],
    "tensor parallel 2+1": [shards(whole_real(), **TWO)],
    "tensor parallel 1+1+1": [shards(whole_real(), **THREE)],
    "query heads 3+2+2+2": [head_shards(whole_real(), heads=[0, 3, 5, 7, 9], group=3, **FOUR)],
    "two stages": [[a] for a in _pipeline(13)],
    "three stages": [[a] for a in _pipeline(7, 22)],
    "tensor parallel 2+1, then one": [shards(_pipeline(18)[0], **TWO), [_pipeline(18)[1]]],
}


@pytest.fixture(scope="module")
def golden():
    return json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_gives_the_tokens_of_transformers(golden, plan):
    ring = Ring(PLANS[plan])
    assert ring.greedy(golden[3]["prompt"], 10) == golden[3]["tokens"][:10]


@pytest.mark.e2e
@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_gives_the_tokens_of_transformers_at_length(golden, plan):
    ring = Ring(PLANS[plan])
    for case in golden:
        assert ring.greedy(case["prompt"], 64) == case["tokens"]


def test_the_gguf_file_gives_the_tokens_of_the_folder(golden):
    stage = StageModel.load(whole_real(model=str(GGUF)))
    position, tokens = 0, golden[0]["prompt"]
    for expected in golden[0]["tokens"][:10]:
        logits = stage.forward("r", position, tokens=tokens)
        position, tokens = position + len(tokens), [int(logits.argmax())]
        assert tokens == [expected]
    stage.close()


def _make() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(REAL)
    model = AutoModelForCausalLM.from_pretrained(REAL, dtype=torch.float32)
    cases = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        # Without the mask `generate` would take the turn ends in a chat, which are this model's padding, for padding.
        mask = torch.ones_like(ids)
        made = model.generate(ids, attention_mask=mask, max_new_tokens=64, do_sample=False, eos_token_id=None)
        cases.append({"prompt": ids[0].tolist(), "tokens": made[0, ids.shape[1] :].tolist()})
    GOLDEN.write_text("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n")


if __name__ == "__main__":
    _make()
