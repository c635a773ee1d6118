"""vLLM in the place of the engine: the same searches, the passes made by vLLM.

vLLM cannot fork a running request, so a fork is a new one whose prompt is the old prompt and what was written before
the fork; its prefix cache finds all of that but the last block. It tells the likeliest tokens of a position and not the
entropy, which is therefore known in bounds only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np

from ttpa.data.decisions import Decision
from ttpa.errors import InputError
from ttpa.sampling.decoded import Decoded, Written
from ttpa.sampling.fingerprint import versions
from ttpa.sampling.forks import is_candidate, token_fields
from ttpa.sampling.head import draw_key
from ttpa.sampling.options import TOP, SamplingOptions
from ttpa.sampling.paths import Paths
from ttpa.sampling.report import SamplingReport
from ttpa.sampling.search import Path, Search
from ttpa.sampling.stop import Stop

UNDECIDED = "entropy undecided"
"""Why a place is not forked whose entropy may be above the floor and may be below."""


def load_vllm(model: str, **settings: Any) -> Any:
    """A `vllm.LLMEngine` for the model of a folder or a hub name, as `VllmWriter` needs it: with a prefix cache,
    a head in fp32, and log-probabilities of the full distribution. `settings` are further arguments of
    `vllm.EngineArgs`, such as `tensor_parallel_size`. Raises InputError where vLLM is not installed."""
    vllm = _vllm()
    arguments = vllm.EngineArgs(
        model=model,
        enable_prefix_caching=True,
        logprobs_mode="raw_logprobs",
        max_logprobs=TOP,
        disable_log_stats=True,
        hf_overrides={"head_dtype": "float32"},  # else all numbers are those of logits that were rounded to bf16
        **settings,
    )
    return vllm.LLMEngine.from_engine_args(arguments)


class VllmWriter:
    """Writes all paths of decisions with vLLM, in the place of `ttpa.sampling.paths.PathWriter`.

    In `Decoded.entropy` stands the lower bound of `entropy_bounds`, and it decides what is forked; candidates by the
    upper bound alone are counted among `dropped_forks` as `UNDECIDED`. `varentropy` is nan. A draw depends on seed,
    tree, path and position, but is not the draw of the other engine, and vLLM's batches may change the last bits of all
    numbers. `options.draft` plays no part.
    """

    def __init__(
        self,
        engine: Any,
        tokenizer: Any,
        decisions: Sequence[Decision],
        *,
        ends: Sequence[int],
        options: SamplingOptions,
    ) -> None:
        """For `decisions` and any parts of them, with an engine from `load_vllm` and the token ids that end a turn.
        Raises InputError, before any work, for options that vLLM cannot do, for a prompt that leaves no room for an
        answer in the context of the model, and where vLLM is not installed."""
        for name, refused, reason in (
            ("fork_order", options.fork_order == "first", "forks a path that is still being written"),
            ("rule", options.rule == "varentropy", "needs the whole distribution"),
            ("max_tree_pages", options.max_tree_pages is not None, "is about pages, which vLLM hands out by itself"),
            ("cache_gb", options.cache_gb is not None, "is gpu_memory_utilization of vllm.EngineArgs"),
            ("temperature", not _is_served(options.draw_temperature), "has to be 0 or from 0.01 to 2"),
        ):
            if refused:
                value = getattr(options, name)
                raise InputError(f"{name}: {value} cannot be had with vLLM: it {reason}; change it, or leave vLLM out")
        longest = engine.model_config.max_model_len - options.max_new_tokens
        for decision in decisions:
            if len(decision.prompt_ids) > longest:
                raise InputError(
                    f"decision {decision.id!r}: its prompt has {len(decision.prompt_ids)} tokens, and vLLM was loaded "
                    f"for {longest} and the answer: lower max_length or max_new_tokens, or raise max_model_len"
                )
        self.vllm, self.engine, self.tokenizer, self.options = _vllm(), engine, tokenizer, options
        self.stop = Stop(tokenizer, ends, options.stop)
        for decision in decisions:
            self.stop.check(decision.gold_ids)
        engine_name = f"vllm {self.vllm.__version__}"
        self.origin: dict[str, Any] = {
            "model": engine.model_config.model,
            "engine": engine_name,
            "versions": versions(),
        }

    def write(
        self,
        decisions: Sequence[Decision],
        *,
        report: SamplingReport,
        after_pass: Callable[[int, int], None] | None = None,
    ) -> Iterator[Paths]:
        """As `PathWriter.write`. `prefilled_tokens` and `shared_prompt_tokens` count what forks go on from too,
        `passes` are vLLM's steps; `after_pass` is told 0 pages of 0, as vLLM does not tell."""
        index = {
            Search(d.id, d.prompt_ids, d.tools, self.tokenizer, self.options, self.stop, self.options.max_leaves): i
            for i, d in enumerate(decisions)
        }
        requests = _Requests(self, report)
        try:
            for search in requests.run(index):
                if search is not None:
                    report.forks += search.forks
                    report.dropped_forks += search.dropped
                    yield index[search], [(path.name, path.decoded) for path in search.paths]
                elif after_pass is not None:
                    after_pass(0, 0)
        finally:
            requests.abort()


