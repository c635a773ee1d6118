from __future__ import annotations

import json
import math

import pytest
import torch
import yaml
from random_trees import random_tree
from transformers import AutoModelForCausalLM, AutoTokenizer

from ttpa.config import ELSEWHERE
from ttpa.construct import construct_dialogues
from ttpa.data.dialogues import write_dialogues
from ttpa.errors import InputError
from ttpa.train import main
from ttpa.training.monitor import repeatable
from ttpa.training.policy import Policy
from ttpa.trees.io import read_trees, write_trees

ROWS = [
    {"prompt": f"{a} plus {b} is", "chosen": f" {a + b}", "rejected": f" {a * b + 20}"}
    for a in range(1, 5)
    for b in range(1, 4)
]
TRL_METRICS = [
    *("loss", "grad_norm", "learning_rate", "epoch", "step", "num_tokens"),
    *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected"),
]


@pytest.fixture
def model_dir(tiny_model, tokenizer, tmp_path):
    tiny_model.config.max_position_embeddings = 32768  # one byte is a token
    tiny_model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


def run(output, model_dir, *options):
    main(["--model", str(model_dir), "--output", str(output), "--logging_steps", "1", *map(str, options)])
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return lines, json.loads((output / "summary.json").read_text())


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_a_whole_run_on_preference_rows(tmp_path, model_dir, rows, capsys):
    options = ["--data", rows, "--batch_size", 5, "--num_train_epochs", 2, "--learning_rate", 1e-3]
    lines, summary = run(tmp_path / "run", model_dir, *options)
    names = ["checkpoints", "config.yaml", "data_report.json", "final", "metrics.jsonl", "reference", "summary.json"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == names
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(set(TRL_METRICS) <= line.keys() for line in lines)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-7) and lines[0]["rewards/margins"] == 0
    assert lines[-1]["loss"] < math.log(2) and lines[-1]["rewards/accuracies"] > 0.5
    assert (lines[-1]["epoch"], lines[-1]["num_tokens"]) == (2, summary["tokens"])
    assert (summary["steps"], summary["pairs"], summary["exact_calls"]) == (6, 24, None)
    assert json.loads((tmp_path / "run" / "data_report.json").read_text())["kept"] == 12
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["learning_rate"] == 1e-3
    assert "12 pairs in 12 trees" in capsys.readouterr().out

    before, after = weights(model_dir), weights(tmp_path / "run" / "final")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "final").chat_template


def test_the_same_seed_gives_the_same_run_and_its_config_repeats_it(tmp_path, model_dir, rows):
    options = ["--data", rows, "--batch_size", 5, "--learning_rate", 1e-3]
    first, _ = run(tmp_path / "a", model_dir, *options)
    again, _ = run(tmp_path / "b", model_dir, "--config", tmp_path / "a" / "config.yaml")
    other, _ = run(tmp_path / "c", model_dir, *options, "--seed", 1)
    first, again, other = ([repeatable(line) for line in lines] for lines in (first, again, other))
    assert first == again != other
    a, b = weights(tmp_path / "a" / "final"), weights(tmp_path / "b" / "final")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_rounds_sample_with_the_policy_of_their_time_and_evaluate(tmp_path, model_dir, capsys):
    eval_data = tmp_path / "eval.jsonl"
    write_dialogues(eval_data, construct_dialogues(2, split="heldout", seed=3))
    options = ["--num_dialogues", 2, "--rounds", 2, "--max_new_tokens", 4, "--eval_data", eval_data]
    lines, summary = run(tmp_path / "run", model_dir, *options)
    assert [(line["round"], line["step"]) for line in lines] == [(1, 1), (2, 1)]
    assert [line["loss"] for line in lines] == pytest.approx([math.log(2)] * 2, abs=1e-7)
    reports = json.loads((tmp_path / "run" / "data_report.json").read_text())["rounds"]
    trees = read_trees(tmp_path / "run" / "trees.jsonl")
    assert len(trees) == sum(report["trees"] for report in reports) and len({tree.dialogue for tree in trees}) == 4
    assert summary["pairs"] == sum(len(tree.pairs) for tree in trees)
    assert summary["exact_calls"]["before"] == 0 and len(summary["exact_calls"]["interval"]) == 2
    assert summary["errors"]["before"] and "eval.jsonl" in summary["evaluations"]
    phases = {"load", "evaluate before", "sample", "train", "evaluate after", "save"}
    assert summary["seconds"].keys() == phases
    assert "exact calls, %" in capsys.readouterr().out

    # the sampled trees train again, from the file
    _, again = run(tmp_path / "again", model_dir, "--data", tmp_path / "run" / "trees.jsonl", "--loss_type", "sft")
    assert (again["pairs"], again["steps"]) == (summary["pairs"], 1)


