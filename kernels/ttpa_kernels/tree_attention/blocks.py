"""Which blocks of keys a block of queries can see, as lists that the kernels walk along."""

from __future__ import annotations

from typing import NamedTuple

import torch

BLOCK = 128  # tokens of a block, of queries and of keys


class BlockLists(NamedTuple):
    """For every block of one kind the blocks of the other kind that it meets, and how many; all int32.

    A row of `keys_BB` (`queries_BB`) lists the key (query) blocks of one query (key) block: first the full ones, in
    which every query sees every key, then the partial ones, both ascending; what comes after them is not visible.
    `num_keys_2B` (`num_queries_2B`) holds the number of full ones and of full and partial ones together.
    """

    block: int
    end_T: torch.Tensor
    keys_BB: torch.Tensor
    num_keys_2B: torch.Tensor
    queries_BB: torch.Tensor
    num_queries_2B: torch.Tensor


def block_lists(end_T: torch.Tensor, *, block: int = BLOCK) -> BlockLists:
    """The lists of a pack, made on its device without waiting for it.

    A token of a key block that begins before query block [a, b) is seen there iff it ends after a, so the block is
    visible iff its largest end does, and full iff it lies before the queries and its smallest end is not below b.
    A last block that is not filled is never full: the tokens that it lacks have to be masked.
    """
    T, device = len(end_T), end_T.device
    num_blocks = -(-T // block)
    end_BC = torch.nn.functional.pad(end_T.int(), (0, num_blocks * block - T)).view(num_blocks, block)
    start_B = torch.arange(num_blocks, device=device, dtype=torch.int32) * block
    start_B1 = start_B[:, None]
    visible_BB = (start_B <= start_B1) & (end_BC.amax(dim=1) > start_B1)
    full_BB = (start_B < start_B1) & (end_BC.amin(dim=1) >= start_B1 + block)
    rank_BB = 2 - visible_BB.int() - full_BB.int()
    lists = []
    for rank in (rank_BB, rank_BB.T.contiguous()):
        lists.append(rank.argsort(dim=1, stable=True).int())
        lists.append(torch.stack([(rank == 0).sum(dim=1), (rank < 2).sum(dim=1)]).int())
    return BlockLists(block, end_T.int().contiguous(), *lists)
