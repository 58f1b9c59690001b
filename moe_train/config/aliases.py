"""Names that other trainers give to fields of this configuration, options that users of Slurm expect, and names of
earlier versions. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RENAMED = {
    "checkpoint.tries": "checkpoint.max_consecutive_failures",
    "launcher.meet_timeout_s": "launcher.rendezvous_timeout_s",
}
"""Fields that had another name in earlier versions. A run directory may still have the old one."""


def with_current_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """The nested `config` of an earlier version with its fields under their current names.

    Where both names are present, the value of the current one counts.
    """
    result = dict(config)
    for old, new in RENAMED.items():
        group, _, leaf = old.partition(".")
        if isinstance(result.get(group), Mapping) and leaf in result[group]:
            fields = dict(result[group])
            value = fields.pop(leaf)
            result[group] = {new.partition(".")[2]: value} | fields
    return result


FIELDS = {
    # Megatron-LM (arguments.py), Hugging Face Trainer, torchtitan, plain speech
    "learning_rate": "optimizer.lr", "max_lr": "optimizer.lr", "peak_lr": "optimizer.lr",
    "min_lr": "schedule.min_lr_ratio", "lr_decay_style": "schedule.decay", "lr_scheduler_type": "schedule.decay",
    "lr_warmup_iters": "schedule.warmup_steps", "lr_warmup_steps": "schedule.warmup_steps",
    "warmup": "schedule.warmup_steps", "warmup_iters": "schedule.warmup_steps",
    "lr_decay_iters": "schedule.decay_steps", "adam_beta1": "optimizer.beta1", "adam_beta2": "optimizer.beta2",
    "adam_eps": "optimizer.eps", "adam_epsilon": "optimizer.eps", "max_grad_norm": "optimizer.clip_grad",
    "grad_clip": "optimizer.clip_grad", "gradient_clipping": "optimizer.clip_grad",
    "train_iters": "train.steps", "max_steps": "train.steps", "num_steps": "train.steps", "iters": "train.steps",
    "iterations": "train.steps", "train_samples": "train.tokens", "train_tokens": "train.tokens",
    "max_tokens": "train.tokens", "num_tokens": "train.tokens",
    "seq_len": "train.seq_length", "sequence_length": "train.seq_length", "max_seq_length": "train.seq_length",
    "context_length": "train.seq_length", "block_size": "train.seq_length",
    "eval_interval": "train.eval_interval_steps", "eval_steps": "train.eval_interval_steps",
    "eval_iters": "train.eval_batches",
    "batch_size": "batch.global_batch_size", "gbs": "batch.global_batch_size", "mbs": "batch.micro_batch_size",
    "train_batch_size": "batch.global_batch_size", "per_device_train_batch_size": "batch.micro_batch_size",
    "train_micro_batch_size_per_gpu": "batch.micro_batch_size",
    "tensor_model_parallel_size": "parallel.tp", "tensor_parallel_size": "parallel.tp",
    "tensor_parallel": "parallel.tp", "pipeline_model_parallel_size": "parallel.pp",
    "pipeline_parallel_size": "parallel.pp", "pipeline_parallel": "parallel.pp",
    "virtual_pipeline_model_parallel_size": "parallel.vpp", "context_parallel_size": "parallel.cp",
    "context_parallel": "parallel.cp", "expert_model_parallel_size": "parallel.ep",
    "expert_parallel_size": "parallel.ep", "expert_parallel": "parallel.ep",
    "expert_tensor_parallel_size": "parallel.etp", "data_parallel_size": "parallel.dp", "data_parallel": "parallel.dp",
    "num_experts_per_tok": "model.topk", "moe_router_topk": "model.topk", "num_local_experts": "model.num_experts",
    "n_routed_experts": "model.num_experts", "n_shared_experts": "model.num_shared_experts",
    "num_hidden_layers": "model.num_layers", "n_layers": "model.num_layers", "num_heads": "model.num_attention_heads",
    "num_key_value_heads": "model.num_query_groups", "intermediate_size": "model.ffn_hidden_size",
    "moe_intermediate_size": "model.moe_ffn_hidden_size", "rms_norm_eps": "model.norm_epsilon",
    "rope_theta": "model.rope_base", "hidden_dim": "model.hidden_size", "d_model": "model.hidden_size",
    "save_interval": "checkpoint.interval_steps", "save_steps": "checkpoint.interval_steps",
    "save_total_limit": "checkpoint.keep_last", "save_dir": "checkpoint.dir", "save": "checkpoint.dir",
    "load": "resume", "resume_from_checkpoint": "resume", "finetune": "init_from", "pretrained_checkpoint": "init_from",
    "model_name_or_path": "init_from", "output_dir": "run_dir", "data_path": "data.path", "dataset": "data.path",
    "tokenizer_model": "data.tokenizer", "dtype": "precision.dtype", "log_interval": "telemetry.log_interval_steps",
    "logging_steps": "telemetry.log_interval_steps", "device": "runtime",
    # Further arguments of Megatron-LM: the rows of docs/megatron_lm.md
    "num_virtual_stages_per_pipeline_rank": "parallel.vpp", "num_layers_per_virtual_pipeline_stage": "parallel.vpp",
    "pipeline_model_parallel_layout": "parallel.pipeline_layout",
    "decoder_first_pipeline_num_layers": "parallel.pipeline_layout",
    "use_distributed_optimizer": "parallel.distributed_optimizer",
    "no_overlap_p2p_communication": "parallel.overlap_p2p", "overlap_p2p_communication": "parallel.overlap_p2p",
    "moe_token_dispatcher_type": "parallel.dispatcher", "moe_shared_expert_overlap": "parallel.shared_expert_overlap",
    "moe_router_num_groups": "model.router_num_groups", "moe_router_group_topk": "model.router_topk_groups",
    "moe_router_load_balancing_type": "model.balance_losses", "moe_aux_loss_coeff": "model.balance_loss_coeffs",
    "moe_z_loss_coeff": "model.z_loss_coeff", "moe_router_enable_expert_bias": "model.router_bias",
    "moe_router_bias_update_rate": "model.router_bias_update_rate",
    "moe_expert_capacity_factor": "model.capacity_factor",
    "moe_pad_expert_input_to_capacity": "model.pad_to_capacity", "moe_token_drop_policy": "model.token_drop_policy",
    "moe_grouped_gemm": "backend.grouped_gemm", "transformer_impl": "backend.name",
    "mtp_loss_scaling_factor": "model.mtp_loss_coeff", "fp8_recipe": "precision.fp8",
    "fp8_amax_history_len": "precision.amax_history_len",
    "recompute_granularity": "recompute.mode", "recompute_method": "recompute.method",
    "recompute_num_layers": "recompute.num_layers", "recompute_modules": "recompute.modules",
    "recompute_activations": "recompute.modules",
    "fine_grained_activation_offloading": "recompute.offload",
    "override_opt_param_scheduler": "schedule.on_resume", "use_checkpoint_opt_param_scheduler": "schedule.on_resume",
    "num_workers": "data.loader_workers", "reset_position_ids": "data.reset_at_eod",
    "reset_attention_mask": "data.reset_at_eod", "eod_mask_loss": "data.reset_at_eod",
    "async_save": "checkpoint.asynchronous", "non_persistent_local_ckpt_dir": "checkpoint.local_dir",
    "exit_duration_in_mins": "launcher.time_limit_min", "distributed_timeout_minutes": "launcher.timeout_s",
    "no_check_for_nan_in_loss_and_grad": "resilience.on_bad_step", "check_for_spiky_loss": "resilience.spike_factor",
    "log_straggler": "resilience.straggler_interval_steps", "tensorboard_dir": "telemetry.tensorboard",
    "log_throughput": "telemetry.peak_tflops", "use_pytorch_profiler": "telemetry.profile_memory_steps",
    "profile": "telemetry.profile_memory_steps", "deterministic_mode": "train.deterministic",
    # Options of sbatch and srun
    "time": "launcher.time_limit_min", "ntasks_per_node": "launcher.ranks_per_node", "gres": "launcher.gpus_per_node",
    "gpus": "launcher.gpus_per_node", "cpus_per_task": "launcher.cpus_per_rank", "mem": "launcher.memory_gib",
    "container_image": "launcher.container", "container_mounts": "launcher.mounts",
}  # fmt: skip
"""The field by the last part of a name, in lower case with underscores."""

ABSENT = {
    "rampup_batch_size": "a ramp is a schedule: use schedule.batch_size=[{shape:linear,start:8,until_tokens:1M},{}]",
    "batch_size_rampup": "a ramp is a schedule: use schedule.batch_size=[{shape:linear,start:8,until_tokens:1M},{}]",
    "gradient_accumulation_steps": "it follows from batch.global_batch_size, batch.micro_batch_size and parallel.dp",
    "estimate": "give plan.FIELD=VALUE to moe-plan or moe-submit on the command line",
    "num_train_epochs": "the length of a run is train.tokens=N or train.steps=N",
    "epochs": "the length of a run is train.tokens=N or train.steps=N",
    "zero_stage": "parallel.distributed_optimizer=true shards the optimizer state (ZeRO-1)",
    "fp16": "use precision=fp16",
    "bf16": "use precision=bf16",
    "fp8": "use precision=fp8_block",
    "ckpt_format": "checkpoints always have the format torch_dist, which loads on any layout",
    "use_dist_ckpt": "checkpoints always have the format torch_dist, which loads on any layout",
    "dist_ckpt_strictness": "checkpoints always have the format torch_dist, which loads on any layout",
    "exit_signal_handler": "SIGTERM and SIGUSR1 always save a checkpoint and end the run",
}
"""What to do where there is no such field, by the last part of a name."""
