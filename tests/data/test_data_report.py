from __future__ import annotations

import json

from ttpa.data.report import DataReport


def report() -> DataReport:
    made = DataReport(path="a.jsonl", format="preference", read=4, kept=1, counts={"pairs": 2})
    made.drop("r1", "a.jsonl:1", "identical")
    made.drop("r2", "a.jsonl:2", "over max_length", "9 tokens, max_length is 8")
    made.drop("r3", "a.jsonl:3", "identical")
    made.repair("r4", "a.jsonl:4", "null arguments left out", "weather")
    made.count("pairs")
    made.note("column 'x' is not used")
    made.note("column 'x' is not used")
    return made


def test_the_record_counts_by_reason_and_lists_ids(tmp_path):
    report().save(tmp_path / "new" / "data_report.json")
    record = json.loads((tmp_path / "new" / "data_report.json").read_text())
    assert record == report().to_dict()
    assert record["dropped_by_reason"] == {"identical": 2, "over max_length": 1}
    assert record["repaired_by_kind"] == {"null arguments left out": 1}
    assert [entry["id"] for entry in record["dropped"]] == ["r1", "r2", "r3"]
    assert record["counts"] == {"pairs": 3} and record["notes"] == ["column 'x' is not used"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["data_report.json"]


def test_the_table():
    lines = report().table().splitlines()
    assert lines[0] == "a.jsonl (preference)" and lines[-1] == "  note: column 'x' is not used"
    rows = {line[:-8].strip(): int(line[-8:]) for line in lines[1:-1]}
    assert rows == {
        "rows read": 4,
        "pairs": 3,
        "dropped: identical": 2,
        "dropped: over max_length": 1,
        "repaired: null arguments left out": 1,
        "trees kept": 1,
    }


def test_reports_of_several_files_are_added_up():
    one, other = report(), report()
    other.path, other.format = "b.jsonl", "trees"
    whole = DataReport.joined([one, other])
    assert (whole.path, whole.format, whole.unit) == ("a.jsonl, b.jsonl", "preference, trees", "rows")
    assert (whole.read, whole.kept, whole.counts["pairs"]) == (8, 2, 2 * one.counts["pairs"])
    assert whole.dropped == one.dropped + other.dropped and whole.repaired == one.repaired * 2
    assert whole.notes == one.notes
    assert DataReport.joined([one]) is one
