"""The models against PyTorch diffusers and transformers: same folders and inputs, same outputs and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from support.torch_folders import TEXT_15, TEXT_21, UNET_15, UNET_21, VAE, randomise
from transformers import CLIPTextConfig, CLIPTextModel

from dreambooth_jax.diffusion.loss import Batch, dreambooth_loss
from dreambooth_jax.families.pipeline import describe_base, load_pipeline
from dreambooth_jax.files.safetensors import read_model
from dreambooth_jax.models import clip_text, unet, vae
from dreambooth_jax.models.params import count, functional, under_prefix
from dreambooth_jax.models.remat import REMAT
from dreambooth_jax.models.spec import UnsupportedConfig
from dreambooth_jax.ops import convolve

CROSS = {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2}

UNETS = {
    "three levels of two layers": UNET_15
    | {
        "block_out_channels": (16, 24, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 2,
    },
    "as in 2.1": UNET_21,
    "lists, and widths that shrink": UNET_15
    | CROSS
    | {
        "block_out_channels": (32, 16),
        "attention_head_dim": [2, 8],
        "layers_per_block": [1, 2],
        "transformer_layers_per_block": [2, 1],
        "upcast_attention": True,
    },
    "cross-attention below only": UNET_15
    | {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": [32, 32],
        "norm_eps": 1e-4,
    },
    "time embedding and channels": UNET_15
    | {"flip_sin_to_cos": False, "freq_shift": 1, "in_channels": 5, "out_channels": 3, "use_linear_projection": True},
}


def relative(out, reference) -> float:
    out, reference = np.asarray(out, np.float64), reference.detach().numpy().astype(np.float64)
    assert out.shape == reference.shape
    return np.linalg.norm(out - reference) / np.linalg.norm(reference)


def normal(*shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def ours(model, spec_class, module, folder, **kw):
    """What this library makes of a PyTorch model: (functional, params)."""
    model.save_pretrained(folder)
    spec = spec_class.from_config({**model.config} if not hasattr(model.config, "to_dict") else model.config.to_dict())
    split = functional(lambda rngs: module(spec, rngs=rngs, **kw))
    return split, read_model(folder, split.shapes)


def make_unet(config, folder, **kw):
    reference = randomise(UNet2DConditionModel(**config), 1)
    return reference, *ours(reference, unet.UNetSpec, unet.UNet2DConditionModel, folder, **kw)


@pytest.mark.parametrize("name", UNETS)
def test_unet(name, tmp_path):
    config = UNETS[name]
    reference, split, params = make_unet(config, tmp_path)
    x, t = normal(2, 8, 16, config.get("in_channels", 4)), np.float32([3, 741.25])  # not square, not whole
    context = normal(2, 7, np.max(config["cross_attention_dim"]), seed=1)
    out = jax.jit(split.apply)(params, x, t, context)
    with torch.no_grad():
        expected = reference(nchw(x), torch.from_numpy(t), torch.from_numpy(context)).sample
    assert relative(out, expected.movedim(1, -1)) <= 1e-4


def test_unet_takes_one_timestep_for_the_batch_and_refuses_sizes_it_cannot_halve(sd15):
    split, params = sd15.pipeline.models.functions["unet"], under_prefix("unet.", sd15.params)
    x, context = normal(2, 4, 4, 4), normal(2, 7, 32)
    apply = jax.jit(split.apply)
    np.testing.assert_allclose(apply(params, x, 5.0, context), apply(params, x, np.float32([5, 5]), context), atol=1e-5)
    with pytest.raises(ValueError, match=r"5x4.*multiples of 2"):
        split.apply(params, *map(jnp.asarray, (normal(1, 5, 4, 4), 5.0, context[:1])))


VAES = {
    "as in both": VAE,
    "no quant convs, no attention": VAE
    | {"use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": False, "latent_channels": 3},
    "three levels, two colours": VAE
    | {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (8, 16, 32),
        "layers_per_block": 1,
        "in_channels": 2,
        "out_channels": 2,
    },
}


@pytest.mark.parametrize("name", VAES)
def test_vae(name, tmp_path):
    config = VAES[name]
    reference = randomise(AutoencoderKL(**config), 2)
    split, params = ours(reference, vae.VAESpec, vae.AutoencoderKL, tmp_path)
    x, z = normal(2, 16, 24, config.get("in_channels", 3)), normal(2, 4, 8, config["latent_channels"], seed=1)
    mean, logvar = jax.jit(lambda p, x: split.apply(p, x, method="encode"))(params, x)
    pixels = jax.jit(lambda p, z: split.apply(p, z, method="decode"))(params, z)
    with torch.no_grad():
        posterior, decoded = reference.encode(nchw(x)).latent_dist, reference.decode(nchw(z)).sample
    assert relative(mean, posterior.mean.movedim(1, -1)) <= 1e-4
    assert relative(logvar, posterior.logvar.movedim(1, -1)) <= 1e-4
    assert relative(pixels, decoded.movedim(1, -1)) <= 1e-4


def test_vae_clips_the_log_variance_and_refuses_odd_sizes(sd15):
    split, params = sd15.pipeline.models.functions["vae"], under_prefix("vae.", sd15.params)
    params["quant_conv.bias"] = jnp.float32([0] * 4 + [1e3, -1e3, 0, 0])
    reference = randomise(AutoencoderKL(**VAE), 2)
    with torch.no_grad():
        reference.quant_conv.bias[4:6] = torch.tensor([1e3, -1e3])
        expected = reference.encode(torch.zeros(1, 3, 8, 8)).latent_dist.logvar.movedim(1, -1)
    _, logvar = jax.jit(lambda p, x: split.apply(p, x, method="encode"))(params, np.zeros((1, 8, 8, 3), np.float32))
    np.testing.assert_array_equal(logvar[..., :2], expected[..., :2])
    with pytest.raises(ValueError, match=r"8x9.*multiples of 2"):
        split.apply(params, jnp.zeros((1, 8, 9, 3)), method="encode")


@pytest.mark.parametrize("config", [TEXT_15, TEXT_21, TEXT_15 | {"num_hidden_layers": 12, "layer_norm_eps": 1e-3}])
def test_text(config, tmp_path):
    """The third has more than ten layers: sorted as strings, their order would be 0, 1, 10, 11, 2."""
    torch.manual_seed(0)
    kw = {"vocab_size": 50, "max_position_embeddings": 16, "bos_token_id": 48, "eos_token_id": 49}
    reference = randomise(CLIPTextModel(CLIPTextConfig(**config, **kw)), 3)
    split, params = ours(reference, clip_text.CLIPTextSpec, clip_text.CLIPTextModel, tmp_path)
    ids = np.random.default_rng(0).integers(0, 50, (3, 11))
    with torch.no_grad():
        expected = reference(torch.from_numpy(ids)).last_hidden_state
    assert relative(jax.jit(split.apply)(params, ids), expected) <= 1e-4


def torch_loss(pipe, batch: Batch, num_instance: int, prior_weight: float, gamma=None) -> torch.Tensor:
    """The DreamBooth loss as PyTorch trainers write it, with diffusers' scheduler."""
    x0, eps = nchw(np.asarray(batch.x0)), nchw(np.asarray(batch.eps))
    t = torch.from_numpy(np.array(batch.t, np.int64))
    states = pipe.text_encoder(torch.from_numpy(np.array(batch.cond["ids"]))).last_hidden_state
    prediction = pipe.unet(pipe.scheduler.add_noise(x0, eps, t), t, states).sample
    wanted = eps if pipe.scheduler.config.prediction_type == "epsilon" else pipe.scheduler.get_velocity(x0, eps, t)
    each = torch.nn.functional.mse_loss(prediction, wanted, reduction="none").mean(dim=(1, 2, 3))
    if gamma is not None:
        snr = compute_snr(pipe.scheduler, t)
        each = each * snr.clamp(max=gamma) / (snr if wanted is eps else snr + 1)
    return each[:num_instance].mean() + prior_weight * each[num_instance:].mean()


