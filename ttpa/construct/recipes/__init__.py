"""One recipe for every thing that people want from the built-in toolbox."""

from ttpa.construct.recipes import calendar, messages, shop, travel
from ttpa.construct.recipes.recipe import Recipe, Unusable

SEEN: list[Recipe] = [
    calendar.create_event,
    calendar.move_event,
    calendar.cancel_event,
    calendar.list_events,
    calendar.set_reminder,
    calendar.book_free_slot,
    calendar.switch_lights,
    calendar.set_heating,
    messages.send_message,
    messages.add_contact,
    messages.archive_newest,
    messages.list_messages,
    shop.buy_product,
    shop.search_products,
    shop.place_order,
    shop.order_status,
    shop.return_item,
    shop.transfer_money,
    shop.get_balance,
    travel.book_flight,
    travel.book_hotel,
    travel.get_weather,
]
"""What training shows. The order is part of the seed's meaning: append."""

UNSEEN: list[Recipe] = [messages.create_group, shop.convert_currency, travel.rent_car]
UNSEEN_TOOLS = ("create_group", "convert_currency", "rent_car")
"""Tools that only the split `unseen_tools` offers, one for each recipe of UNSEEN."""

__all__ = ["SEEN", "UNSEEN", "UNSEEN_TOOLS", "Recipe", "Unusable"]
