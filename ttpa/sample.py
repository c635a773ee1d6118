"""`python -m ttpa.sample`: preference trees from dialogues, by the model that is to be trained on them.

    python -m ttpa.sample                                                    # embedded model and dialogues
    python -m ttpa.sample --model ORG/MODEL --data dialogues.jsonl --output trees.jsonl
    torchrun --nproc-per-node 8 -m ttpa.sample --model ORG/MODEL --data dialogues.jsonl

The output is trees.jsonl, one tree a line, and trees.report.json. The run can end at any moment: the same command, with
any number of processes, goes on where it was, and the file is in the end the same to the byte.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from ttpa.config import option, parse_config, run_command
from ttpa.construct import construct_dialogues
from ttpa.data.decisions import Decision, all_decisions, check_template, decisions
from ttpa.data.dialogues import Dialogue
from ttpa.data.messages import calls_of
from ttpa.data.read import read_dialogues
from ttpa.data.report import DataReport
from ttpa.embedded import MODEL_DIR
from ttpa.errors import InputError
from ttpa.hashes import hash_of_model, hash_of_tokenizer
from ttpa.model import load_model, load_tokenizer, window
from ttpa.sampling import fingerprint
from ttpa.sampling.blocks import BlockedRun
from ttpa.sampling.options import ForkOrder, Mode, RuleName, SamplingOptions
from ttpa.sampling.paths import GPU_SHARE, PathWriter, checked_pages
from ttpa.sampling.report import SamplingReport
from ttpa.sampling.tps import Progress, sample_decisions
from ttpa.world import World, joined_world

DESCRIPTION = "Sample preference trees: the model answers, forks where it hesitates, and every end is scored."
SAMPLING = SamplingOptions()
LONGEST_WAIT = timedelta(days=7)  # a process that has finished its share may have to wait for the others


@dataclass(frozen=True)
class SampleConfig:
    """Every option of the command; raises InputError for values that make no sense."""

    model: str | None = option(None, "model folder or Hugging Face name; none is the embedded model")
    dialect: str | None = option(None, "how the model writes calls, as in mistral; none: as its template does")
    data: Path | None = option(None, "dialogues; none makes some for the embedded model")
    num_dialogues: int = option(1600, "how many to make where there is no --data")
    output: Path = option(Path("trees.jsonl"), "file of trees; its report lies beside it, as .report.json")
    overwrite: bool = option(False, "replace an output or an unfinished run that was made with other settings")
    max_length: int | None = option(None, "longest prompt and gold answer in tokens; none is the model's window")
    block_size: int = option(256, "decisions that are sampled together; so much is lost when the run is cut off")
    bf16: bool = option(False, "weights in bfloat16; they are float32 otherwise")

    mode: Mode = option(SAMPLING.mode, "tps forks answers, release draws independent ones")
    rule: RuleName = option(SAMPLING.rule, "what makes a good place to fork")
    num_forks: int = option(SAMPLING.num_forks, "places at which an answer is forked, at most")
    alternatives: int = option(SAMPLING.alternatives, "other tokens to try at a place, at most")
    min_distance: int = option(SAMPLING.min_distance, "tokens between two places, at least")
    min_entropy: float = option(SAMPLING.min_entropy, "entropy in nats that a place needs")
    min_probability: float = option(SAMPLING.min_probability, "probability that another token needs to be tried")
    min_ratio: float = option(SAMPLING.min_ratio, "and its share of the probability of the token that was taken")
    fork_order: ForkOrder = option(SAMPLING.fork_order, "best places of a finished answer, or first ones at once")
    max_leaves: int = option(SAMPLING.max_leaves, "answers of a tree, at most")
    max_depth: int = option(SAMPLING.max_depth, "2 forks branches too, and so on")
    max_tree_tokens: int | None = option(SAMPLING.max_tree_tokens, "new tokens of a tree, at most")
    max_tree_pages: int | None = option(SAMPLING.max_tree_pages, "cache pages of a tree, at most")
    num_samples: int = option(SAMPLING.num_samples, "answers in mode release")
    max_new_tokens: int = option(SAMPLING.max_new_tokens, "longest answer in tokens")
    temperature: float = option(SAMPLING.temperature, "0 takes the likeliest tokens; in mode release it means 1")
    top_k: int | None = option(SAMPLING.top_k, "draw from so many of the likeliest tokens")
    top_p: float | None = option(SAMPLING.top_p, "draw from the likeliest tokens of this probability together")
    min_p: float | None = option(SAMPLING.min_p, "draw from tokens of this share of the highest probability")
    stop: str | None = option(SAMPLING.stop, "a text that ends an answer as well")
    draft: bool = option(SAMPLING.draft, "branches verify what the trunk goes on with; faster, the same tokens")
    rows: int = option(SAMPLING.rows, "answers that are written side by side")
    cache_gb: float | None = option(SAMPLING.cache_gb, "GiB of cache; none is 1 on a CPU, a share of a GPU's memory")
    seed: int = option(SAMPLING.seed, "decides the draws, and which dialogues are made")

    def __post_init__(self) -> None:
        for name in ("num_dialogues", "block_size"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} must be at least 1, not {getattr(self, name)}")
        if self.max_length is not None and self.max_length < 2:
            raise InputError(f"--max_length must be at least 2, not {self.max_length}")
        if self.model is not None and self.data is None:
            raise InputError("--data is required with --model: dialogues, one JSON object a line")
        if self.data is not None and self.data.resolve() == self.output.resolve():
            raise InputError("--output would replace --data; choose another one")
        self.sampling()

    def sampling(self) -> SamplingOptions:
        """The options of the sampler."""
        return SamplingOptions(**{field.name: getattr(self, field.name) for field in fields(SamplingOptions)})


def main(argv: Sequence[str]) -> None:
    """Run the command with its arguments; raises InputError for what the user has to change."""
    disable_progress_bar()  # of loading, which takes no time beside the rest
    config = parse_config(SampleConfig, argv, prog="python -m ttpa.sample", description=DESCRIPTION)
    with ended_by_signals(), joined_world(longest_wait=LONGEST_WAIT) as world:
        sample(config, world)


def sample(config: SampleConfig, world: World) -> None:
    """The whole run of this process; raises InputError for what the user has to change."""
    check_output(config.output)
    dialogues, data_report = read(config)
    source = MODEL_DIR if config.model is None else config.model
    tokenizer = load_tokenizer(source, dialect=config.dialect)
    for decision in islice((d for dialogue in dialogues for d in decisions(dialogue, tokenizer) if not d.dropped), 1):
        check_template(decision, tokenizer)
    model = load_model(source, dtype=torch.bfloat16 if config.bf16 else torch.float32)
    model.to(world.device)  # type: ignore[arg-type]  # transformers wraps it untyped
    found = all_decisions(dialogues, tokenizer, max_length=longest(config, model))
    blocks = [found[first : first + config.block_size] for first in range(0, len(found), config.block_size)]
    usable = [decision for decision in found if decision.dropped is None]
    checked_pages(model, usable, options=config.sampling())

    settings = {
        "model": str(source),
        "model hash": hash_of_model(model),
        "tokenizer hash": hash_of_tokenizer(tokenizer),
        "data hash": fingerprint.hash_of_dialogues(dialogues),
        **{name: getattr(config, name) for name in ("dialect", "max_length", "block_size", "bf16")},
        **asdict(config.sampling()),
        "device": fingerprint.name_of_device(model.device),
        **fingerprint.versions(),
    }
    run = BlockedRun(config.output, num_blocks=len(blocks), fingerprint=settings)
    state = run.state(overwrite=config.overwrite)
    wait(world)  # all have seen the same state, before one of them changes it
    if world.main and state == "new":
        run.begin(threads=torch.get_num_threads(), cache_gb=cache_gb(config, model))
    if state == "complete":
        if world.main:
            run.clear()
            print(f"{config.output} is already complete; --overwrite makes it again")
        return
    wait(world)
    held = run.join()
    torch.set_num_threads(held["threads"])  # the last bits of a product depend on it
    options = replace(config.sampling(), cache_gb=held["cache_gb"])
    writer = PathWriter(model, tokenizer, usable, options=options)
    writer.origin["weights"] = settings["model hash"]
    mine = range(world.rank, len(blocks), world.size)
    done = {block: report for block in mine if (report := run.finished(block)) is not None}
    if world.main:
        if data_report is not None:
            data_report.save(config.output.with_suffix(".data_report.json"))
            print(data_report.table())
        where = f"{model.device}, {torch.get_num_threads()} threads"
        print(f"model     {source}: {model.num_parameters():,} parameters on {where}")
        print(f"sample    {len(found)} decisions of {len(dialogues)} dialogues in {len(blocks)} blocks")
        if state == "begun":
            print(f"resumed   {sum(run.finished(block) is not None for block in range(len(blocks)))} blocks are done")
    with Display(world, sizes=[len(block) for block in blocks], mine=mine, done=done) as display:
        for block in mine:
            if block not in done:
                sample_block(run, block, blocks[block], writer, display)
    wait(world)
    if world.main:
        print(f"\n{run.finish().table()}\n\nThe trees are in {config.output}, the numbers in {run.report_path}")
    wait(world)


def sample_block(
    run: BlockedRun,
    block: int,
    part: Sequence[Decision],
    writer: PathWriter,
    display: Display,
) -> None:
    """Sample one block and write it."""
    report = SamplingReport()
    sampled = sample_decisions(writer, part, report=report, progress=display.show)
    run.write(block, (tree for _, tree in sampled if tree is not None), report)
    display.finish_block(block, report)


def wait(world: World) -> None:
    """Go on when all processes have come to this place; exits with an error where one of them has ended."""
    try:
        world.barrier()
    except RuntimeError:
        raise SystemExit("error: another process of this run has ended: the same command goes on") from None


def check_output(path: Path) -> None:
    """Raise InputError where the output cannot be written."""
    if path.is_dir():
        raise InputError("--output is a folder; it has to be a file, such as trees.jsonl in it", path=path)
    if not path.parent.is_dir():
        raise InputError(f"the folder of --output {path.name} does not exist; make it first", path=path.parent)
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}; choose another --output", path=path.parent) from None


def read(config: SampleConfig) -> tuple[list[Dialogue], DataReport | None]:
    """The dialogues of the run in which a tool is called, and the report of --data; raises InputError (file:line) for
    what is wrong with --data, and where no tool is called in it."""
    if config.data is None:
        return construct_dialogues(config.num_dialogues, split="preference", seed=config.seed), None
    found, report = read_dialogues(config.data)
    dialogues = []
    for dialogue in found:
        if calls_of(dialogue.messages):
            dialogues.append(dialogue)
        else:
            report.drop(dialogue.id, str(config.data), "no tool is called", "there is no gold answer to compare with")
    if not dialogues:
        raise InputError("no dialogue calls a tool, so there is no gold answer to compare with", path=config.data)
    report.kept = len(dialogues)
    return dialogues, report


def longest(config: SampleConfig, model: PreTrainedModel) -> int | None:
    """The longest prompt and gold answer, in tokens: --max_length, else what the model was made for."""
    return window(model.config) if config.max_length is None else config.max_length


def cache_gb(config: SampleConfig, model: PreTrainedModel) -> float | None:
    """GiB of cache, in whole numbers where the free memory of a GPU decides, which is never twice the same."""
    if config.cache_gb is not None or model.device.type != "cuda":
        return config.cache_gb
    return max(1, int(GPU_SHARE * torch.cuda.mem_get_info(model.device)[0] / 2**30))


class Display:
    """What is seen of a run: in a terminal one bar, of the blocks of the first process; elsewhere a line for each block
    that is finished."""

    def __init__(
        self, world: World, *, sizes: Sequence[int], mine: Sequence[int], done: dict[int, SamplingReport]
    ) -> None:
        self.sizes, self.terminal = sizes, sys.stderr.isatty()
        self.began, self.tokens = time.perf_counter(), 0
        self.pairs = sum(report.pairs for report in done.values())
        self.finished = sum(sizes[block] for block in done)
        self.bar = tqdm(
            desc="sampling",
            unit="tree",
            total=sum(sizes[block] for block in mine),
            initial=self.finished,
            disable=not self.terminal or world.rank > 0,
        )

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def show(self, progress: Progress) -> None:
        """Show how far the block at hand is."""
        rate = (self.tokens + progress.decoded_tokens) / (time.perf_counter() - self.began)
        self.bar.set_postfix_str(
            f"{rate:,.0f} tokens/s, {self.pairs + progress.pairs} pairs, {progress.pages_used}/{progress.pages} pages",
            refresh=False,
        )
        self.bar.update(self.finished + progress.done - self.bar.n)

    def finish_block(self, block: int, report: SamplingReport) -> None:
        """Count a block that is done, and say so where there is no bar."""
        self.tokens += report.decoded_tokens
        self.pairs += report.pairs
        self.finished += self.sizes[block]
        self.bar.update(self.finished - self.bar.n)
        if not self.terminal:
            print(
                f"block     {block + 1} of {len(self.sizes)}: {report.trees} trees, {report.pairs} pairs, "
                f"{report.decoded_tokens} tokens, {report.decoded_tokens / report.seconds:,.0f} tokens/s",
                flush=True,
            )


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """End at once on Ctrl-C and SIGTERM, with a line instead of a traceback and exit code 130 or 143."""

    def end(number: int, frame: object) -> None:
        for each in earlier:
            signal.signal(each, signal.SIG_DFL)  # whoever asks twice means it
        if os.environ.get("RANK", "0") == "0":
            os.write(2, b"\nstopped: the same command goes on where this run was\n")  # print may be what was cut off
        raise SystemExit(128 + number)

    earlier = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    run_command(main)
