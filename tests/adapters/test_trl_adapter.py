"""TRL's DPOTrainer with token weights: with all of them 1 it is TRL's own, with others it is what a loop says."""

from __future__ import annotations

import copy

import pytest
import torch
import trl
from datasets import Dataset
from random_trees import random_tree

from ttpa.adapters.trl import TokenDPOTrainer, pair_rows
from ttpa.errors import InputError

BETA = 0.3


@pytest.fixture
def trees():
    return [random_tree(seed, num_leaves=3) for seed in (4, 5, 6)]


def weights_of(trees, weight):
    """The same function of its place gives the weight of every completion token."""
    return [
        [
            tuple([weight(i) for i in range(len(tree.completion_ids(leaf)))] for leaf in (pair.chosen, pair.rejected))
            for pair in tree.pairs
        ]
        for tree in trees
    ]


class Plain(trl.DPOTrainer):
    """TRL's own loss over rows of token ids."""

    def _prepare_dataset(self, dataset, *args):
        return dataset


def make(trainer, model, rows, tokenizer, folder, **options):
    args = trl.DPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        beta=BETA,
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        **{"gradient_checkpointing": False, **options},
    )
    torch.manual_seed(7)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return trainer(
        model=copy.deepcopy(model),
        ref_model=reference,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def loss_and_gradient(trainer, rows):
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"loss_type": ["hinge"]}, {"loss_type": ["robust"], "label_smoothing": 0.1}])
def test_with_weights_of_1_loss_and_gradient_are_trls(options, trees, tiny_model, tokenizer, tmp_path):
    rows = pair_rows(trees, weights_of(trees, lambda i: 1))
    ours, theirs = (make(kind, tiny_model, rows, tokenizer, tmp_path, **options) for kind in (TokenDPOTrainer, Plain))
    (loss, gradient), (want, want_gradient) = loss_and_gradient(ours, rows), loss_and_gradient(theirs, rows)
    assert loss == pytest.approx(want, rel=1e-6)
    for name in want_gradient:
        assert (gradient[name] - want_gradient[name]).norm() <= 2e-5 * want_gradient[name].norm(), name


def test_with_weights_of_1_two_steps_train_as_trl_does(trees, tiny_model, tokenizer, tmp_path):
    rows = pair_rows(trees, weights_of(trees, lambda i: 1))
    ours, theirs = (make(kind, tiny_model, rows, tokenizer, tmp_path) for kind in (TokenDPOTrainer, Plain))
    ours.train()
    theirs.train()
    logs = [[line for line in trainer.state.log_history if "loss" in line] for trainer in (ours, theirs)]
    assert len(logs[0]) == len(logs[1]) == 2
    shared = ["loss", "num_tokens", "logps/chosen", "logps/rejected"]
    shared += [f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")]
    for got, want in zip(*logs, strict=True):
        assert {name: got[name] for name in shared} == pytest.approx({name: want[name] for name in shared}, rel=1e-3)
    before, after = dict(tiny_model.named_parameters()), dict(ours.model.named_parameters())
    for name, parameter in theirs.model.named_parameters():
        moved = (parameter - before[name]).norm()
        assert (after[name] - parameter).norm() <= 1e-2 * moved, name
        assert moved > 0


def test_token_weights_change_the_loss_as_a_loop_says(trees, tiny_model, tokenizer, tmp_path):
    rows = pair_rows(trees, weights_of(trees, lambda i: (0.0, 2.0, 0.5)[i % 3]))
    trainer = make(TokenDPOTrainer, tiny_model, rows, tokenizer, tmp_path)
    loss, gradient = loss_and_gradient(trainer, rows)

    model = copy.deepcopy(tiny_model)

    def weighted_sum(model, row, side):
        ids = torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])
        logp = model(input_ids=ids).logits[0].double().log_softmax(dim=-1)
        first = len(row["prompt_ids"])
        return sum(w * logp[first + i - 1, ids[0, first + i]] for i, w in enumerate(row[f"{side}_weights"]))

    want = 0.0
    for row in rows:
        margin = weighted_sum(model, row, "chosen") - weighted_sum(model, row, "rejected")
        with torch.no_grad():
            reference = trainer.ref_model
            margin -= weighted_sum(reference, row, "chosen") - weighted_sum(reference, row, "rejected")
        want = want - torch.nn.functional.logsigmoid(BETA * margin) / len(rows)
    want.backward()
    assert loss == pytest.approx(want.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        assert (gradient[name] - parameter.grad).norm() <= 2e-5 * parameter.grad.norm(), name


def test_trls_own_columns_of_text_take_weights_and_are_cut_with_them(tiny_model, tokenizer, tmp_path):
    row = {"prompt": "ab", "chosen": "cdef", "rejected": "cg"}
    row |= {"chosen_weights": [1, 2, 3, 4, 5], "rejected_weights": [6, 7, 8]}  # with TRL's end of sequence
    for mode, want in (("keep_start", [[0, 0, 1, 2], [0, 0, 6, 7]]), ("keep_end", [[2, 3, 4, 5], [0, 6, 7, 8]])):
        trainer = make(TokenDPOTrainer, tiny_model, [row] * 4, tokenizer, tmp_path, max_length=4, truncation_mode=mode)
        batch = trainer.data_collator([trainer.train_dataset[0]])
        assert batch["token_weights"].tolist() == want
    trainer.train()
    assert trainer.state.global_step == 2


def test_what_it_cannot_follow_is_refused(trees, tiny_model, tokenizer, tmp_path):
    rows = pair_rows(trees, weights_of(trees, lambda i: 1))
    for options, message in [
        ({"loss_type": ["ipo"]}, "sigmoid, hinge, robust"),
        ({"loss_type": ["sigmoid", "sft"]}, "sigmoid, hinge, robust"),
        ({"ld_alpha": 0.5}, "--ld_alpha 0.5"),
        ({"precompute_ref_log_probs": True}, "--precompute_ref_log_probs"),
    ]:
        with pytest.raises(InputError, match=message):
            make(TokenDPOTrainer, tiny_model, rows, tokenizer, tmp_path, **options)
    trainer = make(TokenDPOTrainer, tiny_model, rows, tokenizer, tmp_path)
    with pytest.raises(InputError, match="has 1 weights: give one for each"):
        trainer.data_collator([{**rows[0], "chosen_weights": [1.0]}])
