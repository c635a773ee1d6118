"""Messages: contacts, groups, sending and filing."""

from __future__ import annotations

import random
from typing import Any

from ttpa.tools.toolbox.schemas import COUNT, FLAG, NAME, TEXT, array, choice, record
from ttpa.tools.toolbox.tool import State, Tool, ToolError, find, new_id


def initial_state(rng: random.Random, people: list[str]) -> State:
    """Eight contacts and six messages from them."""
    contacts = {}
    for number, name in enumerate(rng.sample(people, 8)):
        phone = "".join(rng.choice("0123456789") for _ in range(7))
        contacts[f"c{rng.randrange(10 * number + 100, 10 * number + 110)}"] = {"name": name, "phone": phone}
    messages = {}
    for number, sender in enumerate(rng.sample(list(contacts), 6)):
        folder, unread = rng.choice(("inbox", "inbox", "archive")), rng.random() < 0.5
        messages[f"m{300 + 7 * number}"] = {"from": sender, "folder": folder, "unread": unread}
    return {"contacts": contacts, "messages": messages, "groups": {}}


def find_contact(state: State, arguments: dict[str, Any]) -> Any:
    for key, contact in state["contacts"].items():
        if contact["name"].lower() == arguments["name"].lower():
            return {"contact_id": key, "phone": contact["phone"]}
    raise ToolError("not_found", f"no contact {arguments['name']!r}")


def add_contact(state: State, arguments: dict[str, Any]) -> Any:
    if any(contact["name"] == arguments["name"] for contact in state["contacts"].values()):
        raise ToolError("conflict", f"{arguments['name']} is a contact already")
    key = new_id(state["contacts"], "c")
    state["contacts"][key] = arguments
    return {"contact_id": key}


def send_message(state: State, arguments: dict[str, Any]) -> Any:
    find(state["contacts"], arguments["contact_id"], "contact")
    key = new_id(state["messages"], "m")
    state["messages"][key] = {"folder": "sent", "unread": False, **arguments}
    return {"message_id": key}


def list_messages(state: State, arguments: dict[str, Any]) -> Any:
    rows = [
        {"id": key, "from": state["contacts"][message["from"]]["name"]}
        for key, message in state["messages"].items()
        if message["folder"] == arguments["folder"] and "from" in message
        if message["unread"] or not arguments.get("unread_only", False)
    ]
    return {"messages": rows[: arguments.get("limit", len(rows))]}


def archive_message(state: State, arguments: dict[str, Any]) -> Any:
    message = find(state["messages"], arguments["message_id"], "message")
    if message["folder"] == "archive":
        raise ToolError("conflict", f"{arguments['message_id']} is in the archive already")
    message["folder"] = "archive"
    return {"archived": arguments["message_id"]}


def create_group(state: State, arguments: dict[str, Any]) -> Any:
    if arguments["name"] in state["groups"]:
        raise ToolError("conflict", f"there is a group {arguments['name']!r}")
    state["groups"][arguments["name"]] = arguments["members"]
    return {"group": arguments["name"], "size": len(arguments["members"])}


TOOLS = [
    Tool("find_contact", "Look a contact up by name.", record(name=NAME), find_contact),
    Tool(
        "add_contact",
        "Add a contact.",
        record(
            name=NAME,
            phone={"type": "string", "pattern": r"^\d{7}$"},
            circle=choice("friend", "colleague", "relative"),
            optional=("circle",),
        ),
        add_contact,
    ),
    Tool(
        "send_message",
        "Send a message to a contact.",
        record(
            contact_id=NAME,
            text=TEXT,
            channel=choice("sms", "email", "chat"),
            urgent=FLAG,
            optional=("urgent",),
        ),
        send_message,
    ),
    Tool(
        "list_messages",
        "List messages of a folder.",
        record(
            folder=choice("inbox", "sent", "archive"),
            unread_only=FLAG,
            limit=COUNT,
            optional=("unread_only", "limit"),
        ),
        list_messages,
    ),
    Tool("archive_message", "Move a message to the archive.", record(message_id=NAME), archive_message),
    Tool("create_group", "Make a group of people.", record(name=NAME, members=array(NAME)), create_group),
]
