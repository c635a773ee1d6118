"""Random preference trees for tests: nested forks, ragged lengths, leaves that end inside others."""

from __future__ import annotations

import random

from ttpa.trees.record import Completion, Leaf, Pair, PreferenceTree, merge_completions


def random_tree(seed: int, *, vocabulary: int = 40, num_leaves: int = 4, tools: bool = False) -> PreferenceTree:
    """Each completion after the first leaves an earlier one at a random token; with `tools` some are not trained."""
    rng = random.Random(seed)

    def token() -> int:
        return rng.randrange(1, vocabulary)

    completions = [[token() for _ in range(rng.randint(4, 12))]]
    while len(completions) < num_leaves:
        parent = rng.choice(completions)
        fork = rng.randrange(len(parent))
        new = parent[:fork] + [token() for _ in range(rng.randint(1, 8))]
        if new not in completions:
            completions.append(new)
    # whether the model wrote a token depends on where it stands, so that completions agree on shared tokens
    written = [int(not tools or i % 5 < 3) for i in range(30)]
    nodes, leaves = merge_completions(
        Completion(ids, Leaf(0, "gold" if i == 0 else "branch"), trained=written[: len(ids)])
        for i, ids in enumerate(completions)
    )
    pairs = [Pair(0, i, margin=rng.random()) for i in range(1, num_leaves)]
    if num_leaves > 2:
        pairs.append(Pair(1, 2, margin=rng.random()))
    return PreferenceTree(f"tree{seed}", [token() for _ in range(rng.randint(1, 9))], nodes, leaves, pairs)
