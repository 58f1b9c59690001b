"""Activations as DeepSeek-V3 keeps them (arXiv 2412.19437, sections 3.2.3 and 3.3.3). No torch import.

Its software keeps less than Transformer Engine does with the same recomputation: inputs of SwiGLU wait in FP8 and their
output is computed again; the output of attention waits once, in 12 bits, for attention and for the projection behind
it. Copies of the embedding that multi-token prediction reads are the main model's own.
"""

from __future__ import annotations

from parallel.planner.workload import Job

E5M6_BYTES = 12 / 8 + 4 / 128  # an element with its share of the scale of a 1x128 tile
E4M3_BYTES = 1 + 4 / 128


def compacted(job: Job, kept: dict[str, float]) -> dict[str, float]:
    """The tensors that a layer keeps, by name and bytes, with those that are kept smaller or not at all."""
    found = {}
    for name, size in kept.items():
        if name.endswith("down input in fp8") or name == "attention output in fp8":
            continue
        if name.endswith("gate and up"):
            size *= E4M3_BYTES / job.element
        elif name == "attention output":
            size *= E5M6_BYTES / job.element
        found[name] = size
    return found


def shared_embedding_bytes(job: Job) -> float:
    """Weights and gradients of the embedding's copy for multi-token prediction, on the rank of DualPipe that holds the
    first stage and the last."""
    if not job.compact or not any("m" in items for items in job.stages):
        return 0.0
    matrix = job.model.padded_vocab_size * job.model.hidden_size / job.layout.tp
    return (job.element + job.grad_bytes) * matrix
