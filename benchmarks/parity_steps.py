"""The UNet of Stable Diffusion XL at full width, beside PyTorch diffusers: gradients and five AdamW steps.

    python benchmarks/parity_steps.py      # 12 GB of memory, 30 GB of disk

The UNet has the published widths and two transformer layers where the published one has ten: 0.9 B parameters, random,
written by PyTorch. One subject image and one class image, each with states, pooled text and sizes of its own; float32.
Errors are ||ours - reference|| / ||reference||, the largest over all parameters. The reference runs in a process of its
own before ours.
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
        "x0": normal(2, 16, 16, 4),
        "eps": normal(2, 16, 16, 4),
        "t": np.array([320, 851]),
        "states": normal(2, 77, UNET["cross_attention_dim"]),
        "pooled": normal(2, 1280),
        "sizes": sizes,
    }


def write_reference(folder: str) -> None:
    """Files of the random UNet, of the first step's gradient and of the trained UNet; the losses of the steps."""
    import torch
    from diffusers import DDPMScheduler, UNet2DConditionModel

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
    optimizers = {p: torch.optim.AdamW([p], lr=RATE, weight_decay=DECAY) for p in unet.parameters()}
    names = {p: name for name, p in unet.named_parameters()}
    losses = []

    def update(parameter) -> None:  # as soon as its gradient is there, which is then freed
        if not losses:
            _save(folder, "gradient", names[parameter], parameter.grad.numpy())
        optimizers[parameter].step()
        parameter.grad = None

    for parameter in unet.parameters():
        parameter.register_post_accumulate_grad_hook(update)
    for _ in range(STEPS):
        prediction = unet(noisy, given["t"], given["states"], added_cond_kwargs=more).sample
        instance, prior = (torch.nn.functional.mse_loss(prediction[i], eps[i]) for i in range(2))
        loss = instance + PRIOR_WEIGHT * prior
        loss.backward()
        losses.append(loss.item())
    for name, parameter in unet.named_parameters():
        _save(folder, "trained", name, parameter.detach().numpy())
    Path(folder, "losses.json").write_text(json.dumps(losses))


def _save(folder: str, kind: str, name: str, array: np.ndarray) -> None:
    Path(folder, kind).mkdir(exist_ok=True)
    np.save(Path(folder, kind, f"{name}.npy"), array)


def compare(folder: str) -> list[tuple[str, str, str]]:
    """(what, error, limit) of losses, gradients and trained parameters."""
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

    @jax.jit
    def update(grad, state, param):
        updates, state = optimizer.update(grad, state, param)
        return optax.apply_updates(param, updates), state

    params = read_model(Path(folder, "unet"), unet.shapes)
    losses, found = [], []
    for step in range(STEPS):
        loss, grads = gradient(params)
        losses.append(float(loss))
        if step == 0:
            errors = {n: relative(grads[n], g) for n, g in _stored(folder, "gradient", unet.shapes)}
            worst = max(errors, key=errors.get)
            found.append((f"gradient, worst of {len(errors)} parameters: `{worst}`", errors[worst], "gradient"))
            found.append(("gradient, median of the parameters", np.median(list(errors.values())), ""))
        for name in list(grads):  # one at a time, its moments on disk in between: both frameworks fit 16 GB
            file, grad, param = Path(folder, f"{name}.npz"), {"x": grads.pop(name)}, {"x": params[name]}
            state = optimizer.init(param)
            if step:
                stored = np.load(file)
                state = jax.tree.unflatten(jax.tree.structure(state), [stored[key] for key in stored.files])
            param, state = update(grad, state, param)
            np.savez(file, *jax.tree.leaves(state))
            params[name] = param["x"]
    theirs = json.loads(Path(folder, "losses.json").read_text())
    off = max(abs(ours / loss - 1) for ours, loss in zip(losses, theirs, strict=True))
    text = ", ".join(f"{loss:.4f}" for loss in theirs)
    found.insert(0, (f"loss of {STEPS} steps, worst ({text})", off, "loss"))
    errors = {n: relative(params[n], p) for n, p in _stored(folder, "trained", unet.shapes)}
    worst = max(errors, key=errors.get)
    found.append((f"parameters after {STEPS} steps of AdamW, worst: `{worst}`", errors[worst], "parameters"))
    found.append(("the same, median", np.median(list(errors.values())), ""))
    return [(what, f"{error:.1e}", f"{LIMITS[limit]:g}" if limit else "") for what, error, limit in found]


def _stored(folder: str, kind: str, parameters: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
    """(parameter, the reference's array with our axes), one at a time."""
    from dreambooth_jax.files.safetensors import file_name, to_file_axes

    for parameter in parameters:
        array = np.load(Path(folder, kind, f"{file_name(parameter)}.npy"))
        yield parameter, array.transpose(np.argsort(to_file_axes(parameter, array.ndim)))


if __name__ == "__main__":
    main()
