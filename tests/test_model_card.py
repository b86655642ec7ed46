"""Model cards: what they say about a run, that the Hub accepts them, and that no text breaks them."""

import json
import re
import shlex
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_stub import refused_metadata
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_eval_result

from selftaught.cli import main
from selftaught.methods.rft import RftConfig, run_rft
from selftaught.methods.star import StarConfig, run_star
from selftaught.methods.step_dpo import run_step_dpo
from selftaught.methods.step_values import StepDpoConfig
from selftaught.methods.vstar import VstarConfig, run_vstar
from selftaught.quiet.config import QuietConfig
from selftaught.reports import citations
from selftaught.reports.model_card import (
    BaseModel,
    Card,
    Result,
    Trained,
    TrainingData,
    base_model,
    card_text,
    changed_settings,
    task_data,
    text_data,
)
from selftaught.tasks import open_task

BENIGN = Card(
    title="sums", method="STaR", lead="A model.", base=BaseModel("base", "org/base", "mit"),
    data=TrainingData("data", "mit", ["org/data"]), papers=[citations.STAR],
    trained=[Trained("iteration 1", "base", 24, 8, "completions")], settings={"k": "v"},
    results=[Result("accuracy", "accuracy", 0.5, 0.25, 0.75, "40 problems")],
    measured_by="selftaught evaluate", trained_by="selftaught star",
)  # fmt: skip
HOSTILE = [
    "a\n---\nlicense: mit\n---\n# b", "x: [y", "'\"", "{{ 1 + 1 }} {% raw %}", "| a | b |\n|---|---|", "`code` ``two``",
    "```\n# out\n```", "<script>alert(1)</script>", "[a](javascript:alert(1))", "![a](http://x/y.png)", "*b* __c__ ~~d~~",
    "# heading", "\\| \\` \\\\", "\u202eright to left\u2066", "\x1b[31mred\x00", "$$x$$", "no", "null", "1e3", "~",
    "&lt;b&gt; &#42;", "!!python/object/apply:os.system [ls]", "&anchor *anchor", "https://example.org/a_b",
    "- item", "1. item", "   indented", "\ud800", "e\u0301 ✓ 日本", "a" * 3000,
]  # fmt: skip


def parsed(text: str) -> Any:
    """The metadata as huggingface_hub reads it; the Hub would accept it."""
    assert refused_metadata(text) == []
    return ModelCard(text, ignore_metadata_errors=False).data


def structure(text: str) -> list[str]:
    """The blocks and inline elements of the Markdown, without their texts."""
    markdown_it = pytest.importorskip("markdown_it")
    parser = markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"])
    body = text.partition("\n---\n\n")[2]
    found = []
    for token in parser.parse(body):
        found.append(token.type)
        if token.type == "inline":
            found += [one.type for one in token.children or () if one.type not in ("text", "text_special", "code_inline")]  # fmt: skip
    return found


def shown(text: str) -> str:
    """What a reader of the page sees."""
    import html

    markdown_it = pytest.importorskip("markdown_it")
    page = markdown_it.MarkdownIt("commonmark").enable("table").render(text.partition("\n---\n\n")[2])  # fmt: skip
    return html.unescape(re.sub(r"<[^>]+>", "", page))


# ---------------------------------------------------------------- texts that could break a card


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text)[:30])
def test_a_text_changes_neither_the_yaml_nor_the_markdown(text: str):
    card = replace(
        BENIGN, title=text, method=text, base=BaseModel(text, None, "mit"), data=TrainingData(text, text),
        trained=[Trained(text, text, 24, 8, text)], settings={"k": text},
        results=[Result(text, "accuracy", 0.5, 0.25, 0.75, text)],
    )  # fmt: skip
    made, usual = card_text(card), card_text(replace(BENIGN, base=BaseModel("base", None, "mit")))
    assert structure(made) == structure(usual)
    assert all(line == line.strip("\r") for line in made.split("\n"))
    data, expected = (yaml.safe_load(one.split("\n---\n")[0]) for one in (made, usual))
    assert data.keys() == expected.keys() - {"datasets"}
    [index] = data["model-index"]
    assert isinstance(index["name"], str)
    assert parsed(made).license == "mit"


