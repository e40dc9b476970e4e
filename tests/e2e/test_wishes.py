"""What a user may wish for beyond a shape, on real peers: privacy, standbys, replicas, codes, concurrency, priority."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from drills import PROMPTS, TOKENS, converged, running, site

import mesh

#: No single site holds the float32 model, so that every plan crosses a link.
SITES = [site(name, memory="560MiB") for name in ("a", "b", "c", "d")]
SMALL = {"context": 256}
IDLE_TIMEOUT_S = 60.0


@pytest.fixture(scope="module", name="peers")
def _peers():
    with converged(SITES, transport="tcp", rtts_ms={frozenset(("a", "b")): 8.0}) as (fleet, client):
        yield fleet, client


def generate(job, prompt, tokens=TOKENS):
    return job.generate(prompt, max_tokens=tokens, ignore_eos=True, idle_timeout_s=IDLE_TIMEOUT_S)


def test_a_private_job_keeps_token_ids_at_the_submitting_site(peers, model, expected):
    _, client = peers
    with running(client, model, {**SMALL, "private": True}) as job:
        stages = job.plan.stages
        assert {shard.site for stage in (stages[0], stages[-1]) for shard in stage.shards} == {"a"}
        assert len(job.plan.sites) > 1
        assert list(generate(job, PROMPTS[0]).token_ids) == expected[0]


def test_several_requests_of_the_whole_context_run_at_once(peers, model, expected):
    _, client = peers
    with running(client, model, {"context": 96, "concurrency": 3}) as job:
        assert job.plan.concurrency == 3
        with ThreadPoolExecutor(3) as pool:
            made = list(pool.map(lambda prompt: list(generate(job, prompt).token_ids), PROMPTS[:3]))
        assert made == expected[:3]


def test_a_standby_takes_over_and_no_token_is_lost(model, expected):
    owner = site("a", memory="64MiB")  # too small to be in the plan, so that whoever is lost is another
    with (
        converged([owner, *SITES[1:]], transport="tcp") as (fleet, client),
        running(client, model, {**SMALL, "standbys": 1}) as job,
    ):
        standby = job.plan.standbys[0]
        lost = job.plan.stages[standby.stage].lead.site
        time.sleep(8)  # the standby loads beside the work
        made = []
        for chunk in job.stream(PROMPTS[0], max_tokens=TOKENS, ignore_eos=True, idle_timeout_s=IDLE_TIMEOUT_S):
            made += chunk.token_ids
            if len(made) == 10:
                fleet.kill(lost)
        assert made == expected[0]
        assert standby.site in job.plan.sites


def test_replicas_answer_with_the_same_tokens(peers, model, expected):
    _, client = peers
    with running(client, model, {**SMALL, "objective": "throughput", "replicas": 2, "max_sites": 2}) as job:
        assert len(job.plan.replicas) == 1
        for _ in range(2):  # the second ring may still load while the first answers
            with ThreadPoolExecutor(4) as pool:
                made = list(pool.map(lambda prompt: list(generate(job, prompt, 24).token_ids), PROMPTS[:4]))
            assert made == [tokens[:24] for tokens in expected[:4]]


def test_a_job_of_higher_priority_displaces_a_lower_one(peers, model):
    _, client = peers
    hungry = {"context": 2048, "concurrency": 8, "stages": 4}
    with (
        running(client, model, {**hungry, "priority": 0}) as low,
        running(client, model, {**hungry, "priority": 5}) as high,
    ):
        assert low.id in high.plan.displaces
        with pytest.raises(mesh.JobFailed, match="displaced by job"):
            generate(low, PROMPTS[0], 4)
        assert generate(high, PROMPTS[0], 4).token_ids
