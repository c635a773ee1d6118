"""Two processes on the CPU, each with rows of its own, against one process with all rows."""

from __future__ import annotations

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from ttpa_kernels import linear_logp
from ttpa_kernels.sharded import whole

R, H, V = 14, 6, 11


class Model(torch.nn.Module):
    """A body and a head whose log-probabilities are its result; the head may be the embedding."""

    def __init__(self, tied: bool):
        super().__init__()
        torch.manual_seed(1)
        self.embedding = torch.nn.Embedding(V, H)
        self.body = torch.nn.Linear(H, H)
        self.head = torch.nn.Linear(H, V, bias=not tied)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor, target_R: torch.Tensor) -> torch.Tensor:
        hidden_RH = self.body(self.embedding(ids)).tanh()
        return linear_logp(hidden_RH, self.head.weight, target_R, bias_V=self.head.bias)


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (*torch.randint(V, (2, R), generator=generator), torch.randn(R, generator=generator))


def mine(x: torch.Tensor) -> torch.Tensor:
    return x.chunk(2)[dist.get_rank()]


def check_wrapped(tied: bool, own_unit: bool) -> None:
    """FSDP2 around the module whose forward holds the head; in a unit of its own the head's weight stays sharded."""
    ids, target_R, g_R = inputs()
    alone = Model(tied)
    logp_R = alone(ids, target_R)
    (logp_R * g_R).sum().backward()
    model, mesh = Model(tied), init_device_mesh("cpu", (2,))
    if own_unit:
        fully_shard(model.head, mesh=mesh)
    fully_shard(model.body, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for unit in model.modules():
        if hasattr(unit, "set_gradient_divide_factor"):
            unit.set_gradient_divide_factor(1.0)  # sums over processes, as the loss is one
            unit.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    got_R = model(mine(ids), mine(target_R))
    torch.testing.assert_close(got_R, mine(logp_R))
    (got_R * mine(g_R)).sum().backward()
    for (name, wanted), parameter in zip(alone.named_parameters(), model.parameters(), strict=True):
        assert isinstance(parameter.grad, DTensor), name
        torch.testing.assert_close(parameter.grad.full_tensor(), wanted.grad)


def check_distributed_weight() -> None:
    """A weight as a DTensor, sharded or replicated: the sharded gradient is the sum over both processes."""
    _, target_R, g_R = inputs()
    weight_VH, bias_V, hidden_RH = torch.randn(V, H), torch.randn(V), torch.randn(R, H)
    for x in (weight_VH, bias_V, hidden_RH):
        dist.broadcast(x, 0)
        x.requires_grad_()
    logp_R = linear_logp(hidden_RH, weight_VH, target_R, bias_V=bias_V)
    wanted = torch.autograd.grad((logp_R * g_R).sum(), (hidden_RH, weight_VH, bias_V))
    mesh = init_device_mesh("cpu", (2,))
    for placement in (Shard(0), Shard(1), Replicate()):
        weight = distribute_tensor(weight_VH.detach(), mesh, [placement]).requires_grad_()
        bias = distribute_tensor(bias_V.detach(), mesh, [Shard(0)]).requires_grad_()
        hidden = mine(hidden_RH.detach()).requires_grad_()
        got_R = linear_logp(hidden, weight, mine(target_R), bias_V=bias)
        assert torch.equal(got_R, mine(logp_R)) or torch.allclose(got_R, mine(logp_R))
        gradients = torch.autograd.grad((got_R * mine(g_R)).sum(), (hidden, weight, bias))
        assert gradients[1].placements == (placement,)
        torch.testing.assert_close(gradients[0], mine(wanted[0]))
        torch.testing.assert_close(gradients[1].full_tensor(), wanted[1])
        torch.testing.assert_close(gradients[2].full_tensor(), wanted[2])
    pending = DTensor.from_local(weight_VH.detach(), mesh, [Partial()])
    with pytest.raises(ValueError, match=r"placed as \(Partial"):
        whole(pending, "weight_VH")
    with pytest.raises(ValueError, match=r"hidden_RH\.to_local\(\)"):
        linear_logp(distribute_tensor(hidden_RH.detach(), mesh, [Shard(0)]), weight_VH, target_R)
    flat = init_device_mesh("cpu", (2, 1))
    with pytest.raises(ValueError, match="one mesh dimension may shard it"):
        whole(distribute_tensor(weight_VH.detach(), flat, [Shard(0), Shard(0)]), "weight_VH")
    hybrid = distribute_tensor(weight_VH.detach(), flat, [Replicate(), Shard(0)]).requires_grad_()
    got_R = linear_logp(mine(hidden_RH.detach()), hybrid, mine(target_R), bias_V=bias_V)
    (gradient,) = torch.autograd.grad((got_R * mine(g_R)).sum(), hybrid)
    torch.testing.assert_close(gradient.full_tensor(), wanted[1])


def process(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        check_distributed_weight()
        for tied, own_unit in ((False, False), (True, False), (False, True)):
            check_wrapped(tied, own_unit)
    finally:
        dist.destroy_process_group()


def test_two_processes_equal_one():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(process, args=(port,), nprocs=2)
