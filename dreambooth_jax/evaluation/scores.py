"""The scores of one subject's pictures: the paper's metrics, drift, context leak and copies."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dreambooth_jax.evaluation import features, metrics
from dreambooth_jax.evaluation.judge import Judge
from dreambooth_jax.evaluation.metrics import Interval
from dreambooth_jax.evaluation.transforms import Picture

# Columns of tables: name -> (whether more is better, what it measures).
MEASURES: dict[str, tuple[bool, str]] = {
    "DINO": (True, "mean cosine of generated pictures and photos in DINO: subject fidelity"),
    "CLIP-I": (True, "the same in CLIP"),
    "CLIP-T": (True, "mean cosine of pictures and their prompts in CLIP: prompt fidelity"),
    "DIV": (True, "mean perceptual distance between pictures of one prompt"),
    "PRES": (False, "mean cosine of pictures of the bare class and the photos in DINO"),
    "drift": (False, "mean cosine in DINO among the base's pictures of the class, less that to today's pictures of it"),
    "class CLIP-T": (True, "prompt fidelity of pictures of the bare class"),
    "leak": (False, "cosine of backgrounds and the photos' backgrounds in CLIP, less that of the base's pictures"),
    "copy": (False, "largest cosine of a generated picture and a photo in DINO"),
}
PER_PROMPT = ("DINO", "CLIP-I", "CLIP-T", "DIV")
_KEPT = 6  # of the closest pairs
_ROUNDING = 1e-5  # of cosines in float32


class Painted(NamedTuple):
    """A subject's pictures.

    Attributes:
        photos: photos of the subject, uncropped.
        rows: pictures of each prompt, of equal number.
        texts: text of each prompt, with the class noun alone.
        of_class, of_class_before: pictures of the bare class by the trained model and by its base.
        class_text: prompt of the bare class.
    """

    photos: Sequence[Picture]
    rows: Sequence[Sequence[Picture]]
    texts: Sequence[str]
    of_class: Sequence[Picture]
    of_class_before: Sequence[Picture]
    class_text: str


class Copy(NamedTuple):
    """A generated picture and its most similar photo, by number; `similarity` is their cosine in DINO."""

    prompt: int
    picture: int
    photo: int
    similarity: float


class Scores(NamedTuple):
    """Attributes:
    values: measure -> mean with its interval over prompts; of measures without prompts the value alone.
    per_prompt: measure -> a value per prompt.
    bound: "DINO" and "CLIP-I" of the photos among themselves, without the pairs of a photo with itself.
    limit: smallest similarity to a photo of a suspected copy, see `copy_limit`.
    suspicious: share of generated pictures from `limit` on.
    copies: the closest pairs, the closest first.
    """

    values: dict[str, Interval]
    per_prompt: dict[str, list[float]]
    bound: dict[str, float]
    limit: float
    suspicious: float
    copies: list[Copy]

    def json(self) -> dict[str, Any]:
        """Plain values for a JSON file; `read_scores` is the inverse."""
        plain = {name: getattr(self, name) for name in self._fields}
        plain["values"] = {name: value._asdict() for name, value in self.values.items()}
        plain["copies"] = [copy._asdict() for copy in self.copies]
        return plain


def read_scores(plain: dict[str, Any]) -> Scores:
    """The inverse of `Scores.json`."""
    values = {name: Interval(**value) for name, value in plain["values"].items()}
    return Scores(**plain | {"values": values, "copies": [Copy(**copy) for copy in plain["copies"]]})


class Fidelity(NamedTuple):
    """The scores of the pictures of prompts, without pictures of the class.

    Attributes:
        per_prompt: measure of `PER_PROMPT` -> a value per prompt; without DIV for one picture per prompt.
        closest: closest photo of every picture, row by row.
        bound, limit: see `Scores`.
    """

    per_prompt: dict[str, list[float]]
    closest: metrics.Closest
    bound: dict[str, float]
    limit: float


def fidelity(
    judge: Judge, photos: Sequence[Picture], rows: Sequence[Sequence[Picture]], texts: Sequence[str]
) -> Fidelity:
    """Subject and prompt fidelity, diversity and copies of rows of pictures, one row per prompt; see `Painted`.

    Raises:
        ValueError: fewer than two photos.
    """
    count, flat = len(rows[0]), [picture for row in rows for picture in row]
    (reals, limit), ours = _photos_and_limit(judge, photos), judge.subject.of(flat)
    reals_clip, ours_clip = judge.image.of(photos), judge.image.of(flat)
    wanted = np.repeat(judge.text.of(texts), count, 0)
    parts = [slice(number * count, (number + 1) * count) for number in range(len(rows))]
    per_prompt = {
        "DINO": [float(metrics.similarity(ours[part], reals)) for part in parts],
        "CLIP-I": [float(metrics.similarity(ours_clip[part], reals_clip)) for part in parts],
        "CLIP-T": [float(metrics.prompt_fidelity(ours_clip[part], wanted[part])) for part in parts],
    }
    if count > 1:
        per_prompt["DIV"] = [metrics.mean_of_pairs(features.distances(judge.look.of(row))) for row in rows]
    bound = {"DINO": float(metrics.real_bound(reals)), "CLIP-I": float(metrics.real_bound(reals_clip))}
    return Fidelity(per_prompt, metrics.closest(ours, reals), bound, limit)


def score(judge: Judge, painted: Painted) -> Scores:
    """Scores one subject: means per prompt, then over prompts, with 95 % bootstrap intervals over prompts.

    Raises:
        ValueError: fewer than two photos or pictures of a prompt.
    """
    count, flat = len(painted.rows[0]), [picture for row in painted.rows for picture in row]
    found = fidelity(judge, painted.photos, painted.rows, painted.texts)
    photos, of_class, before = (
        judge.subject.of(pictures) for pictures in (painted.photos, painted.of_class, painted.of_class_before)
    )
    class_text = judge.text.of([painted.class_text])
    single = {
        "PRES": float(metrics.similarity(of_class, photos)),
        "drift": float(metrics.real_bound(before) - metrics.similarity(of_class, before)),
        "class CLIP-T": float(metrics.similarity(judge.image.of(painted.of_class), class_text)),
        "leak": context_leak(judge, flat, painted),
        "copy": float(found.closest.similarity.max()),
    }
    values = {name: metrics.bootstrap(column) for name, column in found.per_prompt.items()}
    values |= {name: Interval(value, value, value) for name, value in single.items()}
    cosines, numbers = found.closest
    order = np.argsort(-cosines)[:_KEPT].tolist()
    copies = [Copy(i // count, i % count, int(numbers[i]), float(cosines[i])) for i in order]
    suspicious = float((cosines >= found.limit).mean())
    return Scores(values, found.per_prompt, found.bound, found.limit, suspicious, copies)


def best(scores: Mapping[int, Scores], *, max_prompt_loss: float, max_copy: float) -> int | None:
    """The step with the highest DINO among those that follow prompts and copy no photo; None if there is none.

    Args:
        scores: step -> scores of one protocol.
        max_prompt_loss: CLIP-T that a step may lose against the step with the highest CLIP-T.
        max_copy: cosine in DINO of a generated picture and a photo that no picture reaches; 0 for `copy_limit`.
    """
    prompt = max(found.values["CLIP-T"].mean for found in scores.values())
    good = [
        step
        for step, found in scores.items()
        if found.values["CLIP-T"].mean >= prompt - max_prompt_loss
        and found.values["copy"].mean < (max_copy or found.limit)
    ]
    return max(good, key=lambda step: scores[step].values["DINO"].mean, default=None)


def context_leak(judge: Judge, pictures: Sequence[Picture], painted: Painted) -> float:
    """How much more the backgrounds of generated pictures resemble the photos' backgrounds than those of the base's
    class pictures do: a difference of mean cosines in CLIP (the paper's second failure, section 4.5)."""
    theirs = judge.image.of([background(photo) for photo in painted.photos])
    ours = judge.image.of([background(picture) for picture in pictures])
    before = judge.image.of([background(picture) for picture in painted.of_class_before])
    return float(metrics.similarity(ours, theirs) - metrics.similarity(before, theirs))


def background(picture: Picture) -> Picture:
    """The picture with its middle, five eighths of each side, in the mean colour of the frame around it."""
    height, width = picture.shape[:2]
    top, left = round(height * 3 / 16), round(width * 3 / 16)
    inside = np.zeros((height, width), bool)
    inside[top : height - top, left : width - left] = True
    frame = picture.copy()
    frame[inside] = np.round(picture[~inside].mean(0)).astype(np.uint8)
    return frame


def copy_limit(judge: Judge, photos: Sequence[Picture]) -> float:
    """The cosine in DINO from which on a picture is suspected of being a copy of a photo: that of a photo and itself
    cropped by a sixteenth, the smallest of all photos; that of the two most similar photos if it is larger.

    The second alone, the largest of a few numbers, is passed by one picture in three that is no copy: of n photos and
    a further one of the subject, the most similar pair holds the further one with probability 2 / (n + 1).

    Raises:
        ValueError: fewer than two photos.
    """
    return _photos_and_limit(judge, photos)[1]


def _photos_and_limit(judge: Judge, photos: Sequence[Picture]) -> tuple[np.ndarray, float]:
    """(features of the photos, `copy_limit`)."""
    both = judge.subject.of([*photos, *map(_reframed, photos)])
    reals, again = both[: len(photos)], both[len(photos) :]
    one, other = np.triu_indices(len(reals), k=1)
    if not len(one):
        raise ValueError("the copy detector needs at least two photos")
    pairs = (reals[one] * reals[other]).sum(-1)
    return reals, float(max(pairs.max(), (reals * again).sum(-1).min()) - _ROUNDING)


def _reframed(photo: Picture) -> Picture:
    """The photo without a frame of 1/32 of its sides."""
    top, left = (max(1, round(length / 32)) for length in photo.shape[:2])
    return photo[top : photo.shape[0] - top, left : photo.shape[1] - left]
