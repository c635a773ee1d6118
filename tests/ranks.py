"""A function in several gloo processes on this machine, as torchrun starts them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import torch
import torch.multiprocessing as mp

from ttpa.world import joined_world


def run_ranks(function: Callable[..., None], size: int, *arguments: object) -> None:
    """Call `function(*arguments)`, a function of a module, in `size` processes with torchrun's environment and raise
    what one of them raises. They are one group all the time, which every `joined_world` in the function uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_run, args=(size, port, function, arguments), nprocs=size)


def _run(rank: int, size: int, port: int, function: Callable[..., None], arguments: tuple[object, ...]) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    with joined_world():  # a port that was in use cannot be had again at once
        function(*arguments)
