"""Where the time of a training step goes, by part of the model: self time of operations under torch's profiler.

An operation belongs to the innermost of its parents that says so: a function (`FUNCTIONS`), a module (`_part`), the
optimizer. In the backward pass that is the part of the forward operation with the same sequence number. GEMMs outside
of attention and experts are GEMM, wherever they are. The parts of both sides have the same names, so that they can be
compared; what remains of the step's time is Python and waiting.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

GEMM, GROUPED, ATTENTION, NORM = "GEMM", "grouped GEMM", "attention", "norm"
ROUTER, ACTIVATION, LOSS, OPTIMIZER, OTHER = "router and dispatch", "SwiGLU", "loss", "optimizer", "other"
BETWEEN = "between operations"
PARTS = (GEMM, GROUPED, ATTENTION, NORM, ROUTER, ACTIVATION, LOSS, OPTIMIZER, OTHER, BETWEEN)
FUNCTIONS = {
    "GroupedLinear": GROUPED,
    "ShortAttention": ATTENTION,
    "WeightedSwiGLU": ACTIVATION,
    "_SwiGLU": ACTIVATION,
    "NormOnCPU": NORM,
    "CrossEntropy": LOSS,
    "Exchange": ROUTER,
    "_AllToAll": ROUTER,
    "aten::_grouped_mm": GROUPED,
    "aten::scaled_dot_product_attention": ATTENTION,
    "aten::cross_entropy_loss": LOSS,
    "Optimizer.step#AdamW.step": OPTIMIZER,
}
PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "mkldnn::_linear_pointwise"}
_DISPATCH = {
    "aten::index", "aten::index_select", "aten::index_add_", "aten::_index_put_impl_", "aten::gather",
    "aten::scatter_add_", "aten::sort",
}  # fmt: skip
"""What moves tokens to experts and back; transformers does it inside of the module that the activation is in."""
_UPDATE = ("prepare_grads", "get_grad_norm", "step_with_ready_grads")
"""Methods of Megatron-Core's optimizers that a step calls (`moe_train/optim/update.py`)."""
_MARK, _NODE = "part: ", "autograd::engine::evaluate_function: "


def profile(
    modules: Iterable[nn.Module], optimizer: Any, step: Callable[[], float], count: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(parts, operations) of one step, mean of `count`, most time first: calls, milliseconds, and the parts' shares.

    Args:
        modules: the models whose submodules name parts.
        optimizer: Megatron-Core's, whose methods are marked; None where torch's marks itself.
    """
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    _grow_heap()
    with _Marked(modules, optimizer), torch_profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        began = time.perf_counter()
        for _ in range(count):
            step()
        wall_us = (time.perf_counter() - began) * 1e6
    parts: dict[str, float] = defaultdict(float)
    operations, calls = Counter[str](), Counter[str]()
    events = [event for event in profiler.events() if event.self_cpu_time_total]
    scopes = _forward_scopes(profiler.events())
    for event in events:
        parts[part_of(event, scopes)] += event.self_cpu_time_total
        operations[event.name] += event.self_cpu_time_total
        calls[event.name] += 1
    parts[BETWEEN] = max(0, wall_us - sum(parts.values()))
    total = sum(parts.values())
    shares = [
        {"part": p, "ms": us / count / 1e3, "share": us / total}
        for p, us in sorted(parts.items(), key=lambda one: -one[1])
    ]
    names = [n for n, _ in operations.most_common() if not n.startswith(_MARK)]
    return shares, [{"operation": n, "calls": calls[n] / count, "ms": operations[n] / count / 1e3} for n in names]


def _grow_heap() -> None:
    """Touch as much memory again as this process has, or a quarter of what is free. The profiler keeps its events, so
    without this every step would take new pages from the kernel, at several microseconds each."""
    import psutil
    import torch

    torch.zeros(min(psutil.Process().memory_info().rss, psutil.virtual_memory().available // 4), dtype=torch.uint8)


def part_of(event: Any, scopes: dict[int, str]) -> str:
    """The part of one event of the profiler; `scopes` has those of forward operations by their sequence number."""
    part = _scope(event, scopes)
    if event.name in _DISPATCH and part == ACTIVATION:
        return ROUTER
    return GEMM if event.name in PRODUCTS and part not in (GROUPED, ATTENTION) else part


def _scope(event: Any, scopes: dict[int, str]) -> str:
    for parent in _upwards(event):
        name = parent.name
        if name.startswith(_MARK):
            return name.removeprefix(_MARK)
        if (part := FUNCTIONS.get(name.removesuffix("Backward"))) is not None:
            return part
        if name.startswith(_NODE):
            return scopes.get(parent.sequence_nr, OTHER)
    return OTHER


def _upwards(event: Any) -> Iterator[Any]:
    while event is not None:
        yield event
        event = event.cpu_parent


def _forward_scopes(events: Any) -> dict[int, str]:
    """Part of each forward operation that a node of the backward pass has the sequence number of."""
    scopes: dict[int, str] = {}
    for event in events:
        backward = any(parent.name.startswith(_NODE) for parent in _upwards(event))
        if event.sequence_nr >= 0 and not backward:
            scopes[event.sequence_nr] = _scope(event, {})
    return scopes


class _Marked:
    """While it is entered, the submodules of `modules` and the optimizer mark their part in the profile."""

    def __init__(self, modules: Iterable[nn.Module], optimizer: Any) -> None:
        self._modules, self._optimizer = list(modules), optimizer
        self._handles, self._open = list[Any](), list[Any]()

    def __enter__(self) -> None:
        for model in self._modules:
            for name, module in model.named_modules():
                if part := _part(name.rpartition(".")[2], module):
                    self._handles.append(module.register_forward_pre_hook(lambda *_, part=part: self._begin(part)))
                    self._handles.append(module.register_forward_hook(lambda *_: self._end()))
        for name in _UPDATE if self._optimizer is not None else ():
            setattr(self._optimizer, name, self._as_optimizer(getattr(self._optimizer, name)))

    def __exit__(self, *_: object) -> None:
        for name in _UPDATE if self._optimizer is not None else ():
            delattr(self._optimizer, name)  # the class's own again
        for handle in self._handles:
            handle.remove()

    def _as_optimizer(self, method: Callable[[], Any]) -> Callable[[], Any]:
        def marked() -> Any:
            self._begin(OPTIMIZER)
            try:
                return method()
            finally:
                self._end()

        return marked

    def _begin(self, part: str) -> None:
        from torch.profiler import record_function

        self._open.append(record_function(_MARK + part))
        self._open[-1].__enter__()

    def _end(self) -> None:
        self._open.pop().__exit__(None, None, None)


def _part(name: str, module: Any) -> str | None:
    """The part that a module of this name is, if any."""
    if hasattr(module, "token_dispatcher") or name == "gate" or type(module).__name__.endswith("MoE"):
        return ROUTER
    if name in ("mlp", "experts", "shared_experts"):
        return ACTIVATION
    if name == "core_attention":
        return ATTENTION
    return NORM if name.endswith("norm") else None
