"""The page of valued steps: what it says, that text is only text, and in a real browser."""

import itertools
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_report import NASTY, Page

from selftaught.records import Problem, Rollout
from selftaught.reports.step_page import chosen_rollouts, signed, totals, worked, write_step_page
from selftaught.rollouts.steps import PitRule, ValuedRollout, split_steps, step_value

END = 0
LINES = ["3 * 12 = 36\n", "36 - 9 = 27\n", "2 * 27 = 54\n", "27 + 54 = 81\n"]
RIGHTS = [6, 6, 8, 2, 0]  # of 8 continuations, before any step and after each


def decode(ids):
    return "".join(chr(one) for one in ids if one != END)


def encode(text):
    return tuple(ord(one) for one in text)


def valued(name="apples", lines=LINES, rights=RIGHTS, *, k=1, index=0, **fields):
    """A completion of these lines, with values from 8 continuations each; none at its end."""
    ids = (*encode("".join(lines)), END)
    problem = Problem(name, fields.pop("question", "How many apples?"), fields.pop("gold", "45"))
    message_text: dict[str, Any] = {
        "answer": "81",
        "outcome": "right" if rights[-1] else "wrong",
    } | fields
    rollout = Rollout(
        problem, "Q", "".join(lines), "stop", "m", index, token_ids=ids, **message_text
    )
    values = tuple(step_value(right, 8, k) for right in rights)
    counts = (*((right, 8) for right in rights[:-1]), (0, 0))
    return ValuedRollout(rollout, tuple(split_steps(ids, decode)), values, counts)


def drawn(one, steps, *, text="so 45", whole=True):
    """What was drawn after a prefix: as many right as were counted, the others wrong."""
    right, n = one.counts[steps]
    prefix = one.prefix(steps) if whole else ()
    return [
        replace(one.rollout, completion=decode(prefix) + f"{text} [{index}]", index=index,
                token_ids=(*prefix, *encode(f"{text} [{index}]"), END),
                answer="45" if index < right else None,
                outcome="right" if index < right else "cut by length")
        for index in range(n)
    ]  # fmt: skip


def all_drawn(several, **options):
    return {
        (one.rollout.problem.id, one.rollout.index, steps): drawn(one, steps, **options)
        for one in several
        for steps in range(len(one.ends))
    }


def written(
    path, several, continuations=None, *, title="Steps", rule: PitRule = "lowest_value", k=1
):
    return write_step_page(
        several, decode, continuations or {}, path / "steps.html", title=title, rule=rule, k=k
    )


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    several = [
        valued(),
        valued("apples", index=1),
        valued("pears", ["a\n", "b\n"], [2, 4, 8]),
        valued("plums", ["a\n", "b\n", "c\n"], [8, 2, 2, 0]),
    ]
    return written(tmp_path_factory.mktemp("steps"), several, all_drawn(several))


@pytest.fixture(scope="module")
def page(path):
    return Page(path.read_text(encoding="utf-8"))


def attributes(page, tag, name):
    return [value for at, key, value in page.attributes if (at, key) == (tag, name)]


def test_the_page_opens_with_counts_over_all_rollouts(page):
    """Pits at 4 of 4, 4 of 4 and 3 of 3: step 3.7 of 3.7 on average. Of 4 + 4 + 2 + 3 = 13 steps
    2 + 2 + 0 + 2 lose value: 46%."""
    assert "step 3.7 of 3.7" in page.text and "3 of 4 completions have one" in page.text
    assert "3 wrong, 1 right; 13 steps" in page.text
    assert "46%" in page.text and "6 of 13 have an advantage below 0" in page.text
    assert "the first step with the lowest value" in page.text


