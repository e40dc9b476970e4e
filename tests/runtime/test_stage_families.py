"""Every family, whole and cut, gives transformers' logits and transformers' greedy tokens."""

import pytest
import torch
from small_models import COLUMNS, FAMILIES, LAYERS, VOCAB, Ring, build, head_shards, shards, whole

from mesh.errors import ModelError
from mesh.runtime.fused_model import FusedModel
from mesh.runtime.stage import StageModel

PROMPT = [5, 17, 33, 60, 8, 91, 44, 23, 71, 12, 50]
ONE_KV_HEAD = "llama, one KV head"
PATHS = [(name, general) for name, family in FAMILIES.items() for general in ((False, True) if family[2] else (False,))]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Per family, once: the folder, the logits after the prompt, and 20 greedy tokens."""
    kept = {}

    def get(name):
        if name not in kept:
            folder = tmp_path_factory.mktemp("model")
            model = build("llama with biases", num_key_value_heads=1) if name == ONE_KV_HEAD else build(name)
            model.save_pretrained(folder)
            ids = torch.tensor([PROMPT])
            with torch.no_grad():
                logits = model(ids).logits[0, -1]
            made = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
            kept[name] = (folder, logits, made[0, len(PROMPT) :].tolist())
        return kept[name]

    return get


@pytest.fixture(scope="module")
def one_kv_head(reference):
    """A llama whose six query heads share one KV head."""
    return reference(ONE_KV_HEAD)


@pytest.mark.parametrize(("name", "general"), PATHS)
def test_one_device_equals_transformers(reference, name, general):
    folder, logits, tokens = reference(name)
    ring = Ring([[whole(folder)]], general=general)
    assert isinstance(ring.stages[0][0]._engine, FusedModel) == (FAMILIES[name][2] and not general)
    torch.testing.assert_close(ring.step(0, PROMPT), logits, atol=1e-4, rtol=1e-4)
    assert ring.greedy(PROMPT, 20) == tokens


@pytest.mark.parametrize(("name", "general"), PATHS)
def test_a_prompt_in_chunks_equals_the_prompt_at_once(reference, name, general):
    folder, logits, _ = reference(name)
    stage = StageModel.load(whole(folder), general=general)
    assert stage.forward("r", 0, tokens=PROMPT[:4], logits=False).numel() == 0
    stage.forward("r", 4, tokens=PROMPT[4:9], logits=False)
    torch.testing.assert_close(stage.forward("r", 9, tokens=PROMPT[9:]), logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "general"), PATHS)
def test_unequal_shards_and_stages_equal_transformers(reference, name, general):
    folder, logits, tokens = reference(name)
    first = whole(folder, stage=0, stages=2, end=2)
    last = whole(folder, stage=1, stages=2, start=2, end=LAYERS)
    ring = Ring(
        [
            shards(first, cuts=[0, 2, 3], columns=[0, 50, COLUMNS], vocabulary=[0, 0, 0]),
            shards(last, cuts=[0, 1, 2, 3], columns=[0, 10, 10, COLUMNS], vocabulary=[0, 40, 40, VOCAB]),
        ],
        general=general,
    )
    torch.testing.assert_close(ring.step(0, PROMPT), logits, atol=1e-4, rtol=1e-4)
    assert ring.greedy(PROMPT, 20) == tokens


@pytest.mark.parametrize(("name", "general"), PATHS)
def test_shards_that_cut_groups_of_query_heads_equal_transformers(reference, name, general):
    """Six query heads, two a KV head. First 1 + 2 + 3, where the middle one has half of two groups; then 5 + 1."""
    folder, logits, tokens = reference(name)
    first = whole(folder, stage=0, stages=2, end=2)
    last = whole(folder, stage=1, stages=2, start=2, end=LAYERS)
    four, two = {"columns": [0, 50, 60, COLUMNS], "vocabulary": [0] * 4}, {"columns": [0, 30, COLUMNS]}
    ring = Ring(
        [
            head_shards(first, heads=[0, 1, 3, 6], group=2, **four),
            head_shards(last, heads=[0, 5, 6], group=2, **two, vocabulary=[0, 40, VOCAB]),
        ],
        general=general,
    )
    torch.testing.assert_close(ring.step(0, PROMPT), logits, atol=1e-4, rtol=1e-4)
    assert ring.greedy(PROMPT, 20) == tokens


@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_kv_head_over_three_shards_equals_the_whole_model(one_kv_head, general, dtype):
    folder, logits, tokens = one_kv_head
    cut = {"heads": [0, 3, 4, 6], "group": 6, "columns": [0, 50, 60, COLUMNS], "vocabulary": [0, 40, 70, VOCAB]}
    ring = Ring([head_shards(whole(folder, kv_heads=(0, 1), dtype=dtype), **cut)], general=general)
    assert all(stage._cache._shape[1] == 1 for stage in ring.stages[0])  # the one KV head lies on all of them
    if dtype == "float32":
        torch.testing.assert_close(ring.step(0, PROMPT), logits, atol=1e-4, rtol=1e-4)
        assert ring.greedy(PROMPT, 20) == tokens
    else:
        one = Ring([[whole(folder, kv_heads=(0, 1), dtype=dtype)]], general=general)
        near = torch.nn.functional.cosine_similarity(ring.step(0, PROMPT), one.step(0, PROMPT), dim=0)
        assert near > 0.99


def test_a_chunk_of_a_prompt_sees_what_is_cached_where_groups_are_cut(one_kv_head):
    folder, logits, _ = one_kv_head
    cut = {"heads": [0, 4, 6], "group": 6, "columns": [0, 50, COLUMNS], "vocabulary": [0, 40, VOCAB]}
    ring = Ring([head_shards(whole(folder, kv_heads=(0, 1)), **cut)])
    ring.step(0, PROMPT[:4])
    torch.testing.assert_close(ring.step(4, PROMPT[4:]), logits, atol=1e-4, rtol=1e-4)


def test_query_heads_that_do_not_use_the_kv_heads_are_refused(one_kv_head):
    with pytest.raises(ModelError, match="plan again"):
        StageModel.load(whole(one_kv_head[0], kv_heads=(0, 1), heads=(0, 7)))


def test_a_shard_without_kv_heads_still_adds_its_columns(reference):
    folder, _, tokens = reference("qwen2")
    ring = Ring([shards(whole(folder), cuts=[0, 3, 3], columns=[0, 30, COLUMNS], vocabulary=[0, 97, 97])])
    assert ring.greedy(PROMPT, 20) == tokens


def test_the_fused_plan_is_the_plan_transformers_publishes():
    import transformers

    from mesh.runtime.shape import FAMILIES as FUSED
    from mesh.runtime.shape import TP_PLAN

    for family in FUSED:
        plan = transformers.CONFIG_MAPPING[family]().base_model_tp_plan
        cut = {key: value for key, value in plan.items() if value in ("colwise", "rowwise")}
        assert cut == TP_PLAN
