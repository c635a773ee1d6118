"""The slow twin agrees with transformers' generate and with recomputation in one pass, and keeps its own rules."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from hesitant import TOOLS, asking

from ttpa.data.decisions import Decision, decisions
from ttpa.sampling.decoded import Decoded
from ttpa.sampling.head import draw_key, path_key, pick
from ttpa.sampling.options import TOP, SamplingOptions
from ttpa.sampling.reference import decode, places_of, reference_paths, whole
from ttpa.sampling.stop import Stop

NEW = 24
DEEP = SamplingOptions(
    max_depth=2, max_leaves=1000, max_new_tokens=80, min_entropy=0.01, min_probability=0.001, min_ratio=0.0005
)


@pytest.fixture
def model(tiny_model):
    """Sharper than random weights are, so that answers differ and some end before the limit."""
    with torch.no_grad():
        tiny_model.model.norm.weight.mul_(8.0)
    return tiny_model


@pytest.fixture
def prompts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 250, (n,), generator=generator).tolist() for n in (9, 31, 17, 4, 26)]


@pytest.fixture
def stop(model, tokenizer, prompts):
    """Ends at the end-of-turn token and at one that the model does write, so that answers differ in length."""
    written = generated(model, prompts[0], [tokenizer.eos_token_id])
    return Stop(tokenizer, [tokenizer.eos_token_id, written[NEW // 2]])


@pytest.fixture(scope="module")
def decision(tokenizer):
    return decisions(asking("right", "Rome"), tokenizer)[0]


def generated(model, prompt, ends, new=NEW):
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, eos_token_id=ends, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


def check_statistics(model, prompt, decoded):
    """Against all positions in one pass."""
    ids = torch.tensor([prompt + decoded.ids])
    with torch.no_grad():
        logp = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
    p, entropy = logp.exp(), -(logp.exp() * logp).sum(-1)
    expected = {
        "logps": logp.gather(1, ids[0, len(prompt) :, None])[:, 0],
        "entropy": entropy,
        "varentropy": (p * (logp + entropy[:, None]) ** 2).sum(-1),
        "top_probabilities": p.topk(TOP).values,
    }
    for name, values in expected.items():
        found = torch.tensor(np.array(getattr(decoded, name))).double()
        torch.testing.assert_close(found, values, atol=1e-4 if name == "varentropy" else 1e-5, rtol=0)
    assert decoded.top_ids.dtype == np.int64 and (decoded.top_ids[:, 0] == logp.argmax(-1).numpy()).all()


def paths_of(model, tokenizer, decision, options=None, **changes):
    """The paths by name, in order, and the dropped forks."""
    dropped = Counter()
    options = dataclasses.replace(options or SamplingOptions(), **changes)
    ends = [tokenizer.eos_token_id]
    paths = reference_paths(model, tokenizer, decision, options=options, ends=ends, dropped=dropped)
    assert len(dict(paths)) == len(paths)
    return dict(paths), dropped


def steps_of(name):
    """The forks of a branch, as (at, token)."""
    return [tuple(map(int, fork.split(":"))) for fork in name.split("/")[1:]]


def test_a_greedy_answer_equals_generate(model, prompts, stop):
    finishes = set()
    for prompt in prompts:
        steps = decode(model, prompt, key=0, stop=stop, options=SamplingOptions(max_new_tokens=NEW))
        decoded = whole(steps, stop)
        assert decoded.ids == generated(model, prompt, stop.ends)
        assert decoded.finish == ("stop" if decoded.ids[-1] in stop.ends else "length")
        check_statistics(model, prompt, decoded)
        finishes.add(decoded.finish)
    assert finishes == {"stop", "length"}


def test_a_fork_anywhere_equals_a_fresh_answer(model, prompts, stop):
    options = SamplingOptions(max_new_tokens=NEW)
    prompt = prompts[1]
    trunk = decode(model, prompt, key=0, stop=stop, options=options)
    assert len(trunk) == NEW
    for at, step in enumerate(trunk):
        forked = step._replace(token=int(step.top_id_K[1]), logp=float(np.log(step.top_probability_K[1])))
        branch = whole(decode(model, prompt, key=0, stop=stop, options=options, given=[*trunk[:at], forked]), stop)
        beginning = [*(step.token for step in trunk[:at]), forked.token]
        left = NEW - len(beginning)
        ended = forked.token in stop.ends or not left
        assert branch.ids == beginning + ([] if ended else generated(model, prompt + beginning, stop.ends, left))
        check_statistics(model, prompt, branch)


@pytest.mark.parametrize(
    "way", [{"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9}, {"temperature": 1.3, "top_k": 3, "min_p": 0.1}]
)
@pytest.mark.parametrize("mode", ["tps", "release"])
def test_every_drawn_token_is_that_of_its_path_and_position(hesitant, tokenizer, decision, mode, way):
    options = SamplingOptions(mode=mode, seed=3, max_new_tokens=80, **way)
    paths, _ = paths_of(hesitant, tokenizer, decision, options)
    assert len(paths) > 1
    for name, decoded in paths.items():
        check_statistics(hesitant, decision.prompt_ids, decoded)
        known = steps_of(name)[-1][0] + 1 if "/" in name else 0
        ids = torch.tensor([decision.prompt_ids + decoded.ids])
        with torch.no_grad():
            hidden_TH = hesitant.model(input_ids=ids).last_hidden_state[0, len(decision.prompt_ids) - 1 : -1]
        key_T = draw_key(torch.tensor(path_key(3, "right:1", name)), torch.arange(len(decoded.ids)))
        picked = pick(hidden_TH, hesitant.lm_head.weight, num_top=1, key_B=key_T, **way)
        assert decoded.ids[known:] == picked.token_B[known:].tolist()
        assert decoded.complete


def test_draws_change_with_the_seed_and_with_nothing_else(hesitant, tokenizer, decision):
    options = SamplingOptions(temperature=2.0, num_forks=0, max_new_tokens=80)
    trunks = [paths_of(hesitant, tokenizer, decision, options, seed=seed)[0]["trunk"].ids for seed in (0, 1, 2, 3, 0)]
    assert trunks[0] == trunks[-1] and len(set(map(tuple, trunks))) > 1
    forked = paths_of(hesitant, tokenizer, decision, options, num_forks=8, max_leaves=3, max_depth=2)[0]
    assert forked["trunk"].ids == trunks[0] and len(forked) == 3


def test_a_filter_that_would_keep_more_tokens_than_are_known_is_told(tiny_model, tokenizer):
    flat = Decision("flat", 0, [], [], [], [1, 2, 3], [], {})
    options = SamplingOptions(mode="release", num_samples=2, max_new_tokens=3)
    assert not any(d.complete for d in paths_of(tiny_model, tokenizer, flat, options, top_p=0.99)[0].values())
    assert all(d.complete for d in paths_of(tiny_model, tokenizer, flat, options, top_k=64)[0].values())


def test_release_draws_independent_samples_at_temperature_1(hesitant, tokenizer, decision):
    paths, _ = paths_of(hesitant, tokenizer, decision, mode="release", num_samples=16, max_leaves=2)
    assert list(paths) == [f"sample {i}" for i in range(16)]
    calls = Counter(tokenizer.decode(decoded.ids).split('"')[3] for decoded in paths.values())
    assert 8 <= calls["weather"] < 16 and calls["time"] > 0
    ids = [decoded.ids for decoded in paths.values()]
    fewer, _ = paths_of(hesitant, tokenizer, decision, mode="release", num_samples=3, temperature=1.0)
    assert [decoded.ids for decoded in fewer.values()] == ids[:3]


@pytest.mark.parametrize("order", ["best", "first"])
def test_branches_come_level_by_level_and_behind_their_own_fork(hesitant, tokenizer, decision, order):
    paths, dropped = paths_of(hesitant, tokenizer, decision, DEEP, fork_order=order, num_forks=2)
    assert not dropped
    names = list(paths)
    expected = ["trunk"]
    for name in names:  # grows while it is gone through: the order of parents is that of the paths themselves
        if len(steps_of(name)) < DEEP.max_depth:
            first = steps_of(name)[-1][0] + 1 if "/" in name else 0
            options = dataclasses.replace(DEEP, fork_order=order, num_forks=2)
            places = places_of(tokenizer, paths[name], decision.tools, options=options, first=first)
            if order == "best":
                places.sort(key=lambda place: -place.score)
            expected += [f"{name}/{place.at}:{token}" for place in places for token, _ in place.alternatives]
            assert len(places) <= 2 and all(place.at >= first for place in places)
    assert names == expected and {len(steps_of(name)) for name in names} == {0, 1, 2}
    for name, decoded in paths.items():
        check_statistics(hesitant, decision.prompt_ids, decoded)
        if name != "trunk":
            parent, (at, token) = paths[name.rpartition("/")[0]], steps_of(name)[-1]
            assert decoded.ids[: at + 1] == [*parent.ids[:at], token] and parent.ids[at] != token


def test_fork_order_first_reads_no_more_than_was_written(tokenizer):
    """The tag is spelled, so until it is complete it cannot be told from the text of a call that was not closed."""
    parts = ['<tool_call>{"name": "time", "arg', "</tool", "_call>"]
    ids = [token for part in parts for token in tokenizer(part, add_special_tokens=False)["input_ids"]]
    n = len(ids)
    other = [5 if token != 5 else 6 for token in ids]
    even, unsure = np.full((n, 2), 0.5, np.float32), [float(i + 1) for i in range(n)]
    path = Decoded(ids, "length", [-0.7] * n, unsure, unsure, np.array([ids, other]).T, even)

    def places(order, num_forks):
        options = SamplingOptions(fork_order=order, num_forks=num_forks)
        return places_of(tokenizer, path, TOOLS, options=options, first=3)

    assert [place.at for place in places("best", n)] == list(range(3, n - len("</tool_call>")))
    assert [place.at for place in places("first", n)] == list(range(3, n - 1))
    assert {place.field for place in places("first", n)[-10:]} == {"other"}
    assert [place.at for place in places("first", 4)] == [3, 4, 5, 6]
    assert [place.at for place in places("best", 4)] != [3, 4, 5, 6]


def test_leaves_are_handed_out_in_order(hesitant, tokenizer, decision):
    every, _ = paths_of(hesitant, tokenizer, decision, DEEP)
    assert Counter(len(steps_of(name)) for name in every)[1] > 2
    for leaves in (2, 3, len(every) - 1, len(every)):
        paths, dropped = paths_of(hesitant, tokenizer, decision, DEEP, max_leaves=leaves)
        assert list(paths) == list(every)[:leaves]
        assert all(decoded.ids == every[name].ids for name, decoded in paths.items())
        assert bool(dropped["leaves"]) == (leaves < len(every)) and set(dropped) <= {"leaves"}


def test_new_tokens_are_promised_and_what_is_not_used_is_free_for_the_next_level(hesitant, tokenizer, decision):
    new = DEEP.max_new_tokens
    every, _ = paths_of(hesitant, tokenizer, decision, DEEP)
    trunk = len(every["trunk"].ids)
    level = [name for name in every if len(steps_of(name)) == 1]
    at = [steps_of(name)[0][0] for name in level]
    assert trunk < new and at[0] == at[1] < at[-1]
    one, last = new - at[0] - 1, new - at[-1] - 1

    def names(budget, **changes):
        paths, dropped = paths_of(hesitant, tokenizer, decision, DEEP, max_tree_tokens=budget, **changes)
        own = [len(d.ids) - (steps_of(name)[-1][0] + 1 if "/" in name else 0) for name, d in paths.items()]
        assert sum(own) <= budget and set(dropped) <= {"tokens"}
        return list(paths), dropped["tokens"]

    assert names(trunk + last - 1) == (["trunk"], len(level))
    assert names(trunk + last, max_depth=1) == (["trunk", level[-1]], len(level) - 1), "a later one needs less"
    assert names(trunk + one, max_depth=1) == (["trunk", level[0]], len(level) - 1)
    assert names(trunk + one + last - 1, max_depth=1) == (["trunk", level[0]], len(level) - 1)
    assert names(trunk + one + last, max_depth=1) == (["trunk", level[0], level[-1]], len(level) - 2)
    all_promised = trunk + sum(new - position - 1 for position in at)
    found, refused = names(all_promised)
    assert found[: 1 + len(level)] == ["trunk", *level]
    assert len(steps_of(found[-1])) == 2 and refused > 0, "branches that ended early leave room for others"


@pytest.mark.parametrize("text", ["</tool_call>", 'Rome"', '{"'])
def test_a_stop_text_ends_every_path_that_writes_it(hesitant, tokenizer, decision, text):
    every, _ = paths_of(hesitant, tokenizer, decision)
    paths, _ = paths_of(hesitant, tokenizer, decision, stop=text)
    assert len(paths) > 1 or text == '{"'
    for name, decoded in paths.items():
        written = tokenizer.decode(every[name].ids)
        end = written.find(text)
        expected = written if end < 0 else written[: end + len(text)]
        assert (tokenizer.decode(decoded.ids), decoded.finish) == (expected, "stop")
        assert len(decoded.logps) == len(decoded.entropy) == len(decoded.top_ids) == len(decoded.ids)


def test_a_fork_with_an_end_or_at_the_limit_writes_nothing(hesitant, tokenizer, decision):
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("t")]
    paths = dict(reference_paths(hesitant, tokenizer, decision, options=SamplingOptions(), ends=ends))
    assert (paths["trunk/12:83"].ids[-1], paths["trunk/12:83"].finish, len(paths["trunk/12:83"].ids)) == (
        83,
        "stop",
        13,
    )
    paths, _ = paths_of(hesitant, tokenizer, decision, max_new_tokens=13)
    assert (paths["trunk/12:83"].ids[-1], paths["trunk/12:83"].finish, len(paths["trunk/12:83"].ids)) == (
        83,
        "length",
        13,
    )


def test_the_mode_of_the_model_is_kept(model, prompts, stop):
    model.train()
    decode(model, prompts[0], key=0, stop=stop, options=SamplingOptions(max_new_tokens=2))
    assert model.training
