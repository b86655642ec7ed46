import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selftaught.answers import (
    after_answer_is,
    after_marker,
    choice_letter,
    final_number,
    first_line,
    first_number,
    last_boxed,
    last_line,
    last_number,
    normalised,
    quantity,
    same_choice,
    same_expression,
    same_number,
    same_text,
    split_unit,
)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 + 4 = 7 apples, so 7.", "7"),
        ("so 10-5=5", "5"),
        ("The answer is $1,234.50.", "1,234.50"),
        ("#### 72\nQ: how about 5", "72"),
        ("First 3.\n#### 1,000,000 dollars", "1,000,000"),
        ("it is \u22127 degrees", "-7"),
        ("a loss of -$5", "-5"),
        ("cut it in 3/4", "3/4"),
        ("use 1 1/2 cups", "1 1/2"),
        ("about 2e5 people", "2e5"),
        ("that is 50%", "50"),
        ("1, 2, 3", "3"),
        ("**42**", "42"),
        ("\\boxed{12} and then 99", "12"),
        ("The answer is 8. That took 3 steps.", "8"),
        ("there is none", None),
        ("#### none, not 5", "5"),
        ("####", None),
        ("", None),
    ],
)
def test_the_final_number_of_a_completion_is_read(text: str, number: str | None) -> None:
    assert final_number(text) == number


def test_first_and_last_number_differ_where_there_are_two() -> None:
    assert (first_number("from 3 to 1,500"), last_number("from 3 to 1,500")) == ("3", "1,500")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("Therefore, the answer is blotter (e).", "E"),
        ("(c)", "C"),
        ("**D**", "D"),
        ("b) because", "B"),
        ("Answer: A", "A"),
        ("Could be (a), but no. The answer is (b).", "B"),
        ("The answer is \\boxed{C}", "C"),
        ("A cat sat", None),
        ("the best (x) choice", None),
        ("", None),
    ],
)
def test_the_choice_of_a_completion_is_read(text: str, letter: str | None) -> None:
    assert choice_letter(text) == letter


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{1} no, \boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"$\boxed 5$", "5"),
        (r"\fbox{x}", "x"),
        (r"\boxed{\text{a } b}", r"\text{a } b"),
        (r"\boxed{never closed", None),
        (r"\boxed{}", None),
        ("no box", None),
    ],
)
def test_the_last_box_is_read_with_balanced_braces(text: str, inside: str | None) -> None:
    assert last_boxed(text) == inside


def test_lines_and_markers_are_read() -> None:
    assert first_line("\n a \nb\n") == "a"
    assert last_line("a\n b \n\n") == "b"
    assert first_line(" \n") is None
    assert after_marker("x #### 5 \nmore #### 6", "####") == "5"
    assert after_marker("none here", "####") is None
    assert after_answer_is("The answer is 4. No: the answer is $x+1$.\nBye") == "$x+1$"
    assert after_answer_is("I do not know.") is None


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("1,234", 1234, ""),
        ("-$1,234.50", Fraction(-2469, 2), "dollar"),
        (r"\$5", 5, "dollar"),
        ("50%", 50, "%"),
        (r"50\%", 50, "%"),
        (".75", Fraction(3, 4), ""),
        ("1 1/2", Fraction(3, 2), ""),
        ("-1 1/2", Fraction(-3, 2), ""),
        (r"-2\frac{1}{3}", Fraction(-7, 3), ""),
        (r"\dfrac34", Fraction(3, 4), ""),
        ("1.5e3", 1500, ""),
        (r"1.5\times 10^{-3}", Fraction(3, 2000), ""),
        (r"5\text{ cm}^2", 5, "cm^2"),
        ("5 square feet", 5, "foot^2"),
        ("90°", 90, "degree"),
    ],
)
def test_a_quantity_is_an_exact_number_and_its_unit(
    text: str, value: int | Fraction, unit: str
) -> None:
    assert quantity(text) == (value, unit)


@pytest.mark.parametrize(
    "text",
    ["", "x", "3x", "1/0", "12,34", "1,000,00", "1.2.3", "5 and 6", "1e999999999", "1e-999999999",
     "9" * 5000, "0." + "3" * 5000, "1e" + "9" * 5000, "--5", "5 +", "\u0665", "nan", "inf"],
)  # fmt: skip
def test_what_is_no_number_or_too_long_is_not_read(text: str) -> None:
    assert quantity(text) is None


