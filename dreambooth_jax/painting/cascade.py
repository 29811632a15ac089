"""Pictures of a cascade: every stage enlarges those of the stage before (arXiv 2205.11487, section 2.4)."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from dreambooth_jax.models.params import Params
from dreambooth_jax.painting.painter import Painter, Request


class Stage(NamedTuple):
    """A painter and the params of its pipeline."""

    paint: Painter
    params: Params


def paint_stages(stages: Sequence[Stage], requests: Sequence[Request]) -> list[list[np.ndarray]]:
    """Paints the requests with the first stage, and every stage's pictures larger with the next.

    Returns:
        uint8[h w 3] per stage and request.
    """
    pictures: list[list[np.ndarray]] = []
    for number, stage in enumerate(stages):
        if number:  # noise of its own: a stage that began with that of the stage before would repeat its errors
            keys = [jax.random.fold_in(request.key, number) for request in requests]
            requests = [
                request._replace(key=key, low=low)
                for request, key, low in zip(requests, keys, pictures[-1], strict=True)
            ]
        painted = dict(stage.paint(stage.params, requests))
        pictures.append([painted[index] for index in range(len(requests))])
    return pictures
