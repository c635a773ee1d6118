from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from ttpa.training.config import TrainConfig
from ttpa.training.optimizer import learning_rate, make_optimizer

CONFIG = TrainConfig(learning_rate=0.3, warmup_ratio=0.2)


@pytest.mark.parametrize(
    ("scheduler", "rates"),
    [
        ("constant", [0.1, 0.2] + [0.3] * 8),
        ("linear", [0.1, 0.2] + [0.3 * (1 - k / 8) for k in range(8)]),
        ("cosine", [0.1, 0.2] + [0.15 * (1 + math.cos(math.pi * k / 8)) for k in range(8)]),
    ],
)
def test_rates(scheduler, rates):
    config = replace(CONFIG, lr_scheduler_type=scheduler)
    assert [learning_rate(step, total=10, config=config) for step in range(10)] == pytest.approx(rates)
    assert learning_rate(0, total=1, config=config) == pytest.approx(0.15)  # all warm-up
    assert learning_rate(0, total=1, config=replace(config, warmup_ratio=0.0)) == 0.3


def test_vectors_do_not_decay():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = make_optimizer(model, config=replace(CONFIG, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for old, new in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close(new.detach(), old * (1 - 0.3 * 0.5) if old.ndim > 1 else old)
