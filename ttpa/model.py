"""Hugging Face models: loading, attention over packed trees, log-probabilities of head rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from ttpa_kernels import linear_kl, linear_logp
from ttpa_kernels.tree_attention.op import TreeMask, tree_attention, tree_mask

from ttpa.errors import InputError
from ttpa.tools.dialects import dialect_named
from ttpa.tools.dialects.detect import use_dialect
from ttpa.trees.pack import TreeBatch, pack_trees
from ttpa.trees.record import Completion, Leaf, Pair, PreferenceTree, merge_completions

TREE_ATTENTION = "ttpa_tree"


def load_model(path: Path | str, *, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    """Load a causal language model from a folder or by its Hugging Face name, onto the CPU, ready for packed trees.

    Tree attention is on and dropout off; `options` are further ones of transformers' `from_pretrained`. Only
    safetensors are read and no code from the folder runs. Raises InputError where there is no such model and where it
    cannot be run on trees (`use_tree_attention`).
    """
    config = _pretrained(AutoConfig, path)
    _refuse(config, path)
    model = use_tree_attention(
        _pretrained(AutoModelForCausalLM, path, config=config, dtype=dtype, use_safetensors=True, **options)
    )
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def window(config: PreTrainedConfig) -> int | None:
    """The longest text, in tokens, that a model of this configuration was made for; None where it does not say."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def load_tokenizer(path: Path | str, *, dialect: str | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer; `dialect` is a name out of `ttpa.tools.dialects.DIALECTS` in which its calls are read, None for
    the one that its chat template writes. Raises InputError where there is no such tokenizer or dialect, where the
    tokenizer has no chat template, and as `use_dialect` does."""
    if dialect is not None:
        dialect_named(dialect)  # before the tokenizer is looked for
    tokenizer = _pretrained(AutoTokenizer, path)
    if not tokenizer.chat_template:
        raise InputError(
            "the tokenizer has no chat template, so messages and tools cannot become tokens: use the instruct version "
            "of the model, or save its template as chat_template.jinja beside the tokenizer",
            path=path,
        )
    use_dialect(tokenizer, dialect)
    return tokenizer


def _pretrained(loader: Any, path: Path | str, **options: Any) -> Any:
    if not Path(path).is_dir() and str(path).count("/") != 1:
        raise InputError(
            "there is no such folder; give a model folder or a Hugging Face name such as org/model", path=path
        )
    try:
        return loader.from_pretrained(path, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be loaded: {error}", path=path) from error


def use_tree_attention(model: PreTrainedModel) -> PreTrainedModel:
    """Switch a model to tree attention, for good, and return it.

    The setting belongs to the model's own config and is not saved with it. Without a tree the attention is
    transformers' SDPA, so the model generates and runs as before. Raises InputError, with the model type and the
    reason, for models with other attention than full causal attention, with a head that does more than one matrix
    product, with attention that transformers does not let one replace, and for any other whose log-probabilities of
    a small packed tree are not those of its plain forward (tried at once, unless the weights are on the meta device).
    """
    name = model.config.name_or_path or None
    _refuse(model.config, name)
    head, problem = model.get_output_embeddings(), None
    if not model._supports_attention_backend:
        problem = "its attention cannot be replaced through transformers' AttentionInterface"
    elif getattr(model, "_is_stateful", False):
        problem = "it keeps a recurrent state"
    elif any(name.endswith("sinks") for name, _ in model.named_parameters()):
        problem = "attention sinks are not supported"
    elif head is None:
        problem = "it has no language model head"
    elif getattr(head, "bias", None) is not None:
        problem = "a head with a bias is not supported"
    else:
        model.set_attn_implementation(TREE_ATTENTION)
        if model.device.type != "meta":
            problem = _try_out(model)
    if problem:
        raise _not_served(model.config, name, problem)
    return model


# What bends or scales logits or scores on the way, by the names that configs use for it.
_BENDS = ("attn_logit_softcapping", "final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier")


def _refuse(config: PreTrainedConfig, path: Path | str | None) -> None:
    """Raise InputError for what the config alone rules out."""
    text, problem = config.get_text_config(decoder=True), None
    layer_types = getattr(text, "layer_types", None)
    others = sorted(set(layer_types or ()) - {"full_attention"})
    if config.is_encoder_decoder:
        problem = "an encoder-decoder is not supported"
    elif others:
        problem = f"it has layers of type {', '.join(others)}, and only full_attention is supported"
    elif layer_types is None and getattr(text, "sliding_window", None) is not None:
        problem = "sliding-window attention is not supported"
    for name in _BENDS:
        if problem is None and getattr(text, name, None) is not None:
            problem = f"softcapping ({name}) is not supported"
    for name in _SCALES:
        if problem is None and getattr(text, name, None) not in (None, 1):
            problem = f"scaling of logits ({name}) is not supported"
    if problem:
        raise _not_served(config, path, problem)


def _not_served(config: PreTrainedConfig, path: Path | str | None, problem: str) -> InputError:
    return InputError(f"model type {config.model_type!r} cannot be run on trees: {problem}", path=path)


@torch.no_grad()
def _try_out(model: PreTrainedModel) -> str | None:
    """What is wrong with the log-probabilities of a small tree, None where they are those of the plain forward."""
    nodes, leaves = merge_completions(Completion(ids, Leaf(0, "given")) for ids in ([2, 4, 6], [2, 5]))
    tree = PreferenceTree("probe", [1, 3], nodes, leaves, [Pair(0, 1)])
    batch = pack_trees([tree]).to(model.device)
    was_training = model.training
    model.eval()
    try:
        logp_R = packed_logps(model, batch)
        sums = torch.cat([batch.chosen_PR @ logp_R.double(), batch.rejected_PR @ logp_R.double()])
        expected = []
        for leaf in range(2):
            ids = torch.tensor([tree.prompt_ids + tree.completion_ids(leaf)], device=model.device)
            plain = model(input_ids=ids, use_cache=False).logits[0, 1:-1].double().log_softmax(dim=-1)
            expected.append(plain.gather(1, ids[0, 2:, None]).sum())
    except (RuntimeError, TypeError, ValueError) as error:
        return f"its attention does not take a tree ({error})"
    finally:
        model.train(was_training)
    # bf16 rounds hidden states at 2^-8; what this is here to find (a mask that is ignored, a scaled head) is far larger
    tolerance = 5e-2 if model.dtype.itemsize == 2 or getattr(model, "is_quantized", False) else 1e-3
    plain_sums = torch.stack(expected)
    worst = float(((sums - plain_sums).abs() / (1 + plain_sums.abs())).max())
    return None if worst < tolerance else f"its log-probabilities over a tree are off by {worst:.1e} of their size"


def _tree_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    tree: TreeMask | None = None,
    paged: Any = None,  # of ttpa.sampling.passes.PagedCache
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention as transformers calls it: `[1, heads, T, width]` in, `[1, T, heads, width]` out."""
    if paged is not None:
        return paged.attend(module.layer_idx, query, key, value, options.get("scaling")), None
    if tree is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    out = tree_attention(query, key, value, tree, scale=options.get("scaling"))
    return out.transpose(1, 2), None


