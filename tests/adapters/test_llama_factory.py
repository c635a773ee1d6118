"""The two functions for LLaMA-Factory against a loop over the tokens of padded sequences."""

from __future__ import annotations

import math

import pytest
import torch

from ttpa.adapters.llama_factory import batch_logps, preference_loss

V, S, P = 11, 7, 2


@pytest.fixture
def batch():
    """Logits, labels and weights of two chosen and two rejected sequences of other lengths."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2 * P, S, V, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, V, (2 * P, S), generator=generator)
    for b, (start, end) in enumerate([(2, 6), (0, 7), (3, 5), (1, 4)]):
        labels[b, :start], labels[b, end:] = -100, -100
    return logits, labels, torch.rand(2 * P, S, dtype=torch.float64, generator=generator)


def sums_by_loop(logits, labels, weights):
    sums, counts = [], []
    for b in range(len(labels)):
        counted = [t for t in range(1, S) if labels[b, t] != -100]  # nothing predicts the first token
        sums.append(sum(weights[b, t] * logits[b, t - 1].log_softmax(dim=0)[labels[b, t]] for t in counted))
        counts.append(len(counted))
    return torch.stack(sums), torch.tensor(counts)


def test_weighted_sums_of_a_padded_batch_are_those_of_a_loop(batch):
    logits, labels, weights = batch
    logits = logits.float()
    sums, counts = batch_logps(logits, labels, weights)
    want, want_counts = sums_by_loop(logits, labels, weights)
    torch.testing.assert_close(sums, want, rtol=1e-6, atol=0)
    assert counts.tolist() == want_counts.tolist() == [4, 6, 2, 3]


def test_mean_of_the_losses_and_its_gradient_are_those_of_a_loop(batch):
    logits, labels, weights = batch
    policy = logits.float().requires_grad_()
    reference = logits.flip(0).float()
    chosen, rejected = batch_logps(policy, labels, weights)[0].split(P)
    ref_chosen, ref_rejected = batch_logps(reference, labels, weights)[0].split(P)
    losses, chosen_rewards, rejected_rewards = preference_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.3)
    assert losses.shape == chosen_rewards.shape == rejected_rewards.shape == (P,)
    losses += 0.5 * -chosen / 4  # pref_ftx, as LLaMA-Factory adds it, in place
    losses.mean().backward()

    by_loop = logits.float().requires_grad_()
    sums, ref_sums = sums_by_loop(by_loop, labels, weights)[0], sums_by_loop(reference, labels, weights)[0]
    rewards = 0.3 * (sums - ref_sums)
    want = sum(-torch.nn.functional.logsigmoid(rewards[p] - rewards[P + p]) + 0.5 * -sums[p] / 4 for p in range(P)) / P
    want.backward()
    torch.testing.assert_close(losses.mean().double(), want, rtol=1e-6, atol=0)
    torch.testing.assert_close(policy.grad, by_loop.grad, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(torch.cat([chosen_rewards, rejected_rewards]), rewards.detach(), rtol=1e-5, atol=1e-7)
    assert not chosen_rewards.requires_grad


def test_equal_models_start_at_ln_2(batch):
    sums = batch_logps(*batch)[0]
    losses, *_ = preference_loss(*sums.split(P), *sums.split(P), beta=0.1)
    assert losses.tolist() == pytest.approx([math.log(2)] * P, abs=1e-7)
