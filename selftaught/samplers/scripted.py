"""A sampler whose completions come from a function, for tests and replays."""

from collections.abc import Callable, Sequence

from selftaught.records import Completion, Text
from selftaught.samplers.base import Closing, SamplingParams, checked_prefix_tokens, without_stop

Script = Callable[[Text, int], str | Completion]
Continuation = Callable[[Text, tuple[int, ...], int], str | Completion]


class ScriptedSampler(Closing):
    """A sampler that returns `script(prompt, sample index)` for every prompt.

    If the script returns a string, it is cut at the first stop string, as a model's text would be.
    It starts inside a thought if the prompt is a text that ends with the opening mark.

    Args:
        script: Function from prompt and sample index to a completion.
        continued: Function from prompt, prefix tokens and sample index to the whole completion.
            None means that prefix tokens are an error.
        model: Name of the model.
        fingerprint: Fingerprint of the model.
    """

    def __init__(
        self,
        script: Script,
        *,
        continued: Continuation | None = None,
        model: str = "scripted",
        fingerprint: str = "scripted",
    ) -> None:
        self._script, self._continued = script, continued
        self.model = model
        self.fingerprint = fingerprint
        self.asked: list[Text] = []
        """All prompts received, in order."""

    def sample(
        self,
        prompts: Sequence[Text],
        params: SamplingParams,
        *,
        keys: Sequence[str] | None = None,
        prefix_tokens: Sequence[Sequence[int]] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:
        """Return `params.n` completions for every prompt, as `[prompt][sample]`; see `Sampler`."""
        keys = [str(prompt) for prompt in prompts] if keys is None else keys
        written = checked_prefix_tokens(prefix_tokens, keys, params.max_tokens)
        if any(written) and self._continued is None:
            raise ValueError(
                "Expected no prefix tokens, because this scripted sampler has no function to "
                "continue completions. Create it with continued=..."
            )
        completions = []
        for prompt, tokens in zip(prompts, written, strict=True):
            self.asked.append(prompt)
            indices = range(params.first, params.first + params.n)
            answers = (self._answer(prompt, tokens, index) for index in indices)
            opened = isinstance(prompt, str) and prompt.rstrip().endswith(params.thought_marks[0])
            completions.append([_ended(answer, params, opened) for answer in answers])
            if progress is not None:
                progress(params.n)
        return completions

    def _answer(self, prompt: Text, prefix_tokens: tuple[int, ...], index: int) -> str | Completion:
        if prefix_tokens and self._continued is not None:
            return self._continued(prompt, prefix_tokens, index)
        return self._script(prompt, index)

    def check(self, prompts: Sequence[Text], params: SamplingParams, keys: Sequence[str]) -> None:
        """Accept everything."""

    def close(self) -> None:
        """Do nothing."""


def _ended(answer: str | Completion, params: SamplingParams, opened: bool) -> Completion:
    if isinstance(answer, Completion):
        return answer
    text = without_stop(answer, params.stop, params.thought_marks, opened=opened)
    return Completion(answer if text is None else text, "stop", thought_open=opened)
