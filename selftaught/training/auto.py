"""Training settings that depend on the model: the values of options that are "auto".

The rates are those with which fine-tuning on generated rationales improved a model: 1e-3 for 200,000
parameters and 2e-4 for 135 million (LOG.md), and 2e-5 for 7 billion (RFT, arXiv:2308.01825). Sizes
between them are interpolated. They are a start; the best rate also depends on the data.
"""

import math
from bisect import bisect_right

from selftaught.option_groups import Auto

TINY = 1_000_000
"""Models with fewer parameters, such as the one in this package, have settings of their own."""
SIZES = (TINY, 30_000_000, 300_000_000, 1_000_000_000, 3_000_000_000, 15_000_000_000)
RATES = (1e-3, 5e-4, 2e-4, 1e-4, 5e-5, 2e-5, 1e-5)
DEVICE_BATCHES = (64, 32, 16, 8, 8, 4, 2)
LORA_FACTOR, MAX_LORA_RATE = 10, 1e-3
STEPS_PER_PASS = 40
"""Number of optimizer steps that a pass over the training problems has at least."""
MIN_BATCH = 8


def auto_learning_rate(parameters: int, *, lora: bool = False, preferences: bool = False) -> float:
    """Return a peak learning rate for a model.

    Args:
        parameters: number of parameters of the model.
        lora: an adapter is trained; its rate is ten times that of all weights, at most 1e-3.
        preferences: DPO; its rate is a tenth of that of supervised fine-tuning.
    """
    rate = RATES[bisect_right(SIZES, parameters)]
    if lora:
        rate = min(LORA_FACTOR * rate, MAX_LORA_RATE)
    return float(f"{rate / 10 if preferences else rate:.1g}")


def auto_batch(examples: int, most: int) -> int:
    """Return a number of examples per optimizer step.

    The result is the largest power of two with which a pass over the examples has at least
    `STEPS_PER_PASS` steps; at least 8 and at most `most`.
    """
    fitting = max(1, examples // STEPS_PER_PASS)
    return min(most, max(MIN_BATCH, 2 ** int(math.log2(fitting))))


def given_batches(
    whole: int | Auto, device: int | Auto, steps: int | None, num_processes: int
) -> tuple[int | Auto, int | Auto]:
    """Return the global batch size and that of a device; gradient accumulation is counted in.

    Args:
        whole: global batch size.
        device: number of examples per device and forward pass.
        steps: number of batches per optimizer step and device; None if it is not given.
        num_processes: number of processes, each with one device.

    Raises:
        ValueError: the three numbers contradict each other.
    """
    if steps is None:
        return whole, device
    if steps < 1:
        raise ValueError(f"gradient_accumulation_steps must be at least 1; got {steps}.")
    device = 8 if device == "auto" else device  # the default of transformers
    product = device * steps * num_processes
    if whole not in ("auto", product):
        raise ValueError(
            f"train_batch_size must be per_device_train_batch_size * gradient_accumulation_steps * "
            f"num_processes, {device} * {steps} * {num_processes} = {product}; got {whole}. Leave out "
            "one of the three."
        )
    return product, device


def auto_batches(
    whole: int | Auto, device: int | Auto, parameters: int, suggested: int
) -> tuple[int, int]:
    """Return the global batch size and the number of examples per device and forward pass.

    They do not depend on the number of processes, so that a run can be continued with another one;
    with so many processes that a device has fewer examples, it takes these at once.

    Args:
        whole, device: see `given_batches`.
        parameters: number of parameters of the model. A forward pass has at most 64 examples for
            a model of a million, 16 for 300 million, 8 for 3 billion, and 2 for more than 15
            billion parameters.
        suggested: global batch size where `whole` is "auto"; it is rounded to a multiple of
            `device`.

    Raises:
        ValueError: a size is below 1, or the global batch size is no multiple of that of a device.
    """
    given: dict[str, int | Auto] = {
        "train_batch_size": whole,
        "per_device_train_batch_size": device,
    }
    for name, size in given.items():
        if size != "auto" and size < 1:
            raise ValueError(f'{name} must be at least 1, or "auto"; got {size}.')
    if whole == "auto":
        each = 1 if device == "auto" else device
        whole = each * max(1, round(suggested / each))
    if device == "auto":
        most = min(whole, DEVICE_BATCHES[bisect_right(SIZES, parameters)])
        device = max(size for size in range(1, most + 1) if whole % size == 0)
    if whole % device:
        raise ValueError(
            f"train_batch_size must be a multiple of per_device_train_batch_size, {device}; got "
            f"{whole}."
        )
    return whole, device
