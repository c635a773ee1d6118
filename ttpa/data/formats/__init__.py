"""The formats of rows that people bring, each in a file of its own."""

from ttpa.data.formats.bfcl import BFCL
from ttpa.data.formats.chat import CHAT
from ttpa.data.formats.format import RowFormat
from ttpa.data.formats.glaive import GLAIVE
from ttpa.data.formats.llama_factory import LLAMA_FACTORY
from ttpa.data.formats.preference import PREFERENCE
from ttpa.data.formats.share_gpt import SHARE_GPT
from ttpa.data.formats.tool_preference import TOOL_PREFERENCE
from ttpa.data.formats.toolace import TOOLACE
from ttpa.data.formats.unpaired import UNPAIRED
from ttpa.data.formats.when2call import WHEN2CALL, WHEN2CALL_TEST
from ttpa.data.formats.xlam import XLAM

FORMATS: tuple[RowFormat, ...] = (
    BFCL,
    WHEN2CALL_TEST,
    WHEN2CALL,
    TOOL_PREFERENCE,
    LLAMA_FACTORY,
    UNPAIRED,
    PREFERENCE,
    CHAT,
    XLAM,
    GLAIVE,
    TOOLACE,
    SHARE_GPT,
)
"""In the order in which they are tried on the first row of a file."""
