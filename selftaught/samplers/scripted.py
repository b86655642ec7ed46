"""A sampler whose completions come from a function; for tests and replays."""

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from selftaught.records import Completion, Text
from selftaught.samplers.base import SamplingParams

Script = Callable[[Text, int], str | Completion]


class ScriptedSampler:
    """Answers every prompt with `script(prompt, sample index)`.

    A plain string is cut at the first stop string, as a model's text would be.
    """

    def __init__(
        self, script: Script, *, model: str = "scripted", fingerprint: str = "scripted"
    ) -> None:
        self._script = script
        self.model = model
        self.fingerprint = fingerprint
        self.asked: list[Text] = []
        """Every prompt seen, in order."""

    def sample(
        self,
        prompts: Sequence[Text],
        params: SamplingParams,
        *,
        keys: Sequence[str] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:
        """`params.n` completions for every prompt, as `[prompt][sample]`."""
        completions = []
        for prompt in prompts:
            self.asked.append(prompt)
            answers = (self._script(prompt, index) for index in range(params.n))
            completions.append([_ended(answer, params.stop) for answer in answers])
            if progress is not None:
                progress(params.n)
        return completions

    def check(self, prompts: Sequence[Text], params: SamplingParams, keys: Sequence[str]) -> None:
        """Nothing is refused."""

    def close(self) -> None:
        """Nothing to give back."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _ended(answer: str | Completion, stop: Sequence[str]) -> Completion:
    if isinstance(answer, Completion):
        return answer
    found = [at for at in (answer.find(text) for text in stop) if at >= 0]
    return Completion(answer[: min(found)] if found else answer, "stop")
