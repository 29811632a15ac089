"""The tokenizer of a model folder."""

import json
import os
import pathlib


def load_tokenizer(base: str | os.PathLike):
    """The transformers tokenizer in `<base>/tokenizer`, of the class that the folder names.

    Raises:
      FileNotFoundError: the folder or its vocabulary is missing.
    """
    folder = pathlib.Path(base) / "tokenizer"
    files = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    is_clip = {"vocab.json", "merges.txt"} <= files
    if not (is_clip or files & {"tokenizer.json", "spiece.model"}):
        raise FileNotFoundError(
            f"No tokenizer in {folder}: it must hold vocab.json and merges.txt, or tokenizer.json, or spiece.model, "
            f"and holds {', '.join(sorted(files)) or 'nothing'}. Give a pipeline folder as diffusers saves it."
        )
    # Old folders have no tokenizer_config.json. AutoTokenizer, which would read it, imports PyTorch where there is one.
    config = folder / "tokenizer_config.json"
    kind = json.loads(config.read_text()).get("tokenizer_class") if config.is_file() else None
    import transformers  # takes seconds, which a wrong path need not

    kind = kind or ("CLIPTokenizer" if is_clip else "PreTrainedTokenizerFast")
    return getattr(transformers, kind).from_pretrained(str(folder), local_files_only=True)
