"""What a round is made of: the policy from a model and back, and what the reference says of its trees."""

from __future__ import annotations

import copy
import gc
import hashlib
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import PreTrainedModel

from ttpa.config import plain_options
from ttpa.errors import InputError
from ttpa.esm.weights import WeightOptions
from ttpa.losses import LossOptions, loss_terms
from ttpa.model import load_model
from ttpa.training.config import TrainConfig
from ttpa.training.distributed import make_mesh, shard_policy
from ttpa.training.examples import Example, make_examples
from ttpa.training.loop import Round
from ttpa.training.lora import LoraOptions, add_lora, four_bit_config, merge, save_adapter
from ttpa.training.memory import checkpoint_activations, compile_blocks, offload_activations
from ttpa.training.objective import Objective
from ttpa.training.policy import Policy
from ttpa.training.reference import MovingReference, check_sampled, fill, logps_of, token_scores
from ttpa.training.reference_cache import ReferenceCache, content_key, model_key
from ttpa.training.run_folder import ADAPTER, RunFolder
from ttpa.training.stop import STOPPED, StopSignal
from ttpa.training.trained import WRAPPERS
from ttpa.trees.classes import tree_classes
from ttpa.trees.pack import PairWeights, TreeBatch
from ttpa.trees.record import PreferenceTree
from ttpa.world import World


def make_policy(model: PreTrainedModel, *, config: TrainConfig, world: World) -> Policy:
    """A policy on this process's device: the model itself where one process trains it, else a copy that is sharded.

    Activation checkpointing comes first, then compilation, then sharding. Raises InputError for a `shard_size` that
    does not divide the number of processes and for what a CPU or a run without torchrun has no use for.
    """
    if world.device.type == "cpu" and (config.compile or config.offload != "none"):
        name = "--compile true" if config.compile else f"--offload {config.offload}"
        raise InputError(f"{name} is for GPUs: this run computes on a CPU, from whose memory and loops nothing is won")
    if world.grouped:
        model = copy.deepcopy(model)
    elif config.offload == "optimizer" or (config.shard_size or 1) > 1:
        raise InputError(
            "--offload optimizer and --shard_size are for FSDP2: start the run with torchrun, also for a single process"
        )
    policy = Policy(model, bf16=in_bf16(config))
    checkpoint_activations(policy.model, config.activation_checkpointing)
    if config.compile:
        compile_blocks(policy.model)
    if config.offload == "activations":
        offload_activations(policy.model)
    if world.grouped:
        mesh = make_mesh(world, shard_size=config.shard_size)
        shard_policy(policy, policy.blocks, mesh=mesh, bf16=config.bf16, offload=config.offload == "optimizer")
        return policy
    return policy.to(world.device)


@torch.no_grad()
def copy_back(policy: Policy, model: PreTrainedModel) -> None:
    """Put what the policy has learned into the model that it was made from; every process has all of it then."""
    if policy.model is model:
        return
    weights = dict(model.named_parameters())
    for name, weight in policy.model.named_parameters():
        if weight.requires_grad:
            whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
            weights[WRAPPERS.sub("", name)].copy_(whole)


def in_bf16(config: TrainConfig) -> bool:
    """Whether products are computed in bfloat16; those of weights of 4 bits always are."""
    return config.bf16 or config.load_in_4bit


def make_objective(config: TrainConfig) -> Objective:
    """The loss of a run; raises InputError for a loss that does not exist, naming the nearest, and for weights that do
    not fit."""
    options = LossOptions(**{name: getattr(config, name) for name in LossOptions.__dataclass_fields__})
    objective = Objective(tuple(loss_terms(config.loss_type, config.loss_weights, options=options)), options)
    if objective.scores:
        if config.score_model is None:
            raise InputError(f"--loss_type {config.loss_type} weighs tokens by a helper model: give --score_model")
        if config.score_model_minus is None and (objective.reference == "none" or config.sync_ref_model):
            raise InputError(f"--loss_type {config.loss_type} has no fixed reference: give --score_model_minus as well")
    if config.use_peft and "lm_head" in config.lora_target_modules and objective.reference == "distribution":
        raise InputError(f"--loss_type {config.loss_type} reads whole distributions and knows no adapter of the head")
    if config.sync_ref_model and objective.reference == "none":
        raise InputError(f"--sync_ref_model moves a reference, and --loss_type {config.loss_type} has none")
    if config.ref_model is not None and (config.sync_ref_model or objective.reference == "distribution"):
        what = "--sync_ref_model" if config.sync_ref_model else f"--loss_type {config.loss_type}"
        raise InputError(f"{what} starts from the policy itself: leave out --ref_model")
    return objective


