"""The checks of a run or a server: which of them a text fails, and where."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from threading import Lock
from typing import Self

from selftaught.safety.classifier import Classifier
from selftaught.safety.findings import CHECKS, NO_SOURCE, CheckName, Finding, Source
from selftaught.safety.known_secrets import Secrets
from selftaught.safety.leaks import SystemPrompt, leaks
from selftaught.safety.limited import LimitedChecks, read_patterns
from selftaught.safety.options import CheckOptions


class Checks:
    """Checks of texts, as `open_checks` returns them.

    Safe to use from several threads; calls run one after another. The worker process and the
    classifier's weights are loaded with the first text. `close`, or the end of a `with` block, frees
    them; the checks can then be used again, which loads them again.

    Attributes:
        options: the options.
    """

    def __init__(
        self,
        options: CheckOptions,
        limited: LimitedChecks,
        secrets: Secrets | None,
        classifier: Classifier | None,
        system: SystemPrompt | None,
    ) -> None:
        self.options = options
        self._limited, self._secrets, self._classifier = limited, secrets, classifier
        self._system = system
        self._lock = Lock()

    def find(
        self, texts: Sequence[str], sources: Sequence[Source] | None = None
    ) -> list[list[Finding]]:
        """Return the findings of every text; none if the text passes all checks.

        Args:
            texts: texts of a model.
            sources: what the prompt of each text contained, for the checks of leaks. None: unknown.
        """
        if sources is not None and len(sources) != len(texts):
            raise ValueError(f"Expected one source per text; got {len(sources)} for {len(texts)}.")
        with self._lock:
            found = self._limited.find(texts)
            classified = self._classifier.find(texts) if self._classifier else [[] for _ in texts]
        for number, text in enumerate(texts):
            found[number] += self._secrets.find(text) if self._secrets else []
            found[number] += classified[number]
            source = sources[number] if sources is not None else NO_SOURCE
            if self.options.check_leaks or self._system is not None:
                source = source if self.options.check_leaks else NO_SOURCE
                found[number] += leaks(text, source, self._system, self.options.check_overlap)
        return [[replace(one, reason=self.redacted(one.reason)) for one in each] for each in found]

    def apply_to(self, source: Source) -> list[CheckName]:
        """Return the checks that a text of this source goes through."""
        hinted = self.options.check_leaks and (source.answer is not None or bool(source.hints))
        shown = self._system is not None or (self.options.check_leaks and bool(source.system))
        given: dict[CheckName, bool] = {
            "pattern": bool(self._limited.patterns),
            "secret": self._secrets is not None,
            "classifier": self._classifier is not None,
            "function": self._limited.function is not None,
            "hint mentioned": hinted,
            "hint repeated": hinted,
            "answer first": hinted,
            "system prompt": shown,
        }
        return [name for name in CHECKS if given[name]]

    def flagged(self, text: str, source: Source = NO_SOURCE) -> list[str]:
        """Return the reasons why a text is flagged; none if it passes all checks."""
        return [str(one) for one in self.find([text], [source])[0]]

    def redacted(self, text: str) -> str:
        """Return the text with every secret blacked out, for logs and pages."""
        return self._secrets.redacted(text) if self._secrets else text

    @property
    def key(self) -> str:
        """A hash of everything that decides whether a text is flagged, contents of files included.

        It is meant as part of another hash, because a hash of few secrets could be guessed.
        """
        options = self.options
        files = [options.check_pattern_file, options.check_secrets, options.check_system_prompt]
        if options.check_function is not None:
            files.append(Path(options.check_function.rpartition(":")[0]))
        contents = [None if one is None else one.read_bytes().hex() for one in files]
        whole = json.dumps([asdict(options), contents], default=str, sort_keys=True)
        return hashlib.sha256(whole.encode()).hexdigest()

    def close(self) -> None:
        """End the worker process and free the classifier."""
        with self._lock:
            self._limited.close()
            if self._classifier is not None:
                self._classifier.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def check_given(options: CheckOptions, texts: str) -> None:
    """Check that there is a check beside the leaks of hints, which do not apply to some texts.

    Args:
        options: the options.
        texts: what the texts are and why, for the message.

    Raises:
        ValueError: there is none.
    """
    given = ("check_patterns", "check_pattern_file", "check_secrets", "check_classifier",
             "check_function", "check_system_prompt")  # fmt: skip
    if not any(getattr(options, name) for name in given):
        *first, last = (f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(
            f"Expected at least one check of {texts}; got none. Give {', '.join(first)} or {last}."
        )


def open_checks(options: CheckOptions) -> Checks:
    """Return the checks of the options, after reading all files and configurations.

    Args:
        options: the options.

    Raises:
        ValueError: a pattern, a secret, a label or the function cannot be used, or there is no check
            at all; the message names it, but no secret.
        OSError: a file or the model was not found.
    """
    limited = LimitedChecks(
        read_patterns(options.check_patterns, options.check_pattern_file), options.check_function
    )
    secrets = Secrets(options.check_secrets) if options.check_secrets else None
    classifier = None
    if options.check_classifier is not None:
        classifier = Classifier(options.check_classifier, options.check_labels, options.check_threshold)  # fmt: skip
    system = None
    if options.check_system_prompt is not None:
        system = SystemPrompt(options.check_system_prompt.read_text(encoding="utf-8"))
        if not system:
            raise ValueError(
                f"Expected a system prompt in {options.check_system_prompt}; it has no word."
            )
    if not options.check_leaks:
        check_given(options, "texts")
    checks = Checks(options, limited, secrets, classifier, system)
    with checks:
        limited.check()
    return checks
