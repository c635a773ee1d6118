from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from random_trees import random_tree

from ttpa.errors import InputError
from ttpa.esm.weights import WeightOptions, pair_weights
from ttpa.losses import token_dpo_loss
from ttpa.model import packed_logps, use_tree_attention
from ttpa.training.checkpoint import Checkpoints
from ttpa.training.config import TrainConfig
from ttpa.training.flops import ModelShape
from ttpa.training.loop import Run, accumulate, lay_out, train_round
from ttpa.training.monitor import Monitor
from ttpa.training.optimizer import learning_rate, make_optimizer
from ttpa.training.policy import Policy
from ttpa.training.run_folder import RunFolder
from ttpa.training.setup import References, make_objective, make_round
from ttpa.training.stop import STOPPED, StopSignal
from ttpa.trees.pack import Term, pack_trees
from ttpa.trees.record import Pair
from ttpa.world import World

TREES = [random_tree(seed) for seed in range(6)]


@pytest.fixture
def model(tiny_model):
    return use_tree_attention(tiny_model)


@pytest.fixture
def config(tmp_path):
    return TrainConfig(
        output=tmp_path / "run",
        model="tiny",
        learning_rate=1e-3,
        error_weight=2.0,
        follow_weight=0.5,
        batch_size=8,
        max_steps=3,
        logging_steps=1,
        save_steps=0,
    )


def start(model, trees, config, tokenizer, *, eval_trees=()):
    """The policy, the round and the run that `train_round` takes, as the command makes them."""
    folder, world, objective = RunFolder(config.output), World(), make_objective(config)
    policy = Policy(model, bf16=config.bf16)
    references = References(config=config, tokenizer=tokenizer, world=world, folder=config.output / "reference")
    round = make_round(
        1,
        trees,
        policy,
        eval_trees=eval_trees,
        config=config,
        objective=objective,
        references=references,
        key=references.key(model),
        begun=False,
    )
    checkpoints = Checkpoints(config.output / "checkpoints", world=world, fingerprint={})
    run = Run(config, world, objective, Monitor(folder, logging_steps=config.logging_steps), checkpoints, StopSignal())
    return policy, round, run


def train(model, config, tokenizer, trees=TREES, **options):
    """Train and return the run and its lines of metrics.jsonl."""
    policy, round, run = start(model, trees, config, tokenizer, **options)
    with run.monitor:
        train_round(policy, make_optimizer(policy, config=config), round, run)
    return run, [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]


def gradient_of(policy, round, run):
    """Metrics and gradient of one step over all examples."""
    policy.zero_grad()
    shape = ModelShape.of(policy.model)
    metrics, work = accumulate(policy, lay_out(round.examples, shape, run), round, run, shape=shape, report=True)
    grads = [p.grad for p in policy.parameters() if p.grad is not None]
    return metrics, work, torch.cat([grad.flatten() for grad in grads])


