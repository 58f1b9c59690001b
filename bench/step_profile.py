"""Where the time of our training step goes, by part of the model: self time of operations under torch's profiler.

An operation belongs to the innermost of its parents that says so: a function of ours (`FUNCTIONS`), a module (`_part`),
the optimizer. In the backward pass that is the part of the forward operation with the same sequence number. Products
of two matrices outside of attention and experts are GEMM, wherever they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

GEMM, GROUPED, ATTENTION, NORM = "GEMM", "grouped GEMM", "attention", "norm"
ROUTER, ACTIVATION, LOSS, OPTIMIZER, OTHER = "router and dispatch", "SwiGLU", "loss", "optimizer", "other"
PARTS = (GEMM, GROUPED, ATTENTION, NORM, ROUTER, ACTIVATION, LOSS, OPTIMIZER, OTHER)
FUNCTIONS = {
    "GroupedLinear": GROUPED,
    "ShortAttention": ATTENTION,
    "WeightedSwiGLU": ACTIVATION,
    "CrossEntropy": LOSS,
    "Exchange": ROUTER,
    "_AllToAll": ROUTER,
}
PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn::_linear_pointwise"}
_UPDATE = ("prepare_grads", "get_grad_norm", "step_with_ready_grads")
"""Methods of Megatron-Core's optimizers that a step calls (`moe_train/optim/update.py`)."""
_MARK, _NODE = "part: ", "autograd::engine::evaluate_function: "


def profile(run: Any, step: Callable[[], float], count: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(parts, operations) of one step, mean of `count`, most time first: calls, milliseconds, and the parts' shares."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    with _Marked(run), torch_profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        for _ in range(count):
            step()
    parts, operations, calls = Counter[str](), Counter[str](), Counter[str]()
    events = [event for event in profiler.events() if event.self_cpu_time_total]
    scopes = _forward_scopes(profiler.events())
    for event in events:
        parts[part_of(event, scopes)] += event.self_cpu_time_total
        operations[event.name] += event.self_cpu_time_total
        calls[event.name] += 1
    total = sum(parts.values())
    shares = [{"part": p, "ms": us / count / 1e3, "share": us / total} for p, us in parts.most_common()]
    names = [n for n, _ in operations.most_common() if not n.startswith(_MARK)]
    return shares, [{"operation": n, "calls": calls[n] / count, "ms": operations[n] / count / 1e3} for n in names]


def part_of(event: Any, scopes: dict[int, str]) -> str:
    """The part of one event of the profiler; `scopes` has those of forward operations by their sequence number."""
    part = _scope(event, scopes)
    return GEMM if event.name in PRODUCTS and part not in (GROUPED, ATTENTION) else part


def _scope(event: Any, scopes: dict[int, str]) -> str:
    for parent in _upwards(event):
        name = parent.name
        if name.startswith(_MARK):
            return name.removeprefix(_MARK)
        if (own := FUNCTIONS.get(name.removesuffix("Backward"))) is not None:
            return own
        if name.startswith(_NODE):
            return scopes.get(parent.sequence_nr, OTHER)
    return OTHER


def _upwards(event: Any) -> Iterator[Any]:
    while event is not None:
        yield event
        event = event.cpu_parent


def _forward_scopes(events: Any) -> dict[int, str]:
    """Part of each forward operation that a node of the backward pass has the sequence number of."""
    found: dict[int, str] = {}
    for event in events:
        backward = any(parent.name.startswith(_NODE) for parent in _upwards(event))
        if event.sequence_nr >= 0 and not backward:
            found[event.sequence_nr] = _scope(event, {})
    return found


class _Marked:
    """While it is entered, the model's modules and the optimizer mark their part in the profile."""

    def __init__(self, run: Any) -> None:
        self._run, self._handles, self._open = run, list[Any](), list[Any]()

    def __enter__(self) -> None:
        for chunk in self._run.chunks:
            for name, module in chunk.named_modules():
                if part := _part(name.rpartition(".")[2], module):
                    self._handles.append(module.register_forward_pre_hook(lambda *_, part=part: self._begin(part)))
                    self._handles.append(module.register_forward_hook(lambda *_: self._end()))
        for name in _UPDATE:
            setattr(self._run.optimizer, name, self._as_optimizer(getattr(self._run.optimizer, name)))

    def __exit__(self, *_: object) -> None:
        for name in _UPDATE:
            delattr(self._run.optimizer, name)  # the class's own again
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
    if hasattr(module, "token_dispatcher"):
        return ROUTER
    if name in ("mlp", "experts", "shared_experts"):
        return ACTIVATION
    if name == "core_attention":
        return ATTENTION
    return NORM if name.endswith("layernorm") else None
