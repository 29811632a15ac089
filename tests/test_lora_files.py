"""Adapter files: reading undoes writing on full-size shapes, and other tools' rules use every key."""

import json
import types

import jax
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

from dreambooth_jax.adapters.factors import add, by_module
from dreambooth_jax.adapters.lora import lora
from dreambooth_jax.families.pipeline import describe_base
from dreambooth_jax.files import bases, lora_kohya
from dreambooth_jax.files.lora_kohya import About, write_kohya
from dreambooth_jax.files.lora_peft import write_peft
from dreambooth_jax.files.lora_read import from_file, read_adapter
from dreambooth_jax.files.single_file import SD1, SD2, XL
from dreambooth_jax.files.weight_files import WeightsError

SD15, SD21 = "stable-diffusion-v1-5/stable-diffusion-v1-5", "stabilityai/stable-diffusion-2-1"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
PARTS = r"^(unet|text_encoder|text_encoder_2)\."
FORMS = ("lora", "dora", "loha", "lokr")


@pytest.fixture(scope="module")
def shapes():
    return {base: dict(describe_base(base).shapes) for base in (SD15, SD21, SDXL)}


def factors_of(shapes, targets="attention", form="lora", rank=4, **settings):
    """Distinct values in every factor, scaled as files have them."""
    found = lora(PARTS, targets, rank, 2.0, form=form, **settings).shapes(shapes)[0]
    return {n: np.full(x.shape, i + 1, np.float32) for i, (n, x) in enumerate(found.items())}


def about(layout=SD1, v=False):
    return About(layout, v, "dog", "sks dog", "base", {"steps": 3, "learning_rate": 1e-4})


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        np.testing.assert_array_equal(found[name], value, err_msg=name)


COUNTS = [(SD15, "attention", 528), (SD15, "all", 1050), (SD21, "attention", 660), (SD21, "all", 1248)]


@pytest.mark.parametrize(("base", "targets", "count"), COUNTS)
def test_other_tools_use_every_key(shapes, base, targets, count):
    keys = set(lora_kohya.to_file(factors_of(shapes[base], targets, rank=1), several=False))
    assert len(keys) == count
    # ComfyUI's and kohya's rule: a prefix, and the names of diffusers' modules with underscores.
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(bases.CONFIGS[base]["unet"])
    theirs = {
        f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}"
        for key in unet.state_dict()
        if key.endswith(".weight")
    }
    modules = ("self_attn_q_proj", "self_attn_k_proj", "self_attn_v_proj", "self_attn_out_proj", "mlp_fc1", "mlp_fc2")
    theirs |= {f"lora_te_text_model_encoder_layers_{layer}_{name}" for layer in range(32) for name in modules}
    assert {key.split(".")[0] for key in keys} <= theirs
    assert {key.partition(".")[2] for key in keys} == {"lora_down.weight", "lora_up.weight", "alpha"}


@pytest.mark.parametrize(("base", "form"), [(SD21, "lora"), *((SD15, form) for form in FORMS)])
def test_reading_undoes_writing(shapes, base, form, tmp_path):
    ranks = (("attn2", 2, 1.0),)
    factors = factors_of(shapes[base], "all" if form == "lora" else "attention", form, ranks=ranks)
    write_kohya(tmp_path / "dog.safetensors", factors, about(), dtype="float32")
    found, metadata = read_adapter(tmp_path / "dog.safetensors", shapes[base])
    assert_same(found, factors)
    assert metadata["modelspec.trigger_phrase"] == "sks dog" and metadata["ss_network_dim"] == "4"
    assert metadata["ss_steps"] == "3" and metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    if form in ("lora", "dora"):
        write_peft(tmp_path / "peft.safetensors", factors, dtype="float32")
        found, metadata = read_adapter(tmp_path / "peft.safetensors", shapes[base])
        config = json.loads(metadata["lora_adapter_metadata"])
        assert config["unet.r"] == config["unet.lora_alpha"] == 4 and config["unet.use_dora"] == (form == "dora")
        for module, named in by_module(factors).items():  # padded with zeros to one rank
            a, b = found[f"{module}.lora_A.kernel"], found[f"{module}.lora_B.kernel"]
            rank = len(named["lora_B.kernel"])
            np.testing.assert_array_equal(a[..., :rank], named["lora_A.kernel"])
            np.testing.assert_array_equal(b[:rank], named["lora_B.kernel"])
            assert not a[..., rank:].any() and not b[rank:].any()
    else:
        with pytest.raises(ValueError, match="PEFT files hold LoRA and DoRA"):
            write_peft(tmp_path / "peft.safetensors", factors, dtype="float32")


