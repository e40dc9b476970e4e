"""The transport's benchmark: rows are medians of interleaved rounds, and the command prints them as one JSON list."""

from __future__ import annotations

import json
import sys

from benchmarks.transport import __main__ as command
from benchmarks.transport.rows import Contender, LeftOut, Options, Row, Sample, interleaved


def test_contenders_take_turns_and_rows_are_medians_with_ratios():
    order = []

    def measured(name, figures):
        left = iter(figures)

        def measure():
            order.append(name)
            return Sample(gb_per_s=next(left))

        return measure

    raw = Contender("raw", measured("raw", [1.0, 9.0, 2.0]))
    ours = Contender("ours", measured("ours", [1.0, 1.5, 100.0]), raw="raw")
    assert list(interleaved([raw, ours], 8, "loopback", 3)) == [
        Row("raw", 8, "loopback", 2.0, None, None),
        Row("ours", 8, "loopback", 1.5, None, 0.75),
    ]
    assert order == ["raw", "ours"] * 3


def test_times_are_compared_where_there_are_no_bandwidths():
    contenders = [Contender("raw", lambda: Sample(None, 10.0)), Contender("ours", lambda: Sample(None, 15.0), "raw")]
    assert [row.ratio_to_raw for row in interleaved(contenders, 8, "loopback", 1)] == [None, 1.5]


def test_the_times_of_small_messages_are_compared_though_their_rate_is_told():
    contenders = [Contender("raw", lambda: Sample(1.0, 10.0)), Contender("ours", lambda: Sample(0.1, 15.0), "raw")]
    rows = list(interleaved(contenders, 8, "loopback", 1, by_time=True))
    assert [(row.gb_per_s, row.ratio_to_raw) for row in rows] == [(1.0, None), (0.1, 1.5)]


class _Part:
    def __init__(self, what, rows):
        self.WHAT, self._rows = (what,), rows

    def rows(self, options):
        yield from self._rows
        raise LeftOut("the rest needs a wire")


def test_the_command_prints_one_list_of_rows_and_says_what_it_left_out(monkeypatch, capsys):
    monkeypatch.setattr(command, "PARTS", ("one", "two"))
    monkeypatch.setitem(
        sys.modules, "benchmarks.transport.one", _Part("one a", [Row("one a", 8, "l", 1.23456, None, None)])
    )
    monkeypatch.setitem(sys.modules, "benchmarks.transport.two", _Part("two b", [Row("two b", 8, "l", 1.0, 2.0, 3.0)]))
    assert command.main(["--json", "--only", "one"]) == 0
    out, err = capsys.readouterr()
    keys = ["what", "size", "link", "gb_per_s", "us_per_message", "ratio_to_raw"]
    assert json.loads(out) == [dict(zip(keys, ["one a", 8, "l", 1.235, 0.00648, 1.0], strict=True))]
    assert err == "left out: one: the rest needs a wire\n"


def test_a_row_has_its_rate_and_its_time():
    assert Row("token", 64, "l", None, 50.0, 1.1).whole() == Row("token", 64, "l", 0.00128, 50.0, 1.1)
    assert Row("plain", 1 << 20, "l", 1.0, None, None).whole() == Row("plain", 1 << 20, "l", 1.0, 1048.576, 1.0)


def test_rows_are_wanted_by_a_word_of_their_name():
    assert Options().wants("anything")
    assert Options(only=("tcp", "ucx")).wants("raw tcp")
    assert not Options(only=("ucx",)).wants("raw tcp")
