"""What other trainers call the keys and values of a recipe: the words that somebody who knows them types first.

From transformers' TrainingArguments, TRL, peft, axolotl and LLaMA-Factory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from selectkd.config.keys import keys

TEACHERS = "The teacher's model stands in teacher.model."
SHARE = "It is a share of the steps: warm-up steps divided by all steps."
PRECISION = "It takes auto, bf16, bf16-pure, fp32 or tf32; there is no fp16."
EVALUATION = "It is a share of the text, such as 0.05, or {path: FILE}."
LENGTH = "It counts prompt and completion together."
SOURCES = "It is a list: [{path: FILE}]."
STEPS = "It is a number of steps."
GRADIENTS = "It counts micro-batches in one optimizer step."
QUANTIZED = (
    "It takes bitsandbytes-4bit or bitsandbytes-8bit; a student takes bitsandbytes-4bit, in student.quantization, with "
    "training.lora."
)
RESUME = "A run whose folder it names goes on by itself; `selectkd train --resume PATH` names a checkpoint."
BETAS = "It is a list of two: [0.9, 0.999]."
JSD = "It weighs rejected tokens; Jensen-Shannon's beta goes into divergence: {name: generalized_jsd, beta: 0.5}."

WORDS: Mapping[str, tuple[str, str]] = {
    word: (key, note)
    for key, note, words in (
        ("student.model", TEACHERS,
         "model base_model model_name model_name_or_path student_model student_name_or_path"),
        ("teacher.model", "", "teacher_model teacher_model_name_or_path teacher_name_or_path kd_teacher ref_model"),
        ("student.revision", "", "model_revision revision_of_model"),
        ("student.attn_implementation", "",
         "attn_implementation attn_impl flash_attn flash_attention use_flash_attention_2"),
        ("teacher.quantization", QUANTIZED,
         "load_in_4bit load_in_8bit quantization quantization_bit quantization_config"),
        ("student.quantization.type", "", "bnb_4bit_quant_type quant_type bnb_4bit_type"),
        ("student.quantization.double", "", "bnb_4bit_use_double_quant double_quant double_quantization"),
        ("student.quantization.compute_dtype", "", "bnb_4bit_compute_dtype"),
        ("training.fake_quantization", "It takes q8_0, q4_0, int8 or int4.", "qat quantization_aware fake_quant"),
        ("data.sources", SOURCES,
         "dataset datasets dataset_name dataset_path train_dataset train_file train_data data_path"),
        ("data.sources.N.format", "", "type dataset_type"),
        ("data.sources.N.split", "", "dataset_split train_split dataset_train_split"),
        ("data.sources.N.config", "", "dataset_config dataset_config_name"),
        ("data.sources.N.limit", "", "max_samples max_train_samples"),
        ("data.evaluation", EVALUATION,
         "val_set_size val_size eval_dataset test_datasets validation_file validation_split test_size "
         "eval_file eval_data"),
        ("data.packing", "", "sample_packing pack"),
        ("data.bucket", "", "group_by_length length_grouped"),
        ("data.chat_template", "", "template chat_template_path"),
        ("data.template_arguments", "", "chat_template_kwargs"),
        ("data.train_on", "It takes completion or all.",
         "train_on_inputs train_on_prompt completion_only_loss assistant_only_loss train_on_completions_only "
         "mask_prompt"),
        ("data.max_new_tokens", "", "max_completion_length generation_max_length max_new_tokens"),
        ("data.policy.probability", "It goes into data.policy: {name: student, probability: 0.5}.",
         "lmbda lambda on_policy on_policy_fraction student_data_fraction"),
        ("method", "Sequence-level distillation is method: seqkd.",
         "seq_kd seqkd distillation_method kd_method algorithm"),
        ("objective", "", "loss kd distillation distill loss_config"),
        ("objective.divergence", "", "loss_type kd_loss kd_loss_type divergence_type criterion"),
        ("objective.divergence", "It is a parameter of the divergence: {name: skew_kl, alpha: 0.1}.",
         "skew skew_alpha alpha"),
        ("objective.beta", JSD, "beta rejected_weight"),
        ("objective.temperature", "The temperature of written text is data.policy.temperature.",
         "temperature kd_temperature distillation_temperature temp"),
        ("objective.language_model", "It adds cross-entropy at this weight; the divergence counts 1.",
         "ce_weight kd_ce_alpha kd_alpha alpha_ce sft_weight lm_weight"),
        ("objective.reduction", "", "loss_reduction average_tokens_across_devices"),
        ("training", "", "train trainer training_args training_arguments args hyperparameters"),
        ("training.output_dir", "", "out_dir save_dir run_dir output output_path"),
        ("training.output_dir", RESUME,
         "resume_from_checkpoint resume overwrite_output_dir auto_resume_from_checkpoints"),
        ("training.seed", "", "data_seed random_seed"),
        ("training.max_steps", "", "steps num_steps total_steps num_training_steps train_steps max_train_steps"),
        ("training.epochs", "", "num_train_epochs num_epochs n_epochs epoch max_epochs"),
        ("training.learning_rate", "", "lr peak_lr max_lr base_lr"),
        ("training.schedule", "It takes cosine, linear or constant.", "lr_scheduler lr_scheduler_type scheduler"),
        ("training.warmup_ratio", SHARE, "warmup_steps warmup num_warmup_steps lr_warmup_steps"),
        ("training.optimizer", "", "optim optimizer_type"),
        ("training.betas", BETAS, "adam_beta1 adam_beta2 beta1 beta2 optim_beta1"),
        ("training.eps", "", "adam_epsilon epsilon adam_eps"),
        ("training.weight_decay", "", "wd decay"),
        ("training.max_grad_norm", "", "gradient_clipping grad_clip clip_grad max_norm gradient_clip_val"),
        ("training.batch_size", "It counts one micro-batch on one device.",
         "per_device_train_batch_size train_batch_size micro_batch_size per_gpu_train_batch_size"),
        ("training.batch_size", "Evaluation takes as many sequences as training.",
         "per_device_eval_batch_size eval_batch_size"),
        ("training.gradient_accumulation", GRADIENTS,
         "gradient_accumulation_steps grad_accum accumulate_grad_batches"),
        ("training.max_length", LENGTH,
         "max_seq_length max_seq_len sequence_len cutoff_len model_max_length seq_length context_length "
         "block_size"),
        ("training.precision", PRECISION,
         "dtype torch_dtype bf16 fp16 tf32 fp32 float16 bfloat16 float32 half mixed_precision"),
        ("training.lora", "It is a mapping: {r: 16, alpha: 128}.",
         "peft peft_config lora_config use_peft use_lora adapter adapters finetuning_type"),
        ("training.lora.r", "", "lora_r lora_rank rank"),
        ("training.lora.alpha", "", "lora_alpha"),
        ("training.lora.dropout", "", "lora_dropout"),
        ("training.lora.target_modules", "", "lora_target_modules lora_target target_modules lora_target_linear"),
        ("training.gradient_checkpointing", "", "activation_checkpointing use_gradient_checkpointing checkpointing"),
        ("training.activation_offload", "", "activation_offloading offload_activations"),
        ("training.save_every", STEPS, "save_steps save_strategy save_interval saves_per_epoch checkpoint_every"),
        ("training.keep", "", "save_total_limit keep_last max_checkpoints"),
        ("training.evaluate_every", STEPS,
         "eval_steps eval_strategy evaluation_strategy eval_interval evals_per_epoch eval_every"),
        ("training.early_stopping.patience", "It counts evaluations.", "early_stopping_patience patience"),
        ("training.log_every", STEPS, "logging_steps log_interval logging_interval log_steps"),
        ("training.report_to", "It is a list: [wandb].", "wandb use_wandb wandb_project loggers logger tensorboard"),
        ("training.compile_loss", "", "torch_compile compile"),
        ("training.sharding", "It is a mapping; {} shards over all ranks.",
         "fsdp fsdp_config deepspeed deepspeed_config zero_stage ddp"),
    )
    for word in words.split()
}  # fmt: skip
"""{word: (our key, a sentence where it means something else there)}."""

REMOVED: Mapping[str, str] = {
    "engine": " Leave it out: every run trains by the Trainer of transformers.",
}
"""{key of an earlier version: what to do without it}."""

VALUES: Mapping[str, str] = {
    "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw", "adamw_bnb_8bit": "adamw_8bit",
    "bfloat16": "bf16", "float16": "bf16", "fp16": "bf16", "half": "bf16", "mixed": "bf16", "float32": "fp32",
    "cosine_with_restarts": "cosine", "cosine_with_min_lr": "cosine", "constant_with_warmup": "constant",
    "mean": "token_mean", "assistant": "completion",
}  # fmt: skip
"""{value of another trainer: ours}, for whichever key takes it."""


def instead(path: Sequence[str | int]) -> str:
    """' Write KEY.' with what is different there, for a key that is none; '' where no other trainer has the word.
    A key of an earlier version is named with what stands in its place.

    >>> instead(["training", "warmup_steps"])
    ' Write training.warmup_ratio. It is a share of the steps: warm-up steps divided by all steps.'
    >>> instead(["learning_rate"])
    ' It belongs at training.learning_rate.'
    """
    word = str(path[-1]).replace("-", "_").lower()
    if word in REMOVED:
        return REMOVED[word]
    if word in WORDS:
        key, note = WORDS[word]
        return f" Write {key}." + (f" {note}" if note else "")
    depth = {
        key: len([step for step in key.split(".") if step != "N"])
        for key in keys()
        if key.split(".")[-1] == word
    }
    found = [key for key in depth if depth[key] == min(depth.values())]
    return f" It belongs at {' or '.join(found)}." if 0 < len(found) < 4 else ""
