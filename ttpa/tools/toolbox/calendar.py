"""Calendar: events, reminders, free slots, lights and heating on a timer."""

from __future__ import annotations

import random
from typing import Any

from ttpa.tools.toolbox.schemas import COUNT, DATE, FLAG, NAME, TEXT, TIME, array, choice, record
from ttpa.tools.toolbox.tool import State, Tool, ToolError, find, new_id

PARTS = {"morning": ("08:00", "12:00"), "afternoon": ("12:00", "17:00"), "evening": ("17:00", "22:00")}


def initial_state(rng: random.Random, titles: list[str], days: list[tuple[int, int]]) -> State:
    """Six events on days of 2026 and no reminders."""
    events = {}
    for number, title in enumerate(rng.sample(titles, 6)):
        month, day = rng.choice(days)
        events[f"e{rng.randrange(10 * number + 100, 10 * number + 110)}"] = {
            "title": title,
            "date": f"2026-{month:02}-{day:02}",
            "start": f"{rng.randint(8, 20):02}:{rng.choice((0, 15, 30, 45)):02}",
            "minutes": rng.choice((30, 45, 60, 90)),
            "calendar": rng.choice(("work", "home", "family")),
        }
    rooms = ("kitchen", "bedroom", "office", "hall")
    return {"events": events, "reminders": {}, "rooms": {room: {"lights": "off", "celsius": 19.0} for room in rooms}}


def clock(time: str) -> int:
    """Minutes since midnight of HH:MM."""
    return int(time[:2]) * 60 + int(time[3:])


def _clash(state: State, date: str, start: str, minutes: int, ignore: str = "") -> str | None:
    first, last = clock(start), clock(start) + minutes
    for key, event in state["events"].items():
        begins = clock(event["start"])
        if key != ignore and event["date"] == date and begins < last and first < begins + event["minutes"]:
            return key
    return None


def create_event(state: State, arguments: dict[str, Any]) -> Any:
    clash = _clash(state, arguments["date"], arguments["start"], arguments["minutes"])
    if clash:
        raise ToolError("conflict", f"event {clash} is at that time")
    key = new_id(state["events"], "e")
    state["events"][key] = {"calendar": "work", **arguments}
    return {"event_id": key}


def move_event(state: State, arguments: dict[str, Any]) -> Any:
    event = find(state["events"], arguments["event_id"], "event")
    clash = _clash(state, arguments["date"], arguments["start"], event["minutes"], arguments["event_id"])
    if clash:
        raise ToolError("conflict", f"event {clash} is at that time")
    event.update(date=arguments["date"], start=arguments["start"])
    return {"moved": arguments["event_id"]}


def cancel_event(state: State, arguments: dict[str, Any]) -> Any:
    find(state["events"], arguments["event_id"], "event")
    del state["events"][arguments["event_id"]]
    return {"cancelled": arguments["event_id"]}


def list_events(state: State, arguments: dict[str, Any]) -> Any:
    return {
        "events": [
            {"id": key, "title": event["title"], "start": event["start"]}
            for key, event in state["events"].items()
            if event["date"] == arguments["date"] and arguments.get("calendar", event["calendar"]) == event["calendar"]
        ]
    }


def set_reminder(state: State, arguments: dict[str, Any]) -> Any:
    key = new_id(state["reminders"], "r")
    state["reminders"][key] = {"repeat": "never", **arguments}
    return {"reminder_id": key}


def find_free_slot(state: State, arguments: dict[str, Any]) -> Any:
    first, last = (clock(time) for time in PARTS[arguments["part_of_day"]])
    for start in range(first, last - arguments["minutes"] + 1, 15):
        time = f"{start // 60:02}:{start % 60:02}"
        if not _clash(state, arguments["date"], time, arguments["minutes"]):
            return {"start": time}
    raise ToolError("not_found", "no free slot")


def switch_lights(state: State, arguments: dict[str, Any]) -> Any:
    state["rooms"][arguments["room"]]["lights"] = arguments["state"]
    return {"lights": arguments["state"]}


def set_heating(state: State, arguments: dict[str, Any]) -> Any:
    state["rooms"][arguments["room"]].update({name: arguments[name] for name in arguments if name != "room"})
    return {"celsius": arguments["celsius"]}


ROOM = choice("kitchen", "bedroom", "office", "hall")
TOOLS = [
    Tool(
        "create_event",
        "Put a new event into the calendar.",
        record(
            title=NAME,
            date=DATE,
            start=TIME,
            minutes=COUNT,
            attendees=array(NAME),
            calendar=choice("work", "home", "family"),
            optional=("attendees", "calendar"),
        ),
        create_event,
    ),
    Tool("move_event", "Move an event.", record(event_id=NAME, date=DATE, start=TIME), move_event),
    Tool(
        "cancel_event",
        "Cancel an event.",
        record(event_id=NAME, notify=FLAG, optional=("notify",)),
        cancel_event,
    ),
    Tool(
        "list_events",
        "List the events of a day.",
        record(date=DATE, calendar=choice("work", "home", "family"), optional=("calendar",)),
        list_events,
    ),
    Tool(
        "set_reminder",
        "Set a reminder.",
        record(text=TEXT, date=DATE, time=TIME, repeat=choice("daily", "weekly", "monthly"), optional=("repeat",)),
        set_reminder,
    ),
    Tool(
        "find_free_slot",
        "Find the first free slot of a day.",
        record(date=DATE, minutes=COUNT, part_of_day=choice("morning", "afternoon", "evening")),
        find_free_slot,
    ),
    Tool(
        "switch_lights",
        "Switch the lights of a room.",
        record(room=ROOM, state=choice("on", "off", "dimmed")),
        switch_lights,
    ),
    Tool(
        "set_heating",
        "Set the temperature of a room.",
        record(room=ROOM, celsius={"type": "number", "minimum": 5, "maximum": 30}, until=TIME, optional=("until",)),
        set_heating,
    ),
]