MAY_DIFFER = (
    "output eval_data num_eval_dialogues eval_preferences eval_steps plan memory_gb selfcheck decode_batch_size "
    "reference_cache max_skipped_steps pack_tokens shard_size activation_checkpointing compile offload logging_steps "
    "report_to save_steps keep_last keep_best resume push_to_hub hub_private_repo world_size data"
).split()
"""Options that a run may change when it goes on from a checkpoint: they leave what is computed as it is, but for
rounding. What `data` holds counts, not where it lies."""


def fingerprint(config: TrainConfig, *, model: str, trees: Sequence[PreferenceTree] | None) -> dict[str, Any]:
    """What a run must share with a checkpoint to go on from it."""
    options = {name: value for name, value in plain_options(config).items() if name not in MAY_DIFFER}
    content = hashlib.blake2b(digest_size=16)
    for tree in trees or ():
        content.update(content_key(tree))
        scored = [*map(asdict, tree.pairs), *map(asdict, tree.leaves)]
        content.update(json.dumps(scored).encode())
    return {**options, "weights of --model": model, "content of --data": content.hexdigest()}


class References:
    """The log-probabilities of models that do not change, for the trees of a round."""

    def __init__(
        self, *, config: TrainConfig, tokenizer: Any, world: World, folder: Path, stop: StopSignal | None = None
    ) -> None:
        self.config, self.tokenizer, self.world, self.folder = config, tokenizer, world, folder
        self.dtype = torch.bfloat16 if in_bf16(config) else torch.float32
        self.stop = stop or StopSignal()

    def key(self, model: PreTrainedModel) -> str:
        """Under which key a model's log-probabilities are cached."""
        key = model_key(model, self.tokenizer, dtype=self.dtype) if self.world.main else None
        # sharded blocks pass hidden states on in bf16, which autocast keeps in fp32
        return self.world.share_text(key) + ("-sharded" if self.world.grouped and self.config.bf16 else "")

    def of_policy(self, policy: Policy, trees: Sequence[PreferenceTree], *, key: str, begun: bool) -> list[np.ndarray]:
        """What the policy says of each tree as it stands at the start of a round; `begun`: it is at the start no more,
        so that all must be cached. Raises InputError where it is not, and where `--reference sampled` does not hold."""

        def compute(pack: TreeBatch) -> torch.Tensor:
            if begun:
                raise InputError(
                    "the reference's log-probabilities of this round are gone, and the policy has moved on: put the "
                    "folder back, or begin the run again",
                    path=self.folder,
                )
            return policy.logps(pack.to(self.world.device))

        sampled = self.config.reference == "sampled"
        if sampled and not begun:
            check_sampled(trees, compute=compute, pack_tokens=self.config.pack_tokens, dtype=self.dtype)
        return self._filled(key, trees, compute, sampled=sampled)

    def of_model(self, source: str, trees: Sequence[PreferenceTree]) -> list[np.ndarray]:
        """What another model, by its folder or name, says of each tree; it is loaded for that alone."""
        model = load_model(source, dtype=torch.float32)
        key = self.key(model)
        policy = make_policy(model, config=replace(self.config, activation_checkpointing="none"), world=self.world)
        policy.eval()

        def compute(pack: TreeBatch, policy: Policy = policy) -> torch.Tensor:
            return policy.logps(pack.to(self.world.device))

        found = self._filled(key, trees, compute)
        del policy, model, compute  # FSDP2's hooks and their module hold each other, and the memory of the shards
        gc.collect()
        return found

    def _filled(
        self,
        key: str,
        trees: Sequence[PreferenceTree],
        compute: Callable[[TreeBatch], torch.Tensor],
        *,
        sampled: bool = False,
    ) -> list[np.ndarray]:
        cache = ReferenceCache(self.folder, model_key=key)
        with tqdm(desc="reference", unit="pack", disable=None if self.world.main else True, leave=False) as bar:

            def show(done: int, packs: int) -> None:
                bar.total = packs
                bar.update(done - bar.n)
                if self.world.any(self.stop.asked):  # what is on the disk by now is found by the next run
                    raise SystemExit(STOPPED)

            found = fill(
                cache,
                trees,
                compute=compute,
                pack_tokens=self.config.pack_tokens,
                world=self.world,
                progress=show,
                sampled=sampled,
            )
        for problem in found.broken if self.world.main else ():
            warnings.warn(f"{problem}; its log-probabilities were computed again", stacklevel=2)
        return [logps_of(tree, cache, sampled=sampled) for tree in trees]


