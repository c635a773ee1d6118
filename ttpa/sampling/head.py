"""The next token of every row from its hidden state: statistics, the likeliest tokens, and the one that is taken.

B decode rows, H hidden size, V vocabulary, K likeliest tokens.
"""

from __future__ import annotations

import hashlib
import json
from typing import NamedTuple, TypeVar

import torch
from ttpa_kernels.engine import Engine
from ttpa_kernels.next_token.op import MAX_TOP, draw_from_top, next_token
from ttpa_kernels.numerics import wide

LARGEST_KEY = 2**63 - 1

Key = TypeVar("Key", int, torch.Tensor)


class Picked(NamedTuple):
    """The token taken in each row and, of the full distribution at temperature 1, its log-probability, the entropy
    (nats), the varentropy (nats squared) and the K likeliest tokens in order, equal ones by the lower id. `complete_B`
    is False where a filter would have kept more tokens than were known."""

    token_B: torch.Tensor
    logp_B: torch.Tensor
    entropy_B: torch.Tensor
    varentropy_B: torch.Tensor
    top_id_BK: torch.Tensor
    top_p_BK: torch.Tensor
    complete_B: torch.Tensor


def pick(
    hidden_BH: torch.Tensor,
    weight_VH: torch.Tensor,
    *,
    num_top: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    key_B: torch.Tensor | None = None,
    engine: Engine | None = None,
) -> Picked:
    """Take the next token of every row and measure the distribution it comes from.

    At temperature 0 it is the likeliest token, the lowest id of equal ones, and `key_B` plays no part. Above, it is
    drawn from `softmax(z / temperature)` with the noise of `key_B` [B] int64, one key a row, so a row's draw does not
    depend on its batch: by Gumbel-max over the vocabulary or, where `top_k`, `top_p` or `min_p` is given, by inverse
    CDF over what all filters keep of the tempered distribution's 64 likeliest tokens. K is `num_top`, at least 1, or
    the vocabulary where that is smaller; ids are int64, all else fp32 (fp64 for fp64 inputs). Nothing waits for the
    device and all shapes are fixed, so a CUDA graph can hold a call. Raises ValueError and TypeError as `next_token`
    and `draw_from_top` do.
    """
    K = min(num_top, len(weight_VH))
    drawing = temperature > 0
    filtered = drawing and (top_k, top_p, min_p) != (None, None, None)
    known = min(MAX_TOP, len(weight_VH)) if filtered else K
    plain = drawing and temperature == 1 and not filtered
    found = next_token(hidden_BH, weight_VH, num_top=known, key_B=key_B if plain else None, engine=engine)
    complete_B = torch.ones_like(found.lse_B, dtype=torch.bool)
    if not drawing:
        token_B, logit_B = found.top_id_BK[:, 0], found.top_logit_BK[:, 0]
    else:
        assert key_B is not None, "a draw needs a key for every row"
        tempered = found
        if temperature != 1:
            keys_B = None if filtered else key_B
            tempered = next_token(hidden_BH, weight_VH, num_top=0, key_B=keys_B, temperature=temperature, engine=engine)
        if filtered:
            likeliest = tempered._replace(top_logit_BK=found.top_logit_BK / temperature, top_id_BK=found.top_id_BK)
            most = None if top_k is None else min(top_k, known)
            drawn = draw_from_top(likeliest, key_B=key_B, top_k=most, top_p=top_p, min_p=min_p, engine=engine)
            token_B, complete_B = drawn.draw_B, drawn.complete_B | (known == len(weight_VH))
        else:
            assert tempered.draw_B is not None
            token_B = tempered.draw_B
        dtype = wide(hidden_BH.dtype)
        logit_B = (hidden_BH.to(dtype) * weight_VH[token_B].to(dtype)).sum(dim=1)
    return Picked(
        token_B,
        (logit_B - found.lse_B).clamp(max=0.0),
        found.entropy_B,
        found.varentropy_B,
        found.top_id_BK[:, :K],
        (found.top_logit_BK[:, :K] - found.lse_B[:, None]).exp(),
        complete_B,
    )


def path_key(seed: int, tree_id: str, path: str) -> int:
    """The key of a path's draws, in [0, 2^63): a hash (BLAKE2b) of the seed, the tree's id and the path's name."""
    name = json.dumps([seed, tree_id, path]).encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") & LARGEST_KEY


def draw_key(key: Key, position: Key) -> Key:
    """The key of the draw of a completion position, `(key + position) mod 2^63`, of numbers or of int64 tensors."""
    return (key + position) & LARGEST_KEY
