"""The paper's protocol (arXiv 2208.12242, section 4.2): scores of many subjects as one table in the paper's form."""

from collections.abc import Mapping

from dreambooth_jax.evaluation.metrics import bootstrap
from dreambooth_jax.evaluation.scores import Scores
from dreambooth_jax.evaluation.table import Quoted, Row

PAPER = Quoted(
    "Quoted from arXiv 2208.12242, tables 1, 3 and 4: other bases and judges, never to be compared with the rows above",
    {
        "Real images": {"DINO": 0.774, "CLIP-I": 0.885},
        "DreamBooth (Imagen)": {"DINO": 0.696, "CLIP-I": 0.812, "CLIP-T": 0.306},
        "DreamBooth (Stable Diffusion)": {"DINO": 0.668, "CLIP-I": 0.803, "CLIP-T": 0.305},
        "Textual inversion (Stable Diffusion)": {"DINO": 0.569, "CLIP-I": 0.780, "CLIP-T": 0.255},
        "Imagen, 15 subjects, with prior loss": {
            "DINO": 0.684,
            "CLIP-I": 0.815,
            "CLIP-T": 0.308,
            "DIV": 0.391,
            "PRES": 0.493,
        },
        "Imagen, 15 subjects, without": {
            "DINO": 0.712,
            "CLIP-I": 0.828,
            "CLIP-T": 0.306,
            "DIV": 0.371,
            "PRES": 0.664,
        },
    },
)


def summary(label: str, protocol: str, subjects: Mapping[str, Scores]) -> list[Row]:
    """Two rows: the photos among themselves, and our pictures, means over subjects with 95 % bootstrap intervals over
    them.

    Args:
        label: of our row, such as the method and the base.
        subjects: name -> scores, all of `protocol`.

    Raises:
        ValueError: no subjects.
    """
    if not subjects:
        raise ValueError("no subject was scored")
    scores = list(subjects.values())

    real = {name: bootstrap([s.bound[name] for s in scores]) for name in scores[0].bound}
    ours = {name: bootstrap([s.values[name].mean for s in scores]) for name in scores[0].values}
    number = f"{len(scores)} subject{'s' * (len(scores) > 1)}"
    return [Row(f"Real images ({number})", protocol, real), Row(f"{label} ({number})", protocol, ours)]
