"""The loss of a run, a weighted sum of terms, over the packs of an optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from ttpa_kernels.token_dpo.pairs import PairMatrix

from ttpa.losses import (
    Leaves,
    LossOptions,
    LossTerm,
    describe,
    packed_leaves,
    pair_metrics,
    preference_loss,
    start_loss,
)
from ttpa.training.classes import class_metrics, class_sums
from ttpa.training.examples import Example, denominators
from ttpa.training.flops import ModelShape, pack_flops, size_of_trees
from ttpa.training.policy import Rows
from ttpa.trees.pack import Term, TreeBatch, pack_trees

Metrics = dict[str, float]
SUM = "sum/"  # marks sums by token class among parts of means


@dataclass(frozen=True)
class Objective:
    """The terms of a loss and what they were told.

    Every value is a sum over pairs, tokens or trees divided by how many there are in the whole optimizer step, over
    all packs and processes: the sum of the parts is the step's, and does not depend on how the step is cut.
    """

    terms: tuple[LossTerm, ...]
    options: LossOptions

    @cached_property
    def reference(self) -> str:
        """What the reference model has to give: none, logps (of the tokens), distribution (over the vocabulary)."""
        needs = [describe(term.name).reference for term in self.terms]
        return max(needs, key=("none", "logps", "distribution").index)

    @cached_property
    def scores(self) -> bool:
        """Whether some term weighs tokens by the scores of helper models."""
        return any(describe(term.name).scores for term in self.terms)

    @cached_property
    def leaves(self) -> Leaves:
        """Which leaves of a tree are packed."""
        return packed_leaves(self.terms)

    @cached_property
    def whole(self) -> bool:
        """Whether some term compares the leaves of a tree with each other, so that trees cannot be split."""
        return any(describe(term.name).per == "tree" for term in self.terms)

    @cached_property
    def pairs(self) -> bool:
        """Whether some term prefers one completion over another."""
        return any(describe(term.name).leaves == "pairs" for term in self.terms)

    @cached_property
    def starts(self) -> dict[str, float]:
        """What metrics of the loss are where policy and reference are equal, without those that depend on the model."""
        found: dict[str, float] = {}
        for term in self.terms:
            start = start_loss(term.name, self.options)
            if start is not None:
                alone = len(self.terms) == 1
                found["loss" if alone else f"loss/{term.name}"] = start * (term.weight if alone else 1.0)
        return found

    def pack(self, examples: Sequence[Example]) -> TreeBatch:
        """One pack of examples, with their reference log-probabilities where they have them."""
        logps = [example.logps for example in examples if example.logps is not None]
        return pack_trees(
            [example.tree for example in examples],
            terms=self._weights(examples),
            logps=logps if len(logps) == len(examples) else None,
        )

    def _weights(self, examples: Sequence[Example]) -> list[Term]:
        return [
            Term([example.weights[k] for example in examples], sides=describe(term.name).sides)
            for k, term in enumerate(self.terms)
        ]

    def denominators(self, examples: Sequence[Example]) -> list[float]:
        """What each term is divided by in a step of these examples."""
        return denominators(examples, terms=self.terms)

    def cost(self, example: Example, *, shape: ModelShape) -> float:
        """Floating-point operations that an example takes in a pack, forward and backward."""
        return pack_flops(shape, size_of_trees([example.tree], terms=self._weights([example])))

    def loss(
        self,
        rows: Rows,
        pack: TreeBatch,
        *,
        ref_logp_R: torch.Tensor | None,
        denominators: Sequence[float],
        num_pairs: int,
        matrices: Sequence[PairMatrix],
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """A pack's part of the step's loss, with a gradient, and of its metrics, without: `loss`, and where there are
        several terms `loss/NAME` of each before its weight. `ref_logp_R` covers the trained rows at least, `num_pairs`
        counts the pairs of the whole step, `matrices` are the terms' `coefficients`, on the device of the pack."""
        trained = slice(0, pack.num_trained)
        # a pack without trained rows has a backward pass all the same, as those of other processes wait for it
        total = 0.0 * rows.logp_R[trained].double().sum()
        share = len(pack.pairs) / num_pairs
        metrics: dict[str, torch.Tensor] = {}
        for term, part, matrix, denominator in zip(self.terms, pack.terms, matrices, denominators, strict=True):
            loss, found = preference_loss(
                term.name,
                logp_R=rows.logp_R[trained],
                ref_logp_R=None if ref_logp_R is None else ref_logp_R[trained],
                chosen_PR=part.chosen_PR,
                rejected_PR=part.rejected_PR,
                C=matrix,
                kl_R=rows.kl_R,
                tree_P=pack.tree_P,
                options=self.options,
                denominator=denominator,
            )
            total = total + term.weight * loss.double()
            for name, mean in found.items():
                metrics[f"{term.name}/{name}" if name in metrics else name] = share * mean
            if len(self.terms) > 1:
                metrics[f"loss/{term.name}"] = loss.detach()
        return total, {"loss": total.detach(), **metrics}

    def report(
        self,
        rows: Rows,
        pack: TreeBatch,
        examples: Sequence[Example],
        *,
        ref_logp_R: torch.Tensor,
        num_pairs: int,
    ) -> Metrics:
        """A pack's part of TRL's metrics over whole completions, and of the sums by token class; needs all rows,
        reported ones included."""
        means = pair_metrics(
            logp_R=rows.logp_R,
            ref_logp_R=ref_logp_R,
            chosen_PR=pack.chosen_PR,
            rejected_PR=pack.rejected_PR,
            beta=self.options.beta,
        )
        found = {name: mean * len(pack.pairs) / num_pairs for name, mean in means.items()}
        classes = [example.classes for example in examples if example.classes is not None]
        if len(classes) == len(examples):
            sums = class_sums(
                pack, np.concatenate(classes), logp_R=rows.logp_R, ref_logp_R=ref_logp_R, beta=self.options.beta
            )
            found |= {f"{SUM}{name}": value for name, value in sums.items()}
        return found

    def metrics(self, summed: Metrics) -> Metrics:
        """The metrics of a step from the sum of its packs' parts."""
        sums = {name.removeprefix(SUM): value for name, value in summed.items() if name.startswith(SUM)}
        means = {name: value for name, value in summed.items() if not name.startswith(SUM)}
        return means | (class_metrics(sums) if sums else {})


def coefficients(pack: TreeBatch, device: torch.device) -> list[PairMatrix]:
    """The coefficients of each term of a pack that lies on the CPU, where they are read, on `device`."""
    return [PairMatrix.from_sparse(term.C).to(device) for term in pack.terms]