def test_percent_is_neither_its_number_nor_its_fraction() -> None:
    assert same_number("50%", "50 percent").equal is True
    assert same_number("50%", "50").equal is False
    assert same_number("50%", "0.5").equal is False
    assert same_number("0.5", "50%").equal is False


def test_each_verdict_names_its_stage() -> None:
    assert same_number("3/4", "0.75") == (True, "number")
    assert same_number("3/4", "three quarters") == (None, "not a number")
    assert same_choice("(C)", "c") == (True, "choice")
    assert same_choice("C", "seven") == (None, "not a choice")
    assert same_text("Paris", " paris. ") == (True, "text")
    assert same_text(" ", " ") == (None, "empty gold")
    assert same_expression("(C)", "(B)") == (False, "choice")
    assert same_expression(r"\frac12x", r"\frac{1}{2} x") == (True, "literal")
    assert same_expression(r"\frac12", "0.5") == (True, "number")
    assert same_expression(r"\text{even}", "odd") == (False, "text")
    assert same_expression("120_8", "120_7") == (False, "another base")
    assert same_expression("(x+1)^2", "x^2+2x+1") == (None, "form")
    assert same_expression("", "") == (None, "empty gold")


def test_a_unit_is_split_from_a_formula() -> None:
    assert split_unit(normalised(r"6\pi\text{ cm}^2")) == (r"6\pi", "cm^2")
    assert split_unit(normalised(r"3\sqrt{2} inches")) == (r"3\sqrt{2}", "inch")
    assert split_unit(normalised("x + y")) == ("x + y", "")


@given(st.fractions(), st.fractions())
def test_numbers_are_equal_exactly_when_their_fractions_are(
    left: Fraction, right: Fraction
) -> None:
    assert same_number(str(left), str(right)).equal is (left == right)
    assert same_number(str(left), str(left)).equal is True


@given(
    st.decimals(
        allow_nan=False, allow_infinity=False, places=6, min_value=-(10**9), max_value=10**9
    )
)
def test_a_decimal_is_the_same_number_with_thousands_commas(number: object) -> None:
    assert same_number(f"{number:f}", f"{number:,f}").equal is True


READERS = [
    after_answer_is, choice_letter, final_number, first_line, first_number, last_boxed, last_line,
    last_number, normalised, quantity, split_unit,
]  # fmt: skip
COMPARISONS = [same_number, same_choice, same_text, same_expression]


@given(
    st.text(
        alphabet=st.sampled_from("0123456789.,-+/\\{}()[]$%^_ =aeipxc\n#*\u2212é\ud800"),
        max_size=60,
    )
    | st.text()
)
@settings(max_examples=400, deadline=None)
def test_nothing_raises_on_any_text(text: str) -> None:
    for read in READERS:
        read(text)
    for same in COMPARISONS:
        same(text, text)
        same("5", text)


ADVERSARIES = [
    "1", "1,", "1,111", "1.", "1 ", "1/", "1 1/", "-", "- ", " ", "$", "*", "(", "(a", "(a)", "\\", "\\\\", "{", "}",
    "\\boxed{", "\\boxed", "\\text{", "\\text {a", "\\frac", "\\frac{", "\\frac1", "\\sqrt", "answer", "the answer is ",
    "answer:", "####", "\n", " ,", ", ", "and ", " and", "a ", "ab ", "_1", "^{1}", "^", "%", "e1", "1e", "=", "x=",
    "\u2212", "0.", "**", "$$", "\\(", "\\left", "option ", "square ", "\\text{a}^", "{1}", "\\!", "\\ ",
]  # fmt: skip


@pytest.mark.parametrize("unit", ADVERSARIES)
def test_reading_100_000_characters_takes_time_linear_in_them(unit: str) -> None:
    text = (unit * (100_000 // len(unit) + 1))[:100_000]
    started = time.perf_counter()
    for read in READERS:
        read(text)
    for same in COMPARISONS:
        same("12", text)
    assert time.perf_counter() - started < 5  # a quadratic pattern takes minutes


@pytest.mark.slow
@given(st.lists(st.sampled_from(ADVERSARIES), min_size=1, max_size=4))
@settings(max_examples=15, deadline=5000)
def test_reading_mixed_adversarial_text_takes_linear_time(units: list[str]) -> None:
    unit = "".join(units)
    text = "1 " + unit * (100_000 // len(unit))
    for read in READERS:
        read(text)
    same_expression(text, "12")
