"""Counters of a run, merged over its parts, written and read back."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from ttpa.sampling.report import SamplingReport


def part(n, exact_trunks=1):
    """A report in which every number is a multiple of n."""
    report = SamplingReport(
        decisions=5 * n,
        trees=3 * n,
        pairs=4 * n,
        leaves=9 * n,
        exact_trunks=exact_trunks,
        duplicates=2 * n,
        without_pair=n,
        prefilled_tokens=1000 * n,
        shared_prompt_tokens=500 * n,
        decoded_tokens=100 * n,
        verified_tokens=60 * n,
        accepted_tokens=50 * n,
        passes=30 * n,
        forks=Counter(name=n, string=2 * n),
        dropped_forks=Counter(leaves=3 * n),
        seconds=1.5 * n,
    )
    report.drop(f"d{n}:1", "over max_length")
    return report


def test_parts_add_up():
    merged = SamplingReport.merge([part(1), part(2, exact_trunks=4)])
    expected = part(3, exact_trunks=5)
    expected.dropped = part(1).dropped + part(2).dropped
    assert merged == expected
    assert SamplingReport.merge([]) == SamplingReport()


def test_merging_leaves_the_parts_alone():
    one, two = part(1), part(2)
    SamplingReport.merge([one, two]).drop("more", "reason")
    SamplingReport.merge([one]).forks["name"] += 1
    assert (one, two) == (part(1), part(2))


def test_parts_without_trunks_have_none_together():
    assert SamplingReport.merge([part(1, exact_trunks=None)] * 2).exact_trunks is None
    assert SamplingReport.merge([part(1, exact_trunks=None), part(1, exact_trunks=0)]).exact_trunks == 0


def test_a_report_is_written_and_read_back():
    for report in (part(2), part(1, exact_trunks=None), SamplingReport()):
        assert SamplingReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    again = SamplingReport.from_dict(part(1).to_dict())
    assert SamplingReport.merge([again, again]).forks == part(2).forks, "what was read back can be counted further"
    with pytest.raises(TypeError, match="tress"):
        SamplingReport.from_dict({**part(1).to_dict(), "tress": 1})


def test_the_record_has_what_follows_from_the_counters():
    record = part(2).to_dict()
    assert record["pairs_per_1000_tokens"] == 1000 * 8 / 200
    assert record["dropped_by_reason"] == {"over max_length": 1}
    assert list(record["forks"]) == ["string", "name"], "the most frequent class first"
    assert SamplingReport().to_dict()["pairs_per_1000_tokens"] == 0.0


def test_the_table_ends_with_what_came_of_it():
    lines = [" ".join(line.split()) for line in part(2).table().splitlines()]
    assert lines[-5:] == [
        "usable pairs 8",
        "pairs per 1,000 decoded tokens 40.0",
        "forks: string 4",
        "forks: name 2",
        "forks dropped: leaves 6",
    ]
    assert {"dropped: over max_length 1", "shared prompt tokens 1000", "accepted tokens 100"} <= set(lines)
    assert "exact trunks 1" in lines and "exact trunks" not in part(1, exact_trunks=None).table()
    assert len({len(line) for line in part(2).table().splitlines()}) == 1, "columns are aligned"
