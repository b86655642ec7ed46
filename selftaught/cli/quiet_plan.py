"""The plan of `selftaught quiet train --dry-run`, after all checks of the training."""

from dataclasses import fields

from selftaught.cli.output import plan_text, say
from selftaught.cli.quiet_train import Prepared, TrainOptions, adapted, prepared, thought_filter
from selftaught.safety.findings import Source

COUNTED = 100
"""Number of texts in which the positions that think are counted."""


def show_plan(how: TrainOptions) -> None:
    """Check what the training would refuse, and print the plan and the first span.

    Nothing is trained and nothing is written. The model is opened, because only its weights show
    whether its thoughts can be computed in parallel.

    Raises:
        ValueError: the training would refuse an option, the model, a text or the run folder.
        OSError: a file or the model does not exist, or the run folder cannot be written.
    """
    from selftaught.quiet.training import check_run, run_hash
    from selftaught.runs.folder import check_writable

    ready = prepared(how)
    first = ready.spans[0]
    text = ready.tokenizer.decode(first["input_ids"], clean_up_tokenization_spaces=False)
    parameters = sum(one.numel() for one in ready.model.parameters())
    peft_model = adapted(how, ready.model)
    copies = [*_average(ready), *_reference(ready)]
    check_writable(how.out)
    with thought_filter(ready) as filtered:
        made_from = run_hash(ready.model, ready.spans, ready.arguments, peft_model, filtered)
    # The arguments are those of the first stage of a curriculum.
    finished = check_run(how.out / "stage-1" if len(ready.stages) > 1 else how.out, made_from)
    finished = finished and (how.out / "model").exists()
    lines = [
        ("Model", f"{how.model} ({parameters:,} parameters, context {ready.model.context} tokens)"),
        ("Texts", _texts(ready)),
        ("Spans", f"{len(ready.spans)} per epoch, at most {how.length} tokens each"),
        *_options(ready),
        *_training(ready, adapted=peft_model is not None),
        *copies,
        *_checks(ready),
        ("Folder", f"{how.out}{' (contains the finished model)' if finished else ''}"),
    ]
    title = f"First span (text {first['text'] + 1}, {len(first['input_ids'])} tokens)"
    say(plan_text(lines, title, str(text)))


def _texts(ready: Prepared) -> str:
    taught, held_out = ready.spans.texts, ready.held_out.texts
    skipped = ready.spans.skipped
    return (
        f"{ready.how.text}: {len(taught)} training texts ({sum(map(len, taught)):,} tokens), "
        f"{len(held_out)} held-out texts ({sum(map(len, held_out)):,} tokens)"
        + (f", {skipped} texts too short and skipped" if skipped else "")
    )


def _options(ready: Prepared) -> list[tuple[str, str]]:
    """Return the line on the options of Quiet-STaR that differ from the defaults."""
    from selftaught.quiet.config import QuietConfig

    config = ready.model.quiet_config
    changed = [
        f"{one.name} {value:g}" if isinstance(value, float) else f"{one.name} {value}"
        for one in fields(QuietConfig)
        if (value := getattr(config, one.name)) != one.default
    ]
    preset = [] if ready.how.preset == "default" else [f"preset {ready.how.preset}"]
    return [("Options", ", ".join(preset + changed))] if preset + changed else []


def _checks(ready: Prepared) -> list[tuple[str, str]]:
    """Return the line on the checks of thoughts, if there are any."""
    if ready.checks is None:
        return []
    names = ", ".join(ready.checks.apply_to(Source()))
    return [("Checks", f"{names}; flagged thoughts get no positive advantage")]


def _average(ready: Prepared) -> list[tuple[str, str]]:
    """Return the line on the moving average of the weights, if the training needs one.

    Raises:
        ValueError: the memory is too small for it.
    """
    from selftaught.quiet.moving_average import average_bytes, check_memory

    config = ready.model.quiet_config
    if config.baseline != "ema" or config.ema_decay == 0:
        return []
    check_memory(ready.model.base)
    needed = average_bytes(ready.model.base)
    return [("Average", f"moving average of the trained weights, {needed:,} bytes")]


def _reference(ready: Prepared) -> list[tuple[str, str]]:
    """Return the line on the copy of the weights at the start, if the training needs one.

    Raises:
        ValueError: the memory is too small for it.
    """
    from selftaught.quiet.reference import check_memory, reference_bytes

    if ready.config.thought_kl_weight == 0 and ready.how.perplexity_steps == 0:
        return []
    check_memory(ready.model.base)
    needed = reference_bytes(ready.model.base)
    return [("Reference", f"copy of the trained weights at the start, {needed:,} bytes")]


def _training(ready: Prepared, *, adapted: bool) -> list[tuple[str, str]]:
    """Return the lines on steps, thoughts and memory."""
    from selftaught.quiet.chunks import bytes_per_thought, positions_per_chunk
    from selftaught.quiet.positions import thinking_positions
    from selftaught.training.options import training_steps

    model, arguments, config = ready.model, ready.arguments, ready.model.quiet_config
    if arguments.gradient_checkpointing:  # as the Trainer does before the first step
        model.gradient_checkpointing_enable()
    texts = arguments.per_device_train_batch_size
    batch = texts * arguments.gradient_accumulation_steps * arguments.world_size
    longest = min(ready.how.length, max(map(len, ready.spans.texts)))
    positions = thinking_positions(config, longest)
    sampled = batch * positions * config.thoughts * config.thought_tokens
    chunk = min(positions, positions_per_chunk(model.base, config, texts))
    needed = chunk * texts * config.thoughts * bytes_per_thought(model.base, config)
    most = "at most " if config.thought_may_end else ""
    kind = f"LoRA of rank {ready.how.lora_r}, " if adapted else ""
    return [
        *([("Stages", _stages(ready))] if ready.stages else []),
        ("Training", f"{kind}{training_steps(len(ready.spans), arguments)} optimizer steps, "
         f"{batch} spans per step, learning rate {arguments.learning_rate:g}"),
        ("Thoughts", f"{config.thoughts} of {most}{config.thought_tokens} tokens at {_where(ready)}, "
         f"{config.lookahead} lookahead tokens, mix {config.mix}, REINFORCE weight "
         f"{config.reinforce_weight:g}"),
        ("Sampled", f"at most {sampled:,} thought tokens per optimizer step"),
        ("Memory", f"about {needed / 2**20:,.0f} MiB for the activations of a chunk of {chunk} "
         "positions, in addition to the model, its gradients and the optimizer"),
    ]  # fmt: skip


def _stages(ready: Prepared) -> str:
    stages = ", ".join(f"{one.thought_tokens}/{one.lookahead}" for one in ready.stages)
    return f"{stages} thought tokens/lookahead; the lines below describe the first"


def _where(ready: Prepared) -> str:
    from selftaught.quiet.where import check_matches, training_matcher

    config, texts = ready.model.quiet_config, ready.spans.texts
    if config.positions == "all":
        return "every position"
    if matcher := training_matcher(config, ready.tokenizer):
        matching = check_matches(matcher, ready.tokenizer, texts)
        some = [matcher.mask(ids) for ids in texts[:COUNTED]]
        share = sum(map(sum, some)) / sum(map(len, some))
        kind = "before answers, after" if config.positions == "answer" else "after"
        return (
            f"{share:.1%} of the positions ({kind} text that matches {matcher.pattern!r}, in {matching} of "
            f"{len(texts)} training texts)"
        )
    return f"{config.positions_share:.0%} of the positions ({config.positions})"