@pytest.mark.parametrize("text", ["`code` | *b* <i>", "a_b_c __d__", "\\ & &amp; $ ~", "[x](y)"])
def test_a_reader_sees_the_text_as_it_was(text: str):
    made = shown(card_text(replace(BENIGN, title=text, settings={"k": text})))
    assert made.count(text) == 2


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text)[:30])
def test_a_command_stays_one_block_of_code(text: str):
    card = replace(BENIGN, trained_by=f"selftaught star --task {shlex.quote(text)}")
    assert structure(card_text(card)) == structure(card_text(BENIGN))


def test_a_token_is_removed_wherever_it_stands(monkeypatch):
    token, other = "my-private-endpoint-token", "hf_" + "a1B2" * 9
    monkeypatch.setenv("HF_TOKEN", token)
    card = replace(
        BENIGN, title=token, settings={"a": other, "b": [token]}, trained_by=f"x --training.a {other}",
        base=BaseModel(other), data=TrainingData(token),
    )  # fmt: skip
    made = card_text(card)
    assert token not in made and other not in made
    assert made.count("[token removed]") + made.count("&#91;token removed&#93;") >= 6


def test_local_paths_are_shortened(tmp_path: Path):
    secret = tmp_path / "home of ada" / "questions.jsonl"
    secret.parent.mkdir()
    secret.write_text('{"question": "1+1", "answer": "2"}\n')
    config = StarConfig(
        out=tmp_path / "run", model=str(tmp_path / "base"), task="question_file",
        task_options={"path": str(secret)}, training={"logging_dir": str(tmp_path / "logs")},
    )  # fmt: skip
    data = task_data(open_task("question_file", path=str(secret)))
    card = replace(BENIGN, settings=changed_settings(config), data=data, base=base_model(str(tmp_path / "base")))  # fmt: skip
    made = card_text(card)
    assert str(tmp_path) not in made and "home of ada" not in made
    assert "questions.jsonl" in made and "not stated" in made


# ---------------------------------------------------------------- licences


def test_licences_of_bases_are_read_and_never_invented(tmp_path: Path):
    for name, head, expected in (
        ("stated", "license: apache-2.0\nbase_model: org/first", BaseModel("stated", "org/first", "apache-2.0")),
        ("other", "license: other\nlicense_name: my-1.0\nlicense_link: LICENSE", BaseModel("other", None, "other", "my-1.0", "LICENSE")),
        ("silent", "tags: [a]", BaseModel("silent")),
        ("list", "license: [mit, gpl]", BaseModel("list")),
        ("local", "license: mit\nbase_model: /home/ada/model", BaseModel("local", None, "mit")),
        ("broken", "license: [mit", BaseModel("broken")),
        ("text", "just a text", BaseModel("text")),
    ):  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(f"---\n{head}\n---\n\n# x\n")
        assert base_model(str(tmp_path / name)) == expected, name
    (tmp_path / "empty").mkdir()
    assert base_model(str(tmp_path / "empty")) == BaseModel("empty")
    made = card_text(replace(BENIGN, base=BaseModel("empty")))
    assert yaml.safe_load(made.split("\n---\n")[0])["license"] == "unknown"
    assert "does not state a licence" in made


def test_a_licence_that_the_hub_does_not_know_is_other_with_its_name():
    for license, name in (("My Licence 1.0!", None), ("other", "my-licence-1.0")):
        made = card_text(replace(BENIGN, base=BaseModel("b", None, license, name)))
        data = yaml.safe_load(made.split("\n---\n")[0])
        assert (data["license"], data["license_name"]) == ("other", "my-licence-1.0")
        assert refused_metadata(made) == []