AttentionInterface.register(TREE_ATTENTION, _tree_attention)
AttentionMaskInterface.register(TREE_ATTENTION, sdpa_mask)


def packed_hidden(model: PreTrainedModel, batch: TreeBatch) -> torch.Tensor:
    """The last hidden states `[T, H]` of packed trees, each token seeing its ancestors only, in the model's dtype."""
    assert model.config._attn_implementation == TREE_ATTENTION, "call use_tree_attention(model) first"
    output = model.get_decoder()(
        input_ids=batch.ids_T[None],
        position_ids=batch.position_T[None],
        # transformers hands a mask of four dimensions down as it is and builds none of its own
        attention_mask=batch.end_T[None, None, None],
        tree=tree_mask(batch.end_T),
        use_cache=False,
    )
    return output.last_hidden_state[0]


def head_weight(model: PreTrainedModel) -> torch.Tensor:
    """The weight `[V, H]` of the language model head."""
    return model.get_output_embeddings().weight


class Distribution(NamedTuple):
    """What a model says of the next token at head rows: last hidden states `[R, H]` and the head's weight `[V, H]`."""

    hidden_RH: torch.Tensor
    weight_VH: torch.Tensor


def packed_logps(model: PreTrainedModel, batch: TreeBatch, *, report: bool = True) -> torch.Tensor:
    """Log-probabilities in nats, fp32, of the head rows of packed trees.

    The trained rows come first and carry a gradient, the reported rows come after and carry none. Without `report`
    only the first `batch.num_trained` rows are computed. The same weights give the same bits with and without a
    gradient.
    """
    return packed_logps_and_kl(model, batch, reference=None, report=report)[0]


HeadAdapter = Callable[[torch.Tensor], Mapping[str, torch.Tensor]]
"""From the head's input the options `adapter_RA` and `adapter_VA` of `linear_logp`."""


def packed_logps_and_kl(
    model: PreTrainedModel,
    batch: TreeBatch,
    *,
    reference: Distribution | None,
    report: bool,
    adapter: HeadAdapter | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`packed_logps`, and KL(reference || model) in nats, fp32, with a gradient, of the trained rows, None without a
    reference (`packed_distribution` of the same batch). `adapter` is a low-rank adapter of the head, which goes with
    log-probabilities alone."""
    assert reference is None or adapter is None
    hidden_TH, weight_VH = _head_inputs(model, batch)

    def logps(rows: slice) -> torch.Tensor:
        hidden_RH = hidden_TH[batch.row_R[rows]]
        low = {} if adapter is None else adapter(hidden_RH)
        return linear_logp(
            hidden_RH,
            weight_VH,
            batch.target_R[rows],
            adapter_RA=low.get("adapter_RA"),
            adapter_VA=low.get("adapter_VA"),
        )

    trained, kl_R = slice(0, batch.num_trained), None
    logp_R = logps(trained)
    if reference is not None:
        kl_R = linear_kl(hidden_TH[batch.row_R[trained]], weight_VH, reference.hidden_RH, reference.weight_VH)
    if report:
        with torch.no_grad():
            reported_R = logps(slice(batch.num_trained, None))
        logp_R = torch.cat([logp_R, reported_R])
    return logp_R, kl_R


@torch.no_grad()
def packed_distribution(model: PreTrainedModel, batch: TreeBatch) -> Distribution:
    """What the model says at the trained rows; the weight is a copy, so that the model may change afterwards."""
    hidden_TH, weight_VH = _head_inputs(model, batch)
    return Distribution(hidden_TH[batch.row_R[: batch.num_trained]], weight_VH.clone())


def _head_inputs(model: PreTrainedModel, batch: TreeBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and the head's weight in the dtype in which matrix products are computed, which under autocast is
    neither that of the residual stream nor that of the weight."""
    hidden_TH, weight_VH = packed_hidden(model, batch), head_weight(model)
    device = hidden_TH.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VH.dtype
    return hidden_TH.to(dtype), weight_VH.to(dtype)


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """The model in evaluation mode, and afterwards in the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