def test_sft_logs_its_loss(tmp_path, model_dir, rows):
    options = ["--data", rows, "--loss_type", "sft", "--max_steps", 8, "--learning_rate", 1e-2]
    lines, _ = run(tmp_path / "run", model_dir, *options)
    assert lines[0]["loss"] > lines[-1]["loss"] > 0 and "rewards/margins" not in lines[0]


def test_an_earlier_run_is_replaced_once_the_data_is_read(tmp_path, model_dir, rows, capsys):
    output = tmp_path / "run"
    run(output, model_dir, "--data", rows, "--max_steps", 3)
    (output / "trees.jsonl").write_text("of an earlier run")
    (output / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="no such file"):
        run(output, model_dir, "--data", tmp_path / "typo.jsonl")
    assert (output / "final").exists() and (output / "trees.jsonl").exists()
    lines, _ = run(output, model_dir, "--data", rows, "--max_steps", 2)
    assert len(lines) == 2 and not (output / "trees.jsonl").exists() and (output / "notes.txt").exists()
    assert "files of an earlier run are replaced" in capsys.readouterr().out
    with pytest.raises(InputError, match="would be replaced"):
        run(output, output / "final", "--data", rows)


def test_an_output_that_cannot_be_written_is_said_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/run: cannot be written: Not a directory; choose another --output"):
        main(["--model", str(tmp_path / "no-model"), "--output", str(tmp_path / "file" / "run")])


def test_data_of_which_nothing_is_left_ends_a_run_before_it_begins(tmp_path, model_dir, rows, capsys):
    path, output = tmp_path / "same.jsonl", tmp_path / "run"
    run(output, model_dir, "--data", rows, "--max_steps", 1)
    left = sorted(output.rglob("*"))
    path.write_text(json.dumps({"prompt": "a", "chosen": " b", "rejected": " b"}))
    with pytest.raises(InputError, match=r"no pair of completions is left in .*same.jsonl"):
        run(output, model_dir, "--data", path)
    assert "dropped: identical" in capsys.readouterr().out and sorted(output.rglob("*")) == left


def test_lengths(tmp_path, model_dir, rows):
    output = tmp_path / "run"
    with pytest.raises(InputError, match="more than max_length 5"):
        run(output, model_dir, "--data", rows, "--max_length", 5, "--on_overlength", "error")
    with pytest.raises(InputError, match="no pair of completions"):
        run(output, model_dir, "--data", rows, "--max_length", 5)


def test_rows_in_the_output_folder_are_left_alone(model_dir, rows, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run(tmp_path, "model", "--data", "rows.jsonl", "--output", ".", "--max_steps", 1)
    assert rows.exists() and (tmp_path / "final").exists()


def test_weights_of_zero_train_nothing(tmp_path, model_dir):
    tree = random_tree(0)
    tree.leaves[2].errors = [{"code": "value.wrong", "call": 0, "pointer": "/a", "tokens": [0, 1]}]
    tree.pairs = [pair for pair in tree.pairs if pair.rejected == 2]
    write_trees(tmp_path / "trees.jsonl", [tree])
    options = ["--data", tmp_path / "trees.jsonl", "--error_weight", 0, "--follow_weight", 0]
    lines, _ = run(tmp_path / "run", model_dir, *options)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-7) and lines[0]["grad_norm"] == 0


