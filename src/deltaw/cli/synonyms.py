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
    Meaning("learning_rate learning_rates base_lr max_lr", "lr"),
    Meaning("lora_r lora_rank r lora_dim adapter_rank", "rank"),
    Meaning("lora_alpha adapter_alpha", "alpha"),
    Meaning("lora_scale", "alpha", "the scale is α/r: mlx-lm's scale times --rank is --alpha"),
    Meaning("lora_dropout adapter_dropout", "dropout"),
    Meaning(
        "lora_target_modules lora_target target_modules lora_modules lora_attn_modules", "targets", "q,v or all-linear"
    ),
    Meaning("lora_target_linear target_linear", "targets", "all-linear, which is the default"),
    Meaning("num_layers lora_layers", "targets", "globs name layers: 'model.layers.2[4-9].*'"),
    Meaning("modules_to_save lora_modules_to_save additional_target", "whole"),
    Meaning("use_rslora rslora", "scaling", "alpha/sqrt(r)"),
    Meaning("init_lora_weights init_method", "init"),
    Meaning("use_dora dora peft_use_dora", "method", "dora"),
    Meaning("finetuning_type fine_tune_type peft_type adapter_type training_type", "method"),
    Meaning("loraplus_lr_ratio loraplus_ratio lora_plus_ratio", "lr_ratio"),
    Meaning(
        "output_dir output save_dir save_path logging_dir run_name checkpoint_dir default_root_dir html report", "out"
    ),
    Meaning("overwrite_output_dir overwrite_output force", "overwrite"),
    Meaning("batch_size train_batch_size global_batch_size total_batch_size effective_batch_size", "batch", _BATCH),
    Meaning("per_device_train_batch_size per_gpu_train_batch_size device_train_microbatch_size", "micro_batch", _BATCH),
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
    Meaning("num_train_epochs num_epochs n_epochs max_epochs epoch", "epochs"),
    Meaning("max_steps iters train_iters num_steps max_iters num_train_steps training_steps", "steps"),
    Meaning("max_time max_train_time time_limit", "minutes"),
    Meaning(
        "max_seq_length max_seq_len seq_len sequence_len seq_length cutoff_len model_max_length block_size context_length",
        "max_length",
    ),
    Meaning("truncation truncation_mode overlong", "too_long"),
    Meaning(
        "warmup_ratio warmup_steps num_warmup_steps warmup_iters lr_warmup",
        "warmup",
        "a share of the run below 1, steps from 1 on",
    ),
    Meaning("lr_scheduler_type lr_scheduler lr_schedule scheduler scheduler_type lr_decay_style", "schedule"),
    Meaning("optim optimizer_type optimizer_name", "optimizer"),
    Meaning("wd decay l2", "weight_decay"),
    Meaning("max_grad_norm gradient_clipping gradient_clip_val grad_clip clip_grad max_norm", "clip"),
    Meaning(
        "adam_beta1 adam_beta2 adam_epsilon beta1 beta2 eps betas",
        None,
        "the optimizer's other settings are PyTorch's defaults",
    ),
    Meaning(
        "bf16 fp16 fp32 half torch_dtype precision mixed_precision compute_dtype model_dtype pure_bf16",
        "dtype",
        "bfloat16, float16 or float32; auto by default",
    ),
    Meaning("tf32", None, "--dtype chooses the precision"),
    Meaning(
        "load_in_4bit load_in_8bit quantization_bit quantize quantization bits bnb_4bit_quant_type "
        "bnb_4bit_compute_dtype use_qlora qlora",
        None,
        "give as MODEL a checkpoint that bitsandbytes or torchao has quantised, and it is trained on as it is",
    ),
    Meaning("device_map use_cpu no_cuda cpu cuda gpu accelerator", "device", "cpu or cuda; auto by default"),
    Meaning(
        "num_gpus nproc_per_node devices deepspeed fsdp ddp_find_unused_parameters tensor_parallel",
        None,
        "training runs on one device so far",
    ),
    Meaning(
        "packing sample_packing eval_packing pad_to_sequence_len neat_packing",
        None,
        "rows are sorted by length instead, so that few tokens are padding; --batch-tokens bounds a batch by tokens",
    ),
    Meaning("group_by_length", None, "rows are always grouped by length, with other neighbours in each epoch"),
    Meaning(
        "dataloader_num_workers num_workers preprocessing_num_workers num_proc dataset_num_proc",
        None,
        "records are encoded once, before the first step",
    ),
    Meaning(
        "report_to log_to wandb_project wandb logger log_with tracker",
        None,
        "RUN/log.jsonl has every event, and RUN/report.html shows them",
    ),
    Meaning("logging_steps log_interval steps_per_report log_every_n_steps logging_freq", "log_every"),
    Meaning(
        "eval_steps evaluation_steps eval_interval steps_per_eval eval_freq val_interval eval_every_n_steps",
        "eval_every",
    ),
    Meaning(
        "eval_strategy evaluation_strategy do_eval do_train",
        None,
        "held-out records are scored by themselves; --eval-every sets after how many steps",
    ),
    Meaning(
        "save_steps save_interval save_freq save_every_n_steps checkpoint_interval steps_per_save",
        "save_every",
        "steps; by default a state is kept as often as a fraction of 1% of the time allows",
    ),
    Meaning(
        "save_strategy save_total_limit save_only_model save_safetensors load_best_model_at_end",
        None,
        "two states are kept to resume from; with --patience the adapter is that of the best evaluation",
    ),
    Meaning("metric_for_best_model greater_is_better", None, "--patience goes by the held-out loss"),
    Meaning("early_stopping_patience early_stopping", "patience"),
    Meaning(
        "resume_from_checkpoint resume_from load_checkpoint auto_resume_from_checkpoints resume_adapter_file",
        "resume",
        "the run's folder",
    ),
    Meaning("adapter_name_or_path peft_model_id init_adapter", "start", "the adapter that the run begins with"),
    Meaning("lora_path lora_model_dir lora_dir adapter_path adapter_dir adapters lora_weights peft_model", "adapter"),
    Meaning(
        "model_name_or_path model_name base_model model_id pretrained_model_name_or_path model_path base_model_name_or_path",
        "MODEL",
    ),
    Meaning(
        "dataset dataset_name dataset_path dataset_dir datasets train_file train_data data_path train_dataset data_files",
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
        "query_column completion_column completion_field completion_feature response_column answer_column input_key output_key "
        "field_instruction field_input field_output column_mapping columns_mapping remap_columns",
        "columns",
        "prompt=FIELD,completion=FIELD, or text=FIELD",
    ),
    Meaning("file_encoding data_encoding", "encoding"),
    Meaning("dataset_format data_format dataset_type prompt_style conversation_format", "form"),
    Meaning("chat_template prompt_template", "template"),
    Meaning("system_prompt default_system system_message", "system"),
    Meaning(
        "train_on_inputs train_on_prompt mask_prompt train_on_responses_only completion_only_loss assistant_only_loss",
        None,
        "the answers alone are taught; a text record is taught whole",
    ),
    Meaning(
        "use_gradient_checkpointing activation_checkpointing enable_activation_checkpointing grad_checkpoint gradient_checkpoint",
        "gradient_checkpointing",
    ),
    Meaning(
        "flash_attention use_flash_attn flash_attn attn_implementation xformers_attention sdp_attention",
        None,
        "attention is PyTorch's own, which chooses the fastest kernel",
    ),
    Meaning("torch_compile compile torchdynamo jit", None, "the steps are not compiled"),
    Meaning(
        "use_liger_kernel liger_kernel use_unsloth unsloth",
        None,
        "the loss and the updates have kernels of deltaw's already",
    ),
    Meaning(
        "neftune_noise_alpha label_smoothing label_smoothing_factor",
        None,
        "the loss is the paper's, −log p(y_t | x, y_<t)",
    ),
    Meaning(
        "push_to_hub hub_model_id hub_token hub_strategy",
        None,
        "nothing is uploaded by training; deltaw push uploads an adapter",
    ),
    Meaning("data_seed random_seed", "seed"),
    Meaning("max_tokens max_length_generation num_predict n_predict", "max_new_tokens"),
    Meaning("temp", "temperature"),
    Meaning(
        "top_k repetition_penalty min_p do_sample",
        None,
        "a completion is sampled with --temperature and --top-p; at temperature 0 it is the likeliest token each time",
    ),
    Meaning("num_beams beam_size", "beams"),
    Meaning("metric", "metrics"),
    Meaning("export_dir merged_model_dir save_merged", "out"),
    Meaning("cache_dir hub_cache", None, "the hub's cache is where HF_HOME says"),
)
_BY_NAME = {name: meaning for meaning in _TABLE for name in meaning.names.split()}


def answer(name: str, known: Collection[str], shown: Callable[[str], str]) -> str:
    """Return what a name of other tools is here, as the end of a sentence; "" where that is not known.

    known: the settings that there are, and arguments in capitals. shown: how one of them is written here: `lr`, or `--lr`.

    >>> answer("learning-rate", {"lr"}, "--{}".format)
    ': it is --lr here'
    >>> answer("tf32", {"dtype"}, "--{}".format)
    ': there is none; --dtype chooses the precision'
    """
    meaning = _BY_NAME.get(name.replace("-", "_").lower())
    if meaning is None or (meaning.setting is not None and meaning.setting not in known):
        return ""
    if meaning.setting is None:
        return f": there is none; {meaning.note}"
    if meaning.setting.isupper() and shown(meaning.setting) != meaning.setting.lower():
        return f": {meaning.setting} stands by itself, without a flag"
    note = f" ({meaning.note})" if meaning.note else ""
    return f": it is {shown(meaning.setting)} here{note}"
