"""`python -m ttpa.train`: train a model on preferences inside its tool calls.

    python -m ttpa.train                                          # embedded model and dialogues
    python -m ttpa.train --model ORG/MODEL --data rows.jsonl      # your model, your preferences
    python -m ttpa.train --loss_type sft                          # the control: likelihood of the chosen sides
    torchrun --nproc-per-node 8 -m ttpa.train --config run.yaml   # sharded over the GPUs of a node
    python -m ttpa.train --config run.yaml --plan                 # memory, steps and time, before anything is loaded

Without --data, the model itself samples trees from dialogues about the built-in tools and is trained on them, --rounds
times. The reference model of a round is the model as it stood at its start. Everything goes to the run folder:
config.yaml, metrics.jsonl, data_report.json, trees.jsonl (what was sampled), checkpoints/, summary.json, and final/, a
Hugging Face model folder. The folder of an earlier run can be used again, as with other trainers: its files are then
replaced, once the model is loaded and the data is read. --resume auto goes on from the newest checkpoint instead. Told
to stop (SIGTERM, SIGUSR1), a run saves a checkpoint and exits with code 75.
"""

from __future__ import annotations

import gc
import json
import math
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from ttpa.config import parse_config, plain_options, run_command
from ttpa.construct import Split, construct_dialogues
from ttpa.data.dialogues import Dialogue
from ttpa.data.read import read_data, read_dialogues
from ttpa.data.report import DataReport
from ttpa.data.toolbench import ToolBenchOptions
from ttpa.embedded import MODEL_DIR
from ttpa.errors import InputError
from ttpa.evaluation import comparison_table
from ttpa.evaluation.exam import Evaluations, dump, load, results, take_exam
from ttpa.model import load_tokenizer, window
from ttpa.sampling import Progress, SamplingOptions, sample_trees
from ttpa.sampling.report import SamplingReport
from ttpa.training.card import check_push, model_card, push_to_hub
from ttpa.training.checkpoint import Checkpoints
from ttpa.training.config import TrainConfig
from ttpa.training.loop import Run, train_round
from ttpa.training.monitor import Monitor
from ttpa.training.objective import Objective
from ttpa.training.optimizer import make_optimizer
from ttpa.training.plan import make_plan, model_without_weights, plan_text, planned_examples
from ttpa.training.plan_table import explain_out_of_memory, out_of_memory
from ttpa.training.run_folder import CHECKPOINTS, RunFolder
from ttpa.training.setup import (
    References,
    copy_back,
    decodable,
    fingerprint,
    load_trainable,
    make_objective,
    make_policy,
    make_round,
    save_trained,
)
from ttpa.training.stop import STOPPED, StopSignal
from ttpa.training.trackers import tracker_names
from ttpa.trees.io import iterate_trees, tree_line, write_trees
from ttpa.trees.merge import merge_trees
from ttpa.trees.record import PreferenceTree
from ttpa.world import World, joined_world

DESCRIPTION = "Train a model on preferences inside its tool calls: sample, score, train, evaluate."


def main(argv: Sequence[str]) -> None:
    """Run the command with its arguments; raises InputError for what the user has to change."""
    disable_progress_bar()  # transformers shows bars for loading and saving, which take no time beside the rest
    train(parse_config(TrainConfig, argv, prog="python -m ttpa.train", description=DESCRIPTION))


