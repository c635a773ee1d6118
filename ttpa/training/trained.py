"""What a run changes, by name: trained parameters, persistent buffers, and the state that the optimizer has of them."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from ttpa.config import nearest
from ttpa.errors import InputError
from ttpa.training.shards import ShardReader

WRAPPERS = re.compile(r"(_checkpoint_wrapped_module|_orig_mod)\.")  # stand in names only while a module is wrapped


def trained_tensors(policy: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """`policy/NAME` of every parameter that is trained and every persistent buffer, and `optimizer/KEY/NAME` of what
    the optimizer has of a parameter, nothing before its first step. A tied parameter is there once."""
    found = {f"policy/{name}": tensor for name, tensor in _weights(policy).items()}
    for name, parameter in _parameters(policy).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            assert isinstance(value, Tensor), f"{key} of {name} in the optimizer is no tensor"
            found[f"optimizer/{key}/{name}"] = value
    return found


def optimizer_groups(policy: nn.Module, optimizer: Optimizer) -> list[dict[str, Any]]:
    """The parameter groups of an optimizer: the names of their parameters, and their options as JSON values."""
    names = {parameter: name for name, parameter in _parameters(policy).items()}
    return [
        {
            "parameters": [names[parameter] for parameter in group["params"]],
            "options": {key: value for key, value in group.items() if key != "params"},
        }
        for group in optimizer.param_groups
    ]


@torch.no_grad()
def load_trained(policy: nn.Module, optimizer: Optimizer, shards: ShardReader, groups: list[dict[str, Any]]) -> None:
    """Put the tensors and the groups that the functions above gave into a policy and its optimizer, bit by bit. Raises
    InputError where these have other names, shapes, dtypes or groups."""
    weights, parameters = _weights(policy), _parameters(policy)
    _check_names(saved=shards.names("policy/"), here=list(weights))
    for name, tensor in weights.items():
        shards.read(f"policy/{name}", tensor)
    order = [name for group in groups for name in group["parameters"]]
    if [group["parameters"] for group in groups] != [g["parameters"] for g in optimizer_groups(policy, optimizer)]:
        raise InputError("the optimizer has other parameter groups in the checkpoint")
    number = {name: i for i, name in enumerate(order)}
    state: dict[int, dict[str, Tensor]] = {}
    for path in shards.names("optimizer/"):
        key, name = path.split("/", 1)
        parameter, source = parameters[name], f"optimizer/{path}"
        if parameter.ndim and list(parameter.shape) == shards.shapes[source]:
            value = torch.empty_like(parameter, dtype=shards.dtypes[source])  # sharded as the parameter is
            shards.read(source, value)
        else:
            value = shards.whole(source)
        state.setdefault(number[name], {})[key] = value
    optimizer.load_state_dict(
        {
            "state": state,
            "param_groups": [
                {
                    **{key: tuple(v) if isinstance(v, list) else v for key, v in group["options"].items()},
                    "params": [number[name] for name in group["parameters"]],
                }
                for group in groups
            ],
        }
    )


def _weights(policy: nn.Module) -> dict[str, Tensor]:
    for unit in policy.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()  # after a forward pass without gradients the root still holds its weights whole
    passing = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in policy.named_modules()
        for name in module._non_persistent_buffers_set
    }
    buffers = {WRAPPERS.sub("", name): b for name, b in policy.named_buffers() if name not in passing}
    return {**_parameters(policy), **buffers}


def _parameters(policy: nn.Module) -> dict[str, nn.Parameter]:
    return {WRAPPERS.sub("", name): p for name, p in policy.named_parameters() if p.requires_grad}


def _check_names(*, saved: list[str], here: list[str]) -> None:
    for name in here:
        if name not in saved:
            similar = nearest(name, saved)
            raise InputError(
                f"{name} is trained here and not in the checkpoint" + (f", {similar} is" if similar else "")
            )
    for name in saved:
        if name not in here:
            raise InputError(f"{name} is trained in the checkpoint and not here")
