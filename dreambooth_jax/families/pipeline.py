"""A base of any family as pure functions: specs and tokenizers at once, weights on demand."""

import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dreambooth_jax.devices.sharding import param_sharding
from dreambooth_jax.diffusion.low_resolution import LowResolution
from dreambooth_jax.diffusion.process import Process
from dreambooth_jax.diffusion.sampler import PredictDeep
from dreambooth_jax.families import FAMILIES
from dreambooth_jax.families.family import CODEC, DENOISER, Cond, Family, Images, Models, Part, Pictures
from dreambooth_jax.files import bases, single_file
from dreambooth_jax.files.atomic import write_atomic
from dreambooth_jax.files.diffusers_folder import (
    INDEX,
    SCHEDULER,
    copy_folder,
    opens_in_float32,
    read_json,
    write_index,
)
from dreambooth_jax.files.hub import resolve_base
from dreambooth_jax.files.layouts import split_base
from dreambooth_jax.files.safetensors import read_model, save_model
from dreambooth_jax.files.tokenizer import Tokenizer, WithToken, load_tokenizer
from dreambooth_jax.files.weight_files import check_alone, variant_of
from dreambooth_jax.models.params import Functional, Params, Shapes, Tensors, functional, under_prefix, with_prefix
from dreambooth_jax.models.spec import UnsupportedConfig


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
    """A base model without its weights: params are passed to each function, named "PART.MODULE.KIND".

    Attributes:
        folder: source of the files.
        family: functions of the kind of model.
        models: its parts as functions of flat params.
        process: noise levels, prediction and times.
        tokenizers: folder -> tokenizer; empty where only shapes are described.
        dtypes: part, or PART.MODULE of a module with another one -> dtype of its computation.
        later: regex of the parameters that the layers they belong to make whole (see `unshard`); "" for none.
        single_file: LDM file of all weights, where they are not in the folder.
    """

    folder: Path
    family: Family
    models: Models
    process: Process
    tokenizers: Mapping[str, Tokenizer]
    dtypes: Mapping[str, DTypeLike]
    later: str = ""
    single_file: Path | None = None

    @property
    def resolution(self) -> int:
        """The side in pixels that the base was trained for."""
        return self.family.resolution(self.models)

    @property
    def guidance(self) -> float:
        """The guidance scale to paint with if none is given: the folder's own, or the family's usual one."""
        return float(self.models.configs["index"].get("_guidance_scale", self.family.guidance))

    @property
    def tokenizer(self) -> Tokenizer:
        """The first tokenizer: identifiers are single tokens of it."""
        return next(iter(self.tokenizers.values()))

    @functools.cached_property
    def shapes(self) -> Shapes:
        """Names and shapes of all parameters, float32."""
        parts = (with_prefix(f"{part}.", model.shapes) for part, model in self.models.functions.items())
        return {name: shape for part in parts for name, shape in part.items()}

    def with_token(self, word: str, count: int) -> "Pipeline":
        """The pipeline whose tokenizers read `word` as `count` new tokens, with ids after the base's.

        Raises:
            ValueError: the word is a token already.
        """
        vocabularies = {n: self.models.specs[part].vocab_size for n, part in self.family.tokenizers.items()}
        tokenizers = {n: WithToken(t, word, count, vocabularies[n]) for n, t in self.tokenizers.items()}
        return dataclasses.replace(self, tokenizers=tokenizers)

    def ids_of(self, text: str) -> dict[str, list[int]]:
        """Text part -> ids of the tokens of `text`, no special ones."""
        return {
            part: self.tokenizers[name](text, add_special_tokens=False).input_ids
            for name, part in self.family.tokenizers.items()
        }

    @functools.cached_property
    def frozen_shapes(self) -> Shapes:
        """Names and shapes of frozen parameters: kernels and embeddings in the dtype of their part's computation, which
        rounds them anyway."""
        rounded = {n: x for n, x in self.shapes.items() if n.endswith((".kernel", ".embedding"))}
        return self.shapes | {n: jax.ShapeDtypeStruct(x.shape, self._dtype_of(n)) for n, x in rounded.items()}

    def _dtype_of(self, name: str) -> DTypeLike:
        part, module, *_ = name.split(".")
        return self.dtypes.get(f"{part}.{module}", self.dtypes[part])

    def trainable(self, *roles: str) -> str:
        """A regex for the names of the parameters of these roles that results depend on."""
        alternatives = []
        for name in self.family.names(*roles):
            idle = self.family.parts[name].idle(self.models.specs[name])
            alternatives.append(name + (rf"\.(?!{idle})" if idle else r"\."))
        return f"^(?:{'|'.join(alternatives)})"

    def example_shape(self, height: int, width: int | None = None) -> tuple[int, ...]:
        """Shape of an encoded picture of `height` x `width` pixels, by default square.

        Raises:
            ValueError: the base cannot have that size; names sizes that it can.
        """
        return self.family.example_shape(self.models, height, width or height)

    @functools.cached_property
    def multiple(self) -> int:
        """The smallest side of a picture in pixels; all sides are multiples of it."""
        return next(side for side in itertools.count(1) if self._fits(side))

    def _fits(self, side: int) -> bool:
        try:
            return bool(self.example_shape(side))
        except ValueError:
            return False

    def tokenize(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Tokens of the texts, leading axis b; a text too long for the encoder is cut, with a warning."""
        return self.family.tokenize(self.tokenizers, texts)

    def encode_text(self, params: Params, tokens: Cond) -> Cond:
        """The prompts' conditions."""
        return self.family.encode_text(self.models, params, tokens)

    def encode_images(self, params: Params, images: Images) -> tuple[Array, Array]:
        """Mean and standard deviation of the encoded pictures."""
        return self.family.encode_images(self.models, params, images)

    def decode(self, params: Params, encoded: Array) -> Float[Array, "b h w 3"]:
        """Encoded pictures to pixels in [0, 1]."""
        return self.family.decode(self.models, params, encoded)

    def of_example(self, pictures: Pictures) -> Cond:
        """The pictures' own conditions."""
        return self.family.of_example(self.models, pictures)

    def negative(self, cond: Cond, empty: Array | np.ndarray) -> Cond:
        """The conditions of negative prompts, from those of their texts and [b] whether these are empty."""
        return self.family.negative(self.models, cond, empty)

    @functools.cached_property
    def low_resolution(self) -> LowResolution | None:
        """The form in which a super-resolution stage takes pictures of the stage before; None for other bases."""
        return self.family.low_resolution(self.models)

    def with_index(self, **entries: Any) -> "Pipeline":
        """The pipeline with further entries of model_index.json."""
        index = dict(self.models.configs["index"]) | entries
        configs = dict(self.models.configs) | {"index": index}
        return dataclasses.replace(self, models=self.models._replace(configs=configs))

    def output(self, params: Params, xt: Array, t: Array, cond: Cond) -> Array:
        """The denoiser's output given all conditions; see `split`."""
        return self.family.predict(self.models, params, xt, t, cond)

    @property
    def with_deep(self) -> PredictDeep | None:
        """(params, x_t, t, cond, deep features or None) -> (output, deep features), see `Family.with_deep`; None for a
        denoiser that is not divided."""
        function = self.family.with_deep
        return function and functools.partial(function, self.models)

    def split(self, output: Array) -> tuple[Array, Array | None]:
        """(prediction, interpolation of the sampler's variance or None)."""
        return self.family.split(self.models, output)

    def denoise(self, params: Params, xt: Array, t: Array, cond: Cond) -> Array:
        """The prediction given all conditions: a `predict` for frozen text encoders."""
        return self.split(self.output(params, xt, t, cond))[0]

    def denoise_tokens(self, params: Params, xt: Array, t: Array, cond: Cond) -> Array:
        """The prediction given tokens and the pictures' conditions: a `predict` that trains the text encoders too."""
        return self.denoise(params, xt, t, cond | self.encode_text(params, cond))


def load_pipeline(base: str, *, dtype: DTypeLike = jnp.float32, remat: str = "nothing") -> Pipeline:
    """Reads a base's configs and tokenizers, no weights.

    Args:
        base: see `resolve_base`.
        dtype: precision of the computation, autoencoder excepted (see `Part.decoder`); trained params are float32.
        remat: results that the denoiser's backward pass recomputes: "nothing", "elementwise" or "layers".

    Raises:
        FileNotFoundError: the base or a file of it is not there.
        UnsupportedConfig: a config asks for something not implemented, or the parts do not fit together.
    """
    file, _ = split_base(base)
    folder = resolve_base(base)
    index = read_json(folder, INDEX)
    family = _family_of(index, folder)
    configs = {part: read_json(folder, f"{part}/config.json") for part in family.parts}
    configs |= {name: read_json(folder, f"{name}/{SCHEDULER}") for name in family.schedulers} | {"index": index}
    pipeline = build_pipeline(folder, configs, dtype=dtype, remat=remat)
    specs = pipeline.models.specs
    tokenizers = {
        name: load_tokenizer(folder, name, specs[part].max_length, specs[part].vocab_size)
        for name, part in family.tokenizers.items()
    }
    return dataclasses.replace(pipeline, tokenizers=tokenizers, single_file=file)


def _family_of(index: Mapping[str, Any], folder: Path) -> Family:
    name = index.get("_class_name")
    if name not in FAMILIES:
        raise UnsupportedConfig(f"{folder}/{INDEX}: {name} is not implemented; expected {' or '.join(FAMILIES)}")
    return FAMILIES[name]


def build_pipeline(
    folder: Path, configs: Mapping[str, Mapping[str, Any]], *, dtype: DTypeLike = jnp.float32, remat: str = "nothing"
) -> Pipeline:
    """The pipeline that `configs` describe (of the parts, "scheduler" and "index"), without tokenizers.

    Raises:
        UnsupportedConfig: a config asks for something not implemented, or the parts do not fit together.
    """
    family = _family_of(configs["index"], folder)
    specs = {name: part.spec(configs[name]) for name, part in family.parts.items()}
    dtypes = {name: jnp.float32 if part.role == CODEC else dtype for name, part in family.parts.items()}
    dtypes |= {f"{name}.{module}": dtype for name, part in family.parts.items() for module in part.decoder}
    settings = {"dtype": dtype, "remat": remat}
    functions = {name: _functional(part, specs[name], **settings) for name, part in family.parts.items()}
    models = Models(configs, specs, functions)
    if found := family.problems(models):
        raise UnsupportedConfig(f"{folder}: {'; '.join(found)}")
    layers = [rf"{name}\.{part.layers}" for name, part in family.parts.items() if part.layers and remat == "layers"]
    later = "|".join(layers)
    return Pipeline(folder, family, models, family.process(configs), {}, dtypes, later)


def _functional(part: Part, spec: Any, *, dtype: DTypeLike, remat: str) -> Functional:
    settings: dict[str, Any] = {"dtype": jnp.float32 if part.role == CODEC else dtype}
    if part.role == DENOISER:
        settings["remat"] = remat
    if part.decoder:
        settings["decoder_dtype"] = dtype
    return functional(lambda rngs: part.module(spec, rngs=rngs, **settings))


def describe_base(base: str, *, dtype: DTypeLike = jnp.float32, remat: str = "nothing") -> Pipeline:
    """Like `load_pipeline`, for shapes alone: of the published bases in `bases.CONFIGS` nothing is fetched."""
    if base in bases.CONFIGS:
        return build_pipeline(Path(base), bases.CONFIGS[base], dtype=dtype, remat=remat)
    return load_pipeline(base, dtype=dtype, remat=remat)


def read_params(pipeline: Pipeline, mesh: Mesh | None = None, shapes: Shapes | None = None) -> Params:
    """Reads all weights, each tensor straight to its place.

    Args:
        mesh: devices that `param_sharding` places the tensors on; default: all on the first device.
        shapes: name -> shape and dtype of every parameter; default: float32.

    Raises:
        WeightsError: see `read_model`.
    """
    shapes = shapes or pipeline.shapes
    if pipeline.single_file is not None:
        place = None if mesh is None else functools.partial(param_sharding, mesh)
        layout = single_file.layout_of(pipeline.shapes, pipeline.models.configs)
        return single_file.read_single_file(pipeline.single_file, shapes, layout, place)
    params: Params = {}
    for part in pipeline.family.parts:
        prefix = f"{part}."
        of_part = (
            None if mesh is None else lambda name, shape, prefix=prefix: param_sharding(mesh, prefix + name, shape)
        )
        params |= with_prefix(prefix, read_model(pipeline.folder / part, under_prefix(prefix, shapes), of_part))
    return params


def save_pipeline(
    pipeline: Pipeline,
    params: Tensors,
    folder: str | os.PathLike,
    *,
    dtype: DTypeLike | None = None,
    variant: str = "",
) -> None:
    """Writes a folder that `load_pipeline` and diffusers open.

    Args:
        pipeline: source of configs, scheduler and tokenizers.
        params: all parts, on this host.
        folder: made if absent; files in it are replaced. Its scheduler is that of a trained model.
        dtype: stored precision; default float32.
        variant: of the weight files' names, such as "fp16" (`variant=` of diffusers); "" for plain names.

    Raises:
        WeightsError: the folder holds weights of other names, or a number is too large for `dtype`.
    """
    folder = Path(folder)
    files = {name: variant_of(part.file, variant) for name, part in pipeline.family.parts.items()}
    for name, file in files.items():
        check_alone(folder / name, [file])
    for name, file in files.items():
        config = opens_in_float32(pipeline.models.configs[name], dtype)
        save_model(folder / name, under_prefix(f"{name}.", params), config, dtype=dtype, file=file)
    for name in (*pipeline.family.schedulers, *pipeline.family.tokenizers):
        copy_folder(pipeline.folder / name, folder / name)
    read = pipeline.models.configs["scheduler"]
    if (scheduler := pipeline.family.saved_scheduler(read)) != read:
        write_atomic(folder / "scheduler" / SCHEDULER, (json.dumps(dict(scheduler), indent=2) + "\n").encode())
    write_index(folder, pipeline.models.configs["index"])
