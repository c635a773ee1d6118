"""The sampler of ttpa and its peers behind one call: decisions in, usable pairs and what they took out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from ttpa.data.decisions import Decision
from ttpa.model import use_tree_attention
from ttpa.sampling import SamplingOptions, SamplingReport, sample_decisions
from ttpa.sampling.assemble import paths_to_tree, scored
from ttpa.sampling.decoded import Decoded
from ttpa.sampling.paths import PathWriter
from ttpa.sampling.reference import reference_paths
from ttpa.sampling.stop import Stop, end_ids

# The fastest on a CPU of those tried: pages of 32 and 256 tokens, passes of a quarter to all of a prompt, 8 to all
# requests at once. Attention is dense over all requests of a pass there, so that fewer of them are better.
CB_PAGE = 32
CB_PASS_TOKENS = 512
CB_REQUESTS = 16

# Forks at errors that the model makes less often, too: what bench/tune_forks.py calls low floors.
LOW_FLOORS = {"min_entropy": 0.02, "min_probability": 0.005, "min_ratio": 0.0}


@dataclass(frozen=True)
class Setting:
    """What all sides work with: a model, its twin with the same weights and transformers' own attention, a tokenizer,
    answers for a prompt, tokens of an answer at most, and rows decoded at once."""

    model: Any
    plain: Any
    tokenizer: Any
    leaves: int = 8
    max_new_tokens: int = 96
    rows: int = 64

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: Any, **sizes: int) -> Setting:
        """Of a model, which is switched to tree attention."""
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        plain = copy.deepcopy(model, shared)
        return cls(use_tree_attention(model), plain, tokenizer, **sizes)

    @property
    def ends(self) -> list[int]:
        return end_ids(self.model, self.tokenizer)


@dataclass
class Outcome:
    """What came of a run. `decoded` are the tokens that were written, beginnings shared with a path that was written
    before counted once; `computed` all that went through the model, prompts, padding and rejected drafts included."""

    pairs: int
    decoded: int
    computed: int = 0
    passes: int = 0
    details: dict[str, Any] = field(default_factory=dict)


Side = Callable[[Setting, Sequence[Decision], int], Outcome]


def run(side: Side, setting: Setting, decisions: Sequence[Decision], *, seed: int) -> Outcome:
    """Run one side once, counting what goes through the model."""
    with _counting(setting) as sizes:
        outcome = side(setting, decisions, seed)
    outcome.passes, outcome.computed = len(sizes), sum(sizes)
    return outcome


def ttpa(setting: Setting, decisions: Sequence[Decision], seed: int, **floors: float) -> Outcome:
    """This package, greedy; at most as many leaves as the others draw answers."""
    report, options = SamplingReport(), replace(_options(setting), **floors)
    writer = PathWriter(setting.model, setting.tokenizer, decisions, options=options)
    for _ in sample_decisions(writer, decisions, report=report):
        pass
    return Outcome(report.pairs, report.decoded_tokens, details=report.to_dict())


def slow_twin(setting: Setting, decisions: Sequence[Decision], seed: int) -> Outcome:
    """The same trees from plain forward passes, one path after the other."""
    pairs = decoded = 0
    for decision in decisions:
        paths = reference_paths(
            setting.plain, setting.tokenizer, decision, options=_options(setting), ends=setting.ends
        )
        pairs += _pairs(setting, decision, paths)
        decoded += sum(len(path.ids) - _given(name) for name, path in paths)
    return Outcome(pairs, decoded)


def generate(setting: Setting, decisions: Sequence[Decision], seed: int) -> Outcome:
    """`generate(num_return_sequences=leaves)` at temperature 1 on batches of prompts of like length."""
    torch.manual_seed(seed)
    config = generation_config(setting)
    answers: dict[int, list[list[int]]] = {}
    order = sorted(range(len(decisions)), key=lambda i: -len(decisions[i].prompt_ids))
    at_once = max(1, setting.rows // setting.leaves)
    for start in range(0, len(order), at_once):
        chosen = order[start : start + at_once]
        ids, mask = padded_prompts(setting, [decisions[i] for i in chosen])
        written = setting.plain.generate(ids, attention_mask=mask, generation_config=config)[:, ids.shape[1] :].tolist()
        for row, i in enumerate(chosen):
            answers[i] = written[row * setting.leaves : (row + 1) * setting.leaves]
    return drawn_outcome(setting, decisions, [answers[i] for i in range(len(decisions))])


def continuous(setting: Setting, decisions: Sequence[Decision], seed: int) -> Outcome:
    """transformers' continuous batching with num_return_sequences and its sharing of prompts."""
    prompts = [decision.prompt_ids for decision in decisions]
    done = setting.plain.generate_batch(
        prompts,
        generation_config=generation_config(setting),
        continuous_batching_config=batching_config(setting, prompts, seed=seed),
    )
    answers = [result.generated_tokens for result in done.values()]
    assert len(answers) == len(prompts) * setting.leaves, "continuous batching lost answers"
    n = setting.leaves
    return drawn_outcome(setting, decisions, [answers[i * n : (i + 1) * n] for i in range(len(prompts))])


