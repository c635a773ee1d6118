"""What each token of a trajectory is, in every dialect."""

from __future__ import annotations

import copy
from itertools import groupby, pairwise

import numpy as np
import pytest
from dialect_writers import WRITERS
from hesitant import TOOLS
from hypothesis import given, settings
from hypothesis import strategies as st

from ttpa.tools.dialects import DIALECTS
from ttpa.trees.classes import CLASSES, class_counts, tree_classes
from ttpa.trees.pack import completion_tokens
from ttpa.trees.record import Completion, Leaf, Pair, PreferenceTree, merge_completions

END, OPEN, CLOSE = "<|im_end|>", "<tool_call>", "</tool_call>"


def calling(city):
    return f'{OPEN}\n{{"name": "weather", "arguments": {{"city": "{city}", "days": 2}}}}\n{CLOSE}'


def tree_of(tokenizer, *texts, pairs=(), trained=None):
    completions = [
        Completion(ids, Leaf(0, "given"), trained=trained)
        for ids in (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    ]
    nodes, leaves = merge_completions(completions)
    return PreferenceTree("t", [1], nodes, leaves, [Pair(*pair) for pair in pairs], tools=TOOLS)


def runs(tokenizer, tree, leaf=0):
    """The text of a completion in runs of one class."""
    classes, starts = tree_classes(tree, tokenizer), np.cumsum([0, *(len(node.ids) for node in tree.nodes)])
    tokens = [
        (token, CLASSES[classes[starts[n] + at]]) for n in tree.path(leaf) for at, token in enumerate(tree.nodes[n].ids)
    ]
    return [(tokenizer.decode([t for t, _ in run]), name) for name, run in groupby(tokens, key=lambda pair: pair[1])]


def test_every_part_of_a_turn_has_its_class(tokenizer):
    assert runs(tokenizer, tree_of(tokenizer, f"Well: {calling('Rome')} done{END}")) == [
        ("Well: ", "text"),
        (f'{OPEN}\n{{"name": ', "scaffolding"),
        ('"weather"', "tool_name"),
        (', "arguments": {', "scaffolding"),
        ('"city"', "argument_key"),
        (": ", "scaffolding"),
        ('"Rome"', "argument_value"),
        (", ", "scaffolding"),
        ('"days"', "argument_key"),
        (": ", "scaffolding"),
        ("2", "argument_value"),
        (f"}}}}\n{CLOSE}", "scaffolding"),
        (" done", "text"),
        (END, "end_of_turn"),
    ]


def test_tool_results_and_headers_are_told_from_what_the_model_says(tokenizer):
    result = f"<tool_response>\n{calling('Oslo')}\n</tool_response>"
    turns = (f"user\nNow: {result}", "tool\n18 C", "assistant\nIt is 18")
    text = "".join([f"Hm{END}", *(f"\n<|im_start|>{turn}{END}" for turn in turns)])
    assert runs(tokenizer, tree_of(tokenizer, text)) == [
        ("Hm", "text"),
        (END, "end_of_turn"),
        ("\n<|im_start|>user\n", "scaffolding"),
        ("Now: ", "prompt"),
        (result, "tool_result"),
        (END, "end_of_turn"),
        ("\n<|im_start|>tool\n", "scaffolding"),
        ("18 C", "tool_result"),
        (END, "end_of_turn"),
        ("\n<|im_start|>assistant\n", "scaffolding"),
        ("It is 18", "text"),
        (END, "end_of_turn"),
    ]


def test_any_special_token_at_the_end_ends_the_turn(tokenizer):
    assert runs(tokenizer, tree_of(tokenizer, "Hm<|endoftext|>")) == [("Hm", "text"), ("<|endoftext|>", "end_of_turn")]


def test_what_cannot_be_read_is_text_but_not_what_was_read_before_it(tokenizer):
    found = runs(tokenizer, tree_of(tokenizer, f'{OPEN}\n{{"name": "weather", oops'))
    assert ('"weather"', "tool_name") in found and found[-1][1] == "text" and found[-1][0].endswith("oops")


def test_a_shared_token_has_its_class_from_the_preferred_completion(tokenizer):
    cut = calling("Rome")[: calling("Rome").index("city") - 1]
    texts = (f"{cut}oops", calling("Rome"))
    shared = ('"weather"', "tool_name"), (', "arguments": {', "scaffolding")
    found = runs(tokenizer, tree_of(tokenizer, *texts, pairs=[(1, 0)]), leaf=1)
    assert [run for run in found if run in shared] == [*shared]
    other = runs(tokenizer, tree_of(tokenizer, *texts, pairs=[(0, 1)]), leaf=1)
    assert (', "arguments": {', "scaffolding") not in other, "in the broken call they could not be read"


def test_a_node_without_a_leaf_is_text(tokenizer):
    tree = tree_of(tokenizer, calling("Rome"), calling("Oslo"))
    tree.leaves.pop()
    found = tree_classes(tree, tokenizer)
    assert len(found) == completion_tokens(tree)
    assert {CLASSES[c] for c in found[-len(tree.nodes[-1].ids) :]} == {"text"}


def test_a_token_over_several_classes_has_the_first_of_them(tokenizer, monkeypatch):
    text = calling("Rome")
    ends = [text.index(part) for part in ("weather", "city", '"Rome"', '"days"')]
    cuts = [0, len(OPEN), ends[0] + 3, ends[1] + 2, ends[2], ends[3], len(text)]
    spans = list(pairwise(cuts))
    monkeypatch.setattr("ttpa.tools.speakers.token_spans", lambda tokenizer, ids: (text, spans))
    nodes, leaves = merge_completions([Completion(list(range(len(spans))), Leaf(0, "given"))])
    found = tree_classes(PreferenceTree("t", [1], nodes, leaves, [], tools=TOOLS), tokenizer)
    assert [CLASSES[c] for c in found] == [
        *("scaffolding", "tool_name", "tool_name", "argument_key", "argument_value", "argument_key")
    ]


def test_counts_name_every_class(tokenizer):
    tree = tree_of(tokenizer, f"{calling('Rome')}{END}", calling("Oslo"))
    counts = class_counts(tree_classes(tree, tokenizer))
    assert list(counts) == list(CLASSES) and sum(counts.values()) == completion_tokens(tree)
    assert (counts["tool_name"], counts["end_of_turn"], counts["text"]) == (len('"weather"'), 1, 0)


def speaking(tokenizer, dialect):
    tokenizer = copy.copy(tokenizer)
    tokenizer.tool_dialect = dialect
    return tokenizer


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_parts_of_a_call_are_told_in_every_dialect(tokenizer, dialect):
    calls = [{"name": "weather", "arguments": {"city": "Rome", "days": 2}}, {"name": "time", "arguments": {}}]
    tokenizer = speaking(tokenizer, dialect)
    found = runs(tokenizer, tree_of(tokenizer, f"Well:\n{WRITERS[dialect](calls)}{END}"))
    of_class = {name: [text.strip("\"'") for text, of in found if of == name] for name in CLASSES}
    assert of_class["tool_name"] == ["weather", "time"]
    assert of_class["argument_key"] == ["city", "days"]
    assert of_class["argument_value"] == ["Rome", "2"]
    assert "".join(of_class["text"]).strip() == "Well:"
    assert of_class["end_of_turn"] == [END] and of_class["prompt"] == of_class["tool_result"] == []


@pytest.mark.parametrize("dialect", DIALECTS)
def test_what_follows_a_call_that_nobody_wrote_is_its_result(tokenizer, dialect):
    """In a template whose headers are not known."""
    tokenizer = speaking(tokenizer, dialect)
    call = WRITERS[dialect]([{"name": "weather", "arguments": {"city": "Rome"}}])
    parts = [(call, 1), ("\nResult: 18 C\n", 0), ("It is 18 C.", 1), ("\nAnd now?\n", 0), ("The same.", 1)]
    trained = [flag for text, flag in parts for _ in tokenizer(text, add_special_tokens=False)["input_ids"]]
    found = runs(tokenizer, tree_of(tokenizer, "".join(text for text, _ in parts), trained=trained))
    assert found[-4:] == [
        ("\nResult: 18 C\n", "tool_result"),
        *[("It is 18 C.", "text"), ("\nAnd now?\n", "prompt"), ("The same.", "text")],
    ]


def test_where_calls_cannot_be_read_they_are_text(tokenizer):
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    assert runs(tokenizer, tree_of(tokenizer, f"{calling('Rome')}{END}")) == [
        (calling("Rome"), "text"),
        (END, "end_of_turn"),
    ]


@pytest.mark.parametrize("dialect", DIALECTS)
@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_every_token_of_any_completion_has_a_class(tokenizer, dialect, data):
    tokenizer = speaking(tokenizer, dialect)
    call = WRITERS[dialect]([{"name": "weather", "arguments": {"city": "Köln ✈️"}}])
    pieces = [
        call,
        call[: len(call) // 2],
        END,
        "\n<|im_start|>user\n",
        "\n<|im_start|>tool\n",
        "<tool_response>",
        "é",
        " ",
    ]
    text = "".join(data.draw(st.lists(st.sampled_from(pieces), min_size=1, max_size=6)))
    length = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    trained = data.draw(st.lists(st.integers(0, 1), min_size=length, max_size=length))
    tree = tree_of(tokenizer, text, trained=trained)
    found = tree_classes(tree, tokenizer)
    assert len(found) == completion_tokens(tree) == length and 0 <= found.min() <= found.max() < len(CLASSES)
