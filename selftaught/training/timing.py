"""How long a training step of a model takes on this machine."""

import time

import torch

from selftaught.samplers.weights import load_plain_model

CPU_TOKENS = 2048
"""Maximum number of tokens of a timed step without an accelerator."""


def has_accelerator() -> bool:
    """Return whether this machine has a GPU or another accelerator."""
    return torch.accelerator.is_available()


def seconds_per_example(
    model: str,
    *,
    length: int,
    device_batch: int,
    train_batch_size: int,
    bf16: bool = False,
    lora: bool = False,
) -> float:
    """Return the seconds of training for each example, measured with one step on random tokens.

    The step has two forward and backward passes, of which the second is timed, and one update of
    AdamW, which is counted once per `train_batch_size` examples. Nothing is written.

    Args:
        model: model folder or name on the Hugging Face Hub.
        length: number of tokens of an example.
        device_batch: number of examples per forward pass.
        train_batch_size: number of examples per optimizer step.
        bf16: the forward pass is computed in bfloat16.
        lora: an adapter is trained. Its step is measured as one that trains the input embeddings
            alone: gradients pass through all layers, and the other weights have none.
    """
    device = torch.accelerator.current_accelerator() if has_accelerator() else None
    where = str(device or "cpu")
    loaded = load_plain_model(model, dtype=torch.float32).to(where).train()
    if lora:
        loaded.requires_grad_(False)
        loaded.get_input_embeddings().requires_grad_(True)
    vocabulary: int = loaded.get_input_embeddings().weight.shape[0]
    # On a processor, more tokens at a time are not faster, and a step may take minutes.
    count = device_batch if device else max(1, min(device_batch, CPU_TOKENS // length))
    tokens = torch.randint(vocabulary, (count, length), device=where)
    optimizer = torch.optim.AdamW([one for one in loaded.parameters() if one.requires_grad], lr=0.0)
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        with torch.autocast(where.split(":")[0], torch.bfloat16, enabled=bf16):
            loss = loaded(input_ids=tokens, labels=tokens).loss
        loss.backward()
        _ = loss.item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    started = time.perf_counter()
    optimizer.step()
    if device is not None:
        torch.accelerator.synchronize(device)
    update = time.perf_counter() - started
    return seconds[-1] / count + update / train_batch_size
