"""Log-probabilities of given tokens straight from hidden states and the head, without a matrix of logits.

R head rows, H hidden size, V vocabulary, A rank of a low-rank adapter of the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ttpa_kernels.checks import check_head, check_target_range, check_targets
from ttpa_kernels.engine import Engine
from ttpa_kernels.linear_logp.chunks import Head, Rows, Upstream
from ttpa_kernels.linear_logp.passes import Gradients, Needs, Results, allocate, backward_pass, forward_pass
from ttpa_kernels.linear_logp.plan import Layout, choose_layout, head_engine
from ttpa_kernels.sharded import refuse_sharded, whole


class HeadStats(NamedTuple):
    """Statistics of the distribution of each head row in nats: `lse = log sum_v e^z_v`,
    `entropy = -sum_v p_v log p_v`, `log_sum_sq_probs = log sum_v p_v^2`, the mean of the logits, and whether the
    target is the first of the largest."""

    lse_R: torch.Tensor
    entropy_R: torch.Tensor
    log_sum_sq_probs_R: torch.Tensor
    mean_logit_R: torch.Tensor
    is_top1_R: torch.Tensor


def linear_logp(
    hidden_RH: torch.Tensor,
    weight_VH: torch.Tensor,
    target_R: torch.Tensor,
    *,
    bias_V: torch.Tensor | None = None,
    adapter_RA: torch.Tensor | None = None,
    adapter_VA: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    budget_bytes: int | None = None,
    engine: Engine | None = None,
) -> torch.Tensor:
    """`logp_R[r] = z_r[target_r] - log sum_v exp(z_r[v])` in nats, with logits that are never all there:
    `x_r = logit_scale (W h_r + B u_r + bias)` and `z_r = softcap tanh(x_r / softcap) / temperature`. All tensors have
    one dtype (fp32, bf16, fp16 or fp64) and one device, `target_R` is int64 in `[0, V)`; a target outside is an error
    on the CPU and undefined on a GPU, where to look would mean to wait. `adapter_VA` is B of a low-rank adapter of the
    head and `adapter_RA` is `u = s A h`, both or neither. Tokens from `vocab_size` on are padding of the head: they
    take no part and their gradient is zero. Differentiable (once) in all but the target; sharded weights
    (`DTensor`) are gathered, see `ttpa_kernels.sharded.whole`. Products accumulate in fp32 (fp64 for fp64 inputs) and
    so is the result; gradients have the dtype of the inputs. `budget_bytes` (None: 120 MiB on the CPU, 3 GiB on a GPU)
    bounds the memory beyond inputs, results and gradients, and decides how much of the forward pass a trained head
    repeats, see `plan`. Raises ValueError or TypeError for shapes, dtypes, devices, values and budgets that do not
    fit. The gradient is `dlogp/dz = onehot(target) - p`; derivation in `linear_logp/README.md`."""
    return _run(
        *(hidden_RH, weight_VH, target_R, bias_V, adapter_RA, adapter_VA),
        *(logit_scale, softcap, temperature, vocab_size, budget_bytes, engine),
        stats=False,
    )[0]


def linear_logp_stats(
    hidden_RH: torch.Tensor,
    weight_VH: torch.Tensor,
    target_R: torch.Tensor,
    *,
    bias_V: torch.Tensor | None = None,
    adapter_RA: torch.Tensor | None = None,
    adapter_VA: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    budget_bytes: int | None = None,
    engine: Engine | None = None,
) -> tuple[torch.Tensor, HeadStats]:
    """`linear_logp` and statistics of the same distributions; arguments and errors are those of `linear_logp`.

    Log-sum-exp and entropy are differentiable, `dlse/dz = p` and `dentropy/dz = -p (log p + entropy)`: where one has
    an upstream gradient, the backward pass computes all logits again. The other statistics are without gradient.
    """
    logp_R, lse_R, entropy_R, stats_SR = _run(
        *(hidden_RH, weight_VH, target_R, bias_V, adapter_RA, adapter_VA),
        *(logit_scale, softcap, temperature, vocab_size, budget_bytes, engine),
        stats=True,
    )
    return logp_R, HeadStats(lse_R, entropy_R, stats_SR[2], stats_SR[3], stats_SR[4] > 0)


class _Arguments(NamedTuple):
    """What the operator takes, in the order of its schema."""

    hidden_RH: torch.Tensor
    weight_VH: torch.Tensor
    target_R: torch.Tensor
    bias_V: torch.Tensor | None
    adapter_RA: torch.Tensor | None
    adapter_VA: torch.Tensor | None
    logit_scale: float
    softcap: float | None
    temperature: float
    vocab_size: int
    budget_bytes: int | None
    engine: Engine | None
    needs: Sequence[bool]
    stats: bool

    def parts(self) -> tuple[Head, Rows, Layout, Needs]:
        """The head without its padding, the rows, and how they are computed."""
        V, needs = self.vocab_size, Needs(*self.needs)
        head = Head(
            self.weight_VH[:V],
            None if self.bias_V is None else self.bias_V[:V],
            None if self.adapter_VA is None else self.adapter_VA[:V],
            *(self.logit_scale, self.softcap, self.temperature),
        )
        layout = choose_layout(
            R=self.hidden_RH.shape[0],
            V=V,
            X=self.hidden_RH.shape[1] + (0 if self.adapter_VA is None else self.adapter_VA.shape[1]),
            dtype=self.hidden_RH.dtype,
            device=self.hidden_RH.device,
            keeps=needs.keeps,
            stats=self.stats,
            budget_bytes=self.budget_bytes,
            engine=head_engine(self.hidden_RH.device, self.hidden_RH.dtype, self.engine),
        )
        return head, Rows(self.hidden_RH, self.target_R, self.adapter_RA), layout, needs


_SCHEMA = (
    "Tensor hidden_RH, Tensor weight_VH, Tensor target_R, Tensor? bias_V, Tensor? adapter_RA, Tensor? adapter_VA, "
    "float logit_scale, float? softcap, float temperature, SymInt vocab_size, SymInt? budget_bytes, str? engine, "
    "bool[] needs, bool stats"
)


def _run(*options: Any, stats: bool) -> tuple[torch.Tensor, ...]:
    """Check the arguments and call the operator, which must be told what needs a gradient."""
    arguments = _Arguments._make((*options, (), stats))
    hidden_RH, target_R = arguments.hidden_RH, arguments.target_R
    refuse_sharded(hidden_RH=hidden_RH, target_R=target_R, adapter_RA=arguments.adapter_RA)
    arguments = arguments._replace(
        weight_VH=whole(arguments.weight_VH, "weight_VH"),
        bias_V=whole(arguments.bias_V, "bias_V"),
        adapter_VA=whole(arguments.adapter_VA, "adapter_VA"),
    )
    check_head(
        hidden_RH,
        arguments.weight_VH,
        bias_V=arguments.bias_V,
        adapter_RA=arguments.adapter_RA,
        adapter_VA=arguments.adapter_VA,
        logit_scale=arguments.logit_scale,
        softcap=arguments.softcap,
        temperature=arguments.temperature,
        vocab_size=arguments.vocab_size,
    )
    check_targets(target_R, hidden_RH)
    head_engine(hidden_RH.device, hidden_RH.dtype, arguments.engine)
    inputs = (hidden_RH, arguments.weight_VH, arguments.bias_V, arguments.adapter_RA, arguments.adapter_VA)
    arguments = arguments._replace(
        vocab_size=arguments.weight_VH.shape[0] if arguments.vocab_size is None else arguments.vocab_size,
        needs=[torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs],
    )
    return _forward(*arguments)[:4]


@torch.library.custom_op(
    "ttpa_kernels::linear_logp", mutates_args=(), schema=f"({_SCHEMA}) -> ({', '.join(['Tensor'] * 9)})"
)
def _forward(*arguments: Any) -> tuple[torch.Tensor, ...]:
    """Log-probability, log-sum-exp, entropy and all statistics, then what else `Results` holds."""
    head, rows, layout, needs = _Arguments(*arguments).parts()
    check_target_range(rows.target_C, len(head.weight_VH))
    with torch.autocast(rows.hidden_CH.device.type, enabled=False):
        return _returned(forward_pass(head, rows, layout, needs, stats=arguments[-1]))


@_forward.register_fake
def _(*arguments: Any) -> tuple[torch.Tensor, ...]:
    head, rows, layout, needs = _Arguments(*arguments).parts()
    return _returned(allocate(head, rows, layout, needs, stats=arguments[-1]))


def _returned(results: Results) -> tuple[torch.Tensor, ...]:
    lse_R, entropy_R = results.stats_SR[0].clone(), results.stats_SR[1].clone()
    return results.logp_R, lse_R, entropy_R, *results[1:]


@torch.library.custom_op(
    "ttpa_kernels::linear_logp_backward",
    mutates_args=(),
    schema=f"(Tensor? dlogp_R, Tensor? dlse_R, Tensor? dentropy_R, {', '.join(f'Tensor kept_{i}' for i in range(6))}, "
    f"{_SCHEMA}) -> ({', '.join(['Tensor'] * 5)})",
)
def _backward(*arguments: Any) -> tuple[torch.Tensor, ...]:
    """The fields of `Gradients`."""
    upstream, kept, options = Upstream(*arguments[:3]), arguments[3:9], _Arguments(*arguments[9:])
    head, rows, layout, _ = options.parts()
    out = _allocate_gradients(options)
    if len(rows.hidden_CH) == 0 or all(g is None for g in upstream):
        for gradient in out:
            gradient.zero_()
        return out
    V = options.vocab_size
    for gradient in (out.weight_VH, out.bias_V, out.adapter_VA):
        gradient[V:].zero_()
    unpadded = out._replace(weight_VH=out.weight_VH[:V], bias_V=out.bias_V[:V], adapter_VA=out.adapter_VA[:V])
    results = Results(rows.hidden_CH.new_empty(0), *kept)
    with torch.autocast(rows.hidden_CH.device.type, enabled=False):
        backward_pass(head, rows, layout, results, upstream, out=unpadded)
    return out


@_backward.register_fake
def _(*arguments: Any) -> tuple[torch.Tensor, ...]:
    return _allocate_gradients(_Arguments(*arguments[9:]))


def _allocate_gradients(options: _Arguments) -> Gradients:
    inputs = (options.hidden_RH, options.weight_VH, options.bias_V, options.adapter_RA, options.adapter_VA)
    like = options.hidden_RH
    return Gradients(
        *(
            x.new_empty(x.shape) if needed and x is not None else like.new_empty([0] * dimensions)
            for x, needed, dimensions in zip(inputs, options.needs, (2, 2, 1, 2, 2), strict=True)
        )
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    arguments = _Arguments(*inputs)
    ctx.save_for_backward(*arguments[:6], *output[3:])
    ctx.options = arguments[6:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*(output[3:] if arguments.stats else output[1:]))


def _differentiate(ctx: Any, *upstream: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once, as checkpointing asks
    tensors, kept = saved[:6], saved[6:]
    gradients = Gradients(*_backward(*upstream[:3], *kept, *tensors, *ctx.options))
    needs = _Arguments(*tensors, *ctx.options).needs
    hidden, weight, bias, adapter_input, adapter = (
        gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)
    )
    return hidden, weight, None, bias, adapter_input, adapter, *[None] * len(ctx.options)


def _refuse_second_derivative(ctx: Any, *upstream: torch.Tensor | None) -> None:
    raise RuntimeError("linear_logp has no second derivative: differentiate it without create_graph=True")


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_refuse_second_derivative)
