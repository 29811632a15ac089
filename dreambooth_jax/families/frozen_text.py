"""Text encoders that are never trained: run once for all prompts, and gone from the devices before anything else comes.

T5-XXL takes 9 GiB in bfloat16, its states of one prompt 0.6 MiB.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from dreambooth_jax.devices.sharding import placed_shapes, replicated, replicated_shapes
from dreambooth_jax.families.family import TEXT, Cond, Models
from dreambooth_jax.families.pipeline import Pipeline, read_params
from dreambooth_jax.files.tokenizer import Tokenizer
from dreambooth_jax.models.params import Params

PROMPTS = 4  # encoded at a time


def with_cached_text(pipeline: Pipeline, mesh: Mesh, prompts: Sequence[str] = ()) -> Pipeline:
    """The pipeline without its text encoders: `tokenize` gives the conditions of texts, from a cache on the host. The
    same pipeline, if its family's text encoders may train.

    A text that is not in the cache makes it read the encoders, split over the mesh, and encode this text and `prompts`.
    """
    family, text = pipeline.family, pipeline.family.names(TEXT)
    if family.trains_text:
        return pipeline
    cache: dict[str, dict[str, np.ndarray]] = {}

    def tokenize(tokenizers: Mapping[str, Tokenizer], texts: Sequence[str]) -> dict[str, np.ndarray]:
        missing = [text for text in dict.fromkeys([*texts, *prompts]) if text not in cache]
        if missing:
            cache.update(_encoded(pipeline, mesh, missing))
        return jax.tree.map(lambda *rows: np.stack(rows), *(cache[text] for text in texts))

    def token_shapes(models: Models, count: int) -> dict[str, jax.ShapeDtypeStruct]:
        tokens = family.token_shapes(pipeline.models, count)
        return jax.eval_shape(pipeline.encode_text, pipeline.shapes, tokens)

    names = tuple(token_shapes(pipeline.models, 1))

    def encode_text(models: Models, params: Params, tokens: Cond) -> Cond:
        return {name: tokens[name] for name in names}

    kept = {name: part for name, part in family.parts.items() if name not in text}
    functions = {name: function for name, function in pipeline.models.functions.items() if name not in text}
    return dataclasses.replace(
        pipeline,
        family=family._replace(parts=kept, tokenize=tokenize, token_shapes=token_shapes, encode_text=encode_text),
        models=pipeline.models._replace(functions=functions),
    )


def lower_encoding(pipeline: Pipeline, mesh: Mesh) -> jax.stages.Lowered | None:
    """The program that encodes prompts, from shapes alone; None if the family's text encoders may train."""
    family = pipeline.family
    if family.trains_text:
        return None
    text = {name: x for name, x in pipeline.frozen_shapes.items() if name.partition(".")[0] in family.names(TEXT)}
    tokens = replicated_shapes(mesh, family.token_shapes(pipeline.models, PROMPTS))
    with jax.set_mesh(mesh):
        return _encoder(pipeline, mesh).lower(placed_shapes(mesh, text), tokens)


def _encoder(pipeline: Pipeline, mesh: Mesh) -> jax.stages.Wrapped:
    return jax.jit(pipeline.encode_text, out_shardings=replicated(mesh))


def _encoded(pipeline: Pipeline, mesh: Mesh, texts: Sequence[str]) -> dict[str, dict[str, np.ndarray]]:
    """Text -> its conditions, float32 on the host."""
    family = pipeline.family
    encoders = family._replace(parts={name: family.parts[name] for name in family.names(TEXT)})
    params = read_params(dataclasses.replace(pipeline, family=encoders), mesh, pipeline.frozen_shapes)
    encode = _encoder(pipeline, mesh)
    found: dict[str, dict[str, np.ndarray]] = {}
    for start in range(0, len(texts), PROMPTS):
        part = list(texts[start : start + PROMPTS])
        cond = jax.device_get(encode(params, pipeline.tokenize(part + part[-1:] * (PROMPTS - len(part)))))
        for row, text in enumerate(part):
            found[text] = {name: np.asarray(value[row], np.float32) for name, value in cond.items()}
    return found
