"""Wrong configurations: each ends in one line that names the field, with exit code 2, and with values that do work."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from moe_train.config.composition.compose import compose, hydra_entry
from moe_train.config.composition.validate import validate
from moe_train.config.schema import Config
from moe_train.config.walk import all_fields, typed, with_values

MOE_TRAIN = Path(sys.executable).parent / "moe-train"


@dataclass
class Wrong:
    """A wrong command line.

    Args:
        overrides: the wrong ones.
        field: full name that the line must begin with.
        arithmetic: a part of the line that shows why.
        context: overrides that are right, and make the others wrong.
        replaces: the suggestion takes the place of the wrong overrides (unknown names, types, syntax).
        applies: the suggestion is a value; False where only the user knows one (a path).
        world_size: ranks that a launcher has started.
    """

    overrides: str
    field: str
    arithmetic: str = ""
    context: str = ""
    replaces: bool = False
    applies: bool = True
    world_size: int | None = None
    words: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.words = [*shlex.split(self.context), *shlex.split(self.overrides)]


# model=tiny: 4 layers (1 dense), 4 heads, mla, 16 experts in 4 groups (2 chosen), top 4, 1 shared, sigmoid with bias,
# 4096 words, multi-token prediction
GQA = "model.attention=gqa"
WIDE = "runtime=cuda model.qk_rope_head_dim=32"  # tiny, for blocks of 32
SOFTMAX = "model.router_score=softmax model.router_bias=false"
TABLE = [
    # Layout of ranks
    Wrong("parallel.tp=3", "parallel.tp", "model.num_attention_heads=4 (4 = 1 x 3 + 1)"),
    Wrong("parallel.tp=0", "parallel.tp", "smallest value 1"),
    Wrong("parallel.tp=8", "parallel.tp", "does not divide model.num_attention_heads=4"),
    Wrong("parallel.tp=2", "parallel.tp", "model.num_query_groups=3",
          f"{GQA} model.num_attention_heads=6 model.num_query_groups=3 model.head_dim=32"),
    Wrong("parallel.tp=2", "parallel.tp", "model.ffn_hidden_size=767", "model.ffn_hidden_size=767"),
    Wrong("parallel.tp=2", "parallel.tp", "model.q_lora_rank=33", "model.q_lora_rank=33 backend.name=local"),
    Wrong("parallel.tp=2", "parallel.tp", "63 + 16", "model.kv_lora_rank=63 backend.name=local"),
    Wrong("parallel.tp=3", "parallel.tp", "4096 rows",
          "model.num_attention_heads=6 model.q_lora_rank=0 model.kv_lora_rank=65 model.qk_rope_head_dim=16 "
          "model.ffn_hidden_size=768 model.moe_ffn_hidden_size=162"),
    Wrong("parallel.tp=2", "parallel.tp", "1 x 161", "model.moe_ffn_hidden_size=161"),
    Wrong("parallel.etp=2", "parallel.etp", "model.moe_ffn_hidden_size=161", "model.moe_ffn_hidden_size=161"),
    Wrong("parallel.ep=3", "parallel.ep", "model.num_experts=16 (16 = 5 x 3 + 1)"),
    Wrong("parallel.ep=4 parallel.dp=2", "parallel.ep", "1 x 4 x 1 = 4 does not divide the 2 ranks"),
    Wrong("parallel.ep=2", "parallel.ep", "model.num_experts=0 is a dense model", "model=llama3_8b"),
    Wrong("parallel.etp=2", "parallel.etp", "model.num_experts=0 is a dense model", "model=llama3_8b"),
    Wrong("parallel.tp=2 parallel.dp=2", "parallel.dp", "2 x 1 x 1 x 2 = 4, but there are 8 ranks", world_size=8),
    Wrong("parallel.tp=2 parallel.pp=2", "parallel.tp x pp x cp", "= 4 does not divide the 6 ranks", world_size=6),
    # Pipeline
    Wrong("parallel.pp=8", "model.num_layers", "8 - 2 = 6 layers"),
    Wrong("parallel.pp=4 parallel.vpp=2", "model.num_layers", "4 x 2 = 8 stages"),
    Wrong("parallel.vpp=2", "parallel.vpp", "parallel.pp=1"),
    Wrong("parallel.overlap_p2p=true", "parallel.overlap_p2p", "parallel.vpp=1", "parallel.pp=2"),
    Wrong("parallel.overlap_p2p=false", "parallel.overlap_p2p", "gradients come out wrong",
          "parallel.pp=2 parallel.vpp=2"),
    Wrong("parallel.pipeline_layout='Et*3|tL'", "parallel.pipeline_layout", "has 2 stages", "parallel.pp=4"),
    Wrong("parallel.pipeline_layout='Et*3|t*2mL'", "parallel.pipeline_layout", "has 5 transformer layers",
          "parallel.pp=2 model.mtp_num_layers=1"),
    Wrong("parallel.pipeline_layout='Et*4m|L'", "parallel.pipeline_layout", "on the last stage",
          "parallel.pp=2 model.mtp_num_layers=1"),
    Wrong("parallel.pipeline_layout='Et*2|ttm'", "parallel.pipeline_layout", "end with the loss",
          "parallel.pp=2 model.mtp_num_layers=1"),
    # Slips of the finger
    Wrong("model.num_layers=999999999999", "model.num_layers", "above the largest value 10000"),
    Wrong("model.num_layers=99999999", "model.num_layers", "above the largest value 10000"),
    Wrong("model.num_experts=1000000", "model.num_experts", "above the largest value 100000"),
    Wrong("model.mtp_num_layers=101", "model.mtp_num_layers", "above the largest value 100"),
    Wrong("parallel.tp=1000000000", "parallel.tp", "above the largest value 1000000"),
    Wrong("batch.global_batch_size=1000000000000000000", "batch.global_batch_size", "above the largest value"),
    # Batch and sequence
    Wrong("batch.global_batch_size=7", "batch.global_batch_size", "7 = 3 x 2 + 1", "parallel.dp=2"),
    Wrong("batch.micro_batch_size=3", "batch.global_batch_size", "3 x 1 = 3"),
    Wrong("batch.global_batch_size=6", "batch.global_batch_size", "not a multiple of parallel.pp=4",
          "parallel.pp=4 parallel.vpp=2 model.num_layers=8"),
    Wrong("train.seq_length=129", "train.seq_length", "129 = 64 x 2 + 1", "parallel.tp=2"),
    Wrong("train.seq_length=130", "train.seq_length", "4 zig-zag slices", "parallel.cp=2"),
    Wrong("train.seq_length=132", "train.seq_length", "parallel.tp x cp = 4 x 2 = 8", "parallel.cp=2 parallel.tp=4"),
    Wrong("train.seq_length=100000", "train.seq_length", "exceeds model.max_position_embeddings"),
    Wrong("train.seq_length=2", "train.seq_length", "model.mtp_num_layers=2", "model.mtp_num_layers=2"),
    Wrong("parallel.sequence_parallel=true", "parallel.sequence_parallel", "parallel.tp=1"),
    Wrong("parallel.sequence_parallel=false", "parallel.sequence_parallel", "experts and parallel.tp=2",
          "parallel.tp=2"),
    # Attention
    Wrong("model.qk_rope_head_dim=15", "model.qk_rope_head_dim", "odd"),
    Wrong("model.qk_norm=head", "model.qk_norm", "model.attention=gqa"),
    Wrong("model.num_attention_heads=5", "model.num_attention_heads", "256 = 51 x 5 + 1", GQA),
    Wrong("model.num_query_groups=3", "model.num_query_groups", "4 = 1 x 3 + 1", GQA),
    Wrong("model.head_dim=33", "model.head_dim", "pairs", GQA),
    Wrong("model.yarn_factor=0.5", "model.yarn_factor", "below 1"),
    Wrong("model.yarn_beta_fast=0.5", "model.yarn_beta_fast", "below model.yarn_beta_slow=1.0"),
    Wrong("model.init_std=0", "model.init_std", "above 0"),
    Wrong("model.rope_type=alibi", "model.rope_type", "rope, yarn"),
    Wrong("model.rope_type=llama3", "model.rope_type", "model.attention=gqa"),
    Wrong("model.llama3_factor=0.5", "model.llama3_factor", "below 1"),
    Wrong("model.rotary_percent=0.5", "model.rotary_percent", "model.qk_rope_head_dim=16"),
    Wrong("model.rotary_percent=1.5", "model.rotary_percent", "not in (0, 1]", GQA),
    Wrong("model.rotary_percent=0.05", "model.rotary_percent", "of a head of 64 is 3 dimensions", GQA),
    Wrong("model.qkv_bias=true", "model.qkv_bias", "model.attention=gqa"),
    Wrong("model.latent_norm_epsilon=0", "model.latent_norm_epsilon", "above 0"),
    Wrong("model.latent_norm_epsilon=1e-6", "model.latent_norm_epsilon", "model.attention=mla", GQA),
    # Experts and router
    Wrong("model.topk=17", "model.topk", "exceeds model.num_experts=16"),
    Wrong("model.topk=1", "model.topk", "no gradient",
          f"{SOFTMAX} model.router_num_groups=0 model.router_topk_groups=0"),
    Wrong("model.num_dense_layers=4", "model.num_dense_layers", "leaves no layer"),
    Wrong("model.router_num_groups=3", "model.router_num_groups", "16 = 5 x 3 + 1"),
    Wrong("model.router_topk_groups=5", "model.router_topk_groups", "exceeds model.router_num_groups=4"),
    Wrong("model.router_topk_groups=0", "model.router_num_groups", "takes both"),
    Wrong("model.router_num_groups=0", "model.router_topk_groups", "takes both"),
    Wrong("model.topk=3", "model.topk", "not a multiple of model.router_topk_groups=2"),
    Wrong("model.topk=12", "model.topk", "12 / 2 = 6 experts"),
    Wrong("model.topk=9", "model.topk", "2 x 4 = 8 experts", "model.router_group_score=max"),
    Wrong("model.router_group_score=best", "model.router_group_score", "sum, max"),
    Wrong("model.shared_expert_gate=true", "model.shared_expert_gate", "num_shared_experts=0",
          "model.num_shared_experts=0"),
    Wrong("model.shared_expert_ffn_hidden_size=64", "model.shared_expert_ffn_hidden_size", "num_experts=0",
          "model.num_experts=0 model.router_bias=false"),
    Wrong("model.shared_expert_ffn_hidden_size=65", "parallel.tp", "65 = 32 x 2 + 1", "parallel.tp=2"),
    Wrong("model.router_score=softmax", "model.router_bias", "needs model.router_score=sigmoid"),
    Wrong("model.pad_to_capacity=true", "model.pad_to_capacity", "model.capacity_factor=null"),
    Wrong("model.capacity_factor=-1", "model.capacity_factor", "no tokens"),
    Wrong("model.balance_losses=[aux_loss,seq_aux_loss] model.balance_loss_coeffs=[0.1]",
          "model.balance_loss_coeffs", "has 1 entries"),
    Wrong("model.balance_losses=[aux_loss,aux_loss] model.balance_loss_coeffs=[0.1,0.1]",
          "model.balance_losses", "twice"),
    Wrong("model.balance_losses=[sinkhorn] model.balance_loss_coeffs=[0.1]",
          "model.balance_losses", "aux_loss, seq_aux_loss"),
    # Dispatch, overlap, backend, runtime
    Wrong("parallel.dispatcher=flex", "parallel.dispatcher", "needs GPUs", "parallel.ep=2 runtime=cpu"),
    Wrong("parallel.dispatcher=flex", "parallel.dispatcher", "parallel.ep x etp = 1 x 1", "runtime=cuda"),
    Wrong("parallel.dispatcher=flex", "parallel.dispatcher", "pad_to_capacity",
          "runtime=cuda parallel.ep=2 model.capacity_factor=2 model.pad_to_capacity=true"),
    Wrong("parallel.dispatcher=ring", "parallel.dispatcher", "alltoall, allgather, flex"),
    Wrong("model.tie_embeddings=true", "model.tie_embeddings", "use model.tie_embeddings=false", "parallel.pp=2"),
    Wrong("parallel.shared_expert_overlap=true", "parallel.shared_expert_overlap", "num_shared_experts=0",
          "model.num_shared_experts=0"),
    Wrong("parallel.shared_expert_overlap=true", "parallel.shared_expert_overlap", "alltoall",
          "runtime=cuda parallel.dispatcher=allgather"),
    Wrong("parallel.shared_expert_overlap=true", "parallel.shared_expert_overlap", "runtime=cpu", "runtime=cpu"),
    Wrong("parallel.overlap_param_gather=true", "parallel.overlap_param_gather", "overlap_grad_reduce"),
    Wrong("parallel.overlap_param_gather=true", "parallel.overlap_param_gather", "distributed_optimizer",
          "parallel.distributed_optimizer=false parallel.overlap_grad_reduce=true"),
    Wrong("backend.name=te", "backend.name", "needs runtime=cuda", "runtime=cpu"),
    Wrong("backend.apex=true", "backend.apex", "needs runtime=cuda", "runtime=simulated"),
    Wrong("runtime=gpu", "runtime", "auto, cuda, cpu, simulated"),
    Wrong("rank=4", "rank", "0 .. 3", "runtime=simulated parallel=tp2_pp2_ep2"),
    Wrong("rank=5", "rank", "0 .. 0; use rank=0", "runtime=simulated"),
    Wrong("rank=1", "rank", "runtime=simulated", "runtime=cpu parallel.dp=2"),
    Wrong("data.reset_at_eod=true", "data.reset_at_eod", "parallel.cp=2", "parallel.cp=2"),
    Wrong("data.reset_at_eod=true", "data.reset_at_eod", "batch.micro_batch_size=1", "batch.micro_batch_size=2"),
    # Recomputation
    Wrong("recompute.mode=some", "recompute.mode", "none, full, selective"),
    Wrong("recompute.mode=selective", "recompute.mode", "use recompute.modules=[layernorm]"),
    Wrong("recompute.modules=[norm]", "recompute.modules", "core_attn, mla_up_proj, layernorm", "recompute=selective"),
    Wrong("recompute.modules=[mlp]", "recompute.modules", "use recompute.mode=selective"),
    Wrong("recompute.modules=[mlp]", "recompute.modules", "not used with recompute.mode=full", "recompute=full"),
    Wrong("recompute.modules=[mlp,mlp]", "recompute.modules", "twice", "recompute=selective"),
    Wrong("recompute.modules=[mla_up_proj]", "recompute.modules", "model.attention=gqa", f"recompute=selective {GQA}"),
    Wrong("recompute.modules=[moe,layernorm]", "recompute.modules", "model.num_experts=0 is a dense model",
          "recompute=selective model=llama3_8b data.tokenizer_vocab_size=512"),
    Wrong("'recompute.stages=[{mode:full},{mode:none},{mode:none}]'", "recompute.stages",
          "3 entries, but not one for each of the 2 stages of parallel.pp=2; use "
          "'recompute.stages=[{mode:full},{mode:none}]'", "parallel.pp=2"),
    Wrong("'recompute.stages=[{mode:full}]'", "recompute.stages", "the 2 stages or 4 chunks of parallel.pp=2; use "
          "'recompute.stages=[{mode:full},{mode:full}]'", "parallel.pp=2 parallel.vpp=2 model.mtp_num_layers=0"),
    Wrong("'recompute.stages=[{mode:none},{modules:[norm,mlp]}]'", "recompute.stages[1].modules=norm",
          "is not one of core_attn, mla_up_proj, ", "parallel.pp=2"),
    Wrong("'recompute.stages=[{mode:full,modules:[mlp]},{mode:none}]'", "recompute.stages[0]={mode:full,modules:[mlp]}",
          "has modules, which mode=full does not use; use 'recompute.stages=[{modules:[mlp]},{mode:none}]'",
          "parallel.pp=2"),
    Wrong("'recompute.stages=[{mode:selective}]'", "recompute.stages[0]={mode:selective}", "has no modules"),
    Wrong("'recompute.stages=[{modules:[mlp,mlp]}]'", "recompute.stages[0]={modules:[mlp,mlp]}", "twice"),
    Wrong("'recompute.stages=[{modules:[mla_up_proj,mlp]},{mode:none}]'", "recompute.stages[0]", "model.attention=gqa",
          f"parallel.pp=2 {GQA}"),
    Wrong("'recompute.stages=[{mode:none},{mode:none}]'", "recompute.stages", "replaces recompute.mode=full; use "
          "recompute.mode=none", "parallel.pp=2 recompute=full"),
    Wrong("'recompute.stages=[{mode:none},{mode:full}]' recompute.method=block recompute.num_layers=3",
          "recompute.num_layers", "2 layers of the longest pipeline chunk", "parallel.pp=2 model.mtp_num_layers=0"),
    Wrong("'recompute.stages=[{mode:full},{mode:none}]'", "recompute.stages", "hold none; use recompute.stages=[]",
          "parallel.pp=2 parallel.pipeline_layout='E|ttttmL'"),
    Wrong("'recompute.stages=[{mode:none},{mode:full}]'", "recompute.offload", "full recomputation does not keep",
          "parallel.pp=2 runtime=cuda precision=bf16 recompute.offload=memory recompute.offload_modules=[attn_norm]"),
    Wrong("'recompute.stages=[{mode:none},{modules:[moe]}]'", "recompute.offload_modules",
          "recomputing moe does not keep its input",
          "parallel.pp=2 runtime=cuda precision=bf16 recompute.offload=memory recompute.offload_modules=[expert_fc1]"),
    Wrong("recompute.offload=disk", "recompute.offload", "none, memory, file"),
    Wrong("recompute.offload=memory", "recompute.offload", "needs recompute.offload_modules; use "
          "recompute.offload_modules=[core_attn,attn_proj]", "runtime=cuda precision=bf16"),
    Wrong("recompute.offload=file recompute.offload_modules=[core_attn]", "recompute.offload",
          "host's memory; use recompute.offload=memory", "runtime=cuda precision=bf16"),
    Wrong("recompute.offload=file", "recompute.offload", "on runtime=cpu only", "runtime=cuda backend.name=local"),
    Wrong("recompute.offload_modules=[attn_norm]", "recompute.offload_modules", "not used with recompute.offload=file "
          "on backend.name=local", "runtime=cpu recompute.offload=file"),
    Wrong("recompute.offload_modules=[attn_norm]", "recompute.offload_modules", "not used with recompute.offload=none"),
    Wrong("recompute.offload=memory recompute.offload_modules=[attn_proj]",
          "recompute.offload_modules", "use recompute.offload_modules="
          "[core_attn,attn_proj]", "runtime=cuda precision=bf16"),
    Wrong("recompute.offload=memory recompute.offload_modules=[attn_norm,moe_act]",
          "recompute.offload_modules", "only grouped experts",
          "runtime=cuda precision=bf16 backend.grouped_gemm=false"),
    Wrong("recompute.offload=memory recompute.offload_modules=[expert_fc1]",
          "recompute.offload_modules", "does not keep its input",
          "runtime=cuda precision=bf16 recompute=selective recompute.modules=[moe]"),
    Wrong("recompute.offload=memory recompute.offload_modules=[expert_fc1]",
          "recompute.offload_modules", "model.num_experts=0 is a dense model",
          "runtime=cuda precision=bf16 model=llama3_8b data.tokenizer_vocab_size=512"),
    Wrong("recompute.offload=memory recompute.offload_modules=[attn_norm]", "recompute.offload",
          "which full recomputation does not keep", "runtime=cuda precision=bf16 recompute=full"),
    Wrong("recompute.offload=memory recompute.offload_modules=[core_attn,attn_norm]", "recompute.offload_modules",
          "use recompute.offload_modules=[core_attn]", f"runtime=cuda precision=bf16 {GQA}"),
    Wrong("recompute.offload=memory recompute.offload_modules=[core_attn,mlp_norm]", "recompute.offload_modules",
          "part of the linear layer", "runtime=cuda precision=bf16 model=llama3_8b data.tokenizer_vocab_size=512"),
    Wrong("recompute.mode=selective recompute.modules=[layernorm]", "recompute.modules",
          "the norms of this model are part of the linear layers",
          "runtime=cuda precision=bf16 model=llama3_8b data.tokenizer_vocab_size=512"),
    Wrong("precision.power_of_two_scales=true", "precision.power_of_two_scales", "no effect without precision.fp8",
          "precision=bf16"),
    Wrong("precision.fp8_format=hybrid", "precision.fp8_format", "no effect without precision.fp8", "precision=bf16"),
    Wrong("precision.amax_history_len=16", "precision.amax_history_len", "use precision.amax_history_len=1024",
          "precision=fp8_tensor"),
    Wrong("precision.num_layers_at_end_in_bf16=2", "precision.num_layers_at_end_in_bf16", "first_last_layers_bf16=true",
          "precision=fp8_block"),
    Wrong("precision.initial_loss_scale=1024", "precision.initial_loss_scale", "precision.dtype=fp16",
          "precision=bf16"),
    Wrong("recompute.num_layers=2", "recompute.num_layers", "no effect without recompute.mode=full"),
    Wrong("recompute.offload_min_bytes=4096", "recompute.offload_min_bytes", "no effect without recompute.offload"),
    Wrong("recompute.offload_min_bytes=0", "recompute.offload_min_bytes", "1", "runtime=cpu recompute.offload=file"),
    Wrong("recompute.modules=[shared_experts]", "recompute.modules", "model.num_shared_experts=0",
          "recompute=selective model.num_shared_experts=0"),
    Wrong("recompute.modules=[mlp]", "recompute.modules", "no layer has a dense feed-forward",
          "recompute=selective model.num_dense_layers=0"),
    Wrong("recompute.modules=[shared_experts]", "recompute.modules", "use parallel.shared_expert_overlap=false",
          "recompute=selective runtime=cuda parallel.shared_expert_overlap=true"),
    Wrong("recompute.modules=[layernorm,moe_act]", "recompute.modules",
          "use backend.grouped_gemm=true or recompute.modules=[layernorm]",
          "recompute=selective runtime=cpu backend.grouped_gemm=false"),
    Wrong("precision.fp8=delayed", "recompute.modules", "use precision.fp8=tensor",
          "recompute=selective precision=bf16 runtime=cuda checkpoint.save_at_end=false"),
    Wrong("recompute.num_layers=0", "recompute.num_layers", "smallest value 1", "recompute=full"),
    Wrong("recompute.num_layers=2", "recompute.num_layers", "a group of its own", "recompute=full"),
    Wrong("recompute.num_layers=3", "recompute.num_layers", "4 = 1 x 3 + 1", "recompute=full model.mtp_num_layers=0"),
    Wrong("recompute.num_layers=5", "recompute.num_layers", "exceeds the 4 layers",
          "recompute=full recompute.method=block"),
    # Length, schedule, numbers
    Wrong("train.steps=10 train.tokens=1000", "train.steps", "train.tokens=1000", "schedule.warmup_steps=0"),
    Wrong("train.steps=10 schedule.warmup_steps=20", "schedule.warmup_steps", "the run's 10 steps"),
    Wrong("train.steps=5 schedule.warmup_steps=20", "schedule.warmup_steps",
          "use schedule.warmup_steps=0 or train.steps=20"),
    Wrong("schedule.decay_steps=10 schedule.warmup_steps=20", "schedule.warmup_steps", "schedule.decay_steps=10"),
    Wrong("schedule.min_lr_ratio=2", "schedule.min_lr_ratio", "above the peak"),
    # Schedules
    Wrong("schedule.lr=[{until_tokens:50000}]", "schedule.lr[0]", "ends at 50,000 tokens, but the run has 204,800"),
    Wrong("schedule.lr=[{until_steps:100},{shape:cosine,until_steps:90},{}]", "schedule.lr[1]",
          "ends at 92,160 tokens, not after 102,400"),
    Wrong("schedule.lr=[{until_steps:10},{}]", "schedule.lr[0]", "before the warm-up of schedule.warmup_steps ends"),
    Wrong("schedule.lr=[{},{shape:cosine}]", "schedule.lr[0]", "has no end, so that nothing says where"),
    Wrong("schedule.lr=[{until_steps:50,until_tokens:50000},{}]", "schedule.lr[0]", "two ends: until_tokens=50000"),
    Wrong("schedule.lr=[{shape:1-sqrt,value:0,ratio:0}]", "schedule.lr[0]", "value=0 and ratio=0"),
    Wrong("schedule.lr=[{shape:exponential,value:0}]", "schedule.lr[0]", "from 0.001 to 0"),
    Wrong("schedule.lr=[{shape:power}]", "schedule.lr[0]", "from token 0 on", "schedule.warmup_steps=0"),
    Wrong("schedule.lr=[{shape:power,exponent:1}]", "schedule.lr[0]", "exponent=1, which is not below 0"),
    Wrong("schedule.lr=[{shape:cosine,exponent:1}]", "schedule.lr[0]", "which cosine does not have"),
    Wrong("schedule.lr=[{shape:square}]", "schedule.lr[0].shape", "constant, linear, cosine, 1-sqrt"),
    Wrong("schedule.lr=[{until_fraction:1.5},{}]", "schedule.lr[0].until_fraction", "above the largest value 1"),
    Wrong("schedule.decay=linear", "schedule.decay", "no effect with the segments of schedule.lr", "schedule=wsd"),
    Wrong("schedule.batch_size=[{shape:linear,start:6,until_tokens:20000,value:8},{}]", "schedule.batch_size",
          "passes 6 sequences, which is not a multiple of batch.micro_batch_size x parallel.dp = 1 x 4 = 4",
          "parallel.dp=4"),
    Wrong("schedule.batch_size=[{shape:linear,start:4,until_tokens:20000,value:12},{}]", "schedule.batch_size",
          "passes 4 sequences, which makes 4 / (batch.micro_batch_size x parallel.dp = 1 x 2 = 2) = 2 micro-batches",
          "parallel.dp=2 parallel.pp=4 parallel.vpp=2 model.num_layers=8 model.mtp_num_layers=0 "
          "batch.global_batch_size=8"),
    Wrong("schedule.batch_size=[{shape:linear,start:8,until_tokens:20000,value:32},{}]", "schedule.batch_size",
          "ends with 32 sequences, but batch.global_batch_size=8"),
    Wrong("schedule.batch_size=[{until_steps:4,value:4},{}]", "schedule.batch_size[0]", "follow from batch sizes"),
    Wrong("schedule.batch_size=[{shape:linear,start:4}]", "schedule.batch_size[0]", "has no end"),
    Wrong("schedule.batch_size=[{value:2.5,until_tokens:9000},{value:8}]", "schedule.batch_size", "2.5 sequences"),
    Wrong("schedule.batch_size=[{value:4,until_tokens:9000},{value:8}] schedule.batch_size_multiple=3",
          "schedule.batch_size", "ends with 6 sequences"),
    Wrong("schedule.batch_size_multiple=9", "schedule.batch_size_multiple", "4 sequences are fewer than 9",
          "'schedule.batch_size=[{value:4,until_tokens:9000},{value:8}]'"),
    Wrong("schedule.mtp_loss_coeff=[{value:0.1}]", "schedule.mtp_loss_coeff", "model.mtp_num_layers=0",
          "model.mtp_num_layers=0"),
    Wrong("schedule.plateau_patience=2", "schedule.plateau_patience", "train.eval_batches=0", "train.eval_batches=0"),
    Wrong("schedule.plateau_factor=1", "schedule.plateau_factor", "not below 1", "schedule.plateau_patience=2"),
    Wrong("schedule.rewarm_max=1", "schedule.rewarm_max", "no effect without schedule.rewarm_steps"),
    Wrong("optimizer.beta2=1", "optimizer.beta2", "[0, 1)"),
    Wrong("'optimizer.groups=[{match:*.ruter.weight}]'", "optimizer.groups[0].match",
          "matches no parameter of the model; close names: *.mlp.router.weight"),
    Wrong("'optimizer.groups=[{match:*.mlp.*},{match:*.router.weight}]'", "optimizer.groups[1].match",
          "earlier entries match"),
    Wrong("'optimizer.groups=[{match:decoder.*,lr_multiplier:-1}]'", "optimizer.groups[0].lr_multiplier",
          "smallest value 0"),
    Wrong("'optimizer.groups=[{match:decoder.*,weight_decay:0.1}]'", "optimizer.groups[0].weight_decay",
          "needs optimizer.weight_decay above 0", "optimizer.weight_decay=0"),
    Wrong("optimizer.qk_clip_threshold=0", "optimizer.qk_clip_threshold", "above 0"),
    Wrong("optimizer.qk_clip_alpha=2", "optimizer.qk_clip_alpha", "above 1", "optimizer.qk_clip_threshold=100"),
    Wrong("optimizer.qk_clip_alpha=0.3", "optimizer.qk_clip_alpha", "without optimizer.qk_clip_threshold"),
    Wrong("optimizer.qk_clip_threshold=100", "optimizer.qk_clip_threshold", "model.qk_norm=head",
          f"{GQA} model.qk_norm=head"),
    Wrong("optimizer.qk_clip_threshold=100", "optimizer.qk_clip_threshold", "fp8_param_gather=true",
          "precision=fp8_block runtime=cuda precision.fp8_param_gather=true"),
    Wrong("optimizer.qk_clip_threshold=100", "optimizer.qk_clip_threshold", "precision.moments_dtype=bf16",
          "precision=bf16 runtime=cuda precision.moments_dtype=bf16"),
    Wrong("optimizer.ema_decay=1", "optimizer.ema_decay", "not below 1"),
    Wrong("optimizer.ema_decay=0.9 optimizer.ema_half_life_tokens=1000", "optimizer.ema_decay", "both say"),
    Wrong("optimizer.ema_decay=0.9", "optimizer.ema_decay", "fp8_param_gather=true",
          "precision=fp8_block runtime=cuda precision.fp8_param_gather=true"),
    Wrong("train.eval_ema=true", "train.eval_ema", "optimizer.ema_decay=null"),
    Wrong("train.eval_ema=true train.eval_batches=0", "train.eval_ema", "no evaluation", "optimizer.ema_decay=0.9"),
    Wrong("optimizer.muon_ns_steps=4", "optimizer.muon_ns_steps", "without optimizer.name=muon"),
    Wrong("optimizer.name=muon optimizer.muon_momentum=1", "optimizer.muon_momentum", "not below 1"),
    Wrong("optimizer.name=muon precision.dtype=fp16", "optimizer.name", "precision.dtype=fp16"),
    Wrong("optimizer.name=muon precision.moments_dtype=bf16", "optimizer.name", "precision.moments_dtype=bf16",
          "precision=bf16"),
    Wrong("optimizer.name=muon parallel.overlap_param_gather=true", "optimizer.name", "overlap_param_gather=true",
          "parallel.overlap_grad_reduce=true parallel.dp=2"),
    *([Wrong("optimizer.name=muon", "optimizer.name", "Python 3.12 or later and the extra muon")]
      if sys.version_info < (3, 12) else []),
    Wrong("optimizer.lr=nan", "optimizer.lr", "finite number; use optimizer.lr=0.001"),
    Wrong("optimizer.lr=-1", "optimizer.lr", "smallest value 0"),
    Wrong("precision.dtype=fp8", "precision.dtype", "fp32, bf16, fp16"),
    Wrong("precision.fp8=block", "precision.fp8", "needs precision.dtype=bf16 for the rest, not fp32"),
    Wrong("precision.fp8=tensor", "precision.fp8", "not fp16", "precision=fp16"),
    Wrong("precision.fp8=int8", "precision.fp8", "block, tensor, delayed, mxfp8", "precision=bf16"),
    Wrong("precision.fp8=block", "precision.fp8", "emulates FP8 on the CPU",
          "precision=bf16 runtime=cuda backend.name=local"),
    Wrong("precision.power_of_two_scales=false", "precision.power_of_two_scales", "E8M0", "precision=mxfp8"),
    Wrong("precision.power_of_two_scales=true", "precision.power_of_two_scales", "no such option",
          "precision=fp8_delayed"),
    Wrong("precision.amax_history_len=0", "precision.amax_history_len", "smallest value 1", "precision=fp8_delayed"),
    Wrong("precision.first_last_layers_bf16=true", "precision.first_last_layers_bf16", "precision.fp8=null"),
    Wrong("precision.first_last_layers_bf16=true", "precision.first_last_layers_bf16", "once for all layers",
          "precision=fp8_delayed"),
    Wrong("precision.num_layers_at_start_in_bf16=5", "precision.num_layers_at_start_in_bf16", "4 / 1 = 4 layers",
          "precision=fp8_block precision.first_last_layers_bf16=true"),
    Wrong("precision.num_layers_at_end_in_bf16=3", "precision.num_layers_at_end_in_bf16", "4 / 2 = 2 layers",
          "precision=fp8_block precision.first_last_layers_bf16=true parallel.pp=2"),
    Wrong("precision.num_layers_at_start_in_bf16=2 precision.num_layers_at_end_in_bf16=2",
          "precision.num_layers_at_start_in_bf16", "leave none of model.num_layers=4 layers",
          "precision=fp8_block precision.first_last_layers_bf16=true"),
    Wrong("precision.fp8_param_gather=true", "precision.fp8_param_gather", "precision.fp8=null", "precision=bf16"),
    Wrong("precision.fp4=nvfp4", "precision.fp4",
          "emulates FP8 but not FP4; use precision.fp4=null precision.fp8=block", "precision=bf16 runtime=cpu"),
    Wrong("precision.fp4=nvfp4", "precision.fp4", "exclude each other", f"precision=fp8_block {WIDE}"),
    Wrong("precision.fp4=int4", "precision.fp4", "nvfp4", f"precision=bf16 {WIDE}"),
    Wrong("precision.dtype=fp16", "precision.fp4", "needs precision.dtype=bf16 for the rest, not fp16",
          f"precision=nvfp4 {WIDE}"),
    Wrong("precision.power_of_two_scales=true", "precision.power_of_two_scales", "precision.fp4=nvfp4",
          f"precision=nvfp4 {WIDE}"),
    Wrong("precision.fp8_param_gather=true", "precision.fp8_param_gather", "not in that of precision.fp4=nvfp4",
          f"precision=nvfp4 {WIDE}"),
    Wrong("precision.fp8_dispatch=true", "precision.fp8_dispatch", "precision.fp8=null", "precision=bf16"),
    Wrong("precision.fp8_dispatch=true", "precision.fp8_dispatch",
          "not of precision.fp8=tensor; use precision.fp8=block", "precision=fp8_tensor"),
    Wrong("precision.fp8_dispatch=true", "precision.fp8_dispatch", "use precision.power_of_two_scales=true",
          "precision=fp8_block runtime=cpu precision.power_of_two_scales=false"),
    Wrong("cluster.bf16_fraction=0", "cluster.bf16_fraction", "below the smallest value 1e-06"),
    Wrong("precision.fp8_dispatch=true", "precision.fp8_dispatch", "needs backend.name=local, not te",
          "precision=fp8_block runtime=cuda"),
    Wrong("precision.fp8_dispatch=true", "precision.fp8_dispatch", "use parallel.dispatcher=alltoall",
          "precision=fp8_block runtime=cpu parallel.dispatcher=allgather"),
    Wrong("precision.fp8_dispatch=true", "precision.fp8_dispatch", "use model.hidden_size=128 or model.hidden_size=256",
          "precision=fp8_block runtime=cpu model.hidden_size=192"),
    Wrong("precision.fp8_dispatch=true", "precision.fp8_dispatch", "model.num_experts=0",
          "precision=fp8_block runtime=cpu model.num_experts=0 model.topk=1 model.num_shared_experts=0 "
          "model.router_num_groups=0 model.router_topk_groups=0 model.balance_losses=[] "
          "model.balance_loss_coeffs=[] model.router_bias=false model.num_dense_layers=0"),
    Wrong("model.moe_ffn_hidden_size=168", "model.moe_ffn_hidden_size",
          "168 / 1 = 168 on a rank, and precision.fp8=block needs multiples of 16 (backend.name=te); "
          "use model.moe_ffn_hidden_size=160 or model.moe_ffn_hidden_size=176", "precision=fp8_block runtime=cuda"),
    Wrong("parallel.etp=4", "model.moe_ffn_hidden_size", "160 / 4 = 40 on a rank, and precision.fp8=block",
          "precision=fp8_block runtime=cuda parallel.tp=4 model.num_shared_experts=0"),
    Wrong("parallel.tp=4", "model.ffn_hidden_size", "use model.ffn_hidden_size=704 or model.ffn_hidden_size=768",
          "precision=fp8_block runtime=cuda model.ffn_hidden_size=736 model.num_shared_experts=0"),
    Wrong("parallel.tp=4", "model.qk_nope_head_dim", "1 x (48 + 32) = 80 on a rank, and precision.fp8=mxfp8 needs "
          "multiples of 32", f"precision=mxfp8 {WIDE} model.qk_nope_head_dim=48 model.num_shared_experts=0"),
    Wrong("model.kv_lora_rank=40", "model.kv_lora_rank", "a width of 40", "precision=fp8_tensor runtime=cuda"),
    Wrong("model.head_dim=36", "model.head_dim", "1 x 36 = 36",
          f"precision=fp8_tensor runtime=cuda parallel.tp=4 model.num_shared_experts=0 {GQA}"),
    Wrong("train.seq_length=24", "train.seq_length", "1 x 24 / 1 = 24 tokens, and precision.fp8=tensor needs multiples "
          "of 16 (backend.name=te); use train.seq_length=16 or train.seq_length=32",
          "precision=fp8_tensor runtime=cuda"),
    Wrong("train.seq_length=64", "train.seq_length", "1 x 64 / 4 = 16 tokens",
          f"precision=nvfp4 {WIDE} parallel.tp=2 parallel.cp=2 model.num_shared_experts=0"),
    Wrong("precision.fp8=delayed", "precision.fp8", "no checkpoint keeps (Transformer Engine pickles them), so that a "
          "resumed run would differ; use precision.fp8=tensor or checkpoint.save_at_end=false "
          "checkpoint.interval_steps=0", "precision=bf16 runtime=cuda"),
    Wrong("precision.moments_dtype=bf16", "precision.moments_dtype",
          "use backend.name=te or precision.moments_dtype=fp32", "precision=bf16 runtime=cuda backend.name=local"),
    Wrong("precision.stochastic_rounding=true", "precision.stochastic_rounding",
          "but precision.moments_dtype=fp32; use precision.moments_dtype=bf16", "precision=bf16 runtime=cpu"),
    Wrong("precision.stochastic_rounding=true", "precision.stochastic_rounding",
          "rounds moments to the nearest; use precision.stochastic_rounding=false",
          "precision=bf16 precision.moments_dtype=bf16 runtime=cuda"),
    Wrong("precision.moments_dtype=bf16", "precision.moments_dtype", "parallel.distributed_optimizer=true",
          "precision=bf16 runtime=cuda parallel.distributed_optimizer=false"),
    Wrong("precision.fp8_param_gather=true", "precision.fp8_param_gather", "needs backend.name=te, not local",
          "precision=fp8_block runtime=cpu"),
    Wrong("precision.fp8_param_gather=true", "precision.fp8_param_gather", "parallel.distributed_optimizer=true",
          "precision=fp8_block runtime=cuda parallel.distributed_optimizer=false"),
    # Data and start
    Wrong("data.split=\"'90,5'\"", "data.split", "three shares"),
    Wrong("data.split=\"'90,5,6'\"", "data.split", "90 + 5 + 6 = 101"),
    Wrong("data.split=\"'100,0,0'\"", "data.split", "train.eval_batches"),
    Wrong("'train.eval_sources=[{path:a.txt},{path:b/a.md}]'", "train.eval_sources has two entries of the name a",
          "use 'train.eval_sources=[{path:a.txt},{path:b/a.md,name:a_2}]'"),
    Wrong("'train.eval_sources=[{path:a.txt,name:my text}]'", "train.eval_sources[0].name='my text'",
          "use 'train.eval_sources=[{path:a.txt,name:my_text}]'"),
    Wrong("'train.eval_sources=[{path:a.txt}]'", "train.eval_sources", "train.eval_batches=0 means no evaluation",
          "train.eval_batches=0"),
    Wrong("train.eval_source_tokens=100", "train.eval_source_tokens", "has no effect without train.eval_sources"),
    Wrong("'data.blend=[{path:corpus/a}]'", "data.blend", "but data.source=stdlib makes one; use data.source=none"),
    Wrong("'data.blend=[{path:corpus/a,weight:-1}]'", "data.blend has {path:corpus/a,weight:-1.0}",
          "which is not a path with a weight above 0; use 'data.blend=[{path:corpus/a,weight:1.0}]'",
          "data.source=none"),
    Wrong("'data.blend=[{path:corpus/a,weight:1},{path:corpus/b}]'", "data.blend",
          "weights for some of its datasets only", "data.source=none"),
    Wrong("'data.blend=[{path:corpus/a,weight:1},{path:corpus/a,weight:2}]'", "data.blend",
          "names corpus/a more than once", "data.source=none"),
    Wrong("'data.blend=[{weight:1}]'", "data.blend has an entry without path", "use 'data.blend=[{path:",
          "data.source=none", replaces=True),
    Wrong("'data.blend=[{path:a,wait:1}]'", "data.blend has an entry with wait", "not one of path, weight; use ",
          "data.source=none", replaces=True),
    Wrong("'data.blend=[{path:a,weight:heavy}]'", "data.blend has an entry whose weight", "is not a number or null",
          "data.source=none", replaces=True),
    Wrong("data.blend=a", "data.blend=a", "is not a list such as [{path:", "data.source=none", replaces=True),
    # Lists as earlier versions wrote them
    Wrong("data.blend=['0.7 a/text','0.3 my b/text']", "data.blend is a list of entries in braces",
          "use 'data.blend=[{path:a/text,weight:0.7},{path:my b/text,weight:0.3}]'", "data.source=none", replaces=True),
    Wrong("data.blend=[a/text]", "data.blend is a list",
          "not of text such as 'a/text'; use 'data.blend=[{path:a/text}]'", "data.source=none", replaces=True),
    Wrong("recompute.stages=[layernorm+moe_act,none]", "recompute.stages is a list",
          "use 'recompute.stages=[{modules:[layernorm,moe_act]},{mode:none}]'", "parallel.pp=2", replaces=True),
    Wrong("\"launcher.fallbacks=['parallel.dp=2 parallel.ep=1']\"", "launcher.fallbacks is a list",
          "use 'launcher.fallbacks=[{parallel:{dp:2,ep:1}}]'", replaces=True),
    Wrong("'launcher.fallbacks=[{parallel:{ddp:2}}]'", "launcher.fallbacks[0] changes parallel.ddp,",
          "which is not a field of the layout; use 'launcher.fallbacks=[{parallel:{dp:2}}]'"),
    Wrong("'launcher.fallbacks=[{parallel:{micro_batch_size:2}}]'", "launcher.fallbacks[0] changes parallel.micro_",
          "use 'launcher.fallbacks=[{batch:{micro_batch_size:2}}]'"),
    Wrong("'launcher.fallbacks=[{batch:{global_batch_size:8}}]'", "launcher.fallbacks[0] changes batch.global_batch",
          "; change fields of parallel and recompute, and batch.micro_batch_size", applies=False),
    Wrong("'launcher.fallbacks=[{parallel:{dp:1}},{parallel:{tp:many}}]'", "launcher.fallbacks[1] has parallel.tp=many",
          ", which is not a whole number; use 'launcher.fallbacks=[{parallel:{dp:1}},{parallel:{tp:1}}]'"),
    Wrong("'launcher.fallbacks=[{parallel:{tp:0}}]'", "launcher.fallbacks[0] has parallel.tp=0,", "is below 1"),
    Wrong("'launcher.fallbacks=[{parallel:{tp:2000000}}]'", "launcher.fallbacks[0] has parallel.tp=2000000,", "above"),
    Wrong("'launcher.fallbacks=[{recompute:{modules:[mpl]}}]'", "launcher.fallbacks[0].recompute.modules=mpl",
          "is not one of core_attn, "),
    Wrong("'launcher.fallbacks=[{recompute:{stages:[{modules:[mpl]}]}}]'",
          "launcher.fallbacks[0].recompute.stages[0].modules=mpl", "is not one of core_attn, "),
    Wrong("\"resilience.inject=['kill:rank=0:step=7:at=end']\"", "resilience.inject is a list",
          "use 'resilience.inject=[{kind:kill,rank:0,step:7,at:end}]'", replaces=True),
    Wrong("resilience.inject=[kill:node=1:step=2]", "resilience.inject has 'kill:node=1:step=2'",
          "which is not an entry in braces; use 'resilience.inject=[{kind:kill,rank:1,step:7}]'", replaces=True,
          applies=False),
    Wrong("data.blend=[{path:a},b]", "data.blend", "has 'b', which is not an entry in braces", "data.source=none",
          replaces=True),
    Wrong("data.blend=[null]", "data.blend", "has 'null', which is not an entry in braces", "data.source=none",
          replaces=True),
    Wrong("'data.sources=[{name:a,path:x}]'", "data.sources", "data.source=stdlib does not read them; use "
          "data.source=files"),
    Wrong("data.path=x 'data.sources=[{name:a,path:x}]'", "data.sources", "both name the text; use data.path=null",
          "data.source=files"),
    Wrong("'data.sources=[{name:a,path:x},{name:a,path:y}]'", "data.sources", "two entries of the name a",
          "data.source=files"),
    Wrong("'data.sources=[{name:parts,path:x}]'", "data.sources[0].name=parts", "is another directory of a dataset",
          "data.source=files"),
    Wrong("'data.sources=[{name:a/b,path:x}]'", "data.sources[0].name='a/b'", "use 'data.sources=[{name:a_b",
          "data.source=files"),
    Wrong("data.max_characters=5", "data.max_characters", "below data.min_characters=9", "data.min_characters=9"),
    Wrong("data.filter=module.function", "data.filter", "is not module:function"),
    Wrong("data.near_duplicates=0.2", "data.near_duplicates", "0.5"),
    Wrong("data.prepare_memory_mib=1", "data.prepare_memory_mib", "16"),
    Wrong("data.prepare_tokenizer=tiktoken", "data.prepare_tokenizer", "gigatoken"),
    Wrong("data.encoding=utf-16", "data.encoding", "does not encode line ends as ASCII does; use "
          "data.encoding=utf-8"),
    Wrong("data.append_eod=false", "data.reset_at_eod", "use data.append_eod=true", "data.reset_at_eod=true"),
    Wrong("data.source=files", "data.path", "data.source=files", applies=False),
    Wrong("data.path=", "data.path=''", "leave data.path out", "data.source=files", applies=False),
    Wrong("data.path=", "data.path=''", "is empty, as from a variable of the shell", applies=False),
    Wrong("data.dir=", "data.dir=''", "leave data.dir out", applies=False),
    Wrong("data.dir=", "data.dir=''", "leave data.dir out", "data=indexed", applies=False),
    Wrong("checkpoint.dir=", "checkpoint.dir=''", "leave checkpoint.dir out", applies=False),
    Wrong("data.path=corpus", "data.path", "data.source=stdlib; use data=text data.path=corpus or", replaces=True),
    Wrong("data.path='my corpus'", "data.path", "data.source=none; use data=text data.path='my corpus' or",
          "data=indexed", applies=False),
    Wrong("data.tokenizer_vocab_size=9999", "data.tokenizer_vocab_size", "exceeds model.vocab_size=4096"),
    Wrong("resume=newest", "resume", "neither auto, never"),
    Wrong("init_from=/nonexistent", "init_from=/nonexistent", "or init_from=null for random weights", applies=False),
    Wrong("init_from=Qwen/Qwen3-30B-A3B", "init_from=Qwen/Qwen3-30B-A3B",
          "first `hf download Qwen/Qwen3-30B-A3B --local-dir Qwen3-30B-A3B`, then init_from=", applies=False),
    Wrong("run_dir=/proc/x/y", "run_dir=/proc/x/y", "cannot be written: No such file"),
    Wrong("run_dir=/dev/null", "run_dir=/dev/null", "cannot be written: it is not a directory"),
    Wrong("run_dir=/dev/null/x", "run_dir=/dev/null/x", "cannot be written: Not a directory"),
    Wrong("run_dir=", "run_dir=''", "is empty"),
    Wrong("run_dir=/dev/null seed=1,2 -m", "run_dir=/dev/null", "it is not a directory", applies=False),
    Wrong("run_dir= seed=1,2 -m", "run_dir=''", "is empty", applies=False),
    # The command line itself
    Wrong("path=x", "path", "use data.path=x", "data.source=files", replaces=True),
    Wrong("+path=x", "path", "use data.path=x", "data.source=files", replaces=True),
    Wrong("++model.layers=3", "model.layers", "use model.num_layers=3", replaces=True),
    Wrong("parallel.tpp=2", "parallel.tpp", "use parallel.tp=2", replaces=True),
    Wrong("modl=tiny", "modl", "use model=tiny", replaces=True),
    Wrong("model=tinny", "model=tinny", "deepseek_v3, ", replaces=True),
    Wrong("experiment=foo", "experiment=foo", "tiny_tp2_pp2_ep2", replaces=True, applies=False),
    Wrong("parallel=4", "parallel=4", "use parallel=", replaces=True, applies=False),
    Wrong("train=3", "train=3", "use train.seq_length=128", replaces=True),
    Wrong("++model.foo=1", "model.foo", "see moe-train --cfg job", applies=False),
    Wrong("~model", "model", "cannot be deleted; use model=", replaces=True),
    Wrong("~model=tiny", "model", "cannot be deleted; use model=", replaces=True),
    Wrong("~train", "train", "cannot be deleted; use train.seq_length=128", replaces=True),
    Wrong("data=null", "data=null", "the name of one option", applies=False),
    Wrong("model=[tiny,tiny]", "model=[tiny,tiny]", "the name of one option", replaces=True),
    Wrong("parallel.tp=two", "parallel.tp=two", "an integer", replaces=True),
    Wrong("train.steps=20.4", "train.steps=20.4", "an integer or null", replaces=True),
    Wrong("backend.apex=maybe", "backend.apex=maybe", "true or false", replaces=True),
    Wrong("model.topk=null", "model.topk=null", "an integer", replaces=True),
    Wrong("model.balance_losses=aux_loss", "model.balance_losses=aux_loss", "a list", replaces=True, applies=False),
    Wrong("data.split=969,30,1", "data.split=969,30,1", "use data.split='96.9,3,0.1' or data.split='90,5,5'"),
    Wrong("data.split=80,10", "data.split=80,10", "not three shares"),
    Wrong("data.split=a,b,c", "data.split=a,b,c", "use data.split='90,5,5'"),
    Wrong("runtime=cpu,cuda", "runtime=cpu,cuda", "has several values; use runtime=cpu, or -m", applies=False),
    Wrong("train.tokens=1,000,000", "train.tokens=1,000,000", "use train.tokens=1000000", replaces=True),
    Wrong("train.steps=0.5k train.tokens=2Q", "train.tokens=2Q", "an integer or null", replaces=True),
    Wrong("train.seq_length=1.0001k", "train.seq_length=1.0001k", "an integer", replaces=True),
    Wrong("data.dir='a${b'", "data.dir=a${b", "write \\${ where ${ is text", applies=False),
    Wrong("run_dir='\\${x}'", "run_dir=${x}", "which Hydra takes for a reference"),
    Wrong("runtime=a=b", "runtime=a=b", "is not one of auto, cuda, cpu, simulated", replaces=True),
    Wrong("precision=bf16=3", "precision=bf16=3", "the name of one option", replaces=True, applies=False),
    Wrong("parallel.tp=a[", "parallel.tp=a[", "is not an integer; use parallel.tp=1", replaces=True),
    Wrong("foo.bar=a=b", "foo.bar", "is not a field", applies=False),
    # Fields of other commands
    Wrong("plan.imbalance=1.5", "plan.imbalance", "but in that of moe-plan, moe-submit; leave it out", applies=False),
    Wrong("plan=deepseek_v3", "plan", "but in that of moe-plan, moe-submit; leave it out", applies=False),
    Wrong("convert.dtype=bf16", "convert.dtype", "but in that of moe-convert; leave it out", applies=False),
    Wrong("++inspect.rows=3", "inspect.rows", "but in that of moe-inspect; leave it out", applies=False),
    # Names and options from other trainers and from Slurm
    Wrong("optimizer.learning_rate=1e-3", "optimizer.learning_rate", "use optimizer.lr=1e-3", replaces=True),
    Wrong("checkpoint.tries=5", "checkpoint.tries was renamed", "use checkpoint.max_consecutive_failures=5",
          replaces=True),
    Wrong("launcher.meet_timeout_s=900", "launcher.meet_timeout_s was renamed",
          "use launcher.rendezvous_timeout_s=900", replaces=True),
    Wrong("parallel.tensor_model_parallel_size=2", "parallel.tensor", "use parallel.tp=2", replaces=True),
    Wrong("batch.rampup_batch_size=[16,16,1000]", "batch.rampup_batch_size", "a ramp is a schedule: use "
          "schedule.batch_size=", applies=False),
    Wrong("--partition=gpu", "command line: there is no option --partition", "use launcher.partition=gpu",
          replaces=True),
    Wrong("--lr 1e-4", "command line: there is no option --lr", "use optimizer.lr=1e-4", replaces=True),
    Wrong("--dryrun", "command line: there is no option --dryrun", "moe-submit --dry-run", applies=False),
    Wrong("--mulitrun", "command line: there is no option --mulitrun", "use --multirun", applies=False),
    # One set of values that passes every rule, where no single one does
    Wrong("train.steps=100", "train.steps=100 and train.tokens=14800000000000",
          "use train.tokens=null schedule.warmup_steps=10 or train.steps=null",
          "experiment=deepseek_v3/pretrain runtime=cuda"),
    Wrong("parallel.dp=128", "parallel.dp=128 does not fill the ranks", "but there are 1600 ranks",
          "experiment=deepseek_v3/pretrain runtime=cuda", world_size=1600),
    Wrong("model=tiny,mixtral_8x7b", "model=tiny,mixtral_8x7b", "-m to run each", replaces=True, applies=False),
    Wrong("run_dir='runs/${modl.name}'", "run_dir", "modl.name", applies=False),
    Wrong("~model.topk", "model.topk", "cannot be deleted", replaces=True),
    Wrong("train.steps", "cannot read", "KEY=VALUE", replaces=True),
    Wrong("--stepz 30", "command line", "--stepz; use train.steps=30", replaces=True),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _in_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.iterdir()), "a wrong configuration left something behind"


def _never(cfg: Config) -> None:
    raise AssertionError("a wrong configuration was run")


def _suggested(line: str) -> list[list[str]]:
    """The overrides that a line suggests: `...; use a=1 or b=2 c=3` gives [[a=1], [b=2, c=3]]."""
    remedy = re.split(r"; use ", line)[-1]
    remedy = re.sub(r" for one value with commas, or -m to run each$", "", remedy)
    options = [re.sub(r", such as ", "", option) for option in remedy.removeprefix("KEY=VALUE").split(" or ")]
    # A suggestion is pasted into a shell, except for quotes, which Hydra wants to see. Those around a word are the
    # shell's.
    words = [re.findall(r"(?:'[^']*'|\[[^]]*\]|[^\s'\[])+", option.strip('"')) for option in options]
    return [[word[1:-1] if word.startswith("'") else word for word in option] for option in words if option]


def test_the_table_is_long_enough_and_has_no_doubles() -> None:
    assert len(TABLE) >= 45
    assert len({(tuple(row.words), row.world_size) for row in TABLE}) == len(TABLE)


@pytest.mark.parametrize("row", TABLE, ids=[f"{row.context} {row.overrides}".strip() for row in TABLE])
def test_wrong_config_ends_in_one_line_with_a_value_that_works(row: Wrong, capsys: pytest.CaptureFixture[str]) -> None:
    if row.world_size is None:
        assert hydra_entry(_never, argv=row.words) == 2
    else:  # as a launcher's rank does: it knows the number of ranks only in the job, whose directory Hydra has made
        assert hydra_entry(lambda cfg: validate(cfg, row.world_size) and None, argv=row.words) == 2
        Path("runs").rmdir()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    line = captured.err.strip()
    assert line.startswith(f"error: {row.field}")
    assert row.arithmetic in line
    assert "; " in line  # cause; remedy
    if not row.applies:
        return
    suggestions = _suggested(line)
    assert suggestions, line
    assert len(set(map(tuple, suggestions))) == len(suggestions), line
    if row.replaces:  # several existing fields can look like a wrong name: the first is meant
        validate(compose([*shlex.split(row.context), *suggestions[0]]))
        return
    wrong = _with_overrides(_context(row.context), shlex.split(row.overrides))
    for suggestion in suggestions:
        validate(_with_overrides(wrong, suggestion), row.world_size)


@cache
def _context(words: str) -> Config:
    return compose(shlex.split(words))


def _with_overrides(cfg: Config, overrides: list[str]) -> Config:
    """Read as Hydra reads them, without composing everything again."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    values = {one.key_or_group: one.value() for one in parsed}
    return with_values(
        cfg, {name: typed(name, value) if name in all_fields() else value for name, value in values.items()}
    )


@pytest.mark.parametrize(
    "overrides", ["parallel.tp=3", "path=x", "parallel.tp=two", "model=tinny", "train.tokens=1 train.steps=1"]
)
def test_the_installed_command_starts_nothing(overrides: str, tmp_path: Path) -> None:
    """As the rows of the table, from a shell; a process group, torch even, would take longer than the timeout."""
    done = subprocess.run(
        [MOE_TRAIN, *shlex.split(overrides)], cwd=tmp_path, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_rows_fail_only_because_of_their_wrong_overrides() -> None:
    """Each context alone passes, so that the line is about what the row says."""
    for context in sorted({row.context for row in TABLE if row.world_size is None}):
        if context != "data.source=files":
            assert validate(_context(context)).world_size >= 1, context
