"""Old names of parameters and columns keep working."""

import json
from pathlib import Path

import pytest

from selftaught.deprecation import renamed_parameter
from selftaught.records import Preference, read_preferences, to_json


def test_an_old_name_warns_and_arrives_under_the_new_one():
    @renamed_parameter("old", "new")
    def doubled(one: int, *, new: int = 0) -> int:
        return one + 2 * new

    assert doubled(1, new=2) == 5
    with pytest.warns(DeprecationWarning, match="'old' is deprecated; use 'new'"):
        assert doubled(1, old=3) == 7  # pyright: ignore[reportCallIssue]
    with pytest.warns(DeprecationWarning), pytest.raises(TypeError, match="got both"):
        doubled(1, new=2, old=3)  # pyright: ignore[reportCallIssue]


def test_preferences_have_the_old_field_and_the_old_column(tmp_path: Path):
    pair = Preference("q", "a", "b", (1, 2), (3,), (4,))
    with pytest.warns(DeprecationWarning, match="begun"):
        old = Preference("q", "a", "b", begun=(1, 2))  # pyright: ignore[reportCallIssue]
    assert old.prefix_tokens == (1, 2)
    with pytest.warns(DeprecationWarning, match="begun"):
        assert pair.begun == (1, 2)
    row = json.loads(to_json(pair))
    assert list(row) == ["prompt", "chosen", "rejected", "begun", "chosen_ids", "rejected_ids"]
    path = tmp_path / "preferences.jsonl"
    for column in ("begun", "prefix_tokens"):
        path.write_text(
            json.dumps({column: row["begun"]} | {k: row[k] for k in row if k != "begun"})
        )
        assert read_preferences(path) == [pair]