@pytest.mark.parametrize(
    ("name", "remat"),
    [
        ("sd15", "nothing"),
        pytest.param("sd15", "elementwise", marks=pytest.mark.slow),
        pytest.param("sd21", "layers", marks=pytest.mark.slow),
    ],
)
def test_gradient_of_the_training_loss(name, remat, request):
    """Every parameter of UNet and text encoder, with activations kept and recomputed. Adding a constant to all keys
    changes no softmax, so that the text encoder's key biases have no gradient: only there is rounding all there is."""
    base = request.getfixturevalue(name)
    pipeline, parts = load_pipeline(str(base.folder), remat=remat), (base.torch.unet, base.torch.text_encoder)
    ids = pipeline.tokenize(["a sks dog", "a dog", "a cat"])
    batch = Batch(normal(3, 8, 8, 4), normal(3, 8, 8, 4, seed=1), jnp.asarray([10, 450, 999]), ids)
    trainable = {n: v for n, v in base.params.items() if not n.startswith("vae.")}

    def loss(params):
        return dreambooth_loss(
            pipeline.denoise_tokens, params, batch, pipeline.process, num_instance=1, prior_weight=0.7
        ).loss

    value, grads = jax.jit(jax.value_and_grad(loss))(trainable)
    for part in parts:
        part.zero_grad()
    expected = torch_loss(base.torch, batch, 1, 0.7)
    expected.backward()
    assert abs(float(value) / expected.item() - 1) <= 1e-4

    reference = as_ours(base.torch, grads, lambda parameter: parameter.grad)
    assert reference.keys() == grads.keys()
    total = np.sqrt(sum(np.sum(np.square(g.numpy(), dtype=np.float64)) for g in reference.values()))
    negligible = {n for n, g in reference.items() if g.norm() < 1e-6 * total}
    assert all("k_proj.bias" in n for n in negligible)
    errors = {n: relative(grads[n], reference[n]) for n in grads.keys() - negligible}
    assert max(errors.values()) <= 1e-3, max(errors.items(), key=lambda item: item[1])
    assert all(np.linalg.norm(grads[n]) < 1e-5 * total for n in negligible)


