"""`python -m ttpa.view`: preference trees as one HTML page that needs nothing else.

    python -m ttpa.view trees.jsonl
    python -m ttpa.view pairs.jsonl --model ORG/MODEL --output pairs.html
    python -m ttpa.view trees.jsonl --policy runs/a/final

FILE is what `python -m ttpa.train --data` takes. With --policy the page also shows how far the policy's log-probability
of each token has moved from the sampler's, or from that of --ref_model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from ttpa.config import option, parse_config, run_command
from ttpa.data.read import kind_of, read_data
from ttpa.data.report import DataReport
from ttpa.embedded import MODEL_DIR
from ttpa.errors import InputError
from ttpa.esm.weights import WeightOptions, key_token_weights, pair_weights
from ttpa.files import atomic_write
from ttpa.model import load_tokenizer
from ttpa.trees.pack import PairWeights
from ttpa.trees.record import Pair, PreferenceTree
from ttpa.viewer.page import html_page
from ttpa.viewer.ratios import log_ratios
from ttpa.viewer.records import Recorder, highest_id


@dataclass(frozen=True)
class ViewConfig:
    """The options of the command; raises InputError for values that make no sense."""

    file: Path = option(
        MISSING, "trees, TRL preference file, ToolBench answers; stands without --file", positional=True
    )
    output: Path | None = option(None, "page to write; none: beside the file, with .html; of a folder, here")
    model: str | None = option(None, "whose tokenizer; none: that of the model that sampled the trees, or the embedded")
    dialect: str | None = option(
        None, "how the model writes calls, such as hermes or mistral; none: told by its template"
    )
    policy: str | None = option(None, "model whose log-probabilities are compared with the sampler's, token by token")
    ref_model: str | None = option(None, "model to compare --policy with in place of the sampler")
    token_weights: Literal["errors", "keys"] = option("errors", "weights to show: by ESM's errors, or of key tokens")
    error_weight: float = option(1.0, "weight of the tokens of an error and of what should stand there")
    follow_weight: float = option(0.0, "weight of other tokens behind the fork of a pair")

    def __post_init__(self) -> None:
        if self.ref_model is not None and self.policy is None:
            raise InputError("--ref_model is what --policy is compared with; give --policy")
        if self.page.resolve() == self.file.resolve():
            raise InputError("--output would replace the file; choose another one")
        WeightOptions(self.error_weight, self.follow_weight)

    @property
    def page(self) -> Path:
        """The file that the page is written to."""
        if self.output is not None:
            return self.output
        return (Path() if self.file.is_dir() else self.file.parent) / f"{self.file.resolve().stem}.html"


def main(argv: Sequence[str]) -> None:
    """Run the command with its arguments; raises InputError for what the user has to change."""
    disable_progress_bar()  # of loading, which takes no time beside the rest
    description = "Write preference trees as one HTML page: branches, tokens, errors, pairs. It loads nothing else."
    view(parse_config(ViewConfig, argv, prog="python -m ttpa.view FILE", description=description))


def view(config: ViewConfig) -> Path:
    """Write the page, say what is in it, and return its path; raises InputError for what the user has to change."""
    trees, report, tokenizer, source = read(config)
    print(report.table())
    with atomic_write(config.page) as file:  # at once, so that nothing is computed for a page that cannot be written
        compared = None
        if config.policy is not None:
            compared = log_ratios(trees, policy=config.policy, ref_model=config.ref_model)
        recorder = Recorder(tokenizer, weights=weights_of(config, tokenizer))
        for t, tree in enumerate(tqdm(trees, desc="reading", unit="tree", disable=not sys.stderr.isatty())):
            recorder.add(tree, ratios=None if compared is None else compared[t])
        facts = {
            "file": str(config.file),
            "tokenizer": source,
            "weights": config.token_weights,
            "policy": config.policy,
            "reference": None if config.policy is None else config.ref_model or "the sampler",
        }
        page = html_page(recorder, title=config.file.name or str(config.file), facts=facts)
        file.write(page)
    print(f"The page is {config.page} ({len(page) / 1e6:.1f} MB); its tokens are those of {source}")
    return config.page


def read(config: ViewConfig) -> tuple[list[PreferenceTree], DataReport, Any, str]:
    """The trees, the report, the tokenizer, and the name of its model; raises InputError for trees of a model that is
    not at hand, and for token ids that the tokenizer does not have."""
    source, found = config.model, None
    if kind_of(config.file)[0] == "trees":
        found = read_data(config.file, tokenizer=None, max_length=None)
        sampled_by = {str(tree.origin["model"]) for tree in found[0] if tree.origin.get("model")}
        if source is None and sampled_by:
            source = min(sampled_by)
            if len(sampled_by) > 1 or not Path(source).is_dir():
                raise InputError(
                    f"the trees were sampled by {', '.join(sorted(sampled_by))}, which is not a folder here: give the "
                    "model whose tokenizer they have with --model",
                    path=config.file,
                )
    source = str(MODEL_DIR) if source is None else source
    tokenizer = load_tokenizer(source, dialect=config.dialect)
    trees, report = found or read_data(config.file, tokenizer=tokenizer, max_length=None)
    for tree in trees:
        if highest_id(tree) >= len(tokenizer):
            raise InputError(
                f"tree {tree.id!r} has the token id {highest_id(tree)}, and the tokenizer of {source} only "
                f"{len(tokenizer)} entries: give the model that the trees are for with --model",
                path=config.file,
            )
    return trees, report, tokenizer, "the embedded model" if source == str(MODEL_DIR) else source


def weights_of(config: ViewConfig, tokenizer: Any) -> Callable[[PreferenceTree, Pair], PairWeights]:
    """The weights of the tokens of a pair, as `ttpa.train` gives them with the same options."""
    if config.token_weights == "keys":
        return lambda tree, pair: key_token_weights(tree, pair, tokenizer)
    options = WeightOptions(config.error_weight, config.follow_weight)
    return lambda tree, pair: pair_weights(tree, pair, tokenizer, options)


if __name__ == "__main__":
    run_command(main)
