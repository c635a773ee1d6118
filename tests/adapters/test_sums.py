"""The loss from weighted sums of log-probabilities is the loss on the tokens."""

from __future__ import annotations

import math

import pytest
import torch

from ttpa.adapters.sums import pair_loss, weighted_sums
from ttpa.losses import token_dpo_loss

P, T = 3, 5


@pytest.mark.parametrize(
    "loss_type, label_smoothing", [("sigmoid", 0.0), ("sigmoid", 0.2), ("robust", 0.1), ("hinge", 0)]
)
def test_it_is_token_dpo_loss_with_the_weights_as_coefficients(loss_type, label_smoothing):
    generator = torch.Generator().manual_seed(0)
    logp, ref_logp = -3 * torch.rand(2, 2 * P, T, dtype=torch.float64, generator=generator)
    weight = torch.randint(0, 3, (2 * P, T), generator=generator).double()
    options = {"beta": 0.7, "loss_type": loss_type, "label_smoothing": label_smoothing}

    by_tokens = logp.clone().requires_grad_()
    C = torch.zeros(P, 2 * P, T, dtype=torch.float64)
    for p in range(P):
        C[p, p], C[p, P + p] = weight[p], -weight[P + p]
    want, _ = token_dpo_loss(
        logp_R=by_tokens.flatten(), ref_logp_R=ref_logp.flatten(), C=C.flatten(1).to_sparse(), **options
    )
    want.backward()

    by_sums = logp.clone().requires_grad_()
    chosen, rejected = weighted_sums(by_sums, weight).chunk(2)
    ref_chosen, ref_rejected = weighted_sums(ref_logp, weight).chunk(2)
    got = pair_loss(
        chosen_P=chosen, rejected_P=rejected, ref_chosen_P=ref_chosen, ref_rejected_P=ref_rejected, **options
    )
    got.loss.backward()
    torch.testing.assert_close(got.loss, want)
    torch.testing.assert_close(by_sums.grad, by_tokens.grad)
    rewards = 0.7 * (weight * (logp - ref_logp)).sum(dim=1)
    torch.testing.assert_close(torch.cat(got[1:]), rewards)


def test_tokens_of_weight_0_do_not_count_whatever_stands_there():
    logp = torch.tensor([[-1.0, -math.inf, math.nan]], requires_grad=True)
    sums = weighted_sums(logp, torch.tensor([[2.0, 0.0, 0.0]]))
    sums.sum().backward()
    assert sums.tolist() == [-2.0] and logp.grad.tolist() == [[2.0, 0.0, 0.0]]
