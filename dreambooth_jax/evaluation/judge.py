"""The models that judge pictures, as one value, with the protocol that their numbers carry."""

from typing import NamedTuple

from jax.sharding import Mesh

from dreambooth_jax.evaluation import features
from dreambooth_jax.evaluation.choices import CLIP, DINO
from dreambooth_jax.evaluation.features import ImageFeatures, TextFeatures
from dreambooth_jax.files.hub import EMBEDDED_FOLDER, resolve_model
from dreambooth_jax.files.tokenizer import load_tokenizer


class Judge(NamedTuple):
    """Models of one protocol.

    Attributes:
        subject: unit vectors for DINO, PRES, drift and copies.
        image, text: unit vectors for CLIP-I and CLIP-T.
        look: vectors whose squared distance is that of DIV.
        title: what the judge is, for a person.
    """

    subject: ImageFeatures
    image: ImageFeatures
    text: TextFeatures
    look: ImageFeatures
    title: str

    @property
    def protocol(self) -> str:
        """Models, revisions, transforms and rules: numbers of different protocols cannot be compared."""
        return (
            f"subject {self.subject.says}; CLIP {self.image.says}; diversity {self.look.says}; mean cosine of all "
            "pairs of a generated and a real picture; CLIP-T with the class noun alone; copies from the cosine of a "
            "photo and itself cropped by 1/16 on"
        )


def embedded_judge(mesh: Mesh) -> Judge:
    """The ViT and the CLIP beside the embedded base: they know its world and no other."""
    vit = EMBEDDED_FOLDER / "vit"
    subject = features.subject_features(vit, mesh, transform="square")
    images, texts = embedded_clip(mesh)
    look = _without_weights(features.vit_states(vit, mesh, transform="square"))
    title = "the ViT and the CLIP beside the embedded base, which know its drawn world and nothing else"
    return Judge(subject, images, texts, look, title)


def embedded_clip(mesh: Mesh) -> tuple[ImageFeatures, TextFeatures]:
    """The CLIP beside the embedded base."""
    tokenizer = load_tokenizer(EMBEDDED_FOLDER)
    return features.clip_features(EMBEDDED_FOLDER / "clip", mesh, tokenizer, transform="square")


def published_clip(mesh: Mesh, name: str = CLIP) -> tuple[ImageFeatures, TextFeatures]:
    """A CLIP from a folder or hub name, with its authors' transform.

    Raises:
        FileNotFoundError: neither a folder nor a hub name that can be fetched.
    """
    folder = resolve_model(name)
    return features.clip_features(folder, mesh, load_tokenizer(folder.parent, folder.name))


def published_judge(
    mesh: Mesh,
    *,
    dino: str = DINO,
    clip: str = CLIP,
    transform: str = "official",
    lpips: str = "",
    backbone: str = "alex",
) -> Judge:
    """DINO and CLIP from folders or hub names.

    Args:
        dino: a ViT of DINO or DINOv2.
        transform: "official" or "hub", see `features.subject_features`.
        lpips: folder of `benchmarks/convert_weights.py`; "" for the weight-free distance of DINO's patches.
        backbone: of LPIPS.

    Raises:
        FileNotFoundError: neither a folder nor a hub name that can be fetched.
    """
    vit = resolve_model(dino)
    subject = features.subject_features(vit, mesh, transform=transform)
    images, texts = published_clip(mesh, clip)
    if lpips:
        look = features.lpips_features(resolve_model(lpips), backbone, mesh)
        look = look._replace(says=f"LPIPS {backbone}, {look.says}")
    else:
        look = _without_weights(features.vit_states(vit, mesh, transform=transform))
    return Judge(subject, images, texts, look, f"{dino} and {clip}")


def _without_weights(look: ImageFeatures) -> ImageFeatures:
    return look._replace(says=f"ViT patches without learnt weights, {look.says}")
