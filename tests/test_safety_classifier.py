"""Text classification as a check, compared with transformers' pipeline."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    pipeline,
)

from selftaught.safety import CheckOptions, open_checks
from selftaught.safety.classifier import Classifier

WORDS = [f"w{number}" for number in range(40)]
LABELS = {0: "fine", 1: "toxic", 2: "private"}
LONG = " ".join(WORDS[at * at % 40] for at in range(70))


def classifier(folder: Path, kind: Any = None, labels: dict[int, str] = LABELS) -> str:
    """Make a small BERT of random weights that reads 16 tokens."""
    vocabulary = {word: at for at, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", model_max_length=16,
    ).save_pretrained(folder)  # fmt: skip
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=18, initializer_range=0.3, problem_type=kind,
        id2label=labels, label2id={label: at for at, label in labels.items()},
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", [None, "multi_label_classification"])
def test_probabilities_are_those_of_the_pipeline(kind: str | None, tmp_path: Path):
    name = classifier(tmp_path, kind)
    texts = ["w1 w2 w3", "w9", " ", "w30 w4 w1 w1 w7 w8"]
    ask: Any = pipeline("text-classification", model=name, top_k=None, device="cpu")
    found = Classifier(name, ["toxic", "private"], 0.5).probabilities(texts)
    assert found[2] == []  # nothing to classify
    for text, windows in zip(texts, found, strict=True):
        for scores, span in windows:
            expected = {one["label"]: one["score"] for one in ask([text])[0]}
            assert scores == pytest.approx([expected["toxic"], expected["private"]], abs=1e-5)
            assert span == (0, len(text))


def test_a_long_text_is_read_to_its_end_in_windows(tmp_path: Path):
    name = classifier(tmp_path)
    ask: Any = pipeline("text-classification", model=name, top_k=None, device="cpu")
    (windows,) = Classifier(name, ["toxic"], 0.5).probabilities([LONG])
    expected = []
    covered = 0
    for scores, span in windows:
        assert span is not None and span[0] <= covered < span[1]  # no gap
        covered = span[1]
        part = ask([LONG[span[0] : span[1]]])[0]
        expected.append(next(one["score"] for one in part if one["label"] == "toxic"))
        assert scores == pytest.approx([expected[-1]], abs=1e-5)
    assert covered == len(LONG) and len(windows) > 4
    highest = max(expected)
    assert highest > expected[0] + 0.01  # not found in the first window
    for threshold, flagged in [(highest - 0.001, True), (highest + 0.001, False)]:
        options = CheckOptions(check_classifier=name, check_labels=["TOXIC"], check_threshold=threshold)  # fmt: skip
        with open_checks(options) as checks:
            assert bool(checks.flagged(LONG)) is flagged


def test_a_model_with_one_label_gives_independent_probabilities(tmp_path: Path):
    name = classifier(tmp_path, labels={0: "toxic"})
    ask: Any = pipeline("text-classification", model=name, device="cpu")
    (((scores, _),),) = Classifier(name, ["toxic"], 0.5).probabilities(["w1 w2"])
    assert scores == pytest.approx([ask(["w1 w2"])[0]["score"]], abs=1e-5)


def test_unknown_labels_and_other_models_are_refused(tmp_path: Path, tiny_model_dir: Path):
    name = classifier(tmp_path)
    with pytest.raises(
        ValueError, match="has no label 'rude'; its labels are fine, toxic, private"
    ):
        Classifier(name, ["rude"], 0.5)
    with pytest.raises(ValueError, match="has no classification head"):
        Classifier(str(tiny_model_dir), ["toxic"], 0.5)
    with pytest.raises(FileNotFoundError, match="no model folder"):
        Classifier(str(tmp_path / "missing"), ["toxic"], 0.5)
