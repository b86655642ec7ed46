"""Which text after an answer takes it back."""

import pytest

from selftaught.tasks.answers import choice_letter, stated_number, stated_text
from selftaught.tasks.latex import stated_latex

PLACES = ["The answer is {}. {}", "#### {}\n\n{}", "\\boxed{{{}}}\n\n{}", "<answer>{}</answer> {}"]

TAKEN_BACK = [
    # retracted
    "I take that back.", "Strike that.", "Scratch that, 4.", "Never mind, it's 4.", "Please ignore that answer.",
    "I stand corrected.", "I was mistaken.", "I changed my mind.",
    # judged
    "Hmm, that doesn't look right.", "That seems wrong.", "This is false.", "That seems too small.",
    "That is not possible, so it must be 4.", "Upon review, the calculation is off.", "That doesn't add up.",
    "Therefore my answer above is wrong.", "I made a mistake.", "I think I miscounted.", "But that contradicts line 1.",
    "It is not 3.", "3 is wrong.", "3 can't be right.", "Not 3 but 4.", "This is just a guess.", "I am not sure.",
    "There is an error in my work.",
    # another value
    "So the correct value is 4.", "Rather, it is 4.", "Or rather 4", "Or 4.", "Maybe 4.", "It must be 4 instead.",
    "4 is the correct answer.", "In fact, it's 4.", "Looking again, it is actually 4.", "4.", "It's 4, not 3.",
    "It should be 4 instead of 3.", "To be exact, 4.", "The dog counts, so it is 4.", "Final: 4",
    # doubted and not confirmed
    "Wait, 4.", "No wait, it's 4.", "No, 4.", "Let me recalculate: 2+2 = 4.", "I mean 4.", "My bad, 4.", "Edit: it's 4.",
    "EDIT: 4", "Let me redo this.", "Hmm.", "Actually, the dog counts as well.", "Let me double-check: 2 + 2 = 4.",
    "Typo: 4.", "Come to think of it, 4.", "...wait...", "Is this right? Let's see: 2 + 2 = 4.", "Something is off here.",
    "Err, that should read 4.", "This does not match the options.", "The answer key says 4.", "4 is closer.",
    "Wait, -3.", "Wait, 3%.", "Wait, 3 million.", "We still need to add 1, giving 4.",
]  # fmt: skip
UPHELD = [
    "", "I hope this helps!", "Let me know if you need help with the 2 other parts.", "Check: 3*6 = 18.",
    "Wait, let me check: 2+1 = 3. Yes, 3.", "Let me double-check: 2 + 1 = 3.", "Let me verify: 3*6 = 18. Correct.",
    "She has 2 apples and 1 pear.", "This is because 2 + 1 = 3.", "So Tom has 3 apples, and pays $6.",
    "The other 5 apples are green.", "Step 1: 2+1 = 3.\n1. Add 2.\n2. Add 1.", "Note that 7 would be too many apples.",
    "Thus, 3 is correct.", "It is the smallest odd prime.", "If he had 4 apples, it would be 4.", "He still needs 2 more.",
    "A common mistake is to forget the dog, which gives 2.", "It takes 60 minutes to walk there.", "That is 3 in total.",
    "It is not possible to buy half a ticket.", "Wait for the bus at 5.", "Confidence: 95%", "Exactly 3 marbles.",
    "So there are 3 of them, not 4.", "It's 4 if you count the dog.", "I am 100% sure.", "Over 5 days that makes 15.",
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_a_number_is_taken_back_or_upheld(place: str) -> None:
    for after in TAKEN_BACK:
        assert stated_number(place.format(3, after)) is None, after
    for after in UPHELD:
        assert stated_number(place.format(3, after)) == "3", after


@pytest.mark.parametrize("after", TAKEN_BACK)
def test_a_formula_is_taken_back_in_the_same_words(after: str) -> None:
    assert stated_latex(f"\\boxed{{3}}\n\n{after}") is None


@pytest.mark.parametrize("after", UPHELD)
def test_a_formula_is_upheld_by_the_same_words(after: str) -> None:
    assert stated_latex(f"\\boxed{{3}}\n\n{after}") == "3"


def test_another_formula_takes_one_back() -> None:
    assert stated_latex("\\boxed{x+1}. The correct expression is $x-1$.") is None
    assert stated_latex("\\boxed{x+1}. So it is $x+1$.") == "x+1"


@pytest.mark.parametrize(
    "after",
    ["Actually, it's C.", "Wait, C.", "However, C is a better choice.", "C is more likely.", "Alternatively, C.", "Or C.",
     "Maybe C.", "It could also be C.", "So it is C.", "No wait, (c).", "Option C also works.", "B is wrong.", "C.",
     "(B) is not correct.", "I'd change it to C.", "I am torn between B and C.", "Hmm, (C) fits as well.",
     "But A is equally good.", "On the contrary, A.", "Err, A.", "Both A and B fit."],
)  # fmt: skip
def test_a_choice_is_taken_back(after: str) -> None:
    for place in ("The answer is B. {}", "(B)\n{}", "\\boxed{{B}}\n{}", "B. {}"):
        assert choice_letter(place.format(after)) is None, place


@pytest.mark.parametrize(
    "after",
    ["A is too dry.", "(A) and (C) are wrong.", "C is incorrect because shops sell things.", "A bank is near a river.",
     "Unlike A, it is wet.", "D would be too far.", "C is less likely.", "B is the only option that fits.",
     "Neither A nor C fits.", "A is not as good as B.", "Wait, is it? Yes, B.", "Vitamin C is in fruit."],
)  # fmt: skip
def test_a_choice_is_upheld(after: str) -> None:
    for place in ("The answer is B. {}", "\\boxed{{B}}\n{}"):
        assert choice_letter(place.format(after)) == "B", place


def test_words_are_taken_back_by_doubt() -> None:
    for after in ("Wait, Lyon.", "Actually, it's Lyon.", "No, Lyon.", "That is wrong."):
        assert stated_text(f"The answer is Paris. {after}") is None
    assert stated_text("Paris. That is wrong.") is None


@pytest.mark.parametrize(
    "claim", ["D fits the question.", "D matches the clue.", "D answers this question."]
)
def test_another_choice_that_fits_takes_the_choice_back(claim: str):
    assert choice_letter(f"The answer is B. Having reread it, {claim}") is None
    assert choice_letter(f"The answer is D. Having reread it, {claim}") == "D"
    assert choice_letter("The answer is B because it fits the question.") == "B"
