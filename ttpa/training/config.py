"""The options of `python -m ttpa.train`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ttpa.config import option
from ttpa.data.build import OnOverlength
from ttpa.data.toolbench import Failures, Shapes, Thoughts
from ttpa.errors import InputError
from ttpa.training.run_folder import REPLACED

Scheduler = Literal["cosine", "linear", "constant"]
TokenWeights = Literal["errors", "keys", "ones"]
Reference = Literal["cached", "sampled"]
Checkpointing = Literal["none", "full", "selective"]
Offload = Literal["none", "activations", "optimizer"]
AT_LEAST = {
    0: "seed num_eval_dialogues min_entropy min_probability error_weight follow_weight warmup_ratio weight_decay "
    "max_grad_norm save_steps keep_best max_skipped_steps ref_model_mixup_alpha",
    1: "rounds num_dialogues num_forks alternatives max_new_tokens decode_batch_size num_train_epochs batch_size "
    "pack_tokens logging_steps eval_steps keep_last ref_model_sync_steps lora_r lora_alpha",
}


DEPENDS_ON_MODEL: dict[str, tuple[Any, Any]] = {
    "learning_rate": (1e-6, 5e-4),
    "beta": (0.1, 0.2),
    "loss_type": ("ttpa", "ttpa,sft"),
    "num_train_epochs": (1, 3),
}
"""Defaults for a model of the user's (those of TRL) and for the embedded one (docs/embedded.md says how they came)."""

EMBEDDED_LOSS_WEIGHTS = "1,20"


