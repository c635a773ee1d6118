"""What people want from the shop and their accounts."""

from __future__ import annotations

from typing import Any

from ttpa.construct.recipes.recipe import Steps, Unusable, succeeded
from ttpa.construct.values import Values
from ttpa.tools.call import Call
from ttpa.tools.toolbox import Toolbox

CATEGORY = {
    "home": ("for the house", "in household goods"),
    "outdoor": ("for hiking", "in the camping section"),
    "books": ("to read or play", "in the book corner"),
    "electronics": ("with a plug or battery", "among the gadgets"),
    "clothing": ("to wear", "in fashion"),
}
SORT = {
    "price": ("cheapest first", "by price"),
    "rating": ("best rated first", "by reviews"),
    "newest": ("latest first", "by release date"),
}
COLOR = {
    "black": ("black", "dark"),
    "white": ("white", "snow-coloured"),
    "red": ("red", "crimson"),
    "blue": ("blue", "navy"),
}
DELIVERY = {
    "standard": ("the normal way", "with standard shipping", "no hurry"),
    "express": ("as fast as possible", "by express", "overnight"),
    "pickup": ("to be picked up", "and I fetch it myself", "for collection"),
}
REASON = {
    "damaged": ("it is broken", "it arrived in pieces", "it does not work"),
    "wrong_item": ("it is not what I ordered", "they sent the wrong thing", "it was mixed up"),
    "late": ("it came too late", "it took too long", "I needed it last week"),
    "unwanted": ("I changed my mind", "I do not like it", "I no longer want it"),
}
ACCOUNT = {
    "checking": ("checking account", "everyday account"),
    "savings": ("savings account", "savings", "rainy-day fund"),
    "credit": ("credit card", "card account"),
}
CURRENCY = {"EUR": ("euros", "EUR"), "USD": ("dollars", "USD"), "GBP": ("pounds", "sterling")}


def buy_product(v: Values, box: Toolbox) -> Steps:
    query = v.rng.choice(v.products)
    arguments: dict[str, Any] = {"query": query}
    extra = ""
    if v.chance(0.4):
        arguments["max_price"], price = v.money()
        extra += f" for at most {price}"
    if v.chance(0.3):
        arguments["sort"], order = v.word(SORT)
        extra += f", {order}"
    rows = succeeded((yield [Call("search_products", arguments)]))["products"]
    if not rows:
        raise Unusable
    number, many = v.count()
    cart: dict[str, Any] = {"product_id": rows[0]["id"], "quantity": number}
    color = ""
    if v.chance(0.4):
        cart["color"], color = v.word(COLOR)
        color += " "
    succeeded((yield [Call("add_to_cart", cart)]))
    question = v.phrase(
        [
            "Look for a {q}{x} and put {m} {c}ones into my cart.",
            "I want {m} {c}pieces of a {q}{x}. Search and add them.",
            "Search {q}{x}, then add {m} {c}ones.",
        ],
        ["My cart needs {m} {c}ones of a {q}; look it up{x}."],
        q=query,
        x=extra,
        m=many,
        c=color,
    )
    return question, f"{rows[0]['id']} is in the cart."


def search_products(v: Values, box: Toolbox) -> Steps:
    query, (category, section) = v.rng.choice(v.products), v.word(CATEGORY)
    arguments: dict[str, Any] = {"query": query, "category": category}
    extra = ""
    if v.chance(0.4):
        arguments["max_price"], price = v.money()
        extra += f", up to {price}"
    if v.chance(0.4):
        arguments["sort"], order = v.word(SORT)
        extra += f", {order}"
    result = succeeded((yield [Call("search_products", arguments)]))
    question = v.phrase(
        ["Is there a {q} {s}{x}?", "Find a {q} {s}{x}.", "Look {s} for a {q}{x}."],
        ["Any {q} {s}{x}?"],
        q=query,
        s=section,
        x=extra,
    )
    return question, f"I found {len(result['products'])}."


def place_order(v: Values, box: Toolbox) -> Steps:
    street, city, (delivery, how) = (
        f"{v.rng.choice(v.streets)} Street {v.rng.randint(1, 99)}",
        v.rng.choice(v.cities),
        v.word(DELIVERY),
    )
    result = succeeded(
        (yield [Call("place_order", {"address": {"street": street, "city": city}, "delivery": delivery})])
    )
    question = v.phrase(
        [
            "Order my cart to {s} in {c}, {how}.",
            "Send what is in the cart to {s}, {c}, {how}.",
            "Check out, {how}: {s}, {c}.",
        ],
        ["{s} in {c} is where my cart should go, {how}."],
        s=street,
        c=city,
        how=how,
    )
    return question, f"The order is {result['order_id']}."


def order_status(v: Values, box: Toolbox) -> Steps:
    key = v.rng.choice(list(box.state["orders"]))
    result = succeeded((yield [Call("order_status", {"order_id": key})]))
    question = v.phrase(
        ["Where is order {k}?", "What about my order {k}?", "Has {k} been sent?"], ["Any news of {k}?"], k=key
    )
    return question, f"It is {result['status']}."


def return_item(v: Values, box: Toolbox) -> Steps:
    key = v.rng.choice(list(box.state["orders"]))
    items = succeeded((yield [Call("order_status", {"order_id": key})]))["items"]
    if len(items) < 2:
        raise Unusable
    position, (reason, why) = v.rng.randrange(2), v.word(REASON)
    succeeded((yield [Call("return_item", {"order_id": key, "product_id": items[position], "reason": reason})]))
    question = v.phrase(
        ["Send the {n} item of order {k} back, {why}.", "I return the {n} thing from {k}: {why}."],
        ["The {n} piece in {k} goes back because {why}."],
        n=("first", "second")[position],
        k=key,
        why=why,
    )
    return question, f"{key} will be refunded."


def transfer_money(v: Values, box: Toolbox) -> Steps:
    recipient, (money, much) = v.person(), v.money()
    arguments: dict[str, Any] = {"recipient": recipient, "money": money}
    extra = ""
    if v.chance(0.4):
        arguments["account"], account = v.word(ACCOUNT)
        extra += f" from my {account}"
    if v.chance(0.3):
        arguments["date"], on = v.date()
        extra += f" on {on}"
    result = succeeded((yield [Call("transfer_money", arguments)]))
    question = v.phrase(
        ["Send {m} to {r}{x}.", "Transfer {m}{x} to {r}.", "Pay {r} {m}{x}."],
        ["{r} gets {m}{x}."],
        m=much,
        r=recipient,
        x=extra,
    )
    return question, f"{result['balance']} EUR are left."


def convert_currency(v: Values, box: Toolbox) -> Steps:
    (money, much), (to, target) = v.money(), v.word(CURRENCY)
    if money["currency"] == to:
        raise Unusable
    result = succeeded((yield [Call("convert_currency", {"money": money, "to": to})]))
    question = v.phrase(
        ["How much is {m} in {t}?", "Convert {m} to {t}."], ["What do I get in {t} for {m}?"], m=much, t=target
    )
    return question, f"It is {result['amount']} {to}."


def get_balance(v: Values, box: Toolbox) -> Steps:
    account, said = v.word(ACCOUNT)
    result = succeeded((yield [Call("get_balance", {"account": account})]))
    question = v.phrase(["How much is on my {a}?", "What is left on the {a}?"], ["Is there money on my {a}?"], a=said)
    return question, f"{result['balance']} EUR."
