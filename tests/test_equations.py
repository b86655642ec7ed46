"""Equations in rationales, judged by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selftaught.rollouts.equations import equations, wrong_equations


@pytest.mark.parametrize(
    "text",
    [
        "12 + 7 = 19. 19 - 3 = 16. The answer is 16.",
        "5 - 8 = -3.",
        "-3 - 4 = -7, so it is -7.",
        "The rolls: 48 + 36 = 84 rolls, 84 - 71 = 13 are left.",
        "1 + 2 + 3 = 3 + 3 = 6",
        "2 * (3 + 4) = 14 and 15 / 4 = 3.75",
        "10 / 3 = 3.33, 10 / 3 = 3.3333",
        "1,200 + 300 = 1,500",
        "$5 \u00d7 3 = $15 and 6 \u2212 7 = \u22121",
        "(1 + 2) * 3 = 9",
        "2.5+2.5=5",
        ".25 * 4 = 1",
        "1.5 + .5 * 2 = 2.5",
        "3 x 4 + 2 = 14",
        "3 \\times 4 + 2 = 14",
        "3 \u22c5 4 + 2 = 14",
        "1 +\n2 + 3 = 6",
        "It is known (2 + 2 = 4) well.",
        "2/3 = 0.66 and 2/3 = 0.67",
    ],
)
def test_right_equations_hold(text: str):
    assert equations(text)
    assert not wrong_equations(text)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("61 - 89 = -124. 124 - 96 = -124.", [("61 - 89", "- 124"), ("124 - 96", "- 124")]),
        ("8 - 7 = -3", [("8 - 7", "- 3")]),
        ("1 + 2 + 3 = 3 + 4 = 6", [("1 + 2 + 3", "3 + 4"), ("3 + 4", "6")]),
        ("10 / 3 = 3.35", [("10 / 3", "3.35")]),
        ("19\n19 - 3 = 15\n", [("19 - 3", "15")]),
        ("(2 + 2 = 5)", [("2 + 2", "5")]),
        ("2 + 2 = 5 apples", [("2 + 2", "5")]),
        ("So: -3 - 4 = 7", [("- 3 - 4", "7")]),
    ],
)
def test_wrong_equations_are_named(text: str, wrong: list[tuple[str, str]]):
    assert [equation[:2] for equation in wrong_equations(text)] == wrong


@pytest.mark.parametrize(
    "text",
    [
        "3x + 4 = 10",
        "x - 4 = 10 and 3*x = 15",
        "20% of 50 + 5 = 15",
        "50 * 20% = 10",
        "1 + 1 = 2x",
        "5 / 0 = 7",
        "7 = 8",
        "1 2 + 3 = 4",
        "the sum of 3 + 4 = 9",
        "2^3 + 1 = 9",
        "((((1 + 1 = 3",
        "3 ^ 2 + 1 = 10",
        "\u221a16 + 2 = 6",
        "17 % 5 + 1 = 3",
        "17 mod 5 + 1 = 3",
        "10 minus 3 + 5 = 12",
        "negative 3 + 5 = 2",
        "Half of the 10 + 2 = 7",
        "f (2) + 3 = 7",
        "x -3 + 2 = 7",
        "5 pounds -2 + 1 = 4",
        "9:00 + 3 = 12:00",
        "1/4 = 25 %",
        "1/4 = 25 percent",
        "30 + 30 = 1 hour",
        "3 * 1000000 = 3 million",
        "12 / 5 = 2 remainder 2",
        "17 / 5 = 3 R2",
        "5 + 4 = 3 ^ 2",
        "4 + 4 = 2\u00b3",
        "10 + 2.5 = 12\u00bd",
        "4*3*2*1 = 4!",
        "",
    ],
)
def test_what_cannot_be_read_is_not_judged(text: str):
    assert wrong_equations(text) == []


@given(st.text(alphabet="0123456789+-*/()=., x%$", max_size=80) | st.text(max_size=60))
def test_no_text_makes_it_fail(text: str):
    assert all(equation in equations(text) for equation in wrong_equations(text))


@pytest.mark.parametrize("piece", ["(", "1+", "1=", "-", "1,1", "1.", "9"])
def test_long_texts_take_no_time(piece: str):
    equations(piece * 20_000)


def test_calculator_spans_are_the_equations_where_there_are_any():
    text = "48/2 = <<48/2=24>>24 clips in May, and 1 + 1 = 3 is not asked. <<48+24=72>>72\n#### 72"
    assert [one[:2] for one in equations(text)] == [("48 / 2", "24"), ("48 + 24", "72")]
    assert not wrong_equations(text)
    assert [one[:2] for one in wrong_equations("<<48/2=25>>25 and 2+2=4")] == [("48 / 2", "25")]


def test_a_span_ends_where_it_ends():
    """What one leaves open is not finished by the next."""
    assert [one[:2] for one in equations("<<1+2=>>3 and <<3+4=7>>7")] == [("3 + 4", "7")]
    assert equations("<<12+>> <<3=15>>") == []


def test_what_is_remembered_of_a_text_cannot_be_changed_from_outside():
    text = "2 + 2 = 4. 2 + 3 = 5."
    equations(text).clear()
    assert len(equations(text)) == 2


PIECES = st.lists(
    st.sampled_from(
        ["12", "3", "0.5", ".", ",", " ", "\n", "+", "-", "*", "/", "=", "(", ")", "apples", "half",
         "of", "x", "%", ":", ";", "?", "$", "twice", "a" * 30, "_", "<<", ">>", "7", " = ", "é"]
    ),
    max_size=24,
)  # fmt: skip


@given(PIECES)
def test_looking_only_around_equals_signs_changes_nothing(parts: list[str]):
    """The whole text read at once is the naive twin."""
    from selftaught.rollouts import equations as room

    text = "".join(parts).translate(room._SIGNS)
    whole = [sides for sides in room._chains(text) if any(sides)]
    pieces = [sides for piece in room._pieces(text) for sides in room._chains(piece) if any(sides)]
    assert pieces == whole
