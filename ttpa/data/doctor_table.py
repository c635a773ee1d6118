"""A checkup as text: what the terminal shows of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from ttpa.data.doctor import Checkup, summary

NUM_ERRORS, NUM_PLACES = 20, 3
"""How many errors of a file are printed, and how many places of each reason, repair and finding."""

_COMMANDS = {"dialogues": "sample", "evaluation": "evaluate"}


def checkup_table(checkup: Checkup) -> str:
    """All numbers of a checkup, the first errors and the first places of everything else; the record has the rest."""
    report = checkup.report
    counts = {f"{report.unit} read": report.read, **report.counts, f"{report.kind} kept": report.kept}
    sections = {
        "": [(name, count, "") for name, count in counts.items()] if report.read else [],
        f"{_COMMANDS.get(checkup.holds or '', 'train')} leaves out": _by_kind(report.dropped, "reason"),
        "not used as it stands in the file": _by_kind(report.repaired, "repair"),
        "worth a look": _by_kind(checkup.findings, "finding"),
        "tokens by class": _shares(checkup.tokens),
    }
    width = max((len(name) for rows in sections.values() for name, *_ in rows), default=0)
    lines = [f"{report.path}: " + (f"{checkup.holds} ({report.format})" if checkup.holds else "not read")]
    for title, rows in sections.items():
        if rows:
            lines += [f"  {title}"] if title else []
            lines += [f"    {name:<{width}}  {count:>11,}  {more}".rstrip() for name, count, more in rows]
    lines += _length_lines(checkup.lengths, width)
    lines += [f"  note: {note}" for note in report.notes]
    if checkup.errors:
        lines.append(f"  errors: {len(checkup.errors):,}")
        lines += [f"    {error}" for error in checkup.errors[:NUM_ERRORS]]
        if len(checkup.errors) > NUM_ERRORS:
            lines.append(f"    and {len(checkup.errors) - NUM_ERRORS:,} more, which --json FILE lists")
    return "\n".join(lines)


def _by_kind(entries: Sequence[dict[str, str]], key: str) -> list[tuple[str, int, str]]:
    counts, ids = Counter(entry[key] for entry in entries), dict[str, dict[str, None]]()
    for entry in entries:
        ids.setdefault(entry[key], {})[entry["id"]] = None
    rows = []
    for name, count in counts.most_common():
        more = ", ..." if len(ids[name]) > NUM_PLACES else ""
        rows.append((name, count, ", ".join(list(ids[name])[:NUM_PLACES]) + more))
    return rows


def _shares(tokens: Counter[str]) -> list[tuple[str, int, str]]:
    total = sum(tokens.values())
    return [(name, count, f"{100 * count / total:5.1f} %") for name, count in tokens.items() if count]


def _length_lines(lengths: dict[str, list[int]], width: int) -> list[str]:
    if not lengths["whole"]:
        return []
    summaries = [summary(values) for values in lengths.values()]
    bins = [part["histogram"] for part in summaries]
    lines = [f"  {'lengths in tokens':<{width + 2}}" + "".join(f"  {name:>11}" for name in lengths)]
    lines += [_line(name, [part[name] for part in summaries], width) for name in ("least", "median", "95 %", "most")]
    bound, last = (pick(int(key) for part in bins for key in part) for pick in (min, max))
    while bound <= last:
        counts = [part.get(str(bound), 0) for part in bins]
        bar = "#" * math.ceil(40 * counts[-1] / max(bins[-1].values()))
        lines.append(f"{_line(f'up to {bound:,}', counts, width)}  {bar}".rstrip())
        bound *= 2
    return lines


def _line(name: str, numbers: list[int], width: int) -> str:
    return f"    {name:<{width}}" + "".join(f"  {number:>11,}" for number in numbers)
