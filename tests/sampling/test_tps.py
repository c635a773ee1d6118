"""Trees sampled from a model that hesitates."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
import trl
from hesitant import TOOLS, asking, calling

from ttpa.data.dialogues import Dialogue
from ttpa.errors import InputError
from ttpa.sampling import SamplingOptions, sample_trees
from ttpa.tools.call import Call
from ttpa.trees.io import read_trees, write_trees
from ttpa.trees.record import PreferenceTree

OSLO, ROME = {"city": "Oslo", "days": 2}, {"city": "Rome", "days": 2}


@pytest.fixture(scope="module")
def sampled(hesitant, tokenizer):
    return sample_trees(hesitant, tokenizer, [asking("right", "Rome"), asking("wrong", "Rome", calling("time"))])


def test_forks_find_the_other_answers(sampled):
    (tree, _), _ = sampled
    trunk, *branches = tree.leaves
    assert (trunk.kind, trunk.calls, trunk.score) == ("trunk", [{"name": "weather", "arguments": ROME}], 1.0)
    assert {leaf.kind for leaf in branches} == {"branch"}, "the trunk is the gold answer, so gold is no leaf beside it"
    said = [leaf.calls for leaf in branches]
    assert [{"name": "time", "arguments": {}}] in said and [{"name": "weather", "arguments": OSLO}] in said


def test_every_wrong_leaf_is_rejected_for_an_exact_one(sampled):
    for tree in sampled[0]:
        assert [pair.rejected for pair in tree.pairs] == [i for i, leaf in enumerate(tree.leaves) if leaf.score < 1]
        (chosen,) = {pair.chosen for pair in tree.pairs}
        assert tree.leaves[chosen].score == 1.0 and tree.leaves[chosen].errors == []
        for pair in tree.pairs:
            assert pair.margin == 1.0 - tree.leaves[pair.rejected].score


def test_errors_name_the_tokens(sampled, tokenizer):
    (tree, _), _ = sampled
    at = next(i for i, leaf in enumerate(tree.leaves) if leaf.calls == [{"name": "weather", "arguments": OSLO}])
    (error,) = tree.leaves[at].errors
    assert (error["code"], error["pointer"]) == ("value.wrong", "/city")
    a, b = error["tokens"]
    assert tokenizer.decode(tree.completion_ids(at)[a:b]) == '"Oslo"'


def test_gold_is_a_leaf_where_no_answer_has_its_tokens(sampled, tokenizer, hesitant):
    _, tree = sampled[0]
    assert [leaf.kind for leaf in tree.leaves].count("gold") <= 1
    third = asking("third", "Rome", calling("weather", city="Lima"))
    (tree,), report = sample_trees(hesitant, tokenizer, [third])
    (gold,) = [i for i, leaf in enumerate(tree.leaves) if leaf.kind == "gold"]
    assert tree.leaves[gold].calls == [{"name": "weather", "arguments": {"city": "Lima"}}]
    assert {pair.chosen for pair in tree.pairs} == {gold} and len(tree.pairs) == len(tree.leaves) - 1
    assert report.exact_trunks == 0


def test_what_is_recorded_is_what_the_model_says(sampled, hesitant):
    """log-probabilities and entropies of every node that was sampled, by one pass per leaf."""
    for tree in sampled[0]:
        for i, leaf in enumerate(tree.leaves):
            if leaf.kind == "gold":
                continue
            ids = tree.completion_ids(i)
            with torch.no_grad():
                logits = hesitant(input_ids=torch.tensor([tree.prompt_ids + ids])).logits[0].double()
            logp = logits[len(tree.prompt_ids) - 1 : -1].log_softmax(-1)
            expected = logp.gather(1, torch.tensor(ids)[:, None])[:, 0]
            nodes = [tree.nodes[n] for n in tree.path(i)]
            for name, values in (("logps", expected), ("entropy", -(logp.exp() * logp).sum(-1))):
                recorded = torch.tensor([x for node in nodes for x in getattr(node, name)]).double()
                torch.testing.assert_close(recorded, values, atol=1e-5, rtol=1e-5)


def test_leaves_differ_in_what_they_say(sampled):
    for tree in sampled[0]:
        said = [
            (str([Call(**call).normal() for call in leaf.calls]), str([e["code"] for e in leaf.errors]), leaf.node)
            for leaf in tree.leaves
            if leaf.calls and leaf.kind != "gold"
        ]
        assert len({(calls, errors) for calls, errors, _ in said}) == len(said)


def test_trees_are_written_and_read(sampled, tmp_path):
    write_trees(tmp_path / "trees.jsonl", sampled[0])
    assert read_trees(tmp_path / "trees.jsonl") == sampled[0]


def test_batch_size_and_repetition_change_nothing(sampled, hesitant, tokenizer):
    dialogues = [asking("right", "Rome"), asking("wrong", "Rome", calling("time"))]
    again, _ = sample_trees(hesitant, tokenizer, dialogues, options=SamplingOptions(rows=1))

    def shape(tree: PreferenceTree) -> object:
        return tree.id, [(n.parent, n.ids) for n in tree.nodes], tree.leaves, tree.pairs

    assert [shape(tree) for tree in again] == [shape(tree) for tree in sampled[0]]


def test_report_counts(sampled):
    trees, report = sampled
    record = report.to_dict()
    assert (record["decisions"], record["trees"], record["exact_trunks"]) == (2, 2, 1)
    assert record["pairs"] == sum(len(tree.pairs) for tree in trees)
    assert record["leaves"] == sum(len(tree.leaves) for tree in trees)
    assert record["pairs_per_1000_tokens"] == 1000 * record["pairs"] / record["decoded_tokens"]
    own = sum(len(n.ids) for tree in trees for n in tree.nodes if n.logps is not None)
    assert record["decoded_tokens"] > own / 2 and set(record["forks"]) <= {"name", "key", "value", "bracket", "string"}
    assert "pairs per 1,000 decoded tokens" in report.table() and "exact trunks" in report.table()


def test_an_exact_trunk_without_forks_gives_no_tree(hesitant, tokenizer):
    options = SamplingOptions(num_forks=0)
    trees, report = sample_trees(hesitant, tokenizer, [asking("right", "Rome")], options=options)
    assert (trees, report.without_pair, report.pairs, report.trees) == ([], 1, 0, 0)
    assert report.decoded_tokens > 0 and not report.forks


def test_what_is_left_out_is_reported(hesitant, tokenizer):
    long = asking("long", "Rome" * 500)
    plain = Dialogue("plain", TOOLS, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi"}])
    seen = []
    trees, report = sample_trees(
        hesitant,
        tokenizer,
        [long, plain, asking("right", "Rome")],
        max_length=1000,
        progress=seen.append,
    )
    assert [tree.id for tree in trees] == ["right:1"]
    first, last = seen[0], seen[-1]
    assert (first.done, first.total, last.done, last.total, last.pairs) == (1, 2, 2, 2, report.pairs)
    assert first.pages_used > 0 and first.decoded_tokens == 1 and last.decoded_tokens == report.decoded_tokens
    assert report.decisions == 2
    assert report.dropped == [{"id": "long:1", "reason": "over max_length"}]
    assert report.to_dict()["dropped_by_reason"]["over max_length"] == 1


def test_a_gold_answer_that_the_template_writes_so_that_it_cannot_be_read_is_dropped(hesitant, tokenizer, monkeypatch):
    """This template escapes nothing: the quote in the name ends the text."""
    template = Path(trl.__file__).parent / "chat_templates" / "lfm2_2_5.jinja"
    monkeypatch.setattr(tokenizer, "chat_template", template.read_text())
    trees, report = sample_trees(hesitant, tokenizer, [asking("right", "L'Aquila")])
    assert (trees, report.decoded_tokens) == ([], 0)
    assert report.dropped == [{"id": "right:1", "reason": "the gold answer is not exact when it is read back"}]


def test_a_template_that_writes_no_calls_is_refused(hesitant, tokenizer, monkeypatch):
    text = "{{ m.content or m.tool_calls[0].function.name + '()' }}<|im_end|>"
    monkeypatch.setattr(tokenizer, "chat_template", "{{ tools }}{% for m in messages %}" + text + "{% endfor %}")
    with pytest.raises(InputError, match="'right', message 1: the chat template drops tool calls"):
        sample_trees(hesitant, tokenizer, [asking("right", "Rome")])


def test_origin_says_how_the_tree_came_about(sampled):
    origin = sampled[0][0].origin
    assert origin["sampling"] == dataclasses.asdict(SamplingOptions())
    assert origin["versions"]["torch"] == torch.__version__


def test_independent_samples(hesitant, tokenizer):
    options = SamplingOptions(mode="release", num_samples=24, seed=3)
    (tree,), report = sample_trees(hesitant, tokenizer, [asking("right", "Rome")], options=options)
    assert report.exact_trunks is None and not report.forks
    assert report.duplicates + sum(leaf.kind == "branch" for leaf in tree.leaves) == 24
    assert any(leaf.calls == [{"name": "time", "arguments": {}}] for leaf in tree.leaves)
    (other,), _ = sample_trees(hesitant, tokenizer, [asking("right", "Rome")], options=options)
    assert other == tree
    different = dataclasses.replace(options, seed=4)
    (other,), _ = sample_trees(hesitant, tokenizer, [asking("right", "Rome")], options=different)
    assert [leaf.calls for leaf in other.leaves] != [leaf.calls for leaf in tree.leaves]
    assert math.isclose(report.pairs_per_1000_tokens, 1000 * report.pairs / report.decoded_tokens)
