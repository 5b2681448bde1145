"""What other frameworks' settings are called here: Megatron, torchtitan, NeMo, DeepSpeed, Hugging Face's Trainer.

Whoever types one of these names is answered with the key that does it here, or with why there is none. Names are in
lower case with underscores, without leading dashes. A name that is not in the tables as a whole is looked up by its
last word, so that `optim.sched.min_lr` and `--min-lr` need one entry.
"""

from __future__ import annotations

# Key of ours: names of the same thing elsewhere.
CALLED = {
    "lr_scheduler.lr": "lr learning_rate max_lr peak_lr optim.lr optimizer.lr optimizer.params.lr train.lr",
    "lr_scheduler.warmup_steps": "lr_warmup_iters lr_warmup_steps warmup_iters warmup_num_steps num_warmup_steps",
    "optimizer.name": "optimizer_type optim.name optim_type optimizer.type",
    "optimizer.beta1": "adam_beta1",
    "optimizer.beta2": "adam_beta2",
    "optimizer.eps": "adam_eps adam_epsilon",
    "optimizer.weight_decay": "wd",
    "optimizer.clip_grad_norm": "clip_grad max_norm max_grad_norm gradient_clip_val gradient_clipping grad_clip",
    "optimizer.moments_dtype": "exp_avg_dtype exp_avg_sq_dtype state_dtype",
    "optimizer.ema_decay": "zcc_save_ema_coef ema_coef",
    "train.max_steps": "train_iters train.steps training.steps steps max_iters num_steps total_steps num_train_steps",
    "train.max_tokens": "train_tokens num_tokens total_tokens",
    "train.seq_len": "seq_length encoder_seq_length sequence_length max_seq_len max_seq_length block_size "
    "context_length",
    "train.global_batch_size": "train_batch_size global_train_batch_size train.batch_size batch_size",
    "train.micro_batch_size": "train_micro_batch_size_per_gpu per_device_train_batch_size local_batch_size micro_batch "
    "pipeline_parallel_microbatch_size mbs",
    "train.batch_ramp.start": "start_global_batch_size",
    "parallel.pp": "pipeline_model_parallel_size pipeline_parallel_size pipeline_parallel_degree pp_size pp_degree",
    "parallel.ep": "expert_model_parallel_size expert_parallel_size expert_parallel_degree ep_size ep_degree "
    "moe_ep_size",
    "parallel.dp": "data_parallel_size data_parallel_shard_degree data_parallel_replicate_degree dp_size dp_shard "
    "dp_replicate data_parallel_degree",
    "parallel.nodes": "num_nodes nnodes n_nodes",
    "pipeline.schedule": "pipeline_parallel_schedule pipeline_schedule use_dualpipev pp_schedule",
    "pipeline.stages_per_rank": "virtual_pipeline_model_parallel_size num_virtual_stages_per_pipeline_rank vpp_size",
    "pipeline.layers": "pipeline_model_parallel_layout module_fqns_per_model_part pipeline_parallel_layers_per_stage",
    "pipeline.pairs": "overlap_moe_expert_parallel_comm delay_wgrad_compute overlapped_forward_backward",
    "parallel.dispatch": "moe_token_dispatcher_type moe_flex_dispatcher_backend expert_parallel_comm_backend",
    "run.hang_timeout_s": "distributed_timeout_seconds timeout train_timeout_seconds comm.train_timeout_seconds",
    "run.name": "run_name experiment_name exp_name job_name",
    "run.dir": "output_dir exp_dir dump_folder work_dir log_dir save_dir",
    "run.kernels": "torch_compile compile.enable compile use_liger_kernel fused_kernels",
    "model.num_hidden_layers": "num_layers n_layers n_layer",
    "model.num_attention_heads": "n_heads n_head num_heads",
    "model.num_key_value_heads": "num_query_groups n_kv_heads num_kv_heads group_query_attention",
    "model.head_dim": "kv_channels",
    "model.hidden_size": "n_embd d_model dim",
    "model.intermediate_size": "ffn_hidden_size inter_dim d_ff",
    "model.moe_intermediate_size": "moe_ffn_hidden_size moe_inter_dim",
    "model.n_routed_experts": "num_experts num_moe_experts num_local_experts moe_num_experts",
    "model.num_experts_per_tok": "moe_router_topk top_k num_selected_experts n_activated_experts",
    "model.n_shared_experts": "moe_shared_expert_num num_shared_experts",
    "model.n_group": "moe_router_num_groups num_expert_groups n_expert_groups",
    "model.topk_group": "moe_router_group_topk num_limited_groups n_limited_groups",
    "model.first_k_dense_replace": "n_dense_layers num_dense_layers",
    "model.scoring_func": "moe_router_score_function score_func",
    "model.routed_scaling_factor": "moe_router_topk_scaling_factor route_scale",
    "model.norm_topk_prob": "route_norm",
    "model.qk_nope_head_dim": "qk_head_dim",
    "model.qk_rope_head_dim": "qk_pos_emb_head_dim",
    "model.num_nextn_predict_layers": "mtp_num_layers num_mtp_modules num_mtp_layers",
    "model.rope_theta": "rotary_base rope_base",
    "model.rms_norm_eps": "norm_epsilon layernorm_epsilon norm_eps",
    "model.initializer_range": "init_method_std init_std",
    "moe.bias_update_rate": "moe_router_bias_update_rate load_balance_coeff bias_update_speed",
    "moe.seq_aux_coeff": "moe_aux_loss_coeff aux_loss_alpha seq_aux_loss_coeff router_aux_loss_coef",
    "mtp.loss_weight": "mtp_loss_scaling_factor mtp_loss_weight mtp_loss_coeff",
    "data.source": "data_path data_prefix dataset dataset_path train_data_path dataset_name_or_path",
    "data.tokenizer": "tokenizer_model tokenizer_path tokenizer_name_or_path tokenizer_name hf_assets_path",
    "data.fim_rate": "fim_probability",
    "data.document_mask": "reset_attention_mask reset_position_ids eod_mask_loss",
    "checkpoint.dir": "save checkpoint.folder checkpoint_dir checkpoints_path save_checkpoint_path",
    "checkpoint.interval": "save_interval save_steps checkpoint_interval every_n_train_steps save_every",
    "checkpoint.keep_latest_k": "save_total_limit save_top_k max_checkpoints keep_latest",
    "checkpoint.async_mode": "async_save use_async",
    "checkpoint.resume": "load load_step resume_from_checkpoint resume_checkpoint_path resume_if_exists resume_step",
    "checkpoint.init_from": "initial_load_path pretrained_checkpoint model_name_or_path restore_from_path "
    "init_from_checkpoint",
    "checkpoint.branch_from": "fork_from fork_run warm_start_from",
    "train.freeze": "freeze freeze_layers frozen_layers freeze_parameters freeze_modules frozen_params "
    "non_trainable_modules",
    "evaluate.interval": "eval_interval eval_steps val_check_interval validation.freq eval_every",
    "evaluate.num_sequences": "eval_samples limit_val_batches",
    "track.log_interval": "logging_steps steps_per_print log_every_n_steps log_freq metrics.log_freq",
    "track.project": "wandb_project",
    "track.entity": "wandb_entity wandb_team",
    "track.name": "wandb_exp_name wandb_name wandb_run_name",
    "track.group": "wandb_group",
    "track.wandb": "enable_wandb report_to use_wandb wandb_mode",
    "profile.steps": "profile_step_start profile_step_end profile_freq enable_profiling profile_ranks",
}

