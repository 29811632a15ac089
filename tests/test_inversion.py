"""New tokens: only their rows move, they start as the words that are asked for, and other tools paint with the file."""

import contextlib
import json
import shlex
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.numpy import load_file, save_file
from support.painting import painted_by_diffusers, painted_by_sample
from support.runs import config_of, finish, read_state
from support.sdxl_folders import write_sdxl

from dreambooth_jax import evaluate, export
from dreambooth_jax.adapters.inversion import TEMPLATES, inversion, is_row, rows_of, stop_after, widths
from dreambooth_jax.devices.sharding import make_mesh
from dreambooth_jax.families.family import TEXT
from dreambooth_jax.families.pipeline import load_pipeline, read_params
from dreambooth_jax.files.embeddings import read_embeddings, write_embeddings
from dreambooth_jax.files.lora_kohya import write_kohya
from dreambooth_jax.files.weight_files import WeightsError
from dreambooth_jax.runs.config import ConfigError, check_resumable
from dreambooth_jax.runs.exports import about_adapter
from dreambooth_jax.runs.job import make_job, open_base
from dreambooth_jax.runs.setup import begin, parameters_to_continue, with_templates
from dreambooth_jax.runs.workdir import open_run

TABLE = "text_encoder.text_model.embeddings.token_embedding.embedding"
FIELDS = {
    "identifier": "<sks>",
    "token_vectors": 2,
    "templates": "object",
    "prior_preservation": False,
    "ema_decay": 0.0,
    "learning_rate": 0.05,
    "weight_decay": 0.5,
    "text_encoder_multiplier": 1.0,
}


@pytest.fixture(scope="module")
def inverted(micro, tmp_path_factory):
    """The workdir of a textual inversion."""
    workdir = tmp_path_factory.mktemp("inversion") / "run"
    finish(workdir, base=micro, method="inversion", **FIELDS | {"steps": 20, "num_class_images": 100})
    return workdir


def job_of(micro, tmp_path, **fields):
    config = config_of(tmp_path, base=micro, **FIELDS | fields)
    pipeline = open_base(config)
    job = make_job(config, pipeline, make_mesh(1, 1, jax.devices()[:1]))
    params = read_params(pipeline)
    trainable, frozen = job.method.start(params, jax.random.key(0))
    return job, params, trainable, frozen


@pytest.mark.slow
def test_only_the_new_rows_move(inverted, micro):
    config, pipeline, params = open_run(inverted, make_mesh())
    base = read_params(load_pipeline(micro))
    size = len(base[TABLE])
    assert params[TABLE].shape == (size + 2, base[TABLE].shape[1])
    for name, value in base.items():
        np.testing.assert_array_equal(params[name][:size] if name == TABLE else params[name], value)
    assert np.abs(params[TABLE][size:] - params[TABLE][size:].mean()).max() > 0
    ids = pipeline.tokenize([f"a photo of {config.identifier} dog"])["ids"][0].tolist()
    assert ids.index(size + 1) == ids.index(size) + 1 == 5 or {size, size + 1} <= set(ids)
    # Neither optimizer nor checkpoint knows more than the rows and their moments.
    sizes = [value.size for name, value in read_state(inverted, 20).items() if value.ndim]
    assert sizes and set(sizes) == {2 * base[TABLE].shape[1]}


@pytest.mark.slow
def test_a_run_with_a_new_token_is_scored(inverted, capsys):
    evaluate.main(["--workdir", str(inverted), "--judge", "embedded", "--count", "2", "--class_count", "2"])
    assert "| step 20 |" in capsys.readouterr().out


def test_a_new_row_starts_as_the_word_and_does_not_decay(micro, tmp_path):
    job, params, trainable, frozen = job_of(micro, tmp_path, method="inversion", token_start="dog cat", token_vectors=3)
    table, tokenizer = np.asarray(params[TABLE]), load_pipeline(micro).tokenizer
    dog, cat = tokenizer("dog cat", add_special_tokens=False).input_ids
    ((name, rows),) = trainable.items()
    assert is_row(name)
    np.testing.assert_array_equal(rows, table[[dog, cat, dog]])
    shapes, _ = job.method.shapes(job.pipeline.shapes)
    assert {n: x.shape for n, x in trainable.items()} == {n: x.shape for n, x in shapes.items()}
    updates, _ = job.optimizer.update(
        jax.tree.map(jnp.zeros_like, trainable), job.optimizer.init(trainable), trainable, grad_norm=jnp.ones(())
    )
    assert not np.abs(updates[name]).any()
    assert job.method.combine(frozen, trainable)[TABLE].shape == (len(table) + 3, table.shape[1])


