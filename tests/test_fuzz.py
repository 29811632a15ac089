"""Folders of random files, random captions and random config values: one line that names the thing, or a plan; never a
traceback, and nothing that exists is changed."""

import dataclasses
import hashlib
import io
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from support.runs import ROOT

from dreambooth_jax import train
from dreambooth_jax.adapters.factors import add
from dreambooth_jax.data.images import read_examples
from dreambooth_jax.files.hub import resolve_base
from dreambooth_jax.files.lora_read import from_file
from dreambooth_jax.files.weight_files import WeightsError
from dreambooth_jax.models.clip_text import CLIPTextSpec
from dreambooth_jax.models.spec import UnsupportedConfig
from dreambooth_jax.models.unet import UNetSpec
from dreambooth_jax.models.vae import VAESpec
from dreambooth_jax.runs import config_file
from dreambooth_jax.runs.config import FIELDS, check_config
from dreambooth_jax.runs.config_file import complete

DOG = str(ROOT / "configs" / "dog.py")
FAST = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def picture(kind: str, size: tuple[int, int], mode: str) -> bytes:
    data = io.BytesIO()
    Image.new(mode, size).save(data, kind)
    return data.getvalue()


pictures = st.builds(
    picture,
    st.sampled_from(["PNG", "JPEG", "WEBP"]),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.sampled_from(["RGB", "L"]),
)
damaged = st.builds(lambda data, share: data[: int(len(data) * share)], pictures, st.floats(0, 1))
contents = st.one_of(pictures, damaged, st.binary(max_size=60), st.text(max_size=40).map(str.encode))
names = st.one_of(
    st.sampled_from(
        [
            "a.png",
            "b.jpg",
            "c.webp",
            "A.PNG",
            "a.txt",
            "b.caption",
            "metadata.jsonl",
            "metadata.csv",
            ".DS_Store",
            "d",
            "a-masklabel.png",
            "e.heic",
            "f.gif",
            "10_sks dog",
            "README.md",
        ]
    ),
    st.builds(
        lambda stem, end: stem + end,
        st.text("abé狗 {}%_-", min_size=1, max_size=8),
        st.sampled_from([".png", ".jpg", ".txt", ""]),
    ),
)
lines = st.lists(
    st.one_of(
        st.builds(lambda n, t: json.dumps({"file_name": n, "text": t}), names, st.text(max_size=20)),
        st.text(max_size=20),
        st.just('{"file_name": 1}'),
        st.just("[]"),
    ),
    max_size=4,
).map(lambda rows: "\n".join(rows).encode())
folders = st.dictionaries(names, st.one_of(contents, lines), max_size=6)


def listing(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        if (folder / name).is_dir() or not name.strip("."):
            continue
        (folder / name).write_bytes(data)


@pytest.mark.slow
@FAST
@given(files=folders, captions=st.sampled_from(["auto", "template"]))
def test_any_folder_is_read_or_refused_by_name(tmp_path_factory, files, captions):
    folder = tmp_path_factory.mktemp("photos")
    write(folder, files)
    before = listing(folder)
    try:
        examples = read_examples(
            folder,
            16,
            template="a photo of {identifier} {class_noun}",
            identifier="sks",
            class_noun="dog",
            captions=captions,
        )
        assert examples.images.dtype == np.uint8 and len(examples.images) == len(examples.captions) > 0
    except (ValueError, OSError) as error:
        assert str(folder) in str(error) or any(name in str(error) for name in files)
    assert listing(folder) == before


values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=12),
    st.just(()),
    st.lists(st.text(max_size=5), max_size=2).map(tuple),
)


@FAST
@given(changes=st.dictionaries(st.sampled_from(sorted(FIELDS)), values, min_size=1, max_size=4))
def test_any_value_is_taken_or_refused_by_the_name_of_its_field(changes):
    config = config_file.load(DOG)
    with config.ignore_type():
        config.update(changes)
    try:
        check_config(config)
    except ValueError as error:
        assert any(name in str(error) for name in changes)


@FAST
@given(name=st.sampled_from([*sorted(FIELDS), "stepz", "a.b", ""]), text=st.text(max_size=12))
def test_any_word_of_the_command_line_is_taken_or_refused(name, text):
    try:
        config_file.override(config_file.load(DOG), [(name, text)])
    except ValueError as error:
        assert name in str(error)


