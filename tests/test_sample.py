"""The command: dialogues in, trees out, whatever happens in between."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import re
import signal
import socket
import struct
import termios
import time
import typing
from dataclasses import fields

import pytest
from hesitant import TOOLS, asking
from kill_sample import finish, kill_and_resume, start, wait_for

from ttpa.construct import construct_dialogues
from ttpa.data.dialogues import Dialogue, write_dialogues
from ttpa.errors import InputError
from ttpa.sample import SampleConfig, main
from ttpa.sampling import SamplingOptions
from ttpa.sampling.report import SamplingReport
from ttpa.trees.io import read_trees

OPTIONS = ["--num_dialogues", 5, "--block_size", 2, "--max_new_tokens", 60]
NUM_BLOCKS = 5


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run from its start to its end: its output, what it printed, and how many seconds it sampled."""
    output = tmp_path_factory.mktemp("unbroken") / "trees.jsonl"
    process = start(output, *OPTIONS, log=output.with_name("log"))
    wait_for(parts_of(output), process)
    began = time.perf_counter()
    assert finish(process) == [0], output.with_name("log").read_text()
    return output, output.with_name("log").read_text(), time.perf_counter() - began


def parts_of(output):
    return output.with_name(output.name + ".parts")


def blocks_in(log):
    """The blocks that a run says it has finished."""
    return [line.split()[1] for line in log.read_text().splitlines() if line.startswith("block")]