def test_pivotal_tuning_has_rows_and_factors_and_its_rows_stop(micro, tmp_path):
    job, params, trainable, frozen = job_of(micro, tmp_path, method="pivotal", steps=10, pivotal_fraction=0.5)
    rows = [name for name in trainable if is_row(name)]
    assert len(rows) == 1 and all(".lora_" in name for name in trainable if name not in rows)
    assert [name for name in trainable if not job.method.decays(name)] == rows
    assert any(name.startswith("unet.") for name in trainable)
    ids, x = job.pipeline.tokenize(["a <sks> dog"]), jnp.ones((1, 8, 8, 4))
    combined = job.method.combine(frozen, trainable)
    jax.eval_shape(job.pipeline.denoise_tokens, combined, x, jnp.ones(1), ids)
    state, moved = job.optimizer.init(trainable), []
    for _ in range(8):
        ones = jax.tree.map(jnp.ones_like, trainable)
        updates, state = job.optimizer.update(ones, state, trainable, grad_norm=jnp.ones(()))
        moved.append({name: bool(np.abs(value).any()) for name, value in updates.items()})
    assert [step[rows[0]] for step in moved] == [True] * 5 + [False] * 3
    assert all(value for step in moved for name, value in step.items() if name not in rows)
    assert params.keys() == frozen.keys()
    file = job.method.adapter(trainable)
    assert rows[0] in file and len(file) == len(trainable)
    stopped, _ = stop_after(0, is_row).update({"a.new": jnp.ones(2), "b": jnp.ones(2)}, jnp.zeros((), jnp.int32))
    assert not stopped["a.new"].any() and stopped["b"].all()


def test_a_longer_run_of_pivotal_tuning_is_another_one(tmp_path):
    """Its token stays after a share of the steps; a longer LoRA has the same first steps."""
    for method in ("lora", "pivotal"):
        config = config_of(tmp_path, **FIELDS | {"method": method, "steps": 10})
        earlier = json.loads(config.to_json())
        config.steps = 20
        with pytest.raises(ConfigError, match="steps: 10") if method == "pivotal" else contextlib.nullcontext():
            check_resumable(config, earlier)


@pytest.mark.slow
def test_pivotal_tuning_goes_on_from_its_two_files(micro, tmp_path):
    job, params, fresh, _ = job_of(micro, tmp_path, method="pivotal")
    moved = {name: np.asarray(value) + 0.125 for name, value in fresh.items()}
    files = {"init_adapter": str(tmp_path / "dog.safetensors"), "init_embedding": str(tmp_path / "sks.safetensors")}
    factors = {name: x for name, x in job.method.adapter(moved).items() if not is_row(name)}
    write_kohya(files["init_adapter"], factors, about_adapter(job.pipeline, job.config, "dog"), dtype="float32")
    write_embeddings(files["init_embedding"], list(rows_of(moved).values()))
    for field, file in files.items():
        job = job_of(micro, tmp_path, method="pivotal", **{field: file})[0]
        found = begin(job, params)[0]
        for name, value in moved.items():
            is_stored = is_row(name) == (field == "init_embedding")
            np.testing.assert_allclose(found[name], value if is_stored else fresh[name], rtol=1e-6, err_msg=name)
    for fields, message in (
        ({"method": "pivotal", "token_vectors": 1, "init_embedding": files["init_embedding"]}, "has 2 vectors"),
        ({"method": "lora", "init_embedding": files["init_embedding"]}, "trains no token"),
        ({"method": "inversion", "init_adapter": files["init_adapter"]}, "trains no adapter"),
    ):
        with pytest.raises(ConfigError, match=message):
            parameters_to_continue(job_of(micro, tmp_path, **fields)[0])


def test_custom_diffusion_trains_the_token_and_cross_attentions_keys_and_values(micro, tmp_path):
    job, _, trainable, frozen = job_of(micro, tmp_path, method="custom")
    assert job.method.adapter is None  # its file is found by comparison with the base
    kernels = {name for name in trainable if not is_row(name)}
    assert kernels and all(name.endswith((".attn2.to_k.kernel", ".attn2.to_v.kernel")) for name in kernels)
    assert TABLE in frozen and list(rows_of(trainable)) == ["text_encoder"]


@pytest.mark.slow
def test_diffusers_paints_with_the_embedding_what_we_paint(inverted, micro, tmp_path, capsys):
    path = tmp_path / "sks.safetensors"
    export.main(["--workdir", str(inverted), "--output", str(path)])
    said = capsys.readouterr().out
    assert "0 at most" in said and "load_textual_inversion" in said, said
    assert list(load_file(path)) == ["emb_params"]
    theirs = StableDiffusionPipeline.from_pretrained(micro)
    theirs.load_textual_inversion(str(path), token="<sks>")
    prompt = "a <sks> dog in the snow"
    ours = painted_by_sample(tmp_path / "run", "--workdir", str(inverted), prompt=prompt)
    assert np.abs(painted_by_diffusers(theirs, prompt) - ours).max() <= 2e-3 + 0.5 / 255
    again = painted_by_sample(tmp_path / "file", "--base", micro, f"--embedding=<sks>={path}", prompt=prompt)
    assert np.abs(again - ours).max() <= 1 / 255
    assert np.abs(painted_by_sample(tmp_path / "base", "--base", micro, prompt=prompt) - ours).max() > 0.02


