"""How a kernel is launched: on the device of its tensors, with one set of compiler options, without waiting for the device."""

from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .plan import LIMIT, Device

# Assumed where there is no device to ask: in Triton's interpreter, and when compiling for a device that is not here
ASSUMED = Device(processors=132, warp=32, clusters=True)


@cache
def _device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    clusters = torch.version.hip is None and properties.major >= 9
    return Device(int(properties.multi_processor_count), int(getattr(properties, "warp_size", 32)), clusters)


def device_of(tensor: Tensor) -> Device:
    """What the plans need to know about the tensor's device."""
    return _device(tensor.get_device()) if tensor.is_cuda else ASSUMED


def launch(kernel: Any, programs: int, num_warps: int, on: Tensor, *args: Any, **constants: Any) -> None:
    """Queue `programs` programs of the kernel on the device and current stream of `on`. Fused multiply-adds are asked for by name:
    Triton is about to turn them off by default, and the sums count on them for speed."""
    if programs == 0:
        return
    if programs >= LIMIT:
        raise RuntimeError(f"{programs} programs are more than a launch can have")
    with torch.cuda.device(on.device) if on.is_cuda else nullcontext():
        kernel[(programs,)](*args, **constants, num_warps=num_warps, enable_fp_fusion=True)
