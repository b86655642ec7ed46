"""RFT, V-STaR, per-step DPO and their comparison, run whole on the small model of this package.

What a run leaves is checked against what its own stores say, counted anew in plain Python.
"""

import itertools
import json
import math
import shutil
from pathlib import Path

import pytest
from narrowed import text, token_ids
from safetensors.torch import load_file, save_file

from selftaught import samplers
from selftaught.cli import main
from selftaught.evaluation import verifier
from selftaught.methods import run, star
from selftaught.methods.comparison import CompareConfig, run_compare
from selftaught.methods.rft import RftConfig, run_rft
from selftaught.methods.run import open_run
from selftaught.methods.step_dpo import run_step_dpo
from selftaught.methods.step_values import StepDpoConfig, prefix_id
from selftaught.methods.vstar import VstarConfig, run_vstar, scores_of
from selftaught.models.embedded import embedded_model
from selftaught.records import Rollout, read_rollouts
from selftaught.reports.rft_page import current_name
from selftaught.rollouts.selection import NothingToLearn
from selftaught.rollouts.steps import ValuedRollout
from selftaught.training import open_tokenizer, sft_config, train_sft
from selftaught.training.trainer import causal_lm

pytestmark = pytest.mark.slow

SMALL = {
    "task_options": {"digits": "3", "train": 24, "validation": 4, "test": 16},
    "seed_samples": 8, "max_steps": 12, "temperature": 1.0, "train_batch_size": 16,
}  # fmt: skip


def rows_of(out: Path) -> dict[str, dict]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return {row["name"]: row for row in map(json.loads, lines)}


def jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def rft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("methods") / "rft"
    run_rft(RftConfig.small(**SMALL, out=out, k=[2, 4], baselines=True))
    return out


@pytest.fixture(scope="module")
def vstar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("methods") / "vstar"
    run_vstar(
        VstarConfig.small(
            **SMALL, out=out, iterations=2, k=4, candidates=5, pairs_per_problem=6,
            verifier_max_steps=3, baselines=True, table=True,
        )
    )  # fmt: skip
    return out


@pytest.fixture(scope="module")
def step_dpo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("methods") / "step"
    run_step_dpo(
        StepDpoConfig.small(
            **SMALL, out=out, n=6, wrong_per_problem=3, best_of=3, repeats=2, dpo_max_steps=3,
            methods=["rft", "dpo", "dpo_edit", "step_dpo", "advantage"], sizes=[24], sft_sizes=[12],
            right_per_problem=2,
        )
    )  # fmt: skip
    return out


