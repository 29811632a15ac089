"""What a person may choose among when a run is scored; free of JAX, so that a command line is read at once."""

PROMPTS = ("run", "paper", "world")
JUDGES, TRANSFORMS, BACKBONES = ("auto", "embedded", "published"), ("official", "hub"), ("alex", "vgg")
DINO, CLIP = "facebook/dino-vits16", "openai/clip-vit-base-patch32"