def test_sdxl_files_with_the_names_of_either_code(shapes, tmp_path):
    """Two text encoders; kohya's own files have LDM's block names, which the reader takes too."""
    factors = factors_of(shapes[SDXL], "cross", rank=1)
    factors |= factors_of({n: x for n, x in shapes[SDXL].items() if n.startswith("text")}, rank=1)
    write_kohya(tmp_path / "dog.safetensors", factors, about(XL), dtype="float32")
    found, metadata = read_adapter(tmp_path / "dog.safetensors", shapes[SDXL])
    assert_same(found, factors)
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    tensors = load_file(tmp_path / "dog.safetensors")
    assert {key.split("_")[1] for key in tensors} == {"unet", "te1", "te2"}
    heads = lora_kohya.heads({name.rpartition(".")[0]: None for name in shapes[SDXL]})
    ldm = {module: head for head, module in heads.items() if head.startswith(("lora_unet_input_", "lora_unet_output_"))}
    theirs = {}
    for key, value in tensors.items():
        head, _, leaf = key.partition(".")
        theirs[f"{ldm.get(heads[head], head)}.{leaf}"] = value
    end = "transformer_blocks_1_attn2_to_k.alpha"
    assert f"lora_unet_down_blocks_1_attentions_0_{end}" in tensors and f"lora_unet_input_blocks_4_1_{end}" in theirs
    assert_same(from_file(theirs, metadata, shapes[SDXL]), factors)


def test_metadata_tell_what_the_base_is(shapes, tmp_path):
    write_kohya(tmp_path / "dog.safetensors", factors_of(shapes[SD21]), about(SD2, True), dtype="float16")
    with safe_open(tmp_path / "dog.safetensors", "numpy") as file:
        metadata = file.metadata()
        assert {file.get_tensor(key).dtype for key in file.keys()} == {np.dtype("float16")}  # noqa: SIM118
    assert metadata["ss_v2"] == "True" and metadata["ss_base_model_version"] == "sd_v2_v"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
    assert metadata["modelspec.prediction_type"] == "v" and metadata["ss_network_module"] == "networks.lora"


class Tiny:
    """One attention layer and one convolution, and the files of other tools for them."""

    q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    out = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
    conv = "unet.down_blocks.0.resnets.0.conv1"
    text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    sizes = ((q, (6, 4)), (out, (4, 6)), (conv, (3, 3, 6, 4)), (text, (6, 4)))
    shapes = types.MappingProxyType({f"{n}.kernel": jax.ShapeDtypeStruct(s, np.float32) for n, s in sizes})