def test_trees_of_another_tokenizer(tmp_path, model_dir):
    write_trees(tmp_path / "trees.jsonl", [random_tree(0, vocabulary=10**6)])
    with pytest.raises(InputError, match="made with another tokenizer"):
        run(tmp_path / "run", model_dir, "--data", tmp_path / "trees.jsonl")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--learning_rat", "1"], "did you mean --learning_rate"),
        (["--batch_size", "0"], "--batch_size must be a number of at least 1"),
        (["--beta", "0"], "--beta must be a number above 0"),
        (["--max_steps", "0"], "--max_steps must be at least 1, or -1"),
        (["--warmup_ratio", "1.5"], "--warmup_ratio must be a share"),
        (["--label_smoothing", "0.5"], "--label_smoothing must be a share of at least 0 and below 0.5"),
        (["--label_smoothing", "0.1", "--loss_type", "ipo"], "--label_smoothing goes with sigmoid, ttpa, robust"),
        (["--rounds", "2", "--data", "x.jsonl"], "with --data nothing is sampled"),
        (["--data", "runs/train/trees.jsonl"], "would be replaced by this run's output"),
        (["--max_length", "1"], "--max_length must be at least 2"),
        (["--loss_type", "sigmoyd"], "did you mean sigmoid"),
        (["--loss_weights", "1,2", "--loss_type", "ttpa"], "--loss_weights has 2 numbers for 1 losses"),
        (["--shard_size", "0"], "--shard_size must be a number above 0"),
        (["--keep_best", "1"], "--keep_best keeps the checkpoints of the lowest eval_loss"),
        (["--load_in_4bit"], "give --use_peft, without lm_head"),
        (["--sync_ref_model", "--loss_type", "sft"], "--sync_ref_model moves a reference"),
        (["--ref_model", "x/y", "--loss_type", "tdpo1"], "leave out --ref_model"),
        (["--use_peft", "--lora_target_modules", "lm_head", "--loss_type", "tdpo1"], "knows no adapter of the head"),
        (["--report_to", "tensorbord"], "did you mean tensorboard"),
        (["--push_to_hub", "a/b/c"], "--push_to_hub a/b/c"),
    ],
)
def test_options_that_make_no_sense(options, problem):
    with pytest.raises(InputError, match=problem):
        main(options)


def test_real_toolbench_answers(tmp_path, model_dir, real_data):
    options = ["--data", real_data / "toolbench" / "answer", "--max_steps", 1]
    lines, summary = run(tmp_path / "run", model_dir, *options)
    report = json.loads((tmp_path / "run" / "data_report.json").read_text())
    assert (report["read"], report["counts"]["files won"], report["counts"]["pairs"]) == (15, 9, 6)
    assert report["dropped_by_reason"]["identical"] == 1
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-7) and summary["steps"] == 1
    run(tmp_path / "equal", model_dir, *options, "--toolbench_shapes", "equal")
    equal = json.loads((tmp_path / "equal" / "data_report.json").read_text())
    assert (report["kept"], equal["kept"]) == (4, 1)


def test_a_run_that_goes_on_refuses_other_settings(tmp_path, model_dir, rows):
    options = ["--data", rows, "--batch_size", 5, "--learning_rate", 1e-3, "--save_steps", 1]
    lines, summary = run(tmp_path / "run", model_dir, *options)
    again = [*options, "--resume", "auto"]
    assert run(tmp_path / "run", model_dir, *again, "--pack_tokens", 100, "--logging_steps", 2)[0] == lines
    with pytest.raises(InputError, match=r"made with other settings: beta was 0\.1 and is 0\.2"):
        run(tmp_path / "run", model_dir, *again, "--beta", 0.2)
    other = rows.with_name("other.jsonl")
    other.write_text("\n".join(map(json.dumps, ROWS[:-1])))
    with pytest.raises(InputError, match="the content of --data changed"):
        run(tmp_path / "run", model_dir, *again, "--data", other)
    checkpoint = next((tmp_path / "run" / "checkpoints").iterdir())
    with pytest.raises(InputError, match="is not of this run"):
        run(tmp_path / "new", model_dir, *options, "--resume", checkpoint)
    with pytest.raises(InputError, match="there is no such checkpoint"):
        run(tmp_path / "run", model_dir, *options, "--resume", tmp_path / "typo")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == summary["steps"]


