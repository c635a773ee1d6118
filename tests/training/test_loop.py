from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from random_trees import random_tree

from ttpa.errors import InputError
from ttpa.esm.weights import WeightOptions, pair_weights
from ttpa.losses import token_dpo_loss
from ttpa.model import packed_logps, use_tree_attention
from ttpa.training.batches import likelihood_examples, packs, plan_steps, preference_examples
from ttpa.training.config import TrainConfig
from ttpa.training.loop import gradient, train_round
from ttpa.training.optimizer import learning_rate, make_optimizer
from ttpa.trees.pack import pack_trees
from ttpa.trees.record import Pair

CONFIG = TrainConfig(
    learning_rate=1e-3,
    beta=0.1,
    sft_weight=0.0,
    error_weight=2.0,
    follow_weight=0.5,
    batch_size=8,
    max_steps=3,
    logging_steps=1,
)
TREES = [random_tree(seed) for seed in range(6)]


def examples_of(trees, tokenizer, loss_type):
    if loss_type == "sft":
        return likelihood_examples(trees)
    return preference_examples(trees, tokenizer=tokenizer, options=WeightOptions(2.0, 0.5))


@pytest.fixture
def policy(tiny_model):
    return use_tree_attention(tiny_model)


@pytest.mark.parametrize(("loss_type", "sft_weight"), [("sigmoid", 0.0), ("sigmoid", 3.0), ("ipo", 0.0), ("sft", 0.0)])
def test_a_step_does_not_depend_on_how_it_is_cut(policy, tokenizer, loss_type, sft_weight):
    reference = None if loss_type == "sft" else copy.deepcopy(policy).requires_grad_(False)
    with torch.no_grad():  # so that the margins are not 0
        for parameter in policy.parameters():
            parameter.mul_(1.05)
    examples = examples_of(TREES, tokenizer, loss_type)
    found = []
    for pack_tokens in (10_000, 100, 1):
        policy.zero_grad()
        config = replace(CONFIG, loss_type=loss_type, sft_weight=sft_weight, pack_tokens=pack_tokens)
        metrics, tokens = gradient(policy, reference, examples, config=config)
        found.append((metrics, tokens, torch.cat([p.grad.flatten() for p in policy.parameters()])))
    for metrics, tokens, grad in found[1:]:
        # rewards are differences of log-probabilities, which are fp32
        assert metrics == pytest.approx(found[0][0], rel=1e-5, abs=1e-7) and tokens == found[0][1]
        assert (grad - found[0][2]).norm() < 1e-5 * found[0][2].norm()


@pytest.mark.parametrize("loss_type", ["sigmoid", "robust", "hinge", "ipo"])
def test_a_step_has_the_weights_and_the_options_of_its_loss(policy, tokenizer, loss_type):
    tree = random_tree(0)
    tree.leaves[2].errors = [{"code": "value.wrong", "call": 0, "pointer": "/a", "tokens": [0, 3]}]
    reference = copy.deepcopy(policy).requires_grad_(False)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.05)
    smoothing = 0.2 if loss_type in ("sigmoid", "robust") else 0.0
    config = replace(CONFIG, loss_type=loss_type, beta=0.3, label_smoothing=smoothing)
    metrics, _ = gradient(policy, reference, examples_of([tree], tokenizer, loss_type), config=config)

    weights = [[pair_weights(tree, pair, tokenizer, WeightOptions(2.0, 0.5)) for pair in tree.pairs]]
    assert {2.0, 0.5} <= {weight for pair in weights[0] for side in pair for weight in side}
    batch = pack_trees([tree], weights=weights, average=loss_type == "ipo")
    with torch.no_grad():
        logps = [packed_logps(model, batch, report=False) for model in (policy, reference)]
    options = {"loss_type": loss_type, "beta": 0.3, "label_smoothing": smoothing}
    want, weighted = token_dpo_loss(logp_R=logps[0], ref_logp_R=logps[1], C=batch.C, **options)
    assert metrics["loss"] == pytest.approx(want.item(), rel=1e-6)
    assert weighted["rewards/weighted_margins"] == pytest.approx(metrics["rewards/weighted_margins"], rel=1e-6)


