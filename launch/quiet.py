"""Keeps notices that a user can do nothing about off the terminal. Errors are never touched."""

from __future__ import annotations

import logging
import os
import warnings

# Megatron-Core and torch warn once for each optional package that is absent, in every rank.
NOTICES = (
    r".*Transformer Engine and Apex are not installed.*",
    r".*Apex is not installed.*",
    r".*Transformer Engine is not installed.*",
    r".*The \.grad attribute of a Tensor that is not a leaf Tensor.*",
    r".*full scope is deprecated.*",
    r".*destroy_process_group\(\) was not called.*",
    r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed.*",  # it is only asked for
    r".*`torch\.jit\.script(_method)?` is deprecated.*",
    # megatron-core 0.19 imports its multi-modal models, which nothing here uses, with its GPT model.
    r"(MimoModelConfig|MimoModel|ModalitySubmodules) is experimental and still under active development.*",
)

# Log records by their logger, and how they begin. Other records of these loggers are shown.
RECORDS = {
    # megatron-core 0.19: the migration to HybridModel is ours to make, in moe_train/model/build.py.
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    # megatron-core 0.19: the layout that DDP computes itself is the one that we would pass.
    "megatron.core.distributed.distributed_data_parallel": "DistributedDataParallel: full_param_layout not provided",
    # torch: a machine with the CUDA toolkit and without a GPU.
    "torch.utils.cpp_extension": "No CUDA runtime is found",
}


class _Without(logging.Filter):
    """Drops the records that begin with `start`."""

    def __init__(self, start: str) -> None:
        super().__init__()
        self.start = start

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(self.start)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Without) and other.start == self.start

    def __hash__(self) -> int:
        return hash(self.start)


def silence() -> None:
    """Filter the notices of libraries in this process. Call it before they are imported."""
    # torch's C++ side warns about every retry of a socket while ranks are still starting.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for notice in NOTICES:
        warnings.filterwarnings("ignore", message=notice)
    for category in (DeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category, module=r"(torch|megatron)(\..*)?")
    for name, start in RECORDS.items():
        logging.getLogger(name).addFilter(_Without(start))  # which adds no second filter that is equal
