"""LoRA: what trains, that it is of low rank, and that other tools paint with the file what we paint."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from support.painting import painted_by_diffusers, painted_by_sample
from support.runs import checkpoints, config_of, finish, read_state

from dreambooth_jax import export, sample
from dreambooth_jax.adapters.factors import add, by_module, merge
from dreambooth_jax.adapters.lora import lora
from dreambooth_jax.devices.sharding import make_mesh
from dreambooth_jax.families.pipeline import load_pipeline, read_params
from dreambooth_jax.files.lora_kohya import write_kohya
from dreambooth_jax.models.params import count
from dreambooth_jax.runs.config import ConfigError
from dreambooth_jax.runs.exports import about_adapter
from dreambooth_jax.runs.job import data_shapes, initial, lower_steps, make_job, make_method, split_shapes, state_shapes
from dreambooth_jax.runs.plan_text import farewell, file_size, plan_text
from dreambooth_jax.runs.setup import begin, set_up
from dreambooth_jax.runs.workdir import open_run

TARGETS = r"to_[qkv]|to_out\.0|conv1|[qkv]_proj|out_proj"  # matrices and convolutions, of both models
FIELDS = {"method": "lora", "lora_rank": 2, "lora_alpha": 4.0, "lora_targets": TARGETS, "learning_rate": 0.02}


@pytest.fixture(scope="module")
def tuned(micro, tmp_path_factory):
    """The workdir of a LoRA run."""
    workdir = tmp_path_factory.mktemp("lora") / "run"
    finish(workdir, base=micro, **FIELDS | {"steps": 20, "text_encoder_multiplier": 1.0})
    return workdir


@pytest.fixture(scope="module")
def base(micro):
    pipeline = load_pipeline(micro)
    return pipeline, read_params(pipeline)


def method_of(base, tmp_path, **fields):
    return make_method(config_of(tmp_path, **FIELDS | fields), base[0])


def test_it_starts_at_the_base_with_the_shapes_it_promised(base, tmp_path):
    method = method_of(base, tmp_path)
    trainable, frozen = method.start(base[1], jax.random.key(0))
    promised, kept = method.shapes(base[0].shapes)
    assert {n: (x.shape, x.dtype) for n, x in trainable.items()} == {n: (x.shape, x.dtype) for n, x in promised.items()}
    assert frozen.keys() == kept.keys() == base[1].keys()
    combined = method.combine(frozen, trainable)
    merged = merge(combined)
    assert combined.keys() == base[1].keys() | trainable.keys() and merged.keys() == base[1].keys()
    for name, value in base[1].items():
        np.testing.assert_array_equal(merged[name], value)
    pipeline, rng = base[0], np.random.default_rng(0)
    x, ids = rng.standard_normal((2, 8, 8, 4)).astype(np.float32), np.arange(32).reshape(2, 16)
    painted = [jax.jit(pipeline.denoise_tokens)(params, x, jnp.ones(2), {"ids": ids}) for params in (base[1], combined)]
    np.testing.assert_array_equal(*painted)
    other, _ = method.start(base[1], jax.random.key(1))
    randomly = {name for name, value in trainable.items() if not np.array_equal(value, other[name])}
    assert randomly == {name for name in trainable if ".lora_A." in name}


@pytest.mark.slow
def test_the_difference_is_of_low_rank_on_the_targets_alone(tuned, base):
    _, _, factored = open_run(tuned, make_mesh())
    params = merge(factored)
    moved = {name for name, value in base[1].items() if not np.array_equal(value, params[name])}
    assert {name.split(".")[0] for name in moved} == {"unet", "text_encoder"}
    ends = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "q_proj", "k_proj", "v_proj", "out_proj")
    wanted = {n for n in base[1] if not n.startswith("vae") and n.endswith(tuple(f".{end}.kernel" for end in ends))}
    assert moved == wanted
    for name in moved:
        difference = (np.asarray(params[name], np.float64) - np.asarray(base[1][name])).reshape(
            -1, params[name].shape[-1]
        )
        values = np.linalg.svd(difference, compute_uv=False)
        assert values[1] > 1e-5 and values[2:].max(initial=0) < 1e-5 * values[0], name


@pytest.mark.slow
def test_the_checkpoint_holds_the_factors_alone(tuned):
    assert checkpoints(tuned) == [20]
    names = [name for name in read_state(tuned, 20) if "kernel" in name or "bias" in name or "scale" in name]
    assert names and all(".lora_" in name for name in names)


@pytest.mark.slow
def test_diffusers_paints_with_the_file_what_sample_paints(tuned, micro, tmp_path):
    export.main(["--workdir", str(tuned), "--output", str(tmp_path / "lora"), "--format=peft"])
    theirs = StableDiffusionPipeline.from_pretrained(micro)
    theirs.load_lora_weights(tmp_path / "lora")
    ours = painted_by_sample(tmp_path / "pictures", "--workdir", str(tuned))
    assert np.abs(painted_by_diffusers(theirs) - ours).max() <= 2e-3 + 0.5 / 255
    assert np.abs(painted_by_diffusers(micro) - ours).max() > 0.02
    # Nothing in the file is passed over: each factor has found its layer.
    layers = [*theirs.unet.named_modules(), *theirs.text_encoder.named_modules()]
    loaded = [name for name, _ in layers if name.endswith(("lora_A.default_0", "lora_B.default_0"))]
    assert len(loaded) == len(load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors"))


@pytest.mark.slow
def test_the_whole_model_is_exported_too(tuned, tmp_path):
    export.main(["--workdir", str(tuned), "--output", str(tmp_path / "model"), "--format=folder"])
    ours = painted_by_sample(tmp_path / "pictures", "--workdir", str(tuned))
    assert np.abs(painted_by_diffusers(tmp_path / "model") - ours).max() <= 2e-3 + 0.5 / 255


@pytest.mark.slow
def test_the_file_for_all_tools_is_the_default_and_paints_alike(tuned, micro, tmp_path, capsys):
    path = tmp_path / "sks_dog.safetensors"
    export.main(["--workdir", str(tuned), "--output", str(path)])
    said = capsys.readouterr().out
    assert "none left over" in said and "ComfyUI, A1111" in said and re.search(r"pictures of .* 0 at most", said), said
    theirs = StableDiffusionPipeline.from_pretrained(micro)
    theirs.load_lora_weights(path)
    ours = painted_by_sample(tmp_path / "run", "--workdir", str(tuned))
    assert np.abs(painted_by_diffusers(theirs) - ours).max() <= 2e-3 + 0.5 / 255
    # As a file it makes of the base what the run is; with weight 0 it leaves the base; two halves are a whole.
    base = painted_by_sample(tmp_path / "base", "--base", micro)
    for number, (files, expected) in enumerate(
        (((f"{path}",), ours), ((f"{path}:0",), base), ((f"{path}:0.5",) * 2, ours))
    ):
        options = [f"--lora={file}" for file in files]
        painted = painted_by_sample(tmp_path / str(number), "--base", micro, *options)
        assert np.abs(painted - expected).max() <= (0 if expected is base else 1.01 / 255)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """(an adapter file, its factors)."""
    folder = tmp_path_factory.mktemp("adapter")
    config = config_of(folder, **FIELDS | {"identifier": "zwx"})
    trainable, _ = make_method(config, base[0]).start(base[1], jax.random.key(0))
    factors = {name: np.asarray(x) + 0.03 for name, x in trainable.items()}
    write_kohya(folder / "dog.safetensors", factors, about_adapter(base[0], config, "dog"), dtype="float32")
    return folder / "dog.safetensors", factors


@pytest.mark.parametrize("output", ["folder", "one.safetensors"])
def test_files_are_merged_into_a_base(base, adapter, micro, output, tmp_path, capsys):
    path, factors = adapter
    files = [f"--lora={path}:0.5", f"--lora={path}:-0.25"]
    export.main(["--base", micro, *files, "--output", str(tmp_path / output)])
    said = capsys.readouterr().out
    assert "none left over" in said and "differ by at most 0" in said, said
    found = read_params(load_pipeline(str(tmp_path / output) + f"@{micro}" * output.endswith("safetensors")))
    whole, changed = add(base[1], factors), 0
    for name, value in base[1].items():
        expected = value + 0.25 * (np.asarray(whole[name]) - value)
        np.testing.assert_allclose(found[name], expected, atol=1e-6, err_msg=name)
        changed += not np.array_equal(expected, value)
    assert changed == len(by_module(factors))
    if output.endswith("safetensors"):
        with safe_open(tmp_path / output, "numpy") as file:
            assert file.metadata()["modelspec.trigger_phrase"] == "zwx dog, zwx dog"


def test_variants_of_a_folder_have_diffusers_names(adapter, micro, tmp_path):
    options = ["--dtype=float16", "--variant=fp16", "--output", str(tmp_path / "half")]
    export.main(["--base", micro, "--lora", str(adapter[0]), *options])
    names = {path.name for path in (tmp_path / "half").rglob("*.safetensors")}
    assert names == {"diffusion_pytorch_model.fp16.safetensors", "model.fp16.safetensors"}
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path / "half", variant="fp16")
    ours = read_params(load_pipeline(str(tmp_path / "half")))["unet.conv_in.kernel"]
    np.testing.assert_array_equal(theirs.unet.conv_in.weight.detach(), np.asarray(ours).transpose(3, 2, 0, 1))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["export", "--lora=BAD"], "tensors have no place in this model"),
        (["export"], "nothing is merged into it"),
        (["export", "--lora=GOOD", "--variant=fp16", "--output=x.safetensors"], "has no variants"),
        (["export", "--lora=GOOD", "--format=kohya"], "is a folder, or with --format single"),
        (["sample", "--lora=BAD"], "tensors have no place in this model"),
        (["sample", "--embedding=dog=GOOD"], "expected emb_params"),
        (["sample", "--embedding=dog=ROWS"], "identifier = 'dog' is a token"),
    ],
)
def test_what_does_not_fit_is_said_before_weights_are_read(adapter, micro, command, message, tmp_path, monkeypatch):
    width = load_pipeline(micro).models.specs["text_encoder"].hidden_size
    save_file({"emb_params": np.zeros((1, width), np.float32)}, tmp_path / "rows.safetensors")
    save_file({"unet.mid_block.attn9.lora_A.weight": np.zeros((2, 2), np.float32)}, tmp_path / "bad.safetensors")
    monkeypatch.setattr("dreambooth_jax.families.pipeline.read_params", lambda *args, **kw: 1 / 0)
    monkeypatch.setattr("dreambooth_jax.runs.merging.read_params", lambda *args, **kw: 1 / 0)
    files = {"BAD": tmp_path / "bad.safetensors", "GOOD": adapter[0], "ROWS": tmp_path / "rows.safetensors"}
    program, *options = command
    for word, file in files.items():
        options = [option.replace(word, str(file)) for option in options]
    if not any(option.startswith("--output") for option in options):
        options.append(f"--output={tmp_path / 'out'}")
    options += ["--prompt=a dog"] if program == "sample" else []
    with pytest.raises(SystemExit, match=message):
        {"export": export, "sample": sample}[program].main(["--base", micro, *options])


def test_the_plan_says_how_large_the_file_is(micro, tmp_path):
    run = set_up(config_of(tmp_path / "run", base=micro, **FIELDS))
    promised, _ = run.job.method.shapes(run.pipeline.shapes)
    factors = {name: np.ones(x.shape, np.float32) for name, x in promised.items()}
    path = tmp_path / "dog.safetensors"
    write_kohya(path, run.job.method.adapter(factors), about_adapter(run.pipeline, run.config, "dog"), dtype="float32")
    alphas = 4 * len(by_module(factors))
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size == file_size(run) + alphas + header
    text = plan_text(run, 0)
    assert f"its file takes {file_size(run) / 1e6:.3g} MB" in text and f"({file_size(run) / 1e6:.3g} MB in" in farewell(
        run, 1
    )
    whole = set_up(config_of(tmp_path / "full", base=micro, method="full"))
    assert file_size(whole) == 4 * count(whole.pipeline.shapes)


@pytest.mark.slow
def test_training_goes_on_from_a_file(micro, tmp_path):
    def begun(**fields):
        job = make_job(config_of(tmp_path, base=micro, **FIELDS | fields), load_pipeline(micro), make_mesh())
        return job, begin(job, read_params(job.pipeline, make_mesh()))[0]

    job, fresh = begun()
    moved = {name: np.asarray(value) + 0.125 for name, value in fresh.items()}
    path = tmp_path / "dog.safetensors"
    write_kohya(path, job.method.adapter(moved), about_adapter(job.pipeline, job.config, "dog"), dtype="float32")
    _, again = begun(init_adapter=str(path))
    for name, value in moved.items():
        np.testing.assert_allclose(again[name], value, rtol=1e-6)
    with pytest.raises(ConfigError, match=r"does not fit lora_targets and lora_rank: .* factors differ"):
        begun(init_adapter=str(path), lora_rank=3)
    with pytest.raises(ConfigError, match="trains no adapter"):
        begun(init_adapter=str(path), method="full")


@pytest.mark.slow
def test_eight_devices_compute_what_one_does(base, tmp_path):
    pipeline, params = base
    config = config_of(tmp_path, **FIELDS | {"batch_size": 4, "steps_per_call": 2})

    def losses(mesh):
        job = make_job(config, pipeline, mesh)
        key = jax.device_put(jax.random.key(0), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
        trainable, frozen = job.method.start(params, key)
        like = state_shapes(job, trainable)
        place = jax.tree.map(lambda x: x.sharding, like)
        state = jax.jit(initial(job), out_shardings=place)(trainable)
        rng = np.random.default_rng(0)
        data = jax.tree.map(
            lambda x: jax.device_put(
                rng.standard_normal(x.shape).astype(x.dtype) if x.dtype == jnp.float32 else np.zeros(x.shape, x.dtype),
                x.sharding,
            ),
            data_shapes(job, 3, 5)._replace(numbers=None),
        )
        frozen = jax.device_put(frozen, jax.tree.map(lambda x: x.sharding, split_shapes(job)[1]))
        steps = lower_steps(job, state, frozen, data, key).compile()
        found = []
        for _ in range(3):
            state, metrics = steps(state, frozen, data, key, jnp.asarray(2, jnp.int32))
            found.append(np.asarray(metrics.loss))
        return np.concatenate(found)

    alone = losses(make_mesh(1, 1, jax.devices()[:1]))
    assert alone[0] != alone[-1]
    np.testing.assert_allclose(losses(make_mesh(2, 4)), alone, rtol=1e-5)


@pytest.mark.slow
def test_a_layer_computes_with_its_factors_what_it_computes_with_the_merged_kernel(tuned, base):
    pipeline, rng = base[0], np.random.default_rng(0)
    _, _, factored = open_run(tuned, make_mesh())
    x, ids = rng.standard_normal((2, 8, 8, 4)).astype(np.float32), np.arange(32).reshape(2, 16)
    ours, merged, before = (
        np.asarray(jax.jit(pipeline.denoise_tokens)(params, x, jnp.ones(2), {"ids": ids}))
        for params in (factored, merge(factored), base[1])
    )
    np.testing.assert_allclose(ours, merged, atol=1e-5)
    assert np.abs(ours - before).max() > 1e-2


def test_factors_for_a_layer_that_is_not_there_are_an_error(base):
    pipeline, params = base
    x, ids = jnp.zeros((1, 8, 8, 4)), jnp.zeros((1, 16), jnp.int32)
    with pytest.raises(KeyError, match=r"mid_block\.attn9: no linear layer or convolution takes its lora_A"):
        pipeline.denoise_tokens(params | {"unet.mid_block.attn9.lora_A.kernel": x}, x, jnp.ones(1), {"ids": ids})


def test_targets_that_match_nothing_are_an_error(base):
    with pytest.raises(ValueError, match="lora_targets = 'to_z': no module's name ends like that; there are"):
        lora("^unet", "to_z", 4, 4.0).shapes(base[0].shapes)