SIDES: dict[str, Side] = {
    "ttpa": ttpa,
    "ttpa, low": partial(ttpa, **LOW_FLOORS),
    "generate": generate,
    "continuous": continuous,
    "slow twin": slow_twin,
}


def _options(setting: Setting) -> SamplingOptions:
    return SamplingOptions(max_leaves=setting.leaves, max_new_tokens=setting.max_new_tokens, rows=setting.rows)


def generation_config(setting: Setting) -> GenerationConfig:
    """Draws from the full distribution at temperature 1: without top-k, which has a default."""
    return GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        num_return_sequences=setting.leaves,
        max_new_tokens=setting.max_new_tokens,
        eos_token_id=setting.ends,
        pad_token_id=setting.tokenizer.pad_token_id,
    )


def batching_config(setting: Setting, prompts: Sequence[Sequence[int]], *, seed: int) -> ContinuousBatchingConfig:
    """Its own choice on a GPU; on a CPU, where it would take most of the memory, what the prompts and answers need."""
    config = ContinuousBatchingConfig(seed=seed)
    if setting.plain.device.type == "cpu":
        tokens = sum(len(prompt) + setting.leaves * (setting.max_new_tokens + 2 * CB_PAGE) for prompt in prompts)
        config.page_size, config.max_batch_tokens, config.max_requests_per_batch = CB_PAGE, CB_PASS_TOKENS, CB_REQUESTS
        config.num_blocks = 2 * tokens // CB_PAGE  # with less it lets requests wait
    return config


def padded_prompts(setting: Setting, decisions: Sequence[Decision]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask of prompts that end together."""
    prompts = [decision.prompt_ids for decision in decisions]
    width, pad = max(map(len, prompts)), setting.tokenizer.pad_token_id
    ids = [[pad] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=setting.plain.device), torch.tensor(mask, device=setting.plain.device)


def _given(name: str) -> int:
    """How many tokens a path of the slow twin did not write itself, but the one that it was forked from."""
    return int(name.rsplit("/", 1)[1].split(":")[0]) + 1 if "/" in name else 0


def drawn_outcome(setting: Setting, decisions: Sequence[Decision], answers: list[list[list[int]]]) -> Outcome:
    """Of the answers that were drawn for each decision; what stands behind their ends is cut off."""
    stop = Stop(setting.tokenizer, setting.ends)
    pairs = decoded = 0
    for decision, drawn in zip(decisions, answers, strict=True):
        cut = [stop.cut(ids) for ids in drawn]
        decoded += sum(map(len, cut))
        pairs += _pairs(setting, decision, [(f"sample {i}", _decoded(ids, stop)) for i, ids in enumerate(cut)])
    return Outcome(pairs, decoded)


def _decoded(ids: list[int], stop: Stop) -> Decoded:
    """An answer of which nothing but the tokens is known."""
    finish = "length" if stop.at(ids, len(ids) - 1) is None else "stop"
    nothing = [0.0] * len(ids)
    return Decoded(ids, finish, nothing, nothing, nothing, np.zeros((len(ids), 0), np.int64), np.zeros((len(ids), 0)))


def _pairs(setting: Setting, decision: Decision, paths: Sequence[tuple[str, Decoded]]) -> int:
    """Usable pairs of answers and gold: those that differ in what they say, one exact and one not."""
    report = SamplingReport()
    gold = scored(setting.tokenizer, decision, "gold", decision.gold_ids, "stop")
    paths_to_tree(setting.tokenizer, decision, paths, gold=gold, origin={}, report=report)
    return report.pairs


@contextmanager
def _counting(setting: Setting) -> Iterator[list[int]]:
    """The number of tokens of each pass of the model or its twin."""
    sizes: list[int] = []
    hooks = [
        model.get_input_embeddings().register_forward_pre_hook(lambda _, ids: sizes.append(ids[0].numel()))
        for model in (setting.model, setting.plain)
    ]
    try:
        yield sizes
    finally:
        for hook in hooks:
            hook.remove()
