"""Where a completion thinks and where it answers."""

import pytest

from selftaught.thought_marks import after_thought, checked_marks, outside_thoughts


@pytest.mark.parametrize(
    ("text", "opened", "after"),
    [
        ("no thought", False, "no thought"),
        ("<think>a</think>b", False, "b"),
        ("a</think>b", False, "b"),
        ("a</think>b", True, "b"),
        ("a", True, None),
        ("<think>a", False, None),
        ("said <think>a", False, None),
        ("said <think>a</think> again", False, " again"),
        ("<think>a</think>b<think>c</think>d", False, "d"),
        ("<think>a</think>b<think>c", False, None),
        ("<think>a<think>b</think>c", False, "c"),
        ("<think>a</think>b</think>c", False, "c"),
        ("<think>a</think>", False, ""),
        ("", False, ""),
        ("", True, None),
        ("<think>", False, None),
    ],
)
def test_the_answer_stands_after_the_last_thought(
    text: str, opened: bool, after: str | None
) -> None:
    assert after_thought(text, opened=opened) == after


def test_spans_outside_thoughts() -> None:
    text = "ab<think>cd</think>ef<think>g"
    assert [text[a:b] for a, b in outside_thoughts(text)] == ["ab", "ef"]


def test_other_marks() -> None:
    assert after_thought("[T]a[/T]b", ("[T]", "[/T]")) == "b"


@pytest.mark.parametrize("marks", ["<think>", ["a"], ["", "b"], ["a", "a"], None, [1, 2]])
def test_marks_that_are_no_pair_are_refused(marks: object) -> None:
    with pytest.raises(ValueError, match="two different texts"):
        checked_marks(marks)
