"""Config files and the command line: a Python file with `get_config()`, and --config.FIELD=VALUE.

A config file is code: it runs with the rights of whoever names it. Nothing heavy is imported here, so that a wrong
config is refused at once.
"""

import argparse
import ast
import difflib
import json
import os
import runpy
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from etils import epath
from ml_collections import ConfigDict

from dreambooth_jax.files.json_text import parse_json
from dreambooth_jax.files.shipped import HOMES, shipped
from dreambooth_jax.runs.config import ConfigError, wrong_kinds

Value = TypeVar("Value")

DOG = next(path for home in HOMES if (path := home / "configs" / "dog.py").exists())


def parse(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, example: str, default: str | None = None
) -> tuple[argparse.Namespace, ConfigDict, ConfigDict]:
    """Parses a command line with --config FILE and --config.FIELD=VALUE beside the parser's own options.

    Args:
        example: of the file, for the help text.
        default: file without --config; None: --config must be given.

    Returns:
        The options, the config with the overrides, and the preset: the config without them.

    Raises:
        ConfigError: the file or an override cannot be used; says which, and what was expected.
    """
    parser.add_argument("--config", metavar="FILE[:PRESET]", default=default, help=f"config file, such as {example}")
    parser.add_argument(
        "--config.FIELD", metavar="VALUE", help="value of a field of the config; every field is in configs/dog.py"
    )
    parser.allow_abbrev = False
    options, rest = parser.parse_known_args(arguments)
    if options.config is None:
        raise ConfigError(f"--config is missing; give a config file: --config {example}")
    overrides = _pairs(parser, rest)
    return options, override(load(options.config), overrides), load(options.config)


def _pairs(parser: argparse.ArgumentParser, rest: Sequence[str]) -> list[tuple[str, str]]:
    """(field, text) of every --config.FIELD=TEXT or --config.FIELD TEXT; anything else is argparse's error."""
    pairs, rest = [], list(rest)
    while rest:
        name, equals, text = rest.pop(0).partition("=")
        if not name.startswith("--config."):
            parser.error(f"unrecognized argument: {name}{equals}{text}")
        if not equals:
            if not rest or rest[0].startswith("--"):
                parser.error(f"{name}: expected a value, {name}=VALUE")
            text = rest.pop(0)
        pairs.append((name.removeprefix("--config."), text))
    return pairs


def find(name: str) -> Path:
    """The file of that path, or the config of that name that ships with the package.

    Raises:
        ConfigError: there is none.
    """
    path = Path(shipped(os.path.expanduser(name), "configs"))
    if path.is_file():
        return path
    if path.exists():
        raise ConfigError(f"--config {name}: not a regular file; give a Python file with get_config()")
    raise ConfigError(f"--config {name}: no such file. dog.py ships with the package: --config dog.py")


def load(spec: str) -> ConfigDict:
    """The config of FILE or FILE:PRESET; the example subjects that it names are found in the package too.

    Raises:
        ConfigError: no such file, an error in it (with its line), or no config in it.
    """
    name, colon, preset = spec.partition(":")
    path = find(name)
    get_config = _in_file(path, lambda: runpy.run_path(str(path))).get("get_config")
    if not callable(get_config):
        raise ConfigError(f"--config {path}: defines no function get_config()")
    config = _in_file(path, lambda: get_config(preset) if colon else get_config())
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"--config {path}: get_config() returned {type(config).__name__}, expected a ConfigDict")
    if isinstance(config.get("instance_images"), str):  # check_config refuses others
        config.instance_images = shipped(config.instance_images)
    return config


