"""The embedded model: what ships, what it can do, and the recipe that made it."""

import json
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from selftaught.models.embedded import character_tokenizer, corpus, embedded_model, rebuild
from selftaught.tasks.arithmetic import arithmetic, split_of

MEGABYTE = 2**20


@pytest.fixture(scope="module")
def base():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = embedded_model()
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_what_ships_is_safetensors_of_at_most_four_megabytes():
    files = list(embedded_model().iterdir())
    assert {file.name for file in files} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert not [file.name for file in files if file.suffix in (".bin", ".pt", ".pkl")]
    assert sum(file.stat().st_size for file in files) <= 4 * MEGABYTE


def test_the_tokenizer_reads_characters_and_ends_a_text_with_a_line_end(base):
    tokenizer = base[1]
    text = "29+57 (86)=b9+7+0=16;a2+5+1=08;#86"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token == "\n"
    assert tokenizer("\n")["input_ids"] == [tokenizer.eos_token_id]
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer("é")["input_ids"] == [tokenizer.unk_token_id]


def operands(read: str) -> tuple[str, str]:
    """The two numbers of a pre-training text: from its question, or from its worked columns."""
    if not read.endswith(";"):
        first, second = read[:-1].partition(" ")[0].split("+")
        return first, second
    lines = read.removesuffix(";").split(";")
    return "".join(line[1] for line in lines[::-1]), "".join(line[3] for line in lines[::-1])


def test_the_corpus_holds_no_held_out_sum_and_works_long_ones_only_with_the_answer_shown():
    kinds: Counter[tuple[str, int, bool]] = Counter()
    for read, _ in islice(corpus(seed=0), 5000):
        a, b = operands(read)
        assert split_of(int(a), int(b)) == "train"
        assert "(" not in read or f" ({int(a) + int(b)})" in read
        kinds[read[-1], len(a), "(" in read] += 1
    assert {n for kind, n, _ in kinds if kind == ":"} == {1, 2, 3, 4, 5}
    worked_long = {(n, shown) for kind, n, shown in kinds if kind == "=" and n > 2}
    assert worked_long == {(3, True), (4, True), (5, True)}


def test_importing_the_package_does_not_import_torch():
    script = "import sys, selftaught.models.embedded; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_the_recipe_gives_the_same_weights_twice_and_others_for_another_seed(tmp_path: Path):
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        rebuild(tmp_path / name, seed, steps=3, most_last_steps=0)
    weights = {
        name: (tmp_path / name / "model.safetensors").read_bytes()
        for name in ("one", "two", "other")
    }
    assert weights["one"] == weights["two"] != weights["other"]
    assert set(json.loads((tmp_path / "one" / "config.json").read_text())["architectures"]) == {
        "LlamaForCausalLM"
    }


def test_the_shipped_tokenizer_is_the_recipes(tmp_path: Path):
    character_tokenizer().save_pretrained(tmp_path)
    shipped = embedded_model() / "tokenizer.json"
    assert json.loads((tmp_path / "tokenizer.json").read_text()) == json.loads(shipped.read_text())


def greedy(model, tokenizer, prompts: list[str], room: int) -> list[str]:
    """Plain `generate`, left-padded: a road of its own, not the package's sampler."""
    tokenizer.padding_side = "left"
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    ids = model.generate(**batch, max_new_tokens=room, do_sample=False)
    return tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.slow
def test_the_base_works_short_sums_well_and_long_ones_hardly(base):
    """The bounds of the issue: 95% and more at 1-2 digits, then at most 15%, 5% and 5%; mean 50%."""
    task = arithmetic()
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    problems = task.problems("test")
    model, tokenizer = base
    prompts = [f"{problem.question}=" for problem in problems]
    texts = greedy(model, tokenizer, prompts, task.max_tokens)
    for problem, text in zip(problems, texts, strict=True):
        group = f"{len(problem.question) // 2} digits"
        asked[group] += 1
        right[group] += task.extract(text) == problem.gold
    accuracy = {group: right[group] / asked[group] for group in asked}
    assert accuracy["1 digits"] >= 0.95 and accuracy["2 digits"] >= 0.95
    assert 0 < accuracy["3 digits"] <= 0.15
    assert accuracy["4 digits"] <= 0.05 and accuracy["5 digits"] <= 0.05
    assert sum(accuracy.values()) / 5 <= 0.5
