"""The command that answers questions by best-of-n."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from selftaught.printable import printable
from selftaught.runs.folder import Watch, read_rows

DONE, NO_ANSWER = 0, 3


@dataclass(frozen=True)
class SolveOptions:
    """Best-of-n with a verifier; without one, the majority."""

    model: str = "embedded"
    """The generator: a Hugging Face name or folder, or "embedded"."""
    verifier: str | None = None
    """The folder of a verifier, such as runs/vstar/verifier; none: the majority decides."""
    n: int = 16
    """Candidates per question."""
    by: Literal["best", "weighted"] = "best"
    """With a verifier: the candidate with the highest score, or the answer with the most weight."""
    score: Literal["sum", "mean", "reward"] = "sum"
    """What a candidate's score is: the sum of its tokens' log-probabilities (the paper), their mean, or
    the implicit reward against --reference."""
    reference: str | None = None
    """For reward: the model the verifier was trained from, such as runs/vstar/sft/model."""
    task: str = "arithmetic"
    """By whose rules the question is put and the answer is read."""
    task_options: dict[str, Any] = field(default_factory=dict)
    """The task's own options."""
    prompt: Literal["few_shot", "bare", "chat"] = "bare"
    """What stands before a question."""
    system_prompt: str | None = None
    """With --prompt chat: the system message."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """With --prompt chat: variables of the model's chat template, such as
    --chat-template-kwargs.enable_thinking false."""
    file: Path | None = None
    """Questions: JSONL with a column question, or text with one per line."""
    out: Path | None = None
    """Where the answers of a file go, as JSONL; repeating the command continues it."""
    temperature: float = 0.7
    """Of the candidates."""
    top_p: float = 1.0
    """Nucleus."""
    max_tokens: int | None = None
    """Room for a rationale; none: the task's own."""
    seed: int = 0
    """Of the draws."""
    sampler: str = "transformers"
    """Where the generator lives: transformers, vllm, ray, or openai for a server (--base-url URL)."""
    sampler_options: dict[str, Any] = field(default_factory=dict)
    """The sampler's own options, such as --sampler_options.batch_size 64."""


def solve(values: dict[str, Any], bar: Callable[..., Any]) -> int:
    from selftaught.evaluation.best_of_n import Solver, read_questions, solve_file

    question: str | None = values.pop("question")
    ask = SolveOptions(**values)
    if (question is None) == (ask.file is None):
        raise ValueError("Expected either a question or --file, got both or neither.")
    if question is not None and question.encode("utf-8", "replace").decode() != question:
        raise ValueError(f"Expected a question in UTF-8 text, got {question[:100]!r}.")
    if ask.verifier is None and (ask.by, ask.score, ask.reference) != ("best", "sum", None):
        raise ValueError(
            "--by, --score and --reference are about a verifier; give one by --verifier."
        )
    with Solver(**{one.name: getattr(ask, one.name) for one in fields(ask)
                   if one.name not in ("file", "out")}) as solver:  # fmt: skip
        if ask.file is not None:
            return _solve_file(solver, read_questions(ask.file), ask, solve_file, bar)
        solution = solver.solve(question or "", seen=lambda index, one: print(_candidate(index, one), flush=True))  # fmt: skip
    if solution.scores is not None:
        print("scores  " + " ".join(f"{score:.2f}" for score in solution.scores))
    if solution.answer is None:
        print(
            _no_answer(ask, f"any of the {len(solution.completions)} candidates"), file=sys.stderr
        )
        return NO_ANSWER
    print(f"answer  {printable(str(solution.answer))}  ({solution.support} of {len(solution.completions)} candidates)")  # fmt: skip
    print(printable(solution.completion))
    return DONE


def _candidate(index: int, completion: Any) -> str:
    return f"[{index + 1}] {printable(' '.join(completion.text.split())[:160])}"


def _solve_file(
    solver: Any,
    questions: Sequence[Any],
    ask: SolveOptions,
    solve_file: Any,
    bar: Callable[..., Any],
) -> int:
    from selftaught.runs.folder import hold, remember
    from selftaught.runs.status import reported, status_file

    out = ask.out or Path("runs/solved.jsonl")
    with (
        hold(out.parent, f"{out.name}.lock"),
        reported(status_file(out), "solve", Watch(progress=bar)) as watch,
        watch.progress("solving", len(questions)) as advance,
    ):

        def told(one: Any) -> None:
            print(printable(f"{one.question[:60]}  ->  {one.answer}  ({one.support} of {len(one.completions)})"), flush=True)  # fmt: skip
            if advance is not None:
                advance(1)

        count = solve_file(solver, questions, out, told=told)
    remember(ask, out)
    answered = sum(row.get("answer") is not None for row in read_rows(out)[1:])
    print(f"{answered} of {count} questions answered: {out}")
    if not answered:
        print(_no_answer(ask, f"any candidate of the {count} questions"), file=sys.stderr)
        return NO_ANSWER
    return DONE


def _no_answer(ask: SolveOptions, where: str) -> str:
    """What is said where no candidate has an answer that can be read."""
    small = ask.model == "embedded" and ask.sampler == "transformers"
    known = "The model in this package only adds numbers, written as 48+17; give another with --model. " if small else ""  # fmt: skip
    return (
        f"selftaught: no answer could be read from {where}. {known}The task {ask.task!r} must fit the "
        "question and the way the model states an answer (--task, --prompt); a completion that was cut "
        "at --max-tokens has none."
    )
