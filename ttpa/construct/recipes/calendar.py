"""What people want from the calendar and the house."""

from __future__ import annotations

from typing import Any

from ttpa.construct.recipes.recipe import Steps, succeeded
from ttpa.construct.values import Values
from ttpa.tools.call import Call
from ttpa.tools.toolbox import Toolbox

CALENDAR = {
    "work": ("in the work calendar", "for work", "on the office calendar"),
    "home": ("in the home calendar", "at home", "on my private calendar"),
    "family": ("in the family calendar", "with the kids", "on the calendar we share"),
}
REPEAT = {
    "daily": ("every day", "daily", "each day"),
    "weekly": ("every week", "weekly", "once a week"),
    "monthly": ("every month", "monthly", "once a month"),
}
ROOM = {
    "kitchen": ("kitchen", "room where we cook"),
    "bedroom": ("bedroom", "room where I sleep"),
    "office": ("office", "study", "room where I work"),
    "hall": ("hall", "corridor", "entrance"),
}
LIGHT = {"on": ("on", "on again"), "off": ("off", "out"), "dimmed": ("low", "down a bit")}
PART = {
    "morning": ("in the morning", "before noon", "early in the day"),
    "afternoon": ("in the afternoon", "after lunch"),
    "evening": ("in the evening", "after work"),
}


def create_event(v: Values, box: Toolbox) -> Steps:
    title, (date, on), (start, at), (minutes, long) = v.rng.choice(v.titles), v.date(), v.time(), v.minutes()
    arguments: dict[str, Any] = {"title": title, "date": date, "start": start, "minutes": minutes}
    extra = ""
    if v.chance(0.35):
        arguments["attendees"] = v.people(v.rng.randint(1, 2))
        extra += f" with {v.listed(arguments['attendees'])}"
    if v.chance(0.35):
        arguments["calendar"], place = v.word(CALENDAR)
        extra += f" {place}"
    result = succeeded((yield [Call("create_event", arguments)]))
    question = v.phrase(
        [
            "Put a {t} on {on} at {at} for {long}{x}.",
            "Schedule the {t}{x}: {on}, {at}, {long}.",
            "I need {long} for a {t} on {on} from {at}{x}.",
        ],
        ["Block {long} from {at} on {on}{x}, it is the {t}."],
        t=title,
        on=on,
        at=at,
        long=long,
        x=extra,
    )
    return question, f"The {title} is {result['event_id']}."


def move_event(v: Values, box: Toolbox) -> Steps:
    key, event = v.rng.choice(list(box.snapshot()["events"].items()))
    succeeded((yield [Call("list_events", {"date": event["date"]})]))
    (date, on), (start, at) = v.date(), v.time()
    succeeded((yield [Call("move_event", {"event_id": key, "date": date, "start": start})]))
    question = v.phrase(
        ["Move the {t} of {old} to {on} at {at}.", "The {t} on {old} has to go to {on}, {at}."],
        ["Push the {t} planned for {old} to {at} on {on}."],
        t=event["title"],
        old=v.date(event["date"])[1],
        on=on,
        at=at,
    )
    return question, f"{key} is now on {date} at {start}."


def cancel_event(v: Values, box: Toolbox) -> Steps:
    key, event = v.rng.choice(list(box.state["events"].items()))
    succeeded((yield [Call("list_events", {"date": event["date"]})]))
    arguments: dict[str, Any] = {"event_id": key}
    extra = ""
    if v.chance(0.5):
        arguments["notify"], extra = v.rng.choice(
            [
                (True, " and tell the others"),
                (False, " without telling anybody"),
                (True, " and let everybody know"),
                (False, ", quietly"),
            ]
        )
    succeeded((yield [Call("cancel_event", arguments)]))
    question = v.phrase(
        ["Cancel the {t} on {old}{x}.", "I can't make the {t} of {old}, drop it{x}."],
        ["Take the {t} off my plan for {old}{x}."],
        t=event["title"],
        old=v.date(event["date"])[1],
        x=extra,
    )
    return question, f"{key} is cancelled."


