"""The UNet of Stable Diffusion XL at full width, beside PyTorch diffusers: gradients and five AdamW steps.

    python benchmarks/parity_steps.py      # a quarter of an hour on two cores, 16 GB of memory, 15 GB of disk

The UNet has the published widths and two transformer layers where the published one has ten: 0.9 B parameters, random,
written by PyTorch. One subject image and one class image, each with states, pooled text and sizes of its own; float32.
Errors are ||ours - reference|| / ||reference||, the largest over all parameters; "movement" is the difference between
the parameters before and after the steps. The reference runs in a process of its own before ours.
"""

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from parity import ARCHITECTURES, PRIOR_WEIGHT, alone, relative, schedule, split

os.environ.setdefault("JAX_PLATFORMS", "cpu")

UNET = ARCHITECTURES["sdxl"]["unet"] | {"transformer_layers_per_block": [1, 2, 2]}
RATE, DECAY, STEPS = 1e-4, 1e-2, 5
LIMITS = {"loss": 1e-4, "gradient": 1e-3, "parameters": 1e-4}


def main() -> None:
    print("| SDXL's UNet, transformer layers [1, 2, 2] | error | limit |\n|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        alone(write_reference, folder)
        for what, error, limit in alone(compare, folder):
            print(f"| {what} | {error} | {limit} |", flush=True)


def inputs() -> dict[str, np.ndarray]:
    """The same for both sides; the first row is the subject's, the second the class's."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    sizes = np.float32([[1024, 768, 0, 128, 1024, 1024], [1024, 1024, 0, 0, 1024, 1024]])
    return {
        "x0": normal(2, 16, 16, 4), "eps": normal(2, 16, 16, 4), "t": np.array([320, 851]),
        "states": normal(2, 77, UNET["cross_attention_dim"]), "pooled": normal(2, 1280), "sizes": sizes,
    }  # fmt: skip


def write_reference(folder: str) -> None:
    """Files of the random UNet, of the first step's gradient and of the trained UNet; the losses of the steps."""
    import torch
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from safetensors.torch import save_file

    torch.manual_seed(0)
    unet = UNet2DConditionModel(**UNET)
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    unet.eval().save_pretrained(Path(folder, "unet"), max_shard_size="20GB")
    given = {name: torch.from_numpy(value) for name, value in inputs().items()}
    x0, eps = (given[name].permute(0, 3, 1, 2) for name in ("x0", "eps"))
    noisy = DDPMScheduler.from_config(schedule("sdxl")).add_noise(x0, eps, given["t"])
    more = {"text_embeds": given["pooled"], "time_ids": given["sizes"]}
    # One parameter at a time (foreach) makes no copy of all of them.
    optimizer = torch.optim.AdamW(unet.parameters(), lr=RATE, weight_decay=DECAY, foreach=False)
    losses = []
    for step in range(STEPS):
        prediction = unet(noisy, given["t"], given["states"], added_cond_kwargs=more).sample
        instance, prior = (torch.nn.functional.mse_loss(prediction[i], eps[i]) for i in range(2))
        loss = instance + PRIOR_WEIGHT * prior
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            _write(folder, "gradient", {name: p.grad for name, p in unet.named_parameters()}, save_file)
        optimizer.step()
        optimizer.zero_grad()
    _write(folder, "trained", {name: p.detach() for name, p in unet.named_parameters()}, save_file)
    Path(folder, "losses.json").write_text(json.dumps(losses))


def _write(folder: str, name: str, tensors: dict, save_file) -> None:
    Path(folder, name).mkdir()
    save_file(tensors, Path(folder, name, "model.safetensors"))


def compare(folder: str) -> list[tuple[str, str, str]]:
    """(what, error, limit) of losses, gradients, parameters and their movement."""
    import jax
    import optax

    from dreambooth_jax.diffusion.loss import Batch, dreambooth_loss
    from dreambooth_jax.diffusion.optimizer import make_optimizer
    from dreambooth_jax.diffusion.schedulers import process_from_scheduler
    from dreambooth_jax.files.safetensors import read_model

    unet = split("sdxl", "unet", folder)
    given = inputs()
    batch = Batch(*(given.pop(name) for name in ("x0", "eps", "t")), given)
    process = process_from_scheduler(schedule("sdxl"))
    optimizer = make_optimizer("adamw", optax.constant_schedule(RATE), weight_decay=DECAY, clip_norm=None)

    def predict(params, xt, t, cond):
        return unet.apply(params, xt, t, cond["states"], None, cond["pooled"], cond["sizes"])

    @jax.jit
    def gradient(params):
        kw = {"num_instance": 1, "prior_weight": PRIOR_WEIGHT}
        return jax.value_and_grad(lambda p: dreambooth_loss(predict, p, batch, process, **kw).loss)(params)

    def update(grads, state, params):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    update = jax.jit(update, donate_argnums=(0, 1, 2))
    params = read_model(Path(folder, "unet"), unet.shapes)
    state, losses, found = jax.jit(optimizer.init)(params), [], []
    for step in range(STEPS):
        loss, grads = gradient(params)
        losses.append(float(loss))
        if step == 0:
            errors = {n: relative(grads[n], g) for n, g in _stored(folder, "gradient", unet.shapes)}
            worst = max(errors, key=errors.get)
            found.append((f"gradient, worst of {len(errors)} parameters: `{worst}`", errors[worst], "gradient"))
            found.append(("gradient, median of the parameters", np.median(list(errors.values())), ""))
        params, state = update(grads, state, params)
    del state, grads
    theirs = json.loads(Path(folder, "losses.json").read_text())
    off = max(abs(ours / loss - 1) for ours, loss in zip(losses, theirs, strict=True))
    text = ", ".join(f"{loss:.4f}" for loss in theirs)
    found.insert(0, (f"loss of {STEPS} steps, worst ({text})", off, "loss"))
    errors = {n: relative(params[n], p) for n, p in _stored(folder, "trained", unet.shapes)}
    worst = max(errors, key=errors.get)
    found.append((f"parameters after {STEPS} steps of AdamW, worst: `{worst}`", errors[worst], "parameters"))
    found.append(("the same, median", np.median(list(errors.values())), ""))
    return [(what, f"{error:.1e}", f"{LIMITS[limit]:g}" if limit else "") for what, error, limit in found]


def _stored(folder: str, name: str, parameters: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
    """(parameter, array with our axes) of a weight file, one at a time."""
    from safetensors import safe_open

    from dreambooth_jax.files.safetensors import file_name, to_file_axes

    with safe_open(Path(folder, name, "model.safetensors"), "numpy") as tensors:
        for parameter in parameters:
            tensor = tensors.get_tensor(file_name(parameter))
            yield parameter, tensor.transpose(np.argsort(to_file_axes(parameter, tensor.ndim)))


if __name__ == "__main__":
    main()
