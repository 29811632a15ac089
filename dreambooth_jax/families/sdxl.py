"""Stable Diffusion XL (arXiv 2307.01952): two text towers; sizes and crop of each picture are conditions.

States are the penultimate ones of both towers, side by side; the pooled embedding is the second tower's, at the first
end token. transformers pools at the largest id when `eos_token_id` is 2, which differs for added tokens alone.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from dreambooth_jax.families import sd
from dreambooth_jax.families.family import TEXT, Cond, Models, Part, Pictures
from dreambooth_jax.files.tokenizer import Tokenizer, padded_ids
from dreambooth_jax.models.clip_text import CLIPTextModel, CLIPTextModelWithProjection, CLIPTextSpec
from dreambooth_jax.models.params import Params

SIZES = 6  # numbers in the size condition


def _after_penultimate(spec: CLIPTextSpec) -> str:
    """The layers of the first tower that come after the states that are read."""
    return rf"text_model\.(?:final_layer_norm\.|encoder\.layers\.{spec.num_hidden_layers - 1}\.)"


def problems(models: Models) -> list[str]:
    """What does not fit between text encoders, UNet and autoencoder."""
    unet, found = models.specs["unet"], sd.latent_problems(models)
    first, second = models.specs["text_encoder"], models.specs["text_encoder_2"]
    width = first.hidden_size + second.hidden_size
    if {width} != set(unet.cross_attention_dim):
        found.append(f"text encoders of width {width} in all, UNet cross_attention_dim {unet.cross_attention_dim}")
    if unet.addition_embed_type != "text_time":
        return [*found, f"UNet addition_embed_type = {unet.addition_embed_type!r} (implemented: 'text_time')"]
    given = second.projection_dim + SIZES * unet.addition_time_embed_dim
    if given != unet.projection_class_embeddings_input_dim:
        wanted = unet.projection_class_embeddings_input_dim
        found.append(f"pooled text and sizes of width {given}, projection_class_embeddings_input_dim = {wanted}")
    return found


def token_shapes(models: Models, count: int) -> dict[str, jax.ShapeDtypeStruct]:
    lengths = {"ids": models.specs["text_encoder"].max_length, "ids_2": models.specs["text_encoder_2"].max_length}
    shapes = {name: jax.ShapeDtypeStruct((count, length), jnp.int32) for name, length in lengths.items()}
    return shapes | {"end": jax.ShapeDtypeStruct((count,), jnp.int32)}


def tokenize(tokenizers: Mapping[str, Tokenizer], texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Ids for each tower, padded with its tokenizer's own token, and the position of the first end token."""
    first, second = tokenizers["tokenizer"], tokenizers["tokenizer_2"]
    ids = padded_ids(second, texts)
    end = np.argmax(ids == second.eos_token_id, axis=1).astype(np.int32)
    return {"ids": padded_ids(first, texts), "ids_2": ids, "end": end}


def encode_text(models: Models, params: Params, tokens: Cond) -> Cond:
    """The states that the UNet attends to, and the pooled embedding."""
    first = models.apply("text_encoder", params, tokens["ids"], method="penultimate")
    second, pooled = models.apply("text_encoder_2", params, tokens["ids_2"], tokens["end"])
    return {"states": jnp.concatenate([first, second], -1), "pooled": pooled}


def of_example(models: Models, pictures: Pictures) -> Cond:
    """Original size, crop corner and target size of each picture (section 2.2)."""
    numbers = (pictures.original, pictures.crop, pictures.target)
    return {"sizes": jnp.concatenate(numbers, -1).astype(jnp.float32)}


def negative(models: Models, cond: Cond, empty: Bool[Array | np.ndarray, "b"]) -> Cond:
    """Zeros for an empty negative prompt, unless the folder says `force_zeros_for_empty_prompt: false`."""
    if not models.configs["index"].get("force_zeros_for_empty_prompt", True):
        return cond
    return jax.tree.map(lambda x: jnp.where(empty.reshape(-1, *(1,) * (x.ndim - 1)), jnp.zeros_like(x), x), cond)


def predict(models: Models, params: Params, xt: Array, t: Array, cond: Cond) -> Array:
    return with_deep(models, params, xt, t, cond, None)[0]


def with_deep(
    models: Models, params: Params, xt: Array, t: Array, cond: Cond, deep: Array | None
) -> tuple[Array, Array]:
    arguments = (deep, xt, t, cond["states"], None, cond["pooled"], cond["sizes"])
    return models.apply("unet", params, *arguments, method="with_deep")


FAMILY = sd.FAMILY._replace(
    name="StableDiffusionXLPipeline",
    parts={
        "unet": sd.UNET,
        "vae": sd.VAE,
        "text_encoder": Part(CLIPTextSpec.from_config, CLIPTextModel, sd.TRANSFORMERS_FILE, TEXT, _after_penultimate),
        "text_encoder_2": Part(CLIPTextSpec.from_config, CLIPTextModelWithProjection, sd.TRANSFORMERS_FILE, TEXT),
    },
    tokenizers={"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2"},
    problems=problems,
    token_shapes=token_shapes,
    tokenize=tokenize,
    encode_text=encode_text,
    predict=predict,
    with_deep=with_deep,
    shares_input=False,  # the pooled text joins the embedding of time
    guidance=5.0,
    of_example=of_example,
    negative=negative,
)
