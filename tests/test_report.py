import json
import random
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from selftaught.answers import Verdict
from selftaught.evaluation import evaluation_from
from selftaught.prompts import PromptStyle
from selftaught.records import OUTCOMES, Problem, Rollout, write_jsonl
from selftaught.report import (
    compare_runs,
    digits_table,
    markdown_table,
    read_run,
    rollout_kinds,
    run_report,
    shortened,
    visible,
)
from selftaught.tasks.base import Task

RIGHT = [  # right of 40 problems with 1, 2, 3, 4 and 5 digits, iteration by iteration
    (40, 38, 4, 1, 0),  # 83 of 200: 41.5%
    (40, 40, 20, 4, 1),  # 105: 52.5%
    (40, 40, 36, 18, 6),  # 140: 70.0%
    (40, 40, 40, 38, 34),  # 192: 96.0%
    (40, 40, 39, 36, 30),  # 185: 92.5%
]
NASTY = "<script>alert(1)</script></pre></details></article> \x1b[31mred\x1b[0m \x00 \x9b \ud800 & done"


def group_of(problem):
    digits = len(problem.question.split("+")[0].strip())
    return f"{digits} digit{'s' * (digits != 1)}"


SUMS = Task(
    name="sums",
    problems=lambda split: [],
    prompt=PromptStyle("sums"),
    extract=lambda completion: completion.split()[-1],
    equal=lambda gold, answer: Verdict(gold == answer, "literal"),
    hint=lambda problem: problem,
    group=group_of,
)


def graded(rng, rights, *, model, origin="sampled", per_group=40):
    """Rollouts of sums with the given number right in each length; the others fail in every way."""
    rollouts = []
    for digits, right in enumerate(rights, 1):
        for index in range(per_group):
            a, b = (rng.randrange(10 ** (digits - 1), 10**digits) for _ in range(2))
            question = f"{a} + {b}"
            problem = Problem(f"sum-{digits}-{index}", question, str(a + b))
            failed = OUTCOMES[1:][index % 4 if index % 3 else 0]
            outcome = "right" if index < right else failed
            answer = {"right": str(a + b), "wrong": str(a + b + 10), "ungradable": "1e"}.get(outcome)
            lines = [f"{str(a)[: len(str(a)) - i]} {str(b)[: len(str(b)) - i]}" for i in range(digits)]
            shots = "Q: 12 + 34\nA: 2 + 4 = 6, carry 0\n1 + 3 = 4\n46\n\n" * 4
            rollouts.append(
                Rollout(
                    problem,
                    f"{shots}Q: {question}\nA:",
                    "\n".join([" Let us add digit by digit.", *lines, answer or "and so on"]),
                    "length" if outcome == "cut by length" else "stop",
                    model,
                    0,
                    origin,
                    answer=answer,
                    outcome=outcome,
                    decided_by="literal" if answer else None,
                )
            )
    return rollouts


def funnel_of(sampled, rationalized):
    def counts(rollouts):
        return {each: sum(r.outcome == each for r in rollouts) for each in OUTCOMES}

    kept, kept_too = counts(sampled)["right"], counts(rationalized)["right"]
    return {
        "asked": len(sampled),
        "sampled": counts(sampled),
        "hinted": len(rationalized),
        "rationalized": counts(rationalized),
        "kept": kept,
        "kept rationalized": kept_too,
        "dropped": {"too long": 2, "wrong": counts(rationalized)["wrong"]},
        "trained on": kept + kept_too - 2,
    }


def fake_run(folder: Path, *, iterations=4, ended=True, seed=0, text=None, rate=1e-3) -> Path:
    """A run folder such as `selftaught star` leaves, with scripted numbers."""
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    settings = {"task": "arithmetic", "model": "embedded", "seed": seed,
                "training": {"learning_rate": rate, "warm_up": 100}}  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    versions = {"packages": {"torch": "2.13.0", "trl": "1.16.0"}, "python": "3.11.9",
                "platform": "Linux-6.1-x86_64", "cpus": 2, "commit": "abc1234",
                "command": "selftaught star"}  # fmt: skip
    (folder / "versions.json").write_text(json.dumps(versions))
    rows = []
    for number in range(iterations + 1):
        model = "embedded" if number == 0 else f"{folder.name}/iteration-{number}/model"
        held_out = graded(rng, RIGHT[number], model=model)
        write_jsonl(folder / f"iteration-{number}" / "validation.graded.jsonl", held_out)
        name = f"validation, iteration {number}"
        validation = evaluation_from(held_out, SUMS, name=name, seconds=4.1)
        row = {"iteration": number, "model": model, "validation": validation.to_dict(),
               "seconds": {"evaluate": 4.1}}  # fmt: skip
        if number:
            sampled = graded(rng, RIGHT[number - 1], model=model)
            if text is not None:
                sampled = [replace(r, completion=text, answer=r.answer and text,
                                   problem=replace(r.problem, question=text),
                                   prompt=[{"role": "user", "content": text}])
                           for r in sampled]  # fmt: skip
            missed = [right // 2 for right in RIGHT[number]]
            hinted = graded(rng, missed, model=model, origin="rationalized", per_group=22)
            write_text = text is not None
            for rollouts, file in ((sampled, "graded"), (hinted, "rationalized.graded")):
                path = folder / f"iteration-{number}" / f"{file}.jsonl"
                if write_text:
                    path.write_bytes(
                        b"".join(json.dumps(as_row(r)).encode() + b"\n" for r in rollouts)
                    )
                else:
                    write_jsonl(path, rollouts)
            steps = round(40 * 1.2 ** (number - 1))
            log = [{"step": s, "loss": 1.2 / number * 0.97**s + 0.1, "learning_rate": rate * min(1, s / 20)}
                   for s in range(1, steps + 1)]  # fmt: skip
            row |= {
                "funnel": funnel_of(sampled, hinted),
                "training": {"steps": steps, "loss": log[-1]["loss"], "log": log},
                "seconds": {"sample": 12.5, "rationalize": 6.1 / number, "grade": 0.4,
                            "train": 8.0 * 1.2**number, "evaluate": 4.1},
            }  # fmt: skip
        rows.append(row)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if ended:
        measured = [evaluation_from(graded(rng, rights, model=model), SUMS, name=name)
                    for name, rights, model in (
                        ("test, base", (40, 36, 4, 2, 0), "embedded"),  # 82: 41.0%
                        ("test, best", (40, 40, 39, 38, 33), "iteration-3/model"),  # 190: 95.0%
                        ("direct answers, fine-tuned", (40, 30, 20, 10, 2), "direct/model"),  # 51%
                    )]  # fmt: skip
        told = [each.to_dict() for each in measured]
        summary = {"best": 3, "why stopped": "no gain in 1 iteration", "best model": "iteration-3/model",
                   "test": {"base": told[0], "best": told[1]}, "comparisons": told[2:],
                   "minutes": 4.2}  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def as_row(rollout):
    from dataclasses import asdict

    return asdict(rollout)
