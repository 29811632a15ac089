"""Group normalisation: values and gradients of PyTorch, and what its backward pass keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dreambooth_jax.ops.group_norm import group_norm

GROUPS, EPS, SHAPE = 4, 1e-3, (2, 6, 4, 8)


@pytest.mark.parametrize("silu", [False, True])
def test_values_and_gradients_are_those_of_pytorch(silu):
    rng = np.random.default_rng(0)
    x, scale, bias = (rng.standard_normal(shape).astype(np.float32) for shape in (SHAPE, SHAPE[-1:], SHAPE[-1:]))
    x, weight = 3 * x + 2, rng.standard_normal(SHAPE).astype(np.float32)

    def loss(*arguments):
        return (group_norm(*arguments, GROUPS, EPS, silu, jnp.float32) * weight).sum()

    ours = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(x, scale, bias)
    theirs = [torch.tensor(value, requires_grad=True) for value in (x, scale, bias)]
    normed = torch.nn.functional.group_norm(theirs[0].movedim(-1, 1), GROUPS, theirs[1], theirs[2], EPS).movedim(1, -1)
    their_loss = ((torch.nn.functional.silu(normed) if silu else normed) * torch.from_numpy(weight)).sum()
    their_loss.backward()
    np.testing.assert_allclose(ours[0], their_loss.item(), rtol=1e-5)
    for own, their in zip(ours[1], theirs, strict=True):
        np.testing.assert_allclose(own, their.grad, atol=1e-5 * float(their.grad.abs().max()))


@pytest.mark.parametrize("silu", [False, True])
def test_the_backward_pass_keeps_the_argument_and_two_numbers_per_group(silu):
    x, ones = jnp.ones(SHAPE, jnp.bfloat16), jnp.ones(SHAPE[-1])
    y, pull = jax.vjp(lambda x: group_norm(x, ones, ones, GROUPS, EPS, silu, jnp.bfloat16), x)
    assert y.dtype == jnp.bfloat16 and pull(y)[0].dtype == jnp.bfloat16
    kept = [value for value in jax.tree.leaves(pull) if hasattr(value, "nbytes")]
    assert sum(value.nbytes for value in kept) <= x.nbytes + 4 * 2 * (SHAPE[0] * GROUPS + SHAPE[-1])


def test_examples_are_independent_of_each_other():
    x, ones = jax.random.normal(jax.random.key(0), SHAPE), jnp.ones(SHAPE[-1])
    together = group_norm(x, ones, ones, GROUPS, EPS, True, jnp.float32)
    alone = jax.vmap(lambda x: group_norm(x[None], ones, ones, GROUPS, EPS, True, jnp.float32)[0])(x)
    np.testing.assert_allclose(together, alone, atol=1e-6)