def read_json(path: epath.Path) -> dict[str, Any]:
    """A config.json.

    Raises:
        ConfigError: it is not JSON, or no object; names the file.
        FileNotFoundError: it is not there.
    """
    try:
        found = parse_json(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds no JSON object")
    return found


def check_fields(config: ConfigDict, like: ConfigDict, file: str) -> None:
    """Raises ConfigError, naming the fields, if a config or its sections lack fields that `like` has, of `file`."""
    there = _names(config)
    lacking = [name for name in _names(like) if name not in there and name.partition(".")[0] in {*there, name}]
    if lacking:
        raise ConfigError(f"the config lacks {', '.join(lacking)}: give one with the fields of {file}")


def _names(config: ConfigDict) -> list[str]:
    """The fields, and SECTION.FIELD for those of sections; diffusers' own configs have defaults."""
    inner = [(name, own) for name, own in config.items() if isinstance(own, ConfigDict) and "_class_name" not in own]
    return [*config, *(f"{section}.{name}" for section, own in inner for name in own)]


def stage_folder(workdir: str, number: int) -> str:
    """The folder of one stage of a cascade."""
    return f"{workdir}/stage{number}"


def stage_folders(workdir: str) -> list[str]:
    """The folders of the stages that were trained, or begun, in the workdir of a cascade; [] if it is none."""
    numbers = range(1, 10)
    found = [number for number in numbers if (epath.Path(stage_folder(workdir, number)) / "config.json").exists()]
    return [stage_folder(workdir, number) for number in found]


def read_config(workdir: str | os.PathLike) -> ConfigDict:
    """The config that `train` wrote into its workdir. A copied or moved run has its new place as `workdir`.

    Fields that older versions did not have are filled in, see `complete`.

    Raises:
        FileNotFoundError: nothing was trained there, or a cascade, whose stages have a config each.
        ConfigError: config.json is damaged; the fields are named.
    """
    path = epath.Path(workdir).expanduser() / "config.json"
    if not path.exists():
        stages = stage_folders(os.fspath(path.parent))
        which = f"one stage of this cascade, {' or '.join(stages)}" if stages else "a run of dreambooth_jax.train"
        raise FileNotFoundError(f"{path}: no such file. Give the --workdir of {which}.")
    config = as_config(complete(read_json(path))[0])
    if wrong := wrong_kinds(config):
        raise ConfigError(f"{path} is damaged; restore it from a checkpoint's run.json:\n  " + "\n  ".join(wrong))
    config.workdir = os.fspath(path.parent)
    return config


def as_config(values: Mapping[str, Any]) -> ConfigDict:
    """A config of JSON values, whose lists are tuples."""
    config = ConfigDict()
    for name, value in with_tuples(values).items():
        config[name] = value
    return config


def with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON values with tuples in place of lists."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def complete(earlier: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(config of an earlier run with every field of today, names of the fields that it lacked).

    Those have the values of configs/dog.py, which leave everything as it was before the field existed.
    """
    today = json.loads(load(str(DOG)).to_json())
    added = sorted(today.keys() - earlier.keys())
    return {**earlier, **{name: today[name] for name in added}}, added


def _in_file(path: Path, run: Callable[[], Value]) -> Value:
    """The result of code of the file; its errors name the file and the line."""
    try:
        return run()
    except SyntaxError as error:
        raise ConfigError(f"--config {path}, line {error.lineno}: {error.msg}") from error
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f", line {lines[-1]}" if lines else ""
        raise ConfigError(f"--config {path}{where}: {type(error).__name__}: {error}") from error


def override(config: ConfigDict, pairs: Sequence[tuple[str, str]]) -> ConfigDict:
    """The config with the texts of (field, text) in their places; `a.b` is field b of the section a.

    Raises:
        ConfigError: naming every field that does not exist and every text that is no value of its type.
    """
    problems = []
    for name, text in pairs:
        *sections, last = name.split(".")
        inner = config
        for section in sections:
            inner = inner[section] if isinstance(inner, ConfigDict) and section in inner else None
        if not isinstance(inner, ConfigDict) or last not in inner:
            known = list(inner) if isinstance(inner, ConfigDict) else list(config)
            close = difflib.get_close_matches(last, known, 1)
            hint = f"; did you mean {close[0]}?" if close else "; configs/dog.py has every field"
            problems.append(f"{name}: unknown field{hint}")
            continue
        try:
            inner[last] = _value(text, inner[last])
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # of nested brackets
            problems.append(f"{name} = {text!r}: expected {_KINDS.get(type(inner[last]), 'another value')}")
    if problems:
        raise ConfigError("the config cannot be used:\n  " + "\n  ".join(problems))
    return config


_KINDS = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    tuple: 'a tuple, such as \'("a dog", "a cat")\'',
}
_TRUTH = {"true": True, "1": True, "false": False, "0": False}


def _value(text: str, old: Any) -> Any:
    """The text as a value of the type of `old`."""
    if isinstance(old, bool):
        if text.lower() not in _TRUTH:
            raise ValueError(text)
        return _TRUTH[text.lower()]
    if isinstance(old, tuple):
        value = ast.literal_eval(text)
        if not isinstance(value, (tuple, list)):
            raise ValueError(text)
        return tuple(value)
    if isinstance(old, (int, float, str)):
        return type(old)(text)
    raise ValueError(text)
