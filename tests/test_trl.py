"""A loss that TRL has, its metrics and its gradients are those of TRL's DPOTrainer on the same pairs."""

from __future__ import annotations

import pytest
import torch
import trl
from datasets import Dataset
from random_trees import random_tree
from transformers import Qwen3Config, Qwen3ForCausalLM

from ttpa.esm.weights import WeightOptions
from ttpa.losses import LossOptions, LossTerm, describe, pair_metrics, preference_loss
from ttpa.model import packed_logps, use_tree_attention
from ttpa.training.examples import denominators, make_examples
from ttpa.trees.pack import Term, pack_trees


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
    ("name", "options", "trl_options"),
    [
        ("sigmoid", {"beta": 0.1}, {}),
        ("sigmoid", {"beta": 0.7}, {}),
        ("hinge", {"beta": 0.3}, {}),
        ("ipo", {"beta": 0.2}, {}),
        ("robust", {"beta": 0.3, "label_smoothing": 0.1}, {"label_smoothing": 0.1}),
        ("nca_pair", {"beta": 0.3}, {}),
        ("apo_zero", {"beta": 0.3}, {}),
        ("apo_down", {"beta": 0.3}, {}),
        ("discopop", {"beta": 0.3, "discopop_tau": 0.4}, {"discopop_tau": 0.4}),
        ("ld_dpo", {"beta": 0.3, "ld_alpha": 0.4}, {"loss_type": ["sigmoid"], "ld_alpha": 0.4}),
        ("sft", {"beta": 0.3}, {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_equals_trl(name, options, trl_options, tokenizer, tmp_path):
    # TRL's sft counts a chosen side once for each of its pairs, so there each tree has one pair
    trees = [random_tree(seed, num_leaves=2 if name == "sft" else 3) for seed in (4, 5, 6)]
    want, want_grads, want_metrics = trl_loss(
        trees, tokenizer, tmp_path, {"loss_type": [name], "beta": options["beta"], **trl_options}
    )

    policy, reference = use_tree_attention(make_model(1)), use_tree_attention(make_model(2))
    terms = [LossTerm(name)]
    examples = make_examples(
        trees,
        tokenizer=tokenizer,
        terms=terms,
        options=LossOptions(**options),
        token_weights=None,
        error_weights=WeightOptions(),
    )
    weights = Term([example.weights[0] for example in examples], sides=describe(name).sides)
    batch = pack_trees([example.tree for example in examples], terms=[weights])
    logp = packed_logps(policy, batch)
    with torch.no_grad():
        ref_logp = packed_logps(reference, batch)
    trained = slice(0, batch.num_trained)
    loss, _ = preference_loss(
        name,
        logp_R=logp[trained],
        ref_logp_R=ref_logp[trained],
        chosen_PR=batch.terms[0].chosen_PR,
        rejected_PR=batch.terms[0].rejected_PR,
        options=LossOptions(**options),
        denominator=denominators(examples, terms=terms)[0],
    )
    loss.backward()

    torch.testing.assert_close(loss.float(), want, rtol=1e-5, atol=0)
    for parameter_name, parameter in policy.named_parameters():
        want_grad = want_grads[parameter_name]
        assert (parameter.grad - want_grad).norm() <= 2e-5 * want_grad.norm(), parameter_name
    if name in ("ld_dpo", "sft"):
        return  # TRL's metrics have LD-DPO's weights in them; for sft alone we pack no rejected sides
    got_metrics = pair_metrics(
        logp_R=logp,
        ref_logp_R=ref_logp,
        chosen_PR=batch.chosen_PR,
        rejected_PR=batch.rejected_PR,
        beta=options["beta"],
    )
    assert got_metrics == pytest.approx({name: want_metrics[name] for name in got_metrics}, rel=1e-4, abs=1e-6)
