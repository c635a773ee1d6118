"""BFCL's questions: read with their answers, asked, judged."""

from __future__ import annotations

import json

import pytest
from bfcl_questions import write_benchmark

from ttpa.data.benchmark import read_benchmark
from ttpa.errors import InputError
from ttpa.evaluation.benchmark import benchmark_table, evaluate_benchmark, group_means, judge
from ttpa.evaluation.calls import Evaluation, Outcome


@pytest.fixture
def folder(tmp_path):
    return write_benchmark(tmp_path)


def by_id(path):
    return {q.dialogue.id: q for q in read_benchmark(path)[0]}


def written(tokenizer, *calls: dict, text: str = "") -> list[int]:
    blocks = [f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls]
    return tokenizer("\n".join([text, *blocks]).strip() + "<|im_end|>")["input_ids"]


def area(**arguments) -> dict:
    return {"name": "math.area", "arguments": arguments}


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
