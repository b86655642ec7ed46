"""Checks of texts: what they find, what they refuse, and that they cannot hang."""

import re
import threading
import time
from pathlib import Path

import pytest
from planted_texts import HINTED, options_for, planted, table

from selftaught.records import Problem, Rollout
from selftaught.safety import CheckOptions, ExcludeOptions, Finding, Source, open_checks
from selftaught.safety.known_secrets import Secrets
from selftaught.safety.leaks import SystemPrompt, answer_first, hints_in, source_of
from selftaught.tasks.commonsense_qa import hint as mark_choice

SECRET = "open-sesame-77"


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    path = tmp_path / "secrets.txt"
    path.write_text(f"{SECRET}\n\nx7!\n", encoding="utf-8")
    return path


def own_check(folder: Path, body: str) -> str:
    path = folder / "my_check.py"
    path.write_text(f"import time\ndef check(text):\n    {body}\n")
    return f"{path}:check"


def test_the_planted_set_is_caught_and_missed_as_it_was_written_down(tmp_path: Path):
    everything = planted()
    with open_checks(options_for(tmp_path)) as checks:
        found = checks.find([one.text for one in everything], [one.source for one in everything])
    wrong = [one.text for one, findings in zip(everything, found, strict=True) if bool(findings) != one.caught]  # fmt: skip
    assert wrong == []


def test_the_table_of_the_docs_is_that_of_the_planted_set(tmp_path: Path):
    page = Path(__file__).parent.parent / "docs" / "safety.md"
    with open_checks(options_for(tmp_path)) as checks:
        rows = table(checks)
    text = page.read_text(encoding="utf-8")
    assert [row for row in rows if row not in text] == []


def test_a_pattern_is_found_where_re_finds_it():
    with open_checks(CheckOptions(check_patterns=[r"(?i)ab+", r"(?<=x)\d$"])) as checks:
        found = checks.find(["see ABB here", "x7", "nothing", ""])
    assert found == [
        [Finding("pattern", "(?i)ab+", (4, 7))], [Finding("pattern", r"(?<=x)\d$", (1, 2))], [], [],
    ]  # fmt: skip


def test_a_pattern_of_exponential_time_is_stopped_and_the_other_texts_are_matched():
    texts = ["fine", "a" * 40 + "b", "aaa"]
    start = time.monotonic()
    with open_checks(CheckOptions(check_patterns=["^(a+)+$"])) as checks:
        found = checks.find(texts)
        assert found == checks.find(texts)  # with a new worker
    assert time.monotonic() - start < 30
    assert found[0] == [] and found[2] == [Finding("pattern", "^(a+)+$", (0, 3))]
    (one,) = found[1]
    assert one.undecided and one.reason == "could not be checked: time limit of 1 s"


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("return 'bad' in text", "function: flagged"),
        ("return 'it is bad' if 'bad' in text else None", "function: it is bad"),
        ("return 1 / ('bad' not in text) and None", "function: could not be checked: ZeroDivisionError: division by zero"),
        ("return 3 if 'bad' in text else False",
         "function: could not be checked: it returned int, not a text, True, False or None"),
        ("'bad' in text and __import__('os')._exit(7)", "function: could not be checked: ended with exit code 7"),
        ("print(text)", None),
    ],
)  # fmt: skip
def test_the_users_function_flags_and_its_errors_flag(body: str, found: str | None, tmp_path: Path):
    with open_checks(CheckOptions(check_function=own_check(tmp_path, body))) as checks:
        assert checks.flagged("a bad text") == ([found] if found else [])
        assert checks.flagged("a good text") == []  # also after the worker has died


def test_a_function_that_always_fails_is_refused_before_a_run(tmp_path: Path):
    with pytest.raises(ValueError, match=r"failed on the text 'A text\.': NameError"):
        open_checks(CheckOptions(check_function=own_check(tmp_path, "return nothing")))
    with pytest.raises(ValueError, match="Expected a function 'missing'"):
        open_checks(
            CheckOptions(check_function=own_check(tmp_path, "pass").replace(":check", ":missing"))
        )
    with pytest.raises(ValueError, match="does not exist"):
        open_checks(CheckOptions(check_function="nowhere.py:check"))


def test_secrets_are_found_in_other_forms_and_blacked_out(secrets: Path):
    found = Secrets(secrets)
    text = f"so OPEN  Sesame\n7 7! and x7! and X7! and {SECRET}{SECRET}"
    black = found.redacted(text)
    assert len(black) == len(text)
    assert black == f"so {'█' * 16}! and ███ and X7! and {'█' * 28}"
    assert [(one.check, one.reason) for one in found.find(text)] == [("secret", "line 3"), ("secret", "line 1")]  # fmt: skip
    assert found.redacted(black) == black


def test_no_reason_contains_a_secret(secrets: Path, tmp_path: Path):
    options = CheckOptions(
        check_secrets=secrets, check_patterns=["sesame-[0-9]+"],
        check_function=own_check(tmp_path, "return 'bad ' + text"),
    )  # fmt: skip
    with open_checks(options) as checks:
        reasons = checks.flagged(f"I say {SECRET}.", Source("q", SECRET, (SECRET,)))
    assert len(reasons) == 4  # pattern, function, secret, hint repeated
    assert not any(SECRET in one or "sesame-77" in one for one in reasons)


