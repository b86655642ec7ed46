"""`collect`, `collect_up_to`: what is stored, how it resumes, what it refuses."""

import errno
import hashlib
import json
import resource
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selftaught.prompts import PromptStyle
from selftaught.records import (
    Problem,
    Rollout,
    Text,
    read_rollouts,
    rollout_from,
    to_json,
    write_jsonl,
)
from selftaught.rollouts import store as room
from selftaught.rollouts import store_file
from selftaught.rollouts.store import collect, collect_up_to, fill
from selftaught.samplers import SamplingParams, open_sampler
from selftaught.samplers.scripted import ScriptedSampler

STYLE = PromptStyle("bare")
PROBLEMS = [Problem(f"p{i}", f"What is {i}?", str(i)) for i in range(7)]
TWO = SamplingParams(n=2, temperature=1.0)


def echo() -> ScriptedSampler:
    return ScriptedSampler(lambda prompt, index: f"{prompt} {index}")


@pytest.fixture
def units_of_two_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "STORE_BATCH", 4)


def test_all_samples_of_all_problems_are_stored_in_order(tmp_path: Path):
    store = tmp_path / "deep" / "rollouts.jsonl"
    made = collect(echo(), PROBLEMS, STYLE, TWO, store=store)
    assert [(r.problem.id, r.index) for r in made] == [
        (f"p{i}", j) for i in range(7) for j in (0, 1)
    ]
    assert made[3].prompt == "Q: What is 1?\nA:"
    assert read_rollouts(store) == made


def test_a_whole_store_asks_nothing_again(tmp_path: Path):
    store = tmp_path / "rollouts.jsonl"
    made = collect(echo(), PROBLEMS, STYLE, TWO, store=store)
    before, sampler = store.read_bytes(), echo()
    assert collect(sampler, PROBLEMS, STYLE, TWO, store=store) == made
    assert sampler.asked == []
    assert store.read_bytes() == before


@pytest.mark.usefixtures("units_of_two_problems")
def test_a_store_cut_at_any_byte_ends_as_if_it_had_not_been(tmp_path: Path):
    store = tmp_path / "rollouts.jsonl"
    collect(echo(), PROBLEMS, STYLE, TWO, store=store)
    whole = store.read_bytes()
    ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
    for cut in sorted(
        {0, 1, 5, *ends, *(end - 1 for end in ends), *(end + 3 for end in ends[:-1])}
    ):
        store.write_bytes(whole[:cut])
        sampler = echo()
        collect(sampler, PROBLEMS, STYLE, TWO, store=store)
        assert store.read_bytes() == whole
        rows_left = whole[:cut].count(b"\n") - 1  # the header is no rollout
        units_left = 4 if cut == len(whole) else max(rows_left, 0) // 4
        assert len(sampler.asked) == max(7 - 2 * units_left, 0)


@pytest.mark.usefixtures("units_of_two_problems")
def test_progress_counts_what_was_stored_before(tmp_path: Path):
    store = tmp_path / "rollouts.jsonl"
    collect(echo(), PROBLEMS, STYLE, TWO, store=store)
    store.write_bytes(b"".join(store.read_bytes().splitlines(keepends=True)[:6]))  # header, 5 rows
    seen: list[int] = []
    collect(echo(), PROBLEMS, STYLE, TWO, store=store, progress=seen.append)
    assert seen == [4, *[2] * 5]


@pytest.mark.parametrize(
    ("change", "message_text"),
    [
        ({"sampler": ScriptedSampler(lambda p, i: "", fingerprint="other")}, "the model's weights"),
        ({"prompt": replace(STYLE, question="Question: {question}")}, "the prompts"),
        ({"params": replace(TWO, temperature=0.5)}, "sampling options"),
        ({"params": replace(TWO, seed=1)}, "sampling options"),
        ({"problems": PROBLEMS[:5]}, "number of problems"),
        ({"origin": "rationalized"}, "as a hint"),
    ],
)
def test_a_store_made_otherwise_is_refused_and_says_what_differs(
    tmp_path: Path, change, message_text
):
    store = tmp_path / "rollouts.jsonl"
    collect(echo(), PROBLEMS, STYLE, TWO, store=store)
    before = store.read_bytes()
    asked = {"sampler": echo(), "problems": PROBLEMS, "prompt": STYLE, "params": TWO} | change
    with pytest.raises(ValueError, match=message_text):
        collect(store=store, **asked)
    assert store.read_bytes() == before


