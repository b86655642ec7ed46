"""Model cards: the `README.md` of a model folder, with metadata for the Hugging Face Hub.

The metadata is a YAML block in the form of huggingface_hub's `ModelCardData`. Texts of users and
names of models and files are untrusted. They are on one line and escaped, so that they change
neither the YAML nor the Markdown. Of local paths, only the last part is shown.
"""

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from selftaught.hub import is_hub_name, stated_in_card, without_tokens
from selftaught.printable import printable
from selftaught.reports.citations import Paper
from selftaught.reports.pages import rendered_markdown
from selftaught.runs.folder import versions
from selftaught.tasks import Task

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

LICENSES = frozenset(
    [
        "apache-2.0",
        "mit",
        "openrail",
        "bigscience-openrail-m",
        "creativeml-openrail-m",
        "bigscience-bloom-rail-1.0",
        "bigcode-openrail-m",
        "afl-3.0",
        "artistic-2.0",
        "bsl-1.0",
        "bsd",
        "bsd-2-clause",
        "bsd-3-clause",
        "bsd-3-clause-clear",
        "c-uda",
        "cc",
        "cc0-1.0",
        "cc-by-2.0",
        "cc-by-2.5",
        "cc-by-3.0",
        "cc-by-4.0",
        "cc-by-sa-3.0",
        "cc-by-sa-4.0",
        "cc-by-nc-2.0",
        "cc-by-nc-3.0",
        "cc-by-nc-4.0",
        "cc-by-nd-4.0",
        "cc-by-nc-nd-3.0",
        "cc-by-nc-nd-4.0",
        "cc-by-nc-sa-2.0",
        "cc-by-nc-sa-3.0",
        "cc-by-nc-sa-4.0",
        "cdla-sharing-1.0",
        "cdla-permissive-1.0",
        "cdla-permissive-2.0",
        "wtfpl",
        "ecl-2.0",
        "epl-1.0",
        "epl-2.0",
        "etalab-2.0",
        "eupl-1.1",
        "eupl-1.2",
        "agpl-3.0",
        "gfdl",
        "gpl",
        "gpl-2.0",
        "gpl-3.0",
        "lgpl",
        "lgpl-2.1",
        "lgpl-3.0",
        "isc",
        "h-research",
        "intel-research",
        "lppl-1.3c",
        "ms-pl",
        "apple-ascl",
        "apple-amlr",
        "mpl-2.0",
        "odc-by",
        "odbl",
        "openrail++",
        "osl-3.0",
        "postgresql",
        "ofl-1.1",
        "ncsa",
        "unlicense",
        "zlib",
        "pddl",
        "lgpl-lr",
        "deepfloyd-if-license",
        "fair-noncommercial-research-license",
        "llama2",
        "llama3",
        "llama3.1",
        "llama3.2",
        "llama3.3",
        "llama4",
        "gemma",
        "unknown",
        "other",
    ]
)
"""Identifiers that the Hub accepts as a licence; see https://hf.co/docs/hub/repositories-licenses."""
UNKNOWN = "unknown"
_REPOSITORY_NAME = re.compile(r"[\w.-]{1,96}(?:/[\w.-]{1,96})?", re.ASCII)
_PLAIN = re.compile(r"[A-Za-z0-9_ .,:;/@+=%'(){}-]+")
_SPECIAL = re.compile(r"[\\`*\[\]<>#|~!$&\"]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")


@dataclass(frozen=True)
class BaseModel:
    """The model that a training started from."""

    name: str
    """Name on the Hub, or name of the folder."""
    hub_name: str | None = None
    """Name on the Hub, if it is known."""
    license: str = UNKNOWN
    license_name: str | None = None
    license_link: str | None = None


@dataclass(frozen=True)
class TrainingData:
    """The data that a model was trained on."""

    text: str
    license: str = ""
    """Licence of the data; empty if it is not stated."""
    data_sets: Sequence[str] = ()
    """Names of data sets on the Hub."""


@dataclass(frozen=True)
class Trained:
    """A model of the lineage."""

    name: str
    start: str
    """The model it was trained from."""
    examples: int
    steps: int
    note: str = ""
    """What the examples are."""


