import json
import random
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from selftaught.cli.methods import iteration_line, star_ending
from selftaught.evaluation.evaluator import evaluation_from
from selftaught.methods.star import StarConfig
from selftaught.printable import printable
from selftaught.prompts import PromptStyle
from selftaught.records import OUTCOMES, Origin, Outcome, Problem, Rollout, write_jsonl
from selftaught.reports.pages import shortened
from selftaught.reports.star_page import compare_runs, read_run, report, rollout_kinds
from selftaught.reports.tables import digits_table, markdown_table
from selftaught.tasks.answers import Verdict
from selftaught.tasks.base import Task

RIGHT = [  # right of 40 problems with 1, 2, 3, 4 and 5 digits, iteration by iteration
    (40, 38, 4, 1, 0),  # 83 of 200: 41.5%
    (40, 40, 20, 4, 1),  # 105: 52.5%
    (40, 40, 36, 18, 6),  # 140: 70.0%
    (40, 40, 40, 38, 34),  # 192: 96.0%
    (40, 40, 39, 36, 30),  # 185: 92.5%
]
NASTY = (
    "<script>alert(1)</script></pre></details></article> \x1b[31mred\x1b[0m \x00 \x9b \ud800 & done"
)


def group_of(problem):
    digits = len(problem.question.split("+")[0].strip())
    return f"{digits} digit{'s' * (digits != 1)}"


SUMS = Task(
    name="sums",
    problems=lambda split: [],
    prompt=PromptStyle("sums"),
    extract=lambda completion: completion.split()[-1],
    equal=lambda gold, answer: Verdict(gold == answer, "literal"),
    hint=lambda problem: problem,
    group=group_of,
)


def graded(rng, rights, *, model, origin: Origin = "sampled", per_group=40):
    """Rollouts of sums with the given number right in each length; the others fail in every way."""
    rollouts = []
    for digits, right in enumerate(rights, 1):
        for index in range(per_group):
            a, b = (rng.randrange(10 ** (digits - 1), 10**digits) for _ in range(2))
            question = f"{a} + {b}"
            problem = Problem(f"sum-{digits}-{index}", question, str(a + b))
            failed = OUTCOMES[1:][index % 4 if index % 3 else 0]
            outcome = "right" if index < right else failed
            answer = {"right": str(a + b), "wrong": str(a + b + 10), "ungradable": "1e"}.get(
                outcome
            )
            lines = [
                f"{str(a)[: len(str(a)) - i]} {str(b)[: len(str(b)) - i]}" for i in range(digits)
            ]
            shots = "Q: 12 + 34\nA: 2 + 4 = 6, carry 0\n1 + 3 = 4\n46\n\n" * 4
            rollouts.append(
                Rollout(
                    problem,
                    f"{shots}Q: {question}\nA:",
                    "\n".join([" Let us add digit by digit.", *lines, answer or "and so on"]),
                    "length" if outcome == "cut by length" else "stop",
                    model,
                    0,
                    origin,
                    answer=answer,
                    outcome=outcome,
                    decided_by="literal" if answer else None,
                )
            )
    return rollouts


def funnel_of(sampled, rationalized):
    def counts(rollouts):
        return {each: sum(r.outcome == each for r in rollouts) for each in OUTCOMES}

    kept, kept_too = counts(sampled)["right"], counts(rationalized)["right"]
    return {
        "asked": len(sampled),
        "sampled": counts(sampled),
        "hinted": len(rationalized),
        "rationalized": counts(rationalized),
        "kept": kept,
        "kept rationalized": kept_too,
        "dropped": {"too long": 2, "wrong": counts(rationalized)["wrong"]},
        "trained on": kept + kept_too - 2,
    }


