"""Deep features reused across sampling steps, on the embedded base: pictures and scores beside those of every step.

    python benchmarks/reuse.py                # minutes on two cores

Six subjects' class nouns in four settings, two pictures of each, with guidance. PSNR is against the picture of the same
noise whose every step runs the whole UNet. DINO compares with the photos of the example subjects, CLIP-T with the
prompt; intervals are 95 % bootstraps over the 24 prompts. Time on TPUs: tpu_step.py.
"""

import argparse
from pathlib import Path

import numpy as np

from dreambooth_jax.devices import runtime
from dreambooth_jax.devices.sharding import make_mesh
from dreambooth_jax.evaluation.dataset import read_dataset, read_photos
from dreambooth_jax.evaluation.judge import embedded_judge
from dreambooth_jax.evaluation.metrics import Interval, bootstrap
from dreambooth_jax.evaluation.scores import fidelity
from dreambooth_jax.families.pipeline import load_pipeline, read_params
from dreambooth_jax.painting.painter import make_painter
from dreambooth_jax.painting.sheets import paint_rows, save_sheet
from dreambooth_jax.tiny.world.names import with_article

SUBJECTS = Path(__file__).parent.parent / "examples" / "subjects"
PLACES = ("in the snow", "on the beach", "in the jungle", "on a red background")
SAMPLERS, REUSES, COUNT, GUIDANCE = (("ddim", 50), ("dpm++", 20)), (1, 2, 3, 5), 2, 2.5


def psnr(pictures: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Of each uint8 picture, dB; infinite for equal ones."""
    error = np.square(pictures.astype(float) - exact).mean((-1, -2, -3))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255**2 / error)


def main() -> None:
    runtime.start()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/reuse"), help="folder of sheets")
    options = parser.parse_args()
    mesh = make_mesh()
    pipeline, judge = load_pipeline("tiny"), embedded_judge(mesh)
    params, subjects = read_params(pipeline, mesh), read_dataset(SUBJECTS)
    photos = {subject.class_noun: read_photos(subject.folder) for subject in subjects}
    prompts = {noun: [f"{with_article(noun)} {place}" for place in PLACES] for noun in photos}

    def scores(rows: dict[str, list[list[np.ndarray]]], measure: str) -> Interval:
        found = [fidelity(judge, photos[noun], rows[noun], prompts[noun]).per_prompt[measure] for noun in photos]
        return bootstrap(np.concatenate(found))

    print("| sampler | whole UNet every | PSNR, dB: mean (lowest) | CLIP-T | DINO |\n|---|---|---|---|---|")
    for sampler, steps in SAMPLERS:
        exact = None
        for reuse in REUSES:
            painter = make_painter(
                pipeline,
                mesh,
                resolution=64,
                batch_size=len(PLACES) * COUNT,
                sampler=sampler,
                steps=steps,
                guidance=GUIDANCE,
                reuse_features=reuse,
            )
            rows = {noun: paint_rows(painter, params, texts, range(COUNT)) for noun, texts in prompts.items()}
            pictures = np.stack([rows[noun] for noun in photos])
            exact = pictures if exact is None else exact
            decibels = psnr(pictures, exact)
            near = "" if reuse == 1 else f"{decibels.mean():.1f} ({decibels.min():.1f})"
            both = (scores(rows, measure) for measure in ("CLIP-T", "DINO"))
            cells = [f"{found.mean:.3f} ({found.low:.3f} to {found.high:.3f})" for found in both]
            print(f"| {sampler}, {steps} steps | {reuse} | {near} | {' | '.join(cells)} |", flush=True)
            labels = [text for texts in prompts.values() for text in texts]
            sheet = [row for noun in photos for row in rows[noun]]
            path = options.output / f"{sampler.strip('+')}_{reuse}.png"
            save_sheet(path, sheet, labels, {"sampler": sampler, "reuse_features": str(reuse)})


if __name__ == "__main__":
    main()
