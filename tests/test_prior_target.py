"""Prior preservation by the frozen base's own predictions, on the photos or on class images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.runs import config_of

from dreambooth_jax.devices.sharding import make_mesh
from dreambooth_jax.diffusion.examples import EncodedExamples, TrainingData, draw
from dreambooth_jax.families.pipeline import load_pipeline, read_params
from dreambooth_jax.runs.config import ConfigError, check_config
from dreambooth_jax.runs.job import data_shapes, fresh_state, lower_steps, make_job
from dreambooth_jax.runs.setup import begin

FIELDS = {
    "method": "lora",
    "lora_rank": 2,
    "learning_rate": 0.02,
    "prior_target": "base",
    "batch_size": 2,
    "ema_decay": 0.0,
    "crop": "center",
    "flip": False,
    "views": 1,
    "weight_decay": 0.0,
}


def examples(count, seed, text, pipeline):
    rng = np.random.default_rng(seed)
    mean = jnp.asarray(rng.standard_normal((count, 8 * 8 * 4)), jnp.float32)
    return EncodedExamples(mean, jnp.zeros_like(mean), pipeline.tokenize([text]), jnp.zeros(count, jnp.int32))


@pytest.mark.slow
def test_at_the_start_the_prior_is_kept_exactly_and_later_it_is_not(micro, tmp_path):
    config = config_of(tmp_path, base=micro, **FIELDS)
    pipeline = load_pipeline(micro)
    job = make_job(config, pipeline, make_mesh(1, 1, jax.devices()[:1]))
    trainable, frozen, key = begin(job, read_params(pipeline))
    data = TrainingData(examples(3, 0, "a sks dog", pipeline), examples(3, 0, "a dog", pipeline))
    shapes = data_shapes(job, 3, 100)
    assert shapes.prior.mean.shape == shapes.instance.mean.shape  # no class image
    state = fresh_state(job, trainable)
    steps = lower_steps(job, state, frozen, data, key).compile()
    _, metrics = steps(state, frozen, data, key, jnp.asarray(2, jnp.int32))
    assert metrics.prior[0] < 1e-10 < 1e-2 < metrics.instance[0]
    assert metrics.prior[1] > 1e-7
    np.testing.assert_allclose(metrics.loss, metrics.instance + config.prior_weight * metrics.prior, rtol=1e-6)


def test_the_prior_half_is_the_same_noised_photos(micro):
    pipeline = load_pipeline(micro)
    data = TrainingData(examples(5, 0, "a sks dog", pipeline), examples(5, 0, "a dog", pipeline))
    for step in (0, 3):
        batch = draw(data, pipeline.process, 2, jax.random.key(0), jnp.asarray(step), paired=True)
        for value in (batch.x0, batch.eps, batch.t):
            np.testing.assert_array_equal(value[:2], value[2:])
        (cond,) = jax.tree.leaves(batch.cond)
        assert (cond[:2] != cond[2:]).any()
        alone = draw(data._replace(prior=None), pipeline.process, 2, jax.random.key(0), jnp.asarray(step))
        np.testing.assert_array_equal(alone.eps, batch.eps[:2])


def test_full_fine_tuning_keeps_no_base(tmp_path):
    with pytest.raises(ConfigError, match='prior_target = "base" needs the frozen base'):
        check_config(config_of(tmp_path, prior_target="base"))
