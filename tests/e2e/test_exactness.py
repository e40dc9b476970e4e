"""Whatever the plan and the transport, the mesh says what the whole model says in one process.

Greedy tokens are compared with transformers' own, in float32. Sampled tokens, which nobody else draws the same way, are
compared between plans: the random number of token i depends on the seed and on i alone.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
from drills import PROMPTS, TOKENS, converged, needs, running, site

#: Three sites of one device, one of two, one of four: a plan takes as few sites as fit, so each has what it is for.
SITES = [site("a", count=4), site("b"), site("c"), site("d"), site("e", count=2)]
#: Constraints that force a plan, and the KV heads that each shard of each stage then has.
PLANS = {
    "one device": ({"sites": ["b"], "shards": [1]}, [[3]]),
    "tensor parallel, 2 + 1 KV heads": ({"sites": ["e"], "shards": [2]}, [[2, 1]]),
    "tensor parallel over 3": ({"sites": ["a"], "shards": [3]}, [[1, 1, 1]]),
    "tensor parallel over 4, one KV head on two of them": ({"sites": ["a"], "shards": [4]}, [[1, 1, 1, 1]]),
    "pipeline of 2": ({"sites": ["b", "c"], "shards": [1, 1]}, [[3], [3]]),
    "pipeline of 3": ({"sites": ["b", "c", "d"], "shards": [1, 1, 1]}, [[3], [3], [3]]),
    "tensor parallel stage, then a pipeline stage": ({"sites": ["b", "e"], "shards": [2, 1]}, [[2, 1], [3]]),
}
#: Three shards take turns on two cores; nobody waits longer than this for a token even there.
IDLE_TIMEOUT_S = 60.0
SAMPLED = {"max_tokens": 48, "temperature": 0.9, "top_p": 0.95, "top_k": 50, "seed": 20, "ignore_eos": True}


@pytest.fixture(scope="module", params=["tcp", "ucx"])
def transport(request):
    needs(request.param)
    return request.param


@pytest.fixture(scope="module")
def client(transport):
    with converged(SITES, transport=transport) as (_, client):
        yield client


@pytest.fixture(scope="session")
def sampled():
    """The sampled tokens of the first plan that ran, which all others are held to."""
    return []


@pytest.mark.parametrize("plan", PLANS)
def test_the_tokens_are_those_of_the_whole_model(client, transport, plan, model, expected, sampled):
    if plan == "one device" and transport != "tcp":
        pytest.skip("one device sends nothing, so it is run once")
    constraints, shape = PLANS[plan]
    with running(client, model, constraints) as job:
        made = job.plan
        assert list(made.sites) == constraints["sites"]
        widths = [[shard.kv_heads[1] - shard.kv_heads[0] for shard in stage.shards] for stage in made.stages]
        assert [sorted(width, reverse=True) for width in widths] == shape

        def generate(prompt):
            return job.generate(prompt, max_tokens=TOKENS, ignore_eos=True, idle_timeout_s=IDLE_TIMEOUT_S)

        # All at once: requests that share the ring must not touch each other, and a pipeline is busy on every stage.
        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            results = list(pool.map(generate, PROMPTS))
        assert [result.token_ids for result in results] == expected
        assert {result.finish_reason for result in results} == {"length"}
        tokens = job.generate(PROMPTS[0], **SAMPLED).token_ids
        assert len(tokens) == SAMPLED["max_tokens"]
        if not sampled:
            sampled.append(tokens)
        assert tokens == sampled[0]
