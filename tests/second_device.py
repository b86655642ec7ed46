"""A simulated second device, to test code for GPUs on a machine without one.

A `Remote` tensor reports the device `cuda:0`, holds its values in a tensor on the CPU, and refuses
what a CUDA tensor refuses: operations with CPU tensors of one or more dimensions, `numpy()`, a
random generator of the CPU, a CPU tensor as the destination of an in-place operation. Inside
`second_device()`, `device="cuda"` in any call of torch makes such tensors, `torch.Generator` takes the
device, and `moved` moves a module.

    with second_device():
        out = moved(model)(remote(input_ids))
    assert_close(local(out.logits), expected)

The kernel for CUDA that the package calls is emulated with its requirements and the layout of its
outputs (`_efficient`). Not simulated: rounding, streams and asynchronous execution, autocast, other
kernels, and memory.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("cuda:0")
aten: Any = torch.ops.aten

COPIES = {"aten::_to_copy", "aten::to", "aten::copy_"}
"""Operations that move values between devices."""
INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}  # fmt: skip
"""Operations whose indices may be on the CPU."""
CPU_SCALARS = {"aten::where", "aten::masked_fill", "aten::masked_fill_", "aten::fill", "aten::fill_", "aten::full_like"}  # fmt: skip
"""Operations, besides the elementwise ones, that take CPU tensors without dimensions."""
NO_CPU_SCALARS = {"aten::lerp", "aten::lerp_", "aten::addcmul", "aten::addcdiv"}
"""Elementwise operations with several tensors, which on CUDA take no CPU tensor at all."""
MAKES = (torch.tensor, torch.as_tensor, torch.asarray)
"""Functions that read Python numbers, which the dispatcher does not see."""


class Remote(Tensor):
    """A tensor of the simulated device. `values` is the CPU tensor with its values."""

    values: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, values: Tensor) -> "Remote":
        # C++ code sees the device `meta`, because autograd needs one that this build of torch has.
        made = Tensor._make_wrapper_subclass(
            cls, values.size(), strides=values.stride(), storage_offset=values.storage_offset(),
            dtype=values.dtype, layout=values.layout, device=torch.device("meta"),
            requires_grad=values.requires_grad,
        )  # fmt: skip
        made.values = values.detach()
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return False

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, new: Tensor) -> None:
        assert isinstance(new, Remote), "the data of a tensor must stay on its device"
        Tensor.data.__set__(self, new)  # type: ignore[attr-defined]
        self.values = new.values

    def tolist(self) -> Any:
        return self.values.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def data_ptr(self) -> int:
        return self.values.data_ptr()

    def untyped_storage(self) -> Any:
        return self.values.untyped_storage()

    def pin_memory(self, *_: Any, **__: Any) -> Tensor:
        raise RuntimeError(
            "cannot pin 'torch.cuda.FloatTensor': only dense CPU tensors can be pinned"
        )

    def cpu(self, *_: Any, **__: Any) -> Tensor:  # type: ignore[override]
        return self.to(torch.device("cpu"))

    def cuda(self, *_: Any, **__: Any) -> Tensor:  # type: ignore[override]
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Remote":
        made = Remote(self.values.clone()).requires_grad_(self.requires_grad)
        if isinstance(self, nn.Parameter):
            made = nn.Parameter(made, requires_grad=self.requires_grad)
        memo[id(self)] = made
        return made  # type: ignore[return-value]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Remote({self.values!r})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})


def remote(value: Any) -> Any:
    """Return copies of tensors on the simulated device, in any container."""
    return tree_map(
        lambda one: Remote(one.clone()) if isinstance(one, Tensor) and not isinstance(one, Remote) else one, value
    )  # fmt: skip


def local(value: Any) -> Any:
    """Return the values of tensors of the simulated device as CPU tensors, in any container."""
    return tree_map(lambda one: one.values if isinstance(one, Remote) else one, value)


def moved(module: Any) -> Any:
    """Return a copy of a module on the simulated device. Tied weights stay tied."""
    module, done = copy.deepcopy(module), {}

    def there(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or isinstance(tensor, Remote):
            return tensor
        if id(tensor) not in done:
            made: Tensor = Remote(tensor.detach())
            if isinstance(tensor, nn.Parameter):
                made = nn.Parameter(made, requires_grad=tensor.requires_grad)
            done[id(tensor)] = (made, tensor)
        return done[id(tensor)][0]

    for part in module.modules():
        for name, one in part._parameters.items():
            part._parameters[name] = there(one)
        for name, one in part._buffers.items():
            part._buffers[name] = there(one)
    return module


def _is_there(device: Any) -> bool:
    return device is not None and torch.device(device).type in ("cuda", "meta")


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation on the values, after checking that a GPU would accept its arguments."""
    if func is aten._has_compatible_shallow_copy_type.default:  # `Module.to` asks
        return isinstance(args[0], Remote) == isinstance(args[1], Remote)
    _check(func, args, kwargs)
    flat = tree_flatten((args, kwargs))[0]
    there = any(isinstance(one, Remote) for one in flat)
    if kwargs.get("device") is not None:
        there = _is_there(kwargs["device"])
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if devices := [one for one in args if isinstance(one, torch.device)]:
        there = _is_there(devices[0])
        args = tuple(torch.device("cpu") if isinstance(one, torch.device) else one for one in args)
    if kwargs.get("pin_memory"):
        kwargs = {**kwargs, "pin_memory": False}
    emulated: Any = EMULATED.get(func, func)
    result = emulated(*tree_map(local, args), **tree_map(local, kwargs))
    if func is aten._local_scalar_dense.default:
        return result
    if (written := _written(func, args, kwargs)) is not None:
        return written
    if not there:
        return result
    return tree_map(lambda one: Remote(one) if isinstance(one, Tensor) else one, result)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the argument that an in-place operation or one with `out` returns, or None."""
    returned = [one.alias_info for one in func._schema.returns]
    if len(returned) != 1 or returned[0] is None or not returned[0].is_write:
        return None
    for at, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found = args[at] if at < len(args) else kwargs[argument.name]
            if isinstance(found, Remote) and found.shape != found.values.shape:
                raise NotImplementedError(f"{func} changes the shape of a tensor of this device")
            return found
    return None


def _check(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise RuntimeError where CUDA would, for tensors of two devices."""
    name, tensors = func._schema.name, _tensors((args, kwargs))
    there = [one for one in tensors if isinstance(one, Remote)]
    if not there or name in COPIES:
        return
    if name in INDEXED:  # (tensor, indices, values): a CPU tensor takes no index of a device
        tensors = [one for one in tensors if isinstance(one, Remote) or one.dim() > 0]
        indices = _tensors(args[1])
        if isinstance(args[0], Remote):
            tensors = [one for one in tensors if not any(one is index for index in indices)]
    elif name in CPU_SCALARS or (torch.Tag.pointwise in func.tags and name not in NO_CPU_SCALARS):
        written = args[:1] if name.endswith("_") else ()
        tensors = [one for one in tensors if one.dim() > 0 or any(one is each for each in written)]
    elsewhere = [tuple(one.shape) for one in tensors if not isinstance(one, Remote)]
    if elsewhere:
        raise RuntimeError(
            f"{name}: expected all tensors to be on the same device, but found at least two "
            f"devices: {[tuple(one.shape) for one in there]} on cuda:0, {elsewhere} on the CPU"
        )


