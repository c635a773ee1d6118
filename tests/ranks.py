"""A function in several gloo processes on this machine, as torchrun starts them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import torch
import torch.multiprocessing as mp


def run_ranks(function: Callable[..., None], size: int, *arguments: object) -> None:
    """Call `function(*arguments)` in `size` processes with torchrun's environment and raise what one of them raises.

    The function is one of a module; it joins the others itself, with `joined_world`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_run, args=(size, port, function, arguments), nprocs=size)


def _run(rank: int, size: int, port: int, function: Callable[..., None], arguments: tuple[object, ...]) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    function(*arguments)
