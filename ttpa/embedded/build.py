"""Rebuild the embedded model from nothing: `python -m ttpa.embedded.build --output DIR`.

Three steps: a BPE tokenizer on the texts of the world; drills, until the model reads schemas and copies values; and
SFT on a limited set of dialogues, to the best score on validation dialogues. Preference dialogues and held-out
dialogues are never touched here (see `ttpa.construct.construct_dialogues` for the splits).
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from ttpa.config import option, parse_config, run_command
from ttpa.construct import construct_dialogues
from ttpa.data.dialogues import Dialogue
from ttpa.embedded import MODEL_DIR
from ttpa.embedded.drills import drill

TEMPLATE = Path(__file__).parent / "chat_template.jinja"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TAGS = ["<tools>", "</tools>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]


@dataclass
class BuildConfig:
    """Options of the rebuild; the defaults made the model in the package."""

    output: Path = option(MODEL_DIR, "folder to write the model to")
    start: Path | None = option(None, "a model folder to start SFT from, instead of doing the drills")
    vocab_size: int = option(1024, "size of the tokenizer's vocabulary")
    num_drills: int = option(28800, "made-up dialogues of the first step, each seen once")
    num_dialogues: int = option(600, "SFT dialogues")
    num_validation: int = option(200, "dialogues that choose the best SFT step")
    sft_steps: int = option(600, "SFT steps at most")
    batch_size: int = option(32, "drills per step")
    sft_batch_size: int = option(16, "dialogues per SFT step")
    learning_rate: float = option(2e-3, "peak learning rate of the drills")
    sft_learning_rate: float = option(1e-3, "peak learning rate of SFT")
    sft_weight_decay: float = option(0.1, "weight decay of SFT")
    eval_steps: int = option(75, "validate every so many SFT steps")
    seed: int = option(0, "seed of everything")


@dataclass
class Example:
    """A dialogue as token ids; `model` is 1 where the model writes, `calls` are the spans of its turns with calls."""

    ids: list[int]
    model: list[int]
    calls: list[tuple[int, int]]


def train_tokenizer(texts: Sequence[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every digit is a token, with the special tokens and tags of the chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(TAGS),
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.add_tokens(TAGS)
    fast.chat_template = TEMPLATE.read_text(encoding="utf-8")
    return fast


def encode(tokenizer: PreTrainedTokenizerFast, dialogues: Sequence[Dialogue]) -> list[Example]:
    """Render dialogues through the chat template and mark what the model writes."""
    examples = []
    call = tokenizer.convert_tokens_to_ids("<tool_call>")
    for dialogue in dialogues:
        tools: list[Any] = dialogue.tools
        out: Any = tokenizer.apply_chat_template(
            dialogue.messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = out["input_ids"], out["assistant_masks"]
        turns, start = [], None
        for i, written in enumerate([*mask, 0]):
            if written and start is None:
                start = i
            elif not written and start is not None:
                turns.append((start, i))
                start = None
        examples.append(Example(ids, mask, [(a, b) for a, b in turns if ids[a] == call]))
    return examples


def batches_of_like_length(rng: random.Random, examples: Sequence[Example], batch_size: int) -> list[list[int]]:
    """One epoch of batches in random order; within a window of eight batches the like lengths meet."""
    order = rng.sample(range(len(examples)), len(examples))
    batches = []
    for at in range(0, len(order), 8 * batch_size):
        window = sorted(order[at : at + 8 * batch_size], key=lambda i: len(examples[i].ids))
        batches += [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
    rng.shuffle(batches)
    return batches


def padded(examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids of a batch, padded on the right, and masks of its tokens and of those that the model writes.

    Attention needs no mask: it is causal, and the padding comes last.
    """
    width = max(len(example.ids) for example in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.long)
    seen, model = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        seen[row, : len(example.ids)] = 1
        model[row, : len(example.ids)] = torch.tensor(example.model)
    return ids, seen, model


@torch.inference_mode()
def exact_calls(model: Qwen3ForCausalLM, examples: Sequence[Example]) -> float:
    """Share of calling turns that greedy decoding would write token for token, in percent.

    Greedy decoding writes a turn exactly when every one of its tokens is the most likely one after the gold tokens
    before it, so one forward pass decides.
    """
    model.eval()
    right = total = 0
    ordered = sorted(examples, key=lambda example: len(example.ids))
    for at in range(0, len(ordered), 32):
        batch = ordered[at : at + 32]
        ids, _, _ = padded(batch)
        hit = model(input_ids=ids).logits[:, :-1].argmax(-1) == ids[:, 1:]
        for row, example in enumerate(batch):
            right += sum(bool(hit[row, a - 1 : b - 1].all()) for a, b in example.calls)
            total += len(example.calls)
    model.train()
    return 100 * right / total