def _tensors(value: Any) -> list[Tensor]:
    return [one for one in tree_flatten(value)[0] if isinstance(one, Tensor)]


class RemoteGenerator(torch.Generator):
    """A random generator of the simulated device. Its numbers are those of the CPU's."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE


_GENERATOR = torch.Generator


class _AnyGenerator:
    """Replaces the class `torch.Generator`, whose device would have to exist."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return RemoteGenerator() if torch.device(device).type == "cuda" else _GENERATOR(device)


class _Factories(TorchDispatchMode):
    """Creates tensors of the simulated device where C++ code asks for its device."""

    passes = False
    """Whether Python code asked for the real device `meta`, as transformers does to load models."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        flat = tree_flatten((args, kwargs))[0]
        if any(isinstance(one, Remote) for one in flat):
            return _run(func, args, kwargs)
        named = [kwargs.get("device"), *(one for one in args if isinstance(one, torch.device))]
        if not self.passes and any(one is not None and _is_there(one) for one in named):
            return _run(func, args, kwargs)
        return func(*args, **kwargs)


class _Calls(TorchFunctionMode):
    """Replaces the device `cuda` in calls of torch, and checks generators."""

    def __init__(self, factories: _Factories) -> None:
        super().__init__()
        self._factories = factories

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        asked = kwargs.get("device")
        there = asked is not None and torch.device(asked).type == "cuda"
        if (generator := kwargs.get("generator")) is not None:
            on_device = there if asked is not None else isinstance(args[0], Remote)
            if on_device != isinstance(generator, RemoteGenerator):
                raise RuntimeError(f"{func}: expected a generator of the device of the tensor")
        if func in MAKES:
            if isinstance(args[0], Remote):
                return args[0] if asked is None or there else args[0].to(asked)
            made = func(*args, **kwargs | ({"device": "cpu"} if there else {}))
            return Remote(made) if there else made
        if func is Tensor.new_tensor and isinstance(args[0], Remote):
            return Remote(torch.tensor(*args[1:], **{"dtype": args[0].dtype} | kwargs))
        if func is Tensor.cuda:
            return args[0].to(torch.device("meta"))
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], Remote):
            args = (args[0], _index(args[1]), *args[2:])
        if there:
            kwargs["device"] = torch.device("meta")
        if func is Tensor.to:
            args = tuple(torch.device("meta") if _names_cuda(one) else one for one in args)
        before = self._factories.passes
        self._factories.passes = asked is not None and torch.device(asked).type == "meta"
        try:
            return func(*args, **kwargs)
        finally:
            self._factories.passes = before


@contextmanager
def second_device() -> Iterator[None]:
    """Context manager in which the device `cuda` exists."""
    factories, run_backward = _Factories(), torch.autograd._engine_run_backward
    calls = _Calls(factories)

    def with_calls(*args: Any, **kwargs: Any) -> Any:
        with calls:  # torch leaves it before `backward`, which may create tensors
            return run_backward(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, factories, calls:
        patch.setattr(torch, "Generator", _AnyGenerator)
        patch.setattr(torch.autograd, "_engine_run_backward", with_calls)
        yield


def _names_cuda(value: Any) -> bool:
    return isinstance(value, str | torch.device) and str(value).split(":")[0] == "cuda"


def _index(index: Any) -> Any:
    """Return an index whose lists are tensors of the device; C++ code would not see their values."""
    if isinstance(index, tuple):
        return tuple(_index(one) if isinstance(one, list) else one for one in index)
    if isinstance(index, list):
        return Remote(torch.tensor(index, dtype=None if index else torch.long))
    return index


# --- the kernel for CUDA ----------------------------------------------------------------------------


def _efficient(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, compute_log_sumexp: bool,
    dropout_p: float = 0.0, is_causal: bool = False, *, scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`_scaled_dot_product_efficient_attention` from its definition, in float64."""
    assert not dropout_p and not is_causal and compute_log_sumexp
    score = _scores(query, key, bias, scale)
    total = score.logsumexp(-1)
    out = (score - total[..., None]).exp() @ value.double()
    padded = total.new_full((*total.shape[:2], 32 * math.ceil(total.shape[2] / 32)), math.inf)
    padded[..., : total.shape[2]] = total
    # The output has the memory layout [B, Q, H, D].
    out = out.to(query.dtype).transpose(1, 2).contiguous().transpose(1, 2)
    return out, padded.float(), torch.zeros((), dtype=torch.long), torch.zeros((), dtype=torch.long)