def fake_run(folder: Path, *, iterations=4, ended=True, seed=0, text=None, rate=1e-3) -> Path:
    """A run folder such as `selftaught star` leaves, with scripted numbers."""
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    settings = {"task": "arithmetic", "model": "embedded", "seed": seed,
                "training": {"learning_rate": rate, "warm_up": 100}}  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    versions = {"packages": {"torch": "2.13.0", "trl": "1.16.0"}, "python": "3.11.9",
                "platform": "Linux-6.1-x86_64", "cpus": 2, "commit": "abc1234",
                "command": "selftaught star"}  # fmt: skip
    (folder / "versions.json").write_text(json.dumps(versions))
    rows = []
    for number in range(iterations + 1):
        model = "embedded" if number == 0 else f"{folder.name}/iteration-{number}/model"
        held_out = graded(rng, RIGHT[number], model=model)
        write_jsonl(folder / f"iteration-{number}" / "validation.graded.jsonl", held_out)
        name = f"validation, iteration {number}"
        validation = evaluation_from(held_out, SUMS, name=name, seconds=4.1)
        row = {"iteration": number, "model": model, "validation": validation.to_dict(),
               "seconds": {"evaluate": 4.1}}  # fmt: skip
        if number:
            sampled = graded(rng, RIGHT[number - 1], model=model)
            if text is not None:
                sampled = [replace(r, completion=text, answer=r.answer and text,
                                   problem=replace(r.problem, question=text),
                                   prompt=[{"role": "user", "content": text}])
                           for r in sampled]  # fmt: skip
            missed = [right // 2 for right in RIGHT[number]]
            hinted = graded(rng, missed, model=model, origin="rationalized", per_group=22)
            for rollouts, file in ((sampled, "rollouts"), (hinted, "rationalized")):
                write_jsonl(folder / f"iteration-{number}" / f"{file}.graded.jsonl", rollouts)
            steps = round(40 * 1.2 ** (number - 1))
            log = [{"step": s, "loss": 1.2 / number * 0.97**s + 0.1, "learning_rate": rate * min(1, s / 20)}
                   for s in range(1, steps + 1)]  # fmt: skip
            row |= {
                "funnel": funnel_of(sampled, hinted),
                "training": {"steps": steps, "loss": log[-1]["loss"], "log": log},
                "seconds": {"sample": 12.5, "rationalize": 6.1 / number, "grade": 0.4,
                            "train": 8.0 * 1.2**number, "evaluate": 4.1},
            }  # fmt: skip
        rows.append(row)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if ended:
        measured = [evaluation_from(graded(rng, rights, model=model), SUMS, name=name)
                    for name, rights, model in (
                        ("test, base", (40, 36, 4, 2, 0), "embedded"),  # 82: 41.0%
                        ("test, best", (40, 40, 39, 38, 33), "iteration-3/model"),  # 190: 95.0%
                        ("direct answers, fine-tuned", (40, 30, 20, 10, 2), "direct/model"),  # 51%
                    )]  # fmt: skip
        message_text = [each.to_dict() for each in measured]
        summary = {"best": 3, "why stopped": "no gain in 1 iteration", "best model": "iteration-3/model",
                   "test": {"base": message_text[0], "best": message_text[1]}, "comparisons": message_text[2:],
                   "minutes": 4.2}  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


VOID = {"meta", "link", "br", "img", "input", "hr", "path", "use", "rect"}


class Page(HTMLParser):
    """What a browser would make of a page: balanced tags, attributes, and the text of each cell."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open, self.attributes, self.tags = [], [], []
        self.tables, self.pres, self.articles, self.words = [], [], 0, []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "pre":
            self.pres.append("")
        self.articles += tag == "article"

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)
        if "pre" in self.open:
            self.pres[-1] += data
        elif {"td", "th"} & set(self.open) and "small" not in self.open:
            self.tables[-1][-1][-1] += data

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def table(self, first, second):
        """The table whose head begins with these two cells, as rows of dicts."""
        found = next(t for t in self.tables if [c.strip() for c in t[0][:2]] == [first, second])
        head = [cell.strip() for cell in found[0]]
        return [dict(zip(head, map(str.strip, row), strict=True)) for row in found[1:]]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return fake_run(tmp_path_factory.mktemp("runs") / "star")


@pytest.fixture(scope="module")
def page(run):
    return Page(report(run).read_text(encoding="utf-8"))


def test_the_page_shows_the_accuracy_of_every_iteration_and_group(page):
    table = page.table("iteration", "all")
    assert [row["all"] for row in table] == ["41.5%", "52.5%", "70.0%", "96.0%", "92.5%"]
    assert [row["5 digits"] for row in table] == ["0.0%", "2.5%", "15.0%", "85.0%", "75.0%"]
    assert [row["iteration"] for row in table] == ["base", "1", "2", "3", "4"]
    assert "mean of groups" not in table[0]  # groups of one size: the mean is the accuracy


def test_the_page_opens_with_what_the_run_reached(page, run):
    """82 and 190 of 200 test problems in five groups of 40: 41.0% and 95.0%. The interval of the best:
    groups of 40, 40, 39, 38 and 33 right have Wilson intervals that reach .0876, .0876, .1038, .1150
    and .1445 below them, and 0, 0, .0206, .0362 and .0875 above; root sum of squares over five."""
    assert (
        "from 41.0% to 95.0% (90.1\N{EN DASH}96.9, the mean of 5 groups) after iteration 3"
        in page.text
    )
    assert "4 iterations from embedded in 4.2 minutes" in page.text
    assert "stopped: no gain in 1 iteration" in page.text
    assert "still running" not in page.text
    assert "41.0% to 95.0%" in (run / "report.md").read_text(encoding="utf-8")


def test_the_funnel_counts_what_the_rollouts_say(page, run):
    for number, shown in enumerate(page.table("iteration", "outcomes"), 1):
        lines = (run / f"iteration-{number}" / "rollouts.graded.jsonl").read_text().splitlines()
        found = [json.loads(line)["outcome"] for line in lines]
        for outcome in OUTCOMES:
            assert shown[outcome] == str(found.count(outcome))
        assert shown["asked"] == "200" and shown["hinted"] == "110"
        assert shown["answered"] == str(
            sum(outcome in ("right", "wrong", "ungradable") for outcome in found)
        )
    # iteration 1: 83 right; of 22 hinted in each length, 20 + 20 + 10 + 2 + 0 right; 2 too long
    first = page.table("iteration", "outcomes")[0]
    assert (first["right"], first["rationalized right"], first["trained on"]) == ("83", "52", "133")


def test_times_and_training_are_shown(page):
    """Iteration 1: 12.5 + 6.1 + 0.4 + 9.6 + 4.1 = 32.7 s; 40 steps, then 48, 58, 69."""
    times = page.table("iteration", "relative to the longest")
    assert times[1]["total"] == "32.7 s" and times[0]["total"] == "4.1 s"
    steps = [row["optimizer steps"] for row in page.table("iteration", "examples")]
    assert steps == ["40", "48", "58", "69"]
    assert page.tags.count("svg") == 4


def test_comparisons_stand_beside_the_test_results(page):
    shown = {row["evaluation"]: row["accuracy"] for row in page.table("evaluation", "model")}
    assert shown == {"test, base": "41.0%", "test, best": "95.0%",
                     "direct answers, fine-tuned": "51.0%"}  # fmt: skip


def test_config_and_versions_are_on_the_page(page):
    assert any("warm_up: 100" in pre for pre in page.pres)
    for message_text in ("2.13.0", "3.11.9", "abc1234", "selftaught star"):
        assert message_text in page.text


def test_the_page_loads_nothing_and_runs_nothing(page):
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & set(
        page.tags
    )
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in ("href", "src", "xlink:href", "action", "data"):
            assert value.startswith("#"), (tag, name, value)
        if name == "style":
            assert re.findall(r"url\((?!#)", value) == []
    policy = [v for tag, name, v in page.attributes if tag == "meta" and "default-src" in v]
    assert policy == [
        "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    ]


def test_ids_are_unique_and_every_reference_has_its_target(page):
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for _, name, value in page.attributes:
        if name in ("href", "xlink:href"):
            assert value[1:] in ids
        for target in re.findall(r"url\(#([^)]*)\)", value):
            assert target in ids


def test_the_same_run_gives_the_same_bytes(run, page):
    before = (run / "report.html").read_bytes(), (run / "report.md").read_bytes()
    report(run)
    assert ((run / "report.html").read_bytes(), (run / "report.md").read_bytes()) == before


def test_ten_rollouts_of_each_kind_are_shown(run):
    kinds = {kind.name: kind for kind in rollout_kinds(run)}
    assert list(kinds) == [*OUTCOMES, "rationalized, right", "rationalized, not right"]
    assert kinds["right"].total == 83 + 105 + 140 + 192
    assert kinds["rationalized, right"].total == 52 + 70 + 96 + 92
    assert kinds["rationalized, not right"].total == 4 * 110 - (52 + 70 + 96 + 92)
    for name, kind in kinds.items():
        assert len(kind.shown) == min(10, kind.total)
        for item in kind.shown:
            wanted = {"rationalized, right": "right"}.get(name, name)
            assert item.rollout.outcome == wanted or name == "rationalized, not right"
            assert (item.rollout.origin == "rationalized") == name.startswith("rationalized")
    # spread over the iterations: 10 over 4 files with plenty each
    counts = [sum(s.iteration == n for s in kinds["right"].shown) for n in (1, 2, 3, 4)]
    assert counts == [3, 3, 2, 2]
    ids = [item.rollout.problem.id for item in kinds["right"].shown if item.iteration == 4]
    assert len(set(ids)) == 2 and ids[0][:5] != ids[1][:5]  # not neighbours


def test_few_rollouts_of_a_kind_are_all_shown(tmp_path):
    folder = fake_run(tmp_path / "one", iterations=1, ended=False)
    path = folder / "iteration-1" / "rollouts.graded.jsonl"
    lines = path.read_text().splitlines()
    chosen = [line for line in lines if '"wrong"' in line][:3] + lines[:25]
    path.write_text("\n".join(chosen) + "\n")
    kinds = {kind.name: kind for kind in rollout_kinds(folder)}
    assert (kinds["wrong"].total, len(kinds["wrong"].shown)) == (3, 3)
    assert (kinds["ungradable"].total, kinds["ungradable"].shown) == (0, [])
    assert (kinds["right"].total, len({s.rollout.problem.id for s in kinds["right"].shown})) == (
        25,
        10,
    )


def test_nothing_a_model_writes_becomes_markup(tmp_path):
    folder = fake_run(tmp_path / "<b>nasty & co", iterations=1, text=NASTY)
    source = report(folder).read_text(encoding="utf-8")
    page = Page(source)  # balanced, although the text closes pre, details and article
    assert "script" not in page.tags and "<script" not in source and "<b>nasty" not in source
    assert page.articles == sum(len(kind.shown) for kind in rollout_kinds(folder))
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", source)
    shown = NASTY.replace("\x1b", "\\x1b").replace("\x00", "\\x00").replace("\x9b", "\\x9b")
    assert shown.replace("\ud800", "[U+D800]") in page.pres[0]
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    assert markdown.startswith("# &lt;b>nasty &amp; co\n")


@pytest.mark.parametrize("character", ["'", "\x00", "\U0001f600"])
def test_the_page_stays_small_whatever_the_rollouts_hold(tmp_path, character):
    folder, text = fake_run(tmp_path / "long", iterations=0), character * 10_000
    names: list[tuple[Origin, Outcome]] = [("sampled", outcome) for outcome in OUTCOMES]
    names.extend([("rationalized", "right"), ("rationalized", "wrong")])
    problem = Problem("p", text, text)
    rollouts = [
        Rollout(problem, text, text, "stop", "m", 0, origin, answer=text, outcome=outcome)
        for origin, outcome in names * 10
    ]
    write_jsonl(folder / "iteration-1" / "rollouts.graded.jsonl", rollouts)
    page = report(folder)
    assert sum(len(kind.shown) for kind in rollout_kinds(folder)) == 70
    assert page.stat().st_size < 2_000_000
    assert "of 10,000 characters not shown" in page.read_text(encoding="utf-8")


def test_shortened_text_keeps_its_ends_and_says_what_is_missing():
    text = "".join(chr(97 + index % 26) for index in range(1000))
    cut = shortened(text, 100, tail=40)
    assert cut.startswith(text[:60]) and cut.endswith(text[-40:])
    assert "[… 900 of 1,000 characters not shown …]" in cut
    assert shortened(text, 1000) == text
    assert shortened(text, 100).startswith(text[:100])
    assert printable("a\tb\nc\r\x7f") == "a\tb\nc\\x0d\\x7f"


def test_a_run_that_has_only_measured_its_base_model_has_a_page(tmp_path):
    page = Page(report(fake_run(tmp_path / "early", iterations=0, ended=False)).read_text())
    assert "still running" in page.text
    assert "no iteration has ended; the base model, embedded, reaches 41.5%" in page.text
    assert "No iteration has ended yet" in page.text and "Nothing has been trained yet" in page.text
    assert "there is no summary.json yet" in page.text
    assert page.articles > 10  # the validation rollouts of the base model


def test_a_run_that_goes_on_shows_the_best_so_far(tmp_path):
    page = Page(report(fake_run(tmp_path / "mid", iterations=2, ended=False)).read_text())
    assert (
        "Still running: 2 iterations from embedded; validation accuracy from 41.5% to 70.0%"
        in page.text
    )
    assert "biased upwards" in page.text


def test_a_run_without_any_measurement_says_what_is_missing(tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    (folder / "config.yaml").write_text("task: arithmetic\nrationalization: true\n")
    page = Page(report(folder).read_text())
    assert "There are no results yet" in page.text and "no versions.json" in page.text
    assert page.articles == 0 and "svg" not in page.tags
    assert "none so far" in page.text


def test_a_run_without_rationalization_and_without_gain_has_a_page(tmp_path):
    folder = fake_run(tmp_path / "plain", iterations=1)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows[1]["funnel"] |= {"hinted": 0, "rationalized": dict.fromkeys(OUTCOMES, 0), "dropped": {}}
    rows[1]["training"]["log"][0]["loss"] = float("nan")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "iteration-1" / "rationalized.graded.jsonl").unlink()
    summary = json.loads((folder / "summary.json").read_text())
    summary |= {
        "best": 0,
        "test": {"base": summary["test"]["base"], "best": summary["test"]["base"]},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    page = Page(report(folder).read_text())
    assert "none better than the base model's 41.0% on the test problems" in page.text
    assert page.table("iteration", "outcomes")[0]["rationalized right"] == "0"


def test_a_torn_last_row_is_left_out(tmp_path):
    folder = fake_run(tmp_path / "torn", iterations=1, ended=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 2, "mod')
    assert read_run(folder).iterations == [0, 1]


def test_what_is_no_run_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a run folder: expected"):
        report(tmp_path)
    folder = fake_run(tmp_path / "broken", iterations=0)
    (folder / "summary.json").write_text("{")
    with pytest.raises(ValueError, match="expected JSON, got"):
        report(folder)


def test_several_runs_stand_side_by_side(tmp_path, run):
    other = fake_run(tmp_path / "other", iterations=2, ended=False, seed=7, rate=3e-4)
    out = compare_runs([run, other], tmp_path / "pages" / "comparison.html")
    page = Page(out.read_text(encoding="utf-8"))
    results = page.table("run", "measured on")
    assert [row["run"] for row in results] == ["star", "other"]
    assert [row["measured on"] for row in results] == ["test", "validation"]
    assert [row["base"] for row in results] == ["41.0%", "41.5%"]
    assert [row["best"] for row in results] == ["95.0%", "70.0%"]
    assert [row["iterations"] for row in results] == ["4", "2 so far"]
    differing = {
        row["setting"]: (row["star"], row["other"]) for row in page.table("setting", "star")
    }
    assert differing == {"seed": ("0", "7"), "training.learning_rate": ("0.001", "0.0003")}
    assert page.tags.count("svg") == 1
    with pytest.raises(ValueError, match="at least two run folders to compare, got 1"):
        compare_runs([run], out)


def test_the_terminal_table_has_groups_by_iterations(run):
    rows = read_run(run).rows
    assert digits_table(rows).splitlines() == [
        "iteration    base       1       2       3       4",
        "1 digit    100.0%  100.0%  100.0%  100.0%  100.0%",
        "2 digits    95.0%  100.0%  100.0%  100.0%  100.0%",
        "3 digits    10.0%   50.0%   90.0%  100.0%   97.5%",
        "4 digits     2.5%   10.0%   45.0%   95.0%   90.0%",
        "5 digits     0.0%    2.5%   15.0%   85.0%   75.0%",
        "all         41.5%   52.5%   70.0%   96.0%   92.5%",
    ]
    assert digits_table(rows * 3).count("iteration") == 2
    assert digits_table([]) == ""


def test_groups_of_different_size_show_their_mean_too():
    """10 of 10 and 0 of 30: 25% of all, 50% as the mean of the two groups."""
    rollouts = graded(random.Random(0), (40, 0), model="m")
    evaluation = evaluation_from(rollouts[:10] + rollouts[40:70], SUMS, name="uneven")
    table = digits_table([{"iteration": 0, "validation": evaluation.to_dict()}])
    assert table.splitlines()[-2:] == ["mean of groups   50.0%", "all              25.0%"]


def test_the_markdown_table_keeps_its_columns_whatever_a_name_holds():
    evaluation = evaluation_from(
        graded(random.Random(0), (40,), model="a|b\n<c>"), SUMS, name="x|y"
    )
    lines = markdown_table([evaluation]).splitlines()
    assert len(lines) == 3
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert "| 40 | 40 | 100.0% | 91.2\N{EN DASH}100.0 | 0 | 0 | 0 | 0 |" in lines[2]


# Problems gained and lost


def with_shared_problems(folder: Path) -> Path:
    """Give all measurements of a scripted run the same problems, as a real run has."""
    for number in range(5):
        held_out = graded(random.Random(5), RIGHT[number], model="m")
        write_jsonl(folder / f"iteration-{number}" / "validation.graded.jsonl", held_out)
    for name, rights in (("base", (40, 36, 4, 2, 0)), ("iteration-3", (40, 40, 39, 38, 33))):
        tested = graded(random.Random(6), rights, model="m")
        write_jsonl(folder / f"test-{name}.graded.jsonl", tested)
    return folder


def test_gained_and_lost_problems_come_with_an_exact_p(tmp_path):
    """From base to 1: 2 + 16 + 3 + 1 gained, p = 2 / 2**22. From 3 to 4: 1 + 2 + 4 lost, p = 2 / 2**7.
    On the test problems, from base to 3: 4 + 35 + 36 + 33 gained."""
    folder = with_shared_problems(fake_run(tmp_path / "run"))
    page = Page(report(folder).read_text(encoding="utf-8"))
    rows = page.table("iteration", "against")
    assert [(row["iteration"], row["against"]) for row in rows] == [
        ("1", "base"), ("2", "1"), ("3", "2"), ("4", "3"), ("3, test", "base, test"),
    ]  # fmt: skip
    shown = [(row["gained"], row["lost"], row["net"], row["p"]) for row in rows]
    assert shown[0] == ("22", "0", "+22", "4.8e-07")
    assert shown[3] == ("0", "7", "-7", "0.016")
    assert shown[4][:3] == ("108", "0", "+108")
    assert {row["problems"] for row in rows} == {"200"}
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "| 4 | 3 | 200 | 0 | 7 | -7 | 0.016 |" in text
    assert "exact McNemar test" in page.text and "exact McNemar test" in text
    assert "gives the same completions" in page.text


@pytest.mark.parametrize("engine", ["vllm", "ray"])
def test_a_page_says_where_an_engine_does_not_repeat_itself(tmp_path, engine):
    folder = with_shared_problems(fake_run(tmp_path / "run"))
    with (folder / "config.yaml").open("a") as file:
        file.write(f"sampler: {engine}\n")
    page = Page(report(folder).read_text(encoding="utf-8"))
    assert (
        f"With the engine of this run, {engine}, two measurements of one model can differ"
        in page.text
    )
    assert "gives the same completions" not in page.text


def test_a_config_that_is_no_yaml_does_not_stop_the_page(tmp_path):
    folder = with_shared_problems(fake_run(tmp_path / "run"))
    (folder / "config.yaml").write_text("model: [unclosed\n")
    assert "[unclosed" in report(folder).read_text(encoding="utf-8")
    assert compare_runs([folder, folder], tmp_path / "compare.html").is_file()


# One quantity, one interval


RANGE = re.compile(
    r"(\d+\.\d)%?(?:,? 95% interval| \()? ?\(?\[?(\d+\.\d)%?(?:\N{EN DASH}|, )(\d+\.\d)"
)


def test_an_accuracy_has_one_interval_on_the_page_in_markdown_and_in_the_console(tmp_path):
    """The interval of a mean over groups of one size, by hand for the best model on the test problems in
    `test_the_page_opens_with_what_the_run_reached`: 95.0% (90.1 to 96.9)."""
    folder = fake_run(tmp_path / "run")
    source = report(folder).read_text(encoding="utf-8")
    page = Page(source)
    labels = " ".join(value for _, name, value in page.attributes if name == "aria-label")
    config = StarConfig(task="arithmetic", out=folder)
    summary = json.loads((folder / "summary.json").read_text())
    places = {
        "page": page.text,
        "labels": labels,
        "markdown": (folder / "report.md").read_text(encoding="utf-8").replace(" | ", " "),
        "console": star_ending(config, summary),
    }
    assert "(200 problems, mean of 5 groups)" in places["console"]
    places["console"] += "".join(map(iteration_line, read_run(folder).rows))
    found = {
        place: {(low, high) for value, low, high in RANGE.findall(text) if value == "95.0"}
        for place, text in places.items()
    }
    # 38 of 40 problems with four digits are 95.0%, too, with another interval; they are in the tables only
    assert found["console"] == found["markdown"] == found["labels"] == {("90.1", "96.9")}
    assert found["page"] == {("90.1", "96.9"), ("83.5", "98.6")}


def test_the_console_says_when_the_best_model_is_the_base_model(tmp_path):
    folder = fake_run(tmp_path / "run")
    config = StarConfig(task="arithmetic", out=folder)
    summary = json.loads((folder / "summary.json").read_text())
    base = summary | {"best": 0, "best model": "org/base"}
    line = next(one for one in star_ending(config, base).splitlines() if one.startswith("Model"))
    assert line == "Model   org/base (the base model: no trained model was better)"
    better = summary | {"best model": str(folder / "model")}
    assert f"Model   {folder / 'model'}\n" in star_ending(config, better)


def test_plot_and_table_have_the_same_intervals(run, page):
    source = (run / "report.html").read_text(encoding="utf-8")
    svg = source[source.index('aria-label="Validation accuracy by iteration"') :]
    svg = svg[: svg.index("</svg>")]
    ticks = [float(y) for y in re.findall(r'd="M \S+ (\S+) \nL \S+ \1 \n" clip-path', svg)]
    zero, hundred = max(ticks), min(ticks)
    band = re.search(r"FillBetween.*?<path[^>]*\sd=\"(.*?)\"", svg, re.DOTALL)
    assert band is not None
    height = float(re.findall(r'viewBox="0 0 \S+ (\S+)"', svg)[0])
    points = [(float(x), height + float(y)) for x, y in re.findall(r"(\S+) (-\S+)", band[1])]
    ends: dict[float, set[float]] = {}
    for x, y in points:
        ends.setdefault(x, set()).add(round(100 * (y - zero) / (hundred - zero), 1))
    plotted = [tuple(sorted(ends[x])) for x in sorted(ends)]
    cells = re.findall(r'<td class="heat"[^>]*>[\d.]+%<small>([\d.]+)\N{EN DASH}([\d.]+)', source)
    per_row = 6  # all, and five groups
    tabled = [tuple(map(float, cell)) for cell in cells[::per_row]]
    assert plotted == tabled and len(tabled) == 5


def test_groups_of_different_size_have_two_accuracies_with_names():
    """10 of 10 and 0 of 30: 25% of all (Wilson: 14.2 to 40.2), and 50% as the mean of the groups."""
    rollouts = graded(random.Random(0), (40, 0), model="m")
    evaluation = evaluation_from(rollouts[:10] + rollouts[40:70], SUMS, name="uneven")
    head, _, row = markdown_table([evaluation]).splitlines()
    cells = dict(zip(head.split(" | ")[:6], row.split(" | ")[:6], strict=True))
    assert cells["accuracy"] == "25.0%" and cells["95% interval"] == "14.2\N{EN DASH}40.2"
    assert head.split(" | ")[6] == "mean of groups" and row.split(" | ")[6] == "50.0%"
