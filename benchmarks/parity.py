"""Stable Diffusion 1.5, 2.1 and XL in full size, beside PyTorch diffusers and transformers: values, gradients, loading.

    python benchmarks/parity.py      # everything: 20 minutes on two cores, 15 GB of memory, 12 GB of disk
    python benchmarks/parity.py --arch sd21 --part text --part vae
    python benchmarks/parity.py --arch sdxl      # values of both towers, VAE and UNet (2.6 B parameters, 11 GB)

The weights are random and written by PyTorch. Every model runs in a process of its own, the reference before ours, so
that one at a time is in memory. Errors are ||ours - reference|| / ||reference||, float32 throughout; the gradient's is
the largest over all parameters of UNet and text encoder. Loading is timed twice from a file that the system has put out
of its memory, beside reading the same file and nothing else.
"""

import argparse
import concurrent.futures
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import numpy as np

os.environ.setdefault("JAX_PLATFORMS", "cpu")

UNET = {
    "sample_size": 64,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
VAE = {
    "sample_size": 512,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
}
TEXT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "bos_token_id": 49406,
    "eos_token_id": 49407,
}
ARCHITECTURES = {
    "sd15": {"unet": UNET, "vae": VAE, "text": TEXT, "prediction": "epsilon"},
    "sd21": {
        "unet": UNET
        | {
            "sample_size": 96,
            "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
            "upcast_attention": True,
        },
        "vae": VAE | {"sample_size": 768},
        "text": TEXT
        | {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 23,
            "num_attention_heads": 16,
            "hidden_act": "gelu",
        },
        "prediction": "v_prediction",
    },
}
XL_TEXT = TEXT | {"eos_token_id": 2, "hidden_act": "gelu"}
ARCHITECTURES["sdxl"] = {
    "unet": {
        "sample_size": 128,
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
        "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
        "layers_per_block": 2,
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "vae": VAE | {"sample_size": 1024, "scaling_factor": 0.13025},
    "text": TEXT,
    "text_2": XL_TEXT
    | {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280,
    },
    "prediction": "epsilon",
}
SUMS = ("gradient", "load")
PARTS = ("text", "text_2", "vae", "unet", *SUMS)
PARTS_OF = {"sdxl": ("text", "text_2", "vae", "unet")}  # tests/test_sdxl.py compares its gradients, in small
PRIOR_WEIGHT = 0.7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="default: both")
    parser.add_argument("--part", action="append", choices=PARTS, help="default: all")
    args = parser.parse_args()
    print("| architecture | what | error or figure | limit |\n|---|---|---|---|", flush=True)
    for arch in args.arch or ARCHITECTURES:
        parts = [part for part in args.part or PARTS if part in PARTS_OF.get(arch, ("text", "vae", "unet", *SUMS))]
        with tempfile.TemporaryDirectory() as folder:
            needed = set(parts) & {"text", "text_2", "vae", "unet"}
            needed |= {"text", "unet"} if "gradient" in parts else set()
            needed |= {"text", "vae", "unet"} if "load" in parts else set()
            for part in sorted(needed):
                alone(write_reference, arch, part, folder)
            for part in parts:
                if part == "gradient":
                    alone(write_reference_gradient, arch, folder)
                compare = {"gradient": compare_gradient, "load": measure_loading}.get(part, compare_values)
                for what, figure, limit in alone(compare, arch, part, folder):
                    print(f"| {arch} | {what} | {figure} | {limit} |", flush=True)


