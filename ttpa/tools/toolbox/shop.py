"""Shop and wallet: products, cart, orders, returns, money."""

from __future__ import annotations

import random
from typing import Any

from ttpa.tools.toolbox.schemas import COUNT, DATE, MONEY, NAME, TEXT, choice, record
from ttpa.tools.toolbox.tool import State, Tool, ToolError, find, new_id

CATEGORIES = ("home", "outdoor", "books", "electronics", "clothing")
RATES = {"EUR": 1.0, "USD": 1.1, "GBP": 0.85}


def initial_state(rng: random.Random, names: list[str]) -> State:
    """Twenty products of these names, three orders and three accounts in euros."""
    products = {}
    for number, name in enumerate(rng.sample(names, 20)):
        products[f"p{rng.randrange(10 * number + 100, 10 * number + 110)}"] = {
            "name": name,
            "category": CATEGORIES[number % len(CATEGORIES)],
            "price": rng.randint(5, 200),
        }
    orders = {}
    for number in range(3):
        items = rng.sample(list(products), 2)
        status = rng.choice(("packed", "shipped", "delivered"))
        orders[f"o{rng.randrange(100 * number + 500, 100 * number + 600)}"] = {"items": items, "status": status}
    accounts = {name: rng.randint(2000, 9000) for name in ("checking", "savings", "credit")}
    return {"products": products, "cart": {}, "orders": orders, "accounts": accounts}


def search_products(state: State, arguments: dict[str, Any]) -> Any:
    limit = arguments.get("max_price")
    euros = limit["amount"] / RATES[limit["currency"]] if limit else float("inf")
    rows = [
        {"id": key, "name": product["name"], "price": product["price"]}
        for key, product in state["products"].items()
        if arguments["query"].lower() in product["name"] and product["price"] <= euros
        if arguments.get("category", product["category"]) == product["category"]
    ]
    return {"products": rows}


def add_to_cart(state: State, arguments: dict[str, Any]) -> Any:
    find(state["products"], arguments["product_id"], "product")
    state["cart"][arguments["product_id"]] = {name: arguments[name] for name in arguments if name != "product_id"}
    return {"items": len(state["cart"])}


def place_order(state: State, arguments: dict[str, Any]) -> Any:
    key = new_id(state["orders"], "o")
    state["orders"][key] = {"items": list(state["cart"]), "status": "packed", **arguments}
    state["cart"] = {}
    return {"order_id": key}


def order_status(state: State, arguments: dict[str, Any]) -> Any:
    return find(state["orders"], arguments["order_id"], "order")


def return_item(state: State, arguments: dict[str, Any]) -> Any:
    order = find(state["orders"], arguments["order_id"], "order")
    if arguments["product_id"] not in order["items"]:
        raise ToolError("not_found", f"{arguments['product_id']} is not in order {arguments['order_id']}")
    order["items"].remove(arguments["product_id"])
    return {"returned": arguments["product_id"]}


def transfer_money(state: State, arguments: dict[str, Any]) -> Any:
    euros = round(arguments["money"]["amount"] / RATES[arguments["money"]["currency"]], 2)
    account = arguments.get("account", "checking")
    if euros > state["accounts"][account]:
        raise ToolError("insufficient_funds", f"{account} holds {state['accounts'][account]} EUR")
    state["accounts"][account] = round(state["accounts"][account] - euros, 2)
    return {"balance": state["accounts"][account]}


def convert_currency(state: State, arguments: dict[str, Any]) -> Any:
    rate = RATES[arguments["to"]] / RATES[arguments["money"]["currency"]]
    return {"amount": round(arguments["money"]["amount"] * rate, 2), "currency": arguments["to"]}


def get_balance(state: State, arguments: dict[str, Any]) -> Any:
    return {"balance": state["accounts"][arguments["account"]]}


ACCOUNT = choice("checking", "savings", "credit")
TOOLS = [
    Tool(
        "search_products",
        "Search the shop.",
        record(
            query=NAME,
            category=choice(*CATEGORIES),
            max_price=MONEY,
            sort=choice("price", "rating", "newest"),
            optional=("category", "max_price", "sort"),
        ),
        search_products,
    ),
    Tool(
        "add_to_cart",
        "Put a product into the cart.",
        record(product_id=NAME, quantity=COUNT, color=choice("black", "white", "red", "blue"), optional=("color",)),
        add_to_cart,
    ),
    Tool(
        "place_order",
        "Order what is in the cart.",
        record(address=record(street=NAME, city=NAME), delivery=choice("standard", "express", "pickup")),
        place_order,
    ),
    Tool("order_status", "Look an order up.", record(order_id=NAME), order_status),
    Tool(
        "return_item",
        "Send an item of an order back.",
        record(order_id=NAME, product_id=NAME, reason=choice("damaged", "wrong_item", "late", "unwanted")),
        return_item,
    ),
    Tool(
        "transfer_money",
        "Send money to somebody.",
        record(
            recipient=NAME, money=MONEY, account=ACCOUNT, date=DATE, note=TEXT, optional=("account", "date", "note")
        ),
        transfer_money,
    ),
    Tool(
        "convert_currency",
        "Convert an amount.",
        record(money=MONEY, to=choice("EUR", "USD", "GBP")),
        convert_currency,
    ),
    Tool("get_balance", "Balance of an account.", record(account=ACCOUNT), get_balance),
]
