"""Where a completion states its answer, and whether two answers are the same."""

import time
from collections.abc import Sequence
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selftaught.tasks.answers import (
    after_marker,
    choice_letter,
    closing_brace,
    last_boxed,
    same_choice,
    same_number,
    same_text,
    stated_number,
    stated_text,
)
from selftaught.tasks.latex import normalised, same_expression, split_unit, stated_latex
from selftaught.tasks.quantities import _NUMBER_WORDS, quantity, stated_value


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is $1,234.50.", "$1,234.50"),
        ("First 3.\n#### 1,000,000 dollars", "1,000,000 dollars"),
        ("\\boxed{12} and then 99", None),
        ("The answer is 8. That took 3 steps.", "8"),
        ("The answer is 14 because 7 + 7 = 14.", "14"),
        ("**Answer:** 19", "19"),
        ("**Final Answer**\n\\boxed{19}", "19"),
        ("Answer:\n\n19", "19"),
        ("## Answer\n19", "19"),
        ("The final answer would be 5.", "5"),
        ("The answer to 2+3 is 5.", "5"),
        ("#### The answer is 5", "5"),
        ("#### 5 ####", "5"),
        ("#### Step 1\n2+3\n#### 5", "5"),
        ("$$\\boxed{5}$$", "5"),
        ("\\(\\boxed{5}\\) meters", "5"),
        ("- \\boxed{5}", "5"),
        ("**\\boxed{5}**", "5"),
        ("so $\\boxed{28}\\%$", "28%"),
        ("\\boxed{5}. I am sure this answer is correct.", "5"),
        ("\\boxed{5}\n\nQuestion: next\n\\boxed{6}", "5"),
        ("Question: what is 2+3?\nThe answer is 5.", "5"),
        ("\\boxed{\\boxed{5}}", "5"),
        # not one stated number
        ("3 + 4 = 7 apples, so 7.", None),
        ("it is 7 degrees", None),
        ("#### none, not 5", None),
        ("####", None),
        ("", None),
        ("not \\boxed{5}", None),
        ("about \\boxed{5}", None),
        ("$x > \\boxed{5}$", None),
        ("$-\\boxed{5}$", None),
        ("2\\boxed{5}", None),
        ("$\\sqrt{\\boxed{5}}$", None),
        ("\\boxed{5} million", None),
        ("\\boxed{5} or more", None),
        ("\\boxed{5} or 6", None),
        ("$\\boxed{5} + x$", None),
        ("\\boxed{5} is wrong", None),
        ("\\boxed{5}, \\boxed{6}", None),
        ("\\boxed{4} and then \\boxed{5", None),
        ("\\boxed{5}. The answer is 6.", None),
        ("\\boxed{5}\n#### 6", None),
        ("#### 5\n#### 6", None),
        ("The answer isn't 5.", None),
        ("The answer is 5, the answer is 6.", None),
        ("The answer is 5. Actually, it is 6.", None),
        ("\\boxed{5}\nWait, I made a mistake.", None),
        ("The answer is 3 in. by 4 in.", None),
        ("A common wrong answer is 16.", None),
        ("Suppose the answer is 10. Then both sides differ.", None),
        ("The answer is one of the red balls.", None),
        ("The answer is 2x = 38.", None),
        ("The answer is 10, not 9.", "10"),
        ("\\boxed{2} apples and \\boxed{9} pears", None),
        ("The answer is 12 p.m. Monday", None),
    ],
)  # fmt: skip
def test_the_stated_number_is_read_whole(text: str, number: str | None) -> None:
    assert stated_number(text) == number


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
        ("The answer is (B) bank.", "B"),
        ("The answer is B. bank", "B"),
        ("The answer is a.", "A"),
        ("B\nThe others are dry.", "B"),
        ("Option B is the best answer.", "B"),
        ("The answer is B rather than A.", "B"),
        ("The answer is bread and butter (c).", "C"),
        ("A cat sat", None),
        ("the best (x) choice", None),
        ("It could be (b).", None),
        ("The answer is (a) or (b).", None),
        ("The answer is A, B.", None),
        ("The answer is A and C.", None),
        ("The answer is neither (a) nor (b).", None),
        ("The answer is not blotter (c).", None),
        ("The answer is B is wrong.", None),
        ("(b) is incorrect.", None),
        ("The answer is vitamin C.", None),
        ("The answer is a dog.", None),
        ("The answer is (b). No, (c).", None),
        ("", None),
    ],
)
def test_the_choice_of_a_completion_is_read(text: str, letter: str | None) -> None:
    assert choice_letter(text) == letter


