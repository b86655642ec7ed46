"""The model of lm-evaluation-harness, beside its own `hf`, our scoring and our generation."""

import json
import logging
import re
import subprocess
import sys
import tomllib
from functools import cache
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="needs the extra lm-eval")

import lm_eval
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models import huggingface
from lm_eval.tasks import TaskManager
from old_quiet import old_save
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from selftaught.harness import SelfTaughtLM
from selftaught.models.embedded import embedded_model
from selftaught.quiet.checkpoint import export_base, make_quiet, open_quiet, save_quiet
from selftaught.quiet.config import QuietConfig
from selftaught.quiet.evaluation import score
from selftaught.quiet.gating import GREEDY, ThoughtParams

HFLM: Any = huggingface.HFLM  # its type is hidden by a decorator
ROOT = Path(__file__).resolve().parent.parent
LENGTH, BESIDE = 3, 5
"""Tokens of a thought, without and with its start and end."""
PAIRS = [
    ("Q: What is 12 + 7?\nA: ", "12 + 7 = 19."),  # the space moves to the continuation
    ("Q: What is 12 + 7?\nA:", " 3"),
    ("Q: What is 12 + 7?\nA:", " 4"),
    ("Tom has 3", " apples and buys 40 more."),
    ("", "Tom has 3 apples."),
]


