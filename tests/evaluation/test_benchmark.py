"""BFCL's questions: read with their answers, asked, judged."""

from __future__ import annotations

import json

import pytest

from ttpa.errors import InputError
from ttpa.evaluation.benchmark import benchmark_table, evaluate_benchmark, group_means, judge, read_benchmark
from ttpa.evaluation.calls import Evaluation, Outcome

AREA = {
    "name": "math.area",
    "description": "Area.",
    "parameters": {
        "type": "dict",
        "properties": {"base": {"type": "float"}, "unit": {"type": "string"}, "note": {"type": "any"}},
        "required": ["base"],
    },
}
ANSWER = [{"math.area": {"base": [2.0], "unit": ["", "m"], "note": ["", "A-B"]}}]


def question(id: str, **changes) -> dict:
    return {"id": id, "question": [[{"role": "user", "content": "Area of 2?"}]], "function": [AREA], **changes}


def write(file, *rows: dict) -> None:
    """As BFCL's files are: lines of JSON in a .json file, without an end of line at the end."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture
def folder(tmp_path):
    files = {"simple_python": ["simple_python_0", "simple_python_1"], "live_multiple": ["live_multiple_0-0-0"]}
    for name, ids in files.items():
        write(tmp_path / f"BFCL_v4_{name}.json", *map(question, ids))
        gold = [{"id": id, "ground_truth": ANSWER} for id in ids]
        write(tmp_path / "possible_answer" / f"BFCL_v4_{name}.json", *gold)
    write(tmp_path / "BFCL_v4_irrelevance.json", question("irrelevance_0"))
    write(tmp_path / "BFCL_v4_live_relevance.json", question("live_relevance_0-0-0"))
    return tmp_path


def by_id(path):
    return {q.dialogue.id: q for q in read_benchmark(path)[0]}


def written(tokenizer, *calls: dict, text: str = "") -> list[int]:
    blocks = [f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls]
    return tokenizer("\n".join([text, *blocks]).strip() + "<|im_end|>")["input_ids"]


def area(**arguments) -> dict:
    return {"name": "math.area", "arguments": arguments}


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
    ("calls", "codes"),
    [
        ([area(base=2)], []),
        ([area(base=2.0, unit="M")], []),
        ([area(base=2, note="ab")], []),  # a type that JSON Schema does not have: any takes texts, compared as texts
        ([area(base=3)], ["value.wrong"]),
        ([area(base="2")], ["value.type"]),
        ([{"name": "math_area", "arguments": {"base": 2}}], ["tool.unknown"]),
        ([], ["no_call"]),
        ([area(base=2), area(base=2)], ["call.repeated"]),
    ],
)
def test_answers_are_judged_as_bfcl_does(folder, tokenizer, calls, codes):
    questions = by_id(folder)
    assert judge(tokenizer, written(tokenizer, *calls, text="Well."), questions["simple_python_0"]) == codes


def test_any_call_is_wrong_where_none_fits_and_right_where_one_must(folder, tokenizer):
    questions = by_id(folder)
    none, some = (questions[id] for id in ("irrelevance_0", "live_relevance_0-0-0"))
    says, calls = written(tokenizer, text="I cannot."), written(tokenizer, area(base="wrong"))
    broken = tokenizer('<tool_call>\n{"name": ')["input_ids"]
    assert [judge(tokenizer, ids, none) for ids in (says, calls, broken)] == [[], ["unwanted_call"], []]
    assert [judge(tokenizer, ids, some) for ids in (says, calls)] == [["no_call"], []]
    assert judge(tokenizer, broken, some) != []


def test_every_question_is_asked(folder, tokenizer, tiny_model):
    """A model without training calls nothing, which is right where nothing is to be called."""
    questions, _ = read_benchmark(folder)
    found = evaluate_benchmark(tiny_model, tokenizer, questions, max_new_tokens=4, batch_size=2)
    assert [(o.id, o.split, o.score) for o in found.outcomes] == [
        ("irrelevance_0", "irrelevance", 1.0),
        ("live_multiple_0-0-0", "live_multiple", 0.0),
        ("live_relevance_0-0-0", "live_relevance", 0.0),
        ("simple_python_0", "simple_python", 0.0),
        ("simple_python_1", "simple_python", 0.0),
    ]
    assert all(o.tokens <= 4 for o in found.outcomes)
    dropped = evaluate_benchmark(tiny_model, tokenizer, questions, max_new_tokens=4, max_length=10)
    assert dropped.outcomes == [] and set(dropped.dropped.values()) == {"over max_length"}


def test_the_model_sees_the_functions_under_their_own_names(folder, tokenizer, tiny_model):
    other = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token)
    questions, _ = read_benchmark(folder)
    with pytest.raises(InputError, match="tokenizer with a chat template, and this one has none"):
        evaluate_benchmark(tiny_model, other, questions)
    other.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(InputError, match="the chat template of the tokenizer drops the tools"):
        evaluate_benchmark(tiny_model, other, questions)
    other.chat_template = "{{ raise_exception('no tools') if tools }}"
    with pytest.raises(InputError, match=r"question 'irrelevance_0': the chat template refuses it: .*no tools"):
        evaluate_benchmark(tiny_model, other, questions)


def outcomes(**categories: list[int]) -> Evaluation:
    return Evaluation(
        [
            Outcome(f"{name}_{i}", name, float(right), [] if right else ["no_call"], "stop", 1)
            for name, results in categories.items()
            for i, right in enumerate(results)
        ]
    )


def test_group_means_weigh_live_categories_only():
    evaluation = outcomes(
        simple_python=[1, 1, 1, 1], parallel=[0, 1], live_simple=[1, 1, 1], live_multiple=[0], irrelevance=[0, 0]
    )
    assert group_means(evaluation) == {
        "non_live": {"mean": 0.75, "categories": ["simple_python", "parallel"]},
        "live": {"mean": 0.75, "categories": ["live_simple", "live_multiple"]},
    }
    assert group_means(outcomes(simple_python=[1], live_simple=[1], live_multiple=[0, 0, 0]))["live"]["mean"] == 0.25
    assert group_means(outcomes(irrelevance=[1])) == {}


def test_the_table_names_what_a_mean_is_of():
    table = benchmark_table(outcomes(simple_python=[1, 0], irrelevance=[1]))
    assert "exact calls, %: irrelevance" in table
    assert table.endswith("non_live mean of simple_python: 50.0 %") and "overall" not in table.lower()


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


def test_the_released_questions_and_their_first_answers(real_data, tokenizer):
    """Every released question is right when it is answered by the first of its possible answers."""
    questions, report = read_benchmark(real_data / "bfcl")
    assert (len(questions), report.dropped) == (1240, [])

    def first(alternatives: list) -> object:
        value = alternatives[0]
        return {key: first(inner) for key, inner in value.items()} if isinstance(value, dict) else value

    wrong = []
    for q in questions[::7]:
        calls = [
            {"name": name, "arguments": {key: first(values) for key, values in given.items() if values[0] != ""}}
            for record in q.answers
            for name, given in record.items()
        ]
        if judge(tokenizer, written(tokenizer, *calls), q):
            wrong.append(q.dialogue.id)
    assert wrong == []
