"""A frozen base in eight bits: how far it is from the base, what a layer keeps of it, and that runs go on with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.runs import config_of, finish

from dreambooth_jax import export
from dreambooth_jax.adapters.quantised import STEP, quantised, whole
from dreambooth_jax.devices.sharding import make_mesh
from dreambooth_jax.families.pipeline import load_pipeline, read_params
from dreambooth_jax.models.layers import Linear
from dreambooth_jax.models.params import functional
from dreambooth_jax.ops.quantise import dequantise, quantise
from dreambooth_jax.runs.config import ConfigError, check_config
from dreambooth_jax.runs.job import held, make_job, read_shapes, split_shapes
from dreambooth_jax.runs.setup import begin

EIGHT_BITS = {"frozen_dtype": "int8", "lora_rank": 2, "learning_rate": 0.02}


def test_every_weight_is_within_half_a_step_of_its_channel():
    kernel = np.random.default_rng(0).standard_normal((3, 3, 20, 7)) * 10.0 ** np.arange(-3, 4)
    kernel[..., 2] = 0
    q, step = quantise(jnp.asarray(kernel, jnp.float32))
    error = np.abs(np.asarray(dequantise(q, step), np.float64) - kernel).max((0, 1, 2))
    largest = np.abs(kernel).max((0, 1, 2))
    assert q.dtype == jnp.int8 and (error <= largest / 254 * (1 + 1e-5)).all()
    assert (error[2], step[2]) == (0, 1) and (error[[0, 1, 3, 4, 5, 6]] > 0).all()


def test_the_backward_pass_keeps_the_whole_numbers_and_no_kernel():
    model = functional(lambda rngs: Linear(64, 96, dtype=jnp.float32, rngs=rngs))
    params = model.init(jax.random.key(0))
    mesh = make_mesh(1, 1, jax.devices()[:1])
    eight = quantised({f"net.{name}": x for name, x in params.items()}, ["net"], mesh)
    eight = {name.removeprefix("net."): x for name, x in eight.items()}
    shapes = [
        {(x.shape, x.dtype) for x in jax.tree.leaves(jax.vjp(lambda x, p=p: model.apply(p, x), jnp.ones((2, 64)))[1])}
        for p in (params, eight)
    ]
    kernel = ((64, 96), jnp.dtype(jnp.float32))
    assert kernel in shapes[0] and kernel not in shapes[1] and ((64, 96), jnp.dtype(jnp.int8)) in shapes[1]


@pytest.fixture(scope="module")
def start(micro, tmp_path_factory):
    """method -> (job, params as they are held, trainable and frozen ones before the first step)."""
    folder, pipeline = tmp_path_factory.mktemp("eight"), load_pipeline(micro)

    def start(method, devices=1, **fields):
        mesh = make_mesh(1, devices, jax.devices()[:devices])
        job = make_job(config_of(folder, base=micro, method=method, **EIGHT_BITS | fields), pipeline, mesh)
        params = held(job, read_params(pipeline, job.mesh, read_shapes(job)))
        return job, params, *begin(job, params)[:2]

    return start


def loss_of(pipeline):
    x, ids = jax.random.normal(jax.random.key(0), (2, 8, 8, 4)), np.arange(32).reshape(2, 16)
    return jax.jit(lambda params: jnp.square(pipeline.denoise_tokens(params, x, jnp.ones(2), {"ids": ids})).mean())


@pytest.mark.slow
def test_devices_hold_what_the_shapes_promise(start):
    job, params, trainable, frozen = start("lora", devices=8)
    promised = split_shapes(job)
    for found, shapes in zip((trainable, frozen), promised, strict=True):
        assert {n: (x.shape, x.dtype) for n, x in found.items()} == {n: (x.shape, x.dtype) for n, x in shapes.items()}
    for name, x in frozen.items():
        assert x.sharding.is_equivalent_to(promised[1][name].sharding, x.ndim), name
    rounded = {name.removesuffix(STEP) for name in params if name.endswith(STEP)}
    assert {name.split(".")[0] for name in rounded} == {"unet", "text_encoder"}
    assert all(params[f"{module}.kernel"].dtype == jnp.int8 for module in rounded)


def test_kernels_that_are_merged_are_merged_with_the_quantised_base(start):
    job, params, trainable, frozen = start("lokr")
    rounded = whole(params, {name.removesuffix(STEP) for name in params if name.endswith(STEP)})
    merged = job.method.combine(frozen, trainable)
    changed = {name.rsplit(".", 2)[0] + ".kernel" for name in trainable}
    assert changed and all(np.array_equal(merged[name], rounded[name]) for name in changed)
    assert not [name for name in merged if name.removesuffix(STEP) + ".kernel" in changed and name.endswith(STEP)]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_it_starts_at_the_quantised_base(start, method):
    job, params, trainable, frozen = start(method)
    loss = loss_of(job.pipeline)
    base = loss(whole(params, {name.removesuffix(STEP) for name in params if name.endswith(STEP)}))
    np.testing.assert_allclose(loss(job.method.combine(frozen, trainable)), base, rtol=1e-6 if method == "dora" else 0)


@pytest.mark.slow
def test_gradients_of_factors_are_near_those_over_the_float_base(start):
    job, _, trainable, frozen = start("lora")
    plain = start("lora", frozen_dtype="")[-1]
    moved = {name: x + 0.01 * jax.random.normal(jax.random.key(1), x.shape) for name, x in trainable.items()}
    loss = loss_of(job.pipeline)
    gradient = jax.jit(jax.grad(lambda trainable, frozen: loss(job.method.combine(frozen, trainable))))
    ours, wanted = (jnp.concatenate([x.ravel() for x in gradient(moved, f).values()]) for f in (frozen, plain))
    assert 0 < jnp.linalg.norm(ours - wanted) < 0.02 * jnp.linalg.norm(wanted)


@pytest.mark.slow
def test_a_run_goes_on_and_exports_from_the_base_itself(micro, tmp_path):
    fields = EIGHT_BITS | {"base": micro, "method": "lora", "save_every": 2}
    finish(tmp_path / "run", **fields, steps=2)
    finish(tmp_path / "run", **fields, steps=4)
    export.main(["--workdir", str(tmp_path / "run"), "--output", str(tmp_path / "model"), "--format", "folder"])
    base, tuned = (read_params(load_pipeline(str(folder))) for folder in (micro, tmp_path / "model"))
    changed = {name for name, x in base.items() if not np.array_equal(x, tuned[name])}
    assert changed and all(name.endswith((".to_q.kernel", ".to_k.kernel", ".to_v.kernel", ".to_out.0.kernel",
                                          "_proj.kernel")) for name in changed)  # fmt: skip
    with pytest.raises(ConfigError, match="method = 'full' trains what it would round"):
        check_config(config_of(tmp_path, frozen_dtype="int8"))
