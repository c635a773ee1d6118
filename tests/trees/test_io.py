from __future__ import annotations

import json

import pytest
from random_trees import random_tree

from ttpa.errors import InputError
from ttpa.trees.io import iterate_trees, read_trees, write_trees


def test_round_trip(tmp_path):
    trees = [random_tree(seed, tools=seed % 2 == 0) for seed in range(5)]
    trees[0].leaves[0].errors = [{"code": "value", "call": 0, "pointer": "/é", "tokens": [0, 2]}]
    assert write_trees(tmp_path / "t.jsonl", trees) == 5
    assert read_trees(tmp_path / "t.jsonl") == trees
    assert len((tmp_path / "t.jsonl").read_text().splitlines()) == 5


def test_reading_streams(tmp_path):
    write_trees(tmp_path / "t.jsonl", [random_tree(0)])
    with open(tmp_path / "t.jsonl", "a") as file:
        file.write("\n{broken\n")
    trees = iterate_trees(tmp_path / "t.jsonl")
    assert next(trees) == random_tree(0)
    with pytest.raises(InputError, match=r"t\.jsonl:3: not JSON"):
        next(trees)


def test_a_failed_write_leaves_what_was_there(tmp_path):
    write_trees(tmp_path / "t.jsonl", [random_tree(0)])

    def fails():
        yield random_tree(1)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        write_trees(tmp_path / "t.jsonl", fails())
    assert read_trees(tmp_path / "t.jsonl") == [random_tree(0)]
    assert [file.name for file in tmp_path.iterdir()] == ["t.jsonl"]


def test_a_missing_file(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_trees(tmp_path / "none.jsonl")


def set_at(*path_and_value):
    *path, last, value = path_and_value

    def change(record):
        for key in path:
            record = record[key]
        record[last] = value

    return change


def drop(*path):
    def change(record):
        for key in path[:-1]:
            record = record[key]
        del record[path[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (drop("prompt_ids"), "has no field 'prompt_ids'"),
        (drop("leaves", 0, "kind"), r"leaves\[0\] has no field 'kind'"),
        (set_at("colour", 1), "unknown field 'colour'"),
        (set_at("nodes", 1, "idz", 1), r"nodes\[1\] has an unknown field 'idz'"),
        (set_at("pairs", {}), "pairs must be a list"),
        (set_at("nodes", 0, 3), r"nodes\[0\] must be a JSON object"),
        (set_at("prompt_ids", []), "prompt_ids must be"),
        (set_at("prompt_ids", [1, True]), "prompt_ids must be"),
        (set_at("nodes", 1, "ids", [1, -2]), r"nodes\[1\].ids must be"),
        (set_at("nodes", 1, "ids", []), r"nodes\[1\].ids must be"),
        (set_at("nodes", 0, "logps", [0.5] * 99), r"nodes\[0\].logps must be"),
        (set_at("nodes", 0, "trained", [2]), r"nodes\[0\].trained must be"),
        (set_at("nodes", 0, "parent", 0), r"nodes\[0\].parent is 0.*depth-first"),
        (set_at("leaves", 0, "node", 99), r"leaves\[0\].node must be an index"),
        (set_at("leaves", 0, "kind", "best"), r"leaves\[0\].kind is 'best'"),
        (set_at("leaves", 0, "score", "high"), r"leaves\[0\].score must be"),
        (set_at("leaves", 0, "errors", [{"code": "a"}]), r"leaves\[0\].errors\[0\] must have code and pointer"),
        (
            set_at("leaves", 0, "errors", [{"code": "a", "call": 0, "pointer": "", "tokens": [0, 999]}]),
            r"leaves\[0\].errors\[0\].tokens must be",
        ),
        (set_at("pairs", 0, "chosen", 99), r"pairs\[0\].chosen must be an index"),
        (set_at("pairs", 0, "rejected", -1), r"pairs\[0\].rejected must be an index"),
        (set_at("pairs", 0, "rejected", 0), r"pairs\[0\] has equal sides"),
        (set_at("pairs", 0, "margin", float("nan")), r"pairs\[0\].margin must be"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_line(tmp_path, change, problem):
    good, bad = random_tree(3).to_dict(), random_tree(3).to_dict()
    change(bad)
    (tmp_path / "t.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(bad) + "\n")
    with pytest.raises(InputError, match=r"t\.jsonl:2: .*" + problem):
        read_trees(tmp_path / "t.jsonl")


def test_nodes_out_of_depth_first_order(tmp_path):
    record = random_tree(0).to_dict()
    node = {"ids": [1]}
    # 0 -> 1, 0 -> 2, and then back to 1: the subtree of 1 is not one run
    record["nodes"] = [{**node, "parent": parent} for parent in (-1, 0, 0, 1)]
    record["leaves"] = [{"node": 3, "kind": "gold"}]
    record["pairs"] = []
    (tmp_path / "t.jsonl").write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"nodes\[3\].parent is 1.*one of -1, 0, 2"):
        read_trees(tmp_path / "t.jsonl")


def test_a_file_with_a_byte_order_mark(tmp_path):
    write_trees(tmp_path / "t.jsonl", [random_tree(0), random_tree(1)])
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "t.jsonl").read_bytes())
    assert read_trees(tmp_path / "bom.jsonl") == [random_tree(0), random_tree(1)]


@pytest.mark.parametrize(
    ("line", "problem"), [(b'{"id": "\xff"}', "not UTF-8 text"), (b"[" * 100_000, "nested too deeply")]
)
def test_lines_that_no_json_reader_takes(tmp_path, line, problem):
    write_trees(tmp_path / "t.jsonl", [random_tree(0)])
    with open(tmp_path / "t.jsonl", "ab") as file:
        file.write(b"\n" + line)
    with pytest.raises(InputError, match=rf"t\.jsonl:3: .*{problem}"):
        read_trees(tmp_path / "t.jsonl")
