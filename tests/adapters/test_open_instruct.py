"""The loss for open-instruct against a loop over packed sequences."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from ttpa.adapters.open_instruct import packed_dpo_loss, packed_logps

ENDS = [0, 4, 9, 9, 12, 14, 17]  # three chosen sequences, one of them empty, and three rejected ones
P = 3
T = 20  # padded


@pytest.fixture
def packed():
    generator = torch.Generator().manual_seed(0)
    logp, ref_logp = -3 * torch.rand(2, T, generator=generator)
    weight = torch.randint(0, 3, (T,), generator=generator).float()
    weight[4], weight[17:] = 0, 0
    logp[4], logp[17:] = float("nan"), float("nan")
    return logp, ref_logp, weight, torch.tensor(ENDS, dtype=torch.int32)


def test_loss_and_gradient_are_those_of_a_loop(packed):
    logp, ref_logp, weight, ends = packed
    flat = logp.clone().requires_grad_()
    reference = packed_logps(ref_logp, weight, ends)
    losses, chosen_rewards, rejected_rewards = packed_dpo_loss(flat, weight, ends, *reference, beta=0.4)
    losses.mean().backward()

    by_loop = logp.double().requires_grad_()
    rewards = []
    for start, end in pairwise(ENDS):
        differences = [weight[t] * (by_loop[t] - ref_logp[t]) for t in range(start, end) if weight[t]]
        rewards.append(0.4 * sum(differences, torch.zeros((), dtype=torch.float64)))
    want = sum(-torch.nn.functional.logsigmoid(rewards[p] - rewards[P + p]) for p in range(P)) / P
    want.backward()
    torch.testing.assert_close(losses.mean().double(), want.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(flat.grad[:17].double(), by_loop.grad[:17], rtol=1e-5, atol=1e-8)
    assert flat.grad[17:].tolist() == [0.0] * 3
    want_rewards = torch.stack(rewards).detach()
    torch.testing.assert_close(torch.cat([chosen_rewards, rejected_rewards]), want_rewards, rtol=1e-6, atol=1e-8)


def test_an_odd_number_of_sequences_is_refused(packed):
    logp, _, weight, ends = packed
    with pytest.raises(ValueError, match="5 sequences are no pairs"):
        packed_logps(logp, weight, ends[:-1])
