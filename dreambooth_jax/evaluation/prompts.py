"""Prompt sets of the paper (arXiv 2208.12242): the 25 prompts of its data set and the sets of its applications.

A template has the fields {identifier} and {class_noun}, as in a config.
"""

_PLACES = (
    "a {identifier} {class_noun} in the jungle",
    "a {identifier} {class_noun} in the snow",
    "a {identifier} {class_noun} on the beach",
    "a {identifier} {class_noun} on a cobblestone street",
    "a {identifier} {class_noun} on top of pink fabric",
    "a {identifier} {class_noun} on top of a wooden floor",
    "a {identifier} {class_noun} with a city in the background",
    "a {identifier} {class_noun} with a mountain in the background",
    "a {identifier} {class_noun} with a blue house in the background",
    "a {identifier} {class_noun} on top of a purple rug in a forest",
)
_PROPERTIES = (
    "a red {identifier} {class_noun}",
    "a purple {identifier} {class_noun}",
    "a shiny {identifier} {class_noun}",
    "a wet {identifier} {class_noun}",
    "a cube shaped {identifier} {class_noun}",
)
_ACCESSORIES = (
    "a {identifier} {class_noun} wearing a red hat",
    "a {identifier} {class_noun} wearing a santa hat",
    "a {identifier} {class_noun} wearing a rainbow scarf",
    "a {identifier} {class_noun} wearing a black top hat and a monocle",
    "a {identifier} {class_noun} in a chef outfit",
    "a {identifier} {class_noun} in a firefighter outfit",
    "a {identifier} {class_noun} in a police outfit",
    "a {identifier} {class_noun} wearing pink glasses",
    "a {identifier} {class_noun} wearing a yellow shirt",
    "a {identifier} {class_noun} in a purple wizard outfit",
)

OBJECT = (
    *_PLACES,
    "a {identifier} {class_noun} with a wheat field in the background",
    "a {identifier} {class_noun} with a tree and autumn leaves in the background",
    "a {identifier} {class_noun} with the Eiffel Tower in the background",
    "a {identifier} {class_noun} floating on top of water",
    "a {identifier} {class_noun} floating in an ocean of milk",
    "a {identifier} {class_noun} on top of green grass with sunflowers around it",
    "a {identifier} {class_noun} on top of a mirror",
    "a {identifier} {class_noun} on top of the sidewalk in a crowded street",
    "a {identifier} {class_noun} on top of a dirt road",
    "a {identifier} {class_noun} on top of a white rug",
    *_PROPERTIES,
)
LIVE = (*_PLACES, *_ACCESSORIES, *_PROPERTIES)
LIVE_CLASSES = ("cat", "dog")

# 25 prompts in the words of the embedded base's captions.
WORLD = (
    *(
        f"a {{identifier}} {{class_noun}} {place}"
        for place in (
            "in the snow",
            "on the grass",
            "on the beach",
            "in the night sky",
            "on a wooden floor",
            "in front of a brick wall",
            "on the water",
            "on a checkered cloth",
            "in the jungle",
            "in the forest",
            "in the desert",
            "on a street",
            "in the mountains",
            "at sunset",
            "in a room",
            *(f"on a {colour} background" for colour in ("red", "blue", "green", "yellow", "purple", "pink", "white")),
        )
    ),
    "a photo of {identifier} {class_noun}",
    "a picture of {identifier} {class_noun} in the snow",
    "a 3d render of {identifier} {class_noun} on a gray background",
)

# The applications of the paper, section 4.4 and figures 1, 7 and 8.
APPLICATIONS: dict[str, tuple[str, ...]] = {
    "recontextualisation": (
        "a {identifier} {class_noun} in the Acropolis",
        "a {identifier} {class_noun} in a doghouse",
        "a {identifier} {class_noun} in a bucket",
        "a {identifier} {class_noun} swimming",
        "a {identifier} {class_noun} sleeping",
        "a {identifier} {class_noun} with the Eiffel Tower in the background",
    ),
    "art renditions": tuple(
        f"a painting of a {{identifier}} {{class_noun}} in the style of {artist}"
        for artist in (
            "Vincent van Gogh",
            "Michelangelo",
            "Rembrandt",
            "Johannes Vermeer",
            "Pierre-Auguste Renoir",
            "Leonardo da Vinci",
        )
    ),
    "view synthesis": tuple(
        f"a {{identifier}} {{class_noun}} seen from the {side}" for side in ("top", "bottom", "side", "back", "front")
    ),
    "property modification": (
        *(f"a {colour} {{identifier}} {{class_noun}}" for colour in ("red", "purple", "yellow", "blue", "pink")),
        *(
            f"a cross of a {{identifier}} {{class_noun}} and a {animal}"
            for animal in ("bear", "panda", "koala", "lion", "hippo")
        ),
    ),
    "accessorisation": _ACCESSORIES,
    "expressions": tuple(
        f"a {{identifier}} {{class_noun}} {state}"
        for state in ("depressed", "sleeping", "sad", "joyous", "barking", "crying", "frowning", "screaming")
    ),
}


def paper_prompts(class_noun: str) -> tuple[str, ...]:
    """The data set's 25 prompts for a class: those of live subjects for cats and dogs, else those of objects."""
    return LIVE if class_noun in LIVE_CLASSES else OBJECT


def filled(template: str, identifier: str, class_noun: str) -> str:
    """The prompt of a subject."""
    return template.format(identifier=identifier, class_noun=class_noun)


def class_only(template: str, class_noun: str) -> str:
    """The prompt without identifier: the text that CLIP-T compares with, as no CLIP knows the identifier."""
    return " ".join(filled(template, "", class_noun).split())
