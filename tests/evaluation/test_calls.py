"""Evaluating a model: greedy answers, strictly scored."""

from __future__ import annotations

import pytest
from hesitant import asking, calling

from ttpa.data.decisions import all_decisions
from ttpa.evaluation import calls, evaluate_calls
from ttpa.sampling.decoded import Decoded

DIALOGUES = [
    asking("a", "Rome", calling("weather", city="Rome"), split="seen"),
    asking(
        "b", "Rome", calling("weather", city="Oslo"), {"role": "tool", "content": "rain"}, calling("time"), split="new"
    ),
    asking("long", "Rome", calling("weather", city="x" * 500), split="new"),
]


@pytest.fixture
def answers(tokenizer, monkeypatch):
    """The model answers with these calls, in the order of the decisions."""

    def answer(*messages):
        def write(self, asked, *, report):
            for i, (decision, message) in reversed(list(enumerate(zip(asked, messages, strict=True)))):
                assert decision in all_decisions(DIALOGUES, tokenizer)
                (answered,) = all_decisions([asking("x", "Rome", message)], tokenizer)
                yield i, [("trunk", Decoded(answered.gold_ids, "stop", [], [], [], None, None))]

        monkeypatch.setattr(calls.PathWriter, "write", write)

    return answer


def test_answers_are_scored_strictly(tokenizer, tiny_model, answers):
    answers(calling("weather", city="Rome"), calling("weather", city="Bonn"), calling("weather", city="Rome"))
    found = evaluate_calls(tiny_model, tokenizer, DIALOGUES, max_length=600)
    assert [(o.id, o.split, o.exact, o.codes) for o in found.outcomes] == [
        ("a:1", "seen", True, []),
        ("b:1", "new", False, ["value.wrong"]),
        ("b:3", "new", False, ["tool.wrong"]),
    ]
    assert (found.exact, found.dropped) == (1, {"long:1": "over max_length"})
    assert found.score == pytest.approx((1 + 0.5 + 0) / 3)
    assert found.to_dict()["splits"]["new"]["exact_calls"] == 0


def test_a_model_without_training_answers_nothing_exactly(tokenizer, tiny_model):
    found = evaluate_calls(tiny_model, tokenizer, DIALOGUES[:2], max_new_tokens=5, batch_size=2)
    assert [(o.score, o.tokens <= 5) for o in found.outcomes] == [(0.0, True)] * 3
    assert found.errors == {"no_call": 3}
    assert found.to_dict()["cut_off"] == sum(o.finish == "length" for o in found.outcomes)
