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
    # Options of sbatch and srun
    "time": "launcher.time_limit_min", "ntasks_per_node": "launcher.ranks_per_node", "gres": "launcher.gpus_per_node",
    "gpus": "launcher.gpus_per_node", "cpus_per_task": "launcher.cpus_per_rank", "mem": "launcher.memory_gib",
    "container_image": "launcher.container", "container_mounts": "launcher.mounts",
}  # fmt: skip
"""The field by the last part of a name, in lower case with underscores."""

ABSENT = {
    "rampup_batch_size": "the batch size is constant: use batch.global_batch_size=N",
    "batch_size_rampup": "the batch size is constant: use batch.global_batch_size=N",
    "gradient_accumulation_steps": "it follows from batch.global_batch_size, batch.micro_batch_size and parallel.dp",
    "num_train_epochs": "the length of a run is train.tokens=N or train.steps=N",
    "epochs": "the length of a run is train.tokens=N or train.steps=N",
    "zero_stage": "parallel.distributed_optimizer=true shards the optimizer state (ZeRO-1)",
    "fp16": "use precision=fp16",
    "bf16": "use precision=bf16",
    "fp8": "use precision=fp8_block",
}
"""What to do where there is no such field, by the last part of a name."""
