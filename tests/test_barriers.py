"""The barriers leave values as they are written."""

import jax
import jax.numpy as jnp
import numpy as np

from dreambooth_jax.ops.barriers import keep_rounding

X = jnp.linspace(0.1, 0.9, 64).reshape(8, 8)


def test_rounding_is_kept():
    kept = jax.jit(lambda x: keep_rounding(x, jnp.bfloat16) * 3)(X)
    np.testing.assert_allclose(kept, np.asarray(X).astype(jnp.bfloat16).astype(np.float32) * 3, rtol=1e-6)
    assert keep_rounding(X, jnp.float32) is X
