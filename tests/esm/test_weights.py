import json

import pytest

from ttpa.errors import InputError
from ttpa.esm.score import score_tokens
from ttpa.esm.weights import WeightOptions, key_token_weights, pair_weights
from ttpa.trees.record import Completion, Leaf, Pair, PreferenceTree, merge_completions

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "unit": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
    for name in ("weather", "wind")
]
GOLD = {"name": "weather", "arguments": {"city": "Oslo", "days": 3}}
HEAVY, LIGHT = 2.0, 0.5


def text_of(*calls):
    return "\n".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls) + "<|im_end|>"


def tree_of(tokenizer, rejected, gold=(GOLD,), trained=None, errors=True):
    completions = []
    for text in (text_of(*gold), rejected):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        score = score_tokens(tokenizer, ids, gold, TOOLS)
        leaf = Leaf(-1, "given", score=score.score, errors=[e.to_leaf() for e in score.errors] if errors else [])
        completions.append(Completion(ids, leaf, trained=None if trained is None else [trained] * len(ids)))
    nodes, leaves = merge_completions(completions)
    return PreferenceTree("t", [1], nodes, leaves, [Pair(0, 1)], tools=TOOLS)


def marked(tokenizer, tree, leaf, weights):
    """The completion with the heavy parts in brackets, and where the weights are no longer 1."""
    ids = tree.completion_ids(leaf)
    assert len(ids) == len(weights)
    fork = next((i for i, weight in enumerate(weights) if weight != 1.0), len(ids))
    assert all(weight in (HEAVY, LIGHT) for weight in weights[fork:])
    runs: list[tuple[bool, list[int]]] = []
    for token, weight in zip(ids, weights, strict=True):
        if not runs or runs[-1][0] != (weight == HEAVY):
            runs.append((weight == HEAVY, []))
        runs[-1][1].append(token)
    parts = [tokenizer.decode(run) for _, run in runs]
    return [part for part, (heavy, _) in zip(parts, runs, strict=True) if heavy], fork


def heavy(tokenizer, rejected, gold=(GOLD,)):
    tree = tree_of(tokenizer, rejected, gold)
    chosen_weights, rejected_weights = pair_weights(tree, tree.pairs[0], tokenizer, WeightOptions(HEAVY, LIGHT))
    chosen, fork = marked(tokenizer, tree, 0, chosen_weights)
    first = next(
        i for i, (a, b) in enumerate(zip(tree.completion_ids(0), tree.completion_ids(1), strict=False)) if a != b
    )
    assert fork == first
    # the rejected side: the first token that differs, and no other, is the wrong decision
    assert rejected_weights == [1.0] * first + [HEAVY] + [LIGHT] * (len(rejected_weights) - first - 1)
    return chosen


def changed(**arguments):
    return text_of({**GOLD, "arguments": arguments})


@pytest.mark.parametrize(
    ("rejected", "chosen_heavy"),
    [
        # the value's shared opening quote lies before the fork
        (changed(city="Rome", days=3), ['Oslo"']),
        (changed(city="Oslo", days="3"), ["3"]),
        (changed(city="Rome", days=4), ['Oslo"', "3"]),
        (changed(city="Oslo"), [', "days": 3']),
        (changed(days=3), ['city": "Oslo",']),
        (changed(city="Oslo", days=3, unit="c"), ["}"]),
        (changed(city="Oslo", wind=1, days=3), ["d"]),
        (text_of({**GOLD, "name": "wind"}), ['eather"']),
        (text_of({**GOLD, "name": "wetter"}), ['ather"']),
        (text_of(GOLD, GOLD), ["<|im_end|>"]),
        ("What?<|im_end|>", [text_of(GOLD).removesuffix("<|im_end|>")]),
        (text_of(GOLD).replace("3}}", "3}"), ["}"]),
    ],
)
def test_what_should_stand_in_the_place_of_an_error(tokenizer, rejected, chosen_heavy):
    assert heavy(tokenizer, rejected) == chosen_heavy


def test_a_missing_call_weighs_on_the_call_that_is_missing(tokenizer):
    wind = {"name": "wind", "arguments": {"city": "Rome"}}
    only = text_of(wind).removesuffix("<|im_end|>")
    assert heavy(tokenizer, text_of(GOLD), (GOLD, wind)) == [only]


def test_a_missing_call_does_not_weigh_on_its_neighbour(tokenizer):
    wind = {"name": "wind", "arguments": {"city": "Rome"}}
    missing = text_of(GOLD).removesuffix("<|im_end|>")
    shared = missing.index("eather")
    assert heavy(tokenizer, text_of(wind), (GOLD, wind)) == [missing[shared:]]


def test_calls_in_another_order_find_their_partner(tokenizer):
    wind = {"name": "wind", "arguments": {"city": "Rome"}}
    rejected = text_of({"name": "wind", "arguments": {"city": "Bonn"}}, GOLD)
    assert heavy(tokenizer, rejected, (GOLD, wind)) == ['"Rome"']


def test_both_one_is_plain_dpo(tokenizer):
    tree = tree_of(tokenizer, changed(city="Rome", days=3))
    for weights in pair_weights(tree, tree.pairs[0], tokenizer, WeightOptions(1.0, 1.0)):
        assert weights == [1.0] * len(weights)


def test_a_pair_without_recorded_errors_has_equal_weights(tokenizer):
    tree = tree_of(tokenizer, changed(city="Rome", days=3), errors=False)
    for leaf, weights in enumerate(pair_weights(tree, tree.pairs[0], tokenizer, WeightOptions())):
        assert weights == [1.0] * len(tree.completion_ids(leaf))