def start_world(output, world, log):
    """The processes of a run as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [start(output, *OPTIONS, log=f"{log}{rank}", RANK=str(rank), **place) for rank in range(world)]


def in_this_process(output, *options):
    main(["--output", str(output), *map(str, options)])


def test_a_whole_run(unbroken):
    output, printed, _ = unbroken
    trees = read_trees(output)
    known = [dialogue.id for dialogue in construct_dialogues(5, split="preference")]
    assert trees and all(tree.pairs for tree in trees)
    places = [(known.index(tree.dialogue), tree.turn) for tree in trees]
    assert places == sorted(places), "trees stand in the order of the decisions"
    record = json.loads(output.with_suffix(".report.json").read_text())
    assert (record["trees"], record["pairs"]) == (len(trees), sum(len(tree.pairs) for tree in trees))
    assert record["fingerprint"]["max_new_tokens"] == 60 and record["fingerprint"]["seed"] == 0
    lines = printed.splitlines()
    assert blocks_in(output.with_name("log")) == [str(block) for block in range(1, NUM_BLOCKS + 1)]
    record.pop("fingerprint")
    assert SamplingReport.from_dict(record).table() in printed
    assert lines[-1] == f"The trees are in {output}, the numbers in {output.with_suffix('.report.json')}"
    assert sorted(path.name for path in output.parent.iterdir()) == ["log", "trees.jsonl", "trees.report.json"]


def test_a_run_that_is_killed_at_random_moments_ends_with_the_same_bytes(unbroken, tmp_path):
    output, _, seconds = unbroken
    moments = {"kills": 3, "seconds": 0.7 * seconds, "rng": random.Random(0)}
    outputs = list(kill_and_resume(tmp_path / "trees.jsonl", *OPTIONS, **moments))
    assert outputs and all(found == output.read_bytes() for found in outputs)


def test_two_processes_make_the_same_bytes_and_share_the_blocks(unbroken, tmp_path):
    output, _, _ = unbroken
    assert finish(*start_world(tmp_path / "trees.jsonl", 2, tmp_path / "log")) == [0, 0]
    assert (tmp_path / "trees.jsonl").read_bytes() == output.read_bytes()
    assert [blocks_in(tmp_path / f"log{rank}") for rank in range(2)] == [["1", "3", "5"], ["2", "4"]]
    assert "usable pairs" in (tmp_path / "log0").read_text() and "usable pairs" not in (tmp_path / "log1").read_text()


def test_a_process_that_dies_ends_the_others_and_one_alone_goes_on(unbroken, tmp_path):
    whole, output = unbroken[0].read_bytes(), tmp_path / "trees.jsonl"
    first, second = start_world(output, 2, tmp_path / "log")
    wait_for(parts_of(output) / "block-00001.jsonl", second)
    os.kill(second.pid, signal.SIGKILL)
    assert finish(first, second) == [1, -9]
    printed = (tmp_path / "log0").read_text()
    assert "error: another process of this run has ended: the same command goes on" in printed, printed
    assert not output.exists() and (parts_of(output) / "block-00004.json").exists()
    assert finish(start(output, *OPTIONS, log=tmp_path / "log")) == [0]
    assert output.read_bytes() == whole
    resumed, sampled = re.search(r"resumed   (\d) blocks", (tmp_path / "log").read_text()), blocks_in(tmp_path / "log")
    assert resumed and int(resumed[1]) in (3, 4), "those of the one that lived, and perhaps one of the other"
    assert len(sampled) == NUM_BLOCKS - int(resumed[1]) and set(sampled) <= {"2", "4"}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_told_to_stop_says_how_it_goes_on(unbroken, tmp_path, number, code):
    output = tmp_path / "trees.jsonl"
    process = start(output, *OPTIONS, log=tmp_path / "log")
    assert wait_for(parts_of(output), process)
    os.kill(process.pid, number)
    assert finish(process, seconds=5) == [code]
    assert (tmp_path / "log").read_text().endswith("stopped: the same command goes on where this run was\n")
    assert not output.exists() and parts_of(output).exists()


def test_a_run_goes_on_with_as_many_threads_as_it_began_with(tmp_path):
    """Their number decides the last bits of a product, and torchrun lowers it."""
    output = tmp_path / "trees.jsonl"
    process = start(output, *OPTIONS)
    wait_for(parts_of(output) / "run.json", process)
    process.kill()
    process.join()
    record = parts_of(output) / "run.json"
    assert json.loads(record.read_text())["held"] == {"threads": 1, "cache_gb": None}
    record.write_text(record.read_text().replace('"threads": 1', '"threads": 2'))
    process = start(output, *OPTIONS, log=tmp_path / "log")
    wait_for(parts_of(output) / "block-00000.jsonl", process)
    process.kill()
    process.join()
    assert "parameters on cpu, 2 threads" in (tmp_path / "log").read_text()


def test_a_full_disk(tmp_path):
    output = tmp_path / "trees.jsonl"
    assert finish(start(output, *OPTIONS, log=tmp_path / "log", largest_file=12_000)) == [2]
    printed = (tmp_path / "log").read_text()
    assert "cannot be written: File too large; blocks that are done are kept: the same command goes on" in printed
    assert "Traceback" not in printed


def test_a_complete_output_is_left_alone_and_another_one_is_refused(unbroken, capsys):
    output, _, _ = unbroken
    before = output.stat().st_mtime_ns
    in_this_process(output, *OPTIONS)
    assert capsys.readouterr().out == f"{output} is already complete; --overwrite makes it again\n"
    with pytest.raises(InputError, match="was made with other settings: num_forks was 8 and is 3; choose another"):
        in_this_process(output, *OPTIONS, "--num_forks", 3)
    with pytest.raises(InputError, match=r"was made with other settings: data hash was \w+ and is \w+; choose another"):
        in_this_process(output, *OPTIONS, "--num_dialogues", 4)
    assert output.stat().st_mtime_ns == before and not parts_of(output).exists()


def test_options_are_those_of_the_sampler_with_their_defaults():
    ours = {field.name: field.default for field in fields(SampleConfig)}
    types = typing.get_type_hints(SampleConfig)
    for field in fields(SamplingOptions):
        assert ours[field.name] == field.default, field.name
        assert types[field.name] == typing.get_type_hints(SamplingOptions)[field.name], field.name
    assert SampleConfig().sampling() == SamplingOptions()
    assert SampleConfig(num_forks=3, temperature=0.5).sampling() == SamplingOptions(num_forks=3, temperature=0.5)


def test_help_fits_two_screens(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0 and len(lines) <= 100 and max(map(len, lines)) <= 120


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--num_fork", "3"], "unknown option --num_fork: did you mean --num_forks"),
        (["--num_dialogues", "0"], "--num_dialogues must be at least 1"),
        (["--block_size", "0"], "--block_size must be at least 1"),
        (["--max_length", "1"], "--max_length must be at least 2"),
        (["--max_leaves", "1"], "max_leaves must be a number of at least 2"),
        (["--model", "some/model"], "--data is required with --model"),
        (["--data", "trees.jsonl"], "--output would replace --data"),
        (["--data", "none.jsonl"], "none.jsonl: no such file"),
        (["--data", "empty.jsonl"], "empty.jsonl: the file is empty"),
        (["--data", "broken.jsonl"], "broken.jsonl:2: broken JSON"),
        (["--data", "plain.jsonl"], "plain.jsonl: no dialogue calls a tool"),
        (["--num_dialogues", "2", "--cache_gb", "1e-5"], "has a prompt of .* tokens.* cache_gb of at least"),
        (["--data", "good.jsonl", "--model", "nowhere"], "nowhere: there is no such folder"),
        (["--data", "good.jsonl", "--model", "toolless"], "dialogue 'a': the chat template of the tokenizer drops"),
        (["--output", "no/folder/trees.jsonl"], "no/folder: the folder of --output trees.jsonl does not exist"),
        (["--output", "folder"], "folder: --output is a folder"),
    ],
)
def test_what_the_user_has_to_change_is_said_before_any_work(options, problem, tmp_path, monkeypatch, tokenizer):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.jsonl").write_text("\n")
    write_dialogues("good.jsonl", [asking("a", "Rome")])
    (tmp_path / "broken.jsonl").write_text((tmp_path / "good.jsonl").read_text() + "{")
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi"}]
    write_dialogues("plain.jsonl", [Dialogue("plain", TOOLS, talk)])
    tokenizer.save_pretrained("toolless")
    template = "{% for m in messages %}{{ m.content or m.tool_calls }}<|im_end|>{% endfor %}"
    (tmp_path / "toolless" / "chat_template.jinja").write_text(template)
    with pytest.raises(InputError, match=problem):
        main(options)
    assert not list(tmp_path.glob("**/*trees*"))


def test_a_bar_in_a_terminal(tmp_path):
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 50, 120, 0, 0))  # lines and columns
    process = start(tmp_path / "trees.jsonl", *OPTIONS, log=os.ttyname(theirs))
    os.set_blocking(ours, False)
    shown, alive = b"", True
    while alive:
        alive = process.is_alive()
        with contextlib.suppress(BlockingIOError):
            while more := os.read(ours, 4096):
                shown += more
        time.sleep(0.01)
    os.close(ours)
    os.close(theirs)
    assert finish(process) == [0]
    assert b"sampling: 100%" in shown and b"pairs, " in shown and b" pages" in shown and b"block     1 of" not in shown


def test_dialogues_that_call_no_tool_are_left_out_and_listed(tmp_path, capsys):
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi"}]
    write_dialogues(tmp_path / "d.jsonl", [Dialogue("plain", TOOLS, talk), asking("a", "Rome")])
    output = tmp_path / "trees.jsonl"
    in_this_process(output, "--data", tmp_path / "d.jsonl", "--max_new_tokens", 20)
    report = json.loads(output.with_suffix(".data_report.json").read_text())
    assert (report["read"], report["kept"], report["kind"]) == (2, 1, "dialogues")
    assert [(drop["id"], drop["reason"]) for drop in report["dropped"]] == [("plain", "no tool is called")]
    assert "dropped: no tool is called" in capsys.readouterr().out
