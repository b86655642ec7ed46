"""Small real things that stand in for large ones: a two-layer random model, a scripted sampler."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from narrowed import tensor, token_id

from selftaught.records import Completion, Text
from selftaught.samplers.scripted import ScriptedSampler

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    # before torch is imported: each worker, and each process that it starts, has its share of the cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

FIRST = ("test_nothing_lost", "test_methods_killed", "test_vllm_engine")
"""Modules with long tests, which begin first so that no process waits for another at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the modules in `FIRST` before the others."""
    items.sort(key=lambda item: not item.path.stem.startswith(FIRST))


CORPUS = (
    "Q: What is 12 + 7?\nA: 12 + 7 = 19. The answer is 19.\n\n",
    "Q: Tom has 3 apples and buys 40 more. How many apples does he have?\nA: 3 + 40 = 43.\n\n",
)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a two-layer Llama of random weights and a byte-level tokenizer of 320 tokens.

    The weights are drawn wide (0.2), so that its greedy text varies and attention matters. It has
    an end token, no chat template, and reads up to 512 tokens.
    """
    return random_model(tmp_path_factory.mktemp("tiny_model"), hidden_size=32, heads=4)


@pytest.fixture(scope="session")
def wide_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_model_dir`, with heads of 64, as vLLM's attention wants them, and a chat template."""
    return random_model(
        tmp_path_factory.mktemp("wide_model"), hidden_size=128, heads=2,
        chat_template="{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
    )  # fmt: skip


def random_model(
    folder: Path, *, hidden_size: int, heads: int, chat_template: str | None = None
) -> Path:
    """Make the folder of a small Llama."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>"
    )
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    end = token_id(fast.eos_token_id)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def quiet_model_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a Quiet-STaR model that trusts its thoughts to a varying degree, with a chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from selftaught.quiet.checkpoint import make_quiet, save_quiet
    from selftaught.quiet.config import QuietConfig

    folder = tmp_path_factory.mktemp("quiet") / "model"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}A:"
    )
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model = make_quiet(base, tokenizer, QuietConfig.paper(thought_tokens=3, lookahead=2))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.nn.init.normal_(tensor(model.mixing.layers[-1].weight))
    save_quiet(model, tokenizer, folder)
    return folder


@pytest.fixture
def scripted_sampler() -> Callable[..., ScriptedSampler]:
    """Makes a sampler of a function, a dict from prompt text, or one text for every prompt."""

    def make(
        answers: str | dict[str, str] | Callable[[Text, int], str | Completion], **options: Any
    ) -> ScriptedSampler:
        if isinstance(answers, str):
            return ScriptedSampler(lambda prompt, index: answers, **options)
        if isinstance(answers, dict):
            return ScriptedSampler(lambda prompt, index: answers[str(prompt)], **options)
        return ScriptedSampler(answers, **options)

    return make
