"""TRL's DPOTrainer with a weight for each completion token: `TokenDPOTrainer` in its place, and rows from trees.

    rows = Dataset.from_list(pair_rows(trees, weights))
    TokenDPOTrainer(model, args=trl.DPOConfig(...), train_dataset=rows, processing_class=tokenizer).train()

For TRL 1.16. After `ttpa_kernels.adapters.trl.install()` the log-probabilities come from our head, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from ttpa.adapters.sums import pair_loss, weighted_sums
from ttpa.errors import InputError
from ttpa.losses import LossType
from ttpa.trees.pack import PairWeights
from ttpa.trees.record import PreferenceTree

LOSSES = ("sigmoid", "hinge", "robust")
COLUMNS = ("chosen_weights", "rejected_weights")
# Options of DPOConfig that are not followed, with their defaults.
UNUSED = {"ld_alpha": None, "use_weighting": False, "f_divergence_type": "reverse_kl", "loss_weights": None}


def pair_rows(trees: Sequence[PreferenceTree], weights: Sequence[Sequence[PairWeights]]) -> list[dict[str, Any]]:
    """The pairs of trees as rows for `TokenDPOTrainer`: the token ids as they are, never tokenized again, and for each
    completion token its weight, `weights[tree][pair]`."""
    return [
        {
            "prompt_ids": tree.prompt_ids,
            "chosen_ids": tree.completion_ids(pair.chosen),
            "rejected_ids": tree.completion_ids(pair.rejected),
            **{name: [float(weight) for weight in side] for name, side in zip(COLUMNS, sides, strict=True)},
        }
        for tree, weights_of_tree in zip(trees, weights, strict=True)
        for pair, sides in zip(tree.pairs, weights_of_tree, strict=True)
    ]


@dataclass
class WeightCollator(DataCollatorForPreference):
    """TRL's collator, and `token_weights [2B, S]` (fp32) beside its `completion_mask`, from the two columns of weights.
    Raises InputError for a row with another number of weights than tokens."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch of rows."""
        batch = super().torch_call(examples)
        counted_BS = batch["completion_mask"].bool()
        sides = [(row[name], row[name.replace("weights", "ids")]) for name in COLUMNS for row in examples]
        kept: list[float] = []
        for (weights, ids), left in zip(sides, counted_BS.sum(dim=1).tolist(), strict=True):
            if len(weights) != len(ids):
                raise InputError(f"a completion of {len(ids)} tokens has {len(weights)} weights: give one for each")
            kept += weights[:left] if self.truncation_mode == "keep_start" else weights[len(weights) - left :]
        batch["token_weights"] = torch.zeros(counted_BS.shape).masked_scatter(
            counted_BS, torch.tensor(kept, dtype=torch.float32)
        )
        return batch


class TokenDPOTrainer(DPOTrainer):
    """DPOTrainer whose loss is `mean_p f(beta m_p)` (`ttpa.losses.token_dpo_loss`): m_p is the weighted sum of
    `logp - ref_logp` over the chosen side less that over the rejected side.

    The dataset has the columns of `pair_rows`, or TRL's own and the two of weights, one for each token into which TRL
    tokenizes a completion. `loss_type` is sigmoid (with `label_smoothing`: conservative DPO), robust or hinge. Logged
    are TRL's rewards/* and logps/*, of the weighted sums, and num_tokens. Raises InputError for options of DPOConfig
    that it does not follow.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.data_collator = WeightCollator(**vars(self.data_collator))
        if len(self.loss_types) != 1 or self.loss_types[0] not in LOSSES:
            raise InputError(f"--loss_type {self.loss_types}: TokenDPOTrainer has one of {', '.join(LOSSES)}")
        for name, default in UNUSED.items():
            if getattr(self.args, name) != default:
                raise InputError(f"--{name} {getattr(self.args, name)}: TokenDPOTrainer does not know it; leave it out")

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        return dataset if "prompt_ids" in dataset.column_names else super()._prepare_dataset(dataset, *args)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        columns += [name for name in COLUMNS if name not in columns]

    def _precompute_ref_logps(self, *args: Any) -> Any:
        raise InputError("--precompute_ref_log_probs: TRL's cache knows no token weights; leave it out")

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        weight_BS = inputs["token_weights"][:, 1:]
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask", "completion_mask")}

        def weighted(model: Any, **options: Any) -> SimpleNamespace:
            logp_BS = model(**options).log_probs[:, -weight_BS.shape[1] :]  # prompt tuning has virtual tokens in front
            return SimpleNamespace(log_probs=weighted_sums(logp_BS, weight_BS)[:, None])

        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        options = {"labels": labels, "fused_lm_head": True, "use_cache": False}
        policy = weighted(model, input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **options)
        chosen_P, rejected_P = policy.log_probs[:, 0].chunk(2)
        # TRL's own pass over the reference, which knows of adapters and autocast, sums over what it is given.
        reference = self.ref_model or self.model
        ref_chosen_P, ref_rejected_P = self.compute_ref_log_probs(lambda **given: weighted(reference, **given), inputs)
        loss, chosen_reward_P, rejected_reward_P = pair_loss(
            chosen_P=chosen_P,
            rejected_P=rejected_P,
            ref_chosen_P=ref_chosen_P,
            ref_rejected_P=ref_rejected_P,
            beta=self.beta,
            loss_type=cast(LossType, self.loss_types[0]),
            label_smoothing=self.label_smoothing,
        )
        metrics = {
            "rewards/chosen": chosen_reward_P,
            "rewards/rejected": rejected_reward_P,
            "rewards/margins": chosen_reward_P - rejected_reward_P,
            "rewards/accuracies": (chosen_reward_P > rejected_reward_P).double(),
            "logps/chosen": chosen_P.detach(),
            "logps/rejected": rejected_P.detach(),
        }
        mode = "train" if model.training else "eval"
        for name, value_P in metrics.items():
            self._metrics[mode][name].append(self.accelerator.gather(value_P).mean().item())
        if model.training:
            self._total_train_tokens += int(self.accelerator.gather(inputs["attention_mask"].sum()).sum())
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        return (loss, {}) if return_outputs else loss