@pytest.mark.parametrize(
    ("lines", "message"), [("", "the file is empty"), ("ok-secret\nab\n", "line 2: expected a secret of at least 3")]
)  # fmt: skip
def test_files_of_secrets_that_flag_everything_or_nothing_are_refused(
    lines: str, message: str, tmp_path: Path
):
    (tmp_path / "s").write_text(lines)
    with pytest.raises(ValueError, match=message):
        open_checks(CheckOptions(check_secrets=tmp_path / "s"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"check_patterns": ["("]}, "is not a regular expression"),
        ({"check_patterns": ["a*"]}, "matches the empty text"),
        ({"check_pattern_file": "# only a comment\n"}, "got none"),
        ({"check_system_prompt": " ... \n"}, "no word"),
        ({"check_leaks": False}, "Expected at least one check"),
    ],
)
def test_checks_that_cannot_work_are_refused(given: dict, message: str, tmp_path: Path):
    for name, text in given.items():
        if isinstance(text, str):
            (tmp_path / name).write_text(text)
            given = given | {name: tmp_path / name}
    with pytest.raises(ValueError, match=message):
        open_checks(CheckOptions(**given))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"check_threshold": 0.0}, "above 0 and at most 1"),
        ({"check_labels": ["toxic"]}, "--check-labels requires --check-classifier"),
        ({"check_classifier": "x"}, "--check-classifier requires --check-labels"),
        ({"check_patterns": ["x"]}, "only with --exclude-flagged"),
    ],
)
def test_options_that_would_have_no_effect_are_refused(given: dict, message: str):
    with pytest.raises(ValueError, match=message):
        ExcludeOptions(**given)


def test_calls_from_several_threads_give_their_own_results():
    results: dict[int, list[list[Finding]]] = {}
    with open_checks(CheckOptions(check_patterns=[r"n[0-9]+"])) as checks:

        def ask(number: int) -> None:
            results[number] = checks.find([f"n{number} {'x' * at}" for at in range(50)])

        threads = [threading.Thread(target=ask, args=(10**at,)) for at in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number, found in results.items():
        assert {one.span for (one,) in found} == {(0, 1 + len(str(number)))}


# ---------------------------------------------------------------- leaks


@pytest.mark.parametrize(
    ("text", "answer", "first"),
    [
        ("The answer is (b). Because", "b", True),
        ("b", "b", True),
        ("So the final answer is 1,000.", "1,000", True),
        ("$\\frac12$ since", "\\frac12", True),
        ("12 + 7 = 19. The answer is 19.", "19", False),
        ("1 apple and 2 more make 3", "1", False),
        ("The answer is 190.", "19", False),
        ("", "19", False),
        ("anything", "", False),
    ],
)
def test_an_answer_before_any_reasoning(text: str, answer: str, *, first: bool):
    assert bool(answer_first(text, answer)) is first


@pytest.mark.parametrize(
    ("prompt", "question", "answer", "hints"),
    [
        ("Q: What is 1 + 1? (2)\nA: 2\n\nQ: What is 3 + 4? (7)\nA:", "What is 3 + 4?", "7", ("(7)",)),
        ("2+2 (4)=", "2+2", "4", ("(4)",)),
        ("3+4 = ? the sum is 7\nA:", "3+4 = ?", "7", ("the sum is 7",)),
        ("Q: What is 3 + 4?\nA:", "What is 3 + 4?", "7", ()),
        ("something else", "What is 3 + 4?", "7", ()),
    ],
)  # fmt: skip
def test_the_hint_is_what_the_prompt_adds_to_the_question(prompt, question, answer, hints):
    assert hints_in(prompt, question, answer) == hints


@pytest.mark.parametrize("gold", ["a", "b", "c"])
def test_the_mark_of_a_choice_is_a_hint(gold: str):
    problem = Problem("1", "Where?\nAnswer Choices:\n(a) bed\n(b) big road\n(c) sky", gold)
    prompt = f"Q: {mark_choice(problem).question}\nA:"
    rollout = Rollout(problem, prompt, "It is marked.", "stop", "m", 0, "rationalized")
    assert source_of(rollout).hints == ("(CORRECT)",)


def test_only_rationalized_rollouts_have_a_hint_to_leak():
    problem = Problem("1", "What is 3 + 4?", "7")
    sampled = Rollout(problem, "Q: What is 3 + 4?\nA:", "The answer is 7.", "stop", "m", 0)
    assert source_of(sampled) == Source()
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 3 + 4? (7)"}]  # fmt: skip
    hinted = Rollout(problem, chat, "7", "stop", "m", 0, "rationalized")
    assert source_of(hinted) == Source("What is 3 + 4?", "7", ("(7)",), "Be brief.")


def test_the_share_of_a_system_prompt_that_is_repeated():
    prompt = SystemPrompt("one two three four five six seven eight nine ten")
    assert prompt.repeated_in("ONE, two: three four five") == pytest.approx(1 / 6)
    assert prompt.repeated_in("six seven eight nine ten and one two three four five") == pytest.approx(2 / 6)  # fmt: skip
    assert prompt.repeated_in("one two three four") == 0
    assert SystemPrompt("be brief").repeated_in("please be brief") == 1


def test_checks_of_leaks_can_be_turned_off(tmp_path: Path):
    text = "The hint says 42."
    with open_checks(CheckOptions(check_patterns=["zzz"])) as checks:
        assert checks.flagged(text, HINTED) == ["hint mentioned: hint"]
        assert checks.flagged(text) == []
    with open_checks(CheckOptions(check_patterns=["zzz"], check_leaks=False)) as checks:
        assert checks.flagged(text, HINTED) == []


def test_long_texts_take_linear_time(secrets: Path):
    """Texts made to be slow for the patterns of leaks."""
    text = "the answer is " * 30_000 + "(" * 100_000
    start = time.process_time()
    with open_checks(CheckOptions(check_secrets=secrets)) as checks:
        checks.find([text], [Source("q", "zzz", ("(42)",), "You are a helpful assistant indeed.")])
    assert time.process_time() - start < 5
    assert not re.search("hint", text)