def test_a_moved_model_is_the_same_model(tmp_path: Path):
    store = tmp_path / "rollouts.jsonl"
    collect(echo(), PROBLEMS, STYLE, TWO, store=store)
    moved = ScriptedSampler(lambda prompt, index: "", model="elsewhere")
    assert len(collect(moved, PROBLEMS, STYLE, TWO, store=store)) == 14


def test_the_style_brings_its_stop_strings(tmp_path: Path):
    made = collect(
        ScriptedSampler(lambda prompt, index: "right\n\nQ: and on"), PROBLEMS, STYLE,
        SamplingParams(), store=tmp_path / "rollouts.jsonl",
    )  # fmt: skip
    assert {rollout.completion for rollout in made} == {"right"}


def test_later_samples_have_later_indices_and_a_store_of_their_own(tmp_path: Path):
    store, later = tmp_path / "first.jsonl", tmp_path / "later.jsonl"
    collect(echo(), PROBLEMS, STYLE, TWO, store=store)
    assert "first" not in json.loads(store.read_bytes().splitlines()[0])["params"]
    made = collect(echo(), PROBLEMS, STYLE, replace(TWO, first=2), store=later)
    assert [(r.index, r.completion[-1]) for r in made[:3]] == [(2, "2"), (3, "3"), (2, "2")]
    with pytest.raises(ValueError, match="sampling options"):
        collect(echo(), PROBLEMS, STYLE, TWO, store=later)


BEGUN = [(5, number) if number % 2 else () for number in range(len(PROBLEMS))]


def continuing() -> ScriptedSampler:
    return ScriptedSampler(
        lambda prompt, index: f"{prompt} {index}",
        continued=lambda prompt, prefix_tokens, index: f"{prefix_tokens[1]} {prompt} {index}",
    )


@pytest.mark.usefixtures("units_of_two_problems")
def test_prefix_tokens_are_passed_on_batch_by_batch(tmp_path: Path):
    store = tmp_path / "rollouts.jsonl"
    made = collect(continuing(), PROBLEMS, STYLE, TWO, store=store, prefix_tokens=BEGUN)
    plain = collect(echo(), PROBLEMS, STYLE, TWO, store=tmp_path / "plain.jsonl")
    for number in range(len(PROBLEMS)):
        mark = f"{number} " if number % 2 else ""
        for at in (2 * number, 2 * number + 1):
            assert made[at].completion == mark + plain[at].completion
    whole = store.read_bytes()
    store.write_bytes(b"".join(whole.splitlines(keepends=True)[:7]))
    assert collect(continuing(), PROBLEMS, STYLE, TWO, store=store, prefix_tokens=BEGUN) == made
    assert store.read_bytes() == whole


@pytest.mark.parametrize(("before", "now"), [(BEGUN, None), (None, BEGUN), (BEGUN, BEGUN[::-1])])
def test_a_store_of_other_prefix_tokens_is_refused(tmp_path: Path, before, now):
    store = tmp_path / "rollouts.jsonl"
    collect(continuing(), PROBLEMS, STYLE, TWO, store=store, prefix_tokens=before)
    with pytest.raises(ValueError, match="Different: the prefix tokens of the completions"):
        collect(continuing(), PROBLEMS, STYLE, TWO, store=store, prefix_tokens=now)


def test_a_prefix_that_is_too_long_is_refused_before_any_is_asked(tmp_path: Path):
    sampler, store = continuing(), tmp_path / "rollouts.jsonl"
    prefix_tokens = [*BEGUN[:-1], (1,) * 256]
    with pytest.raises(ValueError, match="prefix for 'p6' has 256 tokens"):
        collect(sampler, PROBLEMS, STYLE, TWO, store=store, prefix_tokens=prefix_tokens)
    assert sampler.asked == []
    assert not store.exists()


def wanting(n: int) -> SamplingParams:
    return SamplingParams(n=n, temperature=1.0, max_tokens=8)