def thinking_model(base_dir: Path, folder: Path) -> Path:
    """Make the folder of a Quiet-STaR model whose thoughts have a weight of about a half."""
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    base = AutoModelForCausalLM.from_pretrained(base_dir)
    config = QuietConfig(thought_tokens=LENGTH, initial_text="=")
    model = make_quiet(base, tokenizer, config)
    head: Any = model.mixing.layers[-1].weight
    ids = tokenizer("Tom has 3 apples.", return_tensors="pt").input_ids
    torch.nn.init.constant_(head, 1e-3)
    torch.nn.init.constant_(head, 5e-4 / score(model, ids).weight_BNT.mean().item())
    torch.manual_seed(1)
    torch.nn.init.normal_(model.moved, std=0.3 / config.embedding_scale)
    save_quiet(model, tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def thinking_dir(wide_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A thinking model with random weights and a chat template."""
    return thinking_model(wide_model_dir, tmp_path_factory.mktemp("thinking"))


@pytest.fixture(scope="module")
def adding_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A thinking model made of the model in this package, which writes sums."""
    return thinking_model(embedded_model(), tmp_path_factory.mktemp("adding"))


def asked(request_type: Any, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(request_type, {}, one, number) for number, one in enumerate(arguments)]


def likelihoods(model: Any, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    return model.loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True)


def completions(model: Any, contexts: list[str], **options: Any) -> list[str]:
    requests = asked("generate_until", *((context, options) for context in contexts))
    return model.generate_until(requests, disable_tqdm=True)


opened = cache(open_quiet)


def alone(folder: Path, context: str, continuation: str, how: ThoughtParams) -> tuple[float, bool]:
    """Log-likelihood by `score`. The boundary is that of lm_eval's guide: spaces at the end of a context
    belong to the continuation, and an empty context is the end token."""
    model, tokenizer = opened(folder)
    stripped = context.rstrip()
    ids = tokenizer(context + continuation).input_ids
    first = len(tokenizer(stripped).input_ids) if stripped else 1
    if not stripped:
        ids = [tokenizer.eos_token_id, *ids]
    found = score(model, torch.tensor([ids]), None, how, top=1)
    assert found.top_with is not None
    best = found.top_with[0, 0, first - 1 :, 0].long().tolist()
    return found.with_BT[0, first - 1 :].sum().item(), best == ids[first:]


def test_log_likelihoods_are_those_of_our_scoring(thinking_dir: Path):
    expected = [alone(thinking_dir, *pair, GREEDY) for pair in PAIRS]
    for batch_size in (1, 4):
        found = likelihoods(SelfTaughtLM(str(thinking_dir), batch_size=batch_size), PAIRS)
        assert [one for one, _ in found] == pytest.approx([one for one, _ in expected], abs=1e-4)
        assert [one for _, one in found] == [one for _, one in expected]
    without = likelihoods(SelfTaughtLM(str(thinking_dir), think_when="never"), PAIRS)
    assert all(abs(a - b) > 1e-3 for (a, _), (b, _) in zip(expected, without, strict=True))


def test_sampled_thoughts_depend_on_the_seed_and_not_on_the_batch(thinking_dir: Path):
    options = {"thoughts": 2, "thought_temperature": 1.0}
    how = ThoughtParams(thoughts=2, temperature=1.0, seed=7)
    expected = [alone(thinking_dir, *pair, how)[0] for pair in PAIRS]
    for batch_size in (1, 4):
        model = SelfTaughtLM(str(thinking_dir), seed=7, batch_size=batch_size, **options)
        assert [one for one, _ in likelihoods(model, PAIRS)] == pytest.approx(expected, abs=1e-4)
    other = likelihoods(SelfTaughtLM(str(thinking_dir), seed=8, **options), PAIRS)
    assert all(abs(a - b) > 1e-4 for a, (b, _) in zip(expected, other, strict=True))


def test_a_greedy_completion_is_marked_greedy(thinking_dir: Path):
    model = SelfTaughtLM(str(thinking_dir))
    context = model.tok_encode("Tom has 3 apples and")
    whole = model.model.generate(torch.tensor([context]), max_new_tokens=4, do_sample=False)
    written = whole[0, len(context) :].tolist()
    other = [*written[:-1], (written[-1] + 1) % 300]
    found = model._loglikelihood_tokens([(None, context, written), (None, context, other)])
    assert [greedy for _, greedy in found] == [True, False]


def test_answers_are_passed_to_the_cache_of_the_library(thinking_dir: Path):
    stored = {}

    class Recorder:
        def add_partial(self, request_type: str, texts: Any, answer: Any) -> None:
            stored[request_type, texts] = answer

    model = SelfTaughtLM(str(thinking_dir))
    model.set_cache_hook(Recorder())
    found = likelihoods(model, PAIRS)
    assert stored == {("loglikelihood", pair): one for pair, one in zip(PAIRS, found, strict=True)}


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_plain_model_gives_exactly_the_results_of_hf(tiny_model_dir: Path, batch_size: int):
    results = []
    for kind in (SelfTaughtLM, HFLM):
        model = kind(pretrained=str(tiny_model_dir), device="cpu", batch_size=batch_size)
        rolling = asked("loglikelihood_rolling", ("Tom has 3 apples. " * 60,), ("Q: A",))
        texts = completions(model, [one for one, _ in PAIRS[:4]], until=["e"], max_gen_toks=8)
        results.append((likelihoods(model, PAIRS), model.loglikelihood_rolling(rolling), texts))
    assert results[0] == results[1]


def test_without_thoughts_it_gives_the_results_of_hf_on_the_exported_base(
    thinking_dir: Path, tmp_path: Path
):
    export_base(thinking_dir, tmp_path / "base")
    plain = HFLM(str(tmp_path / "base"), device="cpu", max_length=40)
    model = SelfTaughtLM(str(thinking_dir), think_when="never", max_length=40 + BESIDE)
    assert model.max_length == 40
    long = "Tom has 3 apples and buys 40 more. " * 8
    pairs = [*PAIRS, (long, " Tom"), (long, " How many apples?")]  # longer than 40 tokens
    for (found, greedy), (expected, same) in zip(
        likelihoods(model, pairs), likelihoods(plain, pairs), strict=True
    ):
        assert found == pytest.approx(expected, abs=1e-4) and greedy == same
    rolling = asked("loglikelihood_rolling", (long,), ("Tom has",))
    expected = plain.loglikelihood_rolling(rolling, disable_tqdm=True)
    assert model.loglikelihood_rolling(rolling, disable_tqdm=True) == pytest.approx(expected)
    options = {"until": ["\n", "e"], "max_gen_toks": 8}
    assert completions(model, [long, "Q: A"], **options) == completions(
        plain, [long, "Q: A"], **options
    )


def test_a_whole_text_is_scored_after_the_end_token(thinking_dir: Path):
    text = "Tom has 3 apples and buys 40 more."
    model = SelfTaughtLM(str(thinking_dir))
    (found,) = model.loglikelihood_rolling(asked("loglikelihood_rolling", (text,)), True)
    assert found == pytest.approx(alone(thinking_dir, "", text, GREEDY)[0], abs=1e-4)


def test_a_long_context_loses_its_beginning_so_that_a_thought_fits(
    thinking_dir: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(logging.getLogger("lm_eval"), "propagate", True)
    model = SelfTaughtLM(str(thinking_dir))
    assert model.max_length == 512 - BESIDE
    context = "Tom has 3 apples." * 200
    ids = model.tok_encode(context + " 3")
    with caplog.at_level(logging.WARNING, "lm_eval"):
        found = likelihoods(model, [(context, " 3")])[0][0]
    # 507 tokens are read; the last of the 508 is only predicted.
    quiet, _ = open_quiet(thinking_dir)
    read = torch.tensor([ids[-508:-1]])
    logits = AutoModelForCausalLM.from_pretrained(thinking_dir)(read, logits_to_keep=1).logits
    with pytest.raises(ValueError, match="takes 512"):
        quiet.check_length(torch.tensor([ids[-508:]]))
    assert ids[:-1] == model.tok_encode(context)  # the continuation is one token
    assert found == pytest.approx(logits[0, -1, ids[-1]].item(), abs=1e-4)
    assert f"The first {len(ids) - 508} tokens are left out" in caplog.text
    with pytest.raises(ValueError, match="continuation of at most 507 tokens"):
        likelihoods(model, [("Q", context)])


def test_greedy_completions_are_those_of_generate(thinking_dir: Path):
    model: Any = AutoModelForCausalLM.from_pretrained(thinking_dir)
    tokenizer: Any = AutoTokenizer.from_pretrained(thinking_dir)
    contexts = ["Q: What is 12 + 7?\nA:", "Tom has", "Q: A"]
    harness = SelfTaughtLM(str(thinking_dir), batch_size=3)
    found = completions(harness, contexts, until=["\n\n"], max_gen_toks=10)
    for context, text in zip(contexts, found, strict=True):
        ids = tokenizer(context, return_tensors="pt").input_ids
        whole = model.generate(ids, max_new_tokens=10, do_sample=False)
        written = tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
        assert text == written.split("\n\n")[0]
    stop = found[0][2:4]
    cut = completions(harness, contexts[:1], until=[stop], max_gen_toks=10)
    assert cut == [found[0].split(stop)[0]] and stop not in cut[0]


def test_a_loaded_model_and_the_object_that_thinks_are_taken_too(thinking_dir: Path):
    expected = likelihoods(SelfTaughtLM(str(thinking_dir)), PAIRS)
    quiet, tokenizer = open_quiet(thinking_dir)
    opened = AutoModelForCausalLM.from_pretrained(thinking_dir)
    for model in (quiet, opened):
        found = likelihoods(SelfTaughtLM(model, tokenizer=tokenizer), PAIRS)
        assert [one for one, _ in found] == pytest.approx([one for one, _ in expected], abs=1e-5)


def test_the_chat_template_is_that_of_the_tokenizer(thinking_dir: Path):
    model = SelfTaughtLM(str(thinking_dir))
    turns = [{"role": "user", "content": "Hi"}]
    assert model.apply_chat_template(turns) == "user: Hi\nassistant:"
    assert "message" not in model.tokenizer_name
    template = model.chat_template(True)
    assert template is not None and "assistant:" in template


def test_passes_and_tokens_are_those_counted_by_hand(thinking_dir: Path):
    model = SelfTaughtLM(str(thinking_dir), thoughts=2, thought_temperature=1.0)
    count = [len(model.tok_encode(text)) for text in ("Q: A", "Q: A B", "Tom")]
    assert count[1] == count[0] + 2
    # Two choices of one token share a row: 1 text and 2 thoughts, read in 1 and written in 4 passes.
    # The continuation of two tokens has 2 positions with 2 thoughts each.
    letters = [("Q: A", "B"), ("Q: A", "C")]
    likelihoods(model, [*letters, ("Q: A", " B")])
    passes = 1 + LENGTH + 1
    assert model.get_model_info()["selftaught"] == {
        "thinking": {
            "thought_tokens": LENGTH, "thoughts": 2, "thought_temperature": 1.0,
            "think_when": "trained", "pattern": None, "threshold": 0.0, "seed": 0,
        },
        "processes": 1,
        "cost": {
            "loglikelihood": {
                "requests": 3, "passes": 2 * passes, "text_tokens": count[0] + count[1] - 1,
                "thoughts": 2 + 4, "thought_tokens": 6 * BESIDE,
            }
        },
    }  # fmt: skip
    completions(model, ["Tom"], until=[], max_gen_toks=4)
    cost = model.get_model_info()["selftaught"]["cost"]["generate_until"]
    assert cost == {
        "requests": 1, "passes": 4 * passes, "text_tokens": count[2] + 3, "thoughts": 8,
        "thought_tokens": 8 * BESIDE,
    }  # fmt: skip


def test_only_thoughts_that_are_thought_are_counted(thinking_dir: Path, tiny_model_dir: Path):
    never = SelfTaughtLM(str(thinking_dir), think_when="never")
    plain = SelfTaughtLM(str(tiny_model_dir))
    for model in (never, plain):
        likelihoods(model, PAIRS[1:3])
        cost = model.get_model_info()["selftaught"]["cost"]["loglikelihood"]
        read = len(model.tok_encode(PAIRS[1][0] + " 3")) - 1  # the last token is not read
        assert cost == {
            "requests": 2, "passes": 1, "text_tokens": read, "thoughts": 0, "thought_tokens": 0,
        }  # fmt: skip
    assert plain.get_model_info()["selftaught"]["thinking"] is None


def test_options_that_have_no_effect_are_refused(
    thinking_dir: Path, tiny_model_dir: Path, tmp_path: Path
):
    for options, message in [
        ({"batch_size": "auto"}, "batch_size as a whole number; got 'auto'"),
        ({"max_length": BESIDE}, "takes 5 tokens, and the context has 5"),
        ({"thoughts": 2}, "2 thoughts at temperature 0"),
        ({"think_when": "often"}, "think_when must be trained, always, pattern"),
        ({"think_when": "gate"}, "needs a model with a gate"),
    ]:
        with pytest.raises(ValueError, match=message):
            SelfTaughtLM(str(thinking_dir), **options)
    thinking: Any = AutoModelForCausalLM.from_pretrained(thinking_dir)
    adapted: Any = get_peft_model(thinking, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="got one inside of a PeftModel"):
        SelfTaughtLM(adapted, tokenizer=AutoTokenizer.from_pretrained(thinking_dir))
    with pytest.raises(ValueError, match="seed, thoughts is for Quiet-STaR models"):
        SelfTaughtLM(str(tiny_model_dir), thoughts=1, seed=1)
    model, tokenizer = open_quiet(thinking_dir)
    old_save(model, tokenizer, tmp_path / "old")
    with pytest.raises(ValueError, match="of an earlier version"):
        SelfTaughtLM(str(tmp_path / "old"))


def test_the_entry_point_is_the_registered_class():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    entries = settings["project"]["entry-points"]["lm_eval.models"]
    assert list(entries) == ["selftaught"]
    entry = EntryPoint("selftaught", entries["selftaught"], "lm_eval.models")
    assert entry.load() is get_model("selftaught") is SelfTaughtLM
    # lm_eval replaces an entry point by a class only if they have the same name.
    assert entry.value == f"{SelfTaughtLM.__module__}:{SelfTaughtLM.__name__}"


def test_a_missing_lm_eval_is_an_error_that_says_what_to_install():
    code = "import sys; sys.modules['lm_eval'] = None; import selftaught.harness"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert 'pip install "selftaught[lm-eval]"' in done.stderr


@pytest.fixture
def local_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that the tasks in recipes/harness read, with five questions."""
    golden = Path(__file__).parent / "golden"
    for task, split, parts in [
        ("commonsense_qa", "dev", ("dev", "train")),
        ("gsm8k", "train", ("train",)),
        ("gsm8k", "test", ("train",)),
    ]:
        file = tmp_path / "data" / task / f"{split}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = [(golden / f"{task}_{part}.jsonl").read_text(encoding="utf-8") for part in parts]
        file.write_text("".join(lines), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "data"


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line]


def test_local_tasks_give_the_numbers_of_our_own_evaluation(adding_dir: Path, local_data: Path):
    questions = rows(local_data / "gsm8k" / "test.jsonl")
    model: Any = AutoModelForCausalLM.from_pretrained(adding_dir)
    tokenizer: Any = AutoTokenizer.from_pretrained(adding_dir)
    written = []
    for row in questions:
        ids = tokenizer(f"Question: {row['question']}\nAnswer:", return_tensors="pt").input_ids
        whole = model.generate(ids, max_new_tokens=12, do_sample=False)
        written.append(tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True))
    # The last number of the first completion becomes its gold answer, so that one is right.
    last = re.findall(r"\d+", written[0])[-1]
    questions[0]["answer"] = f"#### {last}"
    questions[1]["answer"] = "#### 123456"
    text = "".join(json.dumps(row) + "\n" for row in questions)
    (local_data / "gsm8k" / "test.jsonl").write_text(text, encoding="utf-8")

    library: Any = lm_eval
    found = library.simple_evaluate(
        model="selftaught",
        model_args={"pretrained": str(adding_dir)},
        tasks=["commonsense_qa_local", "gsm8k_local"],
        task_manager=TaskManager(
            include_path=str(ROOT / "recipes" / "harness"), include_defaults=False
        ),
        num_fewshot=0,
        batch_size=2,
        gen_kwargs={"max_gen_toks": 12},
        bootstrap_iters=0,
    )
    samples = found["samples"]
    assert [one["resps"][0][0] for one in samples["gsm8k_local"]] == written * 2  # two filters
    assert found["results"]["gsm8k_local"]["exact_match,flexible-extract"] == 1 / len(questions)

    right = []
    for row, one in zip(
        rows(local_data / "commonsense_qa" / "dev.jsonl"),
        samples["commonsense_qa_local"],
        strict=True,
    ):
        context = f"Question: {row['question']['stem']}\nAnswer:"
        own = [
            alone(adding_dir, context, f" {choice['text']}", GREEDY)[0]
            for choice in row["question"]["choices"]
        ]
        assert [float(one[0][0]) for one in one["resps"]] == pytest.approx(own, abs=1e-4)
        right.append("ABCDE"[own.index(max(own))] == row["answerKey"])
    assert found["results"]["commonsense_qa_local"]["acc,none"] == sum(right) / len(right)
    cost = found["config"]["selftaught"]["cost"]
    assert cost["loglikelihood"]["requests"] == 15 and cost["loglikelihood"]["thoughts"] >= 15
    assert cost["generate_until"]["requests"] == len(questions)


@pytest.mark.slow
def test_the_command_writes_thoughts_and_cost_into_its_results(
    thinking_dir: Path, local_data: Path, tmp_path: Path
):
    command = [
        sys.executable, "-m", "selftaught.harness", "--model", "selftaught",
        "--model_args", f"pretrained={thinking_dir},thoughts=2,thought_temperature=1.0,seed=3",
        "--include_path", str(ROOT / "recipes" / "harness"), "--tasks", "commonsense_qa_local",
        "--batch_size", "2", "--output_path", str(tmp_path / "out"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "loglikelihood: 15 requests" in done.stderr and "acc_norm" in done.stdout
    (file,) = (tmp_path / "out").rglob("results_*.json")
    config = json.loads(file.read_text(encoding="utf-8"))["config"]
    assert config["model"] == "selftaught"
    assert config["selftaught"]["thinking"]["thoughts"] == 2
    assert config["selftaught"]["thinking"]["seed"] == 3
    cost = config["selftaught"]["cost"]["loglikelihood"]
    assert cost["thought_tokens"] == cost["thoughts"] * BESIDE > 0
