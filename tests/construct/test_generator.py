"""Dialogues by reversed construction: executed, answerable, and split without overlap."""

from __future__ import annotations

import json

import pytest

from ttpa.construct import SPLITS, construct_dialogues
from ttpa.construct.recipes import UNSEEN_TOOLS
from ttpa.data.dialogues import Dialogue, write_dialogues
from ttpa.data.read import read_dialogues
from ttpa.tools.schema import functions, validator


def calls_of(dialogue: Dialogue) -> list[dict]:
    return [call["function"] for message in dialogue.messages for call in message.get("tool_calls", [])]


def strings(value) -> set[str]:
    if isinstance(value, dict):
        return set().union(*(strings(part) for part in value.values()), set())
    if isinstance(value, list):
        return set().union(*(strings(part) for part in value), set())
    return {value} if isinstance(value, str) else set()


@pytest.fixture(scope="module")
def by_split():
    return {split: construct_dialogues(120, split=split, seed=5) for split in SPLITS}


def test_every_call_fits_its_schema_and_was_executed_without_error(by_split):
    for dialogues in by_split.values():
        for dialogue in dialogues:
            tools = functions(dialogue.tools)
            for call in calls_of(dialogue):
                assert not list(validator(tools[call["name"]]["parameters"]).iter_errors(call["arguments"]))
            results = [json.loads(m["content"]) for m in dialogue.messages if m["role"] == "tool"]
            assert len(results) == len(calls_of(dialogue))
            assert not any("error" in result for result in results)


def test_copied_values_stand_in_the_question_or_in_a_result(by_split):
    for dialogue in by_split["preference"]:
        seen = ""
        for message in dialogue.messages:
            for call in message.get("tool_calls", []):
                for key in ("name", "title", "recipient", "city", "text", "event_id", "contact_id", "product_id"):
                    if key in call["function"]["arguments"]:
                        assert call["function"]["arguments"][key] in seen
            seen += message["content"]


def test_the_same_arguments_give_the_same_dialogues():
    first = construct_dialogues(5, split="sft", seed=9)
    assert first == construct_dialogues(5, split="sft", seed=9)
    assert first != construct_dialogues(5, split="sft", seed=10)


def test_splits_share_no_calls_and_tests_show_fresh_values(by_split):
    signatures = {split: {json.dumps(calls_of(d)) for d in dialogues} for split, dialogues in by_split.items()}
    assert not signatures["sft"] & signatures["preference"]
    trained = construct_dialogues(1500, split="sft", seed=1) + construct_dialogues(1500, split="preference", seed=2)
    names = {split: set() for split in SPLITS}
    for split, dialogues in {**by_split, "sft": trained}.items():
        for call in (call for dialogue in dialogues for call in calls_of(dialogue)):
            for key in ("title", "city", "recipient", "date", "text", "query", "origin"):
                names[split] |= strings(call["arguments"].get(key, []))
    for split in ("heldout", "unseen_phrasings", "unseen_tools"):
        assert names[split] and not names[split] & names["sft"]
    offered = {
        split: {tuple(sorted(functions(d.tools))) for d in dialogues}
        for split, dialogues in {**by_split, "sft": trained}.items()
    }
    for split in ("heldout", "unseen_phrasings", "unseen_tools"):
        assert not offered[split] & offered["sft"]


def test_unseen_tools_are_offered_in_their_split_only(by_split):
    for split, dialogues in by_split.items():
        for dialogue in dialogues:
            assert bool(set(functions(dialogue.tools)) & set(UNSEEN_TOOLS)) == (split == "unseen_tools")


def test_several_turns_distractors_and_parallel_calls_occur(by_split):
    dialogues = by_split["preference"]
    assert all(len(d.tools) >= 2 + len({call["name"] for call in calls_of(d)}) for d in dialogues)
    assert any(sum(m["role"] == "user" for m in d.messages) == 2 for d in dialogues)
    assert any(len(m.get("tool_calls", [])) == 2 for d in dialogues for m in d.messages)
    assert any(sum(bool(m.get("tool_calls")) for m in d.messages) > 1 for d in dialogues)


def test_the_record_survives_the_disk(by_split, tmp_path):
    write_dialogues(tmp_path / "d.jsonl", by_split["heldout"])
    assert read_dialogues(tmp_path / "d.jsonl")[0] == by_split["heldout"]
