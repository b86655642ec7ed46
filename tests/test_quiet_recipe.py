"""The texts and the arithmetic of the recipe that shows what thoughts gain."""

import importlib
import importlib.util
import random
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from selftaught.records import Problem


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    path = Path(__file__).parent.parent / "recipes" / "quiet_scratchpad.py"
    spec = importlib.util.spec_from_file_location("quiet_scratchpad", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_texts_are_right_sums_and_never_held_out_ones(recipe: ModuleType):
    held_out = {tuple(one) for one in recipe.tests()}
    for jumps in (0.0, 1.0):
        asked = []
        for text in islice(recipe.corpus(3, jumps=jumps), 400):
            found = re.fullmatch(r"\n((?:[a-f]\d){2,6})=(\(.*\))?(\d)\n", text)
            assert found is not None, text
            assert (found[2] is None) == (jumps == 1.0)
            terms = [int(digit) for digit in re.findall(r"\d", found[1])]
            asked.append(tuple(terms))
            assert int(found[3]) == sum(terms) % 5
            total = terms[0]
            for name, term, so_far in re.findall(r"(\w)(\d)>(\d)", found[2] or ""):
                assert term == str(terms["abcdef".index(name)])
                total += int(term)
                assert so_far == str(total % 5)
        assert not held_out & set(asked)
        assert len(set(asked)) > 200


@pytest.mark.slow
def test_held_out_sums_are_all_different(recipe: ModuleType):
    by_length = [sum(len(one) == count for one in recipe.tests()) for count in (3, 4, 5, 6)]
    # Of 125 sums of three terms a fifth is 25; of the others there are more than are taken.
    assert 15 < by_length[0] < 35
    assert by_length[1:] == [100, 100, 100]
    assert len({tuple(one) for one in recipe.tests()}) == sum(by_length)


def test_every_place_of_a_text_has_its_kind(recipe: ModuleType):
    text = "\na3b4=2\n"
    kinds = [recipe.place(text, at, text[at]) for at in range(1, len(text))]
    assert kinds == ["name", "term", "name", "term", "equals sign", "answer", "line end"]


def test_intervals_are_over_sums(recipe: ModuleType):
    # Two seeds, three sums: means over seeds 2, 3, 7; their standard deviation is sqrt(7).
    mean, low, high = recipe.interval([[1, 3, 6], [3, 3, 8]])
    assert mean == 4
    assert high - mean == pytest.approx(1.96 * (7 / 3) ** 0.5)
    assert low == pytest.approx(8 - high)


@pytest.fixture(scope="module")
def recipes() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent.parent / "recipes")
        yield


@pytest.fixture(scope="module")
def reinforce(recipes: None) -> ModuleType:
    return importlib.import_module("quiet_reinforce")


def test_thoughts_of_the_reinforce_recipe_are_the_sums_so_far(reinforce: ModuleType):
    assert reinforce.sums_so_far((1, 3, 0, 2)) == "1441"
    draw, right = random.Random(0), 0
    for kind in ("idle", "noisy", "honest"):
        for _ in range(200):
            terms = reinforce.random_terms(draw, frozenset(reinforce.held_out()))
            direct = reinforce.text(draw, terms, kind, direct=True)
            assert direct == "\n" + "".join(map(str, terms)) + f"={sum(terms) % 5}\n"
            aside = reinforce.text(draw, terms, kind, direct=False)
            found = re.fullmatch(r"\n\d{4}=\((.{4})\)\d\n", aside)
            assert found is not None
            right += kind == "honest" and found[1] == reinforce.sums_so_far(terms)
    assert right == 200


def test_held_out_sums_of_the_reinforce_recipe_are_a_fifth(reinforce: ModuleType):
    sums, held_out = reinforce.all_sums(), reinforce.held_out()
    assert len(set(sums)) == 5**4 and set(held_out) < set(sums)
    assert 0.15 < len(held_out) / len(sums) < 0.25
    draw = random.Random(1)
    drawn = {reinforce.random_terms(draw, frozenset(held_out)) for _ in range(2000)}
    assert not drawn & set(held_out)


