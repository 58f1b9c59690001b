"""Stand-ins for `torch.cuda` where there is no GPU, so that Megatron-Core runs unchanged on the CPU or the meta device.

One function for each thing made possible. Each names the upstream code that needs it and when it can go. Apply them
through `parallel.runtime.patching.apply`, never one at a time.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch

from parallel.runtime.patching import Replace

_CONSTRUCTORS = ("tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn", "randint", "as_tensor")


def device_of_this_rank(device: torch.device, replace: Replace) -> None:
    """`device=torch.cuda.current_device()` puts tensors on `device`.

    Upstream: about 90 places, such as tensor_parallel/layers.py. Goes when Megatron-Core asks one function of its own
    for the device.
    """
    replace(torch.cuda, "current_device", lambda: device)


def constructors_with_literal_cuda(device: torch.device, replace: Replace) -> None:
    """`torch.zeros(..., device="cuda")` and its like put tensors on `device`.

    Upstream: pipeline_parallel/schedules.py, optimizer/{clip_grads,grad_scaler,optimizer}.py,
    transformer/moe/moe_utils.py.
    Goes when those use `torch.cuda.current_device()`.
    """

    def on_device(constructor: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def construct(*args: Any, **kwargs: Any) -> torch.Tensor:
            wanted = kwargs.get("device")
            if wanted is not None and str(wanted).startswith("cuda"):
                kwargs["device"] = device
            return constructor(*args, **kwargs)

        return construct

    for name in _CONSTRUCTORS:
        replace(torch, name, on_device(getattr(torch, name)))


def tensors_that_stay(device: torch.device, replace: Replace) -> None:
    """`tensor.cuda()` moves to `device`; `record_stream` does nothing.

    Upstream: models/common/embeddings/rope_utils.py, optimizer/grad_scaler.py, transformer/moe/moe_utils.py.
    Goes with `constructors_with_literal_cuda`.
    """
    replace(torch.Tensor, "cuda", lambda tensor, *_, **__: tensor.to(device))
    replace(torch.Tensor, "record_stream", lambda tensor, stream: None)


def pinned_memory_is_plain_memory(device: torch.device, replace: Replace) -> None:
    """`pin_memory=True` and `tensor.pin_memory()` give ordinary memory.

    Upstream: models/common/embeddings/rope_utils.py (context parallel), optimizer/distrib_optimizer.py.
    Goes when those ask whether there is a device to copy to.
    """
    wrapped = {name: getattr(torch, name) for name in ("tensor", "empty", "zeros")}

    def without_pinning(constructor: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def construct(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
            return constructor(*args, **kwargs)

        return construct

    for name, constructor in wrapped.items():
        replace(torch, name, without_pinning(constructor))
    replace(torch.Tensor, "pin_memory", lambda tensor, *_: tensor)


class _Stream:
    """A stream that has already finished everything."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, _: Any) -> None: ...

    def wait_event(self, _: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()


class _Event:
    """An event that has already happened."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def wait(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


def streams_that_do_nothing(device: torch.device, replace: Replace) -> None:
    """Streams, events and synchronisation do nothing: work on the CPU is done when the call returns.

    Upstream: distributed/param_and_grad_buffer.py, transformer/moe/token_dispatcher.py,
    pipeline_parallel/p2p_communication.py.
    Goes when Megatron-Core uses `torch.accelerator`.
    """
    the_stream = _Stream()

    @contextlib.contextmanager
    def stream_context(_: Any) -> Iterator[None]:
        yield

    replace(torch.cuda, "Stream", _Stream)
    replace(torch.cuda, "Event", _Event)
    replace(torch.cuda, "stream", stream_context)
    for name in ("current_stream", "default_stream"):
        replace(torch.cuda, name, lambda *_, **__: the_stream)
    for name in ("synchronize", "empty_cache"):
        replace(torch.cuda, name, lambda *_, **__: None)
    for name in ("range_push", "range_pop", "mark"):
        replace(torch.cuda.nvtx, name, lambda *_, **__: None)


def random_state_of_the_cpu(device: torch.device, replace: Replace) -> None:
    """The "CUDA" random state is that of the CPU generator.

    Upstream: tensor_parallel/random.py (RNG tracker, activation recomputation). Safe because weights are drawn by
    `moe_train.model.init`, layout by layout independent, and never from these states. Goes when the tracker
    takes a device.
    """
    from megatron.core.tensor_parallel import random as mcore_random

    def set_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
        torch.set_rng_state(state)

    # Upstream warns whenever the CPU state changes inside a "CUDA" one; here they are one and the same.
    logging.getLogger(mcore_random.__name__).setLevel(logging.ERROR)
    replace(mcore_random, "_get_cuda_rng_state", lambda *_, **__: torch.get_rng_state())
    replace(mcore_random, "_set_cuda_rng_state", set_state)
    replace(torch.cuda, "get_rng_state", lambda *_, **__: torch.get_rng_state())
    replace(torch.cuda, "set_rng_state", set_state)
    replace(torch.cuda, "manual_seed", torch.manual_seed)


class _TensorType(str):
    """Name of a tensor type that equals both "torch.FloatTensor" and "torch.cuda.FloatTensor"."""

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) or (
            isinstance(other, str) and str.__eq__(self, other.replace("torch.cuda.", "torch."))
        )

    __hash__ = str.__hash__


def tensor_types_without_cuda(device: torch.device, replace: Replace) -> None:
    """`param.type() == "torch.cuda.FloatTensor"` holds for a CPU parameter.

    Upstream: optimizer/{optimizer,distrib_optimizer,clip_grads}.py. Goes when those compare dtypes.
    """
    original = torch.Tensor.type

    def tensor_type(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(tensor, *args, **kwargs)
        return _TensorType(result) if isinstance(result, str) else result

    replace(torch.Tensor, "type", tensor_type)


PATCHES = (
    device_of_this_rank,
    constructors_with_literal_cuda,
    tensors_that_stay,
    pinned_memory_is_plain_memory,
    streams_that_do_nothing,
    random_state_of_the_cpu,
    tensor_types_without_cuda,
)
