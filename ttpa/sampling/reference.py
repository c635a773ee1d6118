"""The slow twin of the sampler: one path after the other, one token a pass, with plain Hugging Face forward passes.

What it writes is the definition of what the sampler writes:

* A tree is sampled level by level: level 0 is the trunk, level d + 1 are the branches of the paths of level d. The
  branches of a level begin once all paths before it are finished, in the order of their parents, of the places of a
  parent by score (under fork_order first by position), and of the alternatives of a place by probability. There are
  levels up to `max_depth`.
* A path is forked at its `fork_places` behind the token that it was given itself; every path has `num_forks` places of
  its own, whether there is room for all of them or not. Under fork_order best the field class of a token is that in
  the finished path, under first that in the path up to this token, which is all that is known while it is written.
* A branch has the beginning of its parent, the other token in the place of the parent's, its log-probability, and the
  parent's other statistics of that place. It ends there if that token ends it or is the last that it may have.
* One more branch is dropped for 'leaves' if the tree has `max_leaves` paths, else for 'tokens' if it would exceed
  `max_tree_tokens`: a branch at position `at` promises `max_new_tokens - at - 1` new tokens, and counts with what it
  promised while its own level is begun, later with what it used; the trunk counts with what it used. Later branches
  that need less are still taken. `max_tree_pages` is none of the twin's concerns, it has no pages.
* The token at position t of the completion is the likeliest one (the lowest id of equal ones) or, at a temperature
  above 0, drawn with the key `(path_key + t) mod 2^63`; a forked token is not drawn. `complete` is that of all draws
  of the completion, those of the shared beginning included.
* Mode release has the paths 'sample 0', 'sample 1', .. and no budget but `num_samples`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel
from ttpa_kernels.next_token.noise import uniform
from ttpa_kernels.next_token.reference import next_token_from

from ttpa.data.decisions import Decision
from ttpa.model import evaluating
from ttpa.sampling.decoded import Decoded
from ttpa.sampling.forks import Place, fork_places, is_candidate, token_fields
from ttpa.sampling.head import draw_key, path_key
from ttpa.sampling.options import MAX_TOP, TOP, SamplingOptions
from ttpa.sampling.stop import Stop


class Step(NamedTuple):
    """One token of a completion and what is known of it, as in `Decoded`."""

    token: int
    logp: float
    entropy: float
    varentropy: float
    top_id_K: np.ndarray
    top_probability_K: np.ndarray
    complete: bool


@dataclass(frozen=True)
class _Path:
    """A finished path, of which the first `known` steps were given to it."""

    name: str
    known: int
    steps: list[Step]
    decoded: Decoded


def reference_paths(
    model: PreTrainedModel,
    tokenizer: Any,
    decision: Decision,
    *,
    options: SamplingOptions,
    ends: Sequence[int],
    dropped: Counter[str] | None = None,
) -> list[tuple[str, Decoded]]:
    """The trunk of a decision and its branches in the order of their levels, or its independent samples, each with its
    name and its whole completion. `ends` are the token ids that end a turn; forks that are not taken are counted in
    `dropped` by reason."""
    dropped = Counter() if dropped is None else dropped
    stop = Stop(tokenizer, ends, options.stop)

    def write(name: str, given: Sequence[Step] = ()) -> _Path:
        key = path_key(options.seed, decision.id, name)
        steps = decode(model, decision.prompt_ids, given=given, key=key, stop=stop, options=options)
        return _Path(name, len(given), steps, whole(steps, stop))

    if options.mode == "release":
        paths = [write(f"sample {i}") for i in range(options.num_samples)]
        return [(path.name, path.decoded) for path in paths]
    level = paths = [write("trunk")]
    for _ in range(options.max_depth):
        used, promised = sum(len(path.steps) - path.known for path in paths), 0
        parents, level = level, []
        for parent in parents:
            places = places_of(tokenizer, parent.decoded, decision.tools, options=options, first=parent.known)
            if options.fork_order == "best":
                places.sort(key=lambda place: -place.score)
            for place in places:
                for token, probability in place.alternatives:
                    needed = options.max_new_tokens - place.at - 1
                    if len(paths) + len(level) >= options.max_leaves:
                        dropped["leaves"] += 1
                    elif used + promised + needed > (options.max_tree_tokens or math.inf):
                        dropped["tokens"] += 1
                    else:
                        promised += needed
                        forked = parent.steps[place.at]._replace(token=token, logp=math.log(probability), complete=True)
                        level.append(write(f"{parent.name}/{place.at}:{token}", [*parent.steps[: place.at], forked]))
        paths = paths + level
    return [(path.name, path.decoded) for path in paths]


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    prompt_ids: Sequence[int],
    *,
    key: int,
    stop: Stop,
    options: SamplingOptions,
    given: Sequence[Step] = (),
) -> list[Step]:
    """The steps of a completion that begins with the `given` ones, to its end or for `options.max_new_tokens` tokens,
    each from the logits of an ordinary forward pass; `key` is that of the path. The model keeps its mode."""
    steps, cache = list(given), None
    feed = [*prompt_ids, *(step.token for step in steps)]
    with evaluating(model):
        while len(steps) < options.max_new_tokens and not _ended(steps, stop):
            ids = torch.tensor([feed], device=model.device)
            output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            steps.append(_next_step(output.logits[:, -1].float(), draw_key(key, len(steps)), options))
            cache, feed = output.past_key_values, [steps[-1].token]
    return steps


def whole(steps: Sequence[Step], stop: Stop) -> Decoded:
    """The completion of so many steps, all that it has."""
    K = len(steps[0].top_id_K) if steps else 0
    return Decoded(
        [step.token for step in steps],
        "stop" if _ended(steps, stop) else "length",
        [step.logp for step in steps],
        [step.entropy for step in steps],
        [step.varentropy for step in steps],
        np.array([step.top_id_K for step in steps], np.int64).reshape(len(steps), K),
        np.array([step.top_probability_K for step in steps], np.float32).reshape(len(steps), K),
        all(step.complete for step in steps),
    )


def _ended(steps: Sequence[Step], stop: Stop) -> bool:
    """Whether the last token ends the completion."""
    return bool(steps) and stop.at([step.token for step in steps], len(steps) - 1) is not None


def _next_step(z_1V: torch.Tensor, key: int, options: SamplingOptions) -> Step:
    """The next token of one row, and its statistics at temperature 1."""
    found = next_token_from(z_1V, num_top=TOP)
    token, complete = int(found.top_id_BK[0, 0]), True
    if options.draw_temperature:
        token, complete = _draw(z_1V / options.draw_temperature, torch.tensor([key], device=z_1V.device), options)
    return Step(
        token,
        min(0.0, float(z_1V[0, token] - found.lse_B[0])),
        float(found.entropy_B[0]),
        float(found.varentropy_B[0]),
        found.top_id_BK[0].cpu().numpy(),
        (found.top_logit_BK[0] - found.lse_B[0]).exp().cpu().numpy(),
        complete,
    )


def _draw(z_1V: torch.Tensor, key_1: torch.Tensor, options: SamplingOptions) -> tuple[int, bool]:
    """The token that a key draws, and whether every token that the filters keep could be drawn."""
    if (options.top_k, options.top_p, options.min_p) == (None, None, None):
        drawn_1 = next_token_from(z_1V, num_top=0, key_B=key_1).draw_B
        assert drawn_1 is not None
        return int(drawn_1), True
    p_V, id_V = z_1V[0].double().softmax(dim=0).sort(descending=True, stable=True)
    keep_V = torch.ones_like(p_V, dtype=torch.bool)
    if options.top_k is not None:
        keep_V[options.top_k :] = False
    if options.top_p is not None:
        keep_V &= p_V.cumsum(dim=0) - p_V < options.top_p
    if options.min_p is not None:
        keep_V &= p_V >= options.min_p * p_V[0]
    upto_K = (p_V * keep_V)[:MAX_TOP].cumsum(dim=0)
    at = int((upto_K <= uniform(key_1, engine="torch") * upto_K[-1]).sum())
    return int(id_V[at]), not keep_V[MAX_TOP:].any()


def places_of(
    tokenizer: Any, path: Decoded, tools: Sequence[dict[str, Any]], *, options: SamplingOptions, first: int = 0
) -> list[Place]:
    """Where a finished path is forked, from position `first` on."""
    fields = list[str | None]()
    if options.fork_order == "best":
        fields = token_fields(tokenizer, path.ids, tools)
    else:
        for at in range(len(path.ids)):
            candidate = is_candidate(path, at, options=options)
            fields.append(token_fields(tokenizer, path.ids[: at + 1], tools)[at] if candidate else None)
    return fork_places(path, fields, options=options, first=first)