def train(config: TrainConfig) -> dict[str, Any]:
    """The whole run, from configuration to summary.json, whose content is returned; raises InputError as its parts."""
    # what can be refused before anything is loaded
    sampling_options(config)
    objective = make_objective(config)
    tracker_names(config.report_to)
    if config.push_to_hub is not None:
        check_push(config.push_to_hub)
    if config.plan:
        print(plan_of(config, objective))
        return {}
    with joined_world() as world, StopSignal() as stop:
        job = Job(config, world, stop)
        with job.clock.phase("load"):
            model, start_key = load_trainable(job.source, config=config, world=world, references=job.references)
        job.say(f"model     {job.source}: {model.num_parameters():,} parameters on {world.size} x {world.device.type}")
        given = given_trees(job, model)
        checkpoints = Checkpoints(
            job.run.path / CHECKPOINTS,
            world=world,
            fingerprint=fingerprint(config, model=start_key, trees=None if given is None else given.trees),
            keep_last=config.keep_last,
            keep_best=config.keep_best,
        )
        found = find_checkpoint(config, checkpoints)
        state = None if found is None else checkpoints.state(found)
        if state is None:
            begin(job)
        else:
            job.say(f"resume    {found}: round {state['round']}, step {state['step']}")
        if given:
            job.run.save_json("data_report.json", given.report.to_dict())
            job.say(given.report.table())
        before = examine(job, model, "before", begun=state is not None)
        job.end_if_told()
        with Monitor(
            job.run,
            logging_steps=config.logging_steps,
            report_to=config.report_to,
            options=plain_options(config),
            world=world,
        ) as monitor:
            run = Run(config, world, objective, monitor, checkpoints, stop)
            if state is not None:
                monitor.restore(state["monitor"])
                run.restore(state)
            for number, trees in [(1, given.trees)] if given else sampled_trees(job, model, state):
                with job.clock.phase("train"):
                    key = job.references.key(model) if number > 1 else start_key
                    one_round(job, run, model, number, trees, given.eval_trees if given else [], key=key, found=found)
                found = None
        after = examine(job, model, "after", begun=False)
        with job.clock.phase("save"):
            final = save_trained(model, job.tokenizer, job.run, config=config, source=str(job.source))
        summary = {
            **results(before, after),
            "model": str(job.source),
            **run.done,
            "skipped_steps": run.skipped,
            "seconds": job.clock.seconds,
            "seed": config.seed,
            "processes": world.size,
            "versions": versions(),
        }
        job.run.save_json("summary.json", summary)
        publish(job, final, summary)
        for name in before:
            job.say(f"\n{name}\n{comparison_table(before[name], after[name])}")
        job.say(f"\nThe trained model is in {final}, the numbers are in {job.run.path / 'summary.json'}")
        return summary


def one_round(
    job: Job,
    run: Run,
    model: PreTrainedModel,
    number: int,
    trees: list[PreferenceTree],
    eval_trees: list[PreferenceTree],
    *,
    key: str,
    found: Path | None,
) -> None:
    """Train a model on trees, from a checkpoint of this round on where there is one. `key` is that of the model's
    log-probabilities as it is; a checkpoint knows the one of the model as it was when its round began."""
    config, world = job.config, job.world
    pairs, state = sum(len(tree.pairs) for tree in trees), {} if found is None else run.checkpoints.state(found)
    job.say(f"train     round {number} of {config.rounds}: {pairs} pairs in {len(trees)} trees, {config.loss_type}")
    try:
        policy = make_policy(model, config=config, world=world)
        optimizer = make_optimizer(policy, config=config)
        run.reference_key = state.get("reference", key)
        round = make_round(
            number,
            trees,
            policy,
            eval_trees=eval_trees,
            config=config,
            objective=run.objective,
            references=job.references,
            key=run.reference_key,
            begun=bool(state) and number > 1,
        )
        if found is not None:
            _, tensors = run.checkpoints.load(found, policy=policy, optimizer=optimizer)
            if round.moving is not None:
                round.moving.load_state(tensors)
        train_round(policy, optimizer, round, run, first_step=state.get("step", 0))
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        planned = make_plan(
            planned_examples(trees, tokenizer=job.tokenizer, objective=run.objective, config=config),
            model=model_without_weights(job.source, config=config),
            objective=run.objective,
            config=config,
            device=world.device,
            world_size=world.size,
            grouped=world.grouped,
        )
        raise InputError(explain_out_of_memory(error, planned.table, world.device)) from error
    copy_back(policy, model)
    del policy, optimizer, round  # FSDP2's hooks and their module hold each other, and the memory of the shards
    gc.collect()