def load_trainable(
    source: Path | str, *, config: TrainConfig, world: World, references: References
) -> tuple[PreTrainedModel, str]:
    """The model of a run, with its adapter where it has one, and the key of its log-probabilities as it was loaded.

    It lies on this process's device, or, where a sharded copy is trained, on the CPU.
    """
    options: dict[str, Any] = {}
    if config.load_in_4bit:
        if world.grouped:
            raise InputError("--load_in_4bit is for a single process: start the run without torchrun")
        options = {"quantization_config": four_bit_config(), "device_map": {"": world.device}}
    model = load_model(source, dtype=torch.float32, **options)
    key = references.key(model)
    if config.use_peft:
        add_lora(model, lora_options(config), seed=config.seed)
    if not world.grouped and not config.load_in_4bit:
        model.to(world.device)  # type: ignore[arg-type]
    return model, key


def lora_options(config: TrainConfig) -> LoraOptions:
    """The adapter of a run."""
    return LoraOptions(config.lora_r, config.lora_alpha, config.lora_target_modules, config.use_rslora)


def make_round(
    number: int,
    trees: Sequence[PreferenceTree],
    policy: Policy,
    *,
    eval_trees: Sequence[PreferenceTree],
    config: TrainConfig,
    objective: Objective,
    references: References,
    key: str,
    begun: bool,
) -> Round:
    """A round over trees, and trees to evaluate on, with what the reference says of them; see `References.of_policy`
    for `key` and `begun`."""
    every = [*trees, *eval_trees]
    moving = None
    if config.sync_ref_model:
        moving = MovingReference(policy, alpha=config.ref_model_mixup_alpha, steps=config.ref_model_sync_steps)
    elif objective.reference == "distribution":
        moving = MovingReference(policy, alpha=1.0, steps=sys.maxsize)  # stays where it is
    logps: Sequence[np.ndarray | None] = [None] * len(every)
    if objective.reference != "none" and not config.sync_ref_model:
        if config.ref_model is None:
            logps = references.of_policy(policy, every, key=key, begun=begun)
        else:
            logps = references.of_model(config.ref_model, every)
    scores = None
    if objective.scores:
        assert config.score_model is not None
        minus = logps
        if config.score_model_minus is not None:
            minus = references.of_model(config.score_model_minus, every)
        plus = references.of_model(config.score_model, every)
        scores = [_scores(*given) for given in zip(every, plus, minus, strict=True)]
    examples: tuple[list[Example], list[Example]] = [], []
    for t, tree in enumerate(every):
        made = make_examples(
            [tree],
            tokenizer=references.tokenizer,
            terms=objective.terms,
            options=objective.options,
            token_weights=config.token_weights,
            error_weights=WeightOptions(error=config.error_weight, follow=config.follow_weight),
            scores=None if scores is None else [scores[t]],
        )
        for example in made:  # none where a tree has nothing to train on
            classes = tree_classes(example.tree, references.tokenizer)
            examples[t >= len(trees)].append(replace(example, logps=logps[t], classes=classes))
    if not examples[0]:
        raise InputError(f"the model wrote no token that --loss_type {config.loss_type} could train", path=config.data)
    return Round(
        number=number,
        examples=examples[0],
        eval_examples=examples[1],
        online=None if moving is None else moving.swapped,
        moving=moving,
    )


def decodable(model: PreTrainedModel, *, config: TrainConfig) -> PreTrainedModel:
    """The model itself, or, with an adapter, a copy that it is merged into: the sampler knows plain heads only. Weights
    of 4 bits take no adapter in, and their head has none."""
    return merge(copy.deepcopy(model)) if config.use_peft and not config.load_in_4bit else model


def save_trained(model: PreTrainedModel, tokenizer: Any, run: RunFolder, *, config: TrainConfig, source: str) -> Path:
    """Write the trained model to the run folder, an adapter apart and merged; returns the merged model's folder."""
    if config.use_peft:
        save_adapter(model, run.path / ADAPTER, base=source, write=run.main)
        if config.load_in_4bit:
            weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
            model = add_lora(load_model(source, dtype=torch.float32), lora_options(config))
            with torch.no_grad():
                for name, weight in weights.items():
                    model.get_parameter(name).copy_(weight)
        model = merge(model)
    return run.save_model(model, tokenizer)


def _scores(tree: PreferenceTree, plus: np.ndarray, minus: np.ndarray | None) -> list[PairWeights]:
    """The scores of the tokens of both sides of each pair, from those of all completion tokens in node order."""
    assert minus is not None
    score_N = np.nan_to_num(token_scores(plus, minus))  # nan: tokens that the model did not write, whose weight is 0
    start = np.cumsum([0, *(len(node.ids) for node in tree.nodes)])
    paths = [
        np.concatenate([score_N[start[n] : start[n + 1]] for n in tree.path(leaf)]) for leaf in range(len(tree.leaves))
    ]
    return [(paths[pair.chosen].tolist(), paths[pair.rejected].tolist()) for pair in tree.pairs]
