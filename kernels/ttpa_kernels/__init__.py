"""Kernels for preference training: plain tensors in, plain tensors out."""

from ttpa_kernels.adapters.cross_entropy import linear_cross_entropy
from ttpa_kernels.linear_kl.op import linear_kl
from ttpa_kernels.linear_logp.op import linear_logp, linear_logp_stats
from ttpa_kernels.linear_token_dpo.op import linear_token_dpo
from ttpa_kernels.next_token.op import draw_from_top, next_token
from ttpa_kernels.token_dpo.op import token_dpo
from ttpa_kernels.token_dpo.pairs import PairMatrix
from ttpa_kernels.tree_attention.op import tree_attention, tree_mask

__all__ = [
    "PairMatrix",
    "draw_from_top",
    "linear_cross_entropy",
    "linear_kl",
    "linear_logp",
    "linear_logp_stats",
    "linear_token_dpo",
    "next_token",
    "token_dpo",
    "tree_attention",
    "tree_mask",
]
