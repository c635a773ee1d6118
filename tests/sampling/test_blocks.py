"""The files of a run that is cut off, resumed, refused and finished, without a model."""

from __future__ import annotations

import json
import resource
import shutil
from contextlib import contextmanager

import pytest
from random_trees import random_tree

from ttpa.errors import InputError
from ttpa.sampling.blocks import BlockedRun
from ttpa.sampling.report import SamplingReport
from ttpa.trees.io import read_trees

TREES = [random_tree(seed) for seed in range(7)]
BLOCKS = [TREES[:3], [], TREES[3:6], TREES[6:]]
SETTINGS = {"model": "m", "num_forks": 8, "top_p": None}


def run_in(folder, **changes):
    return BlockedRun(folder / "trees.jsonl", num_blocks=len(BLOCKS), fingerprint={**SETTINGS, **changes})


def report_of(trees):
    return SamplingReport(decisions=3, trees=len(trees), pairs=sum(len(tree.pairs) for tree in trees), seconds=0.5)


def write(run, *blocks):
    for block in blocks:
        run.write(block, BLOCKS[block], report_of(BLOCKS[block]))


def finished(folder, **changes):
    run = run_in(folder, **changes)
    run.begin(threads=1)
    write(run, 0, 1, 2, 3)
    return run.finish()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def cut_off(run, block):
    """What a kill in the middle of a block leaves: a whole line and a part of the next one."""
    path = run.parts / f"block-{block:05}.jsonl"
    run.write(block, BLOCKS[block], SamplingReport())
    path.with_suffix(".json").unlink()
    path.write_bytes(path.read_bytes()[:-40])
    assert not path.read_bytes().endswith(b"\n")