def test_a_cached_reference_serves_other_losses(tmp_path, model_dir, rows):
    options = ["--data", rows, "--max_steps", 1, "--reference_cache", tmp_path / "cache"]
    run(tmp_path / "a", model_dir, *options)
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}
    assert shards
    run(tmp_path / "b", model_dir, *options, "--loss_type", "ipo,sft", "--loss_weights", "1,0.5", "--beta", 0.5)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")} == shards


def test_an_adapter_is_saved_apart_and_merged(tmp_path, model_dir, rows):
    options = ["--data", rows, "--use_peft", "--lora_r", 4, "--lora_target_modules", "all-linear,lm_head"]
    lines, _ = run(tmp_path / "run", model_dir, *options, "--learning_rate", 1e-2, "--max_steps", 4)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and lines[-1]["loss"] < math.log(2)
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").exists()
    before, after = weights(model_dir), weights(tmp_path / "run" / "final")
    assert not torch.equal(after["lm_head.weight"], before["lm_head.weight"])
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    card = (tmp_path / "run" / "final" / "README.md").read_text()
    assert "all-linear,lm_head" in card and "rows.jsonl" in card
    with pytest.raises(InputError, match="did you mean q_proj"):
        run(tmp_path / "typo", model_dir, *options[:-1], "q_prj")


def test_rounds_with_an_adapter_sample_what_was_learned(tmp_path, model_dir):
    options = ["--num_dialogues", 2, "--rounds", 2, "--max_new_tokens", 4, "--use_peft", "--learning_rate", 1e-2]
    lines, _ = run(tmp_path / "run", model_dir, *options)
    assert [line["loss"] for line in lines] == pytest.approx([math.log(2)] * 2, abs=1e-5)


def test_the_plan_is_printed_and_nothing_is_written(tmp_path, model_dir, rows, capsys):
    options = ["--model", model_dir, "--data", rows, "--output", tmp_path / "run", "--plan", "--world_size", 2]
    main(list(map(str, options)))
    printed = capsys.readouterr().out
    assert "memory of one process of 2" in printed and "steps     1 of about 12.0 pairs" in printed
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="--plan lays out the trees of --data"):
        main(["--plan"])


def test_a_run_out_of_memory_says_what_takes_it(tmp_path, model_dir, rows, monkeypatch):
    def rows_that_do_not_fit(*given, **options):
        raise torch.cuda.OutOfMemoryError("Tried to allocate 20 GiB")

    monkeypatch.setattr(Policy, "rows", rows_that_do_not_fit)
    with pytest.raises(InputError, match="Tried to allocate 20 GiB") as problem:
        run(tmp_path / "run", model_dir, "--data", rows)
    assert "optimizer" in str(problem.value) and "--pack_tokens" in str(problem.value)


