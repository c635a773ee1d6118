"""The answers to many decisions: pages laid out, checked, and all paths of every decision written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ttpa.data.decisions import Decision
from ttpa.errors import InputError
from ttpa.model import TREE_ATTENTION, evaluating, use_tree_attention
from ttpa.sampling.decoded import Decoded
from ttpa.sampling.engine import Engine, Need
from ttpa.sampling.fingerprint import versions
from ttpa.sampling.graph import DecodeStep, GraphEngine
from ttpa.sampling.options import SamplingOptions
from ttpa.sampling.passes import CacheShape, Passes, cache_shape
from ttpa.sampling.report import SamplingReport
from ttpa.sampling.search import Search
from ttpa.sampling.stop import Stop, end_ids

Paths = tuple[int, list[tuple[str, Decoded]]]
"""The index of a decision, and its paths by name."""

CPU_BYTES = 2**30
GPU_SHARE = 0.6
"""How much of a GPU's free memory the cache takes unless it is told otherwise."""


class PathWriter:
    """Writes all paths of decisions with the engine of this package. The pages are laid out once, for as many calls of
    `write` as there are."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, decisions: Sequence[Decision], *, options: SamplingOptions
    ) -> None:
        """For `decisions` and any parts of them; the model is switched to tree attention. Raises InputError, before any
        work, for a decision that the cache cannot hold or whose gold answer ends with a token at which the model does
        not stop, and as `use_tree_attention` does."""
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.stop = Stop(tokenizer, end_ids(model, tokenizer), options.stop)
        for decision in decisions:
            self.stop.check(decision.gold_ids)
        self.origin: dict[str, Any] = {"model": model.config.name_or_path, "engine": "ttpa", "versions": versions()}
        shape, self.num_pages = checked_pages(model, decisions, options=options)
        self.passes = Passes(model, options=options, shape=shape, num_pages=self.num_pages)
        self.step: DecodeStep | None = None
        if model.device.type == "cuda":
            longest = max((len(decision.prompt_ids) for decision in decisions), default=1) + options.max_new_tokens
            with evaluating(model):
                self.step = DecodeStep(self.passes, rows=options.rows, max_positions=longest)

    def write(
        self,
        decisions: Sequence[Decision],
        *,
        report: SamplingReport,
        after_pass: Callable[[int, int], None] | None = None,
    ) -> Iterator[Paths]:
        """For every decision its index and the names and answers of all its paths, trunk before branches, as each is
        done; in which order, and to the bit what, is a function of the arguments alone. Tokens, passes and forks are
        counted in `report`; `after_pass` is told the pages in use and in all; the model is in evaluation mode
        meanwhile."""
        options = self.options
        index = {}
        for i, d in enumerate(decisions):
            capacity = Need.of(len(d.prompt_ids), options).capacity(self.num_pages, options)
            index[Search(d.id, d.prompt_ids, d.tools, self.tokenizer, options, self.stop, capacity)] = i
        engine = Engine(self.passes, options=options, report=report)
        if self.step is not None:
            engine = GraphEngine(self.passes, options=options, report=report, step=self.step)
        pool = self.passes.pool
        with evaluating(self.model):
            try:
                for search in engine.run(index):
                    if search is not None:
                        report.forks += search.forks
                        report.dropped_forks += search.dropped
                        yield index[search], [(path.name, path.decoded) for path in search.paths]
                    elif after_pass is not None:
                        after_pass(pool.num_used, pool.num_pages)
            finally:
                pool.clear()  # the caller may stop early


def checked_pages(
    model: PreTrainedModel, decisions: Sequence[Decision], *, options: SamplingOptions
) -> tuple[CacheShape, int]:
    """What the model keeps of a token, and how many pages there will be; raises as `PathWriter`."""
    if model.config._attn_implementation != TREE_ATTENTION:
        use_tree_attention(model)
    shape = cache_shape(model)
    needs = [Need.of(len(decision.prompt_ids), options) for decision in decisions]
    num_pages = _num_pages(model, shape, needs, options)
    for decision, need in zip(decisions, needs, strict=True):
        _check(decision, need, num_pages, shape.page_bytes(model.dtype), options)
    return shape, num_pages


def _num_pages(model: PreTrainedModel, shape: CacheShape, needs: Sequence[Need], options: SamplingOptions) -> int:
    """As many pages as the memory allows, but not more than can be of use."""
    if options.cache_gb is not None:
        size = options.cache_gb * 2**30
    elif model.device.type == "cuda":
        size = GPU_SHARE * torch.cuda.mem_get_info(model.device)[0]
    else:
        size = CPU_BYTES
    # so that there is a page, where there are no decisions
    most = max(1, sum(need.most(options) for need in needs))
    return min(int(size) // shape.page_bytes(model.dtype), most)


def _check(decision: Decision, need: Need, num_pages: int, page_bytes: int, options: SamplingOptions) -> None:
    """Raise InputError for a tree that there are too few pages for."""
    least = need.least(options)
    what = (
        f"decision {decision.id!r} has a prompt of {len(decision.prompt_ids)} tokens and, with answers of up to "
        f"{options.max_new_tokens}, needs {least} pages of cache"
    )
    if options.max_tree_pages is not None and least > options.max_tree_pages:
        raise InputError(f"{what}, and max_tree_pages is {options.max_tree_pages}: raise it, or lower max_new_tokens")
    if least > num_pages:
        raise InputError(
            f"{what}, and the cache has {num_pages}: give cache_gb of at least {least * page_bytes / 2**30:.3g}, lower "
            "max_new_tokens, or leave it out with max_length"
        )