def plan_of(config: TrainConfig, objective: Objective) -> str:
    """What --plan prints; no weights are loaded."""
    assert config.data is not None
    source: Path | str = MODEL_DIR if config.model is None else config.model
    tokenizer = load_tokenizer(source, dialect=config.dialect)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trees, _ = read_trees_of(config.data, model_without_weights(source, config=config), tokenizer, config=config)
    size = config.world_size or 1
    return plan_text(
        trees,
        source=source,
        tokenizer=tokenizer,
        objective=objective,
        config=config,
        device=device,
        world_size=size,
        grouped=size > 1,
    )


def publish(job: Job, final: Path, summary: dict[str, Any]) -> None:
    """Write the model card, and upload the model where that was asked for."""
    if not job.world.main:
        return
    config = job.config
    report = json.loads((job.run.path / "data_report.json").read_text(encoding="utf-8"))
    options, name = plain_options(config), config.push_to_hub
    card = model_card(source=config.model, summary=summary, options=options, report=report, name=name)
    job.run.save_text(f"{final.name}/README.md", card)
    if name is not None:
        print(f"uploaded  {push_to_hub(final, name, private=config.hub_private_repo)}")


class Job:
    """What stays the same in a run."""

    def __init__(self, config: TrainConfig, world: World, stop: StopSignal) -> None:
        self.config, self.world, self.stop = config, world, stop
        self.run, self.clock = RunFolder(config.output, main=world.main), Clock()
        self.source: Path | str = MODEL_DIR if config.model is None else config.model
        self.tokenizer = load_tokenizer(self.source, dialect=config.dialect)
        folder = config.output / "reference" if config.reference_cache is None else config.reference_cache
        self.references = References(config=config, tokenizer=self.tokenizer, world=world, folder=folder, stop=stop)

    def end_if_told(self) -> None:
        """Exit between two phases when the run was told to stop; there is nothing to save then."""
        if self.world.any(self.stop.asked):
            raise SystemExit(STOPPED)

    def say(self, text: str) -> None:
        """Print once, not in every process."""
        if self.world.main:
            print(text, flush=True)


def begin(job: Job) -> None:
    """Start the run folder, once nothing is left that a wrong option could break."""
    job.world.barrier()
    if job.run.begin(job.config):
        job.say(f"output    {job.run.path}: the files of an earlier run are replaced")


def find_checkpoint(config: TrainConfig, checkpoints: Checkpoints) -> Path | None:
    """Where --resume goes on, None where it begins; raises InputError for a folder that is not there."""
    if config.resume in (None, "none"):
        return None
    if config.resume == "auto":
        return checkpoints.latest()
    path = Path(config.resume or "")
    if not path.is_dir():
        raise InputError("there is no such checkpoint; --resume auto takes the newest one of --output", path=path)
    if path.resolve().parent != (config.output / CHECKPOINTS).resolve():
        raise InputError(f"--resume {path} is not of this run: give its folder as --output, whose log goes on as well")
    return path


@dataclass(frozen=True)
class Given:
    """The trees of --data, the report of what was read, and the trees of --eval_preferences."""

    trees: list[PreferenceTree]
    report: DataReport
    eval_trees: list[PreferenceTree]