def alone(function, *args):
    """`function(*args)` in a fresh process, which gives all its memory back."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def inputs(arch: str, part: str) -> dict[str, np.ndarray]:
    """The same for both sides, images and latents [b, h, w, c]."""
    config, rng = ARCHITECTURES[arch], np.random.default_rng(0)
    width = config["unet"]["cross_attention_dim"]

    def normal(*shape):
        return rng.standard_normal(shape, np.float32)

    ids = rng.integers(0, 49406, (2, 77))
    return {
        "text": lambda: {"ids": ids},
        "text_2": lambda: {"ids": ids_to_pool(ids)},
        "vae": lambda: {"pixels": np.tanh(normal(1, 256, 256, 3)), "latents": normal(1, 32, 32, 4)},
        "unet": lambda: {
            "x": normal(1, 64, 64, 4),
            "t": np.float32([741]),
            "states": normal(1, 77, width),
            **added(arch, normal),
        },
        "gradient": lambda: {
            "x0": normal(2, 16, 16, 4),
            "eps": normal(2, 16, 16, 4),
            "t": np.array([320, 851]),
            "ids": ids,
        },
    }[part]()


def ids_to_pool(ids: np.ndarray) -> np.ndarray:
    """`ids` with the end token at the 9th place and padding of 0 after it."""
    return np.concatenate([ids[:, :8], np.full((2, 1), 49407), np.zeros((2, 68), ids.dtype)], axis=1)


def added(arch: str, normal) -> dict[str, np.ndarray]:
    """SDXL's pooled text and sizes."""
    if arch != "sdxl":
        return {}
    return {"pooled": normal(1, 1280), "sizes": np.float32([[1024, 768, 0, 128, 1024, 1024]])}


# ---- the reference