def rand(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def read(tensors, metadata=None):
    return from_file(tensors, metadata or {}, Tiny.shapes)


def kernel_difference(factors, module):
    """What is added to the module's kernel, in the layout of PyTorch."""
    base = {n: np.zeros(s.shape, np.float32) + 0.5 for n, s in Tiny.shapes.items()}
    changed = np.asarray(add(base, factors)[f"{module}.kernel"]) - 0.5
    return changed.T if changed.ndim == 2 else changed.transpose(3, 2, 0, 1)


def test_names_of_other_tools(tmp_path):
    down, up = rand(2, 6), rand(4, 2)
    expected = up @ down
    block = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    te = "text_model.encoder.layers.0.self_attn"
    for head, lower, upper, module in (
        (f"unet.{block}.processor.to_q_lora", "down.weight", "up.weight", Tiny.q),
        (f"{block}.processor.to_q_lora", "down.weight", "up.weight", Tiny.q),
        (f"unet.{block}.to_q.lora", "down.weight", "up.weight", Tiny.q),
        (f"unet.{block}.to_q", "lora_A.weight", "lora_B.weight", Tiny.q),
        (f"base_model.model.{block}.to_q", "lora_A.weight", "lora_B.weight", Tiny.q),
        (f"unet.{block}.to_q", "lora_down.weight", "lora_up.weight", Tiny.q),
        ("lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q", "lora_down.weight", "lora_up.weight", Tiny.q),
        ("diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q", "lora_A.weight", "lora_B.weight", Tiny.q),
        (f"text_encoder.{te}.q_proj.lora_linear_layer", "down.weight", "up.weight", Tiny.text),
        (f"text_encoder.{te}.to_q_lora", "down.weight", "up.weight", Tiny.text),
        ("lora_te_text_model_encoder_layers_0_self_attn_q_proj", "lora_down.weight", "lora_up.weight", Tiny.text),
        ("lora_te1_text_model_encoder_layers_0_self_attn_q_proj", "lora_down.weight", "lora_up.weight", Tiny.text),
    ):
        factors = read({f"{head}.{lower}": down, f"{head}.{upper}": up})
        np.testing.assert_allclose(kernel_difference(factors, module), expected, atol=1e-6, err_msg=head)
    older = {
        f"unet.{block}.processor.to_out_lora.down.weight": rand(2, 4),
        f"unet.{block}.processor.to_out_lora.up.weight": rand(6, 2),
    }
    np.testing.assert_allclose(kernel_difference(read(older), Tiny.out), rand(6, 2) @ rand(2, 4), atol=1e-6)


def test_alphas_and_metadata_scale():
    head, down, up = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", rand(2, 6), rand(4, 2)
    kohya = {f"{head}.lora_down.weight": down, f"{head}.lora_up.weight": up, f"{head}.alpha": np.float32(1.0)}
    np.testing.assert_allclose(kernel_difference(read(kohya), Tiny.q), 0.5 * up @ down, atol=1e-6)
    peft = {f"{Tiny.q}.lora_A.weight": down, f"{Tiny.q}.lora_B.weight": up}
    config = {"unet.r": 2, "unet.lora_alpha": 2, "unet.alpha_pattern": {"attn1.to_q": 6}}
    metadata = {"lora_adapter_metadata": json.dumps(config)}
    np.testing.assert_allclose(kernel_difference(read(peft, metadata), Tiny.q), 3 * up @ down, atol=1e-5)
    metadata = {"lora_adapter_metadata": json.dumps(config | {"unet.use_rslora": True})}
    np.testing.assert_allclose(kernel_difference(read(peft, metadata), Tiny.q), 3 * 2**0.5 * up @ down, atol=1e-5)


def test_what_lycoris_writes():
    """Against its formulas in PyTorch, which ComfyUI shares."""
    head = "lora_unet_down_blocks_0_resnets_0_conv1"
    t = lambda *shape: torch.from_numpy(rand(*shape))  # noqa: E731
    a, b, core = t(4, 2), t(2, 54), t(2, 2, 3, 3)
    tucker = torch.einsum("pqhw,po,qi->oihw", core, t(2, 4), t(2, 6))
    cases = {
        "loha": (
            {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a + 1, "hada_w2_b": b + 1},
            ((a @ b) * ((a + 1) @ (b + 1))).reshape(4, 6, 3, 3),
        ),
        "loha, tucker": (
            {
                "hada_t1": core,
                "hada_w1_a": t(2, 4),
                "hada_w1_b": t(2, 6),
                "hada_t2": core,
                "hada_w2_a": t(2, 4),
                "hada_w2_b": t(2, 6),
            },
            tucker * tucker,
        ),
        "lokr": (
            {"lokr_w1": t(2, 3), "lokr_w2_a": t(2, 1), "lokr_w2_b": t(1, 18)},
            torch.kron(t(2, 3)[..., None, None], (t(2, 1) @ t(1, 18)).reshape(2, 2, 3, 3)),
        ),
        "locon": (
            {"lora_down.weight": t(2, 6, 3, 3), "lora_up.weight": t(4, 2)[..., None, None]},
            torch.einsum("or,rihw->oihw", t(4, 2), t(2, 6, 3, 3)),
        ),
        "locon, tucker": (
            {
                "lora_down.weight": t(2, 6)[..., None, None],
                "lora_mid.weight": core,
                "lora_up.weight": t(4, 2)[..., None, None],
            },
            torch.einsum("op,pqhw,qi->oihw", t(4, 2), core, t(2, 6)),
        ),
        "diff": ({"diff": t(4, 6, 3, 3)}, t(4, 6, 3, 3)),
    }
    for form, (leaves, expected) in cases.items():
        tensors = {f"{head}.{leaf}": x.numpy() for leaf, x in leaves.items()}
        ranks = {"loha": 2, "loha, tucker": 2, "lokr": 1, "locon": 2, "locon, tucker": 2}
        for alpha in (None, 4.0) if form != "diff" else (None,):
            stated = {f"{head}.alpha": np.float32(alpha)} if alpha else {}
            found = kernel_difference(read(tensors | stated), Tiny.conv)
            scale = alpha / ranks[form] if alpha else 1.0
            np.testing.assert_allclose(found, scale * expected, rtol=1e-4, atol=1e-4, err_msg=form)
    whole = torch.kron(t(2, 2)[..., None, None], t(2, 3, 3, 3)).numpy()  # nothing factored: alpha means nothing
    full = {f"{head}.lokr_w1": rand(2, 2), f"{head}.lokr_w2": rand(2, 3, 3, 3), f"{head}.alpha": np.float32(9.0)}
    np.testing.assert_allclose(kernel_difference(read(full), Tiny.conv), whole, atol=1e-5)
    for axis, shape in ((0, (4, 1, 1, 1)), (1, (1, 6, 1, 1))):  # DoRA, norm per output or per input channel
        tensors = {f"{head}.{leaf}": x.numpy() for leaf, x in cases["locon"][0].items()}
        magnitude = np.abs(rand(*shape))
        moved = 0.5 + cases["locon"][1].numpy()
        norm = np.sqrt(np.square(moved).sum(tuple({0, 1, 2, 3} - {axis}), keepdims=True))
        found = kernel_difference(read(tensors | {f"{head}.dora_scale": magnitude}), Tiny.conv)
        np.testing.assert_allclose(found, magnitude * moved / norm - 0.5, rtol=1e-4, atol=1e-4)
    biased = {f"{head}.diff": rand(4, 6, 3, 3), f"{head}.diff_b": rand(4)}
    with pytest.raises(WeightsError, match="conv1"):  # which has no bias
        read(biased)
    biased = from_file(biased, {}, {**Tiny.shapes, f"{Tiny.conv}.bias": jax.ShapeDtypeStruct((4,), np.float32)})
    np.testing.assert_array_equal(biased[f"{Tiny.conv}.diff.bias"], rand(4))


def test_bad_files(tmp_path):
    (tmp_path / "a.pt").touch()
    save_torch(
        {"lora_unet_mid_block_to_q.lora_down.weight": torch.zeros(2, 2).bfloat16()}, tmp_path / "other.safetensors"
    )
    name = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    wide = {f"{name}.lora_down.weight": rand(2, 9), f"{name}.lora_up.weight": rand(4, 2)}
    save_file(wide, tmp_path / "wide.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"1234")
    for file, message in (
        ("a.pt", "a pickle, which can run code when opened"),
        ("gone.safetensors", "no such file"),
        ("other.safetensors", "1 of 1 tensors have no place in this model.*lora_unet_mid_block_to_q"),
        ("wide.safetensors", r"the tensors of text_encoder.*q_proj do not fit its \(6, 4\)"),
        ("broken.safetensors", "not a readable safetensors file"),
    ):
        with pytest.raises(WeightsError, match=message):
            read_adapter(tmp_path / file, Tiny.shapes)
