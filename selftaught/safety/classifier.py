"""Text classification with a model of transformers, in this process.

A text that is longer than the model's context is split into overlapping windows, so that nothing is
truncated. The probability of a label is the highest one over the windows.

Shapes: W windows, L labels.
"""

from collections.abc import Sequence
from typing import Any

from selftaught.hub import check_model_name
from selftaught.safety.findings import Finding

BATCH = 16
"""Number of windows per forward pass."""
LONGEST = 512
"""Maximum length of a window in tokens."""
OVERLAP = 0.25
"""Share of a window that it has in common with the next one."""


class Classifier:
    """A text classification model. One thread at a time.

    The weights are loaded with the first text. `close` frees them, and a later call loads them
    again.

    Args:
        name: folder or Hugging Face name of the model.
        labels: labels for which a text is flagged, by their names in the model's configuration.
        threshold: probability of a label from which on a text is flagged.

    Raises:
        ValueError: the model has no such label, or no fast tokenizer.
        OSError: the model was not found.
    """

    def __init__(self, name: str, labels: Sequence[str], threshold: float) -> None:
        from transformers import AutoConfig, AutoTokenizer

        check_model_name(name)
        self.name, self.threshold = name, threshold
        config: Any = AutoConfig.from_pretrained(name)
        if not any(one.endswith("ForSequenceClassification") for one in config.architectures or ()):
            made = ", ".join(config.architectures or ()) or "no architecture"
            raise ValueError(
                f"Expected a text classification model as --check-classifier, got {name} with {made}, "
                "which has no classification head."
            )
        known = {str(label).casefold(): (int(at), str(label)) for at, label in config.id2label.items()}  # fmt: skip
        for label in labels:
            if label.casefold() not in known:
                listed = ", ".join(label for _, label in sorted(known.values()))
                raise ValueError(
                    f"The classifier {name} has no label {label!r}; its labels are {listed}. Change "
                    "--check-labels."
                )
        self.labels = [known[label.casefold()] for label in labels]
        # As in transformers' pipeline: independent probabilities, or one distribution.
        self._independent = config.problem_type == "multi_label_classification" or len(config.id2label) == 1  # fmt: skip
        self._tokenizer: Any = AutoTokenizer.from_pretrained(name)
        if not self._tokenizer.is_fast:
            raise ValueError(
                f"The classifier {name} has no fast tokenizer, which is needed to split long texts."
            )
        self.window = self._window(config)
        self._model: Any = None

    def _window(self, config: Any) -> int:
        # Some models (RoBERTa) use the first two positions for padding.
        positions = getattr(config, "max_position_embeddings", None) or LONGEST + 2
        return min(LONGEST, self._tokenizer.model_max_length, max(8, positions - 2))

    def find(self, texts: Sequence[str]) -> list[list[Finding]]:
        """Return a finding for every label whose probability is at least the threshold."""
        found: list[list[Finding]] = [[] for _ in texts]
        for number, windows in enumerate(self.probabilities(texts)):
            for at, (label_id, label) in enumerate(self.labels):
                del label_id
                score, span = max(((scores[at], span) for scores, span in windows), default=(0, None))  # fmt: skip
                if score >= self.threshold:
                    found[number].append(Finding("classifier", f"{label}, {score:.2f}", span))
        return found

    def probabilities(
        self, texts: Sequence[str]
    ) -> list[list[tuple[list[float], tuple[int, int] | None]]]:
        """Return the probabilities of the labels in every window of every text, with its span."""
        import torch

        filled = [(number, text) for number, text in enumerate(texts) if text.strip()]
        results: list[list[tuple[list[float], tuple[int, int] | None]]] = [[] for _ in texts]
        if not filled:
            return results
        model = self._loaded()
        encoded = self._tokenizer(
            [text for _, text in filled], truncation=True, max_length=self.window,
            stride=int(OVERLAP * (self.window - self._tokenizer.num_special_tokens_to_add())),
            return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
        owner, offsets = encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping")
        columns = [at for at, _ in self.labels]
        for first in range(0, len(owner), BATCH):
            rows = {name: values[first : first + BATCH] for name, values in encoded.items()}
            batch = self._tokenizer.pad(rows, return_tensors="pt").to(model.device)
            with torch.no_grad():
                logits_WL = model(**batch).logits.float()
            chance_WL = logits_WL.sigmoid() if self._independent else logits_WL.softmax(-1)
            for row, scores in enumerate(chance_WL[:, columns].tolist(), first):
                results[filled[owner[row]][0]].append((scores, _span(offsets[row])))
        return results

    def _loaded(self) -> Any:
        if self._model is None:
            import torch
            from transformers import AutoModelForSequenceClassification
            from transformers.utils import logging

            logging.disable_progress_bar()
            device = "cuda" if torch.cuda.is_available() else "cpu"
            model: Any = AutoModelForSequenceClassification.from_pretrained(self.name)
            self._model = model.to(device).eval()
        return self._model

    def close(self) -> None:
        """Free the weights."""
        self._model = None


def _span(offsets: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """Return the characters of a window. Special tokens have empty offsets."""
    real = [(start, end) for start, end in offsets if end > start]
    return (real[0][0], real[-1][1]) if real else None
