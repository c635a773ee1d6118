"""Decoded tokens a second on a GPU beside what its memory allows, for a model of the shape of Qwen2.5-1.5B in bf16.

16 answers are drawn for each prompt of 1,536 tokens, with 64 and with 256 rows. The rate is that of the passes in which
every row writes a token, some passes after the first such one, so that neither prompts, nor compiling, nor scoring, nor
rows that ended count. A pass has to read the weights and, once for each prompt, its keys and values, and the answers'
own: the floor is the time that a copy of so many bytes takes in the same process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from bench.measure import explain
from bench.prompts import make_prompts
from bench.samplers import Setting, batching_config, generation_config, padded_prompts
from bench.widened import QWEN_15B, widened
from ttpa.data.decisions import Decision
from ttpa.embedded import MODEL_DIR
from ttpa.sampling import Progress, SamplingOptions, SamplingReport, sample_decisions
from ttpa.sampling.paths import PathWriter

PROMPT, LEAVES, NEW_TOKENS = 1536, 16, 24
ROWS = (64, 256)
SKIPPED = 4  # full passes before those that count
COPIED = 2**30  # bytes
SECONDS = 40  # nothing begins after that

Mark = tuple[float, int]  # a time, and the tokens written by then


def rate(marks: Sequence[Mark], rows: int) -> float:
    """Tokens a second over the passes in which all rows wrote a token. Raises RuntimeError for less than two."""
    full = [i for i in range(1, len(marks)) if marks[i][1] - marks[i - 1][1] == rows][SKIPPED:]
    run = [i for n, i in enumerate(full) if i == full[0] + n]  # without a gap
    if len(run) < 2:
        raise RuntimeError(f"too few passes wrote {rows} tokens: {[count for _, count in marks]}")
    (start, before), (end, after) = marks[run[0]], marks[run[-1]]
    return (after - before) / (end - start)


def ttpa(setting: Setting, decisions: Sequence[Decision]) -> list[Mark]:
    """After every pass."""
    marks: list[Mark] = []

    def note(progress: Progress) -> None:
        marks.append((time.perf_counter(), progress.decoded_tokens))

    options = SamplingOptions(
        mode="release", num_samples=setting.leaves, max_new_tokens=setting.max_new_tokens, rows=setting.rows
    )
    writer = PathWriter(setting.model, setting.tokenizer, decisions, options=options)
    for _ in sample_decisions(writer, decisions, report=SamplingReport(), progress=note):
        pass
    return marks


def generate(setting: Setting, decisions: Sequence[Decision]) -> list[Mark]:
    """After every step; ended rows go on being padded and no longer count."""
    times: list[float] = []

    class Note(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            if input_ids.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    ids, mask = padded_prompts(setting, decisions)
    config = generation_config(setting)
    written_BN = setting.plain.generate(
        ids, attention_mask=mask, generation_config=config, stopping_criteria=StoppingCriteriaList([Note()])
    )[:, ids.shape[1] :]
    ends = torch.isin(written_BN, torch.tensor(setting.ends, device=written_BN.device))
    alive = (ends.cumsum(dim=1) - ends.long() == 0).sum(dim=0).cumsum(dim=0).tolist()
    return list(zip(times, alive, strict=True))


def continuous(setting: Setting, decisions: Sequence[Decision]) -> list[Mark]:
    """After every token that came at a time of its own; those of one pass count as one."""
    prompts = [decision.prompt_ids for decision in decisions]
    done = setting.plain.generate_batch(
        prompts,
        generation_config=generation_config(setting),
        continuous_batching_config=batching_config(setting, prompts, seed=0),
        record_timestamps=True,
    )
    times = sorted(t for result in done.values() for t in result.timestamps)
    gap = (times[-1] - times[0]) / (10 * setting.max_new_tokens)
    marks: list[Mark] = []
    for count, t in enumerate(times, start=1):
        if marks and t - marks[-1][0] < gap:
            marks[-1] = (marks[-1][0], count)
        else:
            marks.append((t, count))
    return marks


SIDES = {"ttpa": ttpa, "generate": generate, "continuous": continuous}


def bandwidth(device: torch.device) -> float:
    """Bytes a second that a copy reads and writes, the best of ten."""
    source = torch.ones(COPIED, dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(10):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        target.copy_(source)
        after.record()
        after.synchronize()
        best = min(best, before.elapsed_time(after) / 1e3)
    return 2 * COPIED / best


def pass_bytes(model: PreTrainedModel, *, rows: int, prompts: int, prompt: int, own: float) -> float:
    """What a pass has to read: all weights once (tied embeddings are the head), the keys and values of `prompts`
    prompts, and those of `own` tokens for each row."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    config = model.config
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    return weights + token * (prompts * prompt + rows * own)


def main(save: Callable[[dict[str, Any]], None]) -> None:
    """Measure all sides, ours first; `save` takes each record at once."""
    end, device = time.perf_counter() + SECONDS, torch.device("cuda")
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    small: Any = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.bfloat16)
    small.to(device)
    setting = Setting.of(widened(small, QWEN_15B), tokenizer, leaves=LEAVES, max_new_tokens=NEW_TOKENS)
    decisions = make_prompts(
        tokenizer, max(ROWS) // LEAVES, length=PROMPT, workload="own", vocab_size=QWEN_15B.vocab_size
    )
    copied = bandwidth(device)
    print(f"a copy moves {copied / 1e12:.2f} TB/s\n{'side':10} {'rows':>5} {'tokens/s':>9} {'floor':>9} {'share':>6}")
    for side, measured in SIDES.items():
        for rows in ROWS:
            prompts = rows // LEAVES
            needed = pass_bytes(setting.model, rows=rows, prompts=prompts, prompt=PROMPT, own=NEW_TOKENS / 2)
            floor = rows * copied / needed
            entry: dict[str, Any] = {
                "side": side,
                "rows": rows,
                "prompt": PROMPT,
                "bandwidth": copied,
                "floor_tokens_per_second": floor,
            }
            if time.perf_counter() > end:
                entry["failed"] = f"not begun: {SECONDS} s were over"
            else:
                try:
                    marks = measured(replace(setting, rows=rows), decisions[:prompts])
                    entry |= {"marks": marks, "tokens_per_second": rate(marks, rows)}
                except Exception as error:  # a peer without its packages, or out of memory: the others go on
                    entry["failed"] = explain(error)
                torch.cuda.empty_cache()
            save(entry)
            if "failed" in entry:
                print(f"{side:10} {rows:5} {entry['failed'].splitlines()[-1]}", flush=True)
            else:
                reached = entry["tokens_per_second"]
                print(f"{side:10} {rows:5} {reached:9.0f} {floor:9.0f} {reached / floor:6.1%}", flush=True)
