"""`python -m ttpa.train`: train a model on preferences inside its tool calls.

    python -m ttpa.train                                          # embedded model and dialogues
    python -m ttpa.train --model ORG/MODEL --data rows.jsonl      # your model, your preferences
    python -m ttpa.train --loss_type sft                          # the control: likelihood of the chosen sides

Without --data, the model itself samples trees from dialogues about the built-in tools and is trained on them, --rounds
times. The reference model of a round is the model as it stood at its start. Everything goes to the run folder:
config.yaml, metrics.jsonl, data_report.json, trees.jsonl (what was sampled), summary.json, and final/, a Hugging Face
model folder. The folder of an earlier run can be used again, as with other trainers: its files are then replaced, once
the model is loaded and the data is read.
"""

from __future__ import annotations

import functools
import math
import platform
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from ttpa.config import parse_config, run_command
from ttpa.construct import Split, construct_dialogues
from ttpa.data.dialogues import Dialogue, read_dialogues
from ttpa.data.read import read_data
from ttpa.embedded import MODEL_DIR
from ttpa.errors import InputError
from ttpa.evaluation import Evaluation, compare, comparison_table, evaluate_calls
from ttpa.model import load_model, load_tokenizer
from ttpa.sampling import Progress, SamplingOptions, sample_trees
from ttpa.training.config import TrainConfig
from ttpa.training.loop import train_round
from ttpa.training.run_folder import RunFolder
from ttpa.trees.io import write_trees
from ttpa.trees.record import PreferenceTree

DESCRIPTION = "Train a model on preferences inside its tool calls: sample, score, train, evaluate."


def main(argv: Sequence[str]) -> None:
    """Run the command with its arguments; raises InputError for what the user has to change."""
    disable_progress_bar()  # transformers shows bars for loading and saving, which take no time beside the rest
    train(parse_config(TrainConfig, argv, prog="python -m ttpa.train", description=DESCRIPTION))


def train(config: TrainConfig) -> dict[str, Any]:
    """The whole run, from configuration to summary.json, whose content is returned; raises InputError as its parts."""
    run, clock = RunFolder(config.output), Clock()
    sampling_options(config)  # refused before anything is loaded
    with clock.phase("load"):
        source = MODEL_DIR if config.model is None else config.model
        tokenizer = load_tokenizer(source)
        model = load_model(source, dtype=torch.float32)
        model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))  # type: ignore[arg-type]
    print(f"model     {source}: {model.num_parameters():,} parameters on {model.device}")
    exam = Exam(config, model, tokenizer, clock)

    rounds: Iterable[list[PreferenceTree]]
    if config.data is not None:
        rounds = [given_trees(config, model, tokenizer, run, clock)]
    else:
        begin(run, config)
        rounds = sampled_trees(config, model, tokenizer, run, clock)  # lazy: each round samples the model of its time

    before = exam.take("before")
    done = Counter[str]()
    for number, trees in enumerate(rounds, start=1):
        pairs = sum(len(tree.pairs) for tree in trees)
        print(f"train     round {number} of {config.rounds}: {pairs} pairs in {len(trees)} trees, {config.loss_type}")
        log = functools.partial(log_line, run, number)
        with clock.phase("train"):
            done += Counter(train_round(model, tokenizer, trees, config=config, log=log, seed=config.seed + number))
    after = exam.take("after")

    with clock.phase("save"):
        final = run.save_model(model, tokenizer)
    summary = {
        **results(before, after),
        "model": str(source),
        **done,
        "seconds": clock.seconds,
        "seed": config.seed,
        "versions": versions(),
    }
    run.save_json("summary.json", summary)
    for name in before:
        print(f"\n{name}\n{comparison_table(before[name], after[name])}")
    print(f"\nThe trained model is in {final}, the numbers are in {run.path / 'summary.json'}")
    return summary


def begin(run: RunFolder, config: TrainConfig) -> None:
    """Start the run folder, once nothing is left that a wrong option could break."""
    if run.begin(config):
        print(f"output    {run.path}: the files of an earlier run are replaced")


def given_trees(
    config: TrainConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, run: RunFolder, clock: Clock
) -> list[PreferenceTree]:
    """The trees of --data, with the report of what was read; raises InputError where nothing is left of it."""
    assert config.data is not None
    with clock.phase("read"):
        trees, report = read_data(
            config.data, tokenizer=tokenizer, max_length=longest(config, model), on_overlength=config.on_overlength
        )
    begin(run, config)
    run.save_json("data_report.json", report.to_dict())
    print(report.table())
    check_trees(trees, model, config)
    return trees


