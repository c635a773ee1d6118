"""Runs of `python -m ttpa.sample` in processes of their own that are killed and resumed.

    PYTHONPATH=.:kernels python tests/kill_sample.py --kills 20 --dialogues 12

kills a run so many times, resumes it, and compares the bytes with those of an unbroken run.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import resource
import tempfile
import threading
import time
from pathlib import Path

import torch
from tqdm import tqdm

from ttpa.config import run_command
from ttpa.sample import main

# Every process is forked from one that has imported the command and computed nothing yet.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["ttpa.sample"])


def start(output, *options, log=os.devnull, largest_file=None, **environment):
    """Begin a run of the embedded model; its standard output and error are appended to `log`."""
    argv = ["--output", str(output), *map(str, options)]
    process = PROCESSES.Process(target=_run, args=(argv, str(log), largest_file, environment))
    process.start()
    return process


def _run(argv, log, largest_file, environment):
    os.environ.update(environment)
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own lock between processes would outlive one that is killed
    run_command(main, argv)


def finish(*processes, seconds=60):
    """Wait for processes and return their exit codes."""
    for process in processes:
        process.join(seconds)
        assert process.exitcode is not None, "the run hangs"
    return [process.exitcode for process in processes]


def wait_for(path, process):
    """Wait until a file or a folder is there, or the process has ended; returns whether it still runs."""
    while process.is_alive() and not path.exists():
        time.sleep(0.001)
    return process.is_alive()


def kill_and_resume(output, *options, kills, seconds, rng):
    """Begin a run again and again until it was killed `kills` times, each time up to `seconds` after it began to
    sample, then let it end. A run that ends before its turn is yielded and begun anew; the last one is yielded too."""
    parts = output.with_name(output.name + ".parts")
    while kills:
        process = start(output, *options)
        wait_for(parts, process)
        process.join(rng.uniform(0, seconds))
        if process.is_alive():
            process.kill()
            kills -= 1
            assert finish(process) == [-9]
        else:
            assert finish(process) == [0]
            yield output.read_bytes()
            output.unlink()
    assert finish(start(output, *options)) == [0]
    yield output.read_bytes()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--dialogues", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    options = ["--num_dialogues", arguments.dialogues, "--block_size", 3, "--max_new_tokens", 60]
    with tempfile.TemporaryDirectory() as folder:
        process = start(Path(folder) / "unbroken.jsonl", *options)
        wait_for(Path(folder) / "unbroken.jsonl.parts", process)
        began = time.perf_counter()
        assert finish(process) == [0]
        seconds = time.perf_counter() - began
        unbroken = (Path(folder) / "unbroken.jsonl").read_bytes()
        outputs = list(
            kill_and_resume(
                Path(folder) / "killed.jsonl",
                *options,
                kills=arguments.kills,
                seconds=seconds / 2,
                rng=random.Random(arguments.seed),
            )
        )
    equal = sum(output == unbroken for output in outputs)
    print(f"{arguments.kills} kills, {len(outputs)} runs came to their end, {equal} of them with the same bytes")
    raise SystemExit(0 if equal == len(outputs) else 1)
