"""The model card, and the upload; nothing here reaches the network."""

from __future__ import annotations

import socket

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard, RepoUrl

import ttpa.training.card
from ttpa.data.report import DataReport
from ttpa.errors import InputError
from ttpa.evaluation.calls import Evaluation, Outcome
from ttpa.evaluation.compare import compare
from ttpa.training.card import check_push, model_card, push_to_hub


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("this test reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def evaluation(right, wrong):
    codes = [[]] * right + [["value.wrong"]] * wrong
    return Evaluation([Outcome(str(i), "all", float(not c), c, "stop", 9) for i, c in enumerate(codes)])


def summary(**evaluations):
    full = {
        name: {"before": before.to_dict(), "after": after.to_dict(), "difference": compare(before, after).to_dict()}
        for name, (before, after) in evaluations.items()
    }
    return {
        "evaluations": full,
        "steps": 12,
        "pairs": 1200,
        "tokens": 34567,
        "seconds": {"load": 1.5, "train": 60.0},
        "seed": 3,
        "versions": {"python": "3.12", "torch": "2.13.0"},
    }


REPORT = DataReport("/home/someone/secret/rows.jsonl", "trl", read=20, kept=18, counts={"pairs": 30})
REPORT.drop("r7", "rows.jsonl:7", "identical sides")
OPTIONS = {
    "model": "org/base",
    "data": "/home/someone/secret/rows.jsonl",
    "beta": 0.1,
    "bf16": True,
    "loss_weights": None,
}


def card(source="org/base", **other):
    given = {"summary": summary(heldout=(evaluation(5, 5), evaluation(8, 2))), "options": OPTIONS}
    return model_card(source=source, report=REPORT.to_dict(), **(given | other))


def test_the_hub_reads_the_metadata(tmp_path):
    (tmp_path / "README.md").write_text(card())
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.base_model, data.library_name, data.pipeline_tag) == ("org/base", "transformers", "text-generation")
    assert {"ttpa", "tool-use", "dpo"} <= set(data.tags)
    assert data.license is None, "nothing is known of org/base here"


def test_the_card_tells_numbers_with_intervals_data_options_and_versions():
    text = card()
    assert (
        "| heldout, 10 decisions | exact calls, % | 50.0 [23.7, 76.3] | 80.0 [49.0, 94.3] | +30.0 [1.6, 58.4] |" in text
    )
    assert "| ESM score | 0.5000 | 0.8000 | +0.3000 [0.0160, 0.5840] |" in text
    for line in (
        "- rows.jsonl (trl): 20 rows read, 18 trees kept",
        "- pairs: 30",
        "- dropped, identical sides: 1",
        "- optimizer steps: 12",
        "- packed tokens: 34,567",
        "- seconds, all phases: 62",
        "- torch 2.13.0",
    ):
        assert f"\n{line}\n" in text
    options = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert options == {"model": "org/base", "data": "rows.jsonl", "beta": 0.1, "bf16": True}
    assert "someone" not in text


def test_sampled_rounds_are_told_one_by_one():
    rounds = [{"pairs": 1234, "trees": 600, "decisions": 1600}, {"pairs": 20, "trees": 10, "decisions": 1600}]
    text = model_card(source="org/base", summary=summary(), options={}, report={"rounds": rounds})
    assert "- round 1: 1,234 pairs in 600 trees, sampled by the model at 1,600 tool calls\n- round 2: 20 pairs" in text
    assert "Not evaluated." in text


def test_the_license_is_that_of_the_base_where_its_card_says_one(tmp_path):
    folder = tmp_path / "some-base"
    folder.mkdir()
    base = str(folder)
    assert ModelCard(card(base)).data.license is None
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: special\n---\n# base\n")
    data = ModelCard(card(base)).data
    assert (data.license, data.license_name, data.base_model) == ("other", "special", None)
    assert "\n\nsome-base, trained by" in card(base)
    for broken in ("no metadata", "---\n- a list\n---\n", "---\na: [\n---\n"):
        (folder / "README.md").write_text(broken)
        assert ModelCard(card(base)).data.license is None


def test_the_embedded_model_has_no_base_on_the_hub():
    text = card(None)
    assert ModelCard(text).data.base_model is None and "The embedded model of ttpa, trained by" in text


def test_the_example_loads_from_where_the_model_will_lie():
    assert 'from_pretrained("me/mine")' in card(name="me/mine") and "# mine\n" in card(name="me/mine")
    assert 'from_pretrained("path/to/this/folder")' in card()


@pytest.mark.parametrize("name", ["a/b/c", "me/two--dashes", "me/with space", ""])
def test_a_name_that_the_hub_refuses_is_refused_at_the_start(name):
    with pytest.raises(InputError, match=r"--push_to_hub .*give ORGANISATION/NAME or NAME"):
        check_push(name)


def test_a_token_is_needed_at_the_start(monkeypatch):
    monkeypatch.setattr(ttpa.training.card, "get_token", lambda: None)
    with pytest.raises(InputError, match=r"needs a token .* run `hf auth login`, or set HF_TOKEN"):
        check_push("me/mine")
    monkeypatch.setattr(ttpa.training.card, "get_token", lambda: "hf_x")
    check_push("me/mine")


@pytest.mark.parametrize("private", [True, False])
def test_the_folder_is_uploaded_to_a_repository_of_that_name(tmp_path, monkeypatch, private):
    calls = []

    def create(self, name, **options):
        calls.append((name, options))
        return RepoUrl(f"https://huggingface.co/me/{name}")

    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **options: calls.append(options))
    assert push_to_hub(tmp_path, "mine", private=private) == "https://huggingface.co/me/mine"
    assert calls[0] == ("mine", {"private": private, "exist_ok": True})
    assert (calls[1]["repo_id"], calls[1]["folder_path"]) == ("me/mine", tmp_path)


def test_a_failed_upload_says_how_to_repeat_it(tmp_path, monkeypatch):
    folder = tmp_path / "my runs"
    folder.mkdir()
    (folder / "model.safetensors").write_text("weights")
    monkeypatch.setattr(HfApi, "create_repo", lambda *a, **o: (_ for _ in ()).throw(ConnectionError("no route")))
    with pytest.raises(InputError) as caught:
        push_to_hub(folder, "me/mine", private=True)
    assert "ConnectionError: no route" in str(caught.value)
    assert str(caught.value).endswith(f"hf upload me/mine '{folder}' . --private")
    assert (folder / "model.safetensors").read_text() == "weights"
