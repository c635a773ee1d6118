"""The options of `python -m ttpa.train`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ttpa.config import option
from ttpa.data.build import OnOverlength
from ttpa.errors import InputError
from ttpa.training.run_folder import REPLACED

LossName = Literal["sigmoid", "robust", "hinge", "ipo", "sft"]
Scheduler = Literal["cosine", "linear", "constant"]
AT_LEAST = {
    0: "seed num_eval_dialogues min_entropy min_probability error_weight follow_weight warmup_ratio weight_decay "
    "max_grad_norm",
    1: "rounds num_dialogues num_forks alternatives max_new_tokens decode_batch_size num_train_epochs batch_size "
    "pack_tokens logging_steps",
}


DEPENDS_ON_MODEL = {
    "learning_rate": (1e-6, 5e-4),
    "beta": (0.1, 0.2),
    "sft_weight": (0.0, 20.0),
    "num_train_epochs": (1, 3),
}
"""Defaults for a model of the user's (those of TRL) and for the embedded one (docs/embedded.md says how they came)."""


@dataclass(frozen=True)
class TrainConfig:
    """Every option of the command, with its default; raises InputError for values that make no sense."""

    model: str | None = option(None, "model folder or Hugging Face name; none is the embedded model")
    data: Path | None = option(None, "trees, TRL preference file, ToolBench answers; none samples trees")
    output: Path = option(Path("runs/train"), "run folder; the files of an earlier run in it are replaced")
    eval_data: Path | None = option(None, "dialogues to evaluate on; none is the held-out set of the embedded model")
    num_eval_dialogues: int = option(300, "embedded held-out dialogues to evaluate on; 0 evaluates on none of them")
    seed: int = option(0, "decides which dialogues are sampled and the order of the batches")
    bf16: bool = option(False, "compute in bfloat16 under autocast; weights and optimizer states stay float32")

    rounds: int = option(1, "times to sample with the current policy and to train on it")
    num_dialogues: int = option(1600, "new dialogues to sample in each round")
    num_forks: int = option(8, "places at which a call is forked, at most")
    alternatives: int = option(2, "other tokens to try at a fork, at most")
    min_entropy: float = option(0.1, "entropy in nats that a token needs to become a fork")
    min_probability: float = option(0.02, "probability that another token needs to be tried")
    max_new_tokens: int = option(256, "longest completion in sampling and evaluation")
    decode_batch_size: int = option(64, "completions to decode side by side")

    loss_type: LossName = option("sigmoid", "sft: likelihood of the chosen sides, the control; others as in TRL")
    beta: float = option(None, "pull to the reference model, the policy at the round's start; none: 0.1, embedded 0.2")
    label_smoothing: float = option(0.0, "share of pairs taken to be the wrong way round (sigmoid, robust)")
    sft_weight: float = option(None, "weight of the likelihood of the chosen tokens; none: 0, embedded model 20")
    error_weight: float = option(1.0, "weight of the tokens of an error and of what should stand there")
    follow_weight: float = option(0.0, "weight of other tokens behind the fork of a pair; 1 and 1 is plain DPO")

    learning_rate: float = option(None, "highest learning rate of AdamW; none: 1e-6, embedded model 5e-4")
    lr_scheduler_type: Scheduler = option("cosine", "how the rate goes on after the warm-up, to 0 or constant")
    warmup_ratio: float = option(0.1, "share of a round's steps in which the rate rises")
    weight_decay: float = option(0.0, "AdamW weight decay; none on norms, biases and other vectors")
    max_grad_norm: float = option(1.0, "longest gradient; 0 does not clip")
    num_train_epochs: int = option(None, "times to go through a round's trees; none: 1, embedded model 3")
    max_steps: int = option(-1, "optimizer steps of a round instead of num_train_epochs; -1 is whole epochs")
    batch_size: int = option(32, "pairs of one optimizer step; a tree is kept whole, so there may be more")
    max_length: int | None = option(None, "longest prompt and completion in tokens; none is the model's window")
    on_overlength: OnOverlength = option("drop", "what happens to trees of --data that are longer")
    pack_tokens: int = option(4096, "tokens of one forward pass; less takes less memory and the same gradient")
    logging_steps: int = option(10, "steps between lines of metrics.jsonl, beside the first and the last step")

    def __post_init__(self) -> None:
        for name, (general, embedded) in DEPENDS_ON_MODEL.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, embedded if self.model is None else general)
        for least, names in AT_LEAST.items():
            for name in names.split():
                if not least <= getattr(self, name) < math.inf:
                    raise InputError(f"--{name} must be a number of at least {least}, not {getattr(self, name)}")
        for name in ("beta", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"--{name} must be a number above 0, not {getattr(self, name)}")
        if self.warmup_ratio > 1:
            raise InputError(f"--warmup_ratio must be a share from 0 to 1, not {self.warmup_ratio}")
        if self.max_steps != -1 and self.max_steps < 1:
            raise InputError(f"--max_steps must be at least 1, or -1 for whole epochs, not {self.max_steps}")
        if self.max_length is not None and self.max_length < 2:
            raise InputError(f"--max_length must be at least 2, not {self.max_length}")
        if not 0 <= self.label_smoothing < 0.5:
            raise InputError(f"--label_smoothing must lie in [0, 0.5), not {self.label_smoothing}")
        if self.label_smoothing and self.loss_type not in ("sigmoid", "robust"):
            raise InputError(f"--label_smoothing goes with loss_type sigmoid and robust, not with {self.loss_type}")
        if self.data is not None and self.rounds > 1:
            raise InputError(
                "--rounds samples again in each round, and with --data nothing is sampled: give one of them"
            )
        for name in ("model", "data", "eval_data"):
            value = getattr(self, name)
            path = Path(value or "").resolve()
            if value is not None and any((self.output / file).resolve() in (path, *path.parents) for file in REPLACED):
                raise InputError(f"--{name} {value} would be replaced by this run's output; choose another --output")
