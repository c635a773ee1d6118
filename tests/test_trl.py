"""With all weights 1 the loss, its metrics and its gradients are those of TRL's DPOTrainer on the same pairs."""

from __future__ import annotations

import pytest
import torch
import trl
from datasets import Dataset
from random_trees import random_tree
from transformers import Qwen3Config, Qwen3ForCausalLM

from ttpa.losses import pair_metrics, token_dpo_loss
from ttpa.model import packed_logps, use_tree_attention
from ttpa.trees.pack import pack_trees


def make_model(seed: int) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.2,
    )
    return Qwen3ForCausalLM(config)


def trl_loss(trees, tokenizer, folder, options):
    rows = [
        {
            "prompt_ids": tree.prompt_ids,
            "chosen_ids": tree.completion_ids(pair.chosen),
            "rejected_ids": tree.completion_ids(pair.rejected),
        }
        for tree in trees
        for pair in tree.pairs
    ]
    policy = make_model(1)
    trainer = trl.DPOTrainer(
        model=policy,
        ref_model=make_model(2),
        args=trl.DPOConfig(output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", **options),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),  # not used
        processing_class=tokenizer,
    )
    trainer.data_collator.pad_token_id = 0  # the tokenizer's own lies outside the small vocabulary
    loss = trainer.compute_loss(policy, trainer.data_collator(rows))
    loss.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return loss, {name: p.grad for name, p in policy.named_parameters()}, metrics


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "sigmoid", "beta": 0.1},
        {"loss_type": "sigmoid", "beta": 0.7},
        {"loss_type": "hinge", "beta": 0.3},
        {"loss_type": "ipo", "beta": 0.2},
        {"loss_type": "robust", "beta": 0.3, "label_smoothing": 0.1},
    ],
    ids=lambda options: f"{options['loss_type']}-{options['beta']}",
)
def test_equals_trl(options, tokenizer, tmp_path):
    trees = [random_tree(seed, num_leaves=3) for seed in (4, 5, 6)]
    want, want_grads, want_metrics = trl_loss(
        trees, tokenizer, tmp_path, {**options, "loss_type": [options["loss_type"]]}
    )

    policy, reference = use_tree_attention(make_model(1)), use_tree_attention(make_model(2))
    batch = pack_trees(trees, average=options["loss_type"] == "ipo")
    logp = packed_logps(policy, batch)
    with torch.no_grad():
        ref_logp = packed_logps(reference, batch)
    trained = slice(0, batch.num_trained)
    loss, _ = token_dpo_loss(logp_R=logp[trained], ref_logp_R=ref_logp[trained], C=batch.C, **options)
    loss.backward()

    torch.testing.assert_close(loss, want, rtol=1e-5, atol=0)
    for name, parameter in policy.named_parameters():
        assert (parameter.grad - want_grads[name]).norm() <= 2e-5 * want_grads[name].norm(), name
    got_metrics = pair_metrics(
        logp_R=logp,
        ref_logp_R=ref_logp,
        chosen_PR=batch.chosen_PR,
        rejected_PR=batch.rejected_PR,
        beta=options["beta"],
    )
    assert got_metrics == pytest.approx({name: want_metrics[name] for name in got_metrics}, rel=1e-4, abs=1e-6)