def list_events(v: Values, box: Toolbox) -> Steps:
    date, on = v.date()
    arguments = {"date": date}
    extra = ""
    if v.chance(0.5):
        arguments["calendar"], extra = v.word(CALENDAR)
    result = succeeded((yield [Call("list_events", arguments)]))
    question = (
        v.phrase(
            ["What is on {on} {x}?", "Show me {on} {x}.", "Which events are there on {on} {x}?"],
            ["Am I busy on {on} {x}?"],
            on=on,
            x=extra,
        )
        .replace(" ?", "?")
        .replace(" .", ".")
    )
    return question, f"There are {len(result['events'])} events."


def set_reminder(v: Values, box: Toolbox) -> Steps:
    text, (date, on), (time, at) = v.rng.choice(v.messages), v.date(), v.time()
    arguments = {"text": text, "date": date, "time": time}
    extra = ""
    if v.chance(0.4):
        arguments["repeat"], often = v.word(REPEAT)
        extra = f", {often}"
    result = succeeded((yield [Call("set_reminder", arguments)]))
    question = v.phrase(
        [
            "Remind me on {on} at {at} that {t}{x}.",
            "Set a reminder for {at} on {on}{x}: {t}.",
            "On {on}, {at}, tell me that {t}{x}.",
        ],
        ["Don't let me forget that {t}: {on} at {at}{x}."],
        on=on,
        at=at,
        t=text,
        x=extra,
    )
    return question, f"Reminder {result['reminder_id']} is set."


def book_free_slot(v: Values, box: Toolbox) -> Steps:
    title, (date, on), (minutes, long), (part, when) = v.rng.choice(v.titles), v.date(), v.minutes(), v.word(PART)
    slot = succeeded((yield [Call("find_free_slot", {"date": date, "minutes": minutes, "part_of_day": part})]))
    succeeded(
        (yield [Call("create_event", {"title": title, "date": date, "start": slot["start"], "minutes": minutes})])
    )
    question = v.phrase(
        ["Find {long} on {on} {w} and put the {t} there.", "Fit a {t} of {long} in on {on}, {w}."],
        ["Where is room for {long} {w} on {on}? Use it for the {t}."],
        on=on,
        long=long,
        w=when,
        t=title,
    )
    return question, f"The {title} starts at {slot['start']}."


def switch_lights(v: Values, box: Toolbox) -> Steps:
    rooms = v.rng.sample(list(ROOM), 2 if v.chance(0.4) else 1)
    state, how = v.word(LIGHT)
    for result in (yield [Call("switch_lights", {"room": room, "state": state}) for room in rooms]):
        succeeded([result])
    question = v.phrase(
        [
            "Turn the lights {how} in the {r}.",
            "Lights {how} in the {r}, please.",
            "I want the lights in the {r} {how}.",
        ],
        ["Make it so that the lights are {how} in the {r}."],
        how=how,
        r=v.listed([v.rng.choice(ROOM[room]) for room in rooms]),
    )
    return question, f"The lights are {state}."


def set_heating(v: Values, box: Toolbox) -> Steps:
    (room, where), celsius = (
        v.word(ROOM),
        v.rng.choice([15, 16, 17, 18, 19, 20, 21, 22, 23, 17.5, 18.5, 19.5, 20.5, 21.5]),
    )
    arguments: dict[str, Any] = {"room": room, "celsius": celsius}
    extra = ""
    if v.chance(0.5):
        arguments["until"], until = v.time()
        extra = f" until {until}"
    said = f"{int(celsius)} and a half" if celsius % 1 and v.chance(0.6) else str(celsius)
    succeeded((yield [Call("set_heating", arguments)]))
    question = v.phrase(
        ["Heat the {r} to {c} degrees{x}.", "Set the {r} to {c}{x}.", "I want {c} degrees in the {r}{x}."],
        ["Bring the {r} to {c} degrees{x}."],
        r=where,
        c=said,
        x=extra,
    )
    return question, f"The {room} is set to {celsius}."