def run_phase(
    name: str,
    model: Qwen3ForCausalLM,
    examples: Sequence[Example],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    prompt_weight: float,
    weight_decay: float,
    validation: Sequence[Example],
    eval_steps: int,
    seed: int,
    log: Log,
) -> None:
    """Train with Muon (AdamW for embeddings and norms), warm-up, a plateau and a fall of the rate over the second half.

    The loss is the mean over what the model writes plus `prompt_weight` times the mean over all tokens. Leaves the
    model at its best validation score, the last of equal ones.
    """
    rng = random.Random(seed)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=10 * learning_rate, weight_decay=weight_decay, momentum=0.95),
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    best, best_state, best_step = -1.0, None, 0
    queue: list[list[int]] = []
    start, tokens, losses = time.time(), 0, []
    for step in range(1, steps + 1):
        queue = queue or batches_of_like_length(rng, examples, batch_size)
        batch = [examples[i] for i in queue.pop()]
        rate = learning_rate * min(1.0, step / 20, 0.02 + 2 * (1 - step / steps))
        for optimizer, factor in zip(optimizers, (10, 1), strict=True):
            optimizer.param_groups[0]["lr"] = factor * rate
        ids, seen, written = padded(batch)
        logits = model(input_ids=ids).logits[:, :-1]
        loss_BT = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        loss = loss_BT[written[:, 1:].bool()].mean()
        (loss + prompt_weight * loss_BT[seen[:, 1:].bool()].mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        tokens += int(seen.sum())
        losses.append(loss.item())
        if step % eval_steps == 0 or step == steps:
            score = exact_calls(model, validation)
            if score >= best:
                best, best_step = score, step
                best_state = {key: value.clone() for key, value in model.state_dict().items()}
            mean = sum(losses) / len(losses)
            log(
                f"{name} step {step:5d}/{steps}  lr {rate:.1e}  loss {mean:.4f}  tokens {tokens / 1e6:.2f}M  "
                f"validation exact {score:5.1f} %  {time.time() - start:.0f} s"
            )
            losses = []
    assert best_state is not None
    model.load_state_dict(best_state)
    log(f"{name} best validation exact {best:.1f} % at step {best_step}")


class Log:
    """Prints lines and keeps them in a file."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("w", encoding="utf-8")

    def __call__(self, line: str) -> None:
        print(line, flush=True)
        self.file.write(line + "\n")
        self.file.flush()


def main(argv: list[str]) -> None:
    config = parse_config(
        BuildConfig, argv, prog="python -m ttpa.embedded.build", description="Rebuild the embedded model from nothing."
    )
    config.output.mkdir(parents=True, exist_ok=True)
    log = Log(config.output / "build.log")
    log(f"python -m ttpa.embedded.build {' '.join(argv)}".rstrip())
    torch.manual_seed(config.seed)
    rng = random.Random(config.seed)

    dialogues = construct_dialogues(config.num_dialogues + config.num_validation, split="sft", seed=config.seed)
    sft, validation = dialogues[: config.num_dialogues], dialogues[config.num_dialogues :]
    if config.start:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(config.start)
        model = Qwen3ForCausalLM.from_pretrained(config.start, dtype=torch.float32)
    else:
        drills = [drill(rng, number) for number in range(config.num_drills + 200)]
        plain = train_tokenizer([], vocab_size=265)
        texts = [str(plain.decode(example.ids)) for example in encode(plain, [*drills[:3000], *(3 * sft)])]
        tokenizer = train_tokenizer(texts, vocab_size=config.vocab_size)
        model = Qwen3ForCausalLM(model_config(tokenizer))
        copying_start(model)
        log(f"{sum(p.numel() for p in model.parameters()):,} parameters, vocabulary {len(tokenizer)}")
        examples = encode(tokenizer, drills)
        log(f"{len(drills)} drills, {sum(len(e.ids) for e in examples) / len(drills):.0f} tokens each")
        run_phase(
            "drills",
            model,
            examples[200:],
            steps=config.num_drills // config.batch_size,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            prompt_weight=0.2,
            weight_decay=0.0,
            validation=examples[:200],
            eval_steps=50,
            seed=config.seed,
            log=log,
        )
        model.save_pretrained(config.output / "drilled")
        tokenizer.save_pretrained(config.output / "drilled")
    examples = encode(tokenizer, sft)
    log(f"{len(sft)} SFT dialogues, {sum(len(e.ids) for e in examples) / len(sft):.0f} tokens each")
    run_phase(
        "sft",
        model,
        examples,
        steps=config.sft_steps,
        batch_size=config.sft_batch_size,
        learning_rate=config.sft_learning_rate,
        prompt_weight=0.0,
        weight_decay=config.sft_weight_decay,
        validation=encode(tokenizer, validation),
        eval_steps=config.eval_steps,
        seed=config.seed + 1,
        log=log,
    )
    for split in ("heldout", "preference"):
        others = encode(tokenizer, construct_dialogues(300, split=split, seed=12345))
        log(f"exact calls on 300 dialogues of {split}: {exact_calls(model, others):.1f} %")
    model.save_pretrained(config.output)
    tokenizer.save_pretrained(config.output)


@torch.no_grad()
def copying_start(model: Qwen3ForCausalLM) -> None:
    """Start every attention head as one that looks for tokens like its own and passes on what it finds.

    Queries equal keys and the output projection is the transpose of the value projection, whose rows are orthonormal:
    mimetic initialisation (arXiv 2305.09828). It shortens the way to copying heads.
    """
    for layer in model.model.layers:
        attention = layer.self_attn
        width, groups = attention.head_dim, attention.num_key_value_groups
        torch.nn.init.orthogonal_(attention.v_proj.weight)
        for head in range(model.config.num_attention_heads):
            rows, shared = slice(head * width, (head + 1) * width), head // groups
            key = attention.k_proj.weight[shared * width : (shared + 1) * width]
            value = attention.v_proj.weight[shared * width : (shared + 1) * width]
            attention.q_proj.weight[rows] = key + 0.3 * attention.q_proj.weight[rows]
            attention.o_proj.weight[:, rows] = 0.5 * value.T


def model_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    """Four layers of 128, tied embeddings: about 0.9 M parameters."""
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        initializer_range=0.08,  # 1 / sqrt(hidden size): with the usual 0.02 so narrow a model learns far more slowly
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
