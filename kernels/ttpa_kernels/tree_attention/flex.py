"""The engine `flex`: the same rule and the same lists of blocks for PyTorch's FlexAttention."""

from __future__ import annotations

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ttpa_kernels.tree_attention.blocks import BlockLists

compiled = torch.compile(flex_attention)


def block_mask(lists: BlockLists) -> BlockMask:
    """The lists as FlexAttention takes them: full and partial key blocks apart."""
    end_T, (num_full_B, num_visible_B) = lists.end_T, lists.num_keys_2B
    index_B = torch.arange(len(num_full_B), device=end_T.device)
    partial_BB = lists.keys_BB.gather(1, (index_B + num_full_B[:, None]) % len(index_B))

    def sees(batch: torch.Tensor, head: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return (j <= i) & (i < end_T[j])

    return BlockMask.from_kv_blocks(
        (num_visible_B - num_full_B)[None, None],
        partial_BB[None, None],
        num_full_B[None, None],
        lists.keys_BB[None, None],
        BLOCK_SIZE=lists.block,
        mask_mod=sees,
        seq_lengths=(len(end_T), len(end_T)),
    )


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: BlockMask, scale: float
) -> torch.Tensor:
    """`tree_attention` by FlexAttention; a tensor `[1, T, N, D]` seen as `[1, N, T, D]`."""
    out = compiled(query, key, value, block_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1])
    return out.transpose(1, 2).contiguous().transpose(1, 2)