def sampled_trees(
    config: TrainConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, run: RunFolder, clock: Clock
) -> Iterator[list[PreferenceTree]]:
    """In each round, trees that the model as it is then samples from new dialogues; all of them go to trees.jsonl."""
    dialogues = construct_dialogues(config.num_dialogues * config.rounds, split="preference", seed=config.seed)
    trees: list[PreferenceTree] = []
    reports: list[dict[str, Any]] = []
    for number in range(config.rounds):
        part = dialogues[number * config.num_dialogues :][: config.num_dialogues]
        print(f"sample    round {number + 1} of {config.rounds}: {len(part)} dialogues")
        with clock.phase("sample"), Bar("sampling") as bar:
            new, report = sample_trees(
                model,
                tokenizer,
                part,
                options=sampling_options(config),
                max_length=longest(config, model),
                progress=bar.show,
            )
        print(f"          {report.pairs} pairs in {report.trees} trees out of {report.decisions} calls")
        trees += new
        reports.append(report.to_dict())
        write_trees(run.path / "trees.jsonl", trees)
        run.save_json("data_report.json", {"rounds": reports})
        if number > 0 and not new:
            print("          nothing left to prefer: the model gets every call of these dialogues right")
            return
        check_trees(new, model, config)
        yield new


class Exam:
    """The evaluation of a run: the same dialogues before and after, each set apart."""

    def __init__(
        self, config: TrainConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, clock: Clock
    ) -> None:
        self.config, self.model, self.tokenizer, self.clock = config, model, tokenizer, clock
        self.sets: dict[str, list[Dialogue]] = {}
        if config.eval_data is not None:
            self.sets[config.eval_data.name] = read_dialogues(config.eval_data)
        elif config.model is None and config.num_eval_dialogues:
            number = config.num_eval_dialogues
            sizes: dict[Split, int] = {
                "heldout": number,
                "unseen_phrasings": math.ceil(number / 4),
                "unseen_tools": math.ceil(number / 4),
            }
            self.sets = {split: construct_dialogues(size, split=split, seed=0) for split, size in sizes.items()}

    def take(self, when: str) -> dict[str, Evaluation]:
        """Evaluate the model as it is now; raises InputError for a set in which no tool is called."""
        found = {}
        for name, dialogues in self.sets.items():
            with self.clock.phase(f"evaluate {when}"):
                evaluation = evaluate_calls(
                    self.model,
                    self.tokenizer,
                    dialogues,
                    batch_size=self.config.decode_batch_size,
                    max_new_tokens=self.config.max_new_tokens,
                    max_length=longest(self.config, self.model),
                )
            number = len(evaluation.outcomes)
            if not number:
                raise InputError(f"--eval_data: {name} has no tool call to evaluate (left out: {evaluation.dropped})")
            print(f"evaluate  {name} {when}: {evaluation.exact} of {number} calls exact")
            found[name] = evaluation
        return found


def results(before: dict[str, Evaluation], after: dict[str, Evaluation]) -> dict[str, Any]:
    """What summary.json says of the evaluation: the first set on top (shares in [0, 1], the 95 % interval of their
    difference), all sets in full below."""
    if not before:
        return {"exact_calls": None, "esm_score": None, "errors": None, "evaluations": {}}
    full = {
        name: {
            "before": before[name].to_dict(),
            "after": after[name].to_dict(),
            "difference": compare(before[name], after[name]).to_dict(),
        }
        for name in before
    }
    main = next(iter(full.values()))
    sides = {side: main[side] for side in ("before", "after")}
    interval = [points / 100 for points in main["difference"]["interval"]]
    return {
        "exact_calls": {**{side: part["exact_share"] for side, part in sides.items()}, "interval": interval},
        "esm_score": {side: part["esm_score"] for side, part in sides.items()},
        "errors": {side: part["errors"] for side, part in sides.items()},
        "evaluations": full,
    }


def longest(config: TrainConfig, model: PreTrainedModel) -> int | None:
    """The longest path through a tree, in tokens: --max_length, else what the model was made for."""
    window = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return window if config.max_length is None else config.max_length


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


def check_trees(trees: list[PreferenceTree], model: PreTrainedModel, config: TrainConfig) -> None:
    """Raise InputError where there is nothing to train on, and for token ids that the model does not have."""
    if not any(tree.pairs for tree in trees):
        where = config.data or "the sampled trees (give more --num_dialogues, or a lower --min_probability)"
        raise InputError(f"no pair of completions is left in {where}; {config.output}/data_report.json says why")
    highest = max(max(ids) for tree in trees for ids in (tree.prompt_ids, *(node.ids for node in tree.nodes)))
    vocabulary = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    if highest >= vocabulary:
        raise InputError(
            f"a tree has the token id {highest}, and the model has {vocabulary} tokens: the trees were made with "
            "another tokenizer",
            path=config.data,
        )


def log_line(run: RunFolder, number: int, metrics: dict[str, float]) -> None:
    """One line of metrics.jsonl."""
    run.log({"round": number, **metrics})


class Bar(tqdm):
    """A progress bar whose length is known once the work is under way; only shown in a terminal."""

    def __init__(self, name: str) -> None:
        super().__init__(desc=name, unit="call", disable=None)

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