def test_the_best_checkpoint_by_preferences_set_aside_is_kept(tmp_path, model_dir, rows):
    options = ["--data", rows, "--eval_preferences", rows, "--learning_rate", 1e-2, "--batch_size", 4]
    lines, _ = run(tmp_path / "run", model_dir, *options, "--eval_steps", 1, "--save_steps", 1, "--keep_best", 1)
    losses = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    kept = {int(path.name[-8:]) for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert kept == {2, 3} | {min(losses, key=losses.__getitem__)}


def test_sampled_trees_can_bring_their_reference_along(tmp_path, model_dir):
    run(tmp_path / "run", model_dir, "--num_dialogues", 4, "--max_new_tokens", 4)
    options = ["--data", tmp_path / "run" / "trees.jsonl", "--reference", "sampled"]
    lines, _ = run(tmp_path / "again", model_dir, *options)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    for tree in (trees := read_trees(tmp_path / "run" / "trees.jsonl")):
        for node in tree.nodes:
            node.logps = None if node.logps is None else [logp - 1 for logp in node.logps]
    write_trees(tmp_path / "wrong.jsonl", trees)
    with pytest.raises(InputError, match="the sampler's log-probabilities are not those of this model"):
        run(tmp_path / "wrong", model_dir, "--data", tmp_path / "wrong.jsonl", "--reference", "sampled")


def test_helper_models_weigh_tokens(tmp_path, model_dir, rows, tiny_model):
    options = ["--data", rows, "--max_steps", 2, "--learning_rate", 1e-3, "--batch_size", 4]
    plain, _ = run(tmp_path / "plain", model_dir, *options, "--loss_type", "sigmoid")
    alike, _ = run(tmp_path / "alike", model_dir, *options, "--loss_type", "tis", "--score_model", model_dir)
    assert [line["loss"] for line in alike] == [line["loss"] for line in plain]  # all scores are 0
    with torch.no_grad():
        for parameter in tiny_model.parameters():
            parameter.mul_(1.2)
    tiny_model.save_pretrained(tmp_path / "helper")
    options += ["--score_model", tmp_path / "helper"]
    other, _ = run(tmp_path / "other", model_dir, *options, "--loss_type", "tis")
    assert other[-1]["loss"] != plain[-1]["loss"]
    for loss_type in (["sepo"], ["tis", "--sync_ref_model"]):
        with pytest.raises(InputError, match="give --score_model_minus"):
            run(tmp_path / "sepo", model_dir, *options, "--loss_type", *loss_type)
    lines, _ = run(tmp_path / "sepo", model_dir, *options, "--loss_type", "sepo", "--score_model_minus", model_dir)
    assert lines[-1]["loss"] < lines[0]["loss"]
    with pytest.raises(InputError, match="give --score_model"):
        run(tmp_path / "none", model_dir, "--data", rows, "--loss_type", "tgdpo")


def test_another_model_can_be_the_reference(tmp_path, model_dir, rows, tiny_model):
    with torch.no_grad():
        for parameter in tiny_model.parameters():
            parameter.mul_(1.2)
    tiny_model.save_pretrained(tmp_path / "reference")
    lines, _ = run(tmp_path / "run", model_dir, "--data", rows, "--ref_model", tmp_path / "reference", "--max_steps", 1)
    assert abs(lines[0]["loss"] - math.log(2)) > 1e-4


@pytest.mark.parametrize("foreign", ELSEWHERE)
def test_names_of_other_trainers_lead_to_ours(foreign):
    with pytest.raises(InputError, match=f"unknown option --{foreign}: .* is --{ELSEWHERE[foreign]} here"):
        main([f"--{foreign}", "1"])


def test_rows_of_one_prompt_are_computed_together(tmp_path, model_dir):
    sides = [{"prompt": "2 plus 2 is", "chosen": " 4", "rejected": f" {wrong}"} for wrong in (5, 22, 3, 7)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [*sides, {**sides[0], "prompt": "4 less 0 is"}])))
    lines, summary = run(tmp_path / "run", model_dir, "--data", tmp_path / "a.jsonl", "--max_steps", 1)
    report = json.loads((tmp_path / "run" / "data_report.json").read_text())
    assert report["kept"] == 5 and report["notes"] == ["rows with the same prompt share a tree: 5 rows, 2 trees"]
    assert summary["pairs"] == 5
    ends = len(["4.", "5.", "22.", "3.", "7."])  # every answer ends with a token of its own
    assert lines[0]["num_tokens"] == len("2 plus 2 is ") + len("452237") + ends + len("4 less 0 is ") + len("45") + 2


def test_several_files_are_read_as_one(tmp_path, model_dir, rows):
    write_trees(tmp_path / "trees.jsonl", [random_tree(1)])
    (tmp_path / "more.jsonl").write_text(json.dumps(ROWS[0] | {"rejected": " 99"}))
    data = f"{rows},{tmp_path / 'trees.jsonl'},{tmp_path / 'more.jsonl'}"
    run(tmp_path / "run", model_dir, "--data", data, "--max_steps", 1)
    report = json.loads((tmp_path / "run" / "data_report.json").read_text())
    assert (report["read"], report["kept"]) == (len(ROWS) + 2, len(ROWS) + 2)
    assert report["notes"] == [f"rows with the same prompt share a tree: {len(ROWS) + 1} rows, {len(ROWS)} trees"]
    with pytest.raises(InputError, match=r"none\.jsonl: no such file"):
        run(tmp_path / "run", model_dir, "--data", f"{rows},none.jsonl", "--max_steps", 1)
