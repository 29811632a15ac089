"""What a person may choose among when a run is scored; free of JAX, so that a command line is read at once."""

from dreambooth_jax.files.hub import EMBEDDED

PROMPTS = ("run", "paper", "world")
JUDGES, TRANSFORMS, BACKBONES = ("auto", "embedded", "published"), ("official", "hub"), ("alex", "vgg")
DINO, CLIP = "facebook/dino-vits16", "openai/clip-vit-base-patch32"


def judges_itself(judge: str, base: str) -> bool:
    """Whether the models beside the embedded base judge a run of `base`, with one of JUDGES."""
    return judge == "embedded" or (judge == "auto" and base in EMBEDDED)
