"""What a sampler needs of the next token, from hidden states and the head: statistics, the likeliest tokens, a draw.

B decode rows, H hidden size, V vocabulary, K likeliest tokens.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch

from ttpa_kernels.checks import check_head, check_one_device
from ttpa_kernels.engine import Engine, choose_engine
from ttpa_kernels.linear_logp.chunks import Head
from ttpa_kernels.next_token import online
from ttpa_kernels.next_token.noise import uniform
from ttpa_kernels.numerics import wide
from ttpa_kernels.sharded import refuse_sharded, whole

MAX_TOP = 64

Results = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]  # the fields of `NextToken`, empty where they are None


class NextToken(NamedTuple):
    """Of the distribution `softmax(z)` of each row: `log sum e^z`, entropy and varentropy in nats, the K largest
    logits z in order and their token ids, and where keys are given a drawn token and its log-probability."""

    lse_B: torch.Tensor
    entropy_B: torch.Tensor
    varentropy_B: torch.Tensor
    top_logit_BK: torch.Tensor
    top_id_BK: torch.Tensor
    draw_B: torch.Tensor | None
    draw_logp_B: torch.Tensor | None


class TopDraw(NamedTuple):
    """Tokens drawn from filtered distributions, their log-probabilities in the full and in the filtered distribution,
    and whether the K likeliest tokens are sure to hold all that the filter keeps."""

    draw_B: torch.Tensor
    logp_B: torch.Tensor
    filtered_logp_B: torch.Tensor
    complete_B: torch.Tensor


def next_token(
    hidden_BH: torch.Tensor,
    weight_VH: torch.Tensor,
    *,
    num_top: int,
    key_B: torch.Tensor | None = None,
    bias_V: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    engine: Engine | None = None,
) -> NextToken:
    """Statistics of the full distribution of the next token, its `num_top` likeliest tokens, and an exact draw.

    Logits `z = softcap tanh(x / softcap) / temperature` with `x = logit_scale (W h + bias)`; rows of the head from
    `vocab_size` on take no part. Entropy `H = -sum p log p`, varentropy `sum p (log p + H)^2`. `top_logit_BK` is sorted
    descending, equal logits by the lower id; ids and draws are int64, all else fp32 (fp64 for fp64 inputs). The draw is
    `argmax_i z_i + g_i` (Gumbel-max), with noise g that is a function of `key_B` [B] int64 and the token alone: a row
    draws the same token in every batch. No gradients; nothing of size [B, V] is held, and the host waits for nothing.
    Raises ValueError for shapes, devices and values that do not fit, among them a `num_top` above 64 or the
    vocabulary, and TypeError for dtypes.
    """
    refuse_sharded(hidden_BH=hidden_BH, key_B=key_B)
    hidden_BH, weight_VH = hidden_BH.detach(), whole(weight_VH.detach(), "weight_VH")
    bias_V = None if bias_V is None else whole(bias_V.detach(), "bias_V")
    check_head(
        hidden_BH,
        weight_VH,
        bias_V=bias_V,
        logit_scale=logit_scale,
        softcap=softcap,
        temperature=temperature,
        vocab_size=vocab_size,
    )
    vocab_size = vocab_size or len(weight_VH)
    if not 0 <= num_top <= MAX_TOP:
        raise ValueError(f"num_top is {num_top}: it lies in [0, {MAX_TOP}]")
    if num_top > vocab_size:
        raise ValueError(f"num_top is {num_top}, the vocabulary has {vocab_size} tokens: ask for at most as many")
    if key_B is not None:
        _check_keys(key_B, hidden_BH)
    if hidden_BH.dtype == torch.float64:
        if engine == "triton":
            raise ValueError("engine='triton' has no float64: use engine='torch', or give float32")
        engine = "torch"
    engine = choose_engine(hidden_BH.device, engine)
    *found, draw_B, draw_logp_B = _next_token(
        hidden_BH, weight_VH, bias_V, key_B, num_top, logit_scale, softcap, temperature, vocab_size, engine
    )
    return NextToken(*found, *((None, None) if key_B is None else (draw_B, draw_logp_B)))


def draw_from_top(
    likeliest: NextToken,
    *,
    key_B: torch.Tensor,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    engine: Engine | None = None,
) -> TopDraw:
    """A token from the likeliest ones that all given filters keep, by inverse CDF with one uniform of each key.

    `top_k` keeps so many tokens, `top_p` the fewest likeliest that hold this much probability, `min_p` those of at
    least this share of the likeliest one's; probabilities are those of the full distribution. Only the K tokens of
    `likeliest` can be drawn: where a filter would keep more, `complete_B` is False. Raises ValueError for no filter, a
    filter that does not fit, or no likeliest tokens, and TypeError for keys that are not int64.
    """
    B, K = likeliest.top_id_BK.shape
    _check_keys(key_B, likeliest.top_id_BK)
    if K == 0:
        raise ValueError("likeliest holds no tokens: call next_token with num_top of at least 1")
    if top_k is None and top_p is None and min_p is None:
        raise ValueError("no filter: give top_k, top_p or min_p, or take the draw of next_token")
    if top_k is not None and not 1 <= top_k <= K:
        raise ValueError(f"top_k is {top_k}: it lies in [1, {K}], the tokens that next_token kept")
    for name, value in (("top_p", top_p), ("min_p", min_p)):
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"{name} is {value}: it lies in (0, 1]")
    logp_BK = likeliest.top_logit_BK - likeliest.lse_B[:, None]
    p_BK = logp_BK.double().exp()
    upto_BK = p_BK.cumsum(dim=1)
    keep_BK = torch.ones_like(p_BK, dtype=torch.bool)
    complete_B = torch.full((B,), top_k is not None, device=p_BK.device)
    if top_k is not None:
        keep_BK[:, top_k:] = False
    if top_p is not None:
        keep_BK &= upto_BK - p_BK < top_p
        complete_B |= upto_BK[:, -1] >= top_p
    if min_p is not None:
        keep_BK &= p_BK >= min_p * p_BK[:, :1]
    keep_BK[:, 0] = True
    complete_B |= ~keep_BK[:, -1]  # every filter keeps the first of a descending list: none beyond a dropped one
    mass_B = torch.where(keep_BK, p_BK, 0.0).sum(dim=1)
    uniform_B = uniform(key_B, engine=choose_engine(key_B.device, engine))
    at_B = (keep_BK & (upto_BK <= (uniform_B * mass_B)[:, None])).sum(dim=1)
    at_B = torch.minimum(at_B, keep_BK.sum(dim=1) - 1)[:, None]
    logp_B = logp_BK.gather(1, at_B)[:, 0].clamp(max=0.0)
    filtered_logp_B = (logp_B - mass_B.log()).clamp(max=0.0).to(logp_B.dtype)
    return TopDraw(likeliest.top_id_BK.gather(1, at_B)[:, 0], logp_B, filtered_logp_B, complete_B)


def _check_keys(key_B: torch.Tensor, like_BX: torch.Tensor) -> None:
    if key_B.shape != like_BX.shape[:1]:
        raise ValueError(f"key_B {tuple(key_B.shape)} must have one entry for each of {len(like_BX)} rows")
    if key_B.dtype != torch.int64:
        raise TypeError(f"key_B is {key_B.dtype}: convert it to torch.int64")
    check_one_device(key_B=key_B, rows=like_BX)


@torch.library.custom_op("ttpa_kernels::next_token", mutates_args=())
def _next_token(
    hidden_BH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: Optional[torch.Tensor],  # noqa: UP045 - the operator's schema is read from the annotations
    key_B: Optional[torch.Tensor],  # noqa: UP045
    num_top: int,
    logit_scale: float,
    softcap: Optional[float],  # noqa: UP045
    temperature: float,
    vocab_size: int,
    engine: str,
) -> Results:
    bias_V = None if bias_V is None else bias_V[:vocab_size]
    head = Head(weight_VH[:vocab_size], bias_V, None, logit_scale, softcap, temperature)
    if engine == "triton":
        from ttpa_kernels.next_token import kernel

        return kernel.next_token(head, hidden_BH, num_top=num_top, key_B=key_B)
    return online.next_token(head, hidden_BH, num_top=num_top, key_B=key_B)


@_next_token.register_fake
def _(
    hidden_BH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    key_B: torch.Tensor | None,
    num_top: int,
    *options: object,
) -> Results:
    B, dtype = len(hidden_BH), wide(hidden_BH.dtype)
    sizes = [(B,), (B,), (B,), (B, num_top), (B, num_top)] + [(0 if key_B is None else B,)] * 2
    dtypes = [dtype] * 4 + [torch.int64, torch.int64, dtype]
    found = (hidden_BH.new_empty(size, dtype=kind) for size, kind in zip(sizes, dtypes, strict=True))
    return tuple(found)  # type: ignore[return-value]
