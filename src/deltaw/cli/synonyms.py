"""Names that other tools have for a setting, and what it is here: for flags and YAML keys that deltaw does not have.

Names are those of transformers' TrainingArguments, PEFT, TRL, Unsloth, LLaMA-Factory, axolotl, torchtune and mlx-lm.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple


class Meaning(NamedTuple):
    """Meaning of a name of another tool."""

    names: str
    """The names, with blanks."""
    setting: str | None
    """The setting; an argument in capitals; None where there is none."""
    note: str = ""
    """A thing to mind; where there is no setting, the whole answer."""


_BATCH = "--batch is the whole batch of a step, on one device; --micro-batch is the part of it that is computed at once"
_TABLE = (
    Meaning("learning_rate learning_rates base_lr max_lr lr0 init_lr peak_lr learning_rate_multiplier", "lr"),
    Meaning("lora_r lora_rank r lora_dim adapter_rank max_lora_rank", "rank"),
    Meaning("lora_alpha adapter_alpha", "alpha"),
    Meaning("lora_scale", "alpha", "the scale is α/r: mlx-lm's scale times --rank is --alpha"),
    Meaning("lora_dropout adapter_dropout lora_drop", "dropout"),
    Meaning(
        "lora_target_modules lora_target target_modules lora_modules lora_attn_modules", "targets", "q,v or all-linear"
    ),
    Meaning("lora_target_linear target_linear", "targets", "all-linear, which is the default"),
    Meaning(
        "num_layers lora_layers layers_to_transform layers_pattern freeze_trainable_layers exclude_modules "
        "finetune_language_layers finetune_vision_layers finetune_attention_modules finetune_mlp_modules",
        "targets",
        "globs name layers: 'model.layers.2[4-9].*'",
    ),
    Meaning("modules_to_save lora_modules_to_save additional_target unfrozen_parameters save_modules", "whole"),
    Meaning("use_rslora rslora use_rs_lora", "scaling", "alpha/sqrt(r)"),
    Meaning("init_lora_weights init_method lora_init pissa_init pissa_iter loftq_config eva_config", "init"),
    Meaning("use_dora dora peft_use_dora", "method", "dora"),
    Meaning("finetuning_type fine_tune_type peft_type adapter_type training_type", "method"),
    Meaning("loraplus_lr_ratio loraplus_ratio lora_plus_ratio lora_plus", "lr_ratio"),
    Meaning(
        "output_dir output save_dir save_path logging_dir run_name checkpoint_dir default_root_dir out_dir output_path "
        "output_file outfile lora_out result_dir model_dir project_name suffix wandb_name wandb_run_id html report",
        "out",
    ),
    Meaning("overwrite_output_dir overwrite_output force exist_ok", "overwrite"),
    Meaning(
        "batch_size train_batch_size global_batch_size total_batch_size effective_batch_size train_bs bs "
        "batch_size_training",
        "batch",
        _BATCH,
    ),
    Meaning(
        "per_device_train_batch_size per_gpu_train_batch_size device_train_microbatch_size batch_size_per_device "
        "device_batch_size",
        "micro_batch",
        _BATCH,
    ),
    Meaning("microbatch_size micro_batch_size", "micro_batch", _BATCH),
    Meaning(
        "per_device_eval_batch_size eval_batch_size",
        None,
        "held-out records are scored in batches of --batch, or more where that is small",
    ),
    Meaning(
        "gradient_accumulation_steps grad_accumulation_steps accumulate_grad_batches gradient_accumulation",
        None,
        f"{_BATCH}: 4 times 8 is --batch 32 --micro-batch 4",
    ),
    Meaning("max_tokens_per_batch tokens_per_batch batch_max_tokens", "batch_tokens"),
    Meaning("num_train_epochs num_epochs n_epochs max_epochs epoch train_epochs", "epochs"),
    Meaning(
        "max_steps iters train_iters num_steps max_iters num_train_steps training_steps total_steps num_training_steps "
        "train_steps n_steps max_train_steps max_steps_per_epoch adam_iter num_iterations",
        "steps",
    ),
    Meaning("max_time max_train_time time_limit", "minutes"),
    Meaning(
        "max_seq_length max_seq_len seq_len sequence_len seq_length cutoff_len model_max_length block_size context_length "
        "max_prompt_length max_completion_length max_target_length max_source_length ctx_size ctx n_ctx "
        "max_position_embeddings max_len",
        "max_length",
    ),
    Meaning("truncation truncation_mode overlong excess_length_strategy", "too_long"),
    Meaning(
        "warmup_ratio warmup_steps num_warmup_steps warmup_iters lr_warmup lr_warmup_ratio lr_warmup_steps warmup_epochs",
        "warmup",
        "a share of the run below 1, steps from 1 on",
    ),
    Meaning("lr_scheduler_type lr_scheduler lr_schedule scheduler scheduler_type lr_decay_style", "schedule"),
    Meaning("optim optimizer_type optimizer_name adafactor use_8bit_adam", "optimizer"),
    Meaning("wd decay l2", "weight_decay"),
    Meaning(
        "max_grad_norm gradient_clipping gradient_clip_val grad_clip clip_grad max_norm clip_grad_norm gradient_clip",
        "clip",
    ),
    Meaning(
        "adam_beta1 adam_beta2 adam_epsilon beta1 beta2 eps betas optim_args optimizer_config momentum nesterov beta_1 "
        "beta_2",
        None,
        "the optimizer's other settings are PyTorch's defaults",
    ),
    Meaning(
        "bf16 fp16 fp32 half torch_dtype precision mixed_precision compute_dtype model_dtype pure_bf16 amp autocast "
        "bf16_full_eval fp16_full_eval upcast_layernorm outtype",
        "dtype",
        "bfloat16, float16 or float32; auto by default",
    ),
    Meaning("tf32", None, "--dtype chooses the precision"),
    Meaning(
        "load_in_4bit load_in_8bit quantization_bit quantize quantization bits bnb_4bit_quant_type bnb_4bit_compute_dtype "
        "use_qlora qlora q_bits quantizer quantization_method double_quantization use_bnb_nested_quant bnb_config "
        "bnb_4bit_use_double_quant gptq use_qat de_quantize",
        None,
        "give as MODEL a checkpoint that bitsandbytes or torchao has quantised, and it is trained on as it is",
    ),
    Meaning(
        "device_map use_cpu no_cuda cpu cuda gpu accelerator gpu_id export_device low_cpu_mem_usage lora_on_cpu "
        "n_gpu_layers ngl",
        "device",
        "cpu or cuda; auto by default",
    ),
    Meaning(
        "num_gpus nproc_per_node devices nproc world_size local_rank gpus gpu_ids num_nodes distributed "
        "ddp_find_unused_parameters ddp_backend ddp_timeout master_port",
        None,
        "start several processes with torchrun --nproc-per-node N -m deltaw train …",
    ),
    Meaning(
        "fsdp use_fsdp fsdp_config fsdp_version deepspeed zero_stage zero3 fully_shard",
        "shard",
        "full deals the frozen base out over the processes that torchrun starts",
    ),
    Meaning(
        "tensor_parallel tensor_parallel_size tp_size pipeline_parallel_size context_parallel_size",
        None,
        "the base is dealt out by --shard full alone, not by parallel products or stages",
    ),
    Meaning(
        "packing sample_packing eval_packing pad_to_sequence_len neat_packing packing_strategy padding_free "
        "pad_to_multiple_of eval_sample_packing padding",
        None,
        "rows are sorted by length instead, so that few tokens are padding; --batch-tokens bounds a batch by tokens",
    ),
    Meaning("group_by_length", None, "rows are always grouped by length, with other neighbours in each epoch"),
    Meaning(
        "dataloader_num_workers num_workers preprocessing_num_workers num_proc dataset_num_proc workers dataset_processes "
        "overwrite_cache dataset_prepared_path dataloader_pin_memory dataloader_drop_last streaming",
        None,
        "records are encoded once, before the first step",
    ),
    Meaning("report_to log_to logger log_with tracker logger_name use_wandb", "track"),
    Meaning(
        "wandb_project wandb wandb_entity wandb_log_model mlflow_tracking_uri wandb_mode comet_project tensorboard",
        None,
        "--track wandb (or tensorboard, mlflow, trackio) turns it on; its own variables, such as WANDB_PROJECT, set the rest",
    ),
    Meaning("plot_loss metric_logger", None, "RUN/log.jsonl has every event, and RUN/report.html shows them"),
    Meaning(
        "logging_steps log_interval steps_per_report log_every_n_steps logging_freq logging_strategy logging_first_step",
        "log_every",
    ),
    Meaning(
        "eval_steps evaluation_steps eval_interval steps_per_eval eval_freq val_interval eval_every_n_steps "
        "val_check_interval evals_per_epoch eval_delay",
        "eval_every",
    ),
    Meaning(
        "eval_strategy evaluation_strategy do_eval do_train",
        None,
        "held-out records are scored by themselves; --eval-every sets after how many steps",
    ),
    Meaning(
        "save_steps save_interval save_freq save_every_n_steps checkpoint_interval steps_per_save saves_per_epoch "
        "checkpoint_every",
        "save_every",
        "steps; by default a state is kept as often as a fraction of 1% of the time allows",
    ),
    Meaning(
        "save_strategy save_total_limit save_only_model save_safetensors load_best_model_at_end",
        None,
        "two states are kept to resume from; with --patience the adapter is that of the best evaluation",
    ),
    Meaning("metric_for_best_model greater_is_better", None, "--patience goes by the held-out loss"),
    Meaning("early_stopping_patience early_stopping early_stop early_stopping_threshold min_delta", "patience"),
    Meaning(
        "resume_from_checkpoint resume_from load_checkpoint auto_resume_from_checkpoints resume_adapter_file checkpoint "
        "ckpt ckpt_path checkpoint_files",
        "resume",
        "the run's folder",
    ),
    Meaning(
        "adapter_name_or_path peft_model_id init_adapter create_new_adapter lora_base",
        "start",
        "the adapter that the run begins with",
    ),
    Meaning(
        "lora_path lora_model_dir lora_dir adapter_path adapter_dir adapter_folder lora_scaled adapters lora_weights "
        "peft_model",
        "adapter",
    ),
    Meaning(
        "model_name_or_path model_name base_model model_id pretrained_model_name_or_path model_path "
        "base_model_name_or_path pretrained_model model_base base_model_config hf_model gguf_path",
        "MODEL",
    ),
    Meaning(
        "dataset dataset_name dataset_path dataset_dir datasets train_file train_data data_path train_dataset data_files "
        "training_file training_data dataset_kwargs dataset_config",
        "DATA",
    ),
    Meaning(
        "validation_file eval_dataset valid_file val_file eval_file validation_data test_datasets val_data", "valid"
    ),
    Meaning(
        "val_set_size val_size validation_split test_size val_split_fraction eval_fraction",
        "valid_share",
        "at most half of the records; --valid-most bounds their number",
    ),
    Meaning("val_batches max_eval_samples eval_limit", "valid_most"),
    Meaning("max_train_samples max_samples num_samples limit", "max_records"),
    Meaning("dataset_split train_split", "split"),
    Meaning(
        "dataset_text_field text_column text_field text_feature prompt_column prompt_field prompt_feature prompt_key "
        "query_column completion_column completion_field completion_feature response_column answer_column input_key "
        "output_key field_instruction field_input field_output column_mapping columns_mapping remap_columns label_column "
        "label_field text_column_name target_column source_column column_names",
        "columns",
        "prompt=FIELD,completion=FIELD, or text=FIELD",
    ),
    Meaning("file_encoding data_encoding", "encoding"),
    Meaning("dataset_format data_format dataset_type prompt_style conversation_format tool_format", "form"),
    Meaning("chat_template prompt_template chat_template_path enable_thinking", "template"),
    Meaning("system_prompt default_system system_message default_system_message", "system"),
    Meaning(
        "train_on_inputs train_on_prompt mask_prompt train_on_responses_only completion_only_loss assistant_only_loss "
        "response_template ignore_pad_token_for_loss",
        None,
        "the answers alone are taught; a text record is taught whole",
    ),
    Meaning(
        "use_gradient_checkpointing activation_checkpointing enable_activation_checkpointing grad_checkpoint "
        "gradient_checkpoint gradient_checkpointing_kwargs disable_gradient_checkpointing",
        "gradient_checkpointing",
    ),
    Meaning(
        "flash_attention use_flash_attn flash_attn attn_implementation xformers_attention sdp_attention attn_impl sdpa "
        "s2_attention eager_attention flash_optimum shift_attn",
        None,
        "attention is PyTorch's own, which chooses the fastest kernel",
    ),
    Meaning("torch_compile compile torchdynamo jit", None, "the steps are not compiled"),
    Meaning(
        "use_liger_kernel liger_kernel use_unsloth unsloth enable_liger_kernel use_unsloth_gc cut_cross_entropy "
        "lora_mlp_kernel lora_qkv_kernel lora_o_kernel fused fast_inference",
        None,
        "the loss and the updates have kernels of deltaw's already",
    ),
    Meaning(
        "neftune_noise_alpha label_smoothing label_smoothing_factor loss_type loss class_weights",
        None,
        "the loss is the paper's, −log p(y_t | x, y_<t)",
    ),
    Meaning(
        "push_to_hub hub_model_id hub_token hub_strategy export_hub_model_id hub_private_repo",
        None,
        "nothing is uploaded by training; deltaw push uploads an adapter",
    ),
    Meaning("data_seed random_seed random_state full_determinism deterministic", "seed"),
    Meaning(
        "max_tokens max_length_generation num_predict n_predict n_gen max_gen_tokens max_completion_tokens "
        "eval_max_new_tokens",
        "max_new_tokens",
    ),
    Meaning("temp", "temperature"),
    Meaning(
        "top_k repetition_penalty min_p do_sample repeat_penalty frequency_penalty presence_penalty",
        None,
        "a completion is sampled with --temperature and --top-p; at temperature 0 it is the likeliest token each time",
    ),
    Meaning("num_beams beam_size", "beams"),
    Meaning("metric", "metrics"),
    Meaning("export_dir merged_model_dir save_merged", "out"),
    Meaning(
        "adapter peft use_peft lora",
        "method",
        "lora, which is the default, with --rank and --alpha for its r and α; --adapter is of the commands that read one",
    ),
    Meaning(
        "vera oft adalora ia3 lisa p_tuning prompt_tuning prefix_tuning num_virtual_tokens galore use_galore use_badam "
        "use_llama_pro relora_steps full_finetuning freeze",
        "method",
        "lora, dora, bitfit, bottleneck, prefix, ia3 or full",
    ),
    Meaning(
        "rank_pattern alpha_pattern",
        "targets",
        "attention=8,mlp=4 gives layers ranks of their own; α is each one's rank by default",
    ),
    Meaning(
        "target_parameters apply_lora_to_mlp apply_lora_to_output lora_mlp lora_head lora_projection",
        "targets",
        "q,v or all-linear",
    ),
    Meaning("lora_query lora_key lora_value", "targets", "q,k,v: those that get an update"),
    Meaning("lora_bias bias", "method", "bitfit trains the biases; lora trains none"),
    Meaning(
        "trainable_token_indices special_tokens resize_vocab resize_token_embeddings_to_32x",
        "tokens",
        "ids, with commas",
    ),
    Meaning(
        "lora_parameters",
        "rank",
        "and --alpha, --dropout and --targets: each of mlx-lm's settings has a flag of its own",
    ),
    Meaning("fan_in_fan_out lora_fan_in_fan_out", None, "it is known from the layer's kind"),
    Meaning(
        "min_lr min_lr_ratio cosine_min_lr_ratio lr_end final_lr num_cycles cosine_cycles lr_scheduler_kwargs "
        "lr_quadratic_warmup",
        "schedule",
        "cosine and linear end at zero",
    ),
    Meaning("embedding_learning_rate loraplus_lr_embedding", "lr_ratio", "it is B's; embeddings train at --lr"),
    Meaning(
        "num_labels num_classes label_names class_names label2id id2label",
        "labels",
        "the names, in the order of the head's outputs",
    ),
    Meaning("problem_type task_type lora_task_type model_type", "task"),
    Meaning("stage rl", None, "train is supervised fine-tuning; preferences and rewards are not trained"),
    Meaning(
        "tokenizer tokenizer_type tokenizer_config tokenizer_name use_fast_tokenizer pad_token eos_token pad_token_id "
        "padding_side split_special_tokens do_lower_case",
        None,
        "the tokenizer is the model's, with its own special tokens",
    ),
    Meaning("mask_history train_on_last", "turns", "last: only the last answer is taught"),
    Meaning("remove_unused_columns", None, "fields that have no use are named at the start and left out"),
    Meaning(
        "shuffle shuffle_merged_datasets buffer_size group_texts", None, "each epoch has an order of its own, by --seed"
    ),
    Meaning(
        "subset config_name dataset_config_name",
        None,
        "a hub data set is loaded in its default configuration; of another one give the downloaded file",
    ),
    Meaning(
        "test test_file test_batches do_test do_predict predict_with_generate",
        None,
        "deltaw eval scores a finished adapter on a test set",
    ),
    Meaning(
        "revision model_revision",
        None,
        "the hub's main revision is taken; download another with `hf download` and give its folder",
    ),
    Meaning(
        "token hf_token use_auth_token access_token", None, "the hub's token is that of `hf auth login`, or HF_TOKEN"
    ),
    Meaning("local_files_only offline", None, "HF_HUB_OFFLINE=1 keeps every command off the network"),
    Meaning("auto_find_batch_size", "micro_batch", "deltaw plan finds the largest batch for a memory"),
    Meaning(
        "verbose quiet debug disable_tqdm log_level debug_mode", None, "a terminal shows the live view, a pipe lines"
    ),
    Meaning("ema ema_decay", None, "the adapter is that of the last step, or with --patience of the best evaluation"),
    Meaning(
        "activation_offloading enable_activation_offloading offload cpu_offload",
        "gradient_checkpointing",
        "nothing is offloaded",
    ),
    Meaning("threads threads_batch num_threads", None, "OMP_NUM_THREADS sets the threads"),
    Meaning(
        "fuse fused_model export_gguf export_legacy_format",
        None,
        "deltaw merge and deltaw export make of an adapter a whole model",
    ),
    Meaning("cache_dir hub_cache", None, "the hub's cache is where HF_HOME says"),
)
_BY_NAME = {name: meaning for meaning in _TABLE for name in meaning.names.split()}


def meaning_of(name: str) -> Meaning | None:
    """Return the meaning of a name of other tools, also of one in a group: litgpt's `train.max_seq_length`."""
    name = name.replace("-", "_").lower()
    return _BY_NAME.get(name) or _BY_NAME.get(name.rpartition(".")[2])


