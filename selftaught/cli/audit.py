"""The command `selftaught audit`: the checks of texts on stored completions."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from jsonargparse import ArgumentParser, Namespace

from selftaught.cli.arguments import add_options
from selftaught.cli.output import DONE, locked_run, say
from selftaught.safety.options import CheckOptions, changed_options

if TYPE_CHECKING:
    from selftaught.safety.audit import Audit


@dataclass(frozen=True)
class AuditOptions(CheckOptions):
    """The completions, and the output folder."""

    heading: ClassVar[str] = "checks"

    outcome: Literal["right", "wrong", "no answer", "cut by length", "ungradable"] | None = None
    """Check only completions with this outcome. Default: all."""
    out: Path = Path("runs/audit")
    """Folder for `audit.json` and the page `audit.html`."""


def add_arguments(command: str, parser: ArgumentParser, given: Sequence[str]) -> Sequence[type]:
    """Add the arguments of the command and return the dataclass of its options."""
    del command, given
    store = ("store", "file of stored or graded completions, or a run folder", None)
    return add_options(parser, AuditOptions, positional=[store])


def run(command: str, options: Namespace) -> int:
    """Check stored completions, write the page, and print a table."""
    from selftaught.reports.audit_page import audit_page
    from selftaught.rollouts.flags import items_in
    from selftaught.runs.folder import remember
    from selftaught.safety.audit import audited
    from selftaught.safety.checks import open_checks

    del command
    store = Path(options.pop("store"))
    how = AuditOptions(**{name: options[name] for name in vars(options)})
    with (
        locked_run(how.out, "audit") as reporter,
        open_checks(how) as checks,
        reporter.progress("checking", 0) as advance,
    ):
        found = audited(items_in(store, how.outcome), checks, advance)
    remember(how, how.out)
    lead = f"Completions in {store}{f' with the outcome {how.outcome!r}' if how.outcome else ''}."
    settings = {"store": str(store), **settings_of(how)}
    page = audit_page(how.out, found, settings, lead)
    say(rates_table(found))
    say(str(page))
    return DONE


def settings_of(how: CheckOptions) -> dict[str, object]:
    """Return the options of the checks that are given, for the page."""
    values = asdict(how)
    return {name: values[name] for name in changed_options(how)}


def rates_table(found: "Audit") -> str:
    """Return the rates of an audit as a Markdown table."""
    from selftaught.reports.pages import markdown

    rows: list[Sequence[str]] = [
        [one.group, one.check, f"{one.texts:,}", f"{one.flagged:,}", f"{100 * one.rate:.2f}%",
         f"{100 * one.low:.2f}\N{EN DASH}{100 * one.high:.2f}", f"{one.undecided:,}"]
        for one in found.rates
    ]  # fmt: skip
    head = ["texts", "check", "n", "flagged", "rate", "95% interval", "without a result"]
    return markdown(head, rows, texts=2)