def as_ours(pipe, names, value) -> dict[str, torch.Tensor]:
    """`value(parameter)` of the PyTorch UNet's and text encoder's parameters, under our names and in our axes."""
    found = {}
    for part in ("unet", "text_encoder"):
        model = getattr(pipe, part)
        for name, parameter in model.named_parameters():
            name = f"{part}.{name}".replace("text_encoder.embeddings", "text_encoder.text_model.embeddings")
            name = name.replace("text_encoder.encoder", "text_encoder.text_model.encoder")
            name = name.replace("text_encoder.final", "text_encoder.text_model.final")
            stem = name.removesuffix(".weight")
            candidates = (f"{stem}.{kind}" for kind in ("kernel", "scale", "embedding"))
            ours = next((candidate for candidate in candidates if candidate in names), name)
            found[ours] = value(parameter)
            if ours.endswith(".kernel"):
                found[ours] = found[ours].T if found[ours].ndim == 2 else found[ours].permute(2, 3, 1, 0)
    return found


@pytest.mark.parametrize(
    ("size", "stride", "padding", "height", "width"), [(3, 1, 1, 6, 9), (3, 2, 1, 6, 7), (3, 2, 0, 7, 9)]
)
def test_convolution(size, stride, padding, height, width):
    """Value and both gradients, also where the stride leaves a row or a column over."""
    x, kernel = normal(2, height, width, 5), normal(size, size, 5, 4, seed=1)
    out, backward = jax.vjp(lambda x, kernel: convolve.convolve(x, kernel, stride, padding), x, kernel)
    cotangent = normal(*out.shape, seed=2)
    tx, tkernel = nchw(x).requires_grad_(), torch.from_numpy(kernel).permute(3, 2, 0, 1).requires_grad_()
    expected = torch.nn.functional.conv2d(tx, tkernel, stride=stride, padding=padding)
    grads = torch.autograd.grad(expected, (tx, tkernel), nchw(cotangent))
    assert relative(out, expected.movedim(1, -1)) <= 1e-5
    elsewhere = (  # than on CPU
        convolve._input_gradient(jnp.asarray(kernel), jnp.asarray(cotangent), stride, padding, x.shape),
        convolve._kernel_gradient(jnp.asarray(x), jnp.asarray(cotangent), stride, padding, kernel.shape),
    )
    for dx, dkernel in (backward(cotangent), elsewhere):
        assert relative(dx, grads[0].movedim(1, -1)) <= 1e-5
        assert relative(dkernel, grads[1].permute(2, 3, 1, 0)) <= 1e-5


