"""The command `selftaught quiet audit`: the checks of texts on thoughts and completions."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from selftaught.cli.audit import rates_table, settings_of
from selftaught.cli.output import locked_run, say
from selftaught.cli.quiet_model import check_fits, check_least, open_trained
from selftaught.cli.quiet_think import ThinkOptions, thinking
from selftaught.cli.texts import TextOptions, texts_of
from selftaught.printable import counted
from selftaught.safety.options import CheckOptions

if TYPE_CHECKING:
    from collections.abc import Iterable

    from selftaught.quiet.thought_texts import SpanThoughts
    from selftaught.safety.audit import Item


@dataclass(frozen=True)
class QuietAuditOptions(CheckOptions, ThinkOptions, TextOptions):
    """Which thoughts are checked."""

    heading: ClassVar[str] = "run"

    positions: int | None = None
    """Maximum number of positions per span at which thoughts are checked, drawn at random. Default: all."""
    max_new_tokens: int = 0
    """Also check a completion of this many tokens of the first half of every text. 0: none."""
    out: Path = Path("runs/quiet-audit")
    """Folder for `audit.json`, the page `audit.html` and `thoughts.jsonl`, which has the thoughts as they
    are, with secrets. Repeating the command continues it; with other checks, the thoughts are used again."""


def audit(how: QuietAuditOptions) -> None:
    """Check the thoughts of a model, write the page, and print a table."""
    from selftaught.options import check_count
    from selftaught.quiet.spans import consecutive, spans
    from selftaught.quiet.thought_texts import collect_thoughts
    from selftaught.reports.audit_page import audit_page
    from selftaught.runs.folder import remember
    from selftaught.safety.audit import audited
    from selftaught.safety.checks import check_given, open_checks

    check_count("positions", how.positions)
    check_least(0, max_new_tokens=how.max_new_tokens)
    check_given(how, "thoughts, which are sampled without a hint")
    with open_checks(how) as checks:
        model, tokenizer = open_trained(how.model)
        check_fits(model, max(how.length, how.length // 2 + how.max_new_tokens), "--length")
        when = thinking(how, tokenizer)
        cut = consecutive(spans(texts_of(how), tokenizer, length=how.length, least=2))
        with (
            locked_run(how.out, "quiet audit") as reporter,
            reporter.progress("thinking", len(cut)) as advance,
        ):
            found = collect_thoughts(
                model, tokenizer, cut, when, how.out / "thoughts.jsonl", positions=how.positions,
                new_tokens=how.max_new_tokens, progress=advance,
            )  # fmt: skip
            result = audited(_items(found), checks)
            remember(how, how.out)
            settings = {"model": how.model, "text": how.text, "thoughts": how.thoughts, "thought_temperature": how.thought_temperature,
                        "think_when": how.think_when, **settings_of(how)}  # fmt: skip
            lead = f"Thoughts of {how.model} in {counted(len(cut), 'span')} of {how.text}."
            page = audit_page(how.out, result, settings, lead)
    say(rates_table(result))
    say(str(page))


def _items(found: "Iterable[SpanThoughts]") -> "Iterator[Item]":
    from selftaught.safety.audit import Item

    for one in found:
        for position, before, thought in zip(one.positions, one.before, one.thoughts, strict=True):
            where = f"text {one.text}, span {one.span}, after token {position}"
            yield Item(thought, "thoughts", str(one.text), where, before)
        if one.completion is not None:
            where = f"text {one.text}"
            yield Item(one.completion, "completions", str(one.text), where, one.prompt)