def read_trees_of(
    paths: Path, model: PreTrainedModel, tokenizer: Any, *, config: TrainConfig
) -> tuple[list[PreferenceTree], DataReport]:
    """The trees of a file, a folder, or several with commas between them, as the options say, rows of one prompt as one
    tree, and the report."""
    found = [
        read_data(
            path,
            tokenizer=tokenizer,
            max_length=longest(config, model),
            on_overlength=config.on_overlength,
            toolbench=ToolBenchOptions(config.toolbench_thoughts, config.toolbench_shapes, config.toolbench_failures),
        )
        for path in ([paths] if paths.exists() else map(Path, str(paths).split(",")))
    ]
    trees = [tree for part, report in found if report.format == "trees" for tree in part]
    rows = [tree for part, report in found if report.format != "trees" for tree in part]
    report, merged = DataReport.joined([report for _, report in found]), merge_trees(rows)
    if len(merged) < len(rows):
        report.note(f"rows with the same prompt share a tree: {len(rows)} rows, {len(merged)} trees")
    return trees + merged, report


def given_trees(job: Job, model: PreTrainedModel) -> Given | None:
    """What the user gave to train on; raises InputError where nothing is left of it."""
    config = job.config
    if config.data is None:
        return None

    def read(path: Path) -> tuple[list[PreferenceTree], DataReport]:
        trees, report = read_trees_of(path, model, job.tokenizer, config=config)
        if not any(tree.pairs for tree in trees):
            job.say(report.table())
            raise InputError(f"no pair of completions is left in {path}; the table above says why")
        if config.reference == "sampled" and all(node.logps is None for tree in trees for node in tree.nodes):
            raise InputError("--reference sampled: no sampler has recorded log-probabilities in these trees", path=path)
        check_trees(trees, model, where=str(path))
        return trees, report

    with job.clock.phase("read"):
        trees, report = read(config.data)
        return Given(trees, report, [] if config.eval_preferences is None else read(config.eval_preferences)[0])