@FAST
@given(data=st.one_of(st.binary(max_size=30), st.recursive(st.none() | st.integers(), st.lists).map(json.dumps)))
def test_any_config_json_is_read_or_refused_by_name(tmp_path_factory, data):
    from etils import epath

    path = epath.Path(tmp_path_factory.mktemp("run")) / "config.json"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    try:
        complete(config_file.read_json(path))
    except ValueError as error:
        assert "config.json" in str(error)


def outcome(capsys, *arguments: str) -> str:
    """What the command says when it is refused before it starts."""
    try:
        train.main(list(arguments))
    except SystemExit as end:
        assert end.code not in (0, None)
        return f"{end.code}{capsys.readouterr().err}"
    raise AssertionError("it was not refused")


def test_what_is_no_file_is_refused_at_once(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.py")
    assert "not a regular file" in outcome(capsys, "--config", str(tmp_path / "pipe.py"))
    odd = os.fsencode(tmp_path) + b"/\xff.py"
    text = outcome(capsys, "--config", os.fsdecode(odd))
    assert "no such file" in text and text.encode()


def test_what_is_no_photo_is_refused_before_anything_slow(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "run", lambda config: None)
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.jpg").write_bytes(b"")
    (tmp_path / "c.png").write_bytes(picture("PNG", (8, 8), "RGB"))
    text = outcome(capsys, "--config", DOG, f"--config.instance_images={tmp_path}")
    assert "2 of 3 images" in text and "a.png" in text and "b.jpg" in text


def test_a_base_with_a_pipe_is_refused_at_once(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "unet" / "gone.json").symlink_to(tmp_path / "nowhere")
    assert resolve_base(str(tmp_path)) == tmp_path
    os.mkfifo(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.safetensors: not a regular file"):
        resolve_base(str(tmp_path))


entries = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.just({}))


@FAST
@given(
    spec=st.sampled_from([UNetSpec, VAESpec, CLIPTextSpec]),
    data=st.data(),
    value=st.one_of(entries, st.lists(entries, max_size=3)),
)
def test_any_value_in_a_models_config_is_taken_or_refused_by_name(spec, data, value):
    """Such as widths that are text."""
    name = data.draw(st.sampled_from([field.name for field in dataclasses.fields(spec)]))
    try:
        spec.from_config({name: value})
    except UnsupportedConfig as error:
        assert name in str(error) or "blocks" in str(error)


MODEL = {
    "unet.mid_block.attentions.0.proj_in.kernel": (4, 6),
    "unet.mid_block.attentions.0.proj_in.bias": (6,),
    "unet.conv_in.kernel": (3, 3, 4, 6),
    "text_encoder.text_model.embeddings.token_embedding.embedding": (5, 4),
}
MODULES = sorted({name.rpartition(".")[0] for name in MODEL})
LEAVES = [
    *("lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha", "dora_scale", "lora_magnitude_vector", "diff"),
    *("diff_b", "w_norm", "b_norm", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "lokr_w1"),
    *("lokr_w2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "nothing"),
]
tensors = st.dictionaries(
    st.builds("{}.{}".format, st.sampled_from(MODULES), st.sampled_from(LEAVES)),
    st.builds(np.zeros, st.lists(st.sampled_from([0, 1, 2, 4, 6]), max_size=4), st.sampled_from(["f4", "i4", "f2"])),
    min_size=1,
    max_size=5,
)
PATTERN = '{"unet.lora_alpha":2,"unet.alpha_pattern":{"(":1}}'
stated = st.sampled_from(["", "{", "[]", '{"unet.lora_alpha":"x"}', PATTERN])


@FAST
@given(tensors=tensors, stated=stated)
def test_any_adapter_is_merged_or_refused_by_name(tensors, stated):
    shapes = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in MODEL.items()}
    base = {name: np.ones(shape, np.float32) for name, shape in MODEL.items()}
    try:
        factors = from_file(tensors, {"lora_adapter_metadata": stated} if stated else {}, shapes, "a.safetensors")
        merged = add(base, factors)
        assert {name: np.shape(value) for name, value in merged.items()} == MODEL
    except WeightsError as error:
        assert str(error).startswith("a.safetensors: ")


@pytest.mark.parametrize("value", ["16", ["16"], {}])
def test_widths_that_are_text_are_refused(value):
    with pytest.raises(UnsupportedConfig, match=r"cross_attention_dim = .* \(expected whole numbers"):
        UNetSpec.from_config({"cross_attention_dim": value})
    with pytest.raises(UnsupportedConfig, match=r"block_out_channels = .* \(expected a list of whole numbers\)"):
        UNetSpec.from_config({"block_out_channels": value})
