"""Every family, whole and cut, gives transformers' logits and transformers' greedy tokens."""

import pytest
import torch
from small_models import COLUMNS, FAMILIES, LAYERS, VOCAB, Ring, build, shards, whole

from mesh.runtime.fused_model import FusedModel
from mesh.runtime.stage import StageModel

PROMPT = [5, 17, 33, 60, 8, 91, 44, 23, 71, 12, 50]
PATHS = [(name, general) for name, family in FAMILIES.items() for general in ((False, True) if family[2] else (False,))]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Per family, once: the folder, the logits after the prompt, and 20 greedy tokens."""
    kept = {}

    def get(name):
        if name not in kept:
            folder = tmp_path_factory.mktemp("model")
            model = build(name)
            model.save_pretrained(folder)
            ids = torch.tensor([PROMPT])
            with torch.no_grad():
                logits = model(ids).logits[0, -1]
            made = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
            kept[name] = (folder, logits, made[0, len(PROMPT) :].tolist())
        return kept[name]

    return get


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
