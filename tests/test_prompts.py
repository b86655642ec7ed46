"""Prompts, character by character, as a reader would write them down."""

from dataclasses import replace

import pytest
from narrowed import text

from selftaught.prompts import PromptStyle, bare, chat, hinted, styled
from selftaught.records import Problem

SHOT = Problem("s", "1 + 1 =", "2", "1 + 1 = 2. The answer is 2.")
PROBLEM = Problem("p", "2 + 3 =", "5", "a solution that no prompt may show")
STYLE = PromptStyle(name="few-shot", shots=lambda problem: [SHOT])


def in_brackets(problem):
    return replace(problem, question=f"{problem.question} ({problem.gold})", rationale=None)


def test_bare_shows_the_question_alone():
    assert bare(STYLE)(PROBLEM) == "Q: 2 + 3 =\nA:"
    assert bare(STYLE).name == "bare"


def test_few_shot_shows_the_worked_examples_before_it():
    assert STYLE(PROBLEM) == "Q: 1 + 1 =\nA: 1 + 1 = 2. The answer is 2.\n\nQ: 2 + 3 =\nA:"


def test_a_worked_example_has_the_form_of_prompt_and_completion():
    shown = text(bare(STYLE)(SHOT)) + STYLE.completion(text(SHOT.rationale))
    assert text(STYLE(PROBLEM)).startswith(shown + STYLE.stop[0])


def test_hints_stand_in_the_worked_examples_too():
    assert hinted(STYLE, in_brackets)(PROBLEM) == (
        "Q: 1 + 1 = (2)\nA: 1 + 1 = 2. The answer is 2.\n\nQ: 2 + 3 = (5)\nA:"
    )
    assert hinted(STYLE, in_brackets).name == "few-shot with hint"


def test_hint_and_bare_go_together_in_either_order():
    assert hinted(bare(STYLE), in_brackets)(PROBLEM) == "Q: 2 + 3 = (5)\nA:"
    assert bare(hinted(STYLE, in_brackets))(PROBLEM) == "Q: 2 + 3 = (5)\nA:"


def test_chat_gives_the_worked_examples_as_turns():
    assert chat(STYLE)(PROBLEM) == [
        {"role": "user", "content": "1 + 1 ="},
        {"role": "assistant", "content": "1 + 1 = 2. The answer is 2."},
        {"role": "user", "content": "2 + 3 ="},
    ]
    assert chat(STYLE).stop == ()


def test_a_hinted_chat_hints_every_question():
    turns = hinted(chat(STYLE), in_brackets)(PROBLEM)
    assert isinstance(turns, list)
    questions = [turn["content"] for turn in turns[::2]]
    assert questions == ["1 + 1 = (2)", "2 + 3 = (5)"]


def test_no_style_shows_the_problems_own_rationale():
    for style in (STYLE, bare(STYLE), chat(STYLE), hinted(STYLE, in_brackets)):
        assert "no prompt may show" not in str(style(PROBLEM))


def test_worked_examples_may_depend_on_the_problem():
    def of_equal_length(problem):
        return [replace(SHOT, question=f"{len(problem.question)} signs")]

    style = replace(STYLE, question="{question}|", answer="{rationale};", shots=of_equal_length)
    assert style(PROBLEM) == "7 signs|1 + 1 = 2. The answer is 2.;2 + 3 =|"


def test_braces_in_questions_and_rationales_stay_as_they_are():
    shot = Problem("s", "{1} \\frac{1}{2} {question}", "2", "\\boxed{2} {rationale}")
    style = PromptStyle(name="x", shots=lambda problem: [shot])
    assert style(replace(PROBLEM, question="{}")) == (
        "Q: {1} \\frac{1}{2} {question}\nA: \\boxed{2} {rationale}\n\nQ: {}\nA:"
    )


def test_styles_are_found_by_the_names_of_the_command_line():
    assert styled(STYLE, "few_shot") is STYLE
    assert styled(STYLE, "bare")(PROBLEM) == "Q: 2 + 3 =\nA:"
    assert isinstance(styled(STYLE, "chat")(PROBLEM), list)
    with pytest.raises(ValueError, match="'zero'; there are: few_shot, bare, chat"):
        styled(STYLE, "zero")


def test_the_digest_is_of_what_is_shown_not_of_the_name():
    same = replace(STYLE, name="another name", shots=lambda problem: (SHOT,))
    assert STYLE.digest([PROBLEM]) == same.digest([PROBLEM])
    assert STYLE.digest([PROBLEM]) != bare(STYLE).digest([PROBLEM])
    assert STYLE.digest([PROBLEM]) != chat(STYLE).digest([PROBLEM])
    assert STYLE.digest([PROBLEM]) != STYLE.digest([replace(PROBLEM, question="2 + 4 =")])


def test_the_digest_is_the_same_on_every_machine_and_in_every_version():
    # printf '["Q: 2 + 3 =\\nA:"]' | sha256sum | cut -c1-16
    assert bare(STYLE).digest([PROBLEM]) == "9bda3ddd17b0b169"


def test_a_lone_surrogate_from_a_data_file_can_be_hashed():
    assert len(bare(STYLE).digest([replace(PROBLEM, question="\ud800")])) == 16


def test_chat_says_how_to_answer_and_may_have_a_system_message():
    style = styled(
        PromptStyle("s"), "chat", instruction="Use \\boxed{}.", system="Be brief.",
        chat_template_kwargs={"enable_thinking": False},
    )  # fmt: skip
    assert style(Problem("p", "1+1 {x}?", "2")) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1 {x}?\n\nUse \\boxed{}."},
    ]
    assert bare(style).chat_template_kwargs == {"enable_thinking": False}
    assert (
        styled(PromptStyle("s"), "bare", instruction="Use #.")(Problem("p", "1", "1")) == "Q: 1\nA:"
    )


@pytest.mark.parametrize("given", [{"system": "Be brief."}, {"chat_template_kwargs": {"a": 1}}])
@pytest.mark.parametrize("name", ["few_shot", "bare"])
def test_what_is_for_messages_is_refused_without_them(name: str, given: dict):
    with pytest.raises(ValueError, match="give --prompt chat"):
        styled(PromptStyle("s"), name, **given)
