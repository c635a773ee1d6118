"""The page: its template, style and script, and the records of all trees, in one file that loads nothing else."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import re
from pathlib import Path
from typing import Any

from ttpa.viewer.records import Recorder

PAGE = Path(__file__).parent / "page"
SCRIPTS = ("data.js", "colors.js", "filter.js", "list.js", "hover.js", "tree.js", "main.js")
"""The parts of the script, in the order in which they stand on the page."""


def html_page(recorder: Recorder, *, title: str, facts: dict[str, Any]) -> str:
    """The page as text. The records are gzipped JSON in base64, which holds nothing that HTML could take for a tag, and
    the script shows them as text only. The content security policy forbids every request, and every script and style
    but the two of the page, which it names by their hashes."""
    style = (PAGE / "page.css").read_text(encoding="utf-8")
    script = "\n".join((PAGE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    records = "\n".join([recorder.header(facts), *recorder.lines]).encode("ascii")
    parts = {
        "title": html.escape(title),
        "policy": (
            f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; "
            "base-uri 'none'; form-action 'none'"
        ),
        "style": style,
        "script": script,
        # without a time the same trees make the same page
        "records": base64.b64encode(gzip.compress(records, compresslevel=6, mtime=0)).decode("ascii"),
    }
    template = (PAGE / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda mark: parts[mark[1]], template)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
