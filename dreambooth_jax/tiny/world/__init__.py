"""A small picture world: openly licensed sprites on procedural settings, with captions and a tokenizer of its own.

    sprites = load_sprites()                                   # fetches three npm packages once (about 255 MB)
    images, captions, labels, backgrounds = render(sprites, n=1024, size=64, seed=0)

It is what the embedded base model is trained on. Licences and attribution: LICENSES.md in this folder.
"""

from dreambooth_jax.tiny.world.captions import words
from dreambooth_jax.tiny.world.dataset import SUBJECT_SHARE, render
from dreambooth_jax.tiny.world.names import COLOURS, CORE_NOUNS, EXAMPLE_NOUNS, SUBJECT_NOUNS
from dreambooth_jax.tiny.world.scenes import BACKGROUNDS, SETTINGS
from dreambooth_jax.tiny.world.sprites import Sprite, load_sprites
from dreambooth_jax.tiny.world.tokenizer import rare_words, write_tokenizer
from dreambooth_jax.tiny.world.unigram import write_unigram

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "CORE_NOUNS",
    "EXAMPLE_NOUNS",
    "SETTINGS",
    "SUBJECT_NOUNS",
    "SUBJECT_SHARE",
    "Sprite",
    "load_sprites",
    "rare_words",
    "render",
    "words",
    "write_tokenizer",
    "write_unigram",
]
