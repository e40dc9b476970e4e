"""Constraints: what is refused, and that every refusal names the key and the way out."""

import pytest

from topology import ConstraintError, Constraints


def test_parse_keeps_every_known_key() -> None:
    asked = {
        "min_latency": "low",
        "max_token_latency_ms": 80,
        "sites": ["b", "a"],
        "exclude_sites": "c",
        "regions": ["eu"],
        "max_sites": 2,
        "dtype": "float16",
        "context": 512,
        "stages": 2,
        "shards": [2, 1],
    }
    constraints = Constraints.parse(asked)
    assert constraints.sites == ("a", "b")
    assert constraints.exclude_sites == ("c",)
    assert constraints.max_token_latency_ms == 80.0
    assert constraints.shards == (2, 1)
    assert Constraints.parse(constraints.to_dict()) == constraints


def test_nothing_asked_is_the_default_and_an_empty_document() -> None:
    assert Constraints.parse({}) == Constraints.parse(None) == Constraints.parse({"sites": None}) == Constraints()
    assert Constraints().to_dict() == {}


def test_a_list_of_shards_implies_the_stages() -> None:
    assert Constraints.parse({"shards": [2, 1]}).stages == 2


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"min_latancy": "low"}, "unknown constraint 'min_latancy': did you mean 'min_latency'?"),
        ({"excluded_sites": []}, "did you mean 'exclude_sites'?"),
        ({"zzz": 1}, "unknown constraint 'zzz': known are"),
        ({7: 1}, "unknown constraint 7"),
        ({"min_latency": "lo"}, "min_latency must be one of low, medium, high, not 'lo': did you mean 'low'?"),
        ({"min_latency": 3}, "min_latency must be one of"),
        ({"dtype": "floot16"}, "did you mean 'float16'?"),
        ({"max_token_latency_ms": 0}, "max_token_latency_ms must be a number of milliseconds above 0, not 0"),
        ({"max_token_latency_ms": float("nan")}, "max_token_latency_ms"),
        ({"max_token_latency_ms": float("inf")}, "max_token_latency_ms"),
        ({"max_token_latency_ms": "80"}, "max_token_latency_ms"),
        ({"max_sites": 0}, "max_sites must be a whole number of at least 1, not 0"),
        ({"max_sites": True}, "max_sites"),
        ({"max_sites": 1.5}, "max_sites"),
        ({"context": -1}, "context"),
        ({"sites": [1]}, "sites must be a name or a list of names"),
        ({"sites": {"a": 1}}, "sites must be"),
        ({"regions": [""]}, "regions must be"),
        ({"shards": []}, "shards must be"),
        ({"shards": [0]}, "shards must be a whole number"),
        ({"shards": [1, 2], "stages": 3}, "shards lists 2 stages but stages is 3"),
        ({"sites": ["a"], "exclude_sites": ["a"]}, "site 'a' stands in sites and in exclude_sites"),
        ([("sites", "a")], "constraints must be a mapping"),
    ],
)
def test_a_wrong_constraint_is_refused_on_one_line_that_names_it(asked: object, message: str) -> None:
    with pytest.raises(ConstraintError) as refusal:
        Constraints.parse(asked)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_value_built_in_code_is_held_to_the_same_rules() -> None:
    with pytest.raises(ConstraintError, match="max_sites"):
        Constraints(max_sites=-2)
