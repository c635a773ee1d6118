"""The formats of rows that people bring, each in a file of its own."""

from ttpa.data.formats.chat import CHAT
from ttpa.data.formats.format import RowFormat
from ttpa.data.formats.preference import PREFERENCE

FORMATS: tuple[RowFormat, ...] = (PREFERENCE, CHAT)
"""In the order in which they are tried on the first row of a file."""
