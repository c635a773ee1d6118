"""The preference loss of pairs straight from hidden states and the head, with all gradients.

R head rows, H hidden size, V vocabulary, P pairs, A rank of a low-rank adapter of the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch

from ttpa_kernels.checks import check_head, check_target_range, check_targets
from ttpa_kernels.engine import Engine, choose_engine
from ttpa_kernels.linear_logp.chunks import Head, Rows
from ttpa_kernels.linear_logp.passes import Gradients, Needs
from ttpa_kernels.linear_logp.plan import Need
from ttpa_kernels.linear_token_dpo.plan import choose_plan
from ttpa_kernels.linear_token_dpo.stream import Stream
from ttpa_kernels.numerics import wide
from ttpa_kernels.sharded import refuse_sharded, whole
from ttpa_kernels.token_dpo.op import check_loss, check_pairs, check_vectors, totals_of
from ttpa_kernels.token_dpo.pairs import PairMatrix, Structure
from ttpa_kernels.token_dpo.segments import Loss, LossType, PairValues


class HeadMargins(NamedTuple):
    """The fields of `token_dpo.op.Margins`, and the log-probabilities in nats, NaN for rows without a coefficient,
    which are not computed; `ref_logp_R` is what was given, or None where there is no reference."""

    margin_P: torch.Tensor
    reward_P: torch.Tensor
    mean_reward: torch.Tensor
    accuracy: torch.Tensor
    logp_R: torch.Tensor
    ref_logp_R: torch.Tensor | None


def linear_token_dpo(
    *,
    hidden_RH: torch.Tensor,
    weight_VH: torch.Tensor,
    target_R: torch.Tensor,
    pairs: PairMatrix,
    ref_logp_R: torch.Tensor | None = None,
    ref_hidden_RH: torch.Tensor | None = None,
    ref_weight_VH: torch.Tensor | None = None,
    ref_bias_V: torch.Tensor | None = None,
    bias_V: torch.Tensor | None = None,
    adapter_RA: torch.Tensor | None = None,
    adapter_VA: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    beta: float = 0.1,
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
    margin_P: torch.Tensor | None = None,
    pair_weight_P: torch.Tensor | None = None,
    denominator: float | None = None,
    budget_bytes: int | None = None,
    engine: Engine | None = None,
) -> tuple[torch.Tensor, HeadMargins]:
    """`token_dpo` of `linear_logp(hidden_RH, weight_VH, target_R)`, and its gradients at the same time.

    The head and its options are those of `linear_logp`, the loss and its options those of `token_dpo`. The reference
    is `ref_logp_R` in nats, or computed from `ref_hidden_RH` without an adapter, by `ref_weight_VH` and `ref_bias_V`
    or, where no weight is given, by the policy's own weight and bias; with none of these it is 0. Only rows with a
    coefficient meet the vocabulary; the targets of the others may be anything. Differentiable in hidden states,
    weight, bias and adapter (once); gradients are formed with the loss, connected components of C (of packed trees:
    the trees) one after the other, so that a trained head costs three products of `2 R V H` flops (a frozen one two)
    however many pairs there are, as long as the exponentials of each component fit into `budget_bytes`; see `plan`.
    The loss is fp32 (fp64 for fp64 inputs), gradients have the dtype of the inputs, nothing waits for the device.
    Raises ValueError or TypeError for arguments that do not fit. The derivation is in `linear_token_dpo/README.md`.
    """
    refuse_sharded(hidden_RH=hidden_RH, target_R=target_R, adapter_RA=adapter_RA, ref_hidden_RH=ref_hidden_RH)
    weight_VH, bias_V = whole(weight_VH, "weight_VH"), whole(bias_V, "bias_V")
    adapter_VA = whole(adapter_VA, "adapter_VA")
    ref_weight_VH, ref_bias_V = whole(ref_weight_VH, "ref_weight_VH"), whole(ref_bias_V, "ref_bias_V")
    options = {"logit_scale": logit_scale, "softcap": softcap, "temperature": temperature, "vocab_size": vocab_size}
    adapter = {"adapter_RA": adapter_RA, "adapter_VA": adapter_VA}
    check_head(hidden_RH, weight_VH, bias_V=bias_V, **adapter, **options)  # type: ignore[arg-type]
    check_targets(target_R, hidden_RH)
    check_loss(loss_type, beta, label_smoothing, denominator)
    P, R, device = pairs.num_pairs, pairs.num_rows, hidden_RH.device
    if len(hidden_RH) != R:
        raise ValueError(f"hidden_RH has {len(hidden_RH)} rows and C {R}: give the rows that C is about")
    check_pairs(pairs, device)
    check_vectors(device, R, "head rows", ref_logp_R=ref_logp_R)
    check_vectors(device, P, "pairs", margin_P=margin_P, pair_weight_P=pair_weight_P)
    _check_reference(hidden_RH, weight_VH, ref_logp_R, ref_hidden_RH, ref_weight_VH, ref_bias_V)
    inputs = (hidden_RH, weight_VH, bias_V, adapter_RA, adapter_VA)
    arguments = _Arguments(
        hidden_RH=hidden_RH,
        weight_VH=weight_VH,
        bias_V=bias_V,
        adapter_RA=adapter_RA,
        adapter_VA=adapter_VA,
        target_R=target_R,
        structure=list(pairs.structure),
        component_K3=pairs.component_K3,
        ref_logp_R=_constant(ref_logp_R),
        ref_hidden_RH=_constant(ref_hidden_RH),
        ref_weight_VH=_constant(ref_weight_VH),
        ref_bias_V=_constant(ref_bias_V),
        margin_P=_constant(margin_P),
        pair_weight_P=_constant(pair_weight_P),
        in_order=pairs.in_order,
        num_used=pairs.num_used,
        logit_scale=logit_scale,
        softcap=softcap,
        temperature=temperature,
        vocab_size=weight_VH.shape[0] if vocab_size is None else vocab_size,
        beta=beta,
        loss_type=loss_type,
        label_smoothing=label_smoothing,
        denominator=float(max(P, 1) if denominator is None else denominator),
        budget_bytes=budget_bytes,
        engine=_engine(hidden_RH, engine),
        needs=[torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs],
    )
    loss, m_P, reward_P, means_2, logp_R, online_R, *_ = _forward(*arguments)
    reference_R = ref_logp_R if ref_hidden_RH is None else online_R
    return loss, HeadMargins(m_P, reward_P, means_2[0], means_2[1], logp_R, reference_R)


def _engine(hidden_RH: torch.Tensor, engine: Engine | None) -> Engine:
    """The engine 'triton' has no fp64."""
    chosen = choose_engine(hidden_RH.device, engine)
    if hidden_RH.dtype == torch.float64 and chosen == "triton":
        if engine is not None:
            raise ValueError("engine='triton' has no float64: use engine='torch', or None to let the dtype decide")
        return "torch"
    return chosen


def _check_reference(
    hidden_RH: torch.Tensor,
    weight_VH: torch.Tensor,
    ref_logp_R: torch.Tensor | None,
    ref_hidden_RH: torch.Tensor | None,
    ref_weight_VH: torch.Tensor | None,
    ref_bias_V: torch.Tensor | None,
) -> None:
    if ref_hidden_RH is None:
        if ref_weight_VH is not None or ref_bias_V is not None:
            raise ValueError("ref_weight_VH and ref_bias_V belong to ref_hidden_RH: give it, or ref_logp_R alone")
        return
    if ref_logp_R is not None:
        raise ValueError("ref_logp_R and ref_hidden_RH are given: the reference is one of them")
    if ref_bias_V is not None and ref_weight_VH is None:
        raise ValueError(
            "ref_bias_V is given without ref_weight_VH: the reference then has the policy's weight and bias"
        )
    if len(ref_hidden_RH) != len(hidden_RH):
        raise ValueError(f"ref_hidden_RH has {len(ref_hidden_RH)} rows, hidden_RH {len(hidden_RH)}: give the same rows")
    head_VH = weight_VH if ref_weight_VH is None else ref_weight_VH
    if len(head_VH) != len(weight_VH) or ref_hidden_RH.device != hidden_RH.device:
        raise ValueError(
            f"ref_weight_VH {tuple(head_VH.shape)} and ref_hidden_RH ({ref_hidden_RH.device}) must have the vocabulary "
            f"and the device of the policy, {len(weight_VH)} and {hidden_RH.device}"
        )
    if ref_hidden_RH.dtype != hidden_RH.dtype:
        raise TypeError(f"ref_hidden_RH is {ref_hidden_RH.dtype}, hidden_RH {hidden_RH.dtype}: convert it")
    try:
        check_head(ref_hidden_RH, head_VH, bias_V=ref_bias_V)
    except (TypeError, ValueError) as error:
        raise type(error)(f"of the reference: {error}") from error


class _Arguments(NamedTuple):
    """What the operator takes, in the order of its schema."""

    hidden_RH: torch.Tensor
    weight_VH: torch.Tensor
    bias_V: torch.Tensor | None
    adapter_RA: torch.Tensor | None
    adapter_VA: torch.Tensor | None
    target_R: torch.Tensor
    structure: list[torch.Tensor]
    component_K3: torch.Tensor
    ref_logp_R: torch.Tensor | None
    ref_hidden_RH: torch.Tensor | None
    ref_weight_VH: torch.Tensor | None
    ref_bias_V: torch.Tensor | None
    margin_P: torch.Tensor | None
    pair_weight_P: torch.Tensor | None
    in_order: bool
    num_used: int
    logit_scale: float
    softcap: float | None
    temperature: float
    vocab_size: int
    beta: float
    loss_type: str
    label_smoothing: float
    denominator: float
    budget_bytes: int | None
    engine: str
    needs: Sequence[bool]


_SCHEMA = (
    "Tensor hidden_RH, Tensor weight_VH, Tensor? bias_V, Tensor? adapter_RA, Tensor? adapter_VA, Tensor target_R, "
    "Tensor[] structure, Tensor component_K3, Tensor? ref_logp_R, Tensor? ref_hidden_RH, Tensor? ref_weight_VH, "
    "Tensor? ref_bias_V, Tensor? margin_P, Tensor? pair_weight_P, bool in_order, SymInt num_used, float logit_scale, "
    "float? softcap, float temperature, SymInt vocab_size, float beta, str loss_type, float label_smoothing, "
    "float denominator, SymInt? budget_bytes, str engine, bool[] needs"
)


@torch.library.custom_op(
    "ttpa_kernels::linear_token_dpo", mutates_args=(), schema=f"({_SCHEMA}) -> ({', '.join(['Tensor'] * 11)})"
)
def _forward(*arguments: Any) -> tuple[torch.Tensor, ...]:
    """Loss, margins, rewards, their means, both log-probabilities, and the fields of `Gradients`."""
    with torch.autocast(arguments[0].device.type, enabled=False):
        return compute(_Arguments(*arguments))


@_forward.register_fake
def _(*arguments: Any) -> tuple[torch.Tensor, ...]:
    given = _Arguments(*arguments)
    dtype, P = wide(given.hidden_RH.dtype), len(given.structure[0])
    pairs = [given.hidden_RH.new_empty(shape, dtype=torch.float64) for shape in ((P,), (P,), (2,))]
    loss = given.hidden_RH.new_empty((), dtype=dtype)
    return loss, *pairs, *_log_probabilities(given), *_gradients(given)


def compute(given: _Arguments) -> tuple[torch.Tensor, ...]:
    """The operator's results."""
    V, needs, hidden_RH = given.vocab_size, Needs(*given.needs), given.hidden_RH
    structure, engine, dtype = Structure(*given.structure), cast(Engine, given.engine), wide(hidden_RH.dtype)
    options = (given.logit_scale, given.softcap, given.temperature)
    head = Head(given.weight_VH[:V], _first(given.bias_V, V), _first(given.adapter_VA, V), *options)
    ref_head = Head(head.weight_VH, head.bias_V, None, *options)
    if given.ref_weight_VH is not None:
        ref_head = Head(given.ref_weight_VH[:V], _first(given.ref_bias_V, V), None, *options)

    def used(x: torch.Tensor | None) -> torch.Tensor | None:
        return x if x is None or given.in_order else x[structure.order_R[: given.num_used]]

    rows = Rows(_given(used(hidden_RH)), _given(used(given.target_R)), used(given.adapter_RA))
    check_target_range(rows.target_C, V)
    ref_hidden_RH = used(given.ref_hidden_RH)
    logp_R, online_R = _log_probabilities(given)
    gradients = _gradients(given)
    for gradient in (gradients.weight_VH, gradients.bias_V, gradients.adapter_VA):
        gradient[V if given.num_used else 0 :].zero_()
    for x in (logp_R, online_R):
        if not given.in_order:
            x.fill_(torch.nan)
    stream = Stream(
        plan=choose_plan(
            given.component_K3.tolist(),
            R=len(hidden_RH),
            in_order=given.in_order,
            V=V,
            H=hidden_RH.shape[1],
            A=0 if given.adapter_VA is None else given.adapter_VA.shape[1],
            dtype=hidden_RH.dtype,
            device=hidden_RH.device,
            needs=_names(needs),
            online=ref_hidden_RH is not None,
            budget_bytes=given.budget_bytes,
            engine=engine,
        ),
        head=head,
        rows=rows,
        ref_head=ref_head,
        ref_rows=None if ref_hidden_RH is None else Rows(ref_hidden_RH, rows.target_C),
        structure=structure,
        loss=Loss(
            given.beta,
            given.loss_type,
            given.label_smoothing,
            given.denominator,
            _dense(given.margin_P),
            _dense(given.pair_weight_P),
        ),
        needs=needs,
        in_order=given.in_order,
        logp_R=logp_R,
        ref_logp_R=_dense(given.ref_logp_R) if ref_hidden_RH is None else online_R,
        gradient_R=torch.empty_like(logp_R),
        values=PairValues.empty(len(structure.order_P), hidden_RH.device),
        out=gradients._replace(
            weight_VH=gradients.weight_VH[:V], bias_V=gradients.bias_V[:V], adapter_VA=gradients.adapter_VA[:V]
        ),
    )
    stream.run()
    return *totals_of(stream.values, dtype, engine=engine), logp_R, online_R, *gradients


