"""Inputs of `next_token`, and how exact its results must be."""

from __future__ import annotations

from typing import Any

import torch
from head_cases import assert_as_exact_as_eager, eager_logits, exact_logits
from ttpa_kernels.next_token.op import NextToken
from ttpa_kernels.next_token.reference import next_token_from

STATISTICS = ("lse_B", "entropy_B", "varentropy_B", "top_logit_BK", "draw_logp_B")


def case(
    B: int, H: int, V: int, *, dtype: torch.dtype = torch.float32, peak: float = 4.0, device: Any = "cpu"
) -> dict[str, torch.Tensor]:
    """Tensors of `next_token` by name; the keys use all 64 bits."""
    generator = torch.Generator().manual_seed(B + 1000 * V)
    return {
        "hidden_BH": torch.randn(B, H, generator=generator).to(device, dtype),
        "weight_VH": (torch.randn(V, H, generator=generator) * peak / H**0.5).to(device, dtype),
        "key_B": torch.randint(-(2**63), 2**63 - 1, (B,), generator=generator).to(device),
    }


def assert_right(
    got: NextToken, *, hidden_BH: torch.Tensor, weight_VH: torch.Tensor, num_top: int, **options: Any
) -> None:
    """Ids and draws are those of fp64 logits, all else as exact as eager PyTorch makes it from its logits."""
    key_B = options.pop("key_B", None)
    exact, eager = (
        next_token_from(
            logits(hidden_RH=hidden_BH, weight_VH=weight_VH, **options), num_top=num_top, key_B=key_B
        )._asdict()
        for logits in (exact_logits, eager_logits)
    )
    assert got.top_id_BK.dtype == torch.int64 and torch.equal(got.top_id_BK, exact["top_id_BK"])
    assert (got.draw_B is None) == (key_B is None)
    names = STATISTICS if key_B is not None else STATISTICS[:-1]
    if key_B is not None:
        assert got.draw_B is not None and got.draw_B.dtype == torch.int64 and torch.equal(got.draw_B, exact["draw_B"])
        # Eager PyTorch may draw another token from coarser logits: its error is that of the token drawn here.
        eager["draw_logp_B"] = torch.log_softmax(
            eager_logits(hidden_RH=hidden_BH, weight_VH=weight_VH, **options), dim=1
        ).gather(1, got.draw_B[:, None])[:, 0]
    results = got._asdict()
    wide = torch.promote_types(hidden_BH.dtype, torch.float32)
    assert all(results[name].dtype == wide for name in names)
    assert_as_exact_as_eager(*({name: found[name] for name in names} for found in (results, exact, eager)))


def assert_same(got, want) -> None:
    """Equal tokens, and numbers equal to the bit on a GPU; the products of a CPU depend on where a row stands."""
    for x, y in zip(got, want, strict=True):
        if x.is_floating_point() and not x.is_cuda:
            torch.testing.assert_close(x, y, rtol=1e-6, atol=2e-6)
        else:
            assert torch.equal(x, y)
