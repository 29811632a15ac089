"""Model families: the one place where a name becomes a family."""

from dreambooth_jax.families import sd, sdxl
from dreambooth_jax.families.family import Family

FAMILIES: dict[str, Family] = {module.FAMILY.name: module.FAMILY for module in (sd, sdxl)}
