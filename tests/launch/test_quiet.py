"""Notices of libraries that are kept off the terminal, and those that are not."""

from __future__ import annotations

import logging
import warnings

import pytest

from launch import quiet


@pytest.mark.parametrize(
    ("logger", "notice"),
    [
        ("megatron.core.models.gpt.gpt_model", "GPTModel IS DEPRECATED. GPTModel is only accepting critical bug fixes"),
        (
            "megatron.core.distributed.distributed_data_parallel",
            "DistributedDataParallel: full_param_layout not provided with use_distributed_optimizer=True. Auto",
        ),
        ("torch.utils.cpp_extension", "No CUDA runtime is found, using CUDA_HOME='%s'"),
    ],
)
def test_exactly_the_notice_is_dropped(logger: str, notice: str, caplog: pytest.LogCaptureFixture) -> None:
    quiet.silence()
    quiet.silence()
    log = logging.getLogger(logger)
    log.warning(notice, *["/usr/local/cuda"] * notice.count("%s"))
    log.warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]
    assert len(log.filters) == 1


def test_a_notice_of_models_that_are_not_used_is_dropped() -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.resetwarnings()
        quiet.silence()
        warnings.warn("MimoModelConfig is experimental and still under active development. The API may", stacklevel=1)
        warnings.warn("the experts are experimental", stacklevel=1)
    assert [str(one.message) for one in shown] == ["the experts are experimental"]
