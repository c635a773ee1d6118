"""Counter-based noise: a number for every key and token, the same whatever else is computed beside it.

Philox 4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011), in int64 arithmetic. `kernel.py`
computes the same bits.
"""

from __future__ import annotations

import torch

from ttpa_kernels.engine import Engine

LOW = 0xFFFFFFFF
FACTORS = (0xD2511F53, 0xCD9E8D57)
STEPS = (0x9E3779B9, 0xBB67AE85)  # of the two halves of the key
LARGEST = 1 - 2.0**-24  # below 1 in fp32

Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def philox(counter: Words, key: torch.Tensor) -> Words:
    """Four random words in [0, 2^32) from a counter of four such words and a key of 64 bits, all int64."""
    a, b, c, d = counter
    low, high = key & LOW, (key >> 32) & LOW
    for _ in range(10):
        left, right = a * FACTORS[0], c * FACTORS[1]  # exact modulo 2^64, which holds all 64 bits
        a, b, c, d = ((right >> 32) & LOW) ^ b ^ low, right & LOW, ((left >> 32) & LOW) ^ d ^ high, left & LOW
        low, high = (low + STEPS[0]) & LOW, (high + STEPS[1]) & LOW
    return a, b, c, d


def unit(word: torch.Tensor) -> torch.Tensor:
    """fp32 in (0, 1): `(word + 1/2) / 2^32`, which is fine near 0 and never 0 or 1."""
    return (word.float() * 2.0**-32 + 2.0**-33).clamp_(max=LARGEST)


def gumbel(key_B: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Gumbel noise `-log(-log(1 - v)) [B, stop - start]` of the tokens from `start` on, in [-2.9, 23], fp32.

    `v` of token i is word `i mod 4` of the counter `(i div 4, 0, 0, 0)`.
    """
    quad_Q = torch.arange(start // 4, -(-stop // 4), device=key_B.device)
    zero_Q = torch.zeros_like(quad_Q)
    words = philox((quad_Q, zero_Q, zero_Q, zero_Q), key_B[:, None])
    word_BV = torch.stack(words, dim=2).flatten(1)[:, start % 4 :][:, : stop - start]
    return unit(word_BV).neg_().log1p_().neg_().log_().neg_()


def uniform(key_B: torch.Tensor, *, engine: Engine) -> torch.Tensor:
    """One number in (0, 1) for each key, fp32, from the counter `(0, 1, 0, 0)`, which no token has."""
    if engine == "triton":
        from ttpa_kernels.next_token import kernel

        return kernel.uniform(key_B)
    zero_B = torch.zeros_like(key_B)
    return unit(philox((zero_B, zero_B + 1, zero_B, zero_B), key_B)[0])