Asked = list[tuple[Text, int]]


def noting(asked: Asked) -> ScriptedSampler:
    """A sampler that notes which sample of which prompt it is asked for."""

    def script(prompt: Text, index: int) -> str:
        asked.append((prompt, index))
        return f"{prompt} {index}"

    return ScriptedSampler(script)


@pytest.mark.usefixtures("units_of_two_problems")
def test_only_missing_samples_are_asked_for(tmp_path: Path):
    at_once = collect(echo(), PROBLEMS, STYLE, wanting(8), store=tmp_path / "once.jsonl")
    store = tmp_path / "grown" / "rollouts.jsonl"
    names = ["rollouts.jsonl", "rollouts-2.jsonl", "rollouts-5.jsonl"]
    for n, fresh, stores in ((2, [0, 1], 1), (5, [2, 3, 4], 2), (3, [], 2), (8, [5, 6, 7], 3)):
        for again in (False, True):
            asked: Asked = []
            counts: list[int] = []
            made = collect_up_to(
                noting(asked), PROBLEMS, STYLE, wanting(n), store=store, progress=counts.append
            )
            assert made == [one for one in at_once if one.index < n]
            wanted = [] if again else [(STYLE(one), index) for one in PROBLEMS for index in fresh]
            assert sorted(asked) == sorted(wanted)  # type: ignore[type-var]
            assert sum(counts) == n * len(PROBLEMS)
            assert sorted(store.parent.iterdir()) == sorted(
                store.parent / x for x in names[:stores]
            )


@pytest.mark.usefixtures("units_of_two_problems")
@pytest.mark.parametrize("wanted", [2, 4, 5, 7])
def test_a_store_cut_at_any_byte_is_finished_before_more_samples_are_asked_for(
    tmp_path: Path, wanted: int
):
    store, later = tmp_path / "rollouts.jsonl", tmp_path / "rollouts-2.jsonl"
    collect_up_to(echo(), PROBLEMS, STYLE, wanting(2), store=store)
    collect_up_to(echo(), PROBLEMS, STYLE, wanting(5), store=store)
    first, second = store.read_bytes(), later.read_bytes()
    at_once = collect(echo(), PROBLEMS, STYLE, wanting(wanted), store=tmp_path / "once.jsonl")
    header = second.index(b"\n") + 1
    for cut in (0, 5, header - 1, header, header + 9, len(second) // 2, len(second) - 1):
        store.write_bytes(first[: len(first) - cut])
        later.write_bytes(second[:cut])
        made = collect_up_to(echo(), PROBLEMS, STYLE, wanting(wanted), store=store)
        assert made == at_once
        if cut < len(first) - first.index(b"\n"):  # how many it was made for is still to be read
            assert store.read_bytes() == first
        if cut >= header and wanted > 2:
            assert later.read_bytes() == second
        for path in (store, *tmp_path.glob("rollouts-*.jsonl")):
            path.unlink()


def test_growing_with_a_model_gives_the_tokens_of_sampling_at_once(
    tiny_model_dir: Path, tmp_path: Path
):
    with open_sampler("transformers", str(tiny_model_dir), dtype="float32") as sampler:
        at_once = collect(sampler, PROBLEMS, STYLE, wanting(8), store=tmp_path / "once.jsonl")
        for n in (2, 5, 3, 8):
            store = tmp_path / "grown.jsonl"
            grown = collect_up_to(sampler, PROBLEMS, STYLE, wanting(n), store=store)
            assert grown == [one for one in at_once if one.index < n]
            with store.open("rb+") as file:
                file.truncate(store.stat().st_size - 40)
    assert len({one.token_ids for one in grown}) > 40


def test_samples_counted_up_are_refused_where_the_store_was_made_otherwise(tmp_path: Path):
    store = tmp_path / "rollouts.jsonl"
    collect_up_to(echo(), PROBLEMS, STYLE, wanting(2), store=store)
    collect_up_to(echo(), PROBLEMS, STYLE, wanting(3), store=store)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for params in (replace(wanting(4), seed=1), SamplingParams(max_tokens=8)):
        with pytest.raises(ValueError, match="sampling options"):
            collect_up_to(echo(), PROBLEMS, STYLE, params, store=store)
    with pytest.raises(ValueError, match="number of problems"):
        collect_up_to(echo(), PROBLEMS[:3], STYLE, wanting(4), store=store)
    with pytest.raises(ValueError, match="first must be 0"):
        collect_up_to(echo(), PROBLEMS, STYLE, replace(wanting(4), first=1), store=store)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_one_greedy_sample_is_counted_up_to_one(tmp_path: Path):
    store = tmp_path / "rollouts.jsonl"
    made = collect_up_to(echo(), PROBLEMS, STYLE, SamplingParams(), store=store)
    assert collect(echo(), PROBLEMS, STYLE, SamplingParams(), store=store) == made


def test_two_problems_with_one_id_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="'p1'"):
        collect(echo(), [*PROBLEMS, PROBLEMS[1]], STYLE, TWO, store=tmp_path / "r.jsonl")


