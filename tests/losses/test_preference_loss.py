"""Every loss on packed trees equals its loop over separate completions, in value and gradient."""

from __future__ import annotations

import dataclasses
import math
import random

import loops
import pytest
import torch
from random_trees import random_tree
from ttpa_kernels.token_dpo.pairs import PairMatrix

from ttpa.errors import InputError
from ttpa.esm.weights import WeightOptions
from ttpa.losses import LOSSES, LossOptions, LossTerm, describe, preference_loss, start_loss, token_weights
from ttpa.training.examples import denominators, make_examples
from ttpa.trees.pack import Term, completion_tokens, pack_trees

OPTIONS = LossOptions(
    beta=0.7,
    label_smoothing=0.1,
    simpo_gamma=0.4,
    ld_alpha=0.3,
    tdpo_alpha=0.6,
    tis_mu=0.8,
    tgdpo_alpha=0.9,
    d2po_gamma=0.9,
    sepo_ratio=0.4,
    discopop_tau=0.5,
    likelihood_temperature=0.7,
)
PAIR_LOSSES = [name for name, loss in LOSSES.items() if loss.leaves == "pairs"]


class Case:
    """Trees with nested forks and tokens that nobody trains, and numbers for each of their completion tokens."""

    def __init__(self, seeds=range(4), tools=True):
        self.trees = [random_tree(seed, tools=tools) for seed in seeds]
        self.starts = [sum(map(completion_tokens, self.trees[:t])) for t in range(len(self.trees))]
        number, generator = sum(map(completion_tokens, self.trees)), torch.Generator().manual_seed(0)

        def numbers(low, high):
            return low + (high - low) * torch.rand(number, generator=generator, dtype=torch.float64)

        self.values = {
            "logp": numbers(-4, 0).requires_grad_(),
            "ref": numbers(-4, 0),
            "kl": numbers(0, 1).requires_grad_(),
            "score": numbers(-3, 3),
        }

    def sides(self, t, pair):
        return [
            loops.completion(self.trees[t], leaf, self.values, self.starts[t]) for leaf in (pair.chosen, pair.rejected)
        ]

    def base(self, seed=0):
        """Random weights, a third of them 0, that differ between the sides of a pair and between pairs."""
        rng = random.Random(seed)

        def weights(tree, leaf):
            return [max(0.0, rng.uniform(-0.5, 1)) * trained for trained in tree.trained(leaf)]

        return [[(weights(tree, p.chosen), weights(tree, p.rejected)) for p in tree.pairs] for tree in self.trees]

    def ones(self):
        return [[(tree.trained(p.chosen), tree.trained(p.rejected)) for p in tree.pairs] for tree in self.trees]

    def scores(self):
        """Known for the tokens that the model wrote."""

        def known(side):
            return [token.score if token.written else math.nan for token in side]

        return [[tuple(map(known, self.sides(t, pair))) for pair in tree.pairs] for t, tree in enumerate(self.trees)]

    def loss(self, name, weights, *, trees=None, tree_numbers=None, options=OPTIONS, **given):
        """`preference_loss` of one pack; the log-probabilities of `tree_numbers` are those of the packed trees."""
        trees = self.trees if trees is None else trees
        numbers = range(len(self.trees)) if tree_numbers is None else tree_numbers
        batch = pack_trees(trees, terms=[Term(weights, sides=describe(name).sides)])
        places = torch.cat([torch.arange(completion_tokens(self.trees[t])) + self.starts[t] for t in numbers])
        place_R = places[batch.place_R[: batch.num_trained]]
        term = batch.terms[0]
        return preference_loss(
            name,
            logp_R=self.values["logp"][place_R],
            ref_logp_R=self.values["ref"][place_R],
            chosen_PR=term.chosen_PR,
            rejected_PR=term.rejected_PR,
            kl_R=self.values["kl"][place_R],
            tree_P=batch.tree_P,
            options=options,
            **given,
        )

    def gradients(self, loss, upstream=1.0):
        wanted = [self.values["logp"], self.values["kl"]]
        return torch.autograd.grad(
            loss, wanted, torch.tensor(upstream, dtype=torch.float64), retain_graph=True, materialize_grads=True
        )

    def examples(self, name, trees=None):
        return make_examples(
            self.trees if trees is None else trees,
            tokenizer=None,
            terms=[LossTerm(name)],
            options=OPTIONS,
            token_weights="ones",
            error_weights=WeightOptions(),
            scores=self.scores(),
        )


