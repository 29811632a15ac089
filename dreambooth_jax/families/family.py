"""What the rest of the library may ask of a model: a family is a value of functions, one per file of this folder.

Conditions are dicts of arrays with leading axis b, in two halves: those of the prompt (`encode_text`) and those of the
picture (`of_example`); `predict` is given both in one dict. docs/families.md shows how to add a family.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from dreambooth_jax.diffusion.low_resolution import Cond, LowResolution
from dreambooth_jax.diffusion.process import Process
from dreambooth_jax.files.tokenizer import Tokenizer
from dreambooth_jax.models.params import Functional, Params, under_prefix

DENOISER, TEXT, CODEC = "denoiser", "text", "codec"
NOISE_LEVEL = "_noise_level"  # in model_index.json: level that a super-resolution stage is painted at
Images = UInt8[Array | np.ndarray, "b h w 3"]


class Part(NamedTuple):
    """One model of a family; its name is the folder's and the prefix of its parameters.

    Attributes:
        spec: config.json -> frozen spec; that of a text part has `vocab_size` and `max_length` in tokens.
        module: (spec, dtype=, rngs=) -> nnx.Module; a denoiser's also takes `remat=`.
        file: name of its weight file.
        role: DENOISER, TEXT or CODEC.
        idle: spec -> regex of parameters that no result depends on: stored, never trained; "" for none.
        decoder: modules of a CODEC that decode in the dtype of the computation, which its `module` is then given as
            `decoder_dtype`; all else of a CODEC computes in float32.
        layers: regex of the parameters that layers make whole with remat = "layers" (models.remat); "" for none.
    """

    spec: Callable[[Mapping[str, Any]], Any]
    module: Callable[..., nnx.Module]
    file: str
    role: str
    idle: Callable[[Any], str] = lambda spec: ""
    decoder: tuple[str, ...] = ()
    layers: str = ""


class Models(NamedTuple):
    """The parts of a base as pure functions.

    Attributes:
        configs: part -> its config.json; "scheduler" and "index" (model_index.json) too.
        specs: part -> frozen spec.
        functions: part -> shapes, init and apply over the part's own flat params.
    """

    configs: Mapping[str, Mapping[str, Any]]
    specs: Mapping[str, Any]
    functions: Mapping[str, Functional]

    def apply(self, part: str, params: Params, *args: Any, method: str = "__call__") -> Any:
        """The output of `part`, given the params of all parts."""
        return self.functions[part].apply(under_prefix(f"{part}.", params), *args, method=method)


class Pictures(NamedTuple):
    """What is known of pictures, to condition on: rows are (height, width) or (top, left) in pixels.

    Attributes:
        images: those of the stage before, which a super-resolution stage enlarges, or None.
        original: sizes before resizing.
        crop: top left corners of the crops, in the resized pictures.
        target: sizes after cropping.
    """

    images: Images | None
    original: Int[Array | np.ndarray, "b 2"]
    crop: Int[Array | np.ndarray, "b 2"]
    target: Int[Array | np.ndarray, "b 2"]


def check_side(side: int, multiple: int) -> None:
    """Raises ValueError unless a picture's side is a multiple of `multiple` pixels; names the nearest sizes."""
    if side < multiple or side % multiple:
        below = max(side // multiple, 1) * multiple
        raise ValueError(
            f"resolution = {side}: this base needs a multiple of {multiple}; nearest: {below}, {below + multiple}"
        )


class Family(NamedTuple):
    """A kind of text-to-image model. Functions that take `params` are pure and jittable.

    Attributes:
        name: `_class_name` of its model_index.json.
        parts: name -> Part.
        tokenizers: folder -> the text part that reads its tokens.
        process: configs -> noise levels, prediction and times.
        problems: models -> what does not fit between the parts; [] if all does.
        resolution: models -> side in pixels that the base was trained for.
        example_shape: (models, height, width in pixels) -> shape of an encoded picture. Raises ValueError, naming
            sizes that are possible.
        token_shapes: (models, b) -> shapes of what `tokenize` gives.
        tokenize: (tokenizers, texts) -> dict of arrays, leading axis b.
        encode_text: (models, params, tokens) -> the prompt's conditions. It is also given the picture's, to ignore.
        encode_images: (models, params, uint8 images) -> mean and standard deviation of the encoded pictures.
        decode: (models, params, encoded pictures) -> pixels in [0, 1].
        predict: (models, params, x_t, t, conditions) -> output of the denoiser.
        with_deep: (models, params, x_t, t, conditions, deep features of an earlier step or None) -> (output of the
            denoiser, its deep features), the deep part left out where features are given; None for a denoiser that
            is not divided.
        shares_input: whether `predict` and `with_deep` take several rows of conditions for a row of x_t, see
            `make_sampler`.
        guidance: classifier-free guidance scale that pictures are usually painted with.
        of_example: (models, Pictures) -> conditions of the pictures.
        low_resolution: models -> how a super-resolution stage takes the picture of the stage before; None for others.
        negative: (models, the prompt's conditions, [b] whether the prompt is empty) -> conditions of the negative
            prompts.
        split: (models, output of the denoiser) -> (prediction like x_t, interpolation of the sampler's variance or
            None).
        clip: models -> function of the sampler's estimates of x0, or None.
        schedulers: folders of schedulers; "scheduler" is that of the process.
        saved_scheduler: scheduler_config.json -> that of a trained model.
        trains_text: whether text encoders may train.
    """

    name: str
    parts: Mapping[str, Part]
    tokenizers: Mapping[str, str]
    process: Callable[[Mapping[str, Mapping[str, Any]]], Process]
    problems: Callable[[Models], list[str]]
    resolution: Callable[[Models], int]
    example_shape: Callable[[Models, int, int], tuple[int, ...]]
    token_shapes: Callable[[Models, int], dict[str, jax.ShapeDtypeStruct]]
    tokenize: Callable[[Mapping[str, Tokenizer], Sequence[str]], dict[str, np.ndarray]]
    encode_text: Callable[[Models, Params, Cond], Cond]
    encode_images: Callable[[Models, Params, Images], tuple[Array, Array]]
    decode: Callable[[Models, Params, Array], Float[Array, "b h w 3"]]
    predict: Callable[[Models, Params, Array, Array, Cond], Array]
    guidance: float
    with_deep: Callable[[Models, Params, Array, Array, Cond, Array | None], tuple[Array, Array]] | None = None
    shares_input: bool = False
    of_example: Callable[[Models, Pictures], Cond] = lambda models, pictures: {}
    low_resolution: Callable[[Models], LowResolution | None] = lambda models: None
    negative: Callable[[Models, Cond, Array], Cond] = lambda models, cond, empty: cond
    split: Callable[[Models, Array], tuple[Array, Array | None]] = lambda models, output: (output, None)
    clip: Callable[[Models], Callable[[Array], Array] | None] = lambda models: None
    schedulers: tuple[str, ...] = ("scheduler",)
    saved_scheduler: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda config: config
    trains_text: bool = True

    def names(self, *roles: str) -> list[str]:
        """The parts that have one of `roles`."""
        return [name for name, part in self.parts.items() if part.role in roles]

    def role_of(self, parameter: str) -> str:
        """The role of the part that a parameter belongs to."""
        return self.parts[parameter.partition(".")[0]].role