def test_a_full_disk_raises_an_error_and_the_run_continues_with_free_space(tmp_path: Path):
    code = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import test_rollouts as here
here.room.STORE_BATCH = 4
resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
try:
    here.collect(here.echo(), here.PROBLEMS, here.STYLE, here.TWO, store=Path({str(tmp_path / "r.jsonl")!r}))
except OSError as error:
    print(error.errno, error.strerror)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{errno.EFBIG} Could not write")
    assert "repeat the command to continue" in done.stdout
    assert (tmp_path / "r.jsonl").stat().st_size == 1500  # torn in the middle of a unit
    undisturbed = tmp_path / "undisturbed.jsonl"
    room_unit, room.STORE_BATCH = room.STORE_BATCH, 4
    try:
        collect(echo(), PROBLEMS, STYLE, TWO, store=undisturbed)
        collect(echo(), PROBLEMS, STYLE, TWO, store=tmp_path / "r.jsonl")
    finally:
        room.STORE_BATCH = room_unit
    assert (tmp_path / "r.jsonl").read_bytes() == undisturbed.read_bytes()
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1500


@given(st.text(), st.text(st.characters(codec=None)))
def test_any_text_survives_the_store(question: str, completion: str):
    problem = Problem("id", question, "1")
    sampler = ScriptedSampler(lambda prompt, index: completion)
    style = replace(STYLE, stop=())
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "r.jsonl"
        (made,) = collect(sampler, [problem], style, SamplingParams(), store=store)
        assert read_rollouts(store) == [made]
        assert made.completion == completion


def test_a_rollout_is_one_line_of_json_that_explains_itself(tmp_path: Path):
    (made, *_) = collect(echo(), PROBLEMS, STYLE, TWO, store=tmp_path / "r.jsonl")
    row = json.loads(to_json(replace(made, token_ids=(1, 2))))
    assert row["problem"] == {"id": "p0", "question": "What is 0?", "gold": "0", "rationale": None}
    assert rollout_from(row) == replace(made, token_ids=(1, 2))


@pytest.mark.usefixtures("units_of_two_problems")
def test_a_store_is_filled_without_being_read(tmp_path: Path):
    store = tmp_path / "rollouts.jsonl"
    assert fill(echo(), PROBLEMS, STYLE, TWO, store=store) == 14
    assert store.read_bytes().count(b"\n") == 15
    whole = store.read_bytes().splitlines(keepends=True)
    store.write_bytes(b"".join([*whole[:3], b"garbage\n", *whole[4:12]]))  # two units and 3 rows
    sampler = echo()
    assert fill(sampler, PROBLEMS, STYLE, TWO, store=store) == 14
    assert len(sampler.asked) == 3  # of two problems more, and the short unit's one
    with pytest.raises(ValueError, match=r"line 4: expected one JSON object"):
        collect(echo(), PROBLEMS, STYLE, TWO, store=store)


