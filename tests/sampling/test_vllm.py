"""The vLLM backend against a fake of vLLM's public classes, as they are in 0.27 to 0.30, that asks a small model."""

from __future__ import annotations

import copy
import dataclasses
import enum
import math
import sys
import types
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hesitant import asking, calling
from hypothesis import given, settings
from hypothesis import strategies as st

from ttpa.data.decisions import decisions
from ttpa.errors import InputError
from ttpa.sampling.assemble import paths_to_tree, scored
from ttpa.sampling.forks import fork_places, is_candidate, token_fields
from ttpa.sampling.options import SamplingOptions
from ttpa.sampling.reference import reference_paths
from ttpa.sampling.report import SamplingReport
from ttpa.sampling.tps import sample_decisions
from ttpa.sampling.vllm import UNDECIDED, VllmWriter, entropy_bounds, load_vllm

BLOCK = 16
WIDE = {"max_new_tokens": 90, "max_leaves": 6, "min_entropy": 0.02, "min_probability": 0.003, "min_ratio": 0.001}


class RequestOutputKind(enum.Enum):
    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass
class SamplingParams:
    """The fields that the backend sets, with vLLM's defaults."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | None = None
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False
    max_tokens: int = 16
    logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE


@dataclass
class Logprob:
    logprob: float
    rank: int


@dataclass
class CompletionOutput:
    index: int
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]]
    finish_reason: str


@dataclass
class RequestOutput:
    request_id: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int
    finished: bool = True


@dataclass
class EngineArgs:
    model: str
    enable_prefix_caching: bool | None = None
    logprobs_mode: str = "raw_logprobs"
    max_logprobs: int = 20
    disable_log_stats: bool = False
    hf_overrides: dict[str, Any] = field(default_factory=dict)
    tensor_parallel_size: int = 1


class LLMEngine:
    """Answers every request when it is added, and hands the answer out after as many steps as it has tokens."""

    def __init__(self, model, tokenizer, *, max_model_len=4096, cut=None, reason=None):
        """`cut` ends requests after so many tokens, `reason` is a finish_reason to give instead."""
        self.model, self.tokenizer, self.cut, self.reason = model, tokenizer, cut, reason
        self.model_config = types.SimpleNamespace(
            model="fake", max_model_len=max_model_len, get_vocab_size=lambda: len(tokenizer)
        )
        self.waiting: dict[str, RequestOutput] = {}
        self.added: list[tuple[list[int], SamplingParams, int]] = []  # the prompt, what was asked, the step it came at
        self.aborted: list[str] = []
        self.steps = self.most = 0
        self.cached: set[tuple[int, ...]] = set()

    @classmethod
    def from_engine_args(cls, arguments):
        return arguments

    def add_request(self, request_id, prompt, params):
        assert prompt["type"] == "token" and request_id not in self.waiting
        assert len(prompt["prompt_token_ids"]) + params.max_tokens <= self.model_config.max_model_len
        assert params.ignore_eos and params.output_kind is RequestOutputKind.FINAL_ONLY and params.max_tokens > 0
        prompt_ids = prompt["prompt_token_ids"]
        self.added.append((prompt_ids, params, self.steps))
        ends = [n for n in range(BLOCK, len(prompt_ids), BLOCK) if tuple(prompt_ids[:n]) in self.cached]
        output = self.write(prompt_ids, params)
        self.waiting[request_id] = RequestOutput(request_id, prompt_ids, [output], max(ends, default=0))
        self.most = max(self.most, len(self.waiting))

    def step(self):
        self.steps += 1
        done = []
        for name, output in list(self.waiting.items()):
            left = len(output.outputs[0].token_ids) - (self.steps - self.started(output))
            if left <= 0:
                done.append(self.waiting.pop(name))
                ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
                self.cached |= {tuple(ids[:n]) for n in range(BLOCK, len(ids), BLOCK)}
        return done

    def started(self, output):
        return next(step for prompt_ids, _, step in self.added if prompt_ids is output.prompt_token_ids)

    def abort_request(self, request_ids):
        self.aborted += [name for name in request_ids if self.waiting.pop(name, None)]

    @torch.no_grad()
    def write(self, prompt_ids, params):
        generator = None if params.seed is None else torch.Generator().manual_seed(params.seed)
        ids, known, cache, feed, reason = [], [], None, prompt_ids, "length"
        while len(ids) < params.max_tokens:
            out = self.model(input_ids=torch.tensor([feed]), past_key_values=cache, use_cache=True)
            cache, logits = out.past_key_values, out.logits[0, -1].float()
            if params.temperature:
                noise = torch.empty_like(logits).exponential_(generator=generator)
                token = int(((logits / params.temperature).softmax(-1) / noise).argmax())
            else:
                token = int(logits.argmax())
            logp = logits.log_softmax(-1)
            values, indices = (top.tolist() for top in logp.topk(params.logprobs))
            # as vLLM has it: the token that was taken stands first, and makes one more where it is not among the top
            at = {token: Logprob(float(logp[token]), int((logp >= logp[token]).sum()))}
            at |= {i: Logprob(p, n + 1) for n, (i, p) in enumerate(zip(indices, values, strict=True))}
            ids, known, feed = [*ids, token], [*known, at], [token]
            text = self.tokenizer.decode(ids, skip_special_tokens=params.skip_special_tokens)
            if token in params.stop_token_ids or (params.stop and params.detokenize and params.stop in text):
                reason = "stop"
                break
            if len(ids) == self.cut:
                reason = "stop"
                break
        return CompletionOutput(0, ids, known, self.reason or reason)


@pytest.fixture(autouse=True)
def vllm(monkeypatch):
    """The fake in the place of the package."""
    package, inputs, sampling = (types.ModuleType(f"vllm{name}") for name in ("", ".inputs", ".sampling_params"))
    package.__version__ = "0.30.0"
    package.inputs, package.sampling_params = inputs, sampling
    package.SamplingParams, package.EngineArgs, package.LLMEngine = SamplingParams, EngineArgs, LLMEngine
    inputs.tokens_input = lambda prompt_token_ids: {"type": "token", "prompt_token_ids": prompt_token_ids}
    sampling.RequestOutputKind = RequestOutputKind
    for module in (package, inputs, sampling):
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.fixture(scope="module")
def right(tokenizer):
    return decisions(asking("right", "Rome"), tokenizer)[0]


@pytest.fixture(scope="module")
def other(tokenizer):
    return decisions(asking("wrong", "Rome", calling("time")), tokenizer)[0]


@pytest.fixture(scope="module")
def unsure(hesitant):
    """Writes what `hesitant` writes, less sure of every token."""
    model = copy.deepcopy(hesitant)
    with torch.no_grad():
        model.model.norm.weight.mul_(0.7)
    return model


@pytest.fixture
def engine(unsure, tokenizer, right):
    """With a context for a whole answer and no more."""
    return LLMEngine(unsure, tokenizer, max_model_len=len(right.prompt_ids) + WIDE["max_new_tokens"])


def write(engine, wanted, options, report=None, **given):
    """The paths of all decisions, in the order of the decisions."""
    writer = VllmWriter(engine, engine.tokenizer, wanted, ends=[engine.tokenizer.eos_token_id], options=options)
    found = writer.write(wanted, report=SamplingReport() if report is None else report, **given)
    return [paths for _, paths in sorted(found, key=lambda pair: pair[0])]


def named(paths):
    return [(name, decoded.ids, decoded.finish) for name, decoded in paths]


def options(**given):
    return SamplingOptions(**(WIDE | given))


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"max_depth": 2, "num_forks": 2},
        {"max_tree_tokens": 160, "max_new_tokens": 60},
        {"stop": '"days"', "rule": "change", "min_entropy": 0.2},
        {"rule": "surprise", "alternatives": 3, "max_leaves": 4},
    ],
    ids=str,
)
def test_trees_are_those_of_the_slow_sampler(given, engine, right, unsure, tokenizer):
    asked = options(**given)
    ends, dropped, report = [tokenizer.eos_token_id], Counter[str](), SamplingReport()
    expected = reference_paths(unsure, tokenizer, right, options=asked, ends=ends, dropped=dropped)
    (paths,) = write(engine, [right], asked, report)
    assert len(paths) > 1 and named(paths) == named(expected)
    assert {reason: n for reason, n in report.dropped_forks.items() if reason != UNDECIDED} == dropped
    for (_, ours), (_, theirs) in zip(paths, expected, strict=True):
        assert ours.top_ids.dtype == theirs.top_ids.dtype and ours.top_probabilities.dtype == np.float32
        np.testing.assert_array_equal(ours.top_ids[:, :5], theirs.top_ids[:, :5])
        np.testing.assert_allclose(ours.top_probabilities, theirs.top_probabilities, atol=1e-5)
        np.testing.assert_allclose(ours.logps, theirs.logps, atol=1e-4)
        assert ours.complete and all(math.isnan(x) for x in ours.varentropy)
        assert all(least <= exact + 1e-5 for least, exact in zip(ours.entropy, theirs.entropy, strict=True))
    gold = scored(tokenizer, right, "gold", right.gold_ids, "stop")
    theirs = paths_to_tree(tokenizer, right, expected, gold=gold, origin={}, report=SamplingReport())
    writer = VllmWriter(engine, tokenizer, [right], ends=ends, options=asked)
    ((_, ours),) = sample_decisions(writer, [right], report=SamplingReport())
    if asked.stop is not None:
        assert ours is None, "the gold answer is cut off too"
        return
    shapes = [tree and ([(n.parent, n.ids) for n in tree.nodes], tree.leaves, tree.pairs) for tree in (ours, theirs)]
    assert shapes[0] == shapes[1] and ours.origin["engine"] == "vllm 0.30.0"


def full(logits):
    """The log-probabilities of whole distributions, the likeliest token first, and their entropies."""
    logp = torch.tensor(logits, dtype=torch.float64).log_softmax(-1).sort(dim=-1, descending=True).values
    return logp.numpy(), -(logp.exp() * logp).sum(-1).numpy()


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(-30, 30), min_size=2, max_size=40),
    st.integers(1, 40),
    st.sampled_from([np.float64, np.float32]),
)
def test_the_entropy_lies_between_the_bounds(logits, top, dtype):
    logp, entropy = full([logits])
    least, most = entropy_bounds(logp[:, :top].astype(dtype), vocabulary=len(logits))
    assert least <= entropy + 1e-5 and entropy <= most + 1e-5


def test_bounds_meet_where_nothing_is_unknown():
    logp, entropy = full(np.random.default_rng(0).normal(0, 3, (50, 30)))
    for top, atol in ((30, 1e-9), (29, 1e-9)):  # a tail of one token is known as well
        for bound in entropy_bounds(logp[:, :top], vocabulary=30):
            np.testing.assert_allclose(bound, entropy, atol=atol)
    certain = np.array([[0.0, -math.inf, -math.inf]])
    assert [float(bound[0]) for bound in entropy_bounds(certain, vocabulary=1000)] == [0.0, 0.0]


def test_bounds_are_reached():
    """By a tail that is as even as it can be, and by one that is in as few tokens as it can be."""
    head = [0.4, 0.1]
    for tail, which in (([0.5 / 98] * 98, 1), ([0.1] * 5 + [0.0] * 93, 0)):
        p = np.array(head + tail)
        entropy = -(p[p > 0] * np.log(p[p > 0])).sum()
        bound = entropy_bounds(np.log([head]), vocabulary=100)[which]
        np.testing.assert_allclose(bound, [entropy], atol=1e-12)


def test_the_upper_bound_holds_for_what_is_written(engine, right, unsure, tokenizer):
    """The recorded entropies are lower bounds; with what vLLM tells the upper ones lie above the true entropies."""
    asked = options(num_forks=0)
    ((_, exact),) = reference_paths(unsure, tokenizer, right, options=asked, ends=[tokenizer.eos_token_id])
    (((_, ours),),) = write(engine, [right], asked)
    least, most = entropy_bounds(np.log(ours.top_probabilities), vocabulary=len(tokenizer))
    np.testing.assert_allclose(ours.entropy, least, atol=1e-5)
    assert (np.array(exact.entropy) <= most + 1e-5).all() and max(most - least) > 0.01


def test_a_place_whose_entropy_may_be_above_the_floor_is_counted_and_not_forked(engine, right, tokenizer):
    every = {"num_forks": 99, "alternatives": 1, "max_leaves": 2}
    lowest = options(min_entropy=0.0, **every)
    (_, trunk), _ = write(engine, [right], lowest)[0]
    places = [place.at for place in fork_places(trunk, token_fields(tokenizer, trunk.ids, right.tools), options=lowest)]
    outside = [at for at in range(len(trunk.ids)) if at not in places and is_candidate(trunk, at, options=lowest)]
    least, most = entropy_bounds(np.log(trunk.top_probabilities), vocabulary=len(tokenizer))
    widest, no_place = (max(group, key=lambda at: most[at] - least[at]) for group in (places, outside))
    middle = (least + most) / 2
    for floor in (least[widest] - 1e-4, middle[widest], most[widest] + 1e-4, middle[no_place]):
        report = SamplingReport()
        (_, (name, _)) = write(engine, [right], options(min_entropy=float(floor), **every), report)[0]
        forked = [at for at in places if least[at] >= floor]
        assert int(name.removeprefix("trunk/").split(":")[0]) in forked
        assert report.dropped_forks["leaves"] == len(forked) - 1
        assert report.dropped_forks[UNDECIDED] == sum(least[at] < floor <= most[at] for at in places)


def test_a_fork_continues_what_was_written_as_soon_as_the_trunk_ends(engine, right, other, tokenizer):
    report, asked = SamplingReport(), options(rows=1, num_forks=2)
    found = write(engine, [right, other], asked, report)
    prompts = [prompt_ids for prompt_ids, _, _ in engine.added]
    trunk, *branches = found[0]
    assert prompts[0] == right.prompt_ids and prompts[len(found[0])] == other.prompt_ids, "one tree after the other"
    assert engine.added[1][2] == len(trunk[1].ids), "at the step at which the trunk ended"
    for (name, _), prompt_ids in zip(branches, prompts[1:], strict=False):
        at, token = map(int, name.removeprefix("trunk/").split(":"))
        assert prompt_ids == [*right.prompt_ids, *trunk[1].ids[:at], token]
    written = sum(
        len(decoded.ids) - len(prompt_ids) + len(decision.prompt_ids)
        for decision, paths, first in ((right, found[0], 0), (other, found[1], len(found[0])))
        for (_, decoded), prompt_ids in zip(paths, prompts[first:], strict=False)
    )
    assert report.decoded_tokens == written and report.passes == engine.steps
    assert report.prefilled_tokens + report.shared_prompt_tokens == sum(map(len, prompts))
    assert report.prefilled_tokens <= len(right.prompt_ids) + (len(prompts) - 1) * BLOCK, "one block for every fork"


@pytest.mark.parametrize("given", [{"temperature": 0.7, "top_p": 0.9}, {"mode": "release", "num_samples": 4}], ids=str)
def test_draws_depend_on_seed_tree_path_and_position_alone(given, engine, right, other):
    given = given | {"max_new_tokens": 50, "max_leaves": 4}
    first, second = write(engine, [right, other], options(seed=3, **given))
    assert [named(second), named(first)] == [
        named(p) for p in write(engine, [other, right], options(seed=3, rows=1, **given))
    ]
    assert named(first) != named(write(engine, [right], options(seed=4, **given))[0])
    seeds = [params.seed for _, params, _ in engine.added[: len(first) + len(second)]]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)
    (params,) = {(params.temperature, params.top_p, params.top_k, params.min_p) for _, params, _ in engine.added}
    assert params == ((0.7, 0.9, 0, 0.0) if "temperature" in given else (1.0, 1.0, 0, 0.0))


def test_independent_samples_have_their_names_and_no_forks(engine, right):
    report = SamplingReport()
    (paths,) = write(engine, [right], options(mode="release", num_samples=3, min_entropy=0.25), report)
    assert [name for name, _ in paths] == ["sample 0", "sample 1", "sample 2"]
    assert not report.forks and not report.dropped_forks
    assert len({tuple(decoded.ids) for _, decoded in paths}) > 1


def test_a_stop_text_that_begins_before_a_fork_ends_the_answer(engine, right, unsure, tokenizer):
    """vLLM looks for it in what one request writes; here the request writes only the end of it."""
    asked = options(stop='"Oslo', num_forks=64, max_leaves=64, min_entropy=0.3)
    (paths,) = write(engine, [right], asked)
    texts = [tokenizer.decode(decoded.ids) for _, decoded in paths]
    assert sum(text.endswith('"Oslo') for text in texts) >= 1 and all('"Oslo"' not in text for text in texts)
    expected = reference_paths(unsure, tokenizer, right, options=asked, ends=[tokenizer.eos_token_id])
    assert sorted(named(paths)) == sorted(named(expected)), "places are ranked by bounds, so the order may differ"


def test_vllm_is_told_of_the_stop_text(engine, right):
    report = SamplingReport()
    (((_, decoded),),) = write(engine, [right], options(stop='"days"', num_forks=0), report)
    assert decoded.finish == "stop" and engine.steps == len(decoded.ids) == report.decoded_tokens


def test_a_request_that_ends_before_the_answer_does_is_continued(hesitant, tokenizer, right):
    whole, parts = (write(LLMEngine(hesitant, tokenizer, cut=cut), [right], options()) for cut in (None, 7))
    assert [named(paths) for paths in parts] == [named(paths) for paths in whole]
    for (_, ours), (_, theirs) in zip(parts[0], whole[0], strict=True):
        assert ours.top_ids.shape == theirs.top_ids.shape == (len(ours.ids), 20)
        np.testing.assert_allclose(ours.entropy, theirs.entropy, atol=1e-5)


def test_a_run_that_is_given_up_leaves_nothing_in_vllm(engine, right, other):
    def interrupt(pages_used, pages):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(engine, [right, other], options(rows=2), after_pass=interrupt)
    assert len(engine.aborted) == 2 and not engine.waiting


def test_a_request_that_fails_is_an_error(hesitant, tokenizer, right):
    with pytest.raises(RuntimeError, match="'trunk' of 'right:1' with 'error'"):
        write(LLMEngine(hesitant, tokenizer, reason="error"), [right], options())


def test_a_prompt_that_is_too_long_is_refused_before_any_work(hesitant, tokenizer, right, other):
    long = dataclasses.replace(other, prompt_ids=other.prompt_ids * 3)
    engine = LLMEngine(hesitant, tokenizer, max_model_len=2 * len(other.prompt_ids))
    with pytest.raises(InputError, match=r"decision 'wrong:1'.*max_model_len"):
        write(engine, [right, long], options())
    assert engine.added == []


@pytest.mark.parametrize(
    "given",
    [
        {"fork_order": "first"},
        {"rule": "varentropy"},
        {"max_tree_pages": 100},
        {"cache_gb": 1.0},
        {"temperature": 0.001},
        {"temperature": 2.5},
    ],
    ids=str,
)
def test_what_vllm_cannot_do_is_refused_by_name(given, engine, right):
    (name,) = given
    with pytest.raises(InputError, match=f"^{name}: .* cannot be had with vLLM"):
        write(engine, [right], options(**given))
    assert engine.added == []


def test_after_every_step_the_caller_is_told(engine, right):
    calls = []
    write(engine, [right], options(num_forks=0), after_pass=lambda *pages: calls.append((engine.steps, pages)))
    assert calls == [(step, (0, 0)) for step in range(1, engine.steps + 1)]


def test_the_engine_is_loaded_with_what_the_backend_needs():
    arguments = load_vllm("some/model", tensor_parallel_size=2)
    assert (arguments.model, arguments.tensor_parallel_size, arguments.enable_prefix_caching) == ("some/model", 2, True)
    assert (arguments.logprobs_mode, arguments.max_logprobs) == ("raw_logprobs", 20)
    assert arguments.hf_overrides == {"head_dtype": "float32"}


def test_without_vllm_the_message_says_what_to_install(monkeypatch, engine, right):
    monkeypatch.setitem(sys.modules, "vllm", None)
    for attempt in (lambda: load_vllm("some/model"), lambda: write(engine, [right], options())):
        with pytest.raises(InputError, match=r"install ttpa\[vllm\]"):
            attempt()