@dataclass(frozen=True)
class Result:
    """A measurement with its 95% interval; NaN for an unknown end."""

    name: str
    kind: str
    """Kind of the metric, such as "accuracy"."""
    value: float
    low: float
    high: float
    over: str
    """What was measured, such as "40 test problems"."""
    share: bool = True
    """Show values as percentages."""
    listed: bool = True
    """List the result in the metadata of the model."""

    @property
    def shown(self) -> str:
        """The value as text."""
        return _number(self.value, self.share)

    @property
    def with_interval(self) -> str:
        """The 95% interval after a comma; empty if it is not known."""
        return "" if self.interval == "not known" else f", 95% interval {self.interval}"

    @property
    def interval(self) -> str:
        """The 95% interval as text."""
        if self.low != self.low or self.high != self.high:
            return "not known"
        return f"{_number(self.low, self.share)} to {_number(self.high, self.share)}"


def _number(value: float, share: bool) -> str:
    return f"{value:.1%}" if share else f"{value:.4f}"


@dataclass(frozen=True)
class Card:
    """What a model card says."""

    title: str
    method: str
    lead: str
    """What the model is, in a sentence."""
    base: BaseModel
    data: TrainingData
    papers: Sequence[Paper]
    trained: Sequence[Trained] = ()
    """The models between the base and this one, in order; the last is this one."""
    settings: Mapping[str, object] = field(default_factory=dict)
    """The settings that differ from the defaults."""
    results: Sequence[Result] = ()
    measured_by: str = ""
    """Command that repeats the measurement of the results."""
    measured_note: str = ""
    trained_by: str = ""
    """Command that repeats the training."""
    use: Literal["model", "verifier", "quiet"] = "model"
    """What the model is used for; decides the example."""
    benchmark: str = UNKNOWN
    """Name on the Hub of the data set of the results."""
    tags: Sequence[str] = ()


def card_text(card: Card) -> str:
    """Return the text of a model card: YAML metadata and Markdown. Access tokens are removed."""
    made = versions()
    body = rendered_markdown(
        "model_card.md.j2", FILTERS, card=card, packages=made["packages"], python=made["python"],
        settings={key: shown_value(value) for key, value in card.settings.items()},
    )  # fmt: skip
    return without_tokens(f"---\n{metadata(card)}\n---\n\n{body}")


def metadata(card: Card) -> str:
    """Return the metadata of a card as YAML, in the form that the Hub accepts."""
    from huggingface_hub import EvalResult, ModelCardData

    known = card.base.license in LICENSES
    name = one_line(card.title)
    results = [
        EvalResult(
            task_type="text-generation", dataset_type=card.benchmark,
            dataset_name=one_line(card.data.text), metric_type=result.kind,
            metric_value=round(result.value, 6),
            metric_name=one_line(f"{result.name}, {result.over}{result.with_interval}"),
        )
        for result in card.results if result.listed and result.value == result.value
    ]  # fmt: skip
    data = ModelCardData(
        license=card.base.license if known else "other",
        license_name=_id(card.base.license_name or card.base.license)
        if not known or (card.base.license == "other" and card.base.license_name) else None,
        license_link=one_line(card.base.license_link) if card.base.license_link else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=card.base.hub_name,
        datasets=[name for name in card.data.data_sets if _REPOSITORY_NAME.fullmatch(name)] or None,
        tags=["selftaught", *card.tags, "generated_from_trainer"],
        model_name=name if results else None,
        eval_results=results or None,
    )  # fmt: skip
    return data.to_yaml()


