"""End of completions: end tokens and stop strings."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from selftaught.records import Completion, FinishReason
from selftaught.rendering import completion_text, silent_ids
from selftaught.samplers.base import without_stop
from selftaught.thought_marks import THINK, ThoughtMarks


class Ending:
    """Decides when a completion ends, and returns its text.

    Stop strings are searched in the decoded text, not in token ids, so a stop string may span
    several tokens. A table over the vocabulary marks tokens in which a stop string can end. Only
    rows whose latest token is marked are decoded.

    Args:
        tokenizer: The model's tokenizer.
        eos: Ids of the end tokens.
        stop: Stop strings.
        marks: The opening and the closing mark of a thought.
        opened: The prompts end inside a thought.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        eos: Sequence[int],
        stop: Sequence[str],
        marks: ThoughtMarks = THINK,
        *,
        opened: bool = False,
    ) -> None:
        special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        # A stop string that is a special token is treated as an end token.
        self.eos = sorted({*eos, *(special[text] for text in stop if text in special)})
        self._tokenizer = tokenizer
        self.silent = frozenset((*self.eos, *silent_ids(tokenizer)))
        self.stop = [text for text in stop if text not in special]
        self.marks, self.opened = marks, opened
        self._suspects: dict[int, bool] = {}
        self._table_V = torch.full((0,), -1, dtype=torch.int8)

    def text(self, token_ids: Sequence[int]) -> str:
        """Return the text of a completion's tokens, without trailing EOS, BOS and padding tokens.

        Other special tokens are part of the text, because they may be thought marks.
        """
        return completion_text(self._tokenizer, token_ids, self.silent)

    def suspects(self, token_B: Tensor) -> Tensor:
        """Return a mask of the rows whose token can be the last one of a stop string."""
        if not self.stop:
            return torch.zeros_like(token_B, dtype=torch.bool)
        largest = int(token_B.max()) + 1
        if largest > len(self._table_V):
            grown_V = torch.full((2 * largest,), -1, dtype=torch.int8, device=token_B.device)
            grown_V[: len(self._table_V)] = self._table_V
            self._table_V = grown_V
        flag_B = self._table_V[token_B]
        if bool((flag_B < 0).any()):
            for token in token_B[flag_B < 0].unique().tolist():
                self._table_V[token] = self._can_end_a_stop(token)
            flag_B = self._table_V[token_B]
        return flag_B > 0

    def _can_end_a_stop(self, token: int) -> bool:
        """Return False only if no stop string can end inside this token, whatever precedes it."""
        alone = self.text([token])
        if (
            not alone
        ):  # end and unknown tokens never add text; others may add text after another token
            known = self._tokenizer.convert_ids_to_tokens(token) is not None
            return known and token not in self.silent
        if "\ufffd" in alone:  # part of a character
            return True
        # Some tokenizers drop the space before the first word.
        return any(
            stop in text or any(text.startswith(stop[k:]) for k in range(1, len(stop)))
            for text in (alone, " " + alone)
            for stop in self.stop
        )

    def cut(self, token_ids: Sequence[int]) -> str | None:
        """Return the text before the first stop string outside thoughts, or None."""
        if not self.stop:
            return None
        return without_stop(self.text(token_ids), self.stop, self.marks, opened=self.opened)

    def stopped(self, token_ids: Sequence[int]) -> bool:
        """Return whether a stop string ends with the last token, as `cut` does but faster."""
        if not self.stop or not bool(self.suspects(torch.tensor(token_ids[-1:]))):
            return False
        return self.cut(token_ids) is not None

    def ignored(self, token_ids: Sequence[int]) -> bool:
        """Return whether the text contains stop strings and all of them are inside thoughts."""
        text = self.text(token_ids)
        return any(stop in text for stop in self.stop) and self.cut(token_ids) is None

    def ended(self, token_ids: Sequence[int]) -> bool:
        """Return whether the completion has ended, by its last token or a stop string."""
        if not token_ids:
            return False
        return token_ids[-1] in self.eos or self.cut(token_ids) is not None

    def completion(self, token_ids: Sequence[int]) -> Completion:
        """Return the completion with these tokens, including the end token or stop string.

        Tokens after the first stop string are dropped.
        """
        ids = tuple(token_ids)
        text = self.cut(ids)
        if text is not None:
            return Completion(text, "stop", self._up_to_stop(ids), self.opened)
        finish: FinishReason = "stop" if ids[-1] in self.eos else "length"
        return Completion(self.text(ids), finish, ids, self.opened)

    def _up_to_stop(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shortest prefix of the tokens that contains the stop string, by bisection."""
        few, enough, middle = 0, len(ids), len(ids) - 1
        while enough - few > 1:
            if self.cut(ids[:middle]) is None:
                few = middle
            else:
                enough = middle
            middle = (few + enough) // 2
        return ids[:enough]