def test_every_step_shows_its_value_and_advantage_in_words_and_signs(page):
    """6 of 8 are 0.75, 8 are 1.00, 2 are 0.25: advantages 0, +0.25, -0.75, -0.25."""
    for message_text in (
        "Before any step: value 0.75, 6 of 8 right.",
        "Step 1 of 4: advantage 0.00, value 0.75, 6 of 8 right.",
        "Step 2 of 4: advantage plus 0.25, value 1.00, 8 of 8 right.",
        "Step 3 of 4: advantage minus 0.75, value 0.25, 2 of 8 right.",
        "Step 4 of 4, the first pit: advantage minus 0.25, value 0.00, known.",
    ):
        assert message_text in page.text
    assert "0.00 3 * 12 = 36" in page.text
    assert "\N{MINUS SIGN}0.75 2 * 27 = 54" in page.text
    assert "\N{MINUS SIGN}0.25 first pit 27 + 54 = 81" in page.text
    classes = attributes(page, "details", "class")
    assert classes[:5] == ["step even start", "step even", "step gain", "step loss", "step loss pit"]  # fmt: skip
    assert len(classes) == (4 + 1) + (2 + 1) + (3 + 1)  # one rollout of each problem
    assert sum("pit" in one for one in classes) == page.words.count("first pit") == 2


def test_what_was_drawn_stands_behind_each_number(page):
    """2 of 8 right: of five shown 1.25 are right in proportion, so one."""
    assert "8 continuations sampled from here, 2 right; 5 of them:" in page.text
    assert "the completion has ended, and its value is its outcome" in page.text
    assert all("so 45 [" in pre and "36" not in pre for pre in page.pres)  # the prefix is left out
    shown = page.text.split("Step 3 of 4")[1].split("Step 4 of 4")[0]
    assert shown.count("✓ right answer 45") == 1 and shown.count("✗ cut by length") == 4


def test_a_continuation_may_be_whole_or_alone(tmp_path, path):
    one = valued()
    alone = written(tmp_path, [one], all_drawn([one], whole=False)).read_text(encoding="utf-8")
    whole = written(tmp_path, [one], all_drawn([one])).read_text(encoding="utf-8")
    assert alone == whole
    bare = written(tmp_path, [one]).read_text(encoding="utf-8")
    assert bare.count("their texts were not stored") == 4 and "<pre" not in bare


@pytest.mark.parametrize(
    ("right", "shown"),
    [(0, (0, 5)), (1, (1, 4)), (2, (1, 4)), (4, (2, 3)), (7, (4, 1)), (8, (5, 0))],
)
def test_few_continuations_stand_for_many_and_no_kind_is_missing(right, shown):
    one = valued(rights=[right, 0, 0, 0, 0])
    start = worked(one, decode, all_drawn([one]), "lowest_value").start
    found = [each.outcome == "right" for each in start.drawn]
    assert (sum(found), len(found) - sum(found)) == shown


def test_the_value_of_best_of_k_is_explained(tmp_path):
    """1 - C(6, 5)/C(8, 5) = 1 - 6/56 = 0.89 from 2 of 8 right."""
    page = Page(written(tmp_path, [valued(k=5)], k=5).read_text(encoding="utf-8"))
    assert "that at least one of 5 continuations from here is correct" in page.text
    assert "value 0.89, 2 of 8 right" in page.text


