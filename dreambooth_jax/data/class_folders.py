"""Where class images lie. Nothing here imports JAX: a mistyped folder is refused at once."""

from etils import epath
from ml_collections import ConfigDict

from dreambooth_jax.data.sources import list_images

MARK = ".dreambooth_jax.json"  # in folders that this library paints
NOUN = "{class_noun}"


def class_folders(config: ConfigDict) -> tuple[epath.Path, ...]:
    """The folders of class images; the base's own pictures are painted into the last one. `{class_noun}` in
    `class_images` is the noun, with "_" for spaces.

    workdir/class_images, a named folder that was painted by this library, or both a person's folder and
    workdir/class_images for what that folder lacks.

    Raises:
        ValueError: the named folder does not exist or holds no images, and `create_class_images` is off.
    """
    painted = epath.Path(config.workdir).expanduser() / "class_images"
    if not config.class_images:
        return (painted,)
    noun = config.class_noun.replace(" ", "_")
    named = epath.Path(config.class_images.replace(NOUN, noun)).expanduser()
    if (named / MARK).exists():
        return (named,)
    if list_images(named):
        return named, painted
    if config.create_class_images:
        return (named,)
    state = "holds no images" + _where_images_are(named) if named.is_dir() else "does not exist"
    raise ValueError(
        f"class_images = {config.class_images!r} {state}. Give a folder with images of the class, leave it empty to "
        "paint them into the workdir, or set --config.create_class_images to paint a new shared folder there."
    )


def _where_images_are(folder: epath.Path) -> str:
    inside = sorted(path.name for path in folder.iterdir() if path.is_dir() and list_images(path))
    return f" itself, but its subfolders do: {', '.join(inside)}" if inside else ""