@pytest.mark.parametrize(
    ("text", "formula"),
    [
        (r"\boxed{1}, or rather \boxed{\{2\}}", r"\{2\}"),
        (r"The answer is $x+1$.", "$x+1$"),
        (r"The answers are \boxed{512} and \boxed{729}.", "512, 729"),
        (r"It is \boxed{840} \boxed{840}", "840"),
        (r"$\frac12$", r"$\frac12$"),
        (r"The answer is $5$ or $6$.", "5  or  6"),
        ("I give up after 12 tries", None),
        ("I don't know.", None),
        ("", None),
    ],
)
def test_the_stated_formula_is_read(text: str, formula: str | None) -> None:
    found = stated_latex(text)
    assert (found and found.strip()) == formula


def test_stated_text_is_a_whole_line() -> None:
    assert stated_text("It rains. The answer is New York.") == "New York"
    assert stated_text("New York.") == "New York"
    assert stated_text("two\nlines") is None


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


def test_markers_and_braces_are_read() -> None:
    assert after_marker("x #### 5 \nmore #### 6", "####") == "5"
    assert after_marker("none here", "####") is None
    assert closing_brace(r"{a\}{b}}", 0) == 7
    assert closing_brace("{", 0) is None


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
    assert same_expression(r"\emptyset", "no solution") == (True, "empty set")
    assert same_expression("", "") == (None, "empty gold")


def test_a_unit_is_split_from_a_formula_and_words_are_no_unit() -> None:
    assert split_unit(normalised(r"6\pi\text{ cm}^2")) == (r"6\pi", "centimeter^2")
    assert split_unit(normalised(r"3\sqrt{2} inches")) == (r"3\sqrt{2}", "inch")
    assert split_unit(normalised("x + y")) == ("x + y", "")
    for words in ("million", "or more", "is wrong", "dozen", "p.m.", "(not sure)"):
        assert split_unit(rf"3\pi\text{{ {words}}}")[1] == ""


# --- properties ----------------------------------------------------------------------------------


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


def spellings(number: int) -> list[str]:
    """Ways of writing an integer, each made by hand from its digits."""
    sign, digits = ("-" if number < 0 else ""), str(abs(number))
    grouped = f"{abs(number):,}"
    written = [
        sign + digits,
        sign + grouped,
        sign + grouped.replace(",", "{,}"),
        sign + grouped.replace(",", " "),
        sign + grouped.replace(",", "\\,"),
        sign + grouped.replace(",", "\u202f"),
        sign + grouped.replace(",", "_"),
        ("\u2212" if sign else "") + digits,
        ("minus " if sign else "") + digits,
        sign + "".join(chr(0xFF10 + int(digit)) for digit in digits),
        sign + digits + ".0",
        f"{sign}{digits}00 \\times 10^{{-2}}",
        f"{sign}{digits}e0",
        f"{sign}\\frac{{{2 * abs(number)}}}{{2}}",
        f"**{sign}{digits}**",
        f"${sign}{digits}$",
        f"\\text{{{sign}{digits} apples}}",
        f"{sign}{digits} apples",
        f"{sign}{digits} cm",
        f"x = {sign}{digits}",
        f"{sign}${digits} per day",
    ]
    words = {value: word for word, value in _NUMBER_WORDS.items()}
    if abs(number) in words:
        written.append(("minus " if sign else "") + words[abs(number)])
    return written


TEMPLATES = [
    "The answer is {}.",
    "#### {}",
    "\\boxed{{{}}}",
    "So 1 + 1 = 2.\nThe answer is {}.",
    "Answer: {}",
]


@given(st.integers(-(10**7), 10**7), st.integers(-(10**7), 10**7), st.sampled_from(TEMPLATES))
@settings(max_examples=150, deadline=None)
def test_every_spelling_of_a_value_is_right_and_no_spelling_of_another(
    gold: int, other: int, template: str
) -> None:
    for written in spellings(gold):
        answer = stated_number(template.format(written))
        assert answer is not None, written
        assert same_number(str(gold), answer).equal is True, written
    if other != gold:
        for written in spellings(other):
            answer = stated_number(template.format(written))
            assert answer is not None and same_number(str(gold), answer).equal is False, written


NOT_ONE_VALUE = [
    "{} or {}", "{} and {}", "between {} and {}", "{}-{}", "{} to {}", "{}, {}", "({}, {})", "{} + {}", "{} x {}",
    "{}:{}", "{}/{}/{}", "{} million", "{}k", "{} dozen", "at least {}", "more than {}", "not {}", "about {}",
    "{} hours {} minutes", "{}th", "{} p.m.", "{}:30", "{}x", "{}\\pi", "\\sqrt{{{}}}", "{}!", "{}?", "{}+", "~{}",
    "{} is wrong", "{} (not sure)", "{} hundred", "{} thirds", "{} percent of {}", "x = {}, y = {}", "x > {}",
    "0x{}", "{} mod {}", "{} remainder {}", "{} squared", "{} or so", "\\pm {}", "{}...",
]  # fmt: skip


