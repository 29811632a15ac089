"""The name table of LDM single files: the module names of diffusers and transformers -> those of the original code.

Names are those of modules or tensors within their model, such as "down_blocks.0.resnets.1.conv1". What the tables list
was compared with diffusers' conversion script for SD 1.5 and 2.1 (tests).
"""

import re
from collections.abc import Callable, Iterable

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = (
    (r"^text_model\.embeddings\.token_embedding", "token_embedding"),
    (r"^text_model\.embeddings\.position_embedding(\.\w+)?$", "positional_embedding"),
    (r"^text_model\.final_layer_norm", "ln_final"),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"\.layer_norm([12])", r".ln_\1"),
    (r"\.self_attn\.out_proj", ".attn.out_proj"),
    (r"\.mlp\.fc1", ".mlp.c_fc"),
    (r"\.mlp\.fc2", ".mlp.c_proj"),
)


def _replace_head(name: str, table: dict[str, str]) -> str:
    head = next((key for key in table if name == key or name.startswith(f"{key}.")), None)
    return name if head is None else table[head] + name.removeprefix(head)


def unet_names(names: Iterable[str]) -> Callable[[str], str]:
    """The table of a UNet whose modules or tensors are called `names`: name -> LDM name."""
    names = list(names)
    blocks = [found.groups() for name in names if (found := re.match(r"down_blocks\.(\d+)\.resnets\.(\d+)", name))]
    layers = 1 + max((int(layer) for _, layer in blocks), default=0)
    crossing = {found[1] for name in names if (found := re.match(r"up_blocks\.(\d+)\.attentions", name))}

    def block(found: re.Match) -> str:
        side, i, kind, j = found.groups()
        if side == "down":
            number = (layers + 1) * (int(i) + 1) if kind == "downsamplers" else (layers + 1) * int(i) + int(j) + 1
            return f"input_blocks.{number}.{int(kind == 'attentions')}"
        if kind == "upsamplers":
            return f"output_blocks.{(layers + 1) * int(i) + layers}.{1 + (i in crossing)}"
        return f"output_blocks.{(layers + 1) * int(i) + int(j)}.{int(kind == 'attentions')}"

    def rename(name: str) -> str:
        kinds = "resnets|attentions|downsamplers|upsamplers"
        renamed = re.sub(rf"^(down|up)_blocks\.(\d+)\.({kinds})\.(\d+)", block, _replace_head(name, _UNET))
        if ".resnets." in name:
            head, inner = re.match(r"(\w+\.\d+(?:\.\d+)?)\.(.*)", renamed).groups()
            return f"{head}.{_replace_head(inner, _RESNET)}"
        return re.sub(r"\.conv(?=\.|$)", ".op", renamed) if ".downsamplers." in name else renamed

    return rename


def vae_names(names: Iterable[str]) -> Callable[[str], str]:
    """The table of an autoencoder whose modules or tensors are called `names`: name -> LDM name."""
    last = max((int(found[1]) for name in names if (found := re.match(r"decoder\.up_blocks\.(\d+)", name))), default=0)
    rules = (
        (r"down_blocks\.(\d+)\.resnets", lambda m: f"down.{m[1]}.block"),
        (r"down_blocks\.(\d+)\.downsamplers\.0", lambda m: f"down.{m[1]}.downsample"),
        (r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{last - int(m[1])}.block"),
        (r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample"),
        (r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}"),
        (r"mid_block\.attentions\.0\.(.*)", lambda m: f"mid.attn_1.{_replace_head(m[1], _VAE_ATTENTION)}"),
        (r"conv_norm_out", lambda m: "norm_out"),
        (r"conv_shortcut", lambda m: "nin_shortcut"),
    )

    def rename(name: str) -> str:
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        return name

    return rename


def open_clip_name(name: str) -> str:
    """A tensor or module of transformers' CLIP text model -> open_clip's; q, k and v have no name there."""
    for pattern, new in _OPEN_CLIP:
        name = re.sub(pattern, new, name)
    return name
