"""What people want from their contacts and messages."""

from __future__ import annotations

from typing import Any

from ttpa.construct.recipes.recipe import Steps, Unusable, succeeded
from ttpa.construct.values import Values
from ttpa.tools.call import Call
from ttpa.tools.toolbox import Toolbox

CHANNEL = {
    "sms": ("by text", "as an SMS"),
    "email": ("by email", "by mail"),
    "chat": ("in the chat", "as a chat message"),
}
CIRCLE = {
    "friend": ("a friend", "a mate of mine"),
    "colleague": ("a colleague", "from work"),
    "relative": ("a relative", "family"),
}
FOLDER = {
    "inbox": ("inbox", "incoming mail"),
    "sent": ("sent folder", "outgoing mail"),
    "archive": ("archive", "old mail"),
}


def send_message(v: Values, box: Toolbox) -> Steps:
    name = v.rng.choice(list(box.state["contacts"].values()))["name"]
    contact = succeeded((yield [Call("find_contact", {"name": name})]))
    text, (channel, how) = v.rng.choice(v.messages), v.word(CHANNEL)
    arguments = {"contact_id": contact["contact_id"], "text": text, "channel": channel}
    extra = ""
    if v.chance(0.4):
        urgent, extra = v.rng.choice([(True, " It is urgent."), (False, " No rush."), (True, " Mark it as important.")])
        arguments["urgent"] = urgent
    succeeded((yield [Call("send_message", arguments)]))
    question = v.phrase(
        ["Tell {n} {how} that {t}.{x}", "Write to {n} {how}: {t}.{x}", "Let {n} know {how} that {t}.{x}"],
        ["{n} should hear {how} that {t}.{x}"],
        n=name,
        how=how,
        t=text,
        x=extra,
    )
    return question, f"{name} has been told."


def add_contact(v: Values, box: Toolbox) -> Steps:
    name, phone = v.person(), v.digits(7)
    arguments = {"name": name, "phone": phone}
    extra = ""
    if v.chance(0.5):
        arguments["circle"], who = v.word(CIRCLE)
        extra = f", {who}"
    result = succeeded((yield [Call("add_contact", arguments)]))
    question = v.phrase(
        ["Add {n}{x}, phone {p}.", "Save the number {p} of {n}{x}.", "New contact: {n}{x}, {p}."],
        ["{n}{x} can be reached at {p}, keep that."],
        n=name,
        p=phone,
        x=extra,
    )
    return question, f"{name} is contact {result['contact_id']}."


def archive_newest(v: Values, box: Toolbox) -> Steps:
    folder, where = v.word({"inbox": FOLDER["inbox"]})
    arguments: dict[str, Any] = {"folder": folder}
    extra = ""
    if v.chance(0.5):
        arguments["unread_only"], extra = True, v.rng.choice([" I have not read", " that is unread", " that is new"])
    rows = succeeded((yield [Call("list_messages", arguments)]))["messages"]
    if not rows:
        raise Unusable
    row = v.rng.choice(rows)
    succeeded((yield [Call("archive_message", {"message_id": row["id"]})]))
    question = v.phrase(
        ["Archive the message from {n}{x} in my {f}.", "File away what {n} wrote{x}, it is in the {f}."],
        ["The message by {n}{x} can leave my {f} for the archive."],
        n=row["from"],
        x=extra,
        f=where,
    )
    return question, f"{row['id']} is in the archive."


def list_messages(v: Values, box: Toolbox) -> Steps:
    folder, where = v.word(FOLDER)
    arguments: dict[str, Any] = {"folder": folder}
    unread, some = "", "the"
    if v.chance(0.4):
        arguments["unread_only"], unread = True, v.rng.choice(["unread ", "new "])
    if v.chance(0.5):
        arguments["limit"], number = v.count()
        some = f"the first {number}" if number != "a couple of" else number
    result = succeeded((yield [Call("list_messages", arguments)]))
    question = v.phrase(
        [
            "Show me {some} {u}messages in my {f}.",
            "What are {some} {u}messages in the {f}?",
            "List {some} {u}messages of the {f}.",
        ],
        ["Read out {some} {u}messages from the {f}."],
        some=some,
        u=unread,
        f=where,
    )
    return question, f"There are {len(result['messages'])} messages."


def create_group(v: Values, box: Toolbox) -> Steps:
    title, members = v.rng.choice(v.titles), v.people(v.rng.randint(2, 3))
    result = succeeded((yield [Call("create_group", {"name": title, "members": members})]))
    question = v.phrase(
        ["Make a group {t} with {m}.", "Put {m} into a group called {t}."],
        ["{m} should form the group {t}."],
        t=title,
        m=v.listed(members),
    )
    return question, f"The group has {result['size']} members."
