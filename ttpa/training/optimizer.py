"""AdamW and its learning rate."""

from __future__ import annotations

import math

import torch

from ttpa.training.config import TrainConfig


def make_optimizer(model: torch.nn.Module, *, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that are trained; weight decay goes to matrices only, not to norms and biases."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=config.learning_rate, fused=True)


def learning_rate(step: int, *, total: int, config: TrainConfig) -> float:
    """The rate of optimizer step `step`, from 0, of `total`: up in a straight line over the warm-up, whose first step
    is above 0, and from the highest rate down along `(1 + cos(pi x)) / 2` or `1 - x`, with x = 0 at the first step
    behind the warm-up and x = 1 one step after the last."""
    warmup = math.ceil(config.warmup_ratio * total)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    x = (step - warmup) / (total - warmup)
    factor = {"cosine": (1 + math.cos(math.pi * x)) / 2, "linear": 1 - x, "constant": 1.0}
    return config.learning_rate * factor[config.lr_scheduler_type]
