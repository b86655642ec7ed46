"""Attention kernels of PyTorch that return the log-sum-exp of the scores.

With the log-sum-exp, the outputs for two parts of the keys can be combined as under one softmax. In
the backward pass, a kernel recomputes the attention weights from the log-sum-exp and the output. If
both are those of all parts together, it returns the exact gradients of its part.

`scaled_dot_product_attention` uses the same kernels but does not return the log-sum-exp, so they
are called directly. On a device without such a kernel, callers compute the plain product.

Shapes: B batch, H heads, Q queries, S keys, D head width.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

logger = logging.getLogger(__name__)

aten: Any = torch.ops.aten

Name = Literal["flash_for_cpu", "efficient"]

MOST_ROWS = 2**16 - 1
"""Maximum size of the grid of a CUDA kernel in the dimensions of batch and heads."""
SUM_ALIGNMENT = 32
"""The efficient kernel pads the queries of the log-sum-exp to a multiple of this number."""
BIAS_ALIGNMENT = 16
"""Multiple to which rows of a bias are padded in memory, as in `scaled_dot_product_attention`."""
TOLERANCE = {torch.float32: 1e-2, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Maximum error of a kernel in `agrees`, relative to the largest value. Rounding gives 0.005 in
bfloat16; a wrong mask, scale or log-sum-exp gives 0.7 and more in at least one value. In float32,
the tensor cores of a GPU may compute in TensorFloat-32."""


@dataclass(frozen=True)
class Kernel:
    """A kernel that returns the log-sum-exp. A bias is added to the scores; it has no gradient."""

    name: Name
    forward: Callable[[Tensor, Tensor, Tensor, Tensor | None, float], tuple[Tensor, Tensor]]
    """(query, key, value, bias, scale) -> (output `[B, H, Q, D]`, log-sum-exp `[B, H, Q]`)."""
    backward: Callable[
        [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float],
        tuple[Tensor, Tensor, Tensor],
    ]
    """(gradient, query, key, value, bias, output, log-sum-exp, scale) -> gradients of query, key
    and value."""


def _cpu_forward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    return aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, attn_mask=bias, scale=scale
    )


def _cpu_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, out: Tensor,
    total: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, key, value, out, total, 0.0, False, attn_mask=bias, scale=scale
    )


def _efficient_forward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    out, total, _, _ = aten._scaled_dot_product_efficient_attention(
        query, key, value, _expanded(bias, query, key), compute_log_sumexp=True, scale=scale
    )
    return out, total[..., : query.shape[2]]


def _efficient_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, out: Tensor,
    total: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    # The kernel reads the padding, whose weights are 0 only with a log-sum-exp of infinity.
    padded = pad(total.float(), (0, -total.shape[-1] % SUM_ALIGNMENT), value=math.inf)
    # In 16 bits, the kernel ignores the strides of the output and reads the layout [B, Q, H, D].
    out = out.transpose(1, 2).contiguous().transpose(1, 2)
    unused = torch.zeros((), dtype=torch.long, device=query.device)  # random state of dropout
    query_grad, key_grad, value_grad, _ = aten._scaled_dot_product_efficient_attention_backward(
        grad, query, key, value, _expanded(bias, query, key), out, padded.contiguous(), unused,
        unused, 0.0, [True, True, True, False], scale=scale,
    )  # fmt: skip
    return query_grad, key_grad, value_grad


