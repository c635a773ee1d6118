"""The benchmark of the sampler: its models, its prompts, and what it counts."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench import decode_rate, sample
from bench.prompts import TEXT, make_prompts
from bench.samplers import SIDES, Setting, drawn_outcome, run
from bench.widened import EMBEDDED, QWEN_05B, QWEN_15B, Shape, widened
from ttpa.construct import construct_dialogues
from ttpa.data.decisions import decisions
from ttpa.embedded import MODEL_DIR
from ttpa.sampling import SamplingOptions, sample_trees

ODD = Shape(
    hidden_size=192,
    num_hidden_layers=6,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=128,
    intermediate_size=500,
    vocab_size=1300,
)
TINY = sample.Cell(EMBEDDED, 300, "own", dialogues=1, rounds=2)


@pytest.fixture(scope="module")
def small():
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def words():
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def some(words):
    return [decisions(dialogue, words)[0] for dialogue in construct_dialogues(3, split="preference", seed=3)]


@pytest.fixture(scope="module")
def tiny():
    setting, chosen = sample.prepare(dataclasses.replace(TINY, dialogues=4))
    return dataclasses.replace(setting, leaves=4, max_new_tokens=64), chosen[2:]


@torch.no_grad()
def logps(model, ids):
    return model(input_ids=torch.tensor([ids])).logits[0].log_softmax(dim=-1)


@pytest.mark.parametrize("shape", [EMBEDDED, ODD])
def test_a_widened_model_computes_the_same(small, words, some, shape):
    wide = widened(small, shape)
    for decision in some:
        ids = decision.prompt_ids + decision.gold_ids
        expected, found = logps(small, ids), logps(wide, ids)
        torch.testing.assert_close(found[:, : len(words)], expected, atol=1e-4, rtol=0)
        assert found[:, len(words) :].max() < -100, "a blank must never be likely"
        prompt = torch.tensor([decision.prompt_ids])
        answers = [m.generate(prompt, do_sample=False, max_new_tokens=64).tolist() for m in (small, wide)]
        assert answers[0] == answers[1] and answers[0][0][-1] == words.eos_token_id


def test_blanks_change_nothing_but_the_length(small, words, some):
    wide = widened(small, EMBEDDED)
    blanks = torch.randint(len(words), EMBEDDED.vocab_size, (900,)).tolist()
    for decision in some:
        ids = decision.prompt_ids + decision.gold_ids
        found = logps(wide, blanks + ids)[len(blanks) :, : len(words)]
        torch.testing.assert_close(found, logps(small, ids), atol=1e-3, rtol=0)  # angles of RoPE are rounded in fp32


def test_a_shape_that_is_too_small_is_refused(small):
    for change in ({"hidden_size": 129}, {"head_dim": 32}, {"head_dim": 80}, {"num_attention_heads": 2}):
        with pytest.raises(ValueError, match="cannot hold the model"):
            widened(small, dataclasses.replace(EMBEDDED, **change))


def test_the_large_shapes_have_the_size_of_their_names():
    for shape, parameters in ((QWEN_05B, 0.49e9), (QWEN_15B, 1.54e9)):
        H, D = shape.hidden_size, shape.head_dim
        layer = 2 * D * H * (shape.num_attention_heads + shape.num_key_value_heads) + 3 * H * shape.intermediate_size
        assert math.isclose(shape.num_hidden_layers * layer + shape.vocab_size * H, parameters, rel_tol=0.01)


def test_prompts_have_the_length_and_begin_as_they_should(words):
    sizes = {"length": 700, "vocab_size": EMBEDDED.vocab_size}
    own = make_prompts(words, 4, workload="own", **sizes)
    assert {len(decision.prompt_ids) for decision in own} == {700}
    assert len({decision.prompt_ids[0] for decision in own}) == len({decision.dialogue for decision in own}) == 4
    shared = make_prompts(words, 4, workload="shared", **sizes)
    assert max(len(decision.prompt_ids) for decision in shared) == 700
    common = [len(set(column)) == 1 for column in zip(*(d.prompt_ids for d in shared), strict=False)].index(False)
    assert common > 400 and len({str(decision.tools) for decision in shared}) == 1
    for decision in own + shared:
        text = [token for token in decision.prompt_ids if token < len(words)]
        assert decision.prompt_ids[-len(text) :] == text and len(text) <= TEXT
    assert make_prompts(words, 4, workload="shared", **sizes) == shared


def test_sides_work_on_the_same_and_are_counted_alike(tiny):
    setting, chosen = tiny
    outcomes = {name: run(side, setting, chosen, seed=0) for name, side in SIDES.items()}
    ours, twin = outcomes["ttpa"], outcomes["slow twin"]
    assert (ours.pairs, ours.decoded) == (twin.pairs, twin.decoded)
    assert ours.details["forks"], "so that shared beginnings were counted"
    prompts, drawn = sum(len(decision.prompt_ids) for decision in chosen), setting.leaves * len(chosen)
    for name in ("generate", "continuous"):
        peer = outcomes[name]
        assert 10 * drawn < peer.decoded <= setting.max_new_tokens * drawn
        assert run(SIDES[name], setting, chosen, seed=1).decoded != peer.decoded, "answers are drawn"
    assert outcomes["generate"].computed > setting.leaves * prompts, "every answer computes its prompt again"
    assert prompts < outcomes["continuous"].computed < 2 * prompts + outcomes["continuous"].decoded
    report = ours.details
    assert report["prefilled_tokens"] < ours.computed <= prompts + ours.decoded + report["verified_tokens"] + 10


def test_pairs_of_a_peer_are_those_that_the_sampler_would_make(small, words):
    """Fed the answers of a tree one by one, the count is the number of its pairs."""
    dialogues = construct_dialogues(3, split="preference", seed=5)
    setting = Setting.of(widened(small, EMBEDDED), words)
    trees, report = sample_trees(setting.model, words, dialogues, options=SamplingOptions(max_leaves=8))
    found = {decision.id: decision for dialogue in dialogues for decision in decisions(dialogue, words)}
    assert report.pairs > 0
    for tree in trees:
        answers = [tree.completion_ids(i) for i, leaf in enumerate(tree.leaves) if leaf.kind != "gold"]
        padded = [[*ids, words.pad_token_id] for ids in answers]  # as generate pads them
        outcome = drawn_outcome(setting, [found[tree.id]], [padded])
        assert (outcome.pairs, outcome.decoded) == (len(tree.pairs), sum(map(len, answers)))


def test_the_command_writes_what_it_prints(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sample.CELLS, "tiny", TINY)
    threads = str(torch.get_num_threads())
    path = tmp_path / "sample.json"
    assert sample.main(["--cells", "tiny", "--threads", threads, "--json", str(path)]) == 0
    (cell,) = json.loads(path.read_text())["cells"]
    assert cell["prompt"] == 300 and cell["shape"]["hidden_size"] == EMBEDDED.hidden_size and not cell["failed"]
    assert set(cell["sides"]) == set(SIDES) and set(cell["compared"]) == {"ttpa", "ttpa, low"}
    for entry in cell["sides"].values():
        assert len(entry["rounds"]) == 2
        for name in ("seconds", "pairs", "decoded", "computed", "passes"):
            assert entry[name] == pytest.approx(sum(one[name] for one in entry["rounds"]))
        assert entry["pairs_per_second"] == pytest.approx(entry["pairs"] / entry["seconds"])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("tiny ") for line in lines) == len(SIDES) + 2


def test_ours_is_compared_with_the_better_peer():
    def side(pairs, seconds, decoded):
        return sample._summary([{"seconds": seconds, "pairs": pairs, "decoded": decoded, "computed": 0, "passes": 0}])

    sides = {"ttpa": side(10, 1.0, 100), "generate": side(4, 2.0, 400), "continuous": side(2, 2.0, 100)}
    assert sample.compare(sides) == {"faster": 5.0, "fewer_tokens": 5.0}
    nothing = {"ttpa": side(10, 1.0, 100), "generate": side(0, 1.0, 50)}
    assert sample.compare(nothing) == {"faster": None, "fewer_tokens": None}


def test_the_rate_is_that_of_full_passes():
    counts = [1, *range(9, 100, 8), 101, 103]  # a prompt's first token, 12 passes of 8 rows, then rows that ended
    slow = [(10.0 * i, count) for i, count in enumerate(counts[:5])]  # compiling
    marks = slow + [(40.0 + 0.5 * (i - 4), count) for i, count in enumerate(counts[5:], start=5)]
    assert decode_rate.rate(marks, 8) == pytest.approx(16.0)
    with pytest.raises(RuntimeError, match="too few passes"):
        decode_rate.rate(marks[:5], 8)


def test_a_pass_reads_each_prompt_once(tiny):
    model = tiny[0].model
    weights = 4 * sum(p.numel() for p in model.parameters())
    token = 4 * 2 * 2 * 64 * 4  # layers, keys and values, heads, width, bytes
    assert decode_rate.pass_bytes(model, rows=6, prompts=2, prompt=300, own=5) == weights + token * (2 * 300 + 6 * 5)


def test_every_side_tells_when_it_wrote_its_tokens(tiny):
    setting, chosen = tiny
    setting = dataclasses.replace(setting, leaves=2, rows=4, max_new_tokens=12)
    for name, measured in decode_rate.SIDES.items():
        marks = measured(setting, chosen)
        assert marks == sorted(marks) and marks[-1][1] == 4 * 12, name
        assert decode_rate.rate(marks, rows=4) > 0
