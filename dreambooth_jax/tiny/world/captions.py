"""Captions: a small grammar that says what a picture shows, in the words people use in prompts.

caption    = [medium] thing [place]
medium     = "a 3d render of" | "a photo of" | ...        rendered sprites; a bare caption means these
           | "a flat drawing of" | "an illustration of"   flat sprites; always said, as it is what sets them apart
thing      = class noun | synonym | the picture's own name, with its colour if dyed, with its article
place      = "on a blue background" | "in the snow" | ...
"""

import re

import numpy as np

from dreambooth_jax.tiny.world.names import COLOURS, MASS, PLURAL, with_article
from dreambooth_jax.tiny.world.sprites import Sprite

MEDIA = {
    "3d": ("a 3d render of", "a photo of", "a picture of", "an image of", "a rendering of"),
    "flat": ("a flat drawing of", "an illustration of", "a drawing of", "a flat cartoon of"),
}
PLACES = {
    "snow": ("in the snow", "on snow", "in a snowy landscape"),
    "grass": ("on the grass", "on grass", "in a meadow", "in a green field"),
    "beach": ("on the beach", "on a sandy beach", "at the sea"),
    "night sky": ("in the night sky", "at night", "under the stars", "in space"),
    "wooden floor": ("on a wooden floor", "on wood", "on a wooden table"),
    "brick wall": ("in front of a brick wall", "on a brick wall", "on bricks"),
    "water": ("on the water", "in the water", "floating on water"),
    "checkered cloth": ("on a checkered cloth", "on a checkered tablecloth", "on a picnic blanket"),
    "jungle": ("in the jungle", "among green leaves"),
    "forest": ("in the forest", "in the woods"),
    "desert": ("in the desert", "on a sand dune"),
    "street": ("on a street", "in the city", "on the road"),
    "mountains": ("in the mountains", "with a mountain in the background"),
    "sunset": ("at sunset", "in front of a sunset"),
    "room": ("in a room", "on the carpet", "indoors"),
    "fire": ("in flames", "on fire", "in front of a fire"),
}


def thing(rng: np.random.Generator, sprite: Sprite) -> str:
    """The thing with its article: mostly by its class noun, so that the noun comes to mean all of its members."""
    draw = rng.random()
    name = sprite.noun
    if draw < 0.35:
        name = sprite.variant
    elif sprite.synonyms and draw < 0.45:
        name = sprite.synonyms[int(rng.integers(len(sprite.synonyms)))]
    if sprite.colour and not name.startswith(sprite.colour) and rng.random() < 0.6:
        name = f"{sprite.colour} {name}"
    bare = name.removeprefix(f"{sprite.colour} ")
    if bare in PLURAL or bare in MASS:
        return f"a pair of {name}" if sprite.noun == "glasses" and rng.random() < 0.4 else name
    return with_article(name)


def place(rng: np.random.Generator, background: str, colours: tuple[str, ...]) -> str:
    """Where the thing is; `colours` are those of a plain background (one) or a gradient (two)."""
    if background in PLACES:
        return PLACES[background][int(rng.integers(len(PLACES[background])))]
    backdrop = with_article(" and ".join(colours))
    if len(colours) == 1 and rng.random() < 0.25:
        return f"in front of {backdrop} wall"
    return f"on {backdrop} background"


def caption(rng: np.random.Generator, sprite: Sprite, background: str, colours: tuple[str, ...]) -> str:
    """What `rng` makes of a picture of `sprite` in front of `background`.

    One caption in six leaves the place out and half of those of rendered sprites leave the medium out, so that "a dog"
    is a caption by itself.
    """
    parts = [thing(rng, sprite)]
    if sprite.style == "flat" or rng.random() < 0.5:
        media = MEDIA[sprite.style]
        parts.insert(0, media[int(rng.integers(len(media)))])
    if rng.random() < 5 / 6:
        parts.append(place(rng, background, colours))
    return " ".join(parts)


def words(sprites: list[Sprite]) -> list[str]:
    """Every word that captions of these sprites can hold, and words of ordinary prompts; sorted, each once."""
    phrases = [" ".join((s.noun, s.variant, s.colour, *s.synonyms)) for s in sprites]
    phrases += [phrase for group in (*MEDIA.values(), *PLACES.values()) for phrase in group]
    phrases += [*COLOURS, *PLACES, _PROMPT_WORDS]
    return sorted(set(re.findall(r"[a-z]+|[0-9]", " ".join(phrases).lower())))


# Words that prompts bring and captions do not; whole tokens all the same, so that other texts stay short.
_PROMPT_WORDS = """
a an the pair of and in on at with under over near by front behind next to from top inside wall background
photo picture image painting sketch style oil watercolor wearing wears hat jumping running sleeping sitting
standing swimming eating playing looking my your his her its one two three four five big small tiny large huge
old new shiny cute beautiful funny happy sad angry close up view side back left right day night morning
evening light dark bright warm cold blurry good bad high low quality detailed resolution realistic
professional studio white black golden silver gold metal glass plastic paper stone wood wooden fur hair face
eyes nose tail ears leg legs head person man woman child boy girl people animal animals food fruit vegetable
object thing vehicle place plant tree river lake ocean sea island moon rain cloudy sunny winter summer spring
autumn park garden kitchen bathroom bedroom office school market eiffel tower bridge london paris tokyo new
york unique special type class subject token art digital pixel comic pencil ink van gogh is are this that it i
you he she we they no not without some many few more less very
"""
