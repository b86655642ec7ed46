"""The exponential moving average of the weights, which predicts without thoughts in RLP.

Hatamizadeh et al. 2025 (arXiv:2510.01265), Algorithm 1: phi <- theta on the first batch (lines 8
and 9), and phi <- tau phi + (1 - tau) theta after every optimizer step (line 15).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from selftaught.quiet.config import HEAD_TOKENS
from selftaught.quiet.losses import text_log_probs
from selftaught.quiet.swapped import swapped
from selftaught.quiet.thoughts import language_head, read

AVERAGE = "average.safetensors"
"""File of the moving average in a checkpoint."""


class MovingAverage:
    """Exponential moving average of the trained weights of a model.

    Weights that are not trained (all but the adapter, with LoRA) are equal to their average and are
    not copied. Averages of 16-bit weights are float32: they could not change by a thousandth of
    the difference otherwise.

    Args:
        base: the model. Its present weights are the first average.
        decay: decay per update (tau), in [0, 1).

    Raises:
        ValueError: the memory is too small for the copy; says how many bytes it needs.
    """

    def __init__(self, base: nn.Module, decay: float) -> None:
        check_memory(base)
        self.decay = decay
        self._base = base
        self._trained = dict(_trained(base))
        self._average = {
            name: weight.detach().to(_precise(weight.dtype), copy=True)
            for name, weight in self._trained.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the present weights: phi <- tau phi + (1 - tau) theta."""
        for name, average in self._average.items():
            average.mul_(self.decay).add_(self._trained[name], alpha=1 - self.decay)

    @contextmanager
    def weights(self) -> Iterator[None]:
        """Context manager: the model has the average as its weights. Not for computing gradients."""
        average = {name: one.to(self._trained[name].dtype) for name, one in self._average.items()}
        with swapped(self._base, average):
            yield

    @torch.no_grad()
    def log_probs(
        self, base: PreTrainedModel, ids_BT: Tensor, mask_BT: Tensor | None, next_BT: Tensor
    ) -> Tensor:
        """Return the log-probability of each next token of texts under the average, `[B, T]`.

        Args:
            base: the model of the average, inside `thoughtful(base)`.
            ids_BT: token ids.
            mask_BT: 1 for text and 0 for padding. None means no padding.
            next_BT: next token of each position, or `IGNORED`.
        """
        with self.weights():
            hidden_BTD = read(base, ids_BT, mask_BT).hidden_BTD
            return text_log_probs(language_head(base), hidden_BTD, next_BT, HEAD_TOKENS)

    def state(self) -> dict[str, Tensor]:
        """Return the averages by the names of the weights."""
        return dict(self._average)

    def save(self, folder: Path) -> None:
        """Write the average into the folder of a checkpoint."""
        contiguous = {name: one.contiguous() for name, one in self._average.items()}
        save_file(contiguous, folder / AVERAGE, metadata={"format": "pt"})

    def load(self, folder: Path) -> None:
        """Read the average from the folder of a checkpoint.

        Raises:
            ValueError: the file is missing, or has other weights than the model.
        """
        path = folder / AVERAGE
        if not path.exists():
            raise ValueError(
                f"The checkpoint {folder} has no moving average of the weights: {path} is missing. "
                "Delete the checkpoint to train again, or take it from the run once more."
            )
        stored = load_file(path)
        wrong = sorted(
            name for name in set(stored) | set(self._average)
            if name not in stored or name not in self._average
            or stored[name].shape != self._average[name].shape
        )  # fmt: skip
        if wrong:
            raise ValueError(
                f"The moving average in {path} does not fit the model: {', '.join(wrong[:3])} "
                f"{'differs' if len(wrong) == 1 else 'and others differ' if wrong[3:] else 'differ'}. "
                "Delete the checkpoint, or train with the same options as before."
            )
        for name, average in self._average.items():
            average.copy_(stored[name])


class AverageUpdates(TrainerCallback):
    """Updates a moving average after every optimizer step."""

    def __init__(self, average: MovingAverage) -> None:
        self.average = average

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        self.average.update()


def average_bytes(base: nn.Module) -> int:
    """Return the memory of the moving average of a model in bytes."""
    return sum(weight.numel() * _precise(weight.dtype).itemsize for _, weight in _trained(base))


def check_memory(base: nn.Module) -> None:
    """Check that the moving average of a model fits into the free memory of its device.

    Raises:
        ValueError: it does not; the message says how many bytes it needs and how many are free.
    """
    needed = average_bytes(base)
    device = next(base.parameters()).device
    free = free_bytes(device)
    if free is not None and needed > free:
        raise ValueError(
            f"baseline='ema' keeps a moving average of the trained weights, which needs {needed:,} "
            f"bytes ({needed / 2**30:.1f} GiB); {free:,} bytes are free on {device}. Train an adapter "
            "(--use-peft), whose average is small, or set ema_decay=0: rewards are then measured "
            "against the model itself, which needs no copy and leaves the advantages as they are."
        )


def free_bytes(device: torch.device) -> int | None:
    """Return the number of bytes that can be allocated on a device. None if it is unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # torch keeps freed memory for itself.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return None
    of_machine = [int(one.split()[1]) * 1024 for one in lines if one.startswith("MemAvailable:")]
    limits = of_machine + _of_container()
    return min(limits) if limits else None


def _of_container() -> list[int]:
    """Return the free bytes within the memory limit of a container, if there is one (cgroup v2)."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = ((folder / name).read_text() for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return [int(limit) - int(used) + int(stat["inactive_file"])]
    except (OSError, ValueError, KeyError):  # no such limit: "max"
        return []


def _trained(base: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, one) for name, one in base.named_parameters() if one.requires_grad)


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
