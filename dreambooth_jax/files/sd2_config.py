"""What SD 2.x single files predict, noise or velocity: their weights are of one form."""

import re
from pathlib import Path

import numpy as np
from safetensors import safe_open

_BIAS = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
_SPREAD = 0.09  # ComfyUI's limit


def is_of_velocity(path: Path) -> bool:
    """Whether the model in a file predicts the velocity: by the .yaml beside it (A1111's rule), else by its metadata
    (ModelSpec), else by the spread of a bias (ComfyUI's rule)."""
    config = path.with_suffix(".yaml")
    if config.is_file():
        return re.search(r"parameterization:\s*[\"']?v\b", config.read_text(errors="replace")) is not None
    with safe_open(path, "numpy") as file:
        if stated := (file.metadata() or {}).get("modelspec.prediction_type"):
            return stated == "v"
        bias = np.asarray(file.get_tensor(_BIAS) if _BIAS in set(file.keys()) else 0.0, np.float64)
    return float(bias.std()) > _SPREAD


V_YAML = """\
# For A1111 and others that look for a config beside the file: Stable Diffusion 2.x, v-prediction.
model:
  base_learning_rate: 1.0e-4
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    parameterization: "v"
    linear_start: 0.00085
    linear_end: 0.0120
    num_timesteps_cond: 1
    log_every_t: 200
    timesteps: 1000
    first_stage_key: "jpg"
    cond_stage_key: "txt"
    image_size: 64
    channels: 4
    cond_stage_trainable: false
    conditioning_key: crossattn
    monitor: val/loss_simple_ema
    scale_factor: 0.18215
    use_ema: False
    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params:
        use_checkpoint: True
        use_fp16: True
        image_size: 32
        in_channels: 4
        out_channels: 4
        model_channels: 320
        attention_resolutions: [ 4, 2, 1 ]
        num_res_blocks: 2
        channel_mult: [ 1, 2, 4, 4 ]
        num_head_channels: 64
        use_spatial_transformer: True
        use_linear_in_transformer: True
        transformer_depth: 1
        context_dim: 1024
        legacy: False
    first_stage_config:
      target: ldm.models.autoencoder.AutoencoderKL
      params:
        embed_dim: 4
        monitor: val/rec_loss
        ddconfig:
          double_z: true
          z_channels: 4
          resolution: 256
          in_channels: 3
          out_ch: 3
          ch: 128
          ch_mult: [ 1, 2, 4, 4 ]
          num_res_blocks: 2
          attn_resolutions: []
          dropout: 0.0
        lossconfig:
          target: torch.nn.Identity
    cond_stage_config:
      target: ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder
      params:
        freeze: True
        layer: "penultimate"
"""
