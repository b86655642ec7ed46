"""Write the tables of docs/options.md from the code that checks the options.

    python scripts/options_page.py

A table stands between the lines `<!-- table: NAME -->` and `<!-- end -->`.
`tests/test_options_page.py` fails if the page is out of date.
"""

import re
from pathlib import Path

from selftaught.cli.help import options_in
from selftaught.option_groups import PromptOptions
from selftaught.options import Option, type_name
from selftaught.quiet.config import QuietConfig
from selftaught.samplers import SAMPLERS, sampler_help
from selftaught.tasks import TASKS, task_help

PAGE = Path(__file__).resolve().parent.parent / "docs" / "options.md"
BLOCK = re.compile(r"(?<=<!-- table: )(\w+) -->\n.*?(?=<!-- end -->)", re.DOTALL)


PREFIXES = {"prompt": "--", "quiet": "--quiet."}


def tables() -> dict[str, list[Option]]:
    """Return the options of every table by its name."""
    found = {name: [one for one in task_help(name)[1] if one.name != "thought_marks"] for name in TASKS}  # fmt: skip
    # The engine arguments of vLLM depend on its version; `selftaught samplers vllm` lists them.
    return (
        found
        | {name: sampler_help(name)[1] for name in SAMPLERS if name != "vllm"}
        | {"prompt": options_in(PromptOptions), "quiet": options_in(QuietConfig)}
    )


def table(prefix: str, options: list[Option]) -> str:
    """Return options as a Markdown table."""
    lines = ["| option | type | default | meaning |", "|---|---|---|---|"]
    for one in options:
        default = "required" if one.default is None else one.default
        default = f"`{default}`" if "<" in default else default
        kind = type_name(one.hint).removesuffix(" or null")
        kind = "mapping" if kind.startswith("dict") else kind
        cells = [f"`{prefix}{one.name.replace('_', '-')}`", kind, default, one.meaning]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def filled(page: str) -> str:
    """Return a page with the present tables."""
    known = tables()

    def block(found: re.Match[str]) -> str:
        name = found[1]
        prefix = PREFIXES.get(name, "--task-options." if name in TASKS else "--sampler-options.")
        return f"{name} -->\n\n{table(prefix, known[name])}\n\n"

    return BLOCK.sub(block, page)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