class _Requests:
    """The requests that vLLM works on, each the rest of a path."""

    def __init__(self, writer: VllmWriter, report: SamplingReport) -> None:
        self.vllm, self.engine, self.options, self.report = writer.vllm, writer.engine, writer.options, report
        self.paths: dict[str, Path] = {}
        self.names = count()

    def run(self, searches: Iterable[Search]) -> Iterator[Search | None]:
        """Begin the searches in their order, and yield each once it is done, and None after every step."""
        coming = deque(searches)
        while coming or self.paths:
            # What waits in vLLM's queue waits before the forks, and pushes what they go on from out of its cache.
            while coming and len(self.paths) < self.options.rows:
                self._submit(coming.popleft().start())
            yield from self._step()
            yield None

    def abort(self) -> None:
        """Leave nothing in vLLM of a run that was given up."""
        self.engine.abort_request(list(self.paths))

    def _submit(self, paths: Iterable[Path]) -> None:
        """Ask for the rest of every path that is not finished."""
        for path in paths:
            if path.finish is None:
                name = str(next(self.names))
                prompt_ids = [*path.search.prompt_ids, *path.decoded.ids]
                self.paths[name] = path
                self.engine.add_request(name, self.vllm.inputs.tokens_input(prompt_ids), self._parameters(path))

    def _parameters(self, path: Path) -> Any:
        """The `vllm.SamplingParams` of the rest of a path."""
        options, stop, length = self.options, path.search.stop, len(path.decoded.ids)
        temperature = options.draw_temperature
        return self.vllm.SamplingParams(
            temperature=temperature,
            top_k=options.top_k or 0,
            top_p=options.top_p or 1.0,
            min_p=options.min_p or 0.0,
            seed=draw_key(path.key, length) if temperature else None,
            max_tokens=options.max_new_tokens - length,
            logprobs=TOP,
            ignore_eos=True,  # it ends at `stop.ends` and nothing else
            stop_token_ids=stop.ends,
            stop=stop.text,
            detokenize=stop.text is not None,
            skip_special_tokens=False,
            output_kind=self.vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
        )

    def _step(self) -> Iterator[Search]:
        """Let vLLM go on, and take what is finished."""
        outputs = self.engine.step()
        self.report.passes += 1
        for output in outputs:
            path = self.paths.pop(output.request_id)
            (answer,) = output.outputs
            if answer.finish_reason not in ("stop", "length"):
                raise RuntimeError(f"vLLM ended {path.name!r} of {path.search.id!r} with {answer.finish_reason!r}")
            decoded, upper = _decoded(answer, vocabulary=self.engine.model_config.get_vocab_size())
            before, cached = len(path.decoded.ids), output.num_cached_tokens or 0
            path.add(Written(decoded, np.ones(len(decoded.ids), dtype=bool)), len(decoded.ids))
            self.report.decoded_tokens += len(path.decoded.ids) - before
            self.report.prefilled_tokens += len(output.prompt_token_ids) - cached
            self.report.shared_prompt_tokens += cached
            self._count_undecided(path, before, upper)
            # vLLM sees a stop text in what one request writes, `Stop` in the whole answer: they may differ.
            self._submit([path] if path.finish is None else path.search.finished())
            if path.search.done:
                yield path.search

    def _count_undecided(self, path: Path, first: int, upper: list[float]) -> None:
        """Count the places from `first` on that would be forked if their entropies were the upper bounds."""
        search, own = path.search, path.decoded
        if not search.holds(path):
            return
        most = replace(own, entropy=own.entropy.copy())
        open_places = []
        for at in range(first, len(own.ids)):
            most.entropy[at] = upper[at - first]
            if is_candidate(most, at, options=self.options) and not is_candidate(own, at, options=self.options):
                open_places.append(at)
            most.entropy[at] = own.entropy[at]
        fields = token_fields(search.tokenizer, own.ids, search.tools) if open_places else []
        search.dropped.update(UNDECIDED for at in open_places if fields[at] is not None)


