"""The report of a comparison says where the methods did not have equal budgets."""

from selftaught.reports.comparison_page import _settings, budget_notes


def row(name: str, sampled: int, steps: int = 50, budget: int = 60_000) -> dict:
    return {"name": name, "sampled tokens": sampled, "last steps": steps, "budget": budget}


def test_a_method_that_drew_more_or_less_than_the_budget_is_named():
    """The numbers of a run at 60,000 tokens: 66,999 is 112%, 27,216 is 45%, 59,863 is within a tenth."""
    message_text = budget_notes(
        [row("RFT", 59_863), row("V-STaR", 66_999), row("per-step DPO", 27_216, 1)]
    )
    assert "V-STaR sampled 66,999 tokens, 112% of the budget of 60,000." in message_text
    assert "per-step DPO sampled 27,216 tokens, 45% of the budget" in message_text
    assert "per-step DPO's last training had only 1 optimizer step." in message_text
    assert "RFT" not in message_text


def test_equal_budgets_and_old_rows_need_no_note():
    assert budget_notes([row("RFT", 60_000), {"name": "SFT", "sampled tokens": 5}]) == ""


def test_settings_of_any_kind_stand_whole_on_the_page():
    row = {"settings": {"k": [1, 2, 4], "model": "Qwen", "temperature": 0.7}}
    assert _settings(row) == "k 1 2 4, model Qwen, temperature 0.7"
    assert _settings({}) == "-"
