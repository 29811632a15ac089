"""Stable Diffusion XL against PyTorch diffusers, and whole runs with it."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from support.runs import assert_same_state, checkpoints, config_of, read_state
from support.sdxl_folders import write_sdxl
from support.torch_folders import unchanged

from dreambooth_jax import export
from dreambooth_jax.adapters.lora import lora
from dreambooth_jax.adapters.method import full
from dreambooth_jax.data.buckets import bucket_sizes
from dreambooth_jax.data.encode import make_encoder
from dreambooth_jax.data.images import read_buckets, read_examples
from dreambooth_jax.data.sources import list_images
from dreambooth_jax.devices.sharding import make_mesh, replicated
from dreambooth_jax.diffusion.examples import TrainingData, draw, rows_of
from dreambooth_jax.diffusion.loss import Batch, dreambooth_loss
from dreambooth_jax.diffusion.optimizer import make_optimizer
from dreambooth_jax.diffusion.sampler import make_sampler, noise_for_seeds
from dreambooth_jax.families.family import DENOISER, TEXT, Pictures
from dreambooth_jax.families.pipeline import load_pipeline, read_params, save_pipeline
from dreambooth_jax.families.sd import _by_picture
from dreambooth_jax.files.lora_kohya import write_kohya
from dreambooth_jax.files.lora_peft import write_peft
from dreambooth_jax.files.safetensors import file_name
from dreambooth_jax.files.single_file import XL, write_single_file
from dreambooth_jax.painting.sheets import save_png
from dreambooth_jax.runs.exports import about_adapter
from dreambooth_jax.runs.preemption import Preemption
from dreambooth_jax.runs.report import Reporter
from dreambooth_jax.runs.setup import set_up
from dreambooth_jax.runs.training import train

RATE, STEPS, PRIOR, DECAY = 5e-4, 5, 0.7, 1e-2
PROMPTS = ["a photo of a sks dog", "a photo of a dog", "a dog of a cat"]  # one instance, two of the class
SIZES = Pictures(
    None, np.int32([[640, 480], [32, 32], [99, 30]]), np.int32([[4, 0], [0, 0], [17, 3]]), np.full((3, 2), 32)
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdxl")
    reference = write_sdxl(folder)
    pipeline = load_pipeline(str(folder))
    with unchanged(reference):
        yield reference, pipeline, read_params(pipeline)


def nchw(x) -> torch.Tensor:
    return torch.from_numpy(np.moveaxis(np.array(x), -1, 1).copy())


def relative(ours, theirs) -> float:
    theirs = theirs.detach().numpy()
    return np.linalg.norm(np.asarray(ours) - theirs) / np.linalg.norm(theirs)


def encode_prompts(reference, prompts):
    """(states, pooled) as diffusers' own `encode_prompt` gives them, differentiable."""
    states, _, pooled, _ = reference.encode_prompt(prompts, do_classifier_free_guidance=False)
    return states, pooled


def test_prompts_are_encoded_as_diffusers_does(base):
    reference, pipeline, params = base
    cond = pipeline.encode_text(params, pipeline.tokenize(PROMPTS))
    states, pooled = encode_prompts(reference, PROMPTS)
    assert relative(cond["states"], states) <= 1e-4
    assert relative(cond["pooled"], pooled) <= 1e-4


@pytest.fixture(scope="module")
def paint(base):
    """(params, negative prompt or None) -> two pictures."""
    pipeline = base[1]
    sample = make_sampler(pipeline.denoise, pipeline.process, sampler="euler", steps=5)

    @jax.jit
    def painted(params, noise, tokens, negative, empty):
        sizes = pipeline.of_example(Pictures(None, *(np.full((2, 2), side, np.int32) for side in (32, 0, 32))))
        cond, uncond = (pipeline.encode_text(params, t) for t in (tokens, negative))
        return pipeline.decode(
            params, sample(params, noise, cond | sizes, pipeline.negative(uncond, empty) | sizes, 5.0)
        )

    def paint(params, negative=None):
        empty, tokens = np.array([negative is None] * 2), pipeline.tokenize(PROMPTS[:2])
        return np.asarray(painted(params, noise_of(pipeline), tokens, pipeline.tokenize([negative or ""] * 2), empty))

    return paint