def _id(text: str) -> str:
    """Return a text as an identifier of lower-case letters, digits, dots and hyphens."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-") or "custom"


def base_model(name: str) -> BaseModel:
    """Return what is known about a base model: its name on the Hub and its licence.

    The licence is that of its card. It is "unknown" if there is no card or the card does not say it.

    Args:
        name: Hub name, model folder, or "embedded".
    """
    if name == "embedded":
        return BaseModel("the small model in the package selftaught", license="apache-2.0")
    stated, local = stated_in_card(name), not is_hub_name(name)
    license = stated.get("license", UNKNOWN)
    origin = stated.get("base_model", "") if local else name
    folder = Path(name).resolve()
    return BaseModel(
        (folder.parent.name if folder.name == "model" else folder.name) if local else name,
        hub_name=origin if _is_hub_name(origin) else None,
        license=license,
        license_name=stated.get("license_name"),
        license_link=stated.get("license_link"),
    )


def _is_hub_name(name: str) -> bool:
    return bool(_REPOSITORY_NAME.fullmatch(name)) and ".." not in name and "--" not in name


def task_data(task: Task) -> TrainingData:
    """Return the data of a task, with its licence. That of a user's own data is not stated."""
    facts = task.facts or task.name
    if task.name == "question_file" and not task.data_sets:
        facts = f"questions from the file {Path(facts.removeprefix('questions from ')).name}"
    license = task.license
    if not license and task.data_sets:
        license = stated_in_card(task.data_sets[0], "dataset").get("license", "")
    return TrainingData(f"{task.name}: {facts}", license, task.data_sets)


def text_data(path: str, column: str = "") -> TrainingData:
    """Return the data of a training on texts: a Hub data set, or a file of the user."""
    if path and is_hub_name(path):
        license = stated_in_card(path, "dataset").get("license", "")
        return TrainingData(path, license, [path])
    return TrainingData(f"the file {Path(path).name}")


def changed_settings(
    options: "DataclassInstance", leave_out: Sequence[str] = ("out",)
) -> dict[str, object]:
    """Return the options that differ from their defaults; options in a mapping as `name.key`."""
    values, changed = asdict(options), {}
    for one in fields(options):
        default = one.default_factory() if one.default_factory is not MISSING else one.default
        value = values[one.name]
        if one.name in leave_out or value == default:
            continue
        if isinstance(value, Mapping):
            made = one.metadata.get("fields_of")  # the options of Quiet-STaR
            own = asdict(made()) if made else default if isinstance(default, Mapping) else {}
            changed |= {f"{one.name}.{key}": each for key, each in value.items() if own.get(key) != each}  # fmt: skip
        else:
            changed[one.name] = value
    return changed


def command_line(command: str, settings: Mapping[str, object]) -> str:
    """Return a command with options, such as `selftaught star --iterations 2`.

    Values are quoted for the shell; local paths are shortened as everywhere in the card.
    """
    parts = [command]
    for name, value in settings.items():
        several = value if isinstance(value, list | tuple) else [value]
        words = " ".join(shlex.quote(one_line(shown_value(each))) for each in several)
        parts.append(f"--{name.replace('_', '-')} {words}")
    return " ".join(parts)


# ---------------------------------------------------------------- escaping


def shown_value(value: object) -> str:
    """Return a setting as text. Of a local path, only the last part is shown."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ", ".join(map(shown_value, value))
    if isinstance(value, Path) or (isinstance(value, str) and _is_local_path(value)):
        return Path(value).name or str(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _is_local_path(text: str) -> bool:
    if len(text) > 1000 or "\n" in text or "/" not in text:
        return False
    return text.startswith(("/", "~", "./", "../")) or Path(text).exists()


def one_line(text: str) -> str:
    """Return a text on one line, with invisible characters escaped."""
    return " ".join(printable(text).split())


def escaped(text: str) -> str:
    """Return a text for Markdown, also inside a table: special characters as entities."""
    return _SPECIAL.sub(lambda found: f"&#{ord(found[0])};", one_line(text))


def literal(text: str) -> str:
    """Return a text for Markdown as code, or escaped if it has characters that could end it."""
    line = one_line(text)
    return f"`{line}`" if line and _PLAIN.fullmatch(line) else escaped(line)


def code_block(text: str, language: str = "") -> str:
    """Return a fenced code block, whose fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


FILTERS: Mapping[str, Callable[..., str]] = {"md": escaped, "literal": literal, "block": code_block}
"""Filters of the templates of cards."""


def made_with() -> str:
    """Return the name and version of this package."""
    return f"selftaught {version('selftaught')}"
