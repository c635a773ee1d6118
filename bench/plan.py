"""What `--plan` says beside what training takes, on the CPU.

    python -m bench.plan [--case NAME] [--json FILE]      # memory: the table and the highest resident set
    python -m bench.plan --rates [--threads N]            # speed: a record for ttpa/training/rates.json

The peak is that of a fresh process: the highest resident set over five training steps (forward, loss, backward,
clipping, AdamW; the reference's log-probabilities are cached) above the one before the model is made, after steps of a
toy model have brought libraries and threads in. It is taken twice. With MALLOC_MMAP_THRESHOLD_=131072 glibc gives the
memory of every tensor back when it ends, so that the peak is what tensors need: the table without its row `allocator`.
As it comes, glibc keeps freed memory between tensors that live on; how much differs from run to run, and that row says
how much it was here. `--rates` divides the flops of a step by its time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from bench import ROOT, environment
from ttpa.losses import LossOptions, LossTerm
from ttpa.model import use_tree_attention
from ttpa.training.config import TrainConfig
from ttpa.training.examples import Example
from ttpa.training.flops import ModelShape, pack_flops, size_of_batch
from ttpa.training.memory import Checkpointing, checkpoint_activations
from ttpa.training.objective import Objective, coefficients
from ttpa.training.optimizer import make_optimizer
from ttpa.training.plan_table import Layout, memory_table
from ttpa.training.policy import Policy
from ttpa.training.rates import device_name
from ttpa.trees.pack import completion_tokens
from ttpa.trees.record import Completion, Leaf, Pair, PreferenceTree, merge_completions

STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072"}
OBJECTIVE = Objective((LossTerm("sigmoid", 1.0),), LossOptions())


@dataclass(frozen=True)
class Case:
    """A model of `layers` blocks and a step of one pack: `trees` prompts with five completions, in four pairs, each."""

    layers: int
    hidden: int
    vocabulary: int
    trees: int
    prompt: int
    completion: int
    checkpointing: Checkpointing = "none"

    def model(self) -> PreTrainedModel:
        """A random Qwen3, on the device that torch makes tensors on."""
        config = Qwen3Config(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=3 * self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.hidden // 64,
            num_key_value_heads=max(1, self.hidden // 128),
            head_dim=64,
            tie_word_embeddings=False,
        )
        return use_tree_attention(Qwen3ForCausalLM(config))

    def examples(self) -> list[Example]:
        """Trees of random tokens, with reference log-probabilities; completions share the prompt alone."""
        generator = torch.Generator().manual_seed(0)
        found = []
        for t in range(self.trees):
            ids = torch.randint(16, self.vocabulary, (5, self.completion), generator=generator)
            ids[:, 0] = torch.arange(5)
            prompt = torch.randint(16, self.vocabulary, (self.prompt,), generator=generator).tolist()
            nodes, leaves = merge_completions([Completion(row, Leaf(0, "given")) for row in ids.tolist()])
            tree = PreferenceTree(f"tree{t}", prompt, nodes, leaves, [Pair(0, r) for r in range(1, 5)])
            weights = [[(tree.trained(pair.chosen), tree.trained(pair.rejected)) for pair in tree.pairs]]
            found.append(Example(tree, weights, logps=np.zeros(completion_tokens(tree), dtype=np.float32)))
        return found


CASES = {
    "long-packs": Case(layers=4, hidden=256, vocabulary=4096, trees=8, prompt=512, completion=48),
    "big-vocabulary": Case(layers=2, hidden=256, vocabulary=32768, trees=2, prompt=128, completion=24),
    "checkpointing": Case(4, 256, 4096, trees=8, prompt=512, completion=48, checkpointing="full"),
}
TOYS = {
    "toy": Case(layers=1, hidden=64, vocabulary=512, trees=2, prompt=64, completion=8),
    "toy-packs": Case(layers=3, hidden=128, vocabulary=4096, trees=6, prompt=256, completion=32),
    "toy-checkpointing": Case(3, 128, 4096, trees=6, prompt=256, completion=32, checkpointing="full"),
}


def train(case: Case, *, steps: int) -> list[float]:
    """Take training steps; returns the seconds of each."""
    model, examples, config = case.model(), case.examples(), TrainConfig()
    policy = Policy(model).train()
    checkpoint_activations(policy.model, case.checkpointing)
    optimizer = make_optimizer(policy, config=config)
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        pack = OBJECTIVE.pack(examples)
        rows = policy.rows(pack)
        loss, _ = OBJECTIVE.loss(
            rows,
            pack,
            ref_logp_R=pack.ref_logp_R,
            denominators=OBJECTIVE.denominators(examples),
            num_pairs=len(pack.pairs),
            matrices=coefficients(pack, torch.device("cpu")),
        )
        loss.backward()
        del rows, loss
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return seconds


def planned(case: Case) -> dict[str, int]:
    """The rows of the table, by name."""
    with torch.device("meta"):
        model = case.model()
    layout = Layout("cpu", checkpointing=case.checkpointing)
    return {part.name: part.bytes for part in memory_table(model, OBJECTIVE.pack(case.examples()), layout=layout)}


def peak_here(case: Case) -> int:
    """The highest resident set of five steps above the one before; to be called in a fresh process."""
    train(replace(TOYS["toy"], checkpointing=case.checkpointing), steps=2)
    before = _resident("VmRSS")
    FORGET.write_text("5")  # the peak so far
    train(case, steps=5)
    return _resident("VmHWM") - before


def peak(name: str, *, given_back: bool, threads: int) -> int:
    """`peak_here` in a fresh process; `given_back`: glibc gives back the memory of each tensor."""
    command = [sys.executable, "-m", "bench.plan", "--peak", name, "--threads", str(threads)]
    variables = environment() | (GIVEN_BACK if given_back else {})
    done = subprocess.run(command, cwd=ROOT, env=variables, check=True, capture_output=True, text=True, timeout=600)
    return int(done.stdout.split()[-1])


def _resident(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{STATUS} has no {field}")


def compare(name: str, *, threads: int) -> dict[str, object]:
    """The table of a case and both peaks."""
    table = planned(CASES[name])
    whole = sum(table.values())
    found = {
        "tensors": (whole - table["allocator"], peak(name, given_back=True, threads=threads)),
        "process": (whole, peak(name, given_back=False, threads=threads)),
    }
    for kind, (said, was) in found.items():
        sizes = f"planned {said / 2**20:8.1f} MiB  measured {was / 2**20:8.1f} MiB"
        print(f"{name:16} {kind:8} {sizes}  {said / was - 1:+.1%}")
    return {"case": name, "table": table, **found}


def rate(*, threads: int) -> dict[str, object]:
    """Flops per second of a matrix product and of whole steps."""
    case = CASES["long-packs"]
    with torch.device("meta"):
        shape = ModelShape.of(case.model())
    flops = pack_flops(shape, size_of_batch(OBJECTIVE.pack(case.examples())))
    a, b = torch.randn(2, 2048, 2048)
    products = []
    for _ in range(5):
        start = time.perf_counter()
        a @ b
        products.append(time.perf_counter() - start)
    return {
        "device": device_name(torch.device("cpu")),
        "threads": threads,
        "dtype": "fp32",
        "matmul_flops": float(f"{2 * 2048**3 / median(products):.3g}"),
        "step_flops": float(f"{flops / median(train(case, steps=5)[1:]):.3g}"),
        "command": f"python -m bench.plan --rates --threads {threads}",
    }


def main() -> None:
    """Compare, or measure rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, help="one case instead of all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rates", action="store_true", help="measure speed instead of memory")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--peak", choices=CASES | TOYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        print(peak_here((CASES | TOYS)[options.peak]))
        return
    if options.rates:
        results: object = rate(threads=options.threads)
        print(json.dumps(results))
    else:
        names = [options.case] if options.case else CASES
        results = [compare(name, threads=options.threads) for name in names]
    if options.json:
        options.json.write_text(json.dumps({"torch": torch.__version__, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    assert "MALLOC_MMAP_THRESHOLD_" not in os.environ or "--peak" in sys.argv, "unset MALLOC_MMAP_THRESHOLD_ first"
    main()
