"""Checks of thoughts and completions in the server."""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

from serving import running

from selftaught.safety import CheckOptions, open_checks
from selftaught.serving.review import WITHHELD, Flagged, Reviewer

QUESTION: dict[str, Any] = {"prompt": "Q: 3 + 4?\nA:", "max_tokens": 6, "temperature": 0}


def reviewer(pattern: str, flagged: Flagged = "withhold", redraws: int = 3) -> Reviewer:
    return Reviewer(open_checks(CheckOptions(check_patterns=[pattern])), flagged, redraws)


def rest_of(body: dict[str, Any]) -> str:
    """A response without its id."""
    return json.dumps({name: value for name, value in body.items() if name != "id"})


def test_a_flagged_completion_is_withheld_also_from_a_stream(tiny_model_dir: Path):
    with running(tiny_model_dir) as plain:
        text = plain.complete(**QUESTION)["choices"][0]["text"]
    part = text[:3]
    assert part.strip()
    with running(tiny_model_dir, reviewer=reviewer(re.escape(part))) as one:
        body = one.complete(**QUESTION, logprobs=1)
        chunks = one.stream("/v1/completions", QUESTION)
        clean = one.complete("Q: Tom?", max_tokens=1, temperature=0)
        assert one.server.reviewer is not None
        assert one.server.reviewer.counts["withheld"] == 2
    assert (
        body["choices"][0]["text"] == "" and body["choices"][0]["finish_reason"] == "content_filter"
    )
    assert body["choices"][0]["logprobs"]["tokens"] == []
    assert "".join(one["choices"][0]["text"] for one in chunks) == ""
    assert chunks[-1]["choices"][0]["finish_reason"] == "content_filter"
    assert json.dumps(part)[1:-1] not in rest_of(body)
    assert clean["choices"][0]["finish_reason"] == "length"


def test_a_flagged_completion_is_drawn_anew(tiny_model_dir: Path):
    wanted = {"prompt": "Q: 3", "max_tokens": 3, "temperature": 2.0, "n": 6, "seed": 4}
    with running(tiny_model_dir) as plain:
        texts = [one["text"] for one in plain.complete(**wanted)["choices"]]
    letters = "".join(sorted(set("".join(texts)) & set("abcdefghijklmnopqrstuvwxyz0123456789")))
    assert letters
    pattern = f"[{letters[: max(1, len(letters) // 2)]}]"
    flagged = [bool(re.search(pattern, one)) for one in texts]
    assert any(flagged) and not all(flagged)
    with running(tiny_model_dir, reviewer=reviewer(pattern, "redraw", 8)) as one:
        body = one.complete(**wanted)
        assert one.server.reviewer is not None
        counts = one.server.reviewer.counts
    for choice, was, text in zip(body["choices"], flagged, texts, strict=True):
        if not was:
            assert choice["text"] == text
        elif choice["finish_reason"] != "content_filter":
            assert not re.search(pattern, choice["text"])
    assert counts["drawn anew"] >= sum(flagged)
    assert body["usage"]["completion_tokens"] > 18  # what was drawn anew is counted


def test_flagged_thoughts_are_withheld_and_the_answer_is_not(quiet_model_dir: Path):
    with running(quiet_model_dir, thoughts="shown") as plain:
        choice = plain.complete(**QUESTION)["choices"][0]
    thoughts = [one["thoughts"][0] for one in choice["hidden_thoughts"]]
    pairs = [one[-1:] + two[:1] for one, two in pairwise(thoughts)]
    # It begins in one thought and ends in the next, and the answer does not contain it.
    across = re.escape(next(one for one in pairs if one not in choice["text"]))
    with running(quiet_model_dir, thoughts="shown", reviewer=reviewer(across)) as one:
        body = one.complete(**QUESTION)
        chunks = one.stream("/v1/completions", QUESTION)
    assert body["choices"][0]["text"] == choice["text"]
    assert body["choices"][0]["reasoning_content"] == WITHHELD
    assert "hidden_thoughts" not in json.dumps([body, chunks])
    assert [one["choices"][0].get("reasoning_content") for one in chunks if one["choices"][0].get("reasoning_content")] == [WITHHELD]  # fmt: skip
