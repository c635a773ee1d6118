"""The built-in toolbox: schemas, seeded state, results, typed errors."""

from __future__ import annotations

import json

import pytest
from jsonschema import Draft202012Validator

from ttpa.tools.call import Call
from ttpa.tools.schema import functions
from ttpa.tools.toolbox import Toolbox


def test_schemas_are_valid_and_varied():
    tools = functions(Toolbox().tools)
    assert len(tools) >= 20
    text = json.dumps(list(tools.values()))
    for tool in tools.values():
        Draft202012Validator.check_schema(tool["parameters"])
        assert tool["description"]
    assert '"enum"' in text and '"array"' in text
    properties = [part for tool in tools.values() for part in tool["parameters"]["properties"].values()]
    assert any(part["type"] == "object" for part in properties)
    assert any(len(t["parameters"]["required"]) < len(t["parameters"]["properties"]) for t in tools.values())


def test_seed_decides_the_state():
    assert Toolbox(seed=3).snapshot() == Toolbox(seed=3).snapshot()
    assert Toolbox(seed=3).snapshot() != Toolbox(seed=4).snapshot()
    assert json.loads(json.dumps(Toolbox(seed=3).snapshot())) == Toolbox(seed=3).snapshot()


def test_calls_change_the_state_and_results_are_json():
    box = Toolbox(seed=1)
    before = box.snapshot()
    event = {"title": "chess lesson", "date": "2026-03-29", "start": "23:15", "minutes": 30, "attendees": ["A B"]}
    result = box.execute(Call("create_event", event))
    assert result["event_id"] in box.snapshot()["events"]
    assert box.snapshot() != before
    listed = box.execute(Call("list_events", {"date": "2026-03-29"}))
    assert {"id": result["event_id"], "title": "chess lesson", "start": "23:15"} in listed["events"]
    json.dumps(listed)


@pytest.mark.parametrize(
    ("name", "arguments", "code"),
    [
        ("no_such_tool", {}, "unknown_tool"),
        ("get_balance", {}, "invalid_arguments"),
        ("get_balance", {"account": "piggy"}, "invalid_arguments"),
        ("get_balance", {"account": "savings", "more": 1}, "invalid_arguments"),
        ("create_event", {"title": "x", "date": "29.3.", "start": "9:00", "minutes": 5}, "invalid_arguments"),
        ("cancel_event", {"event_id": "e0"}, "not_found"),
        ("find_contact", {"name": "Nobody"}, "not_found"),
        ("transfer_money", {"recipient": "x", "money": {"amount": 1e6, "currency": "EUR"}}, "insufficient_funds"),
        ("search_flights", {"origin": "Oslo", "destination": "Oslo", "date": "2026-01-01"}, "conflict"),
    ],
)
def test_errors_are_typed_and_change_nothing(name, arguments, code):
    box = Toolbox(seed=1)
    before = box.snapshot()
    result = box.execute(Call(name, arguments))
    assert result["error"] == code and result["message"]
    assert box.snapshot() == before


def test_results_do_not_alias_the_state():
    box = Toolbox(seed=1)
    order = next(iter(box.snapshot()["orders"]))
    box.execute(Call("order_status", {"order_id": order}))["items"].clear()
    assert box.snapshot()["orders"][order]["items"]


def test_a_clash_of_two_events_is_a_conflict():
    box = Toolbox(seed=1)
    event = {"title": "a", "date": "2026-03-29", "start": "23:00", "minutes": 30}
    assert "event_id" in box.execute(Call("create_event", event))
    assert box.execute(Call("create_event", {**event, "start": "23:15"}))["error"] == "conflict"
    assert "event_id" in box.execute(Call("create_event", {**event, "start": "23:30"}))