def noise_of(pipeline):
    return noise_for_seeds(np.arange(2), pipeline.example_shape(32))


def painted_by(theirs, pipeline, negative=None) -> np.ndarray:
    """The same pictures by diffusers."""
    theirs.set_progress_bar_config(disable=True)
    found = theirs(
        PROMPTS[:2],
        negative_prompt=negative and [negative] * 2,
        latents=nchw(noise_of(pipeline)),
        num_inference_steps=5,
        guidance_scale=5.0,
        height=32,
        width=32,
        output_type="np",
    ).images
    assert found.std() > 0.02
    return found


@pytest.mark.slow
def test_an_export_paints_in_diffusers_what_it_paints_here(base, paint, tmp_path):
    """Guidance with an empty negative prompt, which is zeros, and one that is not."""
    _, pipeline, params = base
    params = {n: np.float32(1.1) * np.asarray(v) if "attn" in n else v for n, v in params.items()}
    save_pipeline(pipeline, params, tmp_path)
    theirs = StableDiffusionXLPipeline.from_pretrained(tmp_path, add_watermarker=False)
    for negative in (None, "a cat"):
        assert np.abs(paint(params, negative) - painted_by(theirs, pipeline, negative)).max() <= 2e-3


@pytest.mark.slow
@pytest.mark.parametrize("form", ["kohya", "peft"])
def test_an_adapter_paints_in_diffusers_what_it_paints_here(base, paint, form, tmp_path):
    """Random factors of every layer of UNet and both towers."""
    _, pipeline, params = base
    method = lora(pipeline.trainable(DENOISER, TEXT), "transformer", 2, 4.0)
    trainable, frozen = method.start(params, jax.random.key(0))
    rng = np.random.default_rng(0)
    trainable = {n: jnp.asarray(0.1 * rng.standard_normal(x.shape, np.float32)) for n, x in trainable.items()}
    path, factors = tmp_path / "sks.safetensors", method.adapter(trainable)
    if form == "kohya":
        write_kohya(path, factors, about_adapter(pipeline, config_of(tmp_path), "sks"), dtype="float32")
    else:
        write_peft(path, factors, dtype="float32")
    theirs = StableDiffusionXLPipeline.from_pretrained(pipeline.folder, add_watermarker=False)
    theirs.load_lora_weights(path)
    ours = paint(method.combine(frozen, trainable))
    assert np.abs(ours - painted_by(theirs, pipeline)).max() <= 2e-3
    assert np.abs(ours - paint(params)).max() > 0.02


@pytest.mark.slow
def test_a_single_file_paints_in_diffusers_what_it_paints_here(base, paint, tmp_path):
    _, pipeline, params = base
    path = tmp_path / "model.safetensors"
    write_single_file(path, params, XL, dtype="float32", metadata={"format": "pt"})
    theirs = StableDiffusionXLPipeline.from_single_file(
        str(path), config=str(pipeline.folder), local_files_only=True, add_watermarker=False
    )
    assert np.abs(paint(params) - painted_by(theirs, pipeline)).max() <= 2e-3


def test_large_pictures_pass_the_autoencoder_one_at_a_time(base):
    """Alone and divided over a mesh, with the numbers of the whole batch."""
    _, pipeline, params = base
    latents = np.random.default_rng(0).standard_normal((4, 8, 8, 4), np.float32)
    images = np.random.default_rng(1).standard_normal((4, 16, 16, 3), np.float32)

    def both(params, latents, images, size):
        decoded, moments = (
            _by_picture(lambda x, m=method: pipeline.models.apply("vae", params, x, method=m), batch, size)
            for method, batch in (("decode", latents), ("encode", images))
        )
        return [decoded, *moments]

    run = jax.jit(both, static_argnums=3)
    expected = run(params, latents, images, (16, 16))
    alone = run(params, latents, images, (1024, 1024))
    mesh = make_mesh(2, 2, jax.devices()[:4])
    with jax.set_mesh(mesh):
        divided = run(jax.device_put(params, replicated(mesh)), latents, images, (1024, 1024))
    for found in (alone, divided):
        for x, y in zip(found, expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def torch_loss(reference, batch: Batch, prompts=PROMPTS, sizes=SIZES[1:], num_instance=1, weight=1.0) -> torch.Tensor:
    """The DreamBooth loss as diffusers' SDXL script computes it, with each picture's own sizes.

    Args:
        sizes: original height and width, top and left of the crop, height and width after it, of every picture.
        weight: of every latent pixel, of mean 1.
    """
    states, pooled = encode_prompts(reference, prompts)
    x0, eps, t = nchw(batch.x0), nchw(batch.eps), torch.from_numpy(np.array(batch.t, np.int64))
    alpha_bar = reference.scheduler.alphas_cumprod[t][:, None, None, None]
    noisy = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps
    sizes = torch.from_numpy(np.concatenate(sizes, -1)).float()
    prediction = reference.unet(
        noisy, t, encoder_hidden_states=states, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}
    ).sample
    each = (torch.nn.functional.mse_loss(prediction, eps, reduction="none") * weight).mean(dim=(1, 2, 3))
    return each[:num_instance].mean() + PRIOR * each[num_instance:].mean()


