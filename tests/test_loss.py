"""The DreamBooth loss against PyTorch with diffusers' own corruption, targets and SNR, on the same noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from dreambooth_jax.diffusion.loss import Batch, dreambooth_loss
from dreambooth_jax.diffusion.schedulers import process_from_scheduler

CONFIG = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}


def predict(params, x, t, cond):
    return params["a"] * jnp.tanh(x + cond[:, None, None]) + params["b"] * t[:, None, None] / 1000


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    x0, eps = rng.standard_normal((2, 7, 5, 3), np.float32)
    return Batch(x0, eps, rng.integers(0, 1000, 7), rng.standard_normal(7, np.float32))


def torch_losses(batch, prediction, num_instance):
    """Mean losses of both halves and what their sum of 1 and 0.3 parts gives for gradients."""
    scheduler = DDPMScheduler(**CONFIG, prediction_type=prediction)
    x0, eps, t, cond = map(torch.from_numpy, (batch.x0, batch.eps, batch.t, batch.cond))
    a, b = torch.tensor(0.7, requires_grad=True), torch.tensor(-0.2, requires_grad=True)
    noisy = scheduler.add_noise(x0, eps, t)
    output = a * torch.tanh(noisy + cond[:, None, None]) + b * t[:, None, None] / 1000
    wanted = eps if prediction == "epsilon" else scheduler.get_velocity(x0, eps, t)
    each = torch.nn.functional.mse_loss(output, wanted, reduction="none").mean(dim=(1, 2))
    instance = each[:num_instance].mean()
    prior = each[num_instance:].mean() if num_instance < len(each) else torch.tensor(0.0)
    (instance + 0.3 * prior).backward()
    return instance.item(), prior.item(), a.grad.item(), b.grad.item()


@pytest.mark.parametrize("num_instance", [7, 3])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_losses_and_gradients(batch, prediction, num_instance):
    """Halves of unequal size: each is a mean of its own."""
    process, calls = process_from_scheduler(CONFIG | {"prediction_type": prediction}), []

    def loss(params):
        def counted(params, x, t, cond):
            calls.append(len(x))
            return predict(params, x, t, cond)

        losses = dreambooth_loss(counted, params, batch, process, num_instance=num_instance, prior_weight=0.3)
        return losses.loss, losses

    grads, losses = jax.grad(loss, has_aux=True)({"a": 0.7, "b": -0.2})
    instance, prior, a, b = torch_losses(batch, prediction, num_instance)
    assert calls == [7]  # one forward pass
    np.testing.assert_allclose(losses, [instance + 0.3 * prior, instance, prior], rtol=1e-4)
    np.testing.assert_allclose([grads["a"], grads["b"]], [a, b], rtol=1e-3)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_every_example_is_weighted_by_its_own_time(batch, prediction):
    """With min-SNR weights (see test_process.py for their values) a half's loss is still the mean of its examples'."""
    process, params = process_from_scheduler(CONFIG | {"prediction_type": prediction}), {"a": 0.7, "b": -0.2}

    def losses(part, num_instance):
        return dreambooth_loss(predict, params, part, process, num_instance=num_instance, snr_gamma=5.0)

    single = [losses(jax.tree.map(lambda x: x[i : i + 1], batch), 1).instance for i in range(7)]  # noqa: B023
    whole = losses(batch, 3)
    np.testing.assert_allclose([whole.instance, whole.prior], [np.mean(single[:3]), np.mean(single[3:])], rtol=1e-5)


def test_low_precision_predictions_are_compared_in_float32(batch):
    process = process_from_scheduler(CONFIG)
    wrong_by = np.float32(1e-3)

    def nearly_right(params, x, t, cond):
        return (0 * x).astype(jnp.bfloat16)

    losses = dreambooth_loss(nearly_right, {}, batch._replace(eps=0 * batch.eps + wrong_by), process, num_instance=7)
    assert losses.loss.dtype == jnp.float32
    np.testing.assert_allclose(losses.loss, 1e-6, rtol=1e-4)
