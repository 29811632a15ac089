"""The rules of the house: imports run one way, only the families know the names of models, functions are annotated."""

import ast
from pathlib import Path

import pytest

from dreambooth_jax.families import FAMILIES

PACKAGE = Path(__file__).parent.parent / "dreambooth_jax"
# Above to below: a folder imports from those below it alone. The commands stand above all.
ORDER = (
    "tiny",
    "runs",
    "evaluation",
    "data",
    "painting",
    "families",
    "files",
    "adapters",
    "diffusion",
    "models",
    "ops",
    "devices",
)
KNOW_PARTS = ("families", "models", "files", "tiny")
# evaluation/ reads models of its own; pretrain trains the parts of the embedded base.
EXCEPTED = ("evaluation", "pretrain.py")
MODULES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    inside = path.relative_to(PACKAGE).parts
    return inside[0] if len(inside) > 1 else "commands"


def imported(path: Path):
    """(line, dotted name) of everything that a module imports from the package."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dreambooth_jax"):
            for name in node.names:
                yield node.lineno, f"{node.module}.{name.name}"
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names if name.name.startswith("dreambooth_jax"))


def test_imports_run_one_way():
    rank = {room: number for number, room in enumerate(("commands", *ORDER))}
    wrong = []
    for path in MODULES:
        for line, name in imported(path):
            parts = name.split(".")
            target = parts[1] if len(parts) > 1 and (PACKAGE / parts[1]).is_dir() else "commands"
            if name in ("dreambooth_jax", "dreambooth_jax.__version__"):
                continue
            if rank[target] < rank[room_of(path)]:
                wrong.append(f"{path.relative_to(PACKAGE)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def docstrings(tree: ast.AST) -> set[ast.AST]:
    """Nodes of bare strings: docstrings and the like."""
    return {
        node.value for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }


def names_of_models() -> set[str]:
    """Parts and pipelines of all families, apart from words that mean other things too."""
    parts = {part for family in FAMILIES.values() for part in family.parts}
    return parts | {family.name for family in FAMILIES.values()} | {"UNet", "CLIPText"}


HELD = [path for path in MODULES if room_of(path) not in KNOW_PARTS + EXCEPTED and path.name not in EXCEPTED]


@pytest.mark.parametrize("path", HELD, ids=lambda path: path.name)
def test_only_families_know_the_names_of_parts(path):
    """No string outside of them is a part's name, begins like its parameters or names a pipeline, and no attribute of
    that name is read. Config fields (`text_encoder_multiplier`) are longer words; messages may say what they mean."""
    tree, names = ast.parse(path.read_text()), names_of_models()
    ignored, wrong = docstrings(tree), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in ignored:
            text = node.value.lstrip("^(").replace("\\.", ".")
            if any(text == name or text.startswith((f"{name}.", f"{name}|")) for name in names):
                wrong.append(f"line {node.lineno}: {node.value!r}")
        elif isinstance(node, ast.Attribute) and node.attr in names:
            wrong.append(f"line {node.lineno}: .{node.attr}")
    assert not wrong, f"{path.relative_to(PACKAGE)}: " + ", ".join(wrong)


def functions(tree: ast.AST, prefix: str = ""):
    """(dotted name, whether it is a method, function) of the functions of a module and of its classes."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield from functions(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef):
            static = any(isinstance(x, ast.Name) and x.id == "staticmethod" for x in node.decorator_list)
            yield prefix + node.name, bool(prefix) and not static, node


def test_every_function_is_annotated():
    """All arguments and results; `__init__` has none to name. Whether the annotations are true is seen while the tests
    run (conftest.py)."""
    wrong = []
    for path in MODULES:
        for name, is_method, node in functions(ast.parse(path.read_text())):
            several = [x for x in (node.args.vararg, node.args.kwarg) if x]
            arguments = [*node.args.posonlyargs, *node.args.args][is_method:] + node.args.kwonlyargs + several
            bare = [argument.arg for argument in arguments if argument.annotation is None]
            bare += ["its result"] if node.returns is None and node.name != "__init__" else []
            if bare:
                wrong.append(f"{path.relative_to(PACKAGE)}:{node.lineno} {name}: {', '.join(bare)}")
    assert not wrong, "\n".join(wrong)
