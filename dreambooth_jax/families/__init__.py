"""Model families: the one place where a name becomes a family."""

from dreambooth_jax.families import imagen, sd, sdxl, upscaler
from dreambooth_jax.families.family import Family

_ALL = (sd.FAMILY, sdxl.FAMILY, imagen.STAGE_I, imagen.STAGE_II, upscaler.FAMILY)
# Folders of the same models that were saved by another pipeline of diffusers.
_OTHER_NAMES = {"StableDiffusionImg2ImgPipeline": sd.FAMILY, "StableDiffusionInpaintPipeline": sd.FAMILY}
FAMILIES: dict[str, Family] = {family.name: family for family in _ALL} | _OTHER_NAMES