@pytest.mark.usefixtures("units_of_two_problems")
@pytest.mark.parametrize("rows", [4, 7, 8, 11, 14])
@pytest.mark.parametrize("change", ["missing", "twice", "swapped"])
def test_a_store_whose_lines_were_changed_is_refused(tmp_path: Path, rows: int, change: str):
    store = tmp_path / "rollouts.jsonl"
    collect(echo(), PROBLEMS, STYLE, TWO, store=store)
    whole = store.read_bytes().splitlines(keepends=True)
    for at in range(1, rows - rows % 4 if rows < 14 else 14):
        lines = whole[: rows + 1]
        match change:
            case "missing":
                del lines[at]
            case "twice":
                lines.insert(at, lines[at])
            case "swapped":
                lines[at], lines[at + 1] = lines[at + 1], lines[at]
        store.write_bytes(b"".join(lines))
        if (change, rows, at) == ("swapped", 4, 3):  # as if the last had not been written
            collect(echo(), PROBLEMS, STYLE, TWO, store=store)
            assert store.read_bytes() == b"".join(whole)
            continue
        with pytest.raises(ValueError, match="lines are missing, repeated or changed"):
            collect(echo(), PROBLEMS, STYLE, TWO, store=store)


@pytest.mark.usefixtures("units_of_two_problems")
@pytest.mark.parametrize("left", [b"\0\0\0", b"\0\n\0\n", b'{"problem": 1}\n', b"{}\n\n\n\n" * 5])
def test_what_a_machine_that_fell_left_at_the_end_is_cut(tmp_path: Path, left: bytes):
    store = tmp_path / "rollouts.jsonl"
    collect(echo(), PROBLEMS, STYLE, TWO, store=store)
    whole = store.read_bytes()
    lines = whole.splitlines(keepends=True)
    many = left.count(b"\n") > 4  # more than a unit has
    for rows in (0, 1, 4, 6, 8):
        store.write_bytes(b"".join(lines[: rows + 1]) + left)
        if many:
            with pytest.raises(ValueError):
                collect(echo(), PROBLEMS, STYLE, TWO, store=store)
        else:
            collect(echo(), PROBLEMS, STYLE, TWO, store=store)
            assert store.read_bytes() == whole


@pytest.mark.parametrize("unit", [1, 3, 4, 512])
@pytest.mark.parametrize("block", [1, 100, 2**22])
def test_a_store_ends_the_same_whatever_is_looked_at_first(
    tmp_path: Path, monkeypatch, unit, block
):
    monkeypatch.setattr(room, "STORE_BATCH", unit)
    monkeypatch.setattr(store_file, "BLOCK", block)
    store = tmp_path / "rollouts.jsonl"
    collect(echo(), PROBLEMS, STYLE, TWO, store=store)
    whole = store.read_bytes()
    for cut in range(0, len(whole), 61):
        store.write_bytes(whole[:cut])
        assert fill(echo(), PROBLEMS, STYLE, TWO, store=store) == 14
        assert store.read_bytes() == whole


def test_headers_hold_the_hashes_of_whole_lists(tmp_path: Path):
    """As stores made before have them."""
    store = tmp_path / "rollouts.jsonl"
    collect(continuing(), PROBLEMS, STYLE, TWO, store=store, prefix_tokens=BEGUN)
    header = json.loads(store.read_bytes().splitlines()[0])

    def digest(value: object, ascii_only: bool) -> str:
        shown = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
        return hashlib.sha256(shown).hexdigest()[:16]

    assert header["answers"] == digest([(one.id, one.gold) for one in PROBLEMS], True)
    assert header["begun"] == digest(BEGUN, True)
    assert header["prompts"] == digest([STYLE(one) for one in PROBLEMS], False)
    assert PromptStyle("chat", as_messages=True).digest(PROBLEMS[:2]) == digest(
        [[{"role": "user", "content": f"Q: What is {n}?\nA:"}] for n in (0, 1)], False
    )


