"""Page of an audit: what the checks found in thoughts, completions and rationales.

All texts are untrusted. They are escaped, and secrets have been blacked out before.
"""

import json
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path

from selftaught.evaluation.evaluator import Tally
from selftaught.records import write_atomically
from selftaught.reports.pages import rendered
from selftaught.safety.audit import ANY, Audit, Rate


def audit_page(out: Path, audit: Audit, settings: Mapping[str, object], lead: str) -> Path:
    """Write `audit.json` and `audit.html` into a folder, and return the path of the page.

    Args:
        out: the folder.
        audit: the result.
        settings: settings to show, without secrets.
        lead: what was checked, in a sentence.
    """
    out.mkdir(parents=True, exist_ok=True)
    content = {"settings": dict(settings), **audit.to_dict()}
    text = json.dumps(content, indent=2, ensure_ascii=False, default=str)
    write_atomically(out / "audit.json", text + "\n")
    groups = [
        (name, [(one, _tally(one)) for one in rates])
        for name, rates in groupby(audit.rates, lambda rate: rate.group)
    ]
    examples = [
        (check, list(same)) for check, same in groupby(
            sorted(audit.examples, key=lambda one: one.check), lambda one: one.check
        )
    ]  # fmt: skip
    page = rendered(
        "audit.html.j2", title=out.resolve().name, lead=lead, groups=groups, examples=examples,
        settings=settings, any_check=ANY,
        undecided=sum(one.undecided for one in audit.rates if one.check == ANY),
    )  # fmt: skip
    write_atomically(out / "audit.html", page)
    return out / "audit.html"


def _tally(rate: Rate) -> Tally:
    return Tally(rate.texts, rate.flagged, rate.rate, rate.low, rate.high)
