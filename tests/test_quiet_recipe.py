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
def reinforce() -> Iterator[ModuleType]:
    folder = Path(__file__).parent.parent / "recipes"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield importlib.import_module("quiet_reinforce")


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
