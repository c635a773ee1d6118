"""What must hold before the first step is taken."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ttpa.errors import InputError
from ttpa.training.examples import Example
from ttpa.training.objective import Metrics, Objective
from ttpa.training.policy import Policy
from ttpa.trees.classes import class_counts
from ttpa.trees.pack import Term, pack_trees, packed_tokens
from ttpa.world import World

# bf16 rounds at 2^-8 of a hidden state, differently in passes of different shapes; a mask or a position that is wrong,
# or a reference of another model, is off by far more
TOLERANCE = {False: 2e-3, True: 0.5}  # nats, of one token's log-probability, by whether the policy computes in bf16
START_TOLERANCE = {False: 2e-5, True: 5e-2}  # of the loss, or of 1 where it is smaller


def check_packing(policy: Policy, examples: Sequence[Example], *, world: World) -> None:
    """Raise InputError unless the packed log-probabilities of the shortest example are those of transformers' own
    forward over each of its completions, with causal attention and all logits."""
    tree = min((example.tree for example in examples), key=lambda tree: (packed_tokens(tree), tree.id))
    leaves = sorted({leaf for pair in tree.pairs for leaf in (pair.chosen, pair.rejected)})[:2]
    batch = pack_trees([tree], terms=[Term(sides=True)]).to(world.device)
    packed = dict(zip(batch.place_R.tolist(), policy.logps(batch).tolist(), strict=True))
    start = [0]
    for node in tree.nodes:
        start.append(start[-1] + len(node.ids))
    worst = 0.0
    for leaf in leaves:
        places = [place for n in tree.path(leaf) for place in range(start[n], start[n + 1])]
        plain = policy.plain_logps(tree.prompt_ids + tree.completion_ids(leaf), prompt=len(tree.prompt_ids))
        for i, logp in zip(places, plain.tolist(), strict=True):
            off = abs(packed[i] - logp) if i in packed else 0.0
            worst = max(worst, off if math.isfinite(off) else math.inf)
    if not worst <= TOLERANCE[policy.bf16]:
        raise InputError(
            f"the packed log-probabilities of tree {tree.id!r} are off by up to {worst:.1e} nats from a plain forward "
            f"(allowed: {TOLERANCE[policy.bf16]}), so this model cannot be trained on trees exactly; --selfcheck false "
            "goes on nevertheless"
        )


def check_classes(examples: Sequence[Example], objective: Objective) -> dict[str, int]:
    """The number of tokens of each class that the examples train; raises InputError where a tool's result or a
    prompt is among them, which the model did not write."""
    counts: Counter[str] = Counter()
    for example in examples:
        pack = objective.pack([example])
        assert example.classes is not None
        counts.update(class_counts(example.classes[pack.place_R[: pack.num_trained].numpy()]))
        for foreign, what in (("tool_result", "a tool's result"), ("prompt", "a prompt")):
            if counts[foreign]:
                raise InputError(
                    f"tree {example.tree.id!r} would train tokens of {what}; set `trained` to 0 for them in its nodes "
                    "(--selfcheck false goes on nevertheless)"
                )
    return {name: count for name, count in counts.items() if count}


def check_start(metrics: Metrics, objective: Objective, *, bf16: bool, path: Path | None) -> None:
    """Raise InputError unless the first loss, term by term, is the one that two equal models give: ln 2 for DPO."""
    for name, start in objective.starts.items():
        loss = metrics[name]
        if not abs(loss - start) <= START_TOLERANCE[bf16] * max(1.0, abs(start)):
            raise InputError(
                f"the first {name} is {loss:.7f} and not {start:.7f}, so policy and reference differ before any step "
                "was taken: the model does not compute the same twice, or the reference is another model; its margins "
                "cannot be trusted (--selfcheck false goes on nevertheless)",
                path=path,
            )
