"""Each verb against the fake peer: what it prints, where, and how it exits."""

import json

import pytest
from fake_peer import PLAN, SNAPSHOT

from mesh.cli import main


@pytest.fixture
def run(peer, capsys):
    def command(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        out, err = capsys.readouterr()
        return code, out, err

    return command


def test_status_names_site_and_members(run, peer):
    code, out, err = run("status")
    assert (code, err) == (0, "")
    assert f"berlin at {peer.address}" in out and "alive" in out and "no jobs" in out
    assert json.loads(run("status", "--json")[1])["site"] == "berlin"


def test_topology_shows_the_matrix(run):
    code, out, _ = run("topology")
    tail = out.partition("? unknown)")[2]
    matrix = {line.split()[0]: line.split()[1:] for line in tail.splitlines() if line.strip()}
    assert code == 0 and "~ estimated" in out
    assert matrix["berlin"] == ["-", "~181.0", "25.1"] and matrix["lima"] == ["x", "-", "?"]
    assert json.loads(run("topology", "--json")[1]) == SNAPSHOT.to_dict() | {
        "sites": json.loads(json.dumps(SNAPSHOT.to_dict()))["sites"],
        "links": json.loads(json.dumps(SNAPSHOT.to_dict()))["links"],
    }


def test_plan_shows_stages_ring_predictions_and_reasons(run, peer):
    code, out, _ = run("plan", "org/model", "-c", "max_sites=2", "-c", "sites=oslo,berlin")
    assert code == 0
    for words in ("pipeline: berlin -> oslo -> berlin", "0..2", "80.0 tokens/s", "12.5 ms", "for [its] link is short"):
        assert words in out
    assert json.loads(peer.submitted[0].constraints_json) == {"max_sites": 2, "sites": ["berlin", "oslo"]}
    assert json.loads(run("plan", "org/model", "--json")[1]) == json.loads(json.dumps(PLAN.to_dict()))


def test_submit_prints_the_id_alone_on_stdout(run):
    code, out, err = run("submit", "org/model")
    assert (code, out) == (0, "job-1\n") and "pipeline over berlin -> oslo" in err
    code, out, err = run("submit", "org/model", "--no-wait", "--json")
    assert code == 0 and json.loads(out)["state"] == "planning" and err == ""
    assert json.loads(run("submit", "org/model", "--json")[1])["state"] == "ready"


def test_generate_streams_text_to_stdout(run, peer):
    run("submit", "org/model")
    code, out, err = run("generate", "job-1", "The", "--max-tokens", "3", "--stop", "x", "--stop", "y")
    assert (code, out, err) == (0, "The sea is\n", "")
    assert list(peer.generated[0].stop) == ["x", "y"]
    document = json.loads(run("generate", "job-1", "The", "--json", "--temperature", "1", "--seed", "5")[1])
    assert document["job"] == "job-1" and document["text"] == "The sea is wide and old." and document["seed"] == 5
    assert document["token_ids"] == [0, 1, 2, 3, 4, 5, 6] and document["timings"] == {"decode_tokens_per_s": 50.0}


def test_generate_reads_stdin_and_speaks_chat(run, peer, monkeypatch):
    import io

    run("submit", "org/model", "--no-wait")
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe"))
    assert run("generate", "job-1", "-", "--chat")[0] == 0
    assert peer.generated[0].chat.messages[0].content == "from a pipe"


def test_generate_with_a_model_cleans_up_after_itself(run, peer):
    assert run("generate", "--model", "org/model", "The")[1] == "The sea is wide and old.\n"
    assert peer.jobs["job-1"].state == "cancelled"
    assert "job-2 lives on" in run("generate", "--model", "org/model", "--keep", "The")[2]
    assert peer.jobs["job-2"].state == "ready"
    assert run("generate", "--model", "cut/after3", "The")[0] == 8
    assert peer.jobs["job-3"].state == "cancelled"


def test_jobs_and_cancel(run):
    assert run("jobs")[1] == "no jobs\n"
    run("submit", "org/model")
    assert "berlin, oslo" in run("jobs")[1] and json.loads(run("jobs", "--json")[1])[0]["id"] == "job-1"
    assert run("cancel", "job-1") == (0, "", "job job-1 is cancelled\n")
    assert json.loads(run("cancel", "job-1", "--json")[1])["state"] == "cancelled"


def test_peer_option_wins_over_the_environment(run):
    code, _, err = run("status", "--peer", "127.0.0.1:1")
    assert code == 4 and err.startswith("error: nobody answers at 127.0.0.1:1: start a peer there with `mesh up`")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["status", "--peer", "nowhere"], 2, "peer: 'nowhere' is not HOST:PORT"),
        (["frobnicate"], 2, "No such command 'frobnicate'"),
        (["plan"], 2, "Missing argument 'MODEL' (see `mesh plan --help`)"),
        (["status", "--jsn"], 2, "--json"),
        (["submit", "m", "--timeout", "soon"], 2, "--timeout"),
        (["plan", "m", "--strategy", "pipelin"], 3, "did you mean 'pipeline'"),
        (["plan", "m", "-c", "max_site=2"], 3, "did you mean 'max_sites'"),
        (["plan", "m", "-c", "max_sites"], 3, "is not KEY=VALUE"),
        (["plan", "m", "-c", "max_sites=1", "-c", "max_sites=2"], 3, "given twice"),
        (["generate", "job-1"], 3, "JOB and PROMPT"),
        (["generate", "--model", "m", "two", "words"], 3, "either JOB or --model"),
        (["generate", "--model", "m", ""], 3, "the prompt is empty"),
        (["generate", "job-1", "x", "--temperature", "-1"], 3, "temperature"),
        (["submit", "no/model"], 5, "no model 'no/model'"),
        (["plan", "too/big"], 6, "8 GB missing"),
        (["cancel", "job-9"], 7, "no job 'job-9' here"),
        (["submit", "slow/load", "--timeout", "0.2"], 13, "still loading"),
        (["submit", "bad/worker"], 14, "cpu:0 ran out of memory"),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_code(run, arguments, code, says):
    got, out, err = run(*arguments)
    assert (got, out) == (code, "") and err.startswith("error: ") and says in err and err.count("\n") == 1
    got, out, err = run(*arguments, "--json")
    assert (got, out) == (code, "") and says in json.loads(err)["message"] and json.loads(err)["error"]


def test_debug_shows_the_trace(run):
    code, _, err = run("cancel", "job-9", "--debug")
    assert code == 7 and "Traceback" in err and err.splitlines()[-1].startswith("error: no job")


def test_a_fault_of_ours_is_one_line_too(run, monkeypatch):
    monkeypatch.setattr("mesh.client.blocking.Mesh.status", lambda self: {}["missing"])
    code, out, err = run("status")
    assert (code, out) == (70, "") and err.count("\n") == 1 and "internal: KeyError" in err


def test_names_from_afar_do_not_drive_the_terminal(run, peer):
    peer.jobs["\x1b[31mred"] = peer._status("\x1b[31mred", "[bold]m", "failed", "job-failed", "it\x07 broke")
    out = run("jobs")[1]
    assert "\x1b" not in out and "\x07" not in out and "[bold]m" in out
