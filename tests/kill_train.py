"""Runs of `python -m ttpa.train` in processes of their own that are killed and resumed.

    PYTHONPATH=.:kernels python tests/kill_train.py --kills 200
    PYTHONPATH=.:kernels python tests/kill_train.py --kills 20 --sampled --rounds 2

kills a run so many times at random moments, goes on with it each time, and compares the weights, bit by bit, and
metrics.jsonl, but for what tells of the machine, with those of an unbroken run. A tiny random model learns a few
preferences; with --sampled the embedded model learns from what it samples. Other options go to the runs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import threading
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import Qwen3Config, Qwen3ForCausalLM

from ttpa.config import run_command
from ttpa.embedded import MODEL_DIR
from ttpa.model import load_tokenizer
from ttpa.train import main
from ttpa.training.monitor import repeatable

# Every process is forked from one that has imported the command and computed nothing yet.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["ttpa.train"])


def write_inputs(folder):
    """A tiny model and a few preferences; returns the options of a run that trains one on the other."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(MODEL_DIR)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    sums = [(a, b) for a in range(1, 5) for b in range(1, 5)]
    rows = [{"prompt": f"{a} plus {b} is", "chosen": f" {a + b}", "rejected": f" {a * b + 20}"} for a, b in sums]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ["--model", folder / "model", "--data", folder / "rows.jsonl", "--learning_rate", 1e-3]
    return [*options, "--batch_size", 4, "--num_train_epochs", 5, "--logging_steps", 3, "--save_steps", 1]


SAMPLED = ["--num_dialogues", 8, "--num_eval_dialogues", 0, "--batch_size", 8, "--logging_steps", 3, "--save_steps", 1]


def start(output, *options, log=os.devnull):
    """Begin a run, or go on with it; its standard output and error are appended to `log`."""
    argv = ["--output", str(output), "--resume", "auto", *map(str, options)]
    process = PROCESSES.Process(target=_run, args=(argv, str(log)))
    process.start()
    return process


def _run(argv, log):
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own lock between processes would outlive one that is killed
    run_command(main, argv)


def finish(process, *, seconds=120):
    """Wait for a process and return its exit code."""
    process.join(seconds)
    assert process.exitcode is not None, "the run hangs"
    return process.exitcode


def outcome(output):
    """What a run leaves that is the same whenever it is repeated: bytes of the weights, and lines of metrics.jsonl."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return (output / "final" / "model.safetensors").read_bytes(), [repeatable(json.loads(line)) for line in lines]


def unbroken(output, *options, log=os.devnull):
    """The outcome of a run that is let alone, and the seconds that it took without its imports."""
    assert finish(start(output, *options, log=log)) == 0, Path(log).read_text()[-3000:]
    seconds = json.loads((output / "summary.json").read_text())["seconds"]
    return outcome(output), sum(seconds.values())


def kill_and_resume(output, *options, kills, seconds, rng, log=os.devnull):
    """Begin a run and go on with it again and again until it was killed `kills` times, each time up to `seconds` after
    it was started, then let it end. A run that ends before its turn is yielded and begun anew, as the last one is."""
    while kills:
        process = start(output, *options, log=log)
        process.join(rng.uniform(0, seconds))
        process.kill()
        if finish(process) == -signal.SIGKILL:
            kills -= 1
        else:
            assert process.exitcode == 0, Path(log).read_text()[-3000:]
            yield outcome(output)
            shutil.rmtree(output)
    assert finish(start(output, *options, log=log)) == 0, Path(log).read_text()[-3000:]
    yield outcome(output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sampled", action="store_true")
    arguments, others = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = [*(SAMPLED if arguments.sampled else write_inputs(folder)), *others]
        expected, seconds = unbroken(folder / "unbroken", *options, log=folder / "log")
        rng = random.Random(arguments.seed)
        kills = arguments.kills
        broken = kill_and_resume(folder / "killed", *options, kills=kills, seconds=seconds, rng=rng, log=folder / "log")
        equal = [found == expected for found in broken]
        resumed = (folder / "log").read_text().count("\nresume ")
    print(f"{kills} kills, a checkpoint was taken up {resumed} times, {len(equal)} runs came to their end,")
    print(f"{sum(equal)} of them with the same weights and the same metrics.jsonl as an unbroken run")
    raise SystemExit(0 if all(equal) else 1)
