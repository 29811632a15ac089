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


def things(sprite: Sprite) -> dict[str, float]:
    """Names of a sprite with their articles and probabilities: mostly its class noun, which so means all members."""
    names = {sprite.variant: 0.35}
    for name in sprite.synonyms:
        names[name] = 0.1 / len(sprite.synonyms)
    names[sprite.noun] = names.get(sprite.noun, 0.0) + 1 - sum(names.values())
    phrases: dict[str, float] = {}
    for name, probability in names.items():
        dyed = f"{sprite.colour} {name}"
        told = {dyed: 0.6, name: 0.4} if sprite.colour and not name.startswith(sprite.colour) else {name: 1.0}
        for text, share in told.items():
            for phrase, part in _with_article(text, sprite).items():
                phrases[phrase] = phrases.get(phrase, 0.0) + probability * share * part
    return phrases


def _with_article(name: str, sprite: Sprite) -> dict[str, float]:
    bare = name.removeprefix(f"{sprite.colour} ")
    if bare not in PLURAL and bare not in MASS:
        return {with_article(name): 1.0}
    return {name: 0.6, f"a pair of {name}": 0.4} if sprite.noun == "glasses" else {name: 1.0}


def media(style: str) -> dict[str, float]:
    """Names of the medium with their probabilities; "", no medium, for half of the rendered sprites."""
    silent = 0.5 if style == "3d" else 0.0
    return {"": silent} | {name: (1 - silent) / len(MEDIA[style]) for name in MEDIA[style]}


def places(background: str, colours: tuple[str, ...]) -> dict[str, float]:
    """Names of the place with their probabilities; "", no place, for one caption in six.

    Args:
        background: one of BACKGROUNDS.
        colours: colours of a plain background (one) or of a gradient (two).
    """
    if background in PLACES:
        names = {name: 1 / len(PLACES[background]) for name in PLACES[background]}
    else:
        backdrop = with_article(" and ".join(colours))
        names = {f"on {backdrop} background": 1.0}
        if len(colours) == 1:
            names = {f"on {backdrop} background": 0.75, f"in front of {backdrop} wall": 0.25}
    return {"": 1 / 6} | {name: 5 / 6 * probability for name, probability in names.items()}


def caption(rng: np.random.Generator, sprite: Sprite, background: str, colours: tuple[str, ...]) -> str:
    """A random caption of a picture of `sprite` in front of `background`."""
    drawn = []
    for options in (media(sprite.style), things(sprite), places(background, colours)):
        probabilities = np.array(list(options.values()))
        drawn.append(list(options)[int(rng.choice(len(options), p=probabilities / probabilities.sum()))])
    return " ".join(filter(None, drawn))


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