def _expanded(bias: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """Return a bias `[B, H, Q, S]` whose rows are aligned in memory, for the efficient kernel."""
    if bias is None:
        return None
    shape = (*query.shape[:3], key.shape[2])
    return aligned(bias)[(None,) * (4 - bias.dim())].expand(shape)


def aligned(bias: Tensor) -> Tensor:
    """Return a bias whose rows start at a multiple of `BIAS_ALIGNMENT` elements in memory.

    A bias that is already aligned is returned unchanged.
    """
    first = bias.storage_offset() % BIAS_ALIGNMENT == 0
    strides = bias.stride()
    if first and strides[-1] == 1 and all(one % BIAS_ALIGNMENT == 0 for one in strides[:-1]):
        return bias
    width = bias.shape[-1]
    padded = bias.new_zeros(*bias.shape[:-1], width + -width % BIAS_ALIGNMENT)
    padded[..., :width] = bias
    return padded[..., :width]


KERNELS: dict[Name, Kernel] = {
    "flash_for_cpu": Kernel("flash_for_cpu", _cpu_forward, _cpu_backward),
    "efficient": Kernel("efficient", _efficient_forward, _efficient_backward),
}


def kernel_name(
    device_type: str, dtype: torch.dtype, width: int, value_width: int, *, rows: int = 1,
    hip: bool = False,
) -> Name | None:  # fmt: skip
    """Return the kernel for a device and a data type, or None for the plain product.

    The flash kernel for CUDA is not used, because it takes no bias.

    Args:
        device_type: type of the device, such as "cuda".
        dtype: data type of queries, keys and values.
        width: head width of queries and keys.
        value_width: head width of the values.
        rows: the larger of batch size and number of heads.
        hip: PyTorch is built for AMD GPUs, where the log-sum-exp has another layout.
    """
    if width != value_width:
        return None
    if device_type == "cpu":
        return "flash_for_cpu"
    if device_type != "cuda" or hip or dtype not in TOLERANCE or rows > MOST_ROWS:
        return None
    # Tensor cores load 16 bytes at a time.
    return "efficient" if width * dtype.itemsize % 16 == 0 else None


def kernel_for(query: Tensor, key: Tensor, value: Tensor) -> Kernel | None:
    """Return the kernel for queries, keys and values of one layer, or None for the plain product.

    A kernel for CUDA is compared with the plain product when a device, data type and head width is
    first used; see `agrees`. `torch.backends.cuda.enable_mem_efficient_sdp(False)` disables it.
    """
    device, dtype, width = query.device, query.dtype, query.shape[-1]
    rows = max(*query.shape[:2], *key.shape[:2])
    hip = torch.version.hip is not None
    name = kernel_name(device.type, dtype, width, value.shape[-1], rows=rows, hip=hip)
    if name is None or name == "flash_for_cpu":
        return None if name is None else KERNELS[name]
    if not torch.backends.cuda.mem_efficient_sdp_enabled():
        return None
    return KERNELS[name] if _trusted(name, device, dtype, width) else None


@cache
def _trusted(name: Name, device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Return whether a kernel gives right results here; logs a warning if it does not."""
    try:
        why = agrees(KERNELS[name], device, dtype, width)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError, TypeError) as error:
        why = str(error).splitlines()[0]
    if why is not None:
        logger.warning(
            "Attention of %s with head width %d on %s is computed without PyTorch's %s kernel, "
            "which needs more memory: %s.",
            dtype, width, device, name, why,
        )  # fmt: skip
    return why is None


def agrees(kernel: Kernel, device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """Compare a kernel with the plain product on the CPU, forward and backward, on random numbers.

    The keys are in two parts that are combined by their log-sum-exp, as in training. A query sees
    some keys of each part, or none of one part.

    Returns:
        None, or a description of the values that differ.
    """
    # Not inference tensors, because the plain product needs gradients.
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        draw = torch.Generator().manual_seed(0)
        shapes = {"query": (2, 2, 45, width), "key": (2, 2, 37, width), "value": (2, 2, 37, width)}
        given = {
            name: torch.randn(shape, generator=draw).to(dtype)
            for name, shape in (shapes | {"gradient": shapes["query"]}).items()
        }
        hidden = torch.rand((2, 1, 45, 37), generator=draw) < 0.4
        hidden[:, :, 7, :20], hidden[:, :, 8, 20:] = True, True
        hidden[..., -1], hidden[..., 0] = False, False
        hidden[:, :, 7, 0], hidden[:, :, 8, -1] = True, True
        bias = (hidden * -30000.0).to(dtype)
        expected = _plain(given, bias, width**-0.5)
        there = {name: one.to(device) for name, one in given.items()}
        found = _in_two_parts(kernel, there, bias.to(device), width**-0.5, first=20)
    errors = {
        name: float((found[name].float().cpu() - one).abs().max() / one.abs().max())
        for name, one in expected.items()
    }
    wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE[dtype]}
    listed = ", ".join(f"{name} by {error:.2g}" for name, error in wrong.items())
    return f"it is off, relative to the largest value: {listed}" if wrong else None


def _plain(given: dict[str, Tensor], bias: Tensor, scale: float) -> dict[str, Tensor]:
    """Return output, log-sum-exp and gradients of the plain product in float32."""
    query, key, value = (given[name].float().requires_grad_() for name in ("query", "key", "value"))
    with torch.enable_grad():
        score = query @ key.transpose(-1, -2) * scale + bias.float()
        out = score.softmax(-1) @ value
    got = torch.autograd.grad(out, (query, key, value), given["gradient"].float())
    names = ("gradient of queries", "gradient of keys", "gradient of values")
    total = score.detach().logsumexp(-1)
    return {"output": out.detach(), "log-sum-exp": total, **dict(zip(names, got, strict=True))}


@torch.no_grad()
def _in_two_parts(
    kernel: Kernel, given: dict[str, Tensor], bias: Tensor, scale: float, first: int
) -> dict[str, Tensor]:
    """Return the same of a kernel, with the keys split after the first `first`."""
    query, grad = given["query"], given["gradient"]
    parts = [
        (given["key"][:, :, part], given["value"][:, :, part], bias[..., part])
        for part in (slice(first), slice(first, None))
    ]
    (one, one_total), (two, two_total) = (kernel.forward(query, *part, scale) for part in parts)
    out, total = joined(one, one_total, two, two_total)
    out = out.contiguous()  # callers do not keep the memory layout of the kernel
    got = [kernel.backward(grad, query, *part, out, total, scale) for part in parts]
    return {
        "output": out,
        "log-sum-exp": total,
        "gradient of queries": got[0][0].float() + got[1][0].float(),
        "gradient of keys": torch.cat([got[0][1], got[1][1]], 2),
        "gradient of values": torch.cat([got[0][2], got[1][2]], 2),
    }


def joined(one: Tensor, one_total: Tensor, two: Tensor, two_total: Tensor) -> tuple[Tensor, Tensor]:
    """Combine the outputs `[..., D]` and log-sum-exps `[...]` of two parts as under one softmax."""
    share = torch.sigmoid(two_total - one_total)[..., None].to(one.dtype)
    return torch.lerp(one, two, share), torch.logaddexp(two_total, one_total)
