"""docs/migrating.md names every flag of the scripts, and fields that exist."""

import re
from pathlib import Path

from dreambooth_jax.runs.config import FIELDS

PAGE = (Path(__file__).parent.parent / "docs" / "migrating.md").read_text()
# Of both scripts, in the order of their parsers.
FLAGS = """
pretrained_model_name_or_path revision variant tokenizer_name instance_data_dir class_data_dir instance_prompt
class_prompt with_prior_preservation prior_loss_weight num_class_images output_dir seed resolution center_crop
train_text_encoder train_batch_size sample_batch_size num_train_epochs max_train_steps checkpointing_steps
checkpoints_total_limit resume_from_checkpoint gradient_accumulation_steps gradient_checkpointing learning_rate scale_lr
lr_scheduler lr_warmup_steps lr_num_cycles lr_power use_8bit_adam dataloader_num_workers adam_beta1 adam_beta2
adam_weight_decay adam_epsilon max_grad_norm push_to_hub hub_token hub_model_id logging_dir allow_tf32 report_to
validation_prompt num_validation_images validation_steps validation_epochs mixed_precision prior_generation_precision
local_rank enable_xformers_memory_efficient_attention set_grads_to_none offset_noise snr_gamma
pre_compute_text_embeddings tokenizer_max_length text_encoder_use_attention_mask skip_save_text_encoder
validation_images class_labels_conditioning validation_scheduler rank lora_dropout image_interpolation_mode
"""


def test_every_flag_has_its_row():
    rows = re.findall(r"^\| (`--.*?) \|", PAGE, re.MULTILINE)
    assert sorted(flag for row in rows for flag in re.findall(r"--(\w+)", row)) == sorted(FLAGS.split())


def test_every_field_exists_and_no_flag_is_named_twice():
    rows = re.findall(r"^\| (`--.*?) \|(.*?)\|(.*)\|$", PAGE, re.MULTILINE)
    flags = [flag for row in rows for flag in re.findall(r"--\w+", row[0])]
    fields = {field for row in rows for field in re.findall(r"`(\w+)`", row[1])}
    assert len(flags) == len(set(flags)) > 60
    assert fields <= FIELDS.keys()
    assert {field for field in re.findall(r"--config\.(\w+)", PAGE) if field != "FIELD"} <= FIELDS.keys()
    assert all(field.strip() or text.strip() for _, field, text in rows)
