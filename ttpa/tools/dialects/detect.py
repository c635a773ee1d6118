"""Which dialect a tokenizer's chat template writes."""

from __future__ import annotations

from typing import Any

from ttpa.tools.dialects import DIALECTS
from ttpa.tools.dialects.dialect import Dialect


def dialect_of(tokenizer: Any) -> Dialect:
    return DIALECTS[getattr(tokenizer, "tool_dialect", None) or "hermes"]