def disturb(model):
    """So that the margins are not 0."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)


@pytest.mark.parametrize(
    "loss_type", ["ttpa", "ttpa,sft", "ipo", "sft", "nca_pair", "tdpo2", "confpo", "simpo,sft", "likelihood"]
)
def test_a_step_does_not_depend_on_how_it_is_cut(model, config, tokenizer, loss_type):
    found = []
    weights = "1,3" if "," in loss_type else None
    for pack_tokens in (10_000, 60, 1):  # one pack, several, and every tree cut into its pairs
        cut = replace(config, loss_type=loss_type, loss_weights=weights, pack_tokens=pack_tokens)
        policy, round, run = start(copy.deepcopy(model), TREES, cut, tokenizer)
        disturb(policy.model)
        found.append(gradient_of(policy, round, run))
    (metrics, work, grad), *others = found
    for other, other_work, other_grad in others:
        # rewards are differences of log-probabilities, which are fp32
        assert other == pytest.approx(metrics, rel=1e-5, abs=2e-6) and other_work.pairs == work.pairs
        assert (other_grad - grad).norm() < 1e-5 * grad.norm()


@pytest.mark.parametrize("loss_type", ["ttpa", "sigmoid", "robust", "hinge", "ipo"])
def test_a_step_has_the_weights_and_the_options_of_its_loss(model, config, tokenizer, loss_type):
    tree = random_tree(0)
    tree.leaves[2].errors = [{"code": "value.wrong", "call": 0, "pointer": "/a", "tokens": [0, 3]}]
    smoothing = 0.2 if loss_type in ("sigmoid", "ttpa", "robust") else 0.0
    config = replace(config, loss_type=loss_type, beta=0.3, label_smoothing=smoothing, token_weights="errors")
    reference = copy.deepcopy(model)
    policy, round, run = start(model, [tree], config, tokenizer)
    disturb(model)
    metrics, _, grad = gradient_of(policy, round, run)

    weights = [pair_weights(tree, pair, tokenizer, WeightOptions(2.0, 0.5)) for pair in tree.pairs]
    assert {2.0, 0.5} <= {weight for pair in weights for side in pair for weight in side}
    if loss_type == "ipo":
        weights = [tuple([w / sum(side) for w in side] for side in pair) for pair in weights]
    batch = pack_trees([tree], terms=[Term([weights])])
    model.zero_grad()
    logps = [packed_logps(model, batch, report=False), packed_logps(reference, batch, report=False).detach()]
    options = {"loss_type": "sigmoid" if loss_type == "ttpa" else loss_type, "beta": 0.3, "label_smoothing": smoothing}
    want, weighted = token_dpo_loss(logp_R=logps[0], ref_logp_R=logps[1], C=batch.C, **options)
    want.backward()
    want_grad = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert (grad - want_grad).norm() < 1e-5 * want_grad.norm()
    assert metrics["loss"] == pytest.approx(want.item(), rel=1e-6)
    assert weighted["rewards/weighted_margins"] == pytest.approx(metrics["rewards/weighted_margins"], rel=1e-5)


def test_the_likelihood_term_is_the_mean_over_chosen_tokens(model, config, tokenizer):
    tree = random_tree(3, num_leaves=4)
    tree.pairs = [Pair(2, 0), Pair(2, 1), Pair(3, 1)]
    chosen = [tree.completion_ids(pair.chosen) for pair in tree.pairs]
    rows = {tuple(ids[: at + 1]) for ids in chosen for at in range(len(ids))}  # a shared token counts once
    want = 0.0
    for prefix in rows:
        ids = torch.tensor([tree.prompt_ids + list(prefix)])
        logp = model(input_ids=ids, use_cache=False).logits[0, -2].log_softmax(dim=-1)
        want -= logp[prefix[-1]].item() / len(rows)
    for loss_type, weights in (("ttpa,sft", "1,3"), ("sft", "3")):
        run = start(model, [tree], replace(config, loss_type=loss_type, loss_weights=weights), tokenizer)
        metrics, _, _ = gradient_of(*run)
        assert metrics["loss"] == pytest.approx((math.log(2) if "ttpa" in loss_type else 0) + 3 * want, rel=1e-5)
    assert "rewards/margins" not in metrics


@pytest.mark.parametrize("loss_type", ["ttpa", "robust", "hinge", "ipo", "sft", "apo_zero", "tdpo1"])
def test_training_lowers_the_loss_from_its_known_start(model, config, tokenizer, loss_type):
    run, lines = train(model, replace(config, loss_type=loss_type, max_steps=12, batch_size=100), tokenizer)
    assert (run.done["steps"], len(lines)) == (12, 12) and run.done["tokens"] == lines[-1]["num_tokens"]
    starts = {name: math.log(2) for name in ("ttpa", "robust", "tdpo1")} | {"hinge": 1.0, "ipo": (0.5 / 0.1) ** 2}
    if loss_type in starts:
        assert lines[0]["loss"] == pytest.approx(starts[loss_type], abs=1e-6 * starts[loss_type])
        assert abs(lines[0]["rewards/margins"]) < 1e-6 < lines[-1]["rewards/margins"]
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_the_log_holds_means_since_its_last_line(model, config, tokenizer, tmp_path):
    config = replace(config, max_steps=5)
    _, every = train(copy.deepcopy(model), config, tokenizer)
    _, some = train(model, replace(config, logging_steps=3, output=tmp_path / "some"), tokenizer)
    assert [line["step"] for line in some] == [1, 3, 5]
    for name in ("loss", "grad_norm", "rewards/weighted_margins"):
        values = [line[name] for line in every]
        means = [values[0], sum(values[1:3]) / 2, sum(values[3:]) / 2]
        assert [line[name] for line in some] == pytest.approx(means, rel=1e-4, abs=1e-9)
    # what takes all rows is measured at the steps that end with a line
    values = [line["rewards/chosen"] for line in every]
    assert [line["rewards/chosen"] for line in some] == pytest.approx([values[0], values[2], values[4]], rel=1e-4)


def test_the_gradient_is_clipped(model, config, tokenizer):
    before = copy.deepcopy(model)
    train(model, replace(config, max_steps=1, max_grad_norm=1e-12), tokenizer)  # far below AdamW's eps
    for old, new in zip(before.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=1e-5)


def test_a_model_that_does_not_compute_the_same_twice_is_refused(model, config, tokenizer):
    def noisy(module, inputs, output):
        return output + torch.randn(32)

    model.model.layers[0].mlp.register_forward_hook(noisy)
    with pytest.raises(InputError, match=r"packed log-probabilities of tree .* are off"):
        train(model, config, tokenizer)
    lines = train(model, replace(config, selfcheck=False), tokenizer)[1]
    assert abs(lines[0]["loss"] - math.log(2)) > 1e-4


def test_a_reference_of_another_model_is_found_at_the_first_step(model, config, tokenizer):
    policy, round, run = start(model, TREES, config, tokenizer)
    disturb(model)
    with pytest.raises(InputError, match=r"the first loss is .* and not 0\.6931472"), run.monitor:
        train_round(policy, make_optimizer(policy, config=config), round, run)


def test_a_step_that_is_not_finite_is_left_out_and_written_down(model, config, tokenizer):
    config = replace(config, max_steps=4, max_skipped_steps=1)
    policy, round, run = start(model, TREES, config, tokenizer)
    bad = round.steps(config)[1][1][0]
    round.examples[bad].logps[:] = math.nan
    losses = []
    with run.monitor, pytest.raises(InputError, match="2 steps were left out") as problem:
        train_round(policy, make_optimizer(policy, config=config), round, run)
    lines = [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses[1] is None
    records = [json.loads(line) for line in (config.output / "skipped_steps.jsonl").read_text().splitlines()]
    assert records[0]["step"] == 2 and round.examples[bad].tree.id in records[0]["trees"]
    assert "skipped_steps.jsonl" in str(problem.value)
    run.restore({"done": run.done, "skipped": 1, "reference": ""})  # from a checkpoint between the two
    assert (config.output / "skipped_steps.jsonl").read_text().splitlines() == [json.dumps(records[0])]
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_model_of_nan_stops_the_run(model, config, tokenizer):
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    with pytest.raises(InputError, match="log-probability that is not finite"):
        train(model, config, tokenizer)


def test_bf16_starts_near_ln_2_as_well(model, config, tokenizer):
    _, lines = train(model, replace(config, bf16=True), tokenizer)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=5e-3) and lines[-1]["rewards/margins"] != 0
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    pack = pack_trees(TREES)
    rounded, exact = (Policy(model, bf16=bf16).logps(pack) for bf16 in (True, False))
    assert 0 < (rounded - exact).abs().max() < 0.1


def test_the_loop_is_adamw_step_by_step(model, config, tokenizer, tmp_path):
    config = replace(config, warmup_ratio=0.5, weight_decay=0.3, max_grad_norm=0.5)
    plain, round, run = start(copy.deepcopy(model), TREES, replace(config, output=tmp_path / "plain"), tokenizer)
    _, lines = train(model, config, tokenizer)
    optimizer = make_optimizer(plain, config=config)
    for step, (_, batch) in enumerate(round.steps(config)):
        metrics, _, _ = gradient_of(plain, replace(round, examples=[round.examples[i] for i in batch]), run)
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5).item()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total=3, config=config)
        optimizer.step()
        assert lines[step]["loss"] == pytest.approx(metrics["loss"], rel=1e-6)
        assert lines[step]["grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert lines[step]["learning_rate"] == learning_rate(step, total=3, config=config)
    for got, want in zip(model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_a_moving_reference_takes_the_pull_off(model, config, tokenizer):
    options = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 1.0}
    _, lines = train(model, replace(config, max_steps=4, **options), tokenizer)
    assert [line["loss"] for line in lines] == pytest.approx([math.log(2)] * 4, abs=1e-6)  # always at its reference


def test_preferences_set_aside_are_measured_and_not_trained(model, config, tokenizer):
    aside = [random_tree(seed) for seed in range(20, 24)]
    config = replace(config, max_steps=4, eval_steps=3)
    _, lines = train(model, config, tokenizer, eval_trees=aside)
    evaluations = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [3, 4]
    after, round, run = start(model, aside, replace(config, output=config.output / "after"), tokenizer)
    assert evaluations[-1]["eval_loss"] != pytest.approx(math.log(2), abs=1e-6)
    assert gradient_of(after, round, run)[0]["logps/chosen"] == pytest.approx(evaluations[-1]["eval_logps/chosen"])


def test_told_to_stop_it_saves_and_exits_with_a_code_of_its_own(model, config, tokenizer):
    policy, round, run = start(model, TREES, config, tokenizer)
    run.stop.asked = True
    with pytest.raises(SystemExit) as exit, run.monitor:
        train_round(policy, make_optimizer(policy, config=config), round, run)
    assert exit.value.code == STOPPED == 75
    assert run.checkpoints.state(run.checkpoints.latest())["step"] == 1