def test_a_cached_card_of_the_hub_is_read_without_the_hub(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cached = tmp_path / "models--org--small"
    (cached / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    (cached / "snapshots" / ("0" * 40) / "README.md").write_text("---\nlicense: llama3.2\n---\n")
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    assert base_model("org/small") == BaseModel("org/small", "org/small", "llama3.2")
    assert base_model("org/unknown") == BaseModel("org/unknown", "org/unknown")


@pytest.mark.parametrize(("task", "license", "data_sets"), [
    ("gsm8k", "mit", ("openai/gsm8k",)),
    ("commonsense_qa", "mit", ("tau/commonsense_qa",)),
    ("competition_math", "mit", ("EleutherAI/hendrycks_math", "HuggingFaceH4/MATH-500")),
])  # fmt: skip
def test_built_in_tasks_state_their_data(task: str, license: str, data_sets: tuple[str, ...]):
    found = task_data(open_task(task))
    assert (found.license, tuple(found.data_sets)) == (license, data_sets)
    assert license.upper() in found.text  # the facts of the task say the same


def test_a_users_texts_have_no_licence(tmp_path: Path):
    path = tmp_path / "texts.jsonl"
    path.write_text("{}\n")
    assert text_data(str(path)) == TrainingData("the file texts.jsonl")


# ---------------------------------------------------------------- settings and citations


def test_only_changed_settings_are_listed():
    config = StarConfig(iterations=3, task_options={"digits": "3"}, out=Path("elsewhere"))
    assert changed_settings(config) == {"iterations": 3, "task_options.digits": "3"}


def test_of_the_options_of_quiet_star_only_changed_ones_are_listed():
    from dataclasses import asdict

    from selftaught.cli.quiet_train import TrainOptions

    config = asdict(replace(QuietConfig(), thought_tokens=3))
    assert changed_settings(TrainOptions(quiet=config)) == {"quiet.thought_tokens": 3}


def test_citations_are_bibtex_with_balanced_braces():
    papers = [one for one in vars(citations).values() if isinstance(one, citations.Paper)]
    assert len(papers) == 8 and len({one.arxiv for one in papers}) == 8
    for paper in papers:
        assert paper.bibtex.count("{") == paper.bibtex.count("}")
        assert re.fullmatch(r"\d{4}\.\d{5}", paper.arxiv)
        assert all(re.fullmatch(r"[\w -]+, [\w. -]+", name) for name in paper.authors.split(" and "))  # fmt: skip
    assert citations.STAR.short == "Zelikman et al. 2022, arXiv:2203.14465"


def test_the_results_have_the_form_of_huggingface_hubs_own_function():
    made = yaml.safe_load(card_text(BENIGN).split("\n---\n")[0])["model-index"]
    own = metadata_eval_result(
        model_pretty_name="sums", task_pretty_name="x", task_id="text-generation", metrics_pretty_name="x",
        metrics_id="accuracy", metrics_value=0.5, dataset_pretty_name="data", dataset_id="unknown",
    )["model-index"]  # fmt: skip
    [[mine], [theirs]] = made[0]["results"], own[0]["results"]
    assert made[0]["name"] == own[0]["name"]
    assert mine["dataset"] == theirs["dataset"]
    assert mine["task"]["type"] == theirs["task"]["type"]
    assert mine["metrics"][0].keys() <= theirs["metrics"][0].keys()
    assert mine["metrics"][0]["value"] == theirs["metrics"][0]["value"] == 0.5
    assert mine["metrics"][0]["name"] == "accuracy, 40 problems, 95% interval 25.0% to 75.0%"


def test_a_value_that_is_not_a_number_is_not_a_result_of_the_hub():
    nan = float("nan")
    made = card_text(replace(BENIGN, results=[Result("gain", "gain", nan, nan, nan, "1 text")]))
    assert "model-index" not in made and refused_metadata(made) == []


# ---------------------------------------------------------------- cards of real runs

SMALL: dict[str, Any] = {
    "task_options": {"digits": "3", "train": 24, "validation": 4, "test": 16},
    "seed_samples": 8, "max_steps": 12, "temperature": 1.0, "train_batch_size": 16,
}  # fmt: skip


def lineage(card: str) -> list[list[str]]:
    """The rows of the table of the lineage."""
    table = card.partition("## Lineage\n\n")[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table]


def lines_in(path: Path) -> int:
    return len(path.read_text().splitlines())


@pytest.mark.slow
def test_the_card_of_star_says_what_the_run_did_and_its_command_gives_its_number(
    tmp_path: Path, capsys
):
    out = tmp_path / "star"
    options = {"task_options": SMALL["task_options"], "iterations": 2, "start_steps": 8}
    summary = run_star(StarConfig.small(**options, out=out, from_base=False, patience=5))
    text = (out / "model" / "README.md").read_text()
    assert ModelCard.load(out / "model" / "README.md").content == text
    data = parsed(text)
    assert data.license == "apache-2.0" and data.base_model is None
    [result] = data.eval_results
    tested = summary["test"]["best"]
    assert result.metric_value == pytest.approx(tested["accuracy"], abs=1e-6)
    assert f"95% interval {tested['low']:.1%} to {tested['high']:.1%}" in str(result.metric_name)
    rows = lineage(text)
    assert len(rows) == summary["best"]
    for number, (name, start, examples, steps) in enumerate(rows, 1):
        folder = out / f"iteration-{number}"
        assert name == f"iteration {number}"
        assert start == ("the base model" if number == 1 else f"iteration {number - 1}")
        assert examples.split()[0] == str(lines_in(folder / "examples.jsonl"))
        if number == summary["best"]:
            assert int(steps) == json.loads((folder / "model" / "training.json").read_text())["steps"]  # fmt: skip
    [command] = re.findall(r"^selftaught (evaluate .*)$", text, re.MULTILINE)
    arguments = shlex.split(command.replace("MODEL", str(out / "model")))
    capsys.readouterr()
    assert main([*arguments, "--out", str(tmp_path / "again.jsonl")]) == 0
    assert f" {tested['accuracy']:.1%} " in capsys.readouterr().out
    [again] = re.findall(r"^selftaught (star .*)$", text, re.MULTILINE)
    assert main([*shlex.split(again), "--out", str(tmp_path / "again")]) == 0
    repeated = json.loads((tmp_path / "again" / "summary.json").read_text())
    assert repeated["test"]["best"]["right"] == tested["right"]


@pytest.mark.slow
def test_the_cards_of_rft_vstar_and_step_dpo_say_where_their_models_come_from(tmp_path: Path):
    run_rft(RftConfig.small(**SMALL, out=tmp_path / "rft", k=[2, 4]))
    run_vstar(VstarConfig.small(**SMALL, out=tmp_path / "vstar", iterations=2, k=4, candidates=5,
                                pairs_per_problem=6, verifier_max_steps=3))  # fmt: skip
    run_step_dpo(StepDpoConfig.small(**SMALL, out=tmp_path / "step", n=6, wrong_per_problem=3, best_of=3, repeats=2,
                                     dpo_max_steps=3, methods=["step_dpo"], sizes=[24], start="rft"))  # fmt: skip
    expected = {
        "rft/model": [("SFT", "the base model", "sft/examples.jsonl"), ("RFT", "the base model", "k-4/examples.jsonl")],
        "vstar/model": [
            ("SFT", "the base model", "sft/examples.jsonl"),
            ("iteration 1", "the base model", "iteration-1/examples.jsonl"),
            ("iteration 2", "the base model", "iteration-2/examples.jsonl"),
        ],
        "vstar/verifier": [
            ("SFT", "the base model", "sft/examples.jsonl"),
            ("iteration 1", "the base model", "iteration-1/examples.jsonl"),
            ("iteration 2", "the base model", "iteration-2/examples.jsonl"),
            ("verifier", "SFT", "verifier-2/preferences.jsonl"),
        ],
        "step/model": [
            ("SFT", "the base model", "size-24/sft/examples.jsonl"),
            ("RFT", "the base model", "size-24/rft/examples.jsonl"),
            ("per-step DPO", "RFT", "size-24/step_dpo/preferences.jsonl"),
        ],
    }  # fmt: skip
    for folder, models in expected.items():
        path = tmp_path / folder / "README.md"
        text = path.read_text()
        assert len(parsed(text).eval_results) == 1
        found = [(row[0], row[1], row[2].split()[0]) for row in lineage(text)]
        run = tmp_path / folder.split("/")[0]
        assert found == [(name, start, str(lines_in(run / file))) for name, start, file in models]
        assert str(tmp_path) not in text
    verifier = (tmp_path / "vstar" / "verifier" / "README.md").read_text()
    metrics = (tmp_path / "vstar" / "metrics.jsonl").read_text().splitlines()
    [chosen] = [row for row in map(json.loads, metrics) if row["name"] == "choices: V-STaR"]
    per_problem = chosen["choices"]["best"]["5"]
    assert f"| {sum(per_problem) / len(per_problem):.1%} |" in verifier
    assert "selftaught solve QUESTION" in verifier


@pytest.mark.slow
def test_models_of_quiet_star_distillation_and_pause_tokens_have_cards(
    tiny_model_dir: Path, tmp_path: Path
):
    texts, data = tmp_path / "texts.jsonl", tmp_path / "data.jsonl"
    texts.write_text("".join(json.dumps({"text": f"Q: What is {a} + {b}?\nA: {a + b}."}) + "\n"
                             for a in range(5) for b in range(6)))  # fmt: skip
    data.write_text("".join(json.dumps({"prompt": f"{a}+1=", "completion": str(a + 1)}) + "\n" for a in range(8)))  # fmt: skip
    shared = ["--max-steps", "2", "--training.use_cpu", "true"]
    quiet, distilled, pause = tmp_path / "quiet", tmp_path / "distilled", tmp_path / "pause"
    assert main(["quiet", "train", "--model", str(tiny_model_dir), "--text", str(texts), "--out", str(quiet), *shared,
                 "--length", "24", "--quiet.thought_tokens", "2", "--quiet.initial_text", "A", "--held_out", "4"]) == 0  # fmt: skip
    assert main(["quiet", "distill", "--model", str(quiet / "model"), "--text", str(texts), "--out", str(distilled),
                 *shared, "--length", "24", "--held_out", "4"]) == 0  # fmt: skip
    assert main(["pause", "train", "--model", str(tiny_model_dir), "--data", str(data), "--pauses", "3", "--out",
                 str(pause), *shared]) == 0  # fmt: skip
    cards = {}
    for folder, arxiv in (
        (quiet / "model", "2403.09629"),
        (distilled / "model", "2505.17746"),
        (pause, "2310.02226"),
    ):
        text = (folder / "README.md").read_text()
        cards[folder] = parsed(text)
        assert cards[folder].license == "unknown"  # the base has no card
        assert f"eprint = {{{arxiv}}}" in text and str(tmp_path) not in text
        assert lineage(text)[-1][3] == "2"
    gain = json.loads((quiet / "after.json").read_text())["gain"]
    first = (cards[quiet / "model"].eval_results or [])[0]
    assert first.metric_value == pytest.approx(gain, abs=1e-6)
    assert not cards[pause].eval_results


def test_a_card_has_every_part():
    """Nothing of what a card knows is left out of its text."""
    text = card_text(BENIGN)
    for part in ("sums", "A model.", "org/base", "mit", "org/data", "iteration 1", "50.0%", "25.0% to 75.0%",
                 "selftaught evaluate", "selftaught star", "Python 3", "transformers", "@misc{zelikman2022star"):  # fmt: skip
        assert part in text
    assert {one.name for one in fields(Card)} >= {"settings", "trained", "results", "papers"}