def test_the_page_loads_nothing_and_runs_nothing(page):
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & {*page.tags}
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in ("href", "src"):
            assert value.startswith("#"), (tag, name, value)
    policy = [v for tag, name, v in page.attributes if tag == "meta" and "default-src" in v]
    assert policy == [
        "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    ]


def test_every_reference_has_its_target_and_every_picture_its_words(page):
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len({*ids})
    for _, name, value in page.attributes:
        if name in ("href", "aria-labelledby"):
            assert value.removeprefix("#") in ids
    assert attributes(page, "span", "aria-label") == [
        "4 steps, the first pit at step 4",
        "3 steps, the first pit at step 3",
        "2 steps, no pit",
    ]


def test_the_same_rollouts_give_the_same_bytes(tmp_path, path):
    several = [valued()]
    first = written(tmp_path, several, all_drawn(several)).read_bytes()
    assert written(tmp_path, several, all_drawn(several)).read_bytes() == first


def test_nothing_a_model_writes_becomes_markup(tmp_path):
    lines = [f"{NASTY}\n", "</details></summary>{{ 7 * 7 }}\n"]
    one = valued(NASTY, lines, [8, 4, 0], question=NASTY, gold=NASTY, answer=NASTY)
    several = [one, valued("other", rights=[8, 8, 8, 8, 8])]
    source = written(
        tmp_path, several, all_drawn(several, text=NASTY), title=f"<blink>{NASTY}"
    ).read_text(encoding="utf-8")
    page = Page(source)  # balanced, although the text closes pre, details and summary
    assert "script" not in page.tags and "<script" not in source and "<blink" not in source
    assert "{{ 7 * 7 }}" in page.text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", source)
    shown = NASTY.replace("\x1b", "\\x1b").replace("\x00", "").replace("\x9b", "\\x9b")
    assert shown.replace("\ud800", "[U+D800]").split("\\x9b")[1] in page.pres[0]
    assert len(attributes(page, "details", "class")) == 3 + 5


@pytest.mark.parametrize(
    "unit", ["'", "\x01", "\U0001f600", "'" * 99 + "\n"], ids=["quote", "control", "emoji", "lines"]
)
def test_a_megabyte_of_text_is_shown_in_part(tmp_path, unit):
    text = unit * (1_000_000 // len(unit))
    ids = encode(text)
    ends = [*range(len(unit), len(ids) + 1, len(unit))] if "\n" in unit else [len(ids)]
    rollout = Rollout(Problem("p", text, text), text, text, "length", "m", 0, token_ids=ids,
                      answer=text, outcome="cut by length")  # fmt: skip
    count = len(ends)
    pit = count // 2
    values = tuple(0.75 if at <= pit else 0.0 for at in range(count + 1))
    one = ValuedRollout(rollout, tuple(ends), values, ((6, 8),) * (count + 1))
    several = [
        replace(one, rollout=replace(rollout, problem=replace(rollout.problem, id=f"{n}")))
        for n in range(3)
    ]
    continuations = {(f"{n}", 0, at): [rollout] * 8 for n in range(3) for at in (0, pit, count)}
    source = written(tmp_path, several, continuations)
    page = Page(source.read_text(encoding="utf-8"))
    assert source.stat().st_size < 1_000_000
    assert "of 1,000,000 characters not shown" in page.text
    if count > 20:
        assert f"{pit - 10:,} earlier steps are not shown" in page.text
        assert f"Step {pit + 1} of {count}, the first pit" in page.text


def test_at_most_twenty_steps_are_shown_and_the_pit_among_them():
    """100 steps that fall at the 61st: from the 51st to the 70th."""
    one = valued(lines=["a\n"] * 100, rights=[8] * 61 + [0] * 40)
    shown = worked(one, decode, {}, "lowest_value")
    assert [step.number for step in shown.steps] == list(range(51, 71))
    assert (shown.before, shown.after, shown.count, shown.pit) == (50, 30, 100, 61)
    late = valued(lines=["a\n"] * 100, rights=[8] * 100 + [0])
    shown = worked(late, decode, {}, "lowest_value")
    assert [step.number for step in shown.steps] == list(range(81, 101)) and shown.after == 0


def test_at_most_ten_problems_are_shown_those_with_a_pit_first():
    fine = [valued(f"fine{n}", rights=[8, 8, 8, 8, 8]) for n in range(20)]
    lost = [valued(f"lost{n}") for n in range(4)]
    found = [one.rollout.problem.id for one in chosen_rollouts([*fine, *lost], "lowest_value")]
    assert found == [f"lost{n}" for n in range(4)] + ["fine0", "fine3", "fine6", "fine10", "fine13", "fine16"]  # fmt: skip
    many = [valued(f"lost{n}") for n in range(30)]
    found = [one.rollout.problem.id for one in chosen_rollouts([*fine, *many], "lowest_value")]
    assert found == [f"lost{n}" for n in range(0, 30, 3)]
    # of one problem, the first completion with a pit
    two = [valued("same", rights=[8, 8, 8, 8, 8]), valued("same", index=1), valued("same", index=2)]
    assert [one.rollout.index for one in chosen_rollouts(two, "lowest_value")] == [1]


def test_a_page_without_rollouts_says_so(tmp_path):
    page = Page(written(tmp_path, []).read_text(encoding="utf-8"))
    assert "There are no completions with step values." in page.text and "details" not in page.tags
    no_steps = ValuedRollout(replace(valued().rollout, token_ids=(), outcome=None), (), (0.5,), ((4, 8),))  # fmt: skip
    page = Page(written(tmp_path, [no_steps]).read_text(encoding="utf-8"))
    assert "1 not graded; 0 steps" in page.text and "no completion has one" in page.text
    assert totals([no_steps], "first_zero").steps == 0


def test_a_number_is_signed_only_where_it_is_not_zero():
    shown = [signed(number) for number in (0.25, -0.25, 0, -0.0, 0.004, -0.004, -0.006)]
    minus = "\N{MINUS SIGN}"
    assert shown == ["+0.25", f"{minus}0.25", "0.00", "0.00", "0.00", "0.00", f"{minus}0.01"]


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no chromium and chromedriver here; scripts/install_chromium.sh installs them")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for one in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1200,900"):  # fmt: skip
        options.add_argument(one)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=Service(driver))
    yield opened
    opened.quit()