@given(st.integers(0, 10**5), st.sampled_from(TEMPLATES))
@settings(max_examples=100, deadline=None)
def test_what_is_not_one_value_is_no_answer(number: int, template: str) -> None:
    for pattern in NOT_ONE_VALUE:
        phrase = pattern.format(number, number, number)
        assert stated_number(template.format(phrase)) is None, phrase


@given(st.sampled_from("abcde"), st.sampled_from("abcde"))
def test_every_spelling_of_a_choice_is_read(gold: str, other: str) -> None:
    forms = [
        "({})",
        "{}",
        "**({})**",
        "\\text{{{}}}",
        "option {}",
        "({}) bank",
        "{}) bank",
        "bank ({})",
    ]
    for letter in (gold, other):
        for form in forms:
            for template in ("The answer is {}.", "\\boxed{{{}}}", "Answer: {}"):
                read = choice_letter(template.format(form.format(letter.upper())))
                assert read is not None and read == letter.upper(), (form, template)
                assert same_choice(gold, read).equal is (gold == letter)
    if gold != other:
        for form in ("({}) or ({})", "({}) and ({})", "{}/{}", "both ({}) and ({})"):
            assert choice_letter(f"The answer is {form.format(gold, other)}.") is None


READERS = [
    choice_letter, last_boxed, normalised, quantity, split_unit, stated_latex, stated_number, stated_text,
    stated_value,
]  # fmt: skip
COMPARISONS = [same_number, same_choice, same_text, same_expression]


@given(
    st.text(
        alphabet=st.sampled_from("0123456789.,-+/\\{}()[]$%^_ =aeipxc\n#*\u2212é\ud800½\x00\u202e"),
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
    "\\boxed{", "\\boxed", "\\boxed{1}", "\\boxed{1} and ", "\\text{", "\\text {a", "\\frac", "\\frac{", "\\frac1",
    "\\sqrt", "answer", "the answer is ", "answer:", "####", "#### 5\n", "#### 5\nwait\n", "\n", " ,", ", ", "and ",
    "a ", "ab ", "_1", "^{1}", "^", "%", "e1", "1e", "=", "x=", "\u2212", "0.", "**", "$$", "\\(", "\\left", "option ",
    "square ", "\\text{a}^", "{1}", "\\!", "\\ ", "the answer is 5\n", "the answer is 5. ", "answer to ", "wait", "but ",
    "(b) ", "not ", "A: ", "Q:\n", "because ", "½", "step 1\n#### Step\n", "so ", "five ", "it is ", "\u200b", "\x00",
    "<answer>", "</answer>", "<answer>5</answer>", "so it is 4. ", "that is not ", "the a ", "4 is ", "no, ", "; ", "4 = 5 ",
    "1+", "5 (", "5 (1", "(5)", "\\pm", "AB", "</s>", " of ", "wait 4, ", "答案是", "3*4=12 ", "2^", "\\text{Area}=", "i\n",
]  # fmt: skip


@pytest.mark.parametrize("unit", ADVERSARIES)
def test_reading_20_000_characters_takes_little_time(unit: str) -> None:
    """A quadratic pattern takes seconds for these; the test below has longer texts."""
    _read_in_time(unit, 20_000, 0.4, ("",))


@pytest.mark.slow
@pytest.mark.parametrize("unit", ADVERSARIES)
def test_reading_100_000_characters_takes_time_linear_in_them(unit: str) -> None:
    _read_in_time(unit, 100_000, 5.0, ("", "the answer is ", "\\boxed{5} "))  # quadratic: minutes


def _read_in_time(unit: str, length: int, seconds: float, prefixes: Sequence[str]) -> None:
    """Check the processor time of every reader and comparison, which other processes do not change."""
    for prefix in prefixes:
        text = (prefix + unit * (length // len(unit) + 1))[:length]
        for read in READERS:
            started = time.process_time()
            read(text)
            assert time.process_time() - started < seconds, read
        for same in COMPARISONS:
            started = time.process_time()
            same("12", text)
            assert time.process_time() - started < seconds, same


@pytest.mark.slow
@given(st.lists(st.sampled_from(ADVERSARIES), min_size=1, max_size=4))
@settings(max_examples=15, deadline=None)
def test_reading_mixed_adversarial_text_takes_linear_time(units: list[str]) -> None:
    unit = "".join(units)
    text = "1 " + unit * (100_000 // len(unit))
    started = time.process_time()
    for read in READERS:
        read(text)
    same_expression(text, "12")
    assert time.process_time() - started < 10  # quadratic: minutes