class Seen(list[str]):
    """What a run opened, closed and trained, in order; at no time may two things want the memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self._open: str | None = None
        for module, name in (
            (samplers, "open_sampler"), (verifier, "open_scorer"), (verifier, "OutcomeModel"),
            (run, "launch"),
        ):  # fmt: skip
            monkeypatch.setattr(module, name, getattr(self, name)(getattr(module, name)))

    def open_sampler(self, real):
        def opened(name: str, model: str, **options: object):
            sampler, short = real(name, model, **options), "/".join(Path(model).parts[-3:-1])
            assert self._open is None
            self._open = short
            self.append(f"open {short}")
            close = sampler.close

            def closed() -> None:
                close()
                self._open = None

            sampler.close = closed
            return sampler

        return opened

    def open_scorer(self, real):
        def opened(*args, **options):
            assert self._open is None
            self.append("score")
            return real(*args, **options)

        return opened

    OutcomeModel = open_scorer

    def launch(self, real):
        def launched(stage, *more):
            assert self._open is None
            self.append(f"train {stage.out.parent.name}")
            return real(stage, *more)

        return launched


def test_star_opens_every_model_once_and_none_while_another_trains(monkeypatch, tmp_path: Path):
    seen = Seen(monkeypatch)
    options = {"task_options": SMALL["task_options"], "iterations": 2, "start_steps": 4}
    star.run_star(star.StarConfig.small(**options, out=tmp_path, keep_models="all"))
    base, out = "/".join(Path(embedded_model()).parts[-3:-1]), tmp_path.name
    rounds = [[f"train iteration-{n}", f"open {out}/iteration-{n}"] for n in (1, 2)]
    best = json.loads((tmp_path / "summary.json").read_text())["best"]
    tested = [f"open {out}/iteration-{best}"] if best == 1 else []  # 2 is still open
    assert seen == [f"open {base}", *rounds[0], *rounds[1], *tested, f"open {base}"]
    assert seen._open is None


def test_a_comparison_opens_one_model_at_a_time(monkeypatch, tmp_path: Path):
    seen = Seen(monkeypatch)
    run_compare(CompareConfig.small(**SMALL, out=tmp_path, budget=12_000, candidates=3, vstar={"iterations": 1, "verifier_max_steps": 3, "baselines": True}, methods=["vstar", "star", "step_dpo"]))  # fmt: skip
    assert seen._open is None
    assert seen.count("score") >= 3
    assert not [one for one, then in itertools.pairwise(seen) if one == then and "open" in one]


# RFT


def test_rft_learns_one_completion_of_each_path_and_the_seed_set(rft: Path):
    seed = jsonl(rft / "sft" / "seed.jsonl")
    graded = read_rollouts(rft / "rollouts.graded.jsonl")
    assert len(graded) == 24 * 4
    for k in (2, 4):
        ways = {(one.problem.id, one.completion) for one in graded if one.index < k and one.correct}
        examples = jsonl(rft / f"k-{k}" / "examples.jsonl")
        assert examples[: len(seed)] == seed
        assert len(examples) == len(seed) + len(ways)
        row = rows_of(rft)[f"RFT, k={k}"]
        assert row["distinct per problem"] == len(ways) / 24
        assert row["sampled tokens"] == sum(len(token_ids(r)) for r in graded if r.index < k)


def test_rft_fine_tunes_the_base_and_not_the_sampler(rft: Path, tmp_path: Path):
    from selftaught.models.embedded import embedded_model
    from selftaught.records import read_examples

    config = RftConfig.small(**SMALL)
    options = {
        "num_train_epochs": config.num_train_epochs, "max_steps": 12, "learning_rate": 3e-4,
        "lr_scheduler_type": "cosine", "warmup_steps": 0.03, "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 1, "max_length": 1024, "save_steps": 100, "seed": 0,
    }  # fmt: skip
    examples = read_examples(rft / "k-4" / "examples.jsonl")
    train_sft(embedded_model(), examples, sft_config(tmp_path / "t", **options), out=tmp_path / "m")
    mine = causal_lm(str(tmp_path / "m")).state_dict()
    theirs = causal_lm(str(rft / "model")).state_dict()
    assert all(bool((mine[name] == theirs[name]).all()) for name in mine)


def test_more_samples_are_added_to_those_stored(rft: Path, tmp_path: Path):
    out = tmp_path / "grown"
    run_rft(RftConfig.small(**SMALL, out=out, k=[2]))
    first = (out / "rollouts.jsonl").read_bytes()
    run_rft(RftConfig.small(**SMALL, out=out, k=[2, 4]))
    assert (out / "rollouts.jsonl").read_bytes() == first
    assert [p.name for p in sorted(out.glob("rollouts-*.jsonl"))] == ["rollouts-2.jsonl"]
    key = lambda one: (one.problem.id, one.index)  # noqa: E731
    grown = sorted(read_rollouts(out / "rollouts.graded.jsonl"), key=key)
    at_once = sorted(read_rollouts(rft / "rollouts.graded.jsonl"), key=key)
    assert [one.token_ids for one in grown] == [one.token_ids for one in at_once]
    weights = "k-4/model/model.safetensors"
    assert (out / weights).read_bytes() == (rft / weights).read_bytes()


def test_rft_pools_the_rollouts_of_another_model(rft: Path, tmp_path: Path):
    out = tmp_path / "pooled"
    pool = [rft / "rollouts.graded.jsonl"]
    run_rft(RftConfig.small(**(SMALL | {"seed": 1}), out=out, k=[2], pool=pool))
    both = [*read_rollouts(out / "rollouts.graded.jsonl"), *read_rollouts(pool[0])]
    asked = {one.problem.id for one in both}
    ways = {(one.problem.id, one.completion) for one in both if one.correct}
    examples = jsonl(out / "k-2" / "examples.jsonl")
    assert len(examples) == len(jsonl(out / "sft" / "seed.jsonl")) + len(ways)
    assert len(asked) == 24


def test_rft_has_its_baselines(rft: Path):
    rows = rows_of(rft)
    every = rows["all correct completions, k=4"]
    graded = read_rollouts(rft / "rollouts.graded.jsonl")
    kept = sum(bool(one.correct) for one in graded)
    seed = len(jsonl(rft / "sft" / "seed.jsonl"))
    assert every["training"]["trained on"] == seed + kept
    drawn = rows["random sample, k=4"]["training"]["trained on"]
    assert drawn == rows["RFT, k=4"]["training"]["trained on"]
    alone = rows["D only, steps of k=4"]["training"]
    assert (alone["trained on"], alone["steps"]) == (seed, rows["RFT, k=4"]["training"]["steps"])


def test_rows_of_earlier_versions_have_the_present_names():
    names = {"all right ones, k=4": "all correct completions, k=4", "as many at random, k=16": "random sample, k=16",
             "D alone, as many steps as k=4": "D only, steps of k=4", "RFT, k=4": "RFT, k=4"}  # fmt: skip
    assert {name: current_name(name) for name in names} == names


def test_the_page_of_rft_shows_accuracy_and_paths(rft: Path):
    message_text = (rft / "report.md").read_text()
    assert "RFT, k=4" in message_text and "distinct per problem" in message_text
    page = (rft / "report.html").read_text()
    assert page.count("<svg") == 2
    assert "<script" not in page


# V-STaR


def test_every_pair_of_the_verifier_is_right_over_wrong_of_one_problem(vstar: Path):
    known: dict[str, dict[str, bool]] = {}
    for iteration in (1, 2):
        for one in read_rollouts(vstar / f"iteration-{iteration}" / "rollouts.graded.jsonl"):
            known.setdefault(text(one.prompt), {})[one.completion] = bool(one.correct)
    tokenizer = open_tokenizer(str(vstar / "sft" / "model"))
    pairs = jsonl(vstar / "verifier-2" / "preferences.jsonl")
    assert pairs
    for pair in pairs:
        assert known[pair["prompt"]][pair["chosen"]] is True
        assert known[pair["prompt"]][pair["rejected"]] is False
        assert tokenizer.decode(pair["chosen_ids"]) == pair["chosen"] + tokenizer.eos_token
    by_prompt = {prompt: [p for p in pairs if p["prompt"] == prompt] for prompt in known}
    for prompt, answers in known.items():
        right = sum(answers.values())
        assert len(by_prompt[prompt]) == min(6, right * (len(answers) - right))


def test_the_generator_learns_from_all_iterations_and_the_next_one_samples_it(vstar: Path):
    seed = jsonl(vstar / "sft" / "seed.jsonl")
    first = read_rollouts(vstar / "iteration-1" / "rollouts.graded.jsonl")
    second = read_rollouts(vstar / "iteration-2" / "rollouts.graded.jsonl")
    for iteration, seen in ((1, first), (2, first + second)):
        texts = {(one.problem.id, one.completion) for one in seen if one.correct}
        examples = jsonl(vstar / f"iteration-{iteration}" / "examples.jsonl")
        assert len(examples) == len(seed) + len(texts)
    assert {one.model for one in first} == {str(vstar / "sft" / "model")}
    assert {one.model for one in second} == {str(vstar / "iteration-1" / "model")}


def brute_best_of(scores: list[float], right: list[bool], k: int) -> float:
    """Over all subsets; among equal highest scores each candidate is as likely."""
    chosen = []
    for subset in itertools.combinations(range(len(scores)), k):
        top = max(scores[at] for at in subset)
        tied = [right[at] for at in subset if scores[at] == top]
        chosen.append(sum(tied) / len(tied))
    return sum(chosen) / len(chosen)


def test_best_of_k_is_what_choosing_by_the_stored_scores_gives(vstar: Path):
    folder = vstar / "iteration-2"
    candidates = read_rollouts(folder / "candidates.graded.jsonl")
    scores = json.loads((folder / "scores-verifier-2.json").read_text())["scores"]
    grouped: dict[str, list[tuple[float, bool]]] = {}
    for one, score in zip(candidates, scores, strict=True):
        grouped.setdefault(one.problem.id, []).append((score, bool(one.correct)))
    message_text = rows_of(vstar)["choices: V-STaR"]["choices"]
    for k in (2, 5):
        for at, group in enumerate(grouped.values()):
            expected = brute_best_of([g[0] for g in group], [g[1] for g in group], k)
            assert message_text["best"][str(k)][at] == pytest.approx(expected)
        any_right = [
            sum(any(group[i][1] for i in s) for s in itertools.combinations(range(5), k))
            / math.comb(5, k)
            for group in grouped.values()
        ]
        assert message_text["pass"][str(k)] == pytest.approx(any_right)


def test_scores_are_kept_by_the_weights_of_the_verifier_and_not_by_its_folder(
    vstar: Path, tmp_path: Path
):
    out = tmp_path / "moved"
    shutil.copytree(vstar, out)
    run = open_run(VstarConfig.small(**SMALL, out=out))
    folder = out / "iteration-2"
    rollouts = read_rollouts(folder / "candidates.graded.jsonl")
    store = folder / "scores-verifier-2.json"
    before = json.loads(store.read_text())["scores"]
    written = store.stat().st_mtime_ns
    assert scores_of(run, rollouts, out / "verifier-2", store) == before
    assert store.stat().st_mtime_ns == written  # in another folder, and not computed again
    weights = out / "verifier-2" / "model" / "model.safetensors"
    tensors = {name: tensor * 1.5 for name, tensor in load_file(weights).items()}
    weights.unlink()  # it may be a second name of another file
    save_file(tensors, weights, metadata={"format": "pt"})
    assert scores_of(run, rollouts, out / "verifier-2", store) != before


def test_vstar_has_its_baselines_and_its_table(vstar: Path):
    names = set(rows_of(vstar))
    assert {"choices: V-STaR", "choices: outcome reward model", "choices: SFT generator + verifier",
            "choices: one iteration (RFT + verifier)", "RFT", "verifier of G_SFT"} <= names  # fmt: skip
    cells = {f"choices: G{g} with V{v}" for g in (0, 1, 2) for v in (1, 2)}
    assert cells <= names
    assert "| G2 |" in (vstar / "report.md").read_text()
    # equal samples: as many for RFT, all of G_SFT, as the iterations drew
    drawn = read_rollouts(vstar / "rft" / "rollouts.graded.jsonl")
    assert len(drawn) == 24 * 4 * 2
    assert {one.model for one in drawn} == {str(vstar / "sft" / "model")}


# per-step DPO


def values_of(out: Path) -> list[ValuedRollout]:
    lines = jsonl(out / "size-24" / "continuations.values.jsonl")
    return [ValuedRollout.from_dict(line) for line in lines]


def test_a_prefix_is_worth_what_its_stored_continuations_say(step_dpo: Path):
    folder = step_dpo / "size-24"
    drawn: dict[str, list[Rollout]] = {}
    for one in read_rollouts(folder / "continuations.graded.jsonl"):
        drawn.setdefault(one.problem.id, []).append(one)
    samples = read_rollouts(folder / "rollouts.graded.jsonl")
    found = values_of(step_dpo)
    assert found
    for one in found:
        ids, name = one.token_ids, one.rollout.problem.id
        for steps, value in enumerate(one.values):
            if steps == len(one.ends):
                assert value == 0
                continue
            prefix = ids[: one.ends[steps - 1]] if steps else ()
            behind = (
                drawn[prefix_id(name, prefix)]
                if steps
                else [each for each in samples if each.problem.id == name]
            )
            assert len(behind) == 6
            assert all(token_ids(each)[: len(prefix)] == prefix for each in behind)
            verdicts = [bool(each.correct) for each in behind]
            groups = list(itertools.combinations(verdicts, 3))
            assert value == pytest.approx(sum(map(any, groups)) / len(groups))


def test_the_rejected_side_ends_at_the_pit_and_without_an_end(step_dpo: Path):
    pairs = jsonl(step_dpo / "size-24" / "step_dpo" / "preferences.jsonl")
    tokenizer = open_tokenizer(str(step_dpo / "size-24" / "sft" / "model"))
    with_pit = {}
    for one in values_of(step_dpo):
        lowest = min(one.values[1:])
        if lowest < one.values[0]:
            at = one.values[1:].index(lowest)
            with_pit[one.rollout.problem.id, one.token_ids[: one.ends[at]]] = (
                at == len(one.ends) - 1
            )
    assert len(pairs) == sum(min(one.values[1:]) < one.values[0] for one in values_of(step_dpo))
    cut = 0
    prompts = {one.rollout.problem.id: one.rollout.prompt for one in values_of(step_dpo)}
    for pair in pairs:
        keys = [key for key in with_pit if prompts[key[0]] == pair["prompt"]]
        whole = {key[1]: with_pit[key] for key in keys}
        rejected = tuple(pair["rejected_ids"])
        assert rejected in whole
        assert (rejected[-1] == tokenizer.eos_token_id) == whole[rejected]
        assert pair["chosen_ids"][-1] == tokenizer.eos_token_id
        cut += not whole[rejected]
    assert cut


def test_all_learners_have_the_same_wrong_completions(step_dpo: Path):
    rows = rows_of(step_dpo)
    counts = {name: row["pairs"]["wrong"] for name, row in rows.items() if "pairs" in row}
    assert len(counts) == 3
    assert len(set(counts.values())) == 1
    assert {"SFT, 12", "SFT, 24", "RFT, 24", "advantage-weighted, 24"} <= set(rows)


def test_tokens_sampled_are_the_new_ones(step_dpo: Path):
    folder = step_dpo / "size-24"
    base = sum(len(token_ids(one)) for one in read_rollouts(folder / "rollouts.graded.jsonl"))
    new = 0
    lengths = {}
    for one in values_of(step_dpo):
        for end in one.ends[:-1]:
            lengths[prefix_id(one.rollout.problem.id, one.token_ids[:end])] = end
    for one in read_rollouts(folder / "continuations.graded.jsonl"):
        new += len(token_ids(one)) - lengths[one.problem.id]
    row = rows_of(step_dpo)["per-step DPO, 24"]
    assert row["sampled tokens"] == base + new


def test_the_pages_of_per_step_dpo(step_dpo: Path):
    message_text = (step_dpo / "report.md").read_text()
    assert "SFT needs" in message_text and "advantage-weighted" in message_text
    assert (step_dpo / "steps.html").stat().st_size > 1000
    assert 'href="steps.html"' in (step_dpo / "report.html").read_text()


@pytest.mark.parametrize("form", ["step", "truncated"])
def test_the_other_forms_of_a_pair(form: str, step_dpo: Path, tmp_path: Path):
    out = tmp_path / form
    run_step_dpo(
        StepDpoConfig.small(
            **SMALL, out=out, n=6, wrong_per_problem=3, best_of=3, repeats=2, dpo_max_steps=1,
            sizes=[24], form=form,
        )
    )  # fmt: skip
    pairs = jsonl(out / "size-24" / "step_dpo" / "preferences.jsonl")
    assert pairs
    if form == "step":
        known = {one.token_ids[: len(one.token_ids)] for one in values_of(out)}
        for pair in pairs:
            whole = tuple(pair["begun"]) + tuple(pair["rejected_ids"])
            assert any(ids[: len(whole)] == whole for ids in known)
        assert any(pair["begun"] for pair in pairs)
    else:
        assert not any(pair["begun"] for pair in pairs)


def test_a_splitter_that_never_splits_makes_whole_completions_of_pairs(tmp_path: Path):
    out = tmp_path / "whole"
    run_step_dpo(
        StepDpoConfig.small(
            **(SMALL | {"split": "newline"}), out=out, n=4, best_of=2, dpo_max_steps=1, sizes=[24]
        )
    )
    found = values_of(out)
    assert {len(one.ends) for one in found} == {1}
    pairs = jsonl(out / "size-24" / "step_dpo" / "preferences.jsonl")
    whole = {one.token_ids for one in found}
    assert {tuple(pair["rejected_ids"]) for pair in pairs} <= whole


# comparison


def test_methods_side_by_side_count_their_tokens(tmp_path: Path):
    out = tmp_path / "compare"
    run_compare(
        CompareConfig.small(
            **SMALL, out=out, budget=24 * 36 * 12 + 24 * 8 * 36, candidates=4,
            vstar={"verifier_max_steps": 2}, step_dpo={"split": "separator", "dpo_max_steps": 2, "best_of": 2},
            star={"start_steps": 5, "iterations": 2},
        )
    )  # fmt: skip
    rows = rows_of(out)
    assert list(rows) == ["SFT", "STaR", "RFT", "V-STaR", "per-step DPO"]
    seed = read_rollouts(out / "sft" / "seed-rollouts.jsonl")
    drawn = read_rollouts(out / "rft" / "rollouts.graded.jsonl")
    expected = sum(len(token_ids(one)) for one in [*seed, *drawn])
    assert rows["RFT"]["sampled tokens"] == expected
    star = [*out.glob("star/iteration-*/rollouts.jsonl"), *out.glob("star/iteration-*/rationalized.jsonl")]  # fmt: skip
    assert rows["STaR"]["sampled tokens"] == sum(
        len(token_ids(one)) for store in star for one in read_rollouts(store)
    )
    for name in ("RFT", "V-STaR", "per-step DPO"):
        assert 0.6 < rows[name]["sampled tokens"] / (24 * 36 * 12 + 24 * 8 * 36) < 1.4, name
    message_text = (out / "report.md").read_text()
    assert "majority of 4" in message_text and "best of 4" in message_text
    before = {path: path.read_bytes() for path in out.rglob("*.safetensors")}
    run_compare(CompareConfig.small(
        **SMALL, out=out, budget=24 * 36 * 12 + 24 * 8 * 36, candidates=4,
        vstar={"verifier_max_steps": 2}, step_dpo={"split": "separator", "dpo_max_steps": 2, "best_of": 2},
        star={"start_steps": 5, "iterations": 2},
    ))  # fmt: skip
    assert {path: path.read_bytes() for path in out.rglob("*.safetensors")} == before


# bad input

FLAGS = ["--task_options.train", "8", "--task_options.validation", "2", "--task_options.test", "4",
         "--max-steps", "2"]  # fmt: skip


@pytest.mark.parametrize("command", ["vstar", "step-dpo"])
def test_without_a_wrong_completion_there_is_nothing_to_prefer(command, tmp_path, capsys):
    """Sums of two digits, which the model always works."""
    more = ["--task_options.digits", "2", "--temperature", "0.01", "--learning_rate", "1e-9"]
    more += ["--k", "2", "--candidates", "2"] if command == "vstar" else ["--n", "5"]
    code = main([command, "--out", str(tmp_path / "run"), *FLAGS, *more])
    message_text = capsys.readouterr().err
    assert code == 3
    assert "nothing to learn from" in message_text
    assert "wrong" in message_text and "8" in message_text


def test_without_a_right_completion_the_seed_set_is_empty(tmp_path, capsys):
    code = main(["rft", "--out", str(tmp_path / "run"), *FLAGS, "--task_options.digits", "9",
                 "--k", "2"])  # fmt: skip
    message_text = capsys.readouterr().err
    assert code == 3
    assert "none of the base model's 8 completions was kept" in message_text


def test_settings_that_cannot_be(tmp_path, capsys):
    for command, flags, words in (
        ("rft", ["--k", "0"], "k must be one or more numbers of at least 1"),
        (
            "rft",
            ["--distinct_by", "taste"],
            "--distinct-by must be text, equations, numbers, edits or auto",
        ),
        ("vstar", ["--k", "1"], "k must be at least 2"),
        ("step-dpo", ["--n", "3"], "n must be at least 2 and at least best_of"),
        ("step-dpo", ["--sizes", "9999"], "the number of training problems; got 9999"),
        ("compare", ["--budget", "0"], "budget must be at least 1"),
        ("solve", [], "either a question or --file"),
    ):
        try:
            code = main([command, *([] if command == "solve" else ["--out", str(tmp_path / command)]), *flags])  # fmt: skip
        except SystemExit as stop:
            code = stop.code
        assert code == 2, (command, flags)
        assert words in capsys.readouterr().err, (command, flags)


def test_rollouts_of_another_model_are_refused(rft: Path, tmp_path: Path):
    out = tmp_path / "other"
    out.mkdir()
    (out / "rollouts.jsonl").write_bytes((rft / "rollouts.jsonl").read_bytes())
    with pytest.raises(ValueError, match="made with other settings"):
        run_rft(RftConfig.small(**(SMALL | {"seed": 3}), out=out, k=[2]))


def test_completions_without_equations_want_another_key(rft: Path, tmp_path: Path):
    from dataclasses import replace

    from selftaught.methods.rft import distinct_paths
    from selftaught.methods.run import open_run

    config = RftConfig.small(**SMALL, out=tmp_path / "x", distinct_by="equations")
    graded = read_rollouts(rft / "rollouts.graded.jsonl")
    plain = [replace(one, completion="It is #12", outcome="right") for one in graded[:2]]
    with pytest.raises(ValueError, match="Use --distinct-by text, numbers or edits"):
        distinct_paths(open_run(config, None), config, plain)


def test_nothing_right_among_the_samples_says_why(tmp_path: Path, rft: Path):
    settings = SMALL | {"temperature": 30.0}
    with pytest.raises(NothingToLearn, match="was kept"):
        run_rft(RftConfig.small(**(settings | {"seed_samples": 1}), out=tmp_path / "hot", k=[1]))


def test_report_writes_the_page_of_any_method_again(rft, vstar, step_dpo, capsys):
    for folder in (rft, vstar, step_dpo):
        page = folder / "report.html"
        before = page.read_text()
        page.unlink()
        assert main(["report", str(folder)]) == 0
        assert page.read_text() == before
    assert main(["report", str(rft), str(vstar)]) == 2
    assert "selftaught compare" in capsys.readouterr().err


def test_sizes_are_nested_draws_and_not_the_easy_first_ones(tmp_path: Path):
    from selftaught.methods import step_dpo as room
    from selftaught.methods.run import open_run

    options = SMALL | {"task_options": {"digits": "1-3", "train": 24, "validation": 4, "test": 8}}
    run = open_run(StepDpoConfig.small(**options, out=tmp_path), None)
    small, large = ({one.id for one in room._size(run, n).problems} for n in (12, 36))
    assert small < large
    assert len({one.question.count("") for one in room._size(run, 12).problems}) > 1


def test_solve_refuses_what_only_a_verifier_could_do(capsys):
    assert main(["solve", "1+2", "--score", "mean"]) == 2
    assert "--verifier" in capsys.readouterr().err


def test_a_runs_preferences_can_be_trained_on_by_themselves(vstar: Path, tmp_path: Path, capsys):
    data = vstar / "verifier-2" / "preferences.jsonl"
    flags = ["--model", str(vstar / "sft" / "model"), "--data", str(data), "--max-steps", "3"]
    flags += ["--learning_rate", "1e-4", "--per_device_train_batch_size", "16", "--seed", "0"]
    flags += ["--training.lr_scheduler_type", "cosine", "--training.warmup_steps", "0.03"]
    assert main(["train", "dpo", *flags, "--out", str(tmp_path / "m")]) == 0
    assert "preferences" in capsys.readouterr().out
    theirs = causal_lm(str(vstar / "verifier-2" / "model")).state_dict()
    mine = causal_lm(str(tmp_path / "m")).state_dict()
    assert all(bool((mine[name] == theirs[name]).all()) for name in mine)
    texts = tmp_path / "texts.jsonl"
    texts.write_text(
        json.dumps({"prompt": "1+2=", "chosen": "a1+2+0=03;#3", "rejected": "#4"}) + "\n"
    )
    flags = ["--data", str(texts), "--max-steps", "1", "--out", str(tmp_path / "t")]
    assert main(["train", "dpo", *flags]) == 0
    texts.write_text(json.dumps({"prompt": "1+2=", "chosen": "#3"}) + "\n")
    assert main(["train", "dpo", "--data", str(texts), "--out", str(tmp_path / "u")]) == 2
    assert "rejected is missing" in capsys.readouterr().err


def test_select_removes_duplicates_by_the_given_criterion(rft: Path, tmp_path: Path, capsys):
    graded = str(rft / "rollouts.graded.jsonl")
    out = tmp_path / "examples.jsonl"
    flags = [
        "--keep",
        "correct",
        "sound",
        "distinct",
        "--distinct_by",
        "numbers",
        "--out",
        str(out),
    ]
    assert main(["select", graded, *flags]) == 0
    right = [one for one in read_rollouts(Path(graded)) if one.correct]
    digits = {
        (one.problem.id, tuple("".join(c if c.isdigit() else " " for c in one.completion).split()))
        for one in right
    }
    assert len(jsonl(out)) == len(digits)