def test_remat_stores_less(sd15):
    spec, shapes = sd15.pipeline.models.specs["unet"], sd15.pipeline.models.functions["unet"].shapes
    x, t, context = map(jnp.asarray, (normal(2, 16, 16, 4), np.float32([3, 700]), normal(2, 7, 32)))
    stored = {}
    for remat in REMAT:
        apply = functional(lambda rngs, r=remat: unet.UNet2DConditionModel(spec, remat=r, rngs=rngs)).apply
        backward = jax.eval_shape(lambda p, apply=apply: jax.vjp(lambda q: apply(q, x, t, context), p)[1], shapes)
        stored[remat] = [residual.size for residual in jax.tree.leaves(backward)]
    parameters = sum(x.size for x in shapes.values())
    nothing, elementwise, layers = (sum(stored[remat]) - parameters for remat in ("nothing", "elementwise", "layers"))
    assert elementwise < 0.2 * nothing and layers < 0.3 * elementwise
    scores = (16 * 16) ** 2  # of one head's attention
    assert max(stored["elementwise"]) < scores < max(stored["nothing"])


def test_bfloat16_computes_near_float32_from_float32_parameters(tmp_path):
    reference, split, params = make_unet(UNET_15 | CROSS, tmp_path, dtype=jnp.bfloat16)
    assert {v.dtype for v in params.values()} == {jnp.dtype("float32")}
    x, t, context = normal(2, 8, 8, 4), np.float32([3, 700]), normal(2, 7, 32)
    out = jax.jit(split.apply)(params, x, t, context)
    with torch.no_grad():
        expected = reference(nchw(x), torch.from_numpy(t), torch.from_numpy(context)).sample.movedim(1, -1)
    assert out.dtype == jnp.bfloat16
    assert 1e-5 < relative(out.astype(jnp.float32), expected) < 3e-2


# Published numbers of parameters.
PUBLISHED = {
    "CompVis/stable-diffusion-v1-4": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "stabilityai/stable-diffusion-xl-base-1.0": {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    },
    "stabilityai/stable-diffusion-2-1": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_files_of_stable_diffusion_are_understood(name):
    pipeline = describe_base(name)
    assert {part: count(model.shapes) for part, model in pipeline.models.functions.items()} == PUBLISHED[name]


UP, DOWN = ["UpBlock2D", "UpBlock2D"], ["DownBlock2D", "DownBlock2D"]
TWO = {"block_out_channels": [32, 64], "down_block_types": DOWN, "up_block_types": UP}
REFUSED = [
    (unet.UNetSpec, {"class_embed_type": "timestep", "dropout": 0.1, "made_up": 3}, {}),
    (
        unet.UNetSpec,
        {
            "down_block_types": ["AttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "SkipUpBlock2D"],
            "center_input_sample": True,
        },
        TWO,
    ),
    (unet.UNetSpec, {"layers_per_block": [2, 2, 2], "attention_head_dim": [1], "up_block_types": UP[:1]}, TWO),
    (unet.UNetSpec, {"num_attention_heads": 8, "conv_in_kernel": 5, "mid_block_type": "UNetMidBlock2D"}, {}),
    (unet.UNetSpec, {"norm_num_groups": None, "attention_type": "gated"}, {}),
    (vae.VAESpec, {"shift_factor": 0.1, "latents_mean": [0.0], "down_block_types": ["AttnDownEncoderBlock2D"]}, {}),
    (
        vae.VAESpec,
        {"down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"]},
        {"block_out_channels": [32, 64]},
    ),
    (clip_text.CLIPTextSpec, {"dropout": 0.1, "hidden_act": "relu", "made_up": True}, {}),
]


@pytest.mark.parametrize(("spec", "wrong", "right"), REFUSED)
def test_unsupported_fields_are_all_named(spec, wrong, right):
    with pytest.raises(UnsupportedConfig) as error:
        spec.from_config(right | wrong)
    assert all(name in str(error.value) for name in wrong), str(error.value)
