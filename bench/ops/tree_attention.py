"""Attention over packed trees, forward alone and with backward: `j <= i < end[j]`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F

from bench.inputs import tree_ends
from bench.measure import Absent, Case, Results, Run, Side
from bench.ops import Size
from bench.peers import load

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Pass = Literal["forward", "both"]


@dataclass(frozen=True)
class Shape:
    """Trees (number, prompt, branches, completion) under N query heads and M key heads of width D."""

    trees: tuple[int, int, int, int]
    N: int
    M: int
    D: int
    dtype: torch.dtype

    @property
    def causal(self) -> bool:
        """Whether it is one sequence without a branch."""
        return self.trees[0] == 1 and self.trees[2] == 0

    def __str__(self) -> str:
        number, prompt, branches, completion = self.trees
        trees = f"causal{prompt}" if self.causal else f"{number}x{prompt}+{branches}x{completion}"
        return f"{trees}-N{self.N}-M{self.M}-D{self.D}-{str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Heads:
    """Queries, keys and values, the tree, and the gradient that reaches the result, all `[1, heads, T, D]`."""

    shape: Shape
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    grad: torch.Tensor
    end_T: torch.Tensor

    def sees(self) -> torch.Tensor:
        """The rule as a matrix `[T, T]` of queries and keys."""
        i, j = torch.arange(len(self.end_T), device=self.end_T.device)[:, None], self.end_T
        return (torch.arange(len(j), device=j.device) <= i) & (i < j)


BF16, FP32 = torch.bfloat16, torch.float32
CASES: dict[Size, list[tuple[Shape, Pass]]] = {
    "toy": [(Shape((2, 24, 2, 8), 4, 2, 16, FP32), "both")],
    "cpu": [
        (Shape((2, 512, 4, 48), 4, 2, 64, FP32), "forward"),
        (Shape((2, 512, 4, 48), 4, 2, 64, FP32), "both"),
    ],
    "gpu": [
        (Shape((4, 2048, 4, 96), 32, 8, 128, BF16), "both"),
        (Shape((1, 8192, 0, 0), 32, 8, 128, BF16), "both"),
        (Shape((4, 2048, 4, 96), 32, 8, 128, BF16), "forward"),
        (Shape((1, 8192, 0, 0), 32, 8, 128, BF16), "forward"),
        (Shape((8, 512, 4, 48), 12, 2, 128, BF16), "both"),
    ],
    "errors": [(Shape((2, 512, 4, 48), 8, 2, 128, BF16), "both")],
}


def cases(size: Size) -> list[Case]:
    return [make_case(shape, passes) for shape, passes in CASES[size]]


def make_case(shape: Shape, passes: Pass) -> Case:
    sides: dict[str, Callable[[Heads], Attend]] = {
        "ttpa": _ours,
        "ttpa-torch": partial(_ours, engine="torch"),
        "flex": _flex,
        "sdpa-mask": _sdpa_mask,
        "sdpa-causal": _sdpa_causal,
    }
    return Case(
        op="tree_attention",
        name=f"{shape}-{passes}",
        inputs=partial(_inputs, shape),
        sides={name: Side(partial(_run, passes, make)) for name, make in sides.items()},
        reference=partial(_run_reference, passes),
        operations=_operations(shape, passes),
        shape={"trees": shape.trees, "N": shape.N, "M": shape.M, "D": shape.D, "dtype": str(shape.dtype)},
    )


def _operations(shape: Shape, passes: Pass) -> float:
    """Two products of 2 D for each visible pair forward, five backward."""
    end_T = tree_ends(*shape.trees)
    visible = sum(end - j for j, end in enumerate(end_T))
    return 2.0 * shape.D * shape.N * visible * (7 if passes == "both" else 2)


def _inputs(shape: Shape, device: torch.device) -> Heads:
    end_T = torch.tensor(tree_ends(*shape.trees), device=device)
    generator = torch.Generator(device).manual_seed(0)

    def normal(heads: int) -> torch.Tensor:
        size = (1, heads, len(end_T), shape.D)
        return torch.randn(size, device=device, generator=generator).to(shape.dtype)

    # The gradient comes as from the layer behind, which reads all heads of a token together.
    grad = normal(shape.N).transpose(1, 2).contiguous().transpose(1, 2)
    return Heads(shape, normal(shape.N), normal(shape.M), normal(shape.M), grad, end_T)


def _run(passes: Pass, make: Callable[[Heads], Attend], heads: Heads) -> Run:
    attend = make(heads)
    inputs = [x.detach().requires_grad_(passes == "both") for x in (heads.query, heads.key, heads.value)]

    def run() -> Results:
        out = attend(*inputs)
        if passes == "forward":
            return {"out": out}
        return _named(out, torch.autograd.grad(out, inputs, heads.grad))

    return run


def _named(out: torch.Tensor, gradients: tuple[torch.Tensor, ...]) -> Results:
    return {"out": out.detach()} | dict(zip(("dquery", "dkey", "dvalue"), gradients, strict=True))


def _ours(heads: Heads, *, engine: Literal["torch"] | None = None) -> Attend:
    from ttpa_kernels.tree_attention.op import tree_attention, tree_mask

    if engine is not None and not heads.query.is_cuda:
        raise Absent("the comparison of our engines runs on a GPU only")
    return partial(tree_attention, mask=tree_mask(heads.end_T, engine=engine))


def _flex(heads: Heads) -> Attend:
    """Compiled for these very shapes; its block mask is made beforehand, as ours is."""
    if not heads.query.is_cuda:
        raise Absent("FlexAttention has no backward pass on a CPU")
    flex = load("torch.nn.attention.flex_attention")
    end_T, T = heads.end_T, len(heads.end_T)

    def sees(batch: torch.Tensor, head: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return (j <= i) & (i < end_T[j])

    block_mask = flex.create_block_mask(sees, None, None, T, T, device=end_T.device)
    compiled = torch.compile(flex.flex_attention, dynamic=False)
    return lambda query, key, value: compiled(query, key, value, block_mask=block_mask, enable_gqa=True)


def _sdpa_mask(heads: Heads) -> Attend:
    """Where a mask is given, the fast kernels of a GPU want as many key heads as query heads."""
    sees_TT, groups = heads.sees(), heads.shape.N // heads.shape.M

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if query.is_cuda:
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=sees_TT, enable_gqa=not query.is_cuda)

    return attend


def _sdpa_causal(heads: Heads) -> Attend:
    if not heads.shape.causal:
        raise Absent("only where there are no branches")
    return partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)


def _run_reference(passes: Pass, heads: Heads) -> Results:
    inputs = [x.double().requires_grad_(passes == "both") for x in (heads.query, heads.key, heads.value)]
    groups = heads.shape.N // heads.shape.M
    query, key, value = inputs[0], *(x.repeat_interleave(groups, dim=1) for x in inputs[1:])
    scores = (query @ key.mT / heads.shape.D**0.5).masked_fill(~heads.sees(), -torch.inf)
    out = scores.softmax(dim=-1) @ value
    if passes == "forward":
        return {"out": out}
    return _named(out, torch.autograd.grad(out, inputs, heads.grad.double()))