def test_methods_of_the_reinforce_recipe_name_their_options(reinforce: ModuleType):
    config = reinforce.quiet_config("weight-10-thoughts-8-base-3")
    assert (config.reinforce_weight, config.thoughts, config.base_nll_weight) == (10, 8, 3)
    assert reinforce.quiet_config("weight-0.1").base_nll_weight == 1
    assert reinforce.unreinforced("weight-10-base-3") == "weight-0-base-3"
    assert reinforce.unreinforced("weight-0") == ""


def test_intervals_over_seeds_are_those_of_students_t(reinforce: ModuleType):
    # Mean 2, standard deviation 1, three seeds: 4.303 / sqrt(3) = 2.484.
    assert reinforce.over_seeds([1, 2, 3]) == "2.000 [-0.484, 4.484]"


@pytest.fixture(scope="module")
def smollm2(recipes: None) -> ModuleType:
    return importlib.import_module("quiet_smollm2")


@pytest.mark.parametrize(
    ("thought", "right"),
    [
        ("37 + 76 = 113. 113 - 65 = 48. The", True),
        ("37 + 76 = 113. 113 - 65 = 47. The", False),
        ("37 + 76 = 113. 113 - 65 = 48", False),  # perhaps the start of 480
        ("48. The answer is 48.", False),
        ("1 = 48. 48 - 1 = 47. ", False),
        ("20 - 68 = -48. ", False),
    ],
)
def test_a_thought_is_right_if_its_last_equation_gives_the_answer(
    smollm2: ModuleType, thought: str, right: bool
):
    asked = Problem("1", "37 + 76 - 65 =", "48", None)
    assert smollm2.right_thought(thought, asked) is right


@pytest.mark.slow
def test_answers_after_a_thought_are_those_of_plain_forward_passes(
    smollm2: ModuleType, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With a mixing weight of 1, thoughts are ordinary tokens of an ordinary model, one text at a time."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    learned = torch.tensor([tokenizer("Q: 3 + 4 =\nA: 7.\n\n").input_ids])
    optimizer = torch.optim.AdamW(base.parameters(), lr=3e-3)
    for _ in range(100):  # so that it says 7 whatever it is asked
        junk = torch.randint(0, 256, (8, 5))
        ids = torch.cat([learned[:, :-5].expand(8, -1), junk, learned[:, -5:].expand(8, -1)], 1)
        labels = ids.clone()
        labels[:, :-5] = -100
        base(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for part in (base, tokenizer):
        part.save_pretrained(tmp_path)
    asked = [Problem(str(at), f"{at} + 4 =", "7" if at % 2 else "9", None) for at in range(8)]
    monkeypatch.setattr(smollm2, "problems", lambda split: asked)
    model, tokenizer = smollm2.with_thoughts(str(tmp_path), 0, smollm2.quiet_config(5, 0.0))
    model.mixing = smollm2.Trusting()
    with torch.no_grad():
        rows = smollm2.measure_thoughts(model, tokenizer)
    plain, marks = model.base.eval(), model.marks
    rights = []
    for problem, row in zip(asked, rows, strict=True):
        ids, answer = smollm2.answer_tokens(tokenizer, problem)
        start = len(tokenizer(f"Q: {problem.question}\nA:").input_ids)
        assert tokenizer.decode(ids[start : start + answer]) == f" {problem.gold}."
        seen = [*ids[:start], marks.start]
        for _ in range(5):
            logits_V = logits(plain, seen)[-1]
            logits_V[list(marks.never)] = -torch.inf
            seen.append(int(logits_V.argmax()))
        assert tokenizer.decode(seen[start + 1 :]) == row["greedy_thought"]
        seen = [*seen, marks.end, *ids[start : start + answer]]
        log_prob_KV = logits(plain, seen)[-answer - 1 : -1].log_softmax(-1)
        target_K = torch.tensor(ids[start : start + answer])
        nats = -log_prob_KV.gather(1, target_K[:, None]).sum()
        assert row["greedy_nats"] == pytest.approx(nats.item(), abs=1e-3)
        rights.append(bool((log_prob_KV.argmax(-1) == target_K).all()))
        assert row["greedy_right"] == rights[-1]
    assert True in rights and False in rights


@torch.no_grad()
def logits(model: torch.nn.Module, ids: list[int]) -> Tensor:
    return model(input_ids=torch.tensor([ids])).logits[0]
