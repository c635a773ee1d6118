"""Reading the questions of BFCL with their possible answers."""

from __future__ import annotations

import pytest
from bfcl_questions import ANSWER, question, write, write_benchmark

from ttpa.data.benchmark import read_benchmark
from ttpa.errors import InputError


@pytest.fixture
def folder(tmp_path):
    return write_benchmark(tmp_path)


def test_a_folder_is_read_with_its_answers(folder):
    questions, report = read_benchmark(folder)
    assert [(q.dialogue.id, q.category, len(q.answers)) for q in questions] == [
        ("irrelevance_0", "irrelevance", 0),
        ("live_multiple_0-0-0", "live_multiple", 1),
        ("live_relevance_0-0-0", "live_relevance", 0),
        ("simple_python_0", "simple_python", 1),
        ("simple_python_1", "simple_python", 1),
    ]
    assert (report.read, report.kept, report.dropped) == (5, 5, [])


def test_answers_may_lie_beside_the_folder_of_questions(folder):
    write(folder / "question" / "BFCL_v4_simple_python.json", question("simple_python_0"))
    (found,), _ = read_benchmark(folder / "question" / "BFCL_v4_simple_python.json")
    assert found.answers == ANSWER


def test_files_of_other_categories_are_listed(folder):
    write(folder / "BFCL_v4_multi_turn_base.json", {"id": "multi_turn_base_0", "question": [], "involved_classes": []})
    write(folder / "BFCL_v4_simple_java.json", question("simple_java_0"))
    write(folder / "BFCL_v4_format_sensitivity.json", {"simple_python": ["simple_python_0"]})
    write(folder / "multi_turn_func_doc" / "posting_api.json", {"name": "post", "description": "", "parameters": {}})
    questions, report = read_benchmark(folder)
    assert len(questions) == 5
    assert {entry["id"]: entry["detail"] for entry in report.dropped} == {
        "BFCL_v4_format_sensitivity": "",
        "BFCL_v4_multi_turn_base": "multi_turn_base",
        "BFCL_v4_simple_java": "simple_java",
        "posting_api": "",
    }


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([question("simple_python_7")], r"a.json:1: no possible answer to 'simple_python_7'"),
        ([question("simple_java_0")], r"a.json:1: the category 'simple_java' cannot be judged; the categories are"),
        ([question("irrelevance_0"), question("irrelevance_0")], r"a.json:2: the id 'irrelevance_0' comes twice"),
        ([{"id": "simple_python_0", "ground_truth": []}], r"a.json:1: these are possible answers"),
        ([question("irrelevance_0", function=[{"name": "f", "parameters": {"properties": [1]}}])], r"a.json:1: tool"),
    ],
)
def test_files_that_cannot_be_judged(tmp_path, rows, message):
    write(tmp_path / "a.json", *rows)
    with pytest.raises(InputError, match=message):
        read_benchmark(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            {"id": "simple_python_0", "ground_truth": []},
            "a.json:1: the possible answer to 'simple_python_0' has no call",
        ),
        ({"id": "simple_python_0", "ground_truth": [{"f": {}}]}, "a.json:1: gold calls the tool 'f'"),
        (
            {"id": "simple_python_0", "answer": []},
            "possible_answer/a.json:1: a possible answer has id and ground_truth",
        ),
    ],
)
def test_answers_that_are_none(tmp_path, answer, message):
    write(tmp_path / "a.json", question("simple_python_0"))
    write(tmp_path / "possible_answer" / "a.json", answer)
    with pytest.raises(InputError, match=message):
        read_benchmark(tmp_path)


def test_folders_without_questions(tmp_path):
    with pytest.raises(InputError, match="no BFCL questions to judge; the categories are simple, simple_python"):
        read_benchmark(tmp_path)
