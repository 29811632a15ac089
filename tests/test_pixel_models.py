"""The cascade's models against PyTorch diffusers and transformers: values, gradients, names and full-size shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from support.cascade_models import FULL_SIZE, IF_STAGE_I, IF_STAGE_II, T5, X4
from support.torch_folders import UNET_15, randomise
from transformers import T5Config, T5EncoderModel

from dreambooth_jax.files.safetensors import file_name, read_model
from dreambooth_jax.models import pixel_unet, t5, unet
from dreambooth_jax.models.params import functional
from dreambooth_jax.models.spec import UnsupportedConfig

UNETS = {
    "stage I": IF_STAGE_I,
    "stage II": IF_STAGE_II,
    "text alone, some blocks": IF_STAGE_I
    | {
        "down_block_types": ("SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"),
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D"),
        "only_cross_attention": [True, False],
        "mid_block_only_cross_attention": True,
        "attention_head_dim": 8,
        "act_fn": "silu",
        "norm_num_groups": 8,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
    },
}


def relative(out, reference) -> float:
    out, reference = np.asarray(out, np.float64), reference.detach().float().numpy().astype(np.float64)
    assert out.shape == reference.shape
    return np.linalg.norm(out - reference) / np.linalg.norm(reference)


def normal(*shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def make_unet(config, folder, **kw):
    reference = randomise(UNet2DConditionModel(**config), 1)
    reference.save_pretrained(folder)
    spec = pixel_unet.PixelUNetSpec.from_config(dict(reference.config))
    split = functional(lambda rngs: pixel_unet.PixelUNet(spec, rngs=rngs, **kw))
    return reference, split, read_model(folder, split.shapes)


def arguments(config) -> tuple[np.ndarray, ...]:
    """x, t, text and, where it is wanted, the noise level; pictures that are not square."""
    level = (np.float32([0, 431]),) if config.get("class_embed_type") else ()
    return normal(2, 8, 16, config["in_channels"]), np.float32([3, 741]), normal(2, 7, 32, seed=1), *level


def run_torch(reference, x, t, text, level=None) -> torch.Tensor:
    x = torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))
    level = None if level is None else torch.from_numpy(level)
    return reference(x, torch.from_numpy(t), torch.from_numpy(text), class_labels=level).sample.movedim(1, -1)


def as_ours(reference: torch.nn.Module, shapes, value_of) -> dict[str, torch.Tensor]:
    """Values per parameter of the PyTorch module, under our names and with our axes."""
    names = {file_name(name): name for name in shapes}
    found = {}
    for theirs, parameter in reference.named_parameters():
        value = value_of(parameter)
        if names[theirs].endswith(".kernel"):
            value = value.T if value.ndim == 2 else value.permute(2, 3, 1, 0)
        found[names[theirs]] = value
    return found


def assert_same_gradients(ours, reference) -> None:
    """Every parameter to 1e-3. A constant added to all keys changes no softmax: key biases have rounding alone."""
    assert ours.keys() == reference.keys()
    total = np.sqrt(sum(float(g.square().sum()) for g in reference.values()))
    negligible = {name for name, g in reference.items() if g.norm() < 1e-5 * total}
    assert all(name.endswith(("k_proj.bias", "to_k.bias")) for name in negligible), negligible
    errors = {name: relative(ours[name], reference[name]) for name in ours.keys() - negligible}
    assert max(errors.values()) <= 1e-3, max(errors.items(), key=lambda item: item[1])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "remat"), [*zip(UNETS, ("nothing", "elementwise", "layers"), strict=True)])
def test_unet_has_the_values_and_gradients_of_the_reference(name, remat, tmp_path):
    config = UNETS[name]
    reference, split, params = make_unet(config, tmp_path, remat=remat)
    inputs, weights = arguments(config), normal(2, 8, 16, config["out_channels"], seed=2)

    def total(params):
        out = split.apply(params, *map(jnp.asarray, inputs))
        return (out * weights).mean(), out

    grads, out = jax.jit(jax.grad(total, has_aux=True))(params)
    expected = run_torch(reference, *inputs)
    (expected * torch.from_numpy(weights)).mean().backward()
    assert relative(out, expected) <= 1e-4
    assert_same_gradients(grads, as_ours(reference, params, lambda parameter: parameter.grad))


def test_unet_refuses_what_it_cannot_compute(tmp_path):
    _, split, params = make_unet(IF_STAGE_II, tmp_path)
    x, t, text, level = map(jnp.asarray, arguments(IF_STAGE_II))
    with pytest.raises(ValueError, match=r"7x16.*multiples of 2"):
        split.apply(params, x[:, :7], t, text, level)
    with pytest.raises(ValueError, match="noise level None"):
        split.apply(params, x, t, text)
    assert pixel_unet.PixelUNetSpec.from_config(
        IF_STAGE_I | {"only_cross_attention": True}
    ).mid_block_only_cross_attention
    with pytest.raises(UnsupportedConfig, match=r"addition_embed_type.*resnet_time_scale_shift"):
        pixel_unet.PixelUNetSpec.from_config({"encoder_hid_dim": 8, "encoder_hid_dim_type": "text_proj"})


IF = (pixel_unet.PixelUNetSpec, pixel_unet.PixelUNet)
SIZES = {
    "IF-I-M": (371.6, *IF),
    "IF-I-L": (935.4, *IF),
    "IF-I-XL": (4304.7, *IF),
    "IF-II-L": (1243.3, *IF),
    "x4": (473.4, unet.UNetSpec, unet.UNet2DConditionModel),
}


@pytest.mark.parametrize("name", SIZES)
def test_full_size_shapes_are_those_of_the_reference(name):
    """Names and shapes of every parameter; millions of them as published."""
    millions, spec_class, module = SIZES[name]
    with torch.device("meta"):
        reference = UNet2DConditionModel(**(FULL_SIZE | {"x4": X4})[name])
    spec = spec_class.from_config(dict(reference.config))
    shapes = functional(lambda rngs: module(spec, rngs=rngs)).shapes
    theirs = as_ours(reference, shapes, lambda parameter: parameter)
    assert {n: tuple(s.shape) for n, s in shapes.items()} == {n: tuple(p.shape) for n, p in theirs.items()}
    assert round(sum(s.size for s in shapes.values()) / 1e6, 1) == millions


def test_x4_unet_has_the_values_and_gradients_of_the_reference(tmp_path):
    """The Stable Diffusion x4 upscaler: a table of noise levels, and blocks that attend to the text alone."""
    config = UNET_15 | {
        "in_channels": 7,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "only_cross_attention": [False, True],
        "num_class_embeds": 1000,
        "use_linear_projection": True,
    }
    reference = randomise(UNet2DConditionModel(**config), 1)
    reference.save_pretrained(tmp_path)
    spec = unet.UNetSpec.from_config(dict(reference.config))
    split = functional(lambda rngs: unet.UNet2DConditionModel(spec, rngs=rngs))
    params = read_model(tmp_path, split.shapes)
    inputs = normal(2, 8, 16, 7), np.float32([3, 741]), normal(2, 7, 32, seed=1), np.int32([20, 999])
    weights = normal(2, 8, 16, 4, seed=2)

    def total(params):
        out = split.apply(params, *map(jnp.asarray, inputs))
        return (out * weights).mean(), out

    grads, out = jax.jit(jax.grad(total, has_aux=True))(params)
    expected = run_torch(reference, *inputs)
    (expected * torch.from_numpy(weights)).mean().backward()
    assert relative(out, expected) <= 1e-4
    assert_same_gradients(grads, as_ours(reference, params, lambda parameter: parameter.grad))
    with pytest.raises(ValueError, match="noise level None"):
        split.apply(params, *map(jnp.asarray, inputs[:3]))


def make_t5(folder, dtype=jnp.float32, **changes):
    torch.manual_seed(0)
    reference = randomise(T5EncoderModel(T5Config(**T5 | changes)), 3)
    reference.save_pretrained(folder)
    spec = t5.T5Spec.from_config(reference.config.to_dict())
    split = functional(lambda rngs: t5.T5EncoderModel(spec, dtype=dtype, rngs=rngs))
    return reference, split, read_model(folder, split.shapes)


def padded_ids(length=150) -> np.ndarray:
    """Three texts, so long that distances reach the last bucket, padded with 0 behind their end, 1."""
    ids = np.random.default_rng(0).integers(2, 128, (3, length))
    for row, end in enumerate((length - 1, 9, 1)):
        ids[row, end], ids[row, end + 1 :] = 1, 0
    return ids


def run_torch_t5(reference, ids) -> torch.Tensor:
    ids = torch.from_numpy(ids)
    return reference(ids, attention_mask=(ids != 0).long()).last_hidden_state


def test_t5_has_the_values_and_gradients_of_the_reference(tmp_path):
    reference, split, params = make_t5(tmp_path)
    ids, weights = padded_ids(), normal(3, 150, 32)

    def total(params):
        out = split.apply(params, ids)
        return (out * weights).mean(), out

    grads, out = jax.jit(jax.grad(total, has_aux=True))(params)
    expected = run_torch_t5(reference, ids)
    (expected * torch.from_numpy(weights)).mean().backward()
    assert relative(out, expected) <= 1e-4
    assert_same_gradients(grads, as_ours(reference, params, lambda parameter: parameter.grad))


def test_t5_in_bfloat16_is_as_near_as_the_reference(tmp_path):
    reference, split, params = make_t5(tmp_path, jnp.bfloat16)
    ids = padded_ids(40)
    with torch.no_grad():
        exact = run_torch_t5(reference, ids)
        rounded = run_torch_t5(reference.to(torch.bfloat16), ids)
    ours = jax.jit(split.apply)(params, ids)
    assert ours.dtype == jnp.bfloat16
    assert relative(ours, exact) <= 1.2 * relative(rounded.float().numpy(), exact)


def test_t5_buckets():
    """Distances and buckets that transformers' implementation gives."""
    found = t5.relative_buckets(200, 32, 128)
    expected = {-140: 15, -91: 15, -90: 14, -32: 12, -16: 10, -8: 8, -7: 7, 0: 0, 1: 17, 7: 23, 8: 24, 12: 25, 16: 26,
                23: 27, 32: 28, 64: 30, 90: 30, 91: 31}  # fmt: skip
    assert {d: found[150, 150 + d] if d < 50 else found[50, 50 + d] for d in expected} == expected


def test_t5_refuses_version_1_0():
    with pytest.raises(UnsupportedConfig, match="feed_forward_proj = 'relu'"):
        t5.T5Spec.from_config({"model_type": "t5", "feed_forward_proj": "relu"})
