"""A second subject runs the first one's programs: counts and numbers of a run are arguments, not constants."""

import jax
import pytest
from support.runs import config_of

from dreambooth_jax.devices.sharding import make_mesh
from dreambooth_jax.families.pipeline import load_pipeline
from dreambooth_jax.runs.job import argument_shapes, lower_painting, lower_steps, make_job

EVERY_FEATURE = {"snr_gamma": 5.0, "caption_dropout": 0.1, "lr_warmup_steps": 2}
ANOTHER = {
    "learning_rate": 3e-5,
    "text_encoder_multiplier": 0.3,
    "weight_decay": 0.1,
    "clip_norm": 0.5,
    "prior_weight": 0.5,
    "snr_gamma": 2.0,
    "ema_decay": 0.99,
    "caption_dropout": 0.2,
    "identifier": "ktn",
    "class_noun": "cat",
    "num_class_images": 16,
}


@pytest.fixture
def lowered(micro, tmp_path):
    pipeline, mesh = load_pipeline(micro), make_mesh(1, 1, jax.devices()[:1])

    def programs(photos, **fields):
        job = make_job(config_of(tmp_path, base=micro, **fields), pipeline, mesh)
        return lower_steps(job, *argument_shapes(job, photos)).as_text(), lower_painting(job).as_text()

    return programs


@pytest.mark.slow
def test_another_subject_has_the_same_programs(lowered):
    """Other photos, captions, class images, rates: the text of both programs is the same to the last letter."""
    steps, painting = lowered(3, **EVERY_FEATURE)
    others, other_painting = lowered(14, **EVERY_FEATURE | ANOTHER)
    assert steps == others and painting == other_painting
    turned_off, _ = lowered(3, **EVERY_FEATURE | {"caption_dropout": 0.0})
    assert steps != turned_off