def assert_same(case, got, want):
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    for got_grad, want_grad in zip(case.gradients(got, 1.7), case.gradients(want, 1.7), strict=True):
        torch.testing.assert_close(got_grad, want_grad, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("base", ["ones", "random"])
@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_a_loss_of_pairs_equals_its_loop(name, base):
    case = Case()
    base_weights, scores = case.ones() if base == "ones" else case.base(), case.scores()
    u, want, weights = [], [], []
    for t, tree in enumerate(case.trees):
        weights.append([])
        for p, pair in enumerate(tree.pairs):
            given = {"tree": tree, "pair": pair, "base": base_weights[t][p], "scores": scores[t][p]}
            weights[t].append(token_weights(name, **given, options=OPTIONS))
            chosen, rejected = (
                [dataclasses.replace(token, weight=weight) for token, weight in zip(side, side_weights, strict=True)]
                for side, side_weights in zip(case.sides(t, pair), base_weights[t][p], strict=True)
            )
            u.append(0.5 + len(u) % 3)
            want.append(u[-1] * loops.PAIR_LOOPS[name](chosen, rejected, OPTIONS))
    denominator = 3.0 * len(want)  # this pack is a third of a step
    got, metrics = case.loss(name, weights, denominator=denominator, pair_weight_P=torch.tensor(u))
    assert_same(case, got, sum(want) / denominator)
    assert all(metric.shape == () and math.isfinite(metric) for metric in metrics.values())


def test_the_first_of_pairs_with_a_common_chosen_token_trains_it():
    case = Case()
    want = [loops.sft([case.sides(t, pair)[0] for pair in tree.pairs]) for t, tree in enumerate(case.trees)]
    denominator = 2.0 * sum(number for _, number in want)
    weights = [
        [
            token_weights("sft", tree=tree, pair=pair, base=base, options=OPTIONS)
            for pair, base in zip(tree.pairs, bases, strict=True)
        ]
        for tree, bases in zip(case.trees, case.base(), strict=True)
    ]
    got, _ = case.loss("sft", weights, denominator=denominator)
    assert_same(case, got, sum(loss for loss, _ in want) / denominator)

    alone = case.examples("sft")
    assert denominators(alone, terms=[LossTerm("sft")]) == [denominator / 2]
    packed = case.loss("sft", [e.weights[0] for e in alone], trees=[e.tree for e in alone], denominator=denominator)
    assert_same(case, packed[0], got)


def test_weighted_likelihood_equals_its_loop():
    case = Case()
    want = [
        loops.likelihood(
            [loops.completion(tree, i, case.values, case.starts[t]) for i in range(len(tree.leaves))], OPTIONS
        )
        for t, tree in enumerate(case.trees)
    ]
    examples = case.examples("likelihood")
    weights, trees = [example.weights[0] for example in examples], [example.tree for example in examples]
    got, _ = case.loss("likelihood", weights, trees=trees, denominator=3.0 * len(trees))
    assert_same(case, got, sum(want) / (3 * len(trees)))


def test_the_likelier_leaf_weighs_more():
    case = Case([1], tools=False)
    (tree,), (example,) = case.trees, case.examples("likelihood")
    loss, metrics = case.loss("likelihood", example.weights, trees=[example.tree], denominator=1.0)
    (logp_grad, _) = case.gradients(loss)
    leaves = [loops.completion(tree, leaf, case.values, 0) for leaf in range(len(tree.leaves))]
    ends = [sum(len(node.ids) for node in tree.nodes[: leaf.node + 1]) - 1 for leaf in tree.leaves]
    # the last token of a leaf is its own here, and has the gradient of -w_i / n_i
    shares = torch.tensor([-logp_grad[end].item() * len(side) for end, side in zip(ends, leaves, strict=True)])
    nll = torch.tensor([-sum(token.logp.item() for token in side) / len(side) for side in leaves])
    assert shares.sum().item() == pytest.approx(1)
    assert torch.equal(shares.argsort(), nll.argsort(descending=True))
    assert metrics["likelihood/nll"].item() == pytest.approx(nll.mean().item())
    assert metrics["likelihood/effective_leaves"].item() == pytest.approx(1 / shares.square().sum().item())


@pytest.mark.parametrize("name", LOSSES)
def test_the_order_of_trees_and_where_they_are_cut_change_nothing(name):
    case, term = Case(), [LossTerm(name)]
    examples = case.examples(name)
    denominator = denominators(examples, terms=term)[0]

    def loss(numbers, parts):
        weights = [[examples[t].weights[0][p] for p in pairs] for t, pairs in zip(numbers, parts, strict=True)]
        trees = [
            dataclasses.replace(examples[t].tree, pairs=[examples[t].tree.pairs[p] for p in pairs])
            for t, pairs in zip(numbers, parts, strict=True)
        ]
        return case.loss(name, weights, trees=trees, tree_numbers=numbers, denominator=denominator)[0]

    numbers = list(range(len(examples)))
    everything = [list(range(len(e.tree.pairs))) for e in examples]
    want = loss(numbers, everything)
    assert_same(case, loss(numbers[::-1], everything[::-1]), want)
    assert_same(case, loss(numbers[:1], everything[:1]) + loss(numbers[1:], everything[1:]), want)
    if describe(name).per != "tree":
        halves = [[pairs[start::2] for pairs in everything] for start in (0, 1)]
        assert_same(case, sum(loss(numbers, half) for half in halves), want)


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_at_the_start_is_known_where_it_does_not_depend_on_the_model(name):
    case = Case()
    case.values["ref"], case.values["kl"] = case.values["logp"].detach(), torch.zeros_like(case.values["ref"])
    examples = case.examples(name)
    got, _ = case.loss(
        name,
        [example.weights[0] for example in examples],
        trees=[example.tree for example in examples],
        denominator=denominators(examples, terms=[LossTerm(name)])[0],
    )
    start = start_loss(name, OPTIONS)
    if describe(name).reference == "none":
        assert start is None
    else:
        assert got.item() == pytest.approx(start, rel=1e-14)


@pytest.mark.parametrize("name", LOSSES)
def test_a_pack_in_which_nothing_is_trained_has_a_gradient_of_0(name):
    case = Case([0])
    (tree,) = case.trees
    nothing = [
        ([0.0] * len(tree.completion_ids(p.chosen)), [0.0] * len(tree.completion_ids(p.rejected))) for p in tree.pairs
    ]
    got, metrics = case.loss(name, [nothing], denominator=8.0)
    assert math.isfinite(got.item()) and all(map(math.isfinite, metrics.values()))
    assert not any(gradient.any() for gradient in case.gradients(got))


@pytest.mark.parametrize("name", LOSSES)
def test_float32_log_probabilities_give_the_same_to_their_precision(name):
    case = Case()
    examples = case.examples(name)
    weights, trees = [example.weights[0] for example in examples], [example.tree for example in examples]
    want, _ = case.loss(name, weights, trees=trees, denominator=5.0)
    want_grad = case.gradients(want)[0]
    case.values = {
        key: value.detach().float().requires_grad_(value.requires_grad) for key, value in case.values.items()
    }
    got, _ = case.loss(name, weights, trees=trees, denominator=5.0)
    assert got.item() == pytest.approx(want.item(), rel=1e-6)
    (got_grad,) = torch.autograd.grad(got, case.values["logp"])
    assert got_grad.dtype == torch.float32
    assert (got_grad - want_grad).norm() < 1e-6 * want_grad.norm()


def test_coefficients_that_are_known_give_the_same_loss():
    case = Case()
    batch = pack_trees(case.trees, terms=[Term(case.base())])
    term, place_R = batch.terms[0], batch.place_R[: batch.num_trained]
    given = {"logp_R": case.values["logp"][place_R], "ref_logp_R": case.values["ref"][place_R], "options": OPTIONS}
    given |= {"chosen_PR": term.chosen_PR, "rejected_PR": term.rejected_PR, "denominator": 4.0}
    want, metrics = preference_loss("sigmoid", **given)
    for C in (term.C, PairMatrix.from_sparse(term.C)):
        got, got_metrics = preference_loss("sigmoid", **given, C=C)
        assert torch.equal(got, want) and got_metrics == metrics


@pytest.mark.parametrize(
    ("name", "f"),
    [
        ("sigmoid", loops.smoothed),
        ("simpo", lambda x, o: loops.smoothed(x - o.simpo_gamma, o)),
        ("discopop", loops.log_ratio_modulated),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_margin_is_added_to_the_reward(name, f):
    case = Case([1])
    (example,) = case.examples(name)
    rewards = [
        case.loss(name, [[weights]], trees=[dataclasses.replace(example.tree, pairs=[pair])], denominator=1.0)[1]
        for pair, weights in zip(example.tree.pairs, example.weights[0], strict=True)
    ]
    margin_P = torch.linspace(-1, 1, len(rewards), dtype=torch.float64)
    got, _ = case.loss(name, example.weights, trees=[example.tree], denominator=1.0, margin_P=margin_P)
    x_P = margin_P + torch.stack([metrics["rewards/weighted_margins"] for metrics in rewards])
    assert got.item() == pytest.approx(sum(f(x, OPTIONS).item() for x in x_P), rel=1e-12)


def test_metrics_are_means_over_the_pairs():
    case = Case()
    sides = [case.sides(t, pair) for t, tree in enumerate(case.trees) for pair in tree.pairs]
    chosen = torch.tensor([OPTIONS.beta * loops.ratio(side).item() for side, _ in sides])
    rejected = torch.tensor([OPTIONS.beta * loops.ratio(side).item() for _, side in sides])
    want = {
        "rewards/weighted_chosen": chosen.mean().item(),
        "rewards/weighted_rejected": rejected.mean().item(),
        "rewards/weighted_margins": (chosen - rejected).mean().item(),
        "rewards/weighted_accuracies": (chosen > rejected).double().mean().item(),
    }
    for name in ("sigmoid", "discopop", "tdpo1", "nca_pair", "apo_down"):
        _, metrics = case.loss(name, case.ones(), denominator=100.0)
        known = {key: value.item() for key, value in metrics.items() if key in want}
        assert known == pytest.approx({key: want[key] for key in known}, rel=1e-6), name
        assert {"rewards/weighted_margins", "rewards/weighted_accuracies"} <= set(known)
        if name == "tdpo1":
            divergences = [sum(loops.divergence(pair[i]).item() for pair in sides) / len(sides) for i in (0, 1)]
            assert [metrics["kl/chosen"].item(), metrics["kl/rejected"].item()] == pytest.approx(divergences)


def test_sides_without_an_unsure_token_do_not_count_in_confpo():
    case = Case([0])
    case.values["logp"] = torch.full_like(case.values["logp"], -1.0).requires_grad_()
    loss, metrics = case.loss("confpo", case.ones(), denominator=1.0)
    assert loss.item() == 0 and not case.gradients(loss)[0].any()
    assert metrics["confpo/chosen_tokens"].item() == 0


def test_what_a_loss_lacks_is_named():
    case = Case([0])
    (tree,) = case.trees
    with pytest.raises(InputError, match=r"--loss_type sepo .* --score_model"):
        token_weights("sepo", tree=tree, pair=tree.pairs[0], base=case.ones()[0][0], options=OPTIONS)
    batch = pack_trees([tree])
    given = {
        "logp_R": case.values["logp"][batch.place_R[: batch.num_trained]],
        "chosen_PR": batch.terms[0].chosen_PR,
        "rejected_PR": batch.terms[0].rejected_PR,
        "options": OPTIONS,
        "denominator": 1.0,
    }
    for name, ref, what in (
        ("ipo", None, "ref_logp_R"),
        ("tdpo2", given["logp_R"], "kl_R"),
        ("likelihood", None, "tree_P"),
    ):
        with pytest.raises(ValueError, match=f"{name} needs {what}"):
            preference_loss(name, **given, ref_logp_R=ref)
    with pytest.raises(ValueError, match="apo_zero has no single margin"):
        preference_loss("apo_zero", **given, ref_logp_R=given["logp_R"], margin_P=torch.zeros(len(tree.pairs)))
