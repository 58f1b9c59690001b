"""Process groups of a layout, through `megatron.core.parallel_state`."""

from __future__ import annotations

from megatron.core import parallel_state, tensor_parallel

from parallel.layout import ParallelLayout


def create(layout: ParallelLayout, seed: int) -> None:
    """Create every process group of `layout` and seed the random streams of this rank.

    `torch.distributed` must be initialised with `layout.world_size` ranks.
    """
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        create_gloo_process_groups=False,  # the default group already has gloo where the CPU needs it
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def destroy() -> None:
    """Forget every process group, so that another layout can be created in this process."""
    parallel_state.destroy_model_parallel()