def luminance(colour):
    """Of a colour as the browser computes it, by WCAG 2.2."""
    numbers = [float(one) for one in re.findall(r"[\d.]+", colour.split("srgb")[-1])][:3]
    parts = numbers if "srgb" in colour else [one / 255 for one in numbers]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def painted(browser, css):
    """Text and background of an element, everything behind it mixed in, from a pixel of it."""
    script = """
      const at = document.querySelector(arguments[0]), behind = [];
      for (let e = at; e; e = e.parentElement) behind.unshift(getComputedStyle(e).backgroundColor);
      const c = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
      for (const one of behind) { c.fillStyle = one; c.fillRect(0, 0, 1, 1); }
      const under = [...c.getImageData(0, 0, 1, 1).data];
      c.fillStyle = getComputedStyle(at).color; c.fillRect(0, 0, 1, 1);
      const ink = [...c.getImageData(0, 0, 1, 1).data];
      return [ink, under].map(d => `rgb(${d[0]}, ${d[1]}, ${d[2]})`);
    """
    return browser.execute_script(script, css)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_differ_and_every_word_can_be_read(browser: Any, path: Path, scheme: str):
    """WCAG 2.2 asks for a contrast of 4.5 for text."""
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
    )
    browser.get(path.as_uri())
    grounds = set()
    for kind, part in itertools.product(
        (".gain", ".loss:not(.pit)", ".even.start", ".pit"), (".by", ".said", ".worth span", ".worth strong")
    ):  # fmt: skip
        ink, ground = painted(browser, f"details{kind} {part}")
        light, dark = sorted((luminance(ink), luminance(ground)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (kind, part, ink, ground)
        grounds.add(ground)
    assert len(grounds) == 4
    for part in (
        ".flag",
        ".drawn .verdict",
        ".drawn .soft",
        ".strip .loss",
        ".key dd",
        ".behind p",
    ):
        light, dark = sorted(map(luminance, painted(browser, part)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, part
    assert browser.get_log("browser") == []


@pytest.mark.slow
def test_keys_open_a_step_and_nothing_is_wider_than_a_telephone(browser: Any, path: Path):
    from selenium.webdriver import ActionChains, Keys
    from selenium.webdriver.common.by import By

    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 375, "height": 800, "deviceScaleFactor": 1, "mobile": False},
    )
    browser.get(path.as_uri())
    steps = browser.find_elements(By.CSS_SELECTOR, "details.step")
    text = steps[0].find_element(By.TAG_NAME, "pre")
    assert not text.is_displayed()
    ActionChains(browser).send_keys(Keys.TAB * 4, Keys.ENTER).perform()  # past the three links
    assert text.is_displayed() and "so 45" in text.text
    ActionChains(browser).send_keys(Keys.ENTER).perform()
    assert not text.is_displayed()
    browser.execute_script("for (const one of arguments[0]) one.open = true", steps)
    assert all(one.get_property("open") for one in steps)
    assert browser.execute_script(
        "return document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    )
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert browser.get_log("browser") == []