COMMANDS = {
    word: command
    for words, command in {
        "sft finetune fine_tune fit tune lora qlora": "train", "fuse merge_and_unload merge_lora merge_adapter": "merge",
        "inference infer predict complete run sample": "generate", "evaluate test score benchmark": "eval",
        "quantize gguf": "export", "upload publish": "push", "preprocess dataset stats": "data", "info show": "inspect",
    }.items()
    for word in words.split()
}  # fmt: skip
"""Commands of other tools → what they are here."""


def answer(name: str, known: Collection[str], shown: Callable[[str], str]) -> str:
    """Return what a name of other tools is here, as the end of a sentence; "" where that is not known.

    known: the settings that there are, and arguments in capitals. shown: how one of them is written here: `lr`, or `--lr`.

    >>> answer("learning-rate", {"lr"}, "--{}".format)
    ': it is --lr here'
    >>> answer("tf32", {"dtype"}, "--{}".format)
    ': there is none; --dtype chooses the precision'
    """
    meaning = meaning_of(name)
    if meaning is None or (meaning.setting is not None and meaning.setting not in known):
        return ""
    if meaning.setting is None:
        return f": there is none; {meaning.note}"
    if meaning.setting.isupper() and shown(meaning.setting) != meaning.setting.lower():
        return f": {meaning.setting} stands by itself, without a flag"
    note = f" ({meaning.note})" if meaning.note else ""
    return f": it is {shown(meaning.setting)} here{note}"