@pytest.mark.slow
def test_gradients_and_training_are_those_of_pytorch(base):
    """Loss, the gradient of every parameter of UNet and both towers, and five AdamW steps. Layers that no result
    depends on have no gradient and do not move; the key biases of the towers have none but rounding."""
    reference, pipeline, params = base
    reference = copy.deepcopy(reference)  # the other tests compare with the one that is not trained
    rng = np.random.default_rng(0)
    x0, eps = (rng.standard_normal((3, 8, 8, 4), np.float32) for _ in range(2))
    cond = pipeline.tokenize(PROMPTS) | pipeline.of_example(SIZES)
    batch = Batch(x0, eps, jnp.asarray([10, 450, 999]), cond)
    trainable, frozen = full(pipeline.trainable(DENOISER, TEXT)).start(params, None)
    optimizer = optax.with_extra_args_support(
        make_optimizer("adamw", optax.constant_schedule(RATE), weight_decay=DECAY, clip_norm=None)
    )

    @jax.jit
    def step(trainable, state):
        def loss(p):
            return dreambooth_loss(
                pipeline.denoise_tokens, frozen | p, batch, pipeline.process, num_instance=1, prior_weight=PRIOR
            ).loss

        value, grads = jax.value_and_grad(loss)(trainable)
        updates, state = optimizer.update(grads, state, trainable, grad_norm=optax.tree.norm(grads))
        return optax.apply_updates(trainable, updates), state, value, grads

    parts = {name: getattr(reference, name) for name in ("unet", "text_encoder", "text_encoder_2")}
    theirs = {f"{part}.{n}": p for part, model in parts.items() for n, p in model.named_parameters()}
    ours_to_theirs = {name: torch_name(name, theirs) for name in params if name.partition(".")[0] in parts}
    torch_optimizer = torch.optim.AdamW(theirs.values(), lr=RATE, weight_decay=DECAY)
    state = optimizer.init(trainable)
    for number in range(STEPS):
        torch_optimizer.zero_grad()
        expected = torch_loss(reference, batch)
        expected.backward()
        trainable, state, value, grads = step(trainable, state)
        if number == 0:
            assert abs(float(value) / expected.item() - 1) <= 1e-4
            idle = {name for name, other in ours_to_theirs.items() if theirs[other].grad is None}
            assert idle and idle == ours_to_theirs.keys() - trainable.keys()
            total = np.sqrt(sum(np.square(g).sum() for g in grads.values()))
            errors = {
                name: relative(grad, as_ours(name, theirs[ours_to_theirs[name]].grad))
                for name, grad in grads.items()
                if not name.endswith("k_proj.bias")
            }
            worst = max(errors, key=errors.get)
            assert errors[worst] <= 1e-3, (worst, errors[worst])
            assert all(np.linalg.norm(g) < 1e-5 * total for n, g in grads.items() if n not in errors)
        torch_optimizer.step()
    errors = {
        name: relative(value, as_ours(name, theirs[ours_to_theirs[name]]))
        for name, value in trainable.items()
        if not name.endswith("k_proj.bias")
    }
    worst = max(errors, key=errors.get)
    assert errors[worst] <= 1e-4, (worst, errors[worst])


