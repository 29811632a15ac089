"""Several texts of one noisy input, as guidance has them: computed once as far as they do not matter, same results."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.cascade_folders import write_upscaler
from support.torch_folders import UNET_15, UNET_21

from dreambooth_jax.diffusion.sampler import make_sampler
from dreambooth_jax.families.pipeline import describe_base, load_pipeline, read_params
from dreambooth_jax.models.params import functional
from dreambooth_jax.models.unet import UNet2DConditionModel, UNetSpec

UNETS = {
    "attention everywhere": UNET_15,
    "attention below only": UNET_15
    | {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    },
    "attention in the middle only": UNET_15
    | {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2},
    "no attention": UNET_15
    | {"down_block_types": ("DownBlock2D",) * 2, "mid_block_type": None, "up_block_types": ("UpBlock2D",) * 2},
    "text alone, two layers": UNET_21 | {"only_cross_attention": True, "transformer_layers_per_block": 2},
}


@pytest.mark.parametrize("name, remat", [*((name, "nothing") for name in UNETS), ("attention everywhere", "layers")])
def test_every_text_has_the_prediction_that_it_has_alone(name, remat):
    spec = UNetSpec.from_config(UNETS[name])
    unet = functional(lambda rngs: UNet2DConditionModel(spec, remat=remat, rngs=rngs))
    params = unet.init(jax.random.key(0))
    x, t = jax.random.normal(jax.random.key(1), (2, 8, 16, 4)), jnp.float32([3, 741.25])
    context = jax.random.normal(jax.random.key(2), (6, 7, spec.cross_attention_dim[0]))
    apply = jax.jit(lambda deep, x, t: unet.apply(params, deep, x, t, context, method="with_deep"))
    out, deep = apply(None, x, t)
    each = apply(None, jnp.repeat(x, 3, axis=0), jnp.repeat(t, 3))
    np.testing.assert_allclose(out, each[0], atol=1e-5)
    np.testing.assert_allclose(deep, each[1], atol=1e-4)
    assert name == "no attention" or np.abs(out[0] - out[1]).max() > 1e-3 * np.abs(out).max()
    np.testing.assert_allclose(apply(deep, x, t)[0], out, atol=1e-5)


@pytest.mark.parametrize("texts", [1, 3])
def test_texts_that_no_input_has_are_refused(texts, sd15):
    x, states = jnp.zeros((2, 16, 16, 4)), jnp.zeros((texts, 7, 32))
    with pytest.raises(ValueError, match=f"{texts} texts for 2 noisy inputs"):
        sd15.pipeline.output(sd15.params, x, jnp.zeros(2), {"states": states})


@pytest.mark.parametrize("reuse", [1, 2])
@pytest.mark.parametrize("name", ["SD", "x4"])
def test_guidance_paints_the_same_pictures(name, reuse, sd15, tmp_path):
    if name == "SD":
        pipeline, params, more = sd15.pipeline, sd15.params, {}
    else:
        write_upscaler(tmp_path)
        pipeline = load_pipeline(str(tmp_path))
        params = read_params(pipeline)
        more = {"low": jax.random.normal(jax.random.key(0), (2, 16, 16, 3)), "level": jnp.int32([20, 300])}
    assert pipeline.family.shares_input
    noise = jax.random.normal(jax.random.key(1), (2, 16, 16, 4))
    texts = (["a dog", "a sks cat"], ["", "a blurred picture"])
    cond, uncond = (pipeline.encode_text(params, pipeline.tokenize(both)) | more for both in texts)

    def paint(shares_input):
        sample = make_sampler(
            pipeline.output,
            pipeline.process,
            steps=4,
            reuse_features=reuse,
            with_deep=pipeline.with_deep,
            shares_input=shares_input,
        )
        return np.asarray(jax.jit(sample)(params, noise, cond, uncond, 4.0))

    np.testing.assert_allclose(paint(True), paint(False), rtol=1e-4, atol=1e-4)


def test_guidance_of_stable_diffusion_spares_work():
    pipeline = describe_base("stable-diffusion-v1-5/stable-diffusion-v1-5", dtype=jnp.bfloat16)

    def flops(count):
        shapes = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((count, 64, 64, 4), (count,), (8, 77, 768)))
        predict = jax.jit(lambda params, x, t, states: pipeline.output(params, x, t, {"states": states}))
        return predict.lower(pipeline.shapes, *shapes).cost_analysis()["flops"]

    assert 0.95 < flops(4) / flops(8) < 0.99  # one of attention's blocks is counted
