"""The model that is trained, as one module whose forward holds body and fused head, so that it can be sharded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from ttpa.model import Distribution, packed_distribution, packed_logps_and_kl
from ttpa.training.lora import head_adapter
from ttpa.trees.pack import TreeBatch


class Rows(NamedTuple):
    """Of the head rows of a pack, in nats, fp32: `logp_R`, trained rows with a gradient and then, if asked for,
    reported rows without one; `kl_R`, KL(reference || policy) of the trained rows with a gradient, where a reference
    was given."""

    logp_R: torch.Tensor
    kl_R: torch.Tensor | None


class Policy(nn.Module):
    """A causal language model over packs of trees; `bf16` computes under autocast, on weights of any dtype.

    Whatever is computed goes through `forward`: FSDP2 gathers the root's weights, embedding and head, for that alone.
    """

    def __init__(self, model: PreTrainedModel, *, bf16: bool = False) -> None:
        super().__init__()
        self.model, self.bf16 = model, bf16

    def forward(self, compute: Callable[[PreTrainedModel], Any]) -> Any:
        """The result of `compute(model)`; tuples of tensors, in which FSDP2 finds whose gradients it waits for."""
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bf16):
            return compute(self.model)

    @property
    def blocks(self) -> list[nn.Module]:
        """The decoder's layers, in order: the units of sharding, checkpointing and compilation."""
        return list(self.model.get_decoder().layers)

    def rows(self, pack: TreeBatch, *, report: bool = False, reference: Distribution | None = None) -> Rows:
        """Log-probabilities of the trained rows, with `report` of all rows, and the divergence from a reference."""
        return Rows(*self(partial(_rows, pack=pack, reference=reference, report=report)))

    def logps(self, pack: TreeBatch, *, report: bool = True) -> torch.Tensor:
        """Log-probabilities without gradients, in nats, fp32, of all rows, or of the trained ones."""
        return self._without_gradients(partial(_rows, pack=pack, reference=None, report=report))[0]

    def distribution(self, pack: TreeBatch) -> Distribution:
        """Hidden states and head of the trained rows, without gradients, as they are now."""
        return Distribution(*self._without_gradients(lambda model: packed_distribution(model, pack)))

    def plain_logps(self, ids: Sequence[int], *, prompt: int) -> torch.Tensor:
        """Log-probabilities of the tokens behind the first `prompt` ones of one sequence, from transformers' own
        forward with causal attention and whole logits: the slow twin of `logps`."""

        def compute(model: PreTrainedModel) -> tuple[torch.Tensor]:
            ids_T = torch.tensor([ids], device=model.device)
            kept = len(ids) - prompt + 1
            logits_TV = model(input_ids=ids_T, use_cache=False, logits_to_keep=kept).logits[0, :-1].float()
            return (logits_TV.log_softmax(dim=-1).gather(1, ids_T[0, prompt:, None])[:, 0],)

        return self._without_gradients(compute)[0]

    @torch.no_grad()
    def _without_gradients(self, compute: Callable[[PreTrainedModel], Any]) -> Any:
        found = self(compute)
        if isinstance(self, FSDPModule):
            self.reshard()  # a root stays gathered for its backward pass, and would be stale after the next step
        return found


def _rows(
    model: PreTrainedModel, *, pack: TreeBatch, reference: Distribution | None, report: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    adapter = head_adapter(model)
    options = None if adapter is None else adapter.options
    return packed_logps_and_kl(model, pack, reference=reference, report=report, adapter=options)