def test_rollouts_that_are_read_have_in_common_what_is_equal(tmp_path: Path):
    path = tmp_path / "r.jsonl"
    odd = '{"problem": {"id": "p", "question": "q", "gold": "g", "rationale": null}, "prompt": %s, "completion": "c", "finish_reason": "stop", "model": "m", "index": %d, "token_ids": %s}\n'
    rows = [('"P"', "[70000, 1, 2]"), ('"P"', "[70000]"), ('"Q"', "null"), ('[{"role": "user"}]', "[]"),
            ('"P"', "[true, 1.0]"), ('"P"', "[1, 70000]")]  # fmt: skip
    path.write_text("".join(odd % (prompt, at, ids) for at, (prompt, ids) in enumerate(rows)))
    seen = read_rollouts(path)
    for one, line in zip(seen, path.read_text().splitlines(), strict=True):
        row = json.loads(line)
        ids = row["token_ids"]
        assert one == Rollout(**row | {"problem": Problem(**row["problem"]), "token_ids": ids and tuple(ids) if ids != [] else ()})  # fmt: skip
        fields = asdict(one)
        del fields[
            "thought_open"
        ]  # written only where it is true, as in stores of earlier versions
        del fields["problem"]["tests"]  # the same
        assert json.loads(to_json(one)) == json.loads(json.dumps(fields))
        assert to_json(one) == json.dumps(fields, ensure_ascii=False)
        assert json.loads(to_json(replace(one, thought_open=True)))["thought_open"] is True
    assert seen[0].prompt is seen[1].prompt and seen[0].problem is seen[5].problem
    assert seen[0].token_ids[0] is seen[1].token_ids[0] is seen[5].token_ids[1]  # type: ignore[index]
    assert [type(token) for token in seen[4].token_ids or ()] == [bool, float]
    assert [type(token) for token in seen[5].token_ids or ()] == [int, int]


def test_new_sampling_options_are_in_a_header_only_where_they_are_used():
    """So that stores made before there were any are continued."""
    old = {"n": 1, "temperature": 0.0, "top_p": 1.0, "max_tokens": 256, "stop": [], "seed": 0}
    assert SamplingParams().stored() == old
    used = SamplingParams(
        thought_marks=("[T]", "[/T]"), chat_template_kwargs={"enable_thinking": False}
    )
    assert used.stored() == old | {
        "thought_marks": ["[T]", "[/T]"], "chat_template_kwargs": {"enable_thinking": False},
    }  # fmt: skip


def test_other_template_variables_are_another_experiment(tmp_path: Path, scripted_sampler):
    problems = [Problem("p", "1+1", "2")]
    on, off = (
        PromptStyle("c", as_messages=True, chat_template_kwargs={"enable_thinking": value})
        for value in (True, False)
    )
    store = tmp_path / "r.jsonl"
    with scripted_sampler(lambda prompt, index: "2") as sampler:
        collect(sampler, problems, on, SamplingParams(), store=store)
        collect(sampler, problems, on, SamplingParams(), store=store)
        with pytest.raises(ValueError, match="the sampling options"):
            collect(sampler, problems, off, SamplingParams(), store=store)


def test_shown_completions_are_chosen_by_iteration_and_by_a_wrong_equation(tmp_path, capsys):
    from selftaught.cli import main

    problem = Problem("p", "3 + 4?", "7")
    sound, guessed, wrong = (
        Rollout(problem, "Q", text, "stop", "m", 0, answer=text[-2], outcome="right" if text[-2] == "7" else "wrong")
        for text in (
            "3 + 4 = 7. The answer is 7.", "3 + 4 = 8. The answer is 7.", "3 + 4 = 9. The answer is 9.",
        )
    )  # fmt: skip
    for iteration, rollouts in ((1, [sound, guessed]), (2, [wrong])):
        folder = tmp_path / f"iteration-{iteration}"
        folder.mkdir()
        write_jsonl(folder / "rollouts.graded.jsonl", rollouts)
    run = str(tmp_path)

    def texts(*options: str) -> list[str]:
        assert main(["show", run, "--as-json", *options]) == 0
        return [json.loads(line)["completion"] for line in capsys.readouterr().out.splitlines()]

    assert texts() == [sound.completion, guessed.completion, wrong.completion]
    assert texts("--iteration", "2") == [wrong.completion]
    assert texts("--wrong-equation") == [guessed.completion]
    assert texts("--outcome", "wrong", "--iteration", "1") == []
    assert main(["show", run, "--iteration", "3"]) == 2
    assert "iteration-3" in capsys.readouterr().err
    assert main(["show", run, "--n", "1"]) == 0
    assert "1 completion shown; 2 more, see --n." in capsys.readouterr().out
