"""One exact number with its unit, or nothing."""

from fractions import Fraction

import pytest

from selftaught.tasks.quantities import quantity, same_quantity, stated_value, unit_named


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
        (r"5\text{ cm}^2", 5, "centimeter^2"),
        ("5 square feet", 5, "foot^2"),
        ("90°", 90, "degree"),
        ("20 °C", 20, "degree c"),
        (r"0.\overline{3}", Fraction(1, 3), ""),
        (r"0.1\overline{6}", Fraction(1, 6), ""),
        ("1.234.567", 1234567, ""),
        ("1.234,56", Fraction(30864, 25), ""),
        ("3,5", Fraction(7, 2), ""),
        ("0,125", Fraction(1, 8), ""),
        ("3½ cups", Fraction(7, 2), "cup"),
        ("60 miles per hour", 60, "mile per hour"),
        ("60 mph", 60, "mile per hour"),
        ("5 m/s", 5, "meter per second"),
        ("$18 per day", 18, "dollar per day"),
        ("12 red apples in the basket", 12, "red apple"),
        ("4 rolls left over", 4, "roll"),
        ("12 years old", 12, "year"),
        ("a total of 12 boxes", 12, "box"),
        ("thirty-one days", 31, "day"),
        ("10³", 1000, ""),
        ("2**4", 16, ""),
        ("007", 7, ""),
    ],
)
def test_a_quantity_is_an_exact_number_and_its_unit(
    text: str, value: int | Fraction, unit: str
) -> None:
    found = quantity(text)
    assert found is not None
    assert (found.value, found.unit) == (value, unit)


@pytest.mark.parametrize(
    "text",
    ["", "x", "3x", "1/0", "12,34,56", "1,000,00", "1.2.3", "5 and 6", "1e999999999", "1e-999999999",
     "9" * 5000, "0." + "3" * 5000, "1e" + "9" * 5000, "--5", "5 +", "\u0665", "nan", "inf", "9^99999",
     "0^-1", "\u202e21", "5 K", "5M", "$5m", "5 bn", "5 per", "5'", '5"', "-$-5", "minus -5", "1½½", "2 by 4",
     "1 in 5", "one out of five", "two and a half", "five hundred", "5 BC", "5 tens", "12 a.m", "1,0000",
     "5 below zero", "0.333...", "5 times as many", "101 in base 2", "x ≠ 5", "x ≥ 5", "x := = 5"],
)  # fmt: skip
def test_what_is_no_number_or_too_long_is_not_read(text: str) -> None:
    assert quantity(text) is None


def test_a_name_or_an_equation_in_front_is_passed_over() -> None:
    assert stated_value("The answer is x = 19.") == "19"
    assert stated_value("2 + 3 = 5 apples") == "5 apples"
    assert stated_value("x = 3, y = 4") is None
    assert stated_value("x = 3 y = 4") is None
    assert stated_value("x != 5") is None


def test_in_formulas_a_comma_separates_and_words_are_no_unit() -> None:
    assert quantity("3,5", strict=True) is None
    assert quantity("x = 3", strict=True) is None
    assert quantity(r"12\text{ apples}", strict=True) is None
    assert quantity(r"12\text{ cm}", strict=True) == quantity("12 cm")
    assert quantity("1,234", strict=True) == quantity("1234")


@pytest.mark.parametrize(
    ("gold", "answer", "same"),
    [
        ("5", "5 cm", True), ("5 cm", "5", True), ("5 cm", "5 centimetres", True), ("5 cm", "5 m", False),
        ("5 cm", "5 apples", False), ("5 apples", "5", True), ("5 apples", "5 pears", False),
        ("5", "5 apples", True), ("5", "5 m", False), ("5 m", "5 m", True), ("5 m", "5 meters", True),
        ("5%", "5", False), ("5", "5%", False), ("$5", "€5", False), ("$5", "5 dollars", True),
        ("£5", "5 pounds", True), ("5 lb", "5 pounds", True), ("£5", "5 lb", False),
        ("$18", "$18 per day", True), ("5 m", "5 m per second", False), ("$18 per day", "$18 per hour", False),
        ("1 hour", "60 minutes", False), ("5 cm^2", "5 cm", False),
    ],
)  # fmt: skip
def test_units_agree_or_one_is_left_out(gold: str, answer: str, same: bool) -> None:
    left, right = quantity(gold), quantity(answer)
    assert left is not None and right is not None
    assert same_quantity(left, right) is same


def test_units_are_named_only_from_the_table() -> None:
    assert unit_named(r"\text{ cm}^2") == "centimeter^2"
    assert unit_named("inches") == "inch"
    assert unit_named("apples") is None
    assert unit_named("million") is None
