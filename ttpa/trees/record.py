"""The preference tree: one prompt and every way that the answer goes on from it, each token stored once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Node:
    """A maximal run of tokens without a fork.

    `parent` is the index of the node that this run continues, -1 for the prompt. `logps` are the sampler's
    log-probabilities of `ids` and `entropy` the entropy in nats of the distribution each id was drawn from; both are
    None where nobody sampled. `trained` is 0 for tokens that the model did not write (a tool result in the middle of
    a trajectory); None means that all were written by the model.
    """

    parent: int
    ids: list[int]
    logps: list[float] | None = None
    entropy: list[float] | None = None
    trained: list[int] | None = None


@dataclass
class Leaf:
    """The end of one way through the tree: the node it ends with, what it says, and what ESM found in it.

    `kind` is gold, trunk, branch or given; `finish` is stop (it ended by itself) or length. `calls` are
    `{"name", "arguments"}`. Each error is `{"code", "call", "pointer", "tokens": [a, b]}` with a half-open range of
    token positions counted from the end of the prompt.
    """

    node: int
    kind: str
    finish: str = "stop"
    calls: list[dict[str, Any]] = field(default_factory=list)
    score: float | None = None
    errors: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Pair:
    """Two leaves, the better one first. `margin` is the difference of their ESM scores, 0 where nobody scored them."""

    chosen: int
    rejected: int
    margin: float = 0.0


@dataclass
class PreferenceTree:
    """One decision of one dialogue.

    Nodes stand in depth-first order: a parent before its children, a subtree in one run.
    Token ids are the truth, text is derived from them: nothing is tokenised again between sampling and training.
    """

    id: str
    prompt_ids: list[int]
    nodes: list[Node]
    leaves: list[Leaf]
    pairs: list[Pair]
    dialogue: str = ""
    turn: int = 0
    tools: list[dict[str, Any]] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)
    origin: dict[str, Any] = field(default_factory=dict)

    def path(self, leaf: int) -> list[int]:
        """Indexes of the nodes from the prompt to a leaf."""
        node, path = self.leaves[leaf].node, []
        while node >= 0:
            path.append(node)
            node = self.nodes[node].parent
        return path[::-1]

    def completion_ids(self, leaf: int) -> list[int]:
        """Token ids from the end of the prompt to the end of a leaf."""
        return [token for node in self.path(leaf) for token in self.nodes[node].ids]

    def trained(self, leaf: int) -> list[int]:
        """For each completion token of a leaf, 1 where the model wrote it and 0 elsewhere."""
        return [t for node in self.path(leaf) for t in (self.nodes[node].trained or [1] * len(self.nodes[node].ids))]

    def to_dict(self) -> dict[str, Any]:
        """The record as it stands on disk, one JSON object."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> PreferenceTree:
        """The inverse of `to_dict`; raises TypeError on unknown or missing fields."""
        parts = dict(record)
        parts["nodes"] = [Node(**node) for node in record["nodes"]]
        parts["leaves"] = [Leaf(**leaf) for leaf in record["leaves"]]
        parts["pairs"] = [Pair(**pair) for pair in record["pairs"]]
        return cls(**parts)


@dataclass
class _Branch:
    children: dict[int, _Branch] = field(default_factory=dict)
    trained: int = 1
    logp: float | None = None
    entropy: float | None = None
    leaves: list[int] = field(default_factory=list)


@dataclass
class Completion:
    """One completion on its way into a tree: ids, what is known of each token, and its leaf (node is filled in)."""

    ids: list[int]
    leaf: Leaf
    logps: list[float] | None = None
    entropy: list[float] | None = None
    trained: list[int] | None = None


def merge_completions(completions: Iterable[Completion]) -> tuple[list[Node], list[Leaf]]:
    """Merge completions of one prompt into the nodes and leaves of a tree, shared prefixes stored once.

    Leaves keep the order of the completions. Where two completions share a token, the first one's log-probability and
    entropy are kept. A completion may be a proper prefix of another: its leaf is then an inner node. Raises ValueError
    for an empty completion and for two equal ones.
    """
    root, leaves = _Branch(), []
    for count, completion in enumerate(completions):
        if not completion.ids:
            raise ValueError(f"completion {count} is empty")
        at = root
        for i, token in enumerate(completion.ids):
            child = at.children.get(token)
            if child is None:
                child = at.children[token] = _Branch(trained=completion.trained[i] if completion.trained else 1)
            if child.logp is None and completion.logps is not None:
                child.logp = completion.logps[i]
            if child.entropy is None and completion.entropy is not None:
                child.entropy = completion.entropy[i]
            at = child
        if at.leaves:
            raise ValueError(f"completions {at.leaves[0]} and {count} are equal")
        at.leaves.append(count)
        leaves.append(completion.leaf)

    nodes: list[Node] = []
    for parent, run in _runs(root):
        known_logps, known_entropy = [b.logp for _, b in run], [b.entropy for _, b in run]
        trained = [b.trained for _, b in run]
        nodes.append(
            Node(
                parent=parent,
                ids=[token for token, _ in run],
                logps=None if None in known_logps else known_logps,  # type: ignore[arg-type]
                entropy=None if None in known_entropy else known_entropy,  # type: ignore[arg-type]
                trained=None if all(trained) else trained,
            )
        )
        for leaf in run[-1][1].leaves:
            leaves[leaf].node = len(nodes) - 1
    return nodes, leaves


def _runs(root: _Branch) -> Iterator[tuple[int, list[tuple[int, _Branch]]]]:
    """Depth-first runs without a fork, each with the index of the run before it. A leaf ends its run."""
    stack = [(-1, token, child) for token, child in reversed(root.children.items())]
    index = -1
    while stack:
        parent, token, branch = stack.pop()
        run = [(token, branch)]
        while len(branch.children) == 1 and not branch.leaves:
            ((token, branch),) = branch.children.items()
            run.append((token, branch))
        index += 1
        yield parent, run
        stack.extend((index, token, child) for token, child in reversed(branch.children.items()))
