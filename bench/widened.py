"""A model of any larger shape that computes the same function as a small one.

Pairs mean something only where a model answers in earnest, and seconds only at the size of a real model. A model of
that size which answers the questions of the built-in world is not at hand, so the embedded one is made wider and
deeper without changing what it computes: it answers at the cost of the larger shape. Its further tokens are blanks,
which make a prompt longer, at full cost, and change no answer: the embedded model itself has no use for a prompt of
more than some 600 tokens.
"""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

BLANK = 1e6
"""Size of the embedding of a blank along its two dimensions: in the head it lowers the logit of the blank."""

QUERY, GAIN = 1e-3, 1e9
"""How much of the constant a query holds, too little to be felt by its norm, and how much larger it is made then."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder whose embeddings are tied to its head, under their names in its config."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int


EMBEDDED = Shape(160, 4, 4, 2, 64, 384, 1280)
"""Little more than the embedded model itself: 128, 4, 4, 2, 32, 384, 1024."""

QWEN_05B = Shape(896, 24, 14, 2, 64, 4864, 151936)
"""The shape of Qwen2.5-0.5B."""

QWEN_15B = Shape(1536, 28, 12, 2, 128, 8960, 151936)
"""The shape of Qwen2.5-1.5B."""


@torch.no_grad()
def widened(small: Qwen3ForCausalLM, shape: Shape) -> Qwen3ForCausalLM:
    """A Qwen3 of a larger shape with the log-probabilities of `small` up to rounding, in its dtype (fp32 or bf16)
    and on its device. h and H are the two hidden sizes, d and D the head widths. Raises ValueError where the shape
    cannot hold the small model.

    Weights are padded with zeros. RMSNorm divides by sqrt(|x|^2 / H + eps) instead of sqrt(|x|^2 / h + eps), so the
    residual stream is written larger by s = sqrt(H / h) and its norm weights are smaller by s. Heads likewise. The
    dimensions of a head lie where RoPE has the frequency that they had: theta^(-2i/d) is that of pair i D / d. Query
    heads stay with their key heads. Further layers compute with random weights and write nothing.

    Tokens outside the small vocabulary are blanks: never likely, where a row of zeros would give them the logit 0,
    and never attended to. Dimension h of the residual stream is a constant c: every token of the small vocabulary
    writes it and no layer changes it. A blank writes -BLANK there, and that is its weight in the head: its logit is
    -BLANK c / rms(x). The constant stands in for a part of eps: with eps / 2 in the config and c^2 / H = eps / 2 each
    norm stays what it was. The logits of all other tokens gain the same c^2 / rms(x), which no probability depends
    on. Dimension h + 1 is BLANK for blanks and 0 for others. Queries take a share QUERY of the constant into a
    dimension of a head that was free, which the norm then multiplies by GAIN; keys take dimension h + 1, negative: so
    the score of a blank is -QUERY GAIN c / (rms(x) rms(q)), below -100 for any x that occurs, and that of any other
    token stays what it was. RoPE hardly turns that dimension within 8192 tokens.
    """
    config: Any = small.config
    _check(config, shape)
    H, h, V = shape.hidden_size, config.hidden_size, config.vocab_size
    grown, eps = math.sqrt(H / h), config.rms_norm_eps / 2
    wide_config = Qwen3Config(
        **asdict(shape),
        rms_norm_eps=eps,
        rope_parameters=dict(config.rope_parameters),
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=True,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    with small.device:
        wide = Qwen3ForCausalLM._from_config(wide_config, dtype=small.dtype).eval()
    wide.generation_config = copy.deepcopy(small.generation_config)
    embedding_VH = wide.model.embed_tokens.weight.zero_()
    embedding_VH[:V, :h] = grown * small.model.embed_tokens.weight
    embedding_VH[:V, h] = math.sqrt(H * eps)
    embedding_VH[V:, h : h + 2] = torch.tensor([-BLANK, BLANK], device=small.device)
    wide.model.norm.weight[:h] = small.model.norm.weight / grown**2  # the stream and the head are both larger
    for number, layer in enumerate(wide.model.layers):
        if number < config.num_hidden_layers:
            _fill(layer, small.model.layers[number], config, shape)
        else:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return wide


def _check(config: Any, shape: Shape) -> None:
    group = config.num_attention_heads // config.num_key_value_heads
    for wrong, why in (
        (not config.tie_word_embeddings, "its head is not that of its embeddings"),
        (shape.hidden_size < config.hidden_size + 2, "the hidden size leaves no two dimensions free"),
        (shape.head_dim < 2 * config.head_dim, "the head width is less than twice its own"),
        (shape.head_dim % config.head_dim, f"the head width is no multiple of {config.head_dim}"),
        (shape.num_attention_heads // shape.num_key_value_heads < group, f"key heads need {group} query heads each"),
        (shape.num_hidden_layers < config.num_hidden_layers, "too few layers"),
        (shape.num_key_value_heads < config.num_key_value_heads, "too few key heads"),
        (shape.intermediate_size < config.intermediate_size, "the intermediate size is too small"),
        (shape.vocab_size < config.vocab_size, "the vocabulary is too small"),
    ):
        if wrong:
            raise ValueError(f"{shape} cannot hold the model: {why}")


def _fill(wide: Any, small: Any, config: Any, shape: Shape) -> None:
    """The weights of one decoder layer."""
    h, d, D, intermediate = config.hidden_size, config.head_dim, shape.head_dim, config.intermediate_size
    grown, wider = math.sqrt(shape.hidden_size / h), math.sqrt(D / d)
    pair_i = torch.arange(d // 2) * (D // d)
    place_d = torch.cat([pair_i, D // 2 + pair_i])  # the two sides of a pair lie half a head apart
    free = D // 2 - 1  # belongs to the slowest pair, where nothing lies
    group = config.num_attention_heads // config.num_key_value_heads
    wide_group = shape.num_attention_heads // shape.num_key_value_heads
    query_starts = D * torch.tensor([n // group * wide_group + n % group for n in range(config.num_attention_heads)])
    key_starts = D * torch.arange(config.num_key_value_heads)
    query_rows, key_rows = ((starts[:, None] + place_d).flatten() for starts in (query_starts, key_starts))
    attention, target = small.self_attn, wide.self_attn
    # Behind these two is a norm with half of the eps: it must find half of the variance in a head that is wider.
    target.q_proj.weight.zero_()[query_rows, :h] = wider / math.sqrt(2) * attention.q_proj.weight
    target.k_proj.weight.zero_()[key_rows, :h] = wider / math.sqrt(2) * attention.k_proj.weight
    target.v_proj.weight.zero_()[key_rows, :h] = attention.v_proj.weight
    target.o_proj.weight.zero_()[:h, query_rows] = grown * attention.o_proj.weight
    # Scores are divided by sqrt(D) instead of sqrt(d): queries keep that factor, keys give it back.
    target.q_norm.weight[place_d] = attention.q_norm.weight
    target.k_norm.weight[place_d] = attention.k_norm.weight / wider
    target.q_proj.weight[query_starts + free, h] = QUERY
    target.q_norm.weight[free] = GAIN
    target.k_proj.weight[key_starts + free, h + 1] = -1.0
    for name in ("gate_proj", "up_proj"):
        wide.mlp.get_submodule(name).weight.zero_()[:intermediate, :h] = small.mlp.get_submodule(name).weight
    wide.mlp.down_proj.weight.zero_()[:h, :intermediate] = grown * small.mlp.down_proj.weight
    for name in ("input_layernorm", "post_attention_layernorm"):
        wide.get_submodule(name).weight[:h] = small.get_submodule(name).weight / grown