def write_reference(arch: str, part: str, folder: str) -> None:
    """A random model's files in `folder`/`part`, and what it makes of the inputs."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    config = ARCHITECTURES[arch][part]
    model = {
        "unet": lambda: UNet2DConditionModel(**config),
        "vae": lambda: AutoencoderKL(**config),
        "text": lambda: CLIPTextModel(CLIPTextConfig(**config)),
        "text_2": lambda: CLIPTextModelWithProjection(CLIPTextConfig(**config)),
    }[part]()
    with torch.no_grad():  # scales of 1 and biases of 0 would hide norms that are swapped and biases that are missing
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.eval().save_pretrained(Path(folder, part), max_shard_size="20GB")
    given = {name: torch.from_numpy(value) for name, value in inputs(arch, part).items()}
    images = {name: value.permute(0, 3, 1, 2) for name, value in given.items() if value.ndim == 4}
    with torch.no_grad():
        if part == "text_2":
            found = model(given["ids"], output_hidden_states=True)
            out = {"states": found.hidden_states[-2], "pooled": found.text_embeds}
        elif part == "text":
            found = model(given["ids"], output_hidden_states=True)
            out = {"states": found.hidden_states[-2] if arch == "sdxl" else found.last_hidden_state}
        elif part == "unet":
            more = {"text_embeds": given["pooled"], "time_ids": given["sizes"]} if arch == "sdxl" else None
            prediction = model(images["x"], given["t"], given["states"], added_cond_kwargs=more).sample
            out = {"prediction": prediction.permute(0, 2, 3, 1)}
        else:
            posterior = model.encode(images["pixels"]).latent_dist
            decoded = model.decode(images["latents"]).sample
            out = {"mean": posterior.mean, "logvar": posterior.logvar, "pixels": decoded}
            out = {name: value.permute(0, 2, 3, 1) for name, value in out.items()}
    np.savez(Path(folder, f"{part}.npz"), **{name: value.numpy() for name, value in out.items()})


def write_reference_gradient(arch: str, folder: str) -> None:
    """The loss, and its gradient for every parameter of both models, as weight files."""
    import torch
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from safetensors.torch import save_file
    from transformers import CLIPTextModel

    models = {
        "unet": UNet2DConditionModel.from_pretrained(Path(folder, "unet")),
        "text": CLIPTextModel.from_pretrained(Path(folder, "text")),
    }
    scheduler = DDPMScheduler.from_config(schedule(arch))
    given = {name: torch.from_numpy(value) for name, value in inputs(arch, "gradient").items()}
    x0, eps = given["x0"].permute(0, 3, 1, 2), given["eps"].permute(0, 3, 1, 2)
    noisy = scheduler.add_noise(x0, eps, given["t"])
    prediction = models["unet"](noisy, given["t"], models["text"](given["ids"]).last_hidden_state).sample
    target = eps if ARCHITECTURES[arch]["prediction"] == "epsilon" else scheduler.get_velocity(x0, eps, given["t"])
    instance, prior = (torch.nn.functional.mse_loss(prediction[i], target[i]) for i in range(2))
    loss = instance + PRIOR_WEIGHT * prior
    loss.backward()
    np.savez(Path(folder, "gradient.npz"), loss=loss.item())
    for name, model in models.items():
        target = Path(folder, "gradient", name)
        target.mkdir(parents=True)
        save_file({n: p.grad for n, p in model.named_parameters()}, target / "model.safetensors")


def schedule(arch: str) -> dict:
    kind = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
    return kind | {"prediction_type": ARCHITECTURES[arch]["prediction"]}


# ---- ours


def split(arch: str, part: str, folder: str):
    """The model as functions over flat params, its sizes from the file that PyTorch wrote."""
    import json

    from dreambooth_jax.models.clip_text import CLIPTextModel, CLIPTextModelWithProjection, CLIPTextSpec
    from dreambooth_jax.models.params import functional
    from dreambooth_jax.models.unet import UNet2DConditionModel, UNetSpec
    from dreambooth_jax.models.vae import AutoencoderKL, VAESpec

    spec_class, module = {
        "unet": (UNetSpec, UNet2DConditionModel),
        "vae": (VAESpec, AutoencoderKL),
        "text": (CLIPTextSpec, CLIPTextModel),
        "text_2": (CLIPTextSpec, CLIPTextModelWithProjection),
    }[part]
    spec = spec_class.from_config(json.loads(Path(folder, part, "config.json").read_text()))
    return functional(lambda rngs: module(spec, rngs=rngs))


def relative(out, reference) -> float:
    out, reference = np.asarray(out, np.float64), np.asarray(reference, np.float64)
    assert out.shape == reference.shape
    return np.linalg.norm(out - reference) / np.linalg.norm(reference)


def compare_values(arch: str, part: str, folder: str) -> list[tuple]:
    import jax

    from dreambooth_jax.files.safetensors import read_model

    model, given = split(arch, part, folder), inputs(arch, part)
    params = read_model(Path(folder, part), model.shapes)
    if part == "text_2":
        end = np.argmax(given["ids"] == 49407, axis=1)
        out = dict(zip(("states", "pooled"), jax.jit(model.apply)(params, given["ids"], end), strict=True))
    elif part == "text":
        method = "penultimate" if arch == "sdxl" else "__call__"
        out = {"states": jax.jit(lambda p, ids: model.apply(p, ids, method=method))(params, given["ids"])}
    elif part == "unet":
        more = [None, given["pooled"], given["sizes"]] if arch == "sdxl" else []
        out = {"prediction": jax.jit(model.apply)(params, given["x"], given["t"], given["states"], *more)}
    else:
        mean, logvar = jax.jit(lambda p, x: model.apply(p, x, method="encode"))(params, given["pixels"])
        out = {"mean": mean, "logvar": logvar}
        out["pixels"] = jax.jit(lambda p, z: model.apply(p, z, method="decode"))(params, given["latents"])
    expected = np.load(Path(folder, f"{part}.npz"))
    sizes = {name: "x".join(map(str, value.shape)) for name, value in given.items()}
    where = {
        "mean": "pixels",
        "logvar": "pixels",
        "pixels": "latents",
        "prediction": "x",
        "states": "ids",
        "pooled": "ids",
    }
    return [
        (f"{part}: {name}, from {sizes[where[name]]}", f"{relative(value, expected[name]):.1e}", "1e-4")
        for name, value in out.items()
    ]


def compare_gradient(arch: str, part: str, folder: str) -> list[tuple]:
    import jax

    from dreambooth_jax.diffusion.loss import Batch, dreambooth_loss
    from dreambooth_jax.diffusion.schedulers import process_from_scheduler
    from dreambooth_jax.files.safetensors import read_model
    from dreambooth_jax.models.params import under_prefix, with_prefix

    models = {name: split(arch, name, folder) for name in ("unet", "text")}
    params = {}
    for name, model in models.items():
        params |= with_prefix(f"{name}.", read_model(Path(folder, name), model.shapes))

    def predict(params, xt, t, ids):
        states = models["text"].apply(under_prefix("text.", params), ids)
        return models["unet"].apply(under_prefix("unet.", params), xt, t, states)

    batch = Batch(*inputs(arch, "gradient").values())
    process = process_from_scheduler(schedule(arch))

    @jax.jit
    def gradient(params):
        kw = {"num_instance": 1, "prior_weight": PRIOR_WEIGHT}
        return jax.value_and_grad(lambda p: dreambooth_loss(predict, p, batch, process, **kw).loss)(params)

    loss, grads = gradient(params)
    del params
    expected_loss = np.load(Path(folder, "gradient.npz"))["loss"]
    errors, largest = {}, 0.0
    for name, model in models.items():
        for key, value in read_model(Path(folder, "gradient", name), model.shapes).items():
            # Adding a constant to all keys changes no softmax: the gradient of their bias is rounding and nothing else.
            if key.endswith("k_proj.bias"):
                largest = max(largest, np.abs(value).max(), np.abs(grads[f"{name}.{key}"]).max())
            else:
                errors[f"{name}.{key}"] = relative(grads[f"{name}.{key}"], value)
    worst = max(errors, key=errors.get)
    return [
        ("loss, from 2x16x16x4", f"{abs(float(loss) / float(expected_loss) - 1):.1e}", "1e-4"),
        (f"gradient, worst of {len(errors)} parameters: `{worst}`", f"{errors[worst]:.1e}", "1e-3"),
        ("gradient, median of the parameters", f"{np.median(list(errors.values())):.1e}", ""),
        ("gradient of the key biases, zero but for rounding", f"{largest:.1e}", ""),
    ]


def measure_loading(arch: str, part: str, folder: str) -> list[tuple]:
    import jax
    import jax.numpy as jnp

    from dreambooth_jax.files.safetensors import read_model

    models = {name: split(arch, name, folder) for name in ("text", "vae", "unet")}
    files = [next(Path(folder, name).glob("*.safetensors")) for name in models]
    size = sum(path.stat().st_size for path in files)

    def plain():
        buffer = bytearray(1 << 24)
        for path in files:
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    def load():
        return jax.block_until_ready([read_model(Path(folder, name), model.shapes) for name, model in models.items()])

    jax.block_until_ready(jnp.ones(8) + 1)
    reading = timed_cold(plain, files)
    before = resident("VmRSS")
    loading = timed_cold(load, files)
    extra = resident("VmHWM") - before
    reading, loading = min(reading, timed_cold(plain, files)), min(loading, timed_cold(load, files))
    return [
        (f"reading the {size / 1e9:.2f} GB of text encoder, VAE and UNet, nothing else", f"{reading:.1f} s", ""),
        ("loading them", f"{loading:.1f} s", ""),
        ("peak host memory of loading / size of the files", f"{extra / size:.2f}", "1.3"),
    ]


def timed_cold(function, files) -> float:
    """Seconds, the files out of the system's memory at the start."""
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    result = function()
    seconds = time.perf_counter() - start
    del result
    return seconds


def resident(field: str) -> int:
    """Bytes of this process that are resident (VmRSS), or were at most (VmHWM), mapped files included."""
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))


if __name__ == "__main__":
    main()