def _names(needs: Needs) -> set[Need]:
    """The names by which a plan knows what needs a gradient; that of the adapter's input is a narrow product."""
    names: set[Need] = set()
    for name, needed in (
        ("hidden", needs.hidden or needs.adapter_input),
        ("weight", needs.weight),
        ("bias", needs.bias),
    ):
        if needed:
            names.add(cast(Need, name))
    return names | ({"adapter"} if needs.adapter else set())


def _log_probabilities(given: _Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Of policy and reference, the second without elements where it is not computed."""
    like, R = given.hidden_RH, given.hidden_RH.shape[0]
    dtype = wide(like.dtype)
    return like.new_empty(R, dtype=dtype), like.new_empty(0 if given.ref_hidden_RH is None else R, dtype=dtype)


def _gradients(given: _Arguments) -> Gradients:
    inputs = (given.hidden_RH, given.weight_VH, given.bias_V, given.adapter_RA, given.adapter_VA)
    return Gradients(
        *(
            x.new_empty(x.shape) if needed and x is not None else given.hidden_RH.new_empty([0] * dimensions)
            for x, needed, dimensions in zip(inputs, given.needs, (2, 2, 1, 2, 2), strict=True)
        )
    )


@torch.library.custom_op("ttpa_kernels::linear_token_dpo_backward", mutates_args=())
def _backward(upstream: torch.Tensor, gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    """The gradients times that of the loss, which keeps its digits beside gradients in half precision."""
    return [
        torch.mul(gradient, upstream.reshape([1] * gradient.ndim), out=torch.empty_like(gradient))
        for gradient in gradients
    ]


@_backward.register_fake
def _(upstream: torch.Tensor, gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.empty_like(gradient) for gradient in gradients]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.needs = _Arguments(*inputs).needs
    ctx.save_for_backward(*(gradient for gradient, needed in zip(output[6:], ctx.needs, strict=True) if needed))
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:6])  # through the gradients a second derivative is noticed


def _differentiate(ctx: Any, upstream: torch.Tensor | None, *unused: Any) -> tuple[Any, ...]:
    scaled = iter([] if upstream is None else _backward(upstream, list(ctx.saved_tensors)))
    inputs = [next(scaled, None) if needed else None for needed in ctx.needs]
    names = _Arguments._fields[len(inputs) :]
    return *inputs, *([None] * 8 if name == "structure" else None for name in names)


def _refuse_second_derivative(ctx: Any, *upstream: Any) -> None:
    raise RuntimeError("linear_token_dpo has no second derivative: differentiate it without create_graph=True")


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_refuse_second_derivative)


def _constant(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.detach()


def _first(x: torch.Tensor | None, size: int) -> torch.Tensor | None:
    return None if x is None else x[:size]


def _dense(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.contiguous()


def _given(x: torch.Tensor | None) -> torch.Tensor:
    assert x is not None
    return x
