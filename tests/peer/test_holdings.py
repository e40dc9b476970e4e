"""What sites tell of their models is read with bounds, and shown as it was told."""

import pytest

from mesh.peer.holdings import described, of_folder, of_store, read_cache, read_held

ROW = {
    "root": b"r" * 32, "name": "m", "path": "/m", "cached": True, "bytes": 3, "total_bytes": 9,
    "layers": [[0, 2], [4, 5]], "in_use": False,
}  # fmt: skip


def test_a_row_of_the_store_is_shown_as_what_it_holds():
    told = described("a", {"models": [of_store(ROW)], "cache": {"used": 3, "limit": 10}})
    assert told == {
        "site": "a",
        "models": [
            {
                "name": "m", "root": (b"r" * 32).hex(), "whole": False, "layers": [[0, 2], [4, 5]],
                "bytes": 3, "total_bytes": 9, "cached": True,
            }
        ],
        "cache": {"used_bytes": 3, "limit_bytes": 10},
    }  # fmt: skip


def test_a_folder_that_nobody_hashed_is_whole_and_has_no_root():
    (model,) = described("a", {"models": [of_folder("m", 7)], "cache": {}})["models"]
    assert (model["whole"], model["layers"], model["root"], model["bytes"]) == (True, [], "", 7)


@pytest.mark.parametrize(
    "wrong",
    [{"bytes": -1}, {"bytes": 1 << 70}, {"total": "x"}, {"root": b"short"}, {"layers": [[3, 1]]}, {"name": "n" * 201}],
)
def test_a_row_that_cannot_be_is_left_out(wrong):
    assert read_held({"models": [{**of_store(ROW), **wrong}, of_store(ROW)]}) == read_held({"models": [of_store(ROW)]})


@pytest.mark.parametrize("entry", [None, [], {}, {"cache": 3}, {"cache": {"used": -1, "limit": 2}}, {"models": 4}])
def test_an_entry_that_is_none_tells_nothing(entry):
    assert read_cache(entry) == {}
    assert read_held(entry) == []