def test_the_likelihood_term_is_the_mean_over_chosen_tokens(policy, tokenizer):
    tree = random_tree(3, num_leaves=4)
    tree.pairs = [Pair(2, 0), Pair(2, 1), Pair(3, 1)]
    chosen = [tree.completion_ids(pair.chosen) for pair in tree.pairs]
    rows = {tuple(ids[: at + 1]) for ids in chosen for at in range(len(ids))}  # a shared token counts once
    want = 0.0
    for prefix in rows:
        ids = torch.tensor([tree.prompt_ids + list(prefix)])
        logp = policy(input_ids=ids, use_cache=False).logits[0, -2].log_softmax(dim=-1)
        want -= logp[prefix[-1]].item() / len(rows)
    reference = copy.deepcopy(policy).requires_grad_(False)
    examples = examples_of([tree], tokenizer, "sigmoid")
    metrics, _ = gradient(policy, reference, examples, config=replace(CONFIG, sft_weight=3.0))
    assert metrics["loss/sft"] == pytest.approx(want, rel=1e-5)
    assert metrics["loss/preference"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["loss"] == pytest.approx(metrics["loss/preference"] + 3 * want, rel=1e-5)


def test_sft_is_the_mean_over_the_tokens_of_distinct_chosen_leaves(policy):
    tree = random_tree(3, num_leaves=4)
    tree.pairs = [Pair(2, 0), Pair(2, 1), Pair(3, 1)]
    want, count = 0.0, 0
    for leaf in (2, 3):
        ids = torch.tensor([tree.prompt_ids + tree.completion_ids(leaf)])
        number = len(tree.completion_ids(leaf))
        logp = policy(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(dim=-1)
        want -= logp.gather(1, ids[0, 1:, None])[-number:].sum().item()
        count += number
    metrics, _ = gradient(policy, None, likelihood_examples([tree]), config=replace(CONFIG, loss_type="sft"))
    assert metrics == {"loss": pytest.approx(want / count, rel=1e-5)}


@pytest.mark.parametrize("loss_type", ["sigmoid", "robust", "hinge", "ipo", "sft"])
def test_training_lowers_the_loss_from_its_known_start(policy, tokenizer, loss_type):
    lines = []
    config = replace(CONFIG, loss_type=loss_type, max_steps=12, batch_size=100)
    done = train_round(policy, tokenizer, TREES, config=config, log=lines.append, seed=0)
    assert (done["steps"], len(lines)) == (12, 12) and done["tokens"] == lines[-1]["num_tokens"]
    starts = {"sigmoid": math.log(2), "robust": math.log(2), "hinge": 1.0, "ipo": (0.5 / 0.1) ** 2}
    if loss_type in starts:
        assert lines[0]["loss"] == pytest.approx(starts[loss_type], abs=1e-6 * starts[loss_type])
        assert lines[0]["rewards/margins"] == 0 < lines[-1]["rewards/margins"]
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_the_log_holds_means_since_its_last_line(policy, tokenizer):
    every, some = [], []
    other = copy.deepcopy(policy)
    config = replace(CONFIG, max_steps=5)
    train_round(policy, tokenizer, TREES, config=config, log=every.append, seed=0)
    train_round(other, tokenizer, TREES, config=replace(config, logging_steps=3), log=some.append, seed=0)
    assert [line["step"] for line in some] == [1, 3, 5]
    for name in ("loss", "grad_norm", "rewards/margins"):
        values = [line[name] for line in every]
        assert [line[name] for line in some] == pytest.approx(
            [values[0], sum(values[1:3]) / 2, sum(values[3:]) / 2], rel=1e-4, abs=1e-9
        )


def test_the_gradient_is_clipped(policy, tokenizer):
    start = copy.deepcopy(policy)
    config = replace(CONFIG, max_steps=1, max_grad_norm=1e-12)  # far below AdamW's eps, so nothing moves
    train_round(policy, tokenizer, TREES, config=config, log=lambda line: None, seed=0)
    for old, new in zip(start.parameters(), policy.parameters(), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=1e-5)


def test_a_model_that_does_not_compute_the_same_twice_is_refused(policy, tokenizer):
    policy.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: output + torch.randn(32))
    with pytest.raises(InputError, match="not ln 2"):
        train_round(policy, tokenizer, TREES, config=CONFIG, log=lambda line: None, seed=0)


def test_a_loss_that_is_not_finite_stops_the_run(policy, tokenizer):
    with torch.no_grad():
        policy.model.norm.weight.fill_(math.nan)
    with pytest.raises(InputError, match="step 1: the loss is nan"):
        train_round(policy, tokenizer, TREES, config=CONFIG, log=lambda line: None, seed=0)


def test_bf16_starts_at_ln_2_as_well(policy, tokenizer):
    lines = []
    train_round(policy, tokenizer, TREES, config=replace(CONFIG, bf16=True), log=lines.append, seed=0)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-7) and lines[-1]["rewards/margins"] != 0
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    (pack,) = packs(examples_of(TREES, tokenizer, "sigmoid"), pack_tokens=10_000, average=False)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rounded = packed_logps(policy, pack)
    with torch.no_grad():
        exact = packed_logps(policy, pack)
    assert 0 < (rounded - exact).abs().max() < 0.1


def test_the_loop_is_adamw_step_by_step(policy, tokenizer):
    config = replace(CONFIG, warmup_ratio=0.5, weight_decay=0.3, max_grad_norm=0.5)
    reference, plain = (copy.deepcopy(policy) for _ in range(2))
    lines = []
    train_round(policy, tokenizer, TREES, config=config, log=lines.append, seed=4)

    examples = examples_of(TREES, tokenizer, "sigmoid")
    steps = plan_steps([len(t.pairs) for t in TREES], batch_size=8, num_epochs=1, max_steps=3, seed=4)
    optimizer = make_optimizer(plain, config=config)
    for step, (_, batch) in enumerate(steps):
        optimizer.zero_grad()
        metrics, _ = gradient(plain, reference, [examples[i] for i in batch], config=config)
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5).item()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total=3, config=config)
        optimizer.step()
        assert lines[step]["loss"] == pytest.approx(metrics["loss"], rel=1e-6)
        assert lines[step]["grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert lines[step]["learning_rate"] == learning_rate(step, total=3, config=config)
    for got, want in zip(policy.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