@dataclass(frozen=True)
class TrainConfig:
    """Every option of the command, with its default; raises InputError for values that make no sense."""

    model: str | None = option(None, "model folder or Hugging Face name; none is the embedded model")
    data: Path | None = option(None, "trees or preferences (docs/data.md), files with commas; none samples")
    dialect: str | None = option(None, "how the model writes calls, as in mistral; none: as its template does")
    output: Path = option(Path("runs/train"), "run folder; the files of an earlier run in it are replaced")
    eval_data: Path | None = option(None, "dialogues to evaluate on; none: the embedded model's held-out ones")
    num_eval_dialogues: int = option(300, "held-out dialogues of the embedded model to evaluate on; 0 is none")
    eval_preferences: Path | None = option(None, "preferences, as --data, whose loss is measured every --eval_steps")
    eval_steps: int = option(100, "steps between measurements on --eval_preferences, beside the last step")
    seed: int = option(0, "decides which dialogues are sampled and the order of the batches")
    plan: bool = option(False, "print memory, steps and time of the run, and exit")
    world_size: int | None = option(None, "processes for --plan; none is one")
    memory_gb: float | None = option(None, "memory of a device for --plan; none is that of this machine's")
    selfcheck: bool = option(True, "stop where packed passes or the first loss are not exact")

    rounds: int = option(1, "times to sample with the current policy and to train on it")
    num_dialogues: int = option(1600, "new dialogues to sample in each round")
    num_forks: int = option(8, "places at which a call is forked, at most")
    alternatives: int = option(2, "other tokens to try at a fork, at most")
    min_entropy: float = option(0.1, "entropy in nats that a token needs to become a fork")
    min_probability: float = option(0.02, "probability that another token needs to be tried")
    max_new_tokens: int = option(256, "longest completion in sampling and evaluation")
    decode_batch_size: int = option(64, "completions to decode side by side")

    loss_type: str = option(None, "losses with commas between them (docs/losses.md); none: ttpa, embedded ttpa,sft")
    loss_weights: str | None = option(None, "a weight for each loss; none: 1 each, embedded 1,20")
    beta: float = option(None, "pull to the reference model; none: 0.1, embedded 0.2")
    label_smoothing: float = option(0.0, "share of pairs taken to be the wrong way round (sigmoid, ttpa, robust)")
    simpo_gamma: float = option(0.5, "margin that the chosen side has to win by (simpo, confpo)")
    ld_alpha: float = option(0.5, "weight of the tokens behind the length of the shorter side (ld_dpo)")
    tdpo_alpha: float = option(0.5, "weight of the divergences (tdpo2)")
    tis_mu: float = option(1.0, "exponent of the token scores (tis)")
    tis_min: float = option(-0.5, "lowest token score (tis)")
    tis_max: float = option(1.5, "highest token score (tis)")
    tgdpo_alpha: float = option(0.5, "share of the token rewards in the weights (tgdpo)")
    d2po_gamma: float = option(0.98, "decay of the weights from token to token (d2po)")
    sepo_ratio: float = option(0.3, "share of a side's tokens that is selected (sepo)")
    discopop_tau: float = option(0.05, "temperature between its two losses (discopop)")
    likelihood_temperature: float = option(1.0, "temperature of the weights of a tree's leaves (likelihood)")
    token_weights: TokenWeights | None = option(None, "weights by ESM's errors, key tokens or all 1; none: by the loss")
    error_weight: float = option(1.0, "weight of the tokens of an error and of what should stand there")
    follow_weight: float = option(0.0, "weight of other tokens behind the fork of a pair; 1 and 1 is plain DPO")

    reference: Reference = option("cached", "sampled: the sampler's own log-probabilities, checked, in place of a pass")
    reference_cache: Path | None = option(None, "folder of the reference's log-probabilities; none: in the run folder")
    ref_model: str | None = option(None, "reference model; none is the policy at the round's start")
    sync_ref_model: bool = option(False, "move the reference after the policy (TR-DPO)")
    ref_model_mixup_alpha: float = option(0.6, "share of the policy in a moving reference when it moves")
    ref_model_sync_steps: int = option(512, "steps between moves of the reference")
    score_model: str | None = option(None, "model whose log-probabilities weigh the tokens (tis, tgdpo, sepo)")
    score_model_minus: str | None = option(None, "model that is taken from --score_model; none is the reference")

    use_peft: bool = option(False, "train a low-rank adapter (LoRA) instead of all weights")
    lora_r: int = option(16, "rank of the adapter")
    lora_alpha: int = option(32, "scale of the adapter, divided by its rank")
    lora_target_modules: str = option("all-linear", "layers with an adapter, by name; all-linear leaves out the head")
    use_rslora: bool = option(False, "divide the scale by the root of the rank")
    load_in_4bit: bool = option(False, "hold the frozen weights in 4 bits (QLoRA; needs a GPU and bitsandbytes)")

    learning_rate: float = option(None, "highest learning rate of AdamW; none: 1e-6, embedded model 5e-4")
    lr_scheduler_type: Scheduler = option("cosine", "how the rate goes on after the warm-up, to 0 or constant")
    warmup_ratio: float = option(0.1, "share of a round's steps in which the rate rises")
    weight_decay: float = option(0.0, "AdamW weight decay; none on norms, biases and other vectors")
    max_grad_norm: float = option(1.0, "longest gradient; 0 does not clip")
    num_train_epochs: int = option(None, "times to go through a round's trees; none: 1, embedded model 3")
    max_steps: int = option(-1, "steps of a round instead of num_train_epochs; -1 is whole epochs")
    batch_size: int = option(32, "pairs of a step over all processes, or more, as trees are kept whole")
    max_length: int | None = option(None, "longest prompt and completion in tokens; none is the model's window")
    on_overlength: OnOverlength = option("drop", "what happens to trees of --data that are longer")
    toolbench_thoughts: Thoughts = option("keep", "thoughts of ToolBench answers, see docs/data.md")
    toolbench_shapes: Shapes = option("any", "pairs where both sides have a thought or neither")
    toolbench_failures: Failures = option("keep", "calls that failed through no fault of theirs")
    max_skipped_steps: int = option(10, "steps left out as not finite before that is an error")

    pack_tokens: int = option(
        4096, "tokens of one forward pass; longer trees are cut between pairs, with the same gradient"
    )
    bf16: bool = option(False, "compute in bfloat16; weights and optimizer states stay float32")
    shard_size: int | None = option(
        None, "processes that share one copy of the weights; none: all, 1: each has its own"
    )
    activation_checkpointing: Checkpointing = option("none", "compute activations twice")
    compile: bool = option(False, "compile each decoder layer with torch.compile")
    offload: Offload = option("none", "hold these in the CPU's memory: activations, or optimizer (weights as well)")

    logging_steps: int = option(10, "steps between lines of metrics.jsonl, beside the first and the last step")
    report_to: str = option("none", "tensorboard, wandb or both with a comma, beside metrics.jsonl")
    save_steps: int = option(500, "steps between checkpoints; 0 saves none but when the run is told to stop")
    keep_last: int = option(2, "newest checkpoints that are kept")
    keep_best: int = option(0, "checkpoints of the lowest eval_loss that are kept beside them")
    resume: str | None = option(
        None, "auto: go on from the newest checkpoint in the run folder; or a checkpoint folder"
    )
    push_to_hub: str | None = option(None, "name under which the trained model is uploaded at the end")
    hub_private_repo: bool = option(True, "whether the uploaded repository is private")

    def __post_init__(self) -> None:
        if self.loss_weights is None and self.loss_type is None and self.model is None:
            object.__setattr__(self, "loss_weights", EMBEDDED_LOSS_WEIGHTS)
        for name, (general, embedded) in DEPENDS_ON_MODEL.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, embedded if self.model is None else general)
        for least, names in AT_LEAST.items():
            for name in names.split():
                if not least <= getattr(self, name) < math.inf:
                    raise InputError(f"--{name} must be a number of at least {least}, not {getattr(self, name)}")
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"--learning_rate must be a number above 0, not {self.learning_rate}")
        if self.warmup_ratio > 1:
            raise InputError(f"--warmup_ratio must be a share from 0 to 1, not {self.warmup_ratio}")
        if self.max_steps != -1 and self.max_steps < 1:
            raise InputError(f"--max_steps must be at least 1, or -1 for whole epochs, not {self.max_steps}")
        for name in ("shard_size", "world_size", "memory_gb"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"--{name} must be a number above 0, not {value}")
        if self.plan and self.data is None:
            raise InputError("--plan lays out the trees of --data; sample them first, with `python -m ttpa.sample`")
        if self.keep_best and (self.eval_preferences is None or self.save_steps % self.eval_steps):
            raise InputError(
                "--keep_best keeps the checkpoints of the lowest eval_loss: give --eval_preferences, and --save_steps "
                "that are a multiple of --eval_steps"
            )
        if self.load_in_4bit and (not self.use_peft or "lm_head" in self.lora_target_modules):
            raise InputError(
                "--load_in_4bit freezes the weights and leaves the head alone: give --use_peft, without lm_head"
            )
        if self.eval_preferences is not None and self.data is None:
            raise InputError("--eval_preferences goes with --data; a run that samples is evaluated on --eval_data")
        if self.max_length is not None and self.max_length < 2:
            raise InputError(f"--max_length must be at least 2, not {self.max_length}")
        if self.data is not None and self.rounds > 1:
            raise InputError(
                "--rounds samples again in each round, and with --data nothing is sampled: give one of them"
            )
        for name in ("model", "data", "eval_data", "eval_preferences", "ref_model", "score_model", "score_model_minus"):
            value = getattr(self, name)
            path = Path(value or "").resolve()
            if value is not None and any((self.output / file).resolve() in (path, *path.parents) for file in REPLACED):
                raise InputError(f"--{name} {value} would be replaced by this run's output; choose another --output")