# Sentence: names of what is done in another way here, or not at all. Keys of ours stand in it as they are typed.
ANSWERED = {
    "tensor parallelism is absent by choice: DeepSeek-V3's report trains without it; ranks are parallel.pp times "
    "parallel.dp, and experts are shared by parallel.ep of them": "tp tp_size tp_degree tensor_parallel "
    "tensor_parallel_size tensor_parallel_degree tensor_model_parallel_size expert_tensor_parallel_size "
    "expert_tensor_parallel_degree sequence_parallel autotp_size model_parallel_size mp_size",
    "context parallelism is absent by choice: DeepSeek-V3's report trains without it": "cp cp_size cp_degree "
    "context_parallel context_parallel_size context_parallel_degree ulysses_sequence_parallel_size sp sp_size",
    "dropout is absent by choice: DeepSeek-V3 trains without it, and a run repeats bit for bit": "dropout "
    "attention_dropout hidden_dropout attn_pdrop resid_pdrop embd_pdrop",
    "fp16 is absent by choice: say precision=bf16 or precision=fp8": "fp16 fp16.enabled",
    "the arithmetic is a group of files here: say precision=bf16": "bf16 bf16.enabled dtype params_dtype "
    "mixed_precision mixed_precision_param",
    "the arithmetic is a group of files here: say precision=fp8": "fp8 fp8_format fp8_recipe fp8_hybrid enable_fp8",
    "gradient accumulation follows from the batch: a step adds up train.global_batch_size / (parallel.dp x "
    "train.micro_batch_size) micro-batches on each rank; for more of them make train.micro_batch_size smaller or "
    "train.global_batch_size larger": "gradient_accumulation_steps gradient_accumulation accumulate_grad_batches "
    "num_microbatches num_micro_batches grad_accum grad_accum_steps grad_acc_steps gas accumulation_steps "
    "gradient_accumulation_iters global_grad_accum",
    "the curve of the learning rate is a list of stretches here: lr_scheduler.phases=[{kind:constant,share:0.5},"
    "{kind:cosine,end_lr:1e-5}], or a published one by lr_scheduler=v3": "lr_decay_style lr_decay_iters "
    "lr_decay_samples lr_wsd_decay_style lr_wsd_decay_iters lr_scheduler_type decay_ratio decay_type min_lr "
    "min_lr_factor min_lr_ratio lr_min lr_scheduler.name scheduler scheduler.type",
    "warm-up is counted in steps: lr_scheduler.warmup_steps": "lr_warmup_samples lr_warmup_fraction warmup_ratio "
    "warmup_fraction",
    "the length of a run is counted in steps or tokens: train.max_steps, train.max_tokens": "train_samples "
    "num_train_epochs epochs max_epochs num_epochs max_time",
    "betas are two keys: optimizer.beta1 and optimizer.beta2": "betas adam_betas",
    "the optimizer's state is always sharded over all replicas (ZeRO-1); zero.engine says by whom": "zero_stage "
    "zero_optimization zero_optimization.stage stage use_distributed_optimizer fsdp fsdp_sharding_strategy "
    "reshard_after_forward",
    "which parts of a layer are computed again is chosen by recompute.norm, recompute.mla_up_proj, "
    "recompute.experts_up_proj and recompute.nodes=[attention,experts,dense]": "recompute_granularity "
    "recompute_modules recompute_activations "
    "recompute_method recompute_num_layers activation_checkpoint activation_checkpoint.mode activation_checkpointing "
    "gradient_checkpointing activations_checkpoint_granularity selective_ac_option",
    "routers have a selection bias under model.topk_method=noaux_tc, which moe.bias_update_rate moves": ""
    "moe_router_enable_expert_bias moe_router_load_balancing_type use_expert_bias",
    "shared experts are as wide as routed ones: model.n_shared_experts says how many of model.moe_intermediate_size": ""
    "moe_shared_expert_intermediate_size",
    "no token is dropped, so there is no capacity": "moe_expert_capacity_factor capacity_factor moe_token_drop_policy",
    "experts always multiply as one grouped product": "moe_grouped_gemm use_grouped_mm",
    "the same topology on the same machine always repeats bit for bit; train.seed draws weights and data": ""
    "deterministic deterministic_mode debug.deterministic",
    "timeouts are in seconds: run.hang_timeout_s": "distributed_timeout_minutes init_timeout_seconds",
    "a share of the documents validates: data.valid_fraction": "split splits_string train_data_ratio",
    "the number of processes is parallel.pp times parallel.dp, whoever starts them": ""
    "num_gpus n_gpus_per_node ngpu gpus nproc_per_node devices world_size",
    "the first model.first_k_dense_replace layers are dense, all others have experts": "moe_layer_freq "
    "decoder_sparse_step interleave_moe_layer_step",
    "the batch grows from train.batch_ramp.start over train.batch_ramp.tokens, in jumps of train.batch_ramp.quantum "
    "sequences": "rampup_batch_size step_batch_size_schedule batch_size_schedule",
    "evaluation reads evaluate.num_sequences sequences of the validation split every evaluate.interval steps": ""
    "eval_iters validation.steps evaluate.steps",
    "metrics go to metrics.jsonl in the run's folder and to track.wandb; there is no TensorBoard": "tensorboard_dir "
    "enable_tensorboard tensorboard tensorboard_log_dir",
    "sizes of a model come from a file of configs/model: say model=v3_16b, or single keys such as "
    "model.hidden_size": "model_name model.name model.flavor flavor model_config model_type",
    "embedding and head are never tied": "tie_word_embeddings untie_embeddings_and_output_weights",
    "grids and samplers are started by python -m launch local --multirun": "multirun m",
    "the tree is configs/run.yaml: a saved config.yaml is taken by --config FILE, a published run by "
    "experiment=NAME": "config_file config_name config_path config_dir config_yaml hparams",
}

# Groups that were renamed or folded into configs/run.yaml: what to say instead.
OLD_GROUPS = {
    "optim": "optim is no group any more: the rate is lr_scheduler=NAME, single keys are optimizer.*, moe.* and mtp.*, "
    "and experiment=NAME has all of a published recipe",
}


def _by_name(table: dict[str, str]) -> dict[str, str]:
    return {name: ours for ours, names in table.items() for name in names.split()}


_CALLED, _ANSWERED = _by_name(CALLED), _by_name(ANSWERED)


def answer(name: str) -> tuple[str, str]:
    """(key of ours that a foreign name is called, sentence on it); one of them or both are empty."""
    plain = name.lstrip("-").replace("-", "_").lower()
    if plain in OLD_GROUPS:
        return "", OLD_GROUPS[plain]
    for each in (plain, plain.rpartition(".")[2]):
        if each in _CALLED:
            return _CALLED[each], f"{name} is called {_CALLED[each]} here"
        if each in _ANSWERED:
            return "", f"{name}: {_ANSWERED[each]}"
    return "", ""
