"""A worker of `selftaught.training.launch` in which accelerate takes two processes on CPUs for devices.

accelerate spreads a model over accelerators alone. Bent here: that there are some, which backend joins
them (gloo) and where they are (the CPU); and that gathered weights, which FSDP2 copies from a device
there, are waited for. What is trained, spread, gathered and saved is torch's FSDP2 or DeepSpeed's
ZeRO-3, transformers' Trainer and our code as they are.
"""

import os
import sys
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import DistributedType, PartialState
from torch.distributed._functional_collectives import AsyncCollectiveTensor


def backend(self: PartialState, *_: Any, **__: Any) -> tuple[str, DistributedType]:
    return "gloo", DistributedType.MULTI_GPU


def device(self: PartialState) -> None:
    self.device = torch.device("cpu")


def waited_for(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: waited_for(one) for key, one in value.items()}
    return value.wait() if isinstance(value, AsyncCollectiveTensor) else value


def state_dict(self: Accelerator, *args: Any, **options: Any) -> Any:
    found = gathered(self, *args, **options)
    sys.stdout.write(f"gathered from {self.distributed_type}\n")
    return waited_for(found)


PartialState._prepare_backend = backend  # type: ignore[method-assign]
PartialState.set_device = device  # type: ignore[method-assign]
gathered, Accelerator.get_state_dict = Accelerator.get_state_dict, state_dict  # type: ignore

if __name__ == "__main__":
    from selftaught.training import launch

    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        torch.accelerator.is_available = lambda: True  # else accelerate leaves DeepSpeed out
    else:
        torch.distributed.init_process_group("gloo")
    launch.main(sys.argv[1])
