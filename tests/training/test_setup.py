from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
from random_trees import random_tree

from ttpa.errors import InputError
from ttpa.model import use_tree_attention
from ttpa.training.config import TrainConfig
from ttpa.training.setup import copy_back, fingerprint, make_objective, make_policy
from ttpa.world import World

CONFIG = TrainConfig(model="tiny")


@pytest.mark.parametrize("options", [{"compile": True}, {"offload": "activations"}, {"offload": "optimizer"}])
def test_what_a_cpu_has_no_use_for_is_refused(tiny_model, options):
    with pytest.raises(InputError, match=f"--{next(iter(options))} .* is for GPUs"):
        make_policy(use_tree_attention(tiny_model), config=replace(CONFIG, **options), world=World())


def test_one_process_trains_the_model_itself(tiny_model):
    model = use_tree_attention(tiny_model)
    policy = make_policy(model, config=CONFIG, world=World())
    assert policy.model is model
    copy_back(policy, model)


def test_a_checkpoint_knows_its_data_and_not_where_it_lies(tmp_path):
    trees = [random_tree(seed) for seed in range(3)]
    mark = fingerprint(CONFIG, model="a", trees=trees)
    moved = replace(CONFIG, data=tmp_path / "moved.jsonl", output=tmp_path, pack_tokens=1, logging_steps=3)
    assert fingerprint(moved, model="a", trees=copy.deepcopy(trees)) == mark
    assert fingerprint(replace(CONFIG, beta=0.3), model="a", trees=trees) != mark
    assert fingerprint(CONFIG, model="b", trees=trees) != mark
    trees[1].leaves[2].errors = [{"code": "value.wrong", "call": 0, "pointer": "/a", "tokens": [0, 3]}]
    assert fingerprint(CONFIG, model="a", trees=trees) != mark  # the errors decide the weights of tokens


def test_the_objective_knows_what_its_terms_need():
    def objective(loss_type, **options):
        return make_objective(replace(CONFIG, loss_type=loss_type, **options))

    assert objective("ttpa").reference == "logps" and objective("ttpa").leaves == "pairs"
    assert objective("simpo").reference == "none" and objective("simpo,tdpo2").reference == "distribution"
    assert objective("sft").leaves == "chosen" and not objective("sft").pairs
    assert objective("likelihood").whole and not objective("ttpa,sft").whole
    ln_2 = pytest.approx(math.log(2))
    assert objective("ttpa,hinge,sft").starts == {"loss/ttpa": ln_2, "loss/hinge": 1.0}
    assert objective("robust", loss_weights="2").starts == {"loss": pytest.approx(2 * math.log(2))}