def entropy_bounds(logp_NK: np.ndarray, *, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """The least and the greatest entropy (nats) `[N]` of distributions over `vocabulary` tokens of which the log-
    probabilities `[N, K]` of the K likeliest tokens are known, the likeliest first, in nats.

    With `A = sum_K -p log p` and the tail `r = 1 - sum_K p` over V - K tokens, none likelier than p_K:
    `A - r log min(p_K, r) <= H <= A - r log(r / (V - K))`. On the left each token of the tail has
    `-log q >= -log min(p_K, r)`; on the right the tail is uniform, as concavity has it. They are equal where r = 0 and
    where K = V. As r is at most (V - K) p_K, more than that is rounding and is left out. The bounds are our own.
    """
    logp_NK = np.maximum(np.asarray(logp_NK, dtype=np.float64), -1e4)  # 0 log 0 is 0
    p_NK = np.exp(logp_NK)
    known_N = -(p_NK * logp_NK).sum(axis=1)
    rest = vocabulary - p_NK.shape[1]
    tail_N = np.clip(1 - p_NK.sum(axis=1), 0, rest * p_NK[:, -1])
    log_tail_N = np.log(np.where(tail_N > 0, tail_N, 1))
    least_N = known_N - tail_N * np.minimum(logp_NK[:, -1], log_tail_N)
    return least_N, known_N - tail_N * (log_tail_N - np.log(max(rest, 1)))


def _decoded(answer: Any, *, vocabulary: int) -> tuple[Decoded, list[float]]:
    """What a `vllm.CompletionOutput` says of its tokens, with the lower bounds of the entropy; and the upper bounds."""
    ids = list(answer.token_ids)
    known = list(answer.logprobs)  # for each position at least the likeliest tokens and the one that was taken
    top = min(TOP, vocabulary)
    ranked = [sorted(((-entry.logprob, token) for token, entry in at.items()))[:top] for at in known]
    logp_NK = np.array([[-cost for cost, _ in row] for row in ranked])
    least_N, most_N = entropy_bounds(logp_NK, vocabulary=vocabulary)
    decoded = Decoded(
        ids,
        "length",
        [at[token].logprob for token, at in zip(ids, known, strict=True)],
        least_N.tolist(),
        [float("nan")] * len(ids),
        np.array([[token for _, token in row] for row in ranked], dtype=np.int64),
        np.exp(logp_NK).astype(np.float32),
    )
    return decoded, most_N.tolist()


def _is_served(temperature: float) -> bool:
    """Whether vLLM draws at a temperature: it raises what is below 0.01, and refuses what is above 2."""
    return temperature == 0 or 0.01 <= temperature <= 2


def _vllm() -> Any:
    """The package."""
    try:
        import vllm
        import vllm.inputs
        import vllm.sampling_params
    except ImportError as error:
        raise InputError(
            f"vLLM cannot be imported ({error}): install ttpa[vllm], in an environment of its own where its torch and "
            "transformers do not suit the rest"
        ) from error
    return vllm