def sampled_trees(
    job: Job, model: PreTrainedModel, state: dict[str, Any] | None
) -> Iterator[tuple[int, list[PreferenceTree]]]:
    """In each round, trees that the model as it is then samples from new dialogues; all of them go to trees.jsonl, from
    where a run that goes on takes those that were sampled before."""
    config, world = job.config, job.world
    dialogues = construct_dialogues(config.num_dialogues * config.rounds, split="preference", seed=config.seed)
    trees: list[PreferenceTree] = []
    reports: list[dict[str, Any]] = []
    if state is not None:
        reports = json.loads((job.run.path / "data_report.json").read_text(encoding="utf-8"))["rounds"]
        trees = list(iterate_trees(job.run.path / "trees.jsonl"))[: sum(report["trees"] for report in reports)]
        world.barrier()
    for number in range(state["round"] if state else 1, config.rounds + 1):
        if len(reports) < number:
            part = dialogues[(number - 1) * config.num_dialogues :][: config.num_dialogues]
            job.say(f"sample    round {number} of {config.rounds}: {len(part)} dialogues")
            first, last = (len(part) * rank // world.size for rank in (world.rank, world.rank + 1))
            with job.clock.phase("sample"), computing(model, job) as whole, Bar("sampling", shown=world.main) as bar:
                new, report = sample_trees(
                    whole,
                    job.tokenizer,
                    part[first:last],
                    options=sampling_options(config),
                    max_length=longest(config, model),
                    progress=bar.show,
                )
            report = SamplingReport.merge(
                [
                    SamplingReport.from_dict(json.loads(text))
                    for text in world.gather_texts(json.dumps(report.to_dict()))
                ]
            )
            lines = world.gather_texts("".join(tree_line(tree) for tree in new))
            trees += [PreferenceTree.from_dict(json.loads(line)) for line in "".join(lines).split("\n") if line]
            job.say(f"          {report.pairs} pairs in {report.trees} trees out of {report.decisions} calls")
            reports.append(report.to_dict())
            if world.main:
                write_trees(job.run.path / "trees.jsonl", trees)
            job.run.save_json("data_report.json", {"rounds": reports})
            job.end_if_told()
        start = sum(report["trees"] for report in reports[: number - 1])
        new = trees[start:][: reports[number - 1]["trees"]]
        if number > 1 and not new:
            job.say("          nothing left to prefer: the model gets every call of these dialogues right")
            return
        if not new:
            raise InputError(
                "the model is of one mind everywhere: give more --num_dialogues, or a lower --min_probability"
            )
        yield number, new


def examine(job: Job, model: PreTrainedModel, when: str, *, begun: bool) -> Evaluations:
    """The exact calls of the model as it is now; of a run that goes on, the result from before its first step."""
    config, kept = job.config, job.run.path / "before.json"
    sets: dict[str, list[Dialogue]] = {}
    if begun and kept.exists():
        return load(kept.read_text(encoding="utf-8"))
    if config.eval_data is not None:
        sets[config.eval_data.name], _ = read_dialogues(config.eval_data)
    elif config.model is None and config.num_eval_dialogues:
        number = config.num_eval_dialogues
        sizes: dict[Split, int] = {
            "heldout": number,
            "unseen_phrasings": math.ceil(number / 4),
            "unseen_tools": math.ceil(number / 4),
        }
        sets = {split: construct_dialogues(size, split=split, seed=0) for split, size in sizes.items()}
    if not sets:
        return {}
    with job.clock.phase(f"evaluate {when}"), computing(model, job) as whole:
        found = take_exam(
            sets,
            whole,
            job.tokenizer,
            batch_size=config.decode_batch_size,
            max_new_tokens=config.max_new_tokens,
            max_length=longest(config, model),
            world=job.world,
        )
    for name, evaluation in found.items():
        job.say(f"evaluate  {name} {when}: {evaluation.exact} of {len(evaluation.outcomes)} calls exact")
    if when == "before":
        job.run.save_text("before.json", dump(found))
    return found


@contextmanager
def computing(model: PreTrainedModel, job: Job) -> Iterator[PreTrainedModel]:
    """The model as it is decoded with, on this process's device; it goes back to where it waits while a copy is
    trained."""
    home, whole = model.device, decodable(model, config=job.config)
    whole.to(job.world.device)  # type: ignore[arg-type]
    try:
        yield whole
    finally:
        model.to(home)  # type: ignore[arg-type]


def longest(config: TrainConfig, model: PreTrainedModel) -> int | None:
    """The longest path through a tree, in tokens: --max_length, else what the model was made for."""
    return window(model.config) if config.max_length is None else config.max_length


def sampling_options(config: TrainConfig) -> SamplingOptions:
    """The options of the sampler; raises InputError for values that make no sense."""
    return SamplingOptions(
        num_forks=config.num_forks,
        alternatives=config.alternatives,
        min_entropy=config.min_entropy,
        min_probability=config.min_probability,
        max_new_tokens=config.max_new_tokens,
        rows=config.decode_batch_size,
    )


def check_trees(trees: Sequence[PreferenceTree], model: PreTrainedModel, *, where: str) -> None:
    """Raise InputError for token ids that the model does not have."""
    highest = max(
        (max(ids) for tree in trees for ids in (tree.prompt_ids, *(node.ids for node in tree.nodes))), default=0
    )
    vocabulary = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    if highest >= vocabulary:
        raise InputError(
            f"a tree of {where} has the token id {highest}, and the model has {vocabulary} tokens: the trees were made "
            "with another tokenizer"
        )


class Bar(tqdm):
    """A progress bar whose length is known once the work is under way; only shown in a terminal."""

    def __init__(self, name: str, *, shown: bool) -> None:
        super().__init__(desc=name, unit="call", disable=None if shown else True)

    def show(self, progress: Progress) -> None:
        """Show how many decisions are done."""
        self.total = progress.total
        self.update(progress.done - self.n)


class Clock:
    """Seconds spent in each phase of the run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of a block to the phase `name`."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def versions() -> dict[str, str]:
    """The versions of what computed the run."""
    names = ("ttpa", "torch", "transformers", "tokenizers", "numpy")
    installed = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    return {"python": platform.python_version(), **{name: installed[name] for name in names if name in installed}}


if __name__ == "__main__":
    run_command(main)