def test_tokens_that_the_model_did_not_write_weigh_nothing(tokenizer):
    tree = tree_of(tokenizer, changed(city="Rome", days=3), trained=0)
    for weights in pair_weights(tree, tree.pairs[0], tokenizer, WeightOptions()):
        assert weights == [0.0] * len(weights)
    tree = tree_of(tokenizer, changed(city="Rome", days=3))
    tree.nodes[0].trained = [0] * 5 + [1] * (len(tree.nodes[0].ids) - 5)
    for weights in pair_weights(tree, tree.pairs[0], tokenizer, WeightOptions(HEAVY, LIGHT)):
        assert weights[:6] == [0.0] * 5 + [1.0] and HEAVY in weights


def test_a_completion_that_is_the_start_of_the_other(tokenizer):
    whole = text_of(GOLD)
    tree = tree_of(tokenizer, whole[:60])
    chosen, rejected = pair_weights(tree, tree.pairs[0], tokenizer, WeightOptions(HEAVY, LIGHT))
    assert rejected == [1.0] * len(rejected)
    # nothing to weigh on the cut side; the token at which the whole one goes on is the decision
    assert chosen[: len(rejected)] == rejected and chosen[len(rejected)] == HEAVY
    assert set(chosen[len(rejected) + 1 :]) == {LIGHT}


@pytest.mark.parametrize("options", [{"error": -1.0}, {"follow": float("nan")}, {"error": float("inf")}])
def test_weights_must_be_finite_and_not_negative(options):
    with pytest.raises(InputError, match="finite number of at least 0"):
        WeightOptions(**options)
    assert WeightOptions(0.0, 0.0).error == 0.0


def key_tokens(tokenizer, rejected, gold=(GOLD,), **options):
    """Of both sides the text of the tokens that weigh more than 1, their weights, and the number of tokens."""
    tree = tree_of(tokenizer, rejected, gold, **options)
    found = []
    for leaf, weights in enumerate(key_token_weights(tree, tree.pairs[0], tokenizer)):
        ids = tree.completion_ids(leaf)
        heavy = [i for i, weight in enumerate(weights) if weight > 1.0]
        assert all(weight == 1.0 for i, weight in enumerate(weights) if i not in heavy)
        found.append(([tokenizer.decode([ids[i]]) for i in heavy], sorted({weights[i] for i in heavy}), len(ids)))
    return found


def test_key_tokens_are_where_a_name_parts_from_another(tokenizer):
    # "weather" and "wind" part at their second letters, which is where these two completions fork
    chosen, rejected = key_tokens(tokenizer, text_of({**GOLD, "name": "wind"}))
    assert (chosen[:2], rejected[:2]) == ((["e"], [9.0]), (["i"], [9.0]))


def test_key_tokens_before_the_fork_weigh_as_much_as_all_others(tokenizer):
    assert [side[:2] for side in key_tokens(tokenizer, changed(city="Rome", days=3))] == [([], []), ([], [])]


def test_the_first_token_of_a_call_is_a_key_token(tokenizer):
    short = text_of({"name": "w", "arguments": {}})
    chosen, rejected = key_tokens(tokenizer, "What?<|im_end|>", [{"name": "w", "arguments": {}}])
    # "w" is the beginning of both names: they part at the quote behind it
    assert chosen[0] == ["<tool_call>", '"'] and rejected[0] == []
    assert chosen[1] == [9.0] and chosen[2] == len(tokenizer(short, add_special_tokens=False)["input_ids"])


def test_many_key_tokens_weigh_less(tokenizer):
    calls = [{"name": "w", "arguments": {}}] * 3
    chosen, _ = key_tokens(tokenizer, "What?<|im_end|>", calls)
    assert len(chosen[0]) == 6 and chosen[1] == [min(9.0, (chosen[2] - 6) / 6)]


def test_key_tokens_that_the_model_did_not_write_weigh_nothing(tokenizer):
    tree = tree_of(tokenizer, "What?<|im_end|>", trained=0)
    for weights in key_token_weights(tree, tree.pairs[0], tokenizer):
        assert weights == [0.0] * len(weights)


@pytest.mark.parametrize("said", [("Sure. ", "I look it up. "), ("", "Sure. "), ("Sure. ", "")])
def test_what_is_said_before_a_call_is_not_what_is_wrong_with_it(tokenizer, said):
    ours, theirs = said
    wrong = {"name": "weather", "arguments": {"city": "Rome", "days": 3}}
    gold = [f"{ours}{text_of(GOLD)}", f"{theirs}{text_of(wrong)}"]
    completions = []
    for text in gold:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        score = score_tokens(tokenizer, ids, [GOLD], TOOLS)
        completions.append(Completion(ids, Leaf(-1, "given", errors=[e.to_leaf() for e in score.errors])))
    nodes, leaves = merge_completions(completions)
    tree = PreferenceTree("t", [1], nodes, leaves, [Pair(0, 1)], tools=TOOLS)
    chosen, rejected = pair_weights(tree, tree.pairs[0], tokenizer, WeightOptions(HEAVY, LIGHT))
    assert marked(tokenizer, tree, 0, chosen)[0] == ['"Oslo"']
    # where one of them calls at once, that is what they differ in
    assert marked(tokenizer, tree, 1, rejected)[0] == (['"'] if all(said) else [theirs[:1] or "<tool_call>"])