@contextmanager
def largest_file(size):
    """No file can grow beyond so many bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_blocks_stand_in_their_order_whoever_wrote_them_and_when(tmp_path):
    run = run_in(tmp_path)
    assert run.state() == "new"
    run.begin(threads=3)
    assert run.state() == "begun" and run_in(tmp_path).join() == {"threads": 3}
    for block in (3, 0, 2, 1):
        assert run.finished(block) is None
        write(run_in(tmp_path), block)
        assert run.finished(block) == report_of(BLOCKS[block])
    report = run.finish()
    assert (report.decisions, report.trees, report.seconds) == (12, 7, 2.0)
    assert read_trees(tmp_path / "trees.jsonl") == TREES
    record = json.loads((tmp_path / "trees.report.json").read_text())
    assert record["fingerprint"] == SETTINGS and SamplingReport.from_dict(without(record)) == report
    assert names(tmp_path) == ["trees.jsonl", "trees.report.json"] and run_in(tmp_path).state() == "complete"


def without(record):
    return {name: value for name, value in record.items() if name != "fingerprint"}


def test_trees_are_on_the_disk_as_they_come(tmp_path):
    run = run_in(tmp_path)
    run.begin(threads=1)
    seen = []

    def coming():
        for tree in TREES:
            seen.append(len(read_trees(run.parts / "block-00000.jsonl")))
            yield tree

    run.write(0, coming(), SamplingReport())
    assert seen == list(range(7))


def test_a_block_that_was_cut_off_is_written_again_from_its_start(tmp_path):
    finished(tmp_path)
    unbroken = (tmp_path / "trees.jsonl").read_bytes()
    (tmp_path / "trees.jsonl").unlink()
    run = run_in(tmp_path)
    run.begin(threads=1)
    write(run, 0, 3)
    cut_off(run, 2)
    run = run_in(tmp_path)
    assert run.state() == "begun"
    assert [run.finished(block) is not None for block in range(4)] == [True, False, False, True]
    write(run, 1, 2)
    run.finish()
    assert (tmp_path / "trees.jsonl").read_bytes() == unbroken


def test_a_block_with_fewer_bytes_than_its_report_says_is_not_done(tmp_path):
    """A machine that lost its power may have kept the report and lost lines, or kept half of the report."""
    run = run_in(tmp_path)
    run.begin(threads=1)
    write(run, 0, 2)
    lines = run.parts / "block-00000.jsonl"
    lines.write_bytes(lines.read_bytes()[:-1])
    (run.parts / "block-00002.json").write_text('{"bytes": 1')
    assert run.finished(0) is None and run.finished(2) is None
    lines.unlink()
    assert run.finished(0) is None
    with pytest.raises(InputError, match="block 0 is not there: all processes need a folder they share"):
        run.finish()


def test_parts_of_another_run_are_refused_and_kept(tmp_path):
    run = run_in(tmp_path)
    run.begin(threads=1)
    write(run, 0)
    kept = names(run.parts)
    other = run_in(tmp_path, num_forks=3, top_p=0.5)
    problem = (
        r"trees\.jsonl\.parts: holds an unfinished run with other settings: num_forks was 8 and is 3, top_p was None "
        "and is 0.5; give the same again to go on with it, --overwrite to drop it, or choose another --output"
    )
    with pytest.raises(InputError, match=problem):
        other.state()
    with pytest.raises(InputError, match="all processes need the same settings and a folder that they share"):
        other.join()
    assert names(run.parts) == kept
    assert other.state(overwrite=True) == "new"
    other.begin(threads=1)
    assert names(other.parts) == ["run.json"] and other.state() == "begun"


def test_a_finished_output_of_another_run_is_refused_and_kept_until_the_new_one_is_complete(tmp_path):
    finished(tmp_path)
    other = run_in(tmp_path, model="n")
    with pytest.raises(InputError, match=r"trees\.jsonl: was made with other settings: model was m and is n; choose"):
        other.state()
    assert other.state(overwrite=True) == "new"
    other.begin(threads=1)
    cut_off(other, 0)
    assert read_trees(tmp_path / "trees.jsonl") == TREES
    # the same command, --overwrite and all, goes on; and so does one without
    assert run_in(tmp_path, model="n").state(overwrite=True) == run_in(tmp_path, model="n").state() == "begun"
    write(other, 0, 1, 2, 3)
    other.finish()
    assert run_in(tmp_path, model="n").state() == "complete"


def test_a_file_that_nobody_knows_is_refused(tmp_path):
    (tmp_path / "trees.jsonl").write_text("mine")
    with pytest.raises(InputError, match=r"exists, and there is no trees\.report\.json that says how it was made; "):
        run_in(tmp_path).state()
    (tmp_path / "trees.report.json").write_text("[]")
    with pytest.raises(InputError, match="exists, and there is no"):
        run_in(tmp_path).state()
    assert run_in(tmp_path).state(overwrite=True) == "new" and (tmp_path / "trees.jsonl").read_text() == "mine"


def test_a_run_that_was_cut_off_while_it_was_put_together(tmp_path):
    run = run_in(tmp_path)
    run.begin(threads=1)
    write(run, 0, 1, 2, 3)
    shutil.copytree(run.parts, tmp_path / "copy")
    run.finish()
    (tmp_path / "copy").rename(run.parts)  # all that is written was written, and nothing removed
    assert run.state() == "begun"
    run.finish()
    assert run.state() == "complete" and names(tmp_path) == ["trees.jsonl", "trees.report.json"]
    # cut off while the parts were removed: without run.json they belong to nobody
    run.begin(threads=1)
    write(run, 0)
    (run.parts / "run.json").unlink()
    assert run.state() == "complete"
    run.clear()
    assert not run.parts.exists()


def test_other_files_in_the_parts_folder_are_left_alone(tmp_path):
    run = run_in(tmp_path)
    run.begin(threads=1)
    (run.parts / "notes.txt").write_text("mine")
    write(run, 0, 1, 2, 3)
    run.finish()
    assert names(run.parts) == ["notes.txt"]


def test_a_full_disk_loses_nothing(tmp_path):
    finished(tmp_path)
    unbroken = (tmp_path / "trees.jsonl").read_bytes()
    run = run_in(tmp_path, model="n")
    run.begin(threads=1)
    write(run, 0, 1)
    kept = r"cannot be written: File too large; blocks that are done are kept: the same command goes on with them"
    size = sum(len(json.dumps(tree.to_dict(), separators=(",", ":"))) + 1 for tree in BLOCKS[2])
    with largest_file(size - 100), pytest.raises(InputError, match=rf"block-00002\.jsonl: {kept}"):
        write(run, 2)
    assert (run.parts / "block-00002.jsonl").stat().st_size == size - 100, "a part of the last line"
    assert run.finished(2) is None and run.finished(0) is not None
    write(run, 2, 3)
    with largest_file(len(unbroken) - 1), pytest.raises(InputError, match=rf"trees\.jsonl: {kept}"):
        run.finish()
    assert (tmp_path / "trees.jsonl").read_bytes() == unbroken, "the earlier output is still there"
    assert run.state() == "begun"
    run.finish()
    assert (tmp_path / "trees.jsonl").read_bytes() == unbroken


def test_two_processes_cannot_write_one_block(tmp_path):
    run = run_in(tmp_path)
    run.begin(threads=1)

    def interrupted():
        yield TREES[0]
        with pytest.raises(InputError, match=r"block-00000\.jsonl: another process is writing it: wait for its end"):
            write(run_in(tmp_path), 0)
        yield from TREES[1:3]

    run.write(0, interrupted(), report_of(BLOCKS[0]))
    assert read_trees(run.parts / "block-00000.jsonl") == BLOCKS[0]


def test_errors_of_the_sampler_are_not_taken_for_those_of_the_disk(tmp_path):
    run = run_in(tmp_path)
    run.begin(threads=1)

    def failing():
        yield TREES[0]
        raise FileNotFoundError("a compiler")

    with pytest.raises(FileNotFoundError, match="a compiler"):
        run.write(0, failing(), SamplingReport())
    assert run.finished(0) is None


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "trees.jsonl.parts").write_text("a file")
    with pytest.raises(InputError, match=r"trees\.jsonl\.parts: cannot be written: File exists"):
        run_in(tmp_path).begin(threads=1)