def torch_name(name: str, theirs) -> str:
    """PyTorch's name: transformers 5 leaves out the wrapper of the text model."""
    stored = file_name(name)
    return stored if stored in theirs else stored.replace(".text_model.", ".", 1)


def as_ours(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A PyTorch tensor with the axes of our parameter `name`."""
    if not name.endswith(".kernel"):
        return tensor.detach()
    return tensor.detach().permute(2, 3, 1, 0) if tensor.ndim == 4 else tensor.detach().T


RUN = {
    "resolution": 16,
    "num_class_images": 4,
    "class_batch_size": 4,
    "steps": 4,
    "steps_per_call": 2,
    "batch_size": 2,
    "save_every": 2,
    "sample_every": 4,
    "sampling_steps": 2,
    "sampler": "euler",
    "sample_count": 1,
    "sample_prompts": ("a {identifier} {class_noun}",),
    "crop": "random",
}


def test_class_images_keep_their_own_sizes(base, tmp_path):
    """Photos are of other sizes than painted class images: each has its own condition."""
    _, pipeline, params = base
    mesh = make_mesh(1, 1, jax.devices()[:1])
    config = config_of(tmp_path / "run", **RUN)
    photos = read_examples(
        config.instance_images,
        16,
        template="a {identifier} {class_noun}",
        identifier="sks",
        class_noun="dog",
        crop="random",
        seed=3,
    )
    save_png(tmp_path / "class" / "0.png", np.zeros((16, 16, 3), np.uint8), {})
    painted = read_examples(tmp_path / "class", 16, template="a {class_noun}", identifier="sks", class_noun="dog")
    encode = make_encoder(pipeline, mesh, text_states=True)
    data = TrainingData(encode(params, photos), encode(params, painted))
    sizes = {tuple(np.asarray(row)) for row in data.instance.of_example["sizes"]}
    files = [Image.open(path).size for path in list_images(config.instance_images)]
    assert {row[:2] for row in sizes} == {(h, w) for w, h in files} and {row[4:] for row in sizes} == {(16, 16)}
    assert data.prior.of_example["sizes"].tolist() == [[16, 16, 0, 0, 16, 16]]
    batch = draw(data, pipeline.process, 2, jax.random.key(0), jnp.int32(0), pipeline.example_shape(16))
    assert batch.cond["sizes"][2:].tolist() == [[16, 16, 0, 0, 16, 16]] * 2
    assert {tuple(row.tolist()) for row in batch.cond["sizes"][:2]} <= sizes
    # The class has another prompt than the subject, in both towers' states and in the pooled embedding.
    for name in ("states", "pooled"):
        np.testing.assert_array_equal(batch.cond[name][2], data.prior.cond[name][0])
        assert np.abs(batch.cond[name][0] - batch.cond[name][2]).max() > 1e-3


def test_a_batch_of_a_bucket_has_the_loss_of_diffusers(base, tmp_path):
    """A shape that is no square: sizes, masks and prompts of both halves."""
    reference, pipeline, params = base
    for number, (width, height) in enumerate([(60, 40), (96, 60)]):
        opacity = Image.new("L", (width, height))
        opacity.paste(255, (0, 0, width // 2, height))
        picture = Image.effect_noise((width, height), 60).convert("RGB")
        picture.putalpha(opacity)
        save_photo(tmp_path / "photos" / f"{number}.png", picture, f"sks dog, {'snow' if number else 'sand'}")
    save_photo(tmp_path / "class" / "0.png", Image.effect_noise((50, 50), 60).convert("RGB"), "a dog")
    options = {"template": "", "identifier": "sks", "class_noun": "dog"}
    (photos,) = read_buckets(tmp_path / "photos", bucket_sizes(32, pipeline.multiple), masked=True, **options)
    height, width = photos.images.shape[1:3]
    assert height < width and [(y, x) for y, x in photos.original.tolist()] == [(40, 60), (60, 96)]
    (of_class,) = read_buckets(tmp_path / "class", ((height, width),), **options)
    of_class = of_class._replace(masks=np.full((1, height, width), 255, np.uint8))
    encode = make_encoder(pipeline, make_mesh(1, 1, jax.devices()[:1]), text_states=True)
    data, key = TrainingData(encode(params, photos), encode(params, of_class)), jax.random.key(0)
    batch = draw(data, pipeline.process, 2, key, jnp.int32(0), pipeline.example_shape(height, width))
    loss = jax.jit(
        lambda params: dreambooth_loss(
            pipeline.denoise, params, batch, pipeline.process, num_instance=2, prior_weight=PRIOR
        )
    )(params)
    rows = np.asarray(rows_of(data, 2, key, 0))
    original = np.concatenate([photos.original[rows[:2]], of_class.original[rows[2:]]])
    scale = np.maximum(height / original[:, 0], width / original[:, 1])[:, None]
    corner = np.round((original * scale - (height, width)) / 2).astype(int)
    masks = torch.from_numpy(np.concatenate([photos.masks[rows[:2]], of_class.masks[rows[2:]]])[:, None] / 255.0)
    weight = torch.nn.functional.avg_pool2d(masks.float(), height // batch.x0.shape[1])
    expected = torch_loss(
        reference,
        batch,
        [*(photos.captions[row] for row in rows[:2]), "a dog", "a dog"],
        (original, corner, np.full((4, 2), (height, width))),
        2,
        weight / weight.mean((1, 2, 3), keepdim=True),
    )
    assert 0 < weight[:2].mean() < 0.6
    assert abs(float(loss.loss) / expected.item() - 1) <= 1e-4


def save_photo(path, picture, caption) -> None:
    path.parent.mkdir(exist_ok=True)
    picture.save(path)
    path.with_suffix(".txt").write_text(caption)


@pytest.mark.slow
def test_a_run_trains_resumes_and_exports(base, tmp_path):
    """LoRA on UNet and both towers in bfloat16, stopped after half of its steps; diffusers loads the factors."""
    _, pipeline, _ = base
    fields = RUN | {"base": str(pipeline.folder), "method": "lora", "dtype": "bfloat16", "learning_rate": 1e-2}
    config = config_of(tmp_path / "run", **fields)
    with pytest.raises(KeyboardInterrupt):
        train_to(config, stop_after=2)
    assert checkpoints(tmp_path / "run") == [2]
    train_to(config)
    whole = config_of(tmp_path / "whole", **fields)
    train_to(whole)
    assert_same_state(read_state(tmp_path / "run", 4), read_state(tmp_path / "whole", 4))
    state = read_state(tmp_path / "run", 4)
    assert {name.split("'")[3].split(".")[0] for name in state if "trainable" in name} == set(TRAINED)
    assert len(list((tmp_path / "run" / "class_images").glob("*.png"))) == 4
    assert (tmp_path / "run" / "samples" / "step_000004.png").exists()
    export.main(["--workdir", str(tmp_path / "run"), "--output", str(tmp_path / "lora"), "--format", "peft"])
    theirs = StableDiffusionXLPipeline.from_pretrained(pipeline.folder, add_watermarker=False)
    theirs.load_lora_weights(tmp_path / "lora")
    assert theirs.get_list_adapters().keys() == set(TRAINED)
    export.main(["--workdir", str(tmp_path / "run"), "--output", str(tmp_path / "model"), "--format", "folder"])
    merged = read_params(load_pipeline(str(tmp_path / "model")))
    theirs.fuse_lora(components=TRAINED)
    for part in TRAINED:
        for name, tensor in getattr(theirs, part).named_parameters():
            if name.endswith(("to_q.base_layer.weight", "out_proj.base_layer.weight")):
                prefix = "" if part == "unet" or name.startswith("text_model.") else "text_model."
                ours = merged[f"{part}.{prefix}{name.replace('.base_layer.weight', '.kernel')}"]
                np.testing.assert_allclose(ours, tensor.detach().numpy().T, atol=1e-5)


TRAINED = ["unet", "text_encoder", "text_encoder_2"]


def train_to(config, stop_after: int | None = None) -> None:
    """Runs the command's own function; as if interrupted after the save of step `stop_after`."""

    class Stopping(Reporter):
        def record(self, first, *rest):
            super().record(first, *rest)
            if first == stop_after:
                raise KeyboardInterrupt

    with Preemption() as guard:
        train(set_up(config), guard, reporter=Stopping)
