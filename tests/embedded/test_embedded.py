"""The model in the package: small, loadable, half right; and the command that rebuilds it."""

from __future__ import annotations

import random

import torch
from transformers import AutoModelForCausalLM

from ttpa.construct import construct_dialogues
from ttpa.embedded import MODEL_DIR
from ttpa.embedded.build import encode, exact_calls, main
from ttpa.embedded.drills import drill
from ttpa.esm.score import score_call
from ttpa.model import load_model, load_tokenizer
from ttpa.tools.call import call_from_message
from ttpa.tools.dialects.hermes import parse


def test_the_model_is_small_and_right_on_about_half_of_the_held_out_calls():
    assert (MODEL_DIR / "model.safetensors").stat().st_size <= 4_000_000
    model, tokenizer = load_model(MODEL_DIR, dtype=torch.float32), load_tokenizer(MODEL_DIR)
    assert model.config.model_type == "qwen3"
    dialogues = construct_dialogues(80, split="heldout", seed=31)
    assert 35 < exact_calls(model, encode(tokenizer, dialogues)) < 80


def test_the_log_of_the_build_shows_that_nothing_was_left_to_learn():
    steps = [line for line in (MODEL_DIR / "build.log").read_text().splitlines() if line.startswith("sft step")]
    scores = [float(line.split("exact")[1].split("%")[0]) for line in steps]
    assert len(steps) >= 5 and max(scores) - scores[-1] < 3
    assert float(steps[-1].split("loss")[1].split()[0]) < 0.01


def test_what_the_template_renders_is_parsed_back():
    tokenizer = load_tokenizer(MODEL_DIR)
    for dialogue in construct_dialogues(30, split="preference", seed=8):
        for message in dialogue.messages:
            if message.get("tool_calls"):
                text = tokenizer.apply_chat_template([message], tokenize=False)
                text = text.removeprefix("<|im_start|>assistant\n").removesuffix("<|im_end|>\n")
                calls = [call_from_message(call) for call in message["tool_calls"]]
                assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
                assert [(call.name, call.arguments) for call in parse(text).calls] == [
                    (call.name, call.arguments) for call in calls
                ]
                assert score_call(text, calls, dialogue.tools).score == 1.0


def test_in_a_drill_every_copied_value_stands_before_the_call():
    rng = random.Random(0)
    for number in range(50):
        seen = ""
        for message in drill(rng, number).messages:
            for call in message.get("tool_calls", []):
                for value in call["function"]["arguments"].values():
                    if isinstance(value, str):
                        assert value in seen
            seen += message["content"] + str(number)


def test_rebuild_makes_a_model_folder(tmp_path):
    options = "--num_drills 64 --num_dialogues 32 --num_validation 8 --sft_steps 2 --eval_steps 1 --batch_size 8"
    main(["--output", str(tmp_path / "m"), *options.split()])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert model.num_parameters() < 1_100_000
    assert load_tokenizer(tmp_path / "m")("{}")["input_ids"]
    assert "sft best validation" in (tmp_path / "m" / "build.log").read_text()
