"""The real model, and what it says in one process, for all end-to-end tests of a session."""

from pathlib import Path

import pytest
from drills import MODEL, PROMPTS, TOKENS
from small import write_model

from simulations.reference import reference_tokens


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session")
def model():
    """The folder of the small real model."""
    assert MODEL.is_dir(), f"{MODEL} is missing: run `make setup`"
    return MODEL


@pytest.fixture(scope="session")
def expected(model):
    """What transformers says to each prompt, greedy, in float32."""
    requests = [{"prompt": prompt, "max_tokens": TOKENS, "ignore_eos": True} for prompt in PROMPTS]
    tokens = reference_tokens(str(model), requests)
    assert [len(answer) for answer in tokens] == [TOKENS] * len(PROMPTS)
    return tokens


@pytest.fixture(scope="session")
def tiny(model, tmp_path_factory):
    """The folder of a model with random weights that loads at once."""
    return write_model(tmp_path_factory.mktemp("models") / "tiny", model)