@pytest.mark.parametrize("kind", ["sd", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_a_new_word_that_starts_as_dog_is_read_as_dog(kind, micro, tmp_path):
    """In SDXL's pooled embedding too, at the first end token; transformers would pool at the new word."""
    if kind == "sdxl":
        write_sdxl(tmp_path)
    plain = load_pipeline(micro if kind == "sd" else str(tmp_path))
    params, pipeline = read_params(plain), plain.with_token("<sks>", 1)
    method = inversion(pipeline.trainable(TEXT), 1, lambda: pipeline.ids_of("dog"))
    trainable, frozen = method.start(params, jax.random.key(0))
    assert len(trainable) == (1 if kind == "sd" else 2)
    found = pipeline.encode_text(method.combine(frozen, trainable), pipeline.tokenize(["a <sks> in the snow"]))
    expected = plain.encode_text(params, plain.tokenize(["a dog in the snow"]))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-6, err_msg=name)
    write_embeddings(tmp_path / "sks.safetensors", list(rows_of(trainable).values()))
    assert set(load_file(tmp_path / "sks.safetensors")) == ({"emb_params"} if kind == "sd" else {"clip_l", "clip_g"})
    again = read_embeddings(tmp_path / "sks.safetensors", list(widths(plain.shapes).values()))
    for row, value in zip(again, trainable.values(), strict=True):
        np.testing.assert_array_equal(row, value)


def test_embedding_files_of_other_tools(tmp_path, monkeypatch):
    rows = np.arange(8, dtype=np.float32).reshape(2, 4)
    for name, tensors, sizes in (
        ("kohya", {"emb_params": rows}, [4]),
        ("diffusers", {"<sks>": rows}, [4]),
        ("one", {"<sks>": rows[0]}, [4]),
        ("xl", {"clip_l": rows, "clip_g": np.zeros((2, 5), np.float32)}, [4, 5]),
    ):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        found = read_embeddings(tmp_path / f"{name}.safetensors", sizes)
        np.testing.assert_array_equal(found[0], rows[:1] if name == "one" else rows)
    with pytest.raises(WeightsError, match=r"rows of width 4, but this base.s text encoders have 9"):
        read_embeddings(tmp_path / "kohya.safetensors", [9])
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": torch.from_numpy(rows)}}, tmp_path / "a.pt")
    with pytest.raises(WeightsError, match="a pickle") as refused:
        read_embeddings(tmp_path / "a.pt", [4])
    *_, code, source, target = shlex.split(str(refused.value).splitlines()[-1])  # the command that it gives converts
    monkeypatch.setattr(sys, "argv", ["-c", source, target])
    exec(code)
    np.testing.assert_array_equal(read_embeddings(target, [4])[0], rows)


def test_a_word_that_is_a_token_is_an_error(micro, tmp_path):
    with pytest.raises(ValueError, match="identifier = 'sks' is a token of this base already"):
        open_base(config_of(tmp_path, base=micro, method="inversion", **FIELDS | {"identifier": "sks"}))


def test_several_new_words_have_ids_of_their_own(micro):
    plain = load_pipeline(micro)
    pipeline, size = plain.with_token("<one>", 2).with_token("<two>", 1), plain.models.specs["text_encoder"].vocab_size
    found = [int(i) for i in pipeline.tokenize(["a <two> and <one> dog"])["ids"][0] if i >= size]
    assert found == [size + 2, size, size + 1]
    with pytest.raises(ValueError, match="identifier = '<one>' is a token"):
        pipeline.with_token("<one>", 1)


def test_every_photo_is_shown_with_every_wording(tmp_path):
    from dreambooth_jax.data.images import Examples

    corners = np.arange(4, dtype=np.int32).reshape(2, 2)
    examples = Examples(np.zeros((2, 4, 4, 3), np.uint8), ("a", "b"), ("0.jpg", "1.jpg"), corners, corners)
    config = config_of(tmp_path, method="inversion", **FIELDS)
    found = with_templates(examples, config)
    count = len(TEMPLATES["object"])
    assert len(set(found.captions)) == count and len(found.images) == len(found.captions) == 2 * count
    assert "a photo of <sks>" in found.captions
    np.testing.assert_array_equal(found.crop[::2], np.repeat(corners[:1], count, axis=0))
    assert with_templates(examples, config_of(tmp_path)) is examples