def _efficient_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, out: Tensor,
    logsumexp: Tensor, seed: Tensor, offset: Tensor, dropout_p: float, grad_input_mask: list[bool],
    is_causal: bool = False, *, scale: float | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Its gradients: weights from the given log-sum-exp, and their mean from the given output."""
    assert not dropout_p and not is_causal and grad_input_mask == [True, True, True, False]
    queries = query.shape[2]
    assert logsumexp.dtype == torch.float32 and logsumexp.is_contiguous()
    assert logsumexp.shape == (*query.shape[:2], 32 * math.ceil(queries / 32))
    assert bool((logsumexp[..., queries:] == math.inf).all()), "the kernel reads the padding"
    assert grad.dtype == out.dtype == query.dtype and grad.stride(-1) == out.stride(-1) == 1
    # The kernel takes the stride of the output's queries to be that of the layout [B, Q, H, D].
    assert queries == 1 or out.stride(2) == out.shape[1] * out.shape[3], "wrong numbers are read"
    weight = (_scores(query, key, bias, scale) - logsumexp[..., :queries, None].double()).exp()
    of_weight = grad.double() @ value.double().transpose(-1, -2)
    mean = (grad.double() * out.double()).sum(-1, keepdim=True)
    of_score = weight * (of_weight - mean) * _factor(query, scale)
    got = (of_score @ key.double(), of_score.transpose(-1, -2) @ query.double())
    got = (*got, weight.transpose(-1, -2) @ grad.double())
    return (*(one.to(query.dtype) for one in got), None)


def _scores(query: Tensor, key: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    """Return scores in float64, after the checks of the kernel."""
    batch, heads, queries, width = query.shape
    assert key.shape[:2] == (batch, heads) and key.shape[3] == width
    assert batch < 2**16 and heads < 2**16, "invalid configuration argument"
    aligned = 16 // query.dtype.itemsize
    for one in (query, key):
        assert one.dtype in (torch.float32, torch.bfloat16, torch.float16), one.dtype
        assert one.stride(-1) == 1 and width % aligned == 0, "misaligned address"
    score = query.double() @ key.double().transpose(-1, -2) * _factor(query, scale)
    if bias is None:
        return score
    assert bias.dtype == query.dtype and bias.shape == (batch, heads, queries, key.shape[2])
    assert bias.stride(-1) == 1 or bias.shape[-1] == 1
    assert all(one % aligned == 0 for one in bias.stride()[:3]), "misaligned address"
    assert bias.storage_offset() % aligned == 0, "misaligned address"
    return score + bias.double()


def _factor(query: Tensor, scale: float | None) -> float:
    return query.shape[-1] ** -0.5 if scale is None else scale


EMULATED: dict[Any, Callable[..., Any]] = {
    aten._scaled_dot_product_efficient_attention.default: _efficient,
    aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
}
