"""Encoded class images kept beside the pictures, so that no start encodes them again.

One file holds mean and standard deviation of every picture under the digest of its pixels, as they enter the
autoencoder: cropped, mirrored, of that size. Other pixels, another base or another dtype are encoded anew.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import safetensors
import safetensors.numpy
from absl import logging
from etils import epath
from jaxtyping import Bool, Float, UInt8

from dreambooth_jax.devices import runtime
from dreambooth_jax.files.atomic import write_atomic

Moments = tuple[Float[np.ndarray, "_ _ _ _"], Float[np.ndarray, "_ _ _ _"]]  # mean and std [n, h, w, c]


class Latents(NamedTuple):
    """Where encoded pictures are kept.

    Attributes:
        folders: in the order of preference: the first that has the file is read, the first that can be written is.
        about: what the numbers depend on besides the pixels: the base's digest, the dtype.
    """

    folders: Sequence[epath.Path]
    about: Mapping[str, str]

    def of(
        self,
        images: UInt8[np.ndarray, "_ H W 3"],
        encode: Callable[[UInt8[np.ndarray, "_ H W 3"]], Moments],
    ) -> Moments:
        """Mean and standard deviation of the encoded images: those that are kept, and those that `encode` makes, which
        are kept from now on. All processes call it; one writes."""
        digests = np.stack([np.frombuffer(hashlib.sha256(image).digest(), np.uint8) for image in images])
        name = f".latents_{images.shape[2]}x{images.shape[1]}.safetensors"
        kept = self._read(name)
        row = {digest.tobytes(): number for number, digest in enumerate(kept["digest"])} if kept else {}
        rows = np.array([row.get(digest.tobytes(), -1) for digest in digests])
        known = runtime.all_have(rows >= 0)
        if known.all():
            return kept["mean"][rows], kept["std"][rows]
        mean, std = _joined(known, kept and (kept["mean"], kept["std"]), rows, encode(images[~known]))
        if runtime.is_first_process():
            self._write(name, {"digest": digests, "mean": mean, "std": std})
        return mean, std

    def _read(self, name: str) -> dict[str, np.ndarray] | None:
        for folder in self.folders:
            if not (folder / name).exists():
                continue
            try:
                kept = safetensors.numpy.load((folder / name).read_bytes())
                if np.array_equal(kept.pop("seal"), self._seal(kept)):
                    return kept
            except (safetensors.SafetensorError, KeyError, OSError):
                pass
            logging.warning("%s is damaged, or of another base: its pictures are encoded again", folder / name)
        return None

    def _write(self, name: str, kept: dict[str, np.ndarray]) -> None:
        data = safetensors.numpy.save(kept | {"seal": self._seal(kept)})
        for folder in self.folders:
            try:
                return write_atomic(folder / name, data)
            except OSError as error:
                logging.warning("%s: encoded pictures cannot be kept here (%s)", folder, error)
        return None

    def _seal(self, kept: Mapping[str, np.ndarray]) -> UInt8[np.ndarray, "32"]:
        """A digest of everything in the file and of what it depends on."""
        digest = hashlib.sha256(json.dumps(dict(self.about), sort_keys=True).encode())
        for name in ("digest", "mean", "std"):
            digest.update(np.ascontiguousarray(kept[name]))
        return np.frombuffer(digest.digest(), np.uint8)


def _joined(known: Bool[np.ndarray, "n"], kept: Moments | None, rows: np.ndarray, new: Moments) -> Moments:
    """Kept moments in the rows that are `known`, new ones in the others."""
    mean, std = (np.empty((len(known), *x.shape[1:]), x.dtype) for x in new)
    for number, moments in enumerate((mean, std)):
        moments[~known] = new[number]
        if kept is not None:
            moments[known] = kept[number][rows[known]]
    return mean, std
