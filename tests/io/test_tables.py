"""Records as CSV: what pandas or Python's reader gets back."""

import csv
import io

from mia.io.tables import csv_text

HOSTILE = 'a,"b"\nc\x1b[2J'


def test_columns_are_all_names_in_order() -> None:
    rows: list[dict[str, object]] = [{"a": 1, "b": None}, {"a": 2.5, "c": float("nan")}]
    assert csv_text(rows) == "a,b,c\n1,,\n2.5,,\n"
    assert csv_text([]) == "\n"


def test_text_comes_back_as_it_was() -> None:
    (row,) = csv.DictReader(io.StringIO(csv_text([{HOSTILE: HOSTILE, "n": 0.1 + 0.2}])))
    assert row == {HOSTILE: HOSTILE, "n": "0.30000000000000004"}
    assert csv_text([{"a": "\ud800"}]) == "a\n\\ud800\n"


def test_records_within_become_columns_and_lists_json() -> None:
    rows = [{"share": {"value": 0.5, "low": {"x": 1}}, "heads": [{"layer": 1}], "none": {}}]
    assert csv_text(rows) == 'share.value,share.low.x,heads,none\n0.5,1,"[{""layer"": 1}]",{}\n'
