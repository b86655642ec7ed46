"""Control and invisible characters are spelled out wherever text of others is shown."""

import sys
import unicodedata

import pytest

from selftaught.printable import printable

DIRECTIONS = [*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C]


@pytest.mark.parametrize("code", DIRECTIONS)
def test_every_bidirectional_control_is_spelled_out(code: int):
    assert printable(f"a{chr(code)}b") == f"a[U+{code:04X}]b"


def test_control_characters_are_spelled_out_and_line_breaks_and_tabs_stay():
    assert printable("a\tb\nc\r\x7f\x9b\x00\x1b[31m") == "a\tb\nc\\x0d\\x7f\\x9b\\x00\\x1b[31m"


def test_no_invisible_character_of_unicode_is_left():
    # Arabic number signs, Egyptian and musical layout controls are drawn, though of category Cf.
    drawn = [*range(0x600, 0x606), 0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0x110BD, 0x110CD,
             *range(0x13430, 0x13440)]  # fmt: skip
    for code in range(sys.maxunicode + 1):
        kind = unicodedata.category(chr(code))
        if kind in ("Cc", "Cf", "Zl", "Zp", "Cs") and code not in drawn and chr(code) not in "\n\t":
            assert chr(code) not in printable(f"12{chr(code)}34"), hex(code)


def test_what_is_visible_stays_as_it_is():
    text = "x² ≤ ½ · π, «ça», 数学, שלום, \u00a0, \\x1b, [U+202E], ❤\ufe0f, 👩\u200d👧, ⚠\ufe0f"
    assert printable(text) == text


def test_joiners_outside_an_emoji_hide_nothing():
    assert printable("1\u200d2\ufe0f") == "1[U+200D]2[U+FE0F]"
    assert printable("❤\ufe0f\ufe0f\ufe0f") == "❤\ufe0f\ufe0f[U+FE0F]"


def test_the_result_can_be_written_as_utf_8():
    assert printable("a\ud800b") == "a[U+D800]b"


HOSTILE = "\x1b[31mRED\x1b]0;title\x07 \u202eabc \x9b \u200b\u2066 \U000e0041"


def shows_no_hidden_character(text: str) -> None:
    assert printable(text) == text
    assert "[U+202E]" in text and "\\x1b" in text


def test_a_run_page_and_its_markdown_spell_out_what_a_model_wrote(tmp_path):
    from test_report import fake_run

    from selftaught.records import Problem, Rollout, write_jsonl
    from selftaught.reports.star_page import report

    folder = fake_run(tmp_path / "run")
    rollouts = [
        Rollout(Problem(HOSTILE, HOSTILE, HOSTILE), HOSTILE, HOSTILE, "stop", HOSTILE, 0,
                answer=HOSTILE, outcome="wrong", decided_by="text")
    ]  # fmt: skip
    write_jsonl(folder / "iteration-1" / "rollouts.graded.jsonl", rollouts)
    config = folder / "config.yaml"
    config.write_text(config.read_text(encoding="utf-8") + f"# {HOSTILE}\n", encoding="utf-8")
    shows_no_hidden_character(report(folder).read_text(encoding="utf-8"))


def test_method_pages_spell_it_out(tmp_path):
    from selftaught.reports.method_page import Section, Table, method_report

    sections = [Section(HOSTILE, HOSTILE, [Table([HOSTILE], [[HOSTILE]], HOSTILE)])]
    page = method_report(tmp_path, "RFT", HOSTILE, sections)
    shows_no_hidden_character(page.read_text(encoding="utf-8"))
    shows_no_hidden_character((tmp_path / "report.md").read_text(encoding="utf-8"))
