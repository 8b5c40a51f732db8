"""The shape of the house: two files at the top, arrows one way, code to read, a file to copy."""

import ast
import graphlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HOME = Path(__file__).resolve().parent.parent
# the two files, and their most lines: they may shrink, not grow (the aims are 1,100 and 850)
SIZES = {"lawa_core.py": 2059, "model.py": 1268}  # may only shrink
COLUMNS = 100
FLOORS = {"lawa_core": 0, "model": 1, "lab": 2}  # all else is above: notebooks, tests, ...
FOLDERS = ("lab", "data", "tests", "benchmarks", "docs")
PUBLIC = {
    "lawa_core.py": """average sweep average_files sweep_files search check save open_checkpoint
        open_trajectory step_of checkpoint_name row parse_scheme tokens lawa swa ema decay explicit
        newest LAWA EMA SWA LawaError JobFailed""",
    "model.py": """GPT GPTConfig PRESETS Config SCALES train evaluate evaluate_trajectory sample
        batch learning_rate open_corpus run_dir scale_config""",
}


def code_of(path: Path) -> str:
    """A file's text; of a notebook, its code cells."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    return "\n".join("".join(cell["source"]) for cell in cells)


def tree_of(path: Path) -> ast.Module:
    """Its syntax tree, without what only IPython reads."""
    lines = code_of(path).split("\n")
    kept = [line for line in lines if not line.lstrip().startswith(("%", "!"))]
    return ast.parse("\n".join(kept), str(path))


def none(wrong: list[str]) -> None:
    assert not wrong, f"{len(wrong)} places:\n" + "\n".join(wrong[:50])


# ---- What lies where, and who imports whom -------------------------------------------------------


def sources() -> dict[str, Path]:
    """{name: file} of all code, by the name that an import would give it.

    "model", "lab" for lab/__init__.py, "lab.runs"; elsewhere the path, as in "data/corpus".
    """
    found = {path.stem: path for path in sorted(HOME.glob("*.py"))}
    for folder in FOLDERS:
        for path in sorted((HOME / folder).rglob("*.py")):
            name = path.relative_to(HOME).with_suffix("").as_posix()
            if folder == "lab":
                name = name.replace("/", ".").removesuffix(".__init__")
            found[name] = path
    for path in sorted((HOME / "notebooks").glob("*.ipynb")):
        found[f"notebooks/{path.stem}"] = path
    return found


def importable(names) -> dict[str, str]:
    """{what an import says: source's name}: scripts reach those of a folder such as data/ by its
    being on sys.path."""
    found = {}
    for name in names:
        if "/" not in name:
            found[name] = name
        elif name.count("/") == 1 and not name.startswith("notebooks/"):
            found[name.split("/")[1]] = name
    return found


def imports(tree: ast.AST, known: dict[str, str]) -> list[tuple[str, str, str]]:
    """[(source imported, what of it, the name here)] of one file, imports in functions too."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                # `import lab.hub` binds lab, `import lab.hub as hub` binds lab.hub
                if alias.name in known:
                    found.append((known[alias.name], "", alias.asname or alias.name))
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:  # only lab is a package
                module = f"lab.{module}".strip(".")
            for alias in node.names:
                inner = f"{module}.{alias.name}"  # `from lab import hub`
                if inner in known:
                    found.append((known[inner], "", alias.asname or alias.name))
                elif module in known:
                    found.append((known[module], alias.name, alias.asname or alias.name))
    return found


def floor(name: str) -> int:
    return FLOORS.get(name.split(".")[0], 3)


@pytest.fixture(scope="module")
def house():
    """{name: (its syntax tree, its imports of the project)}."""
    files = sources()
    known = importable(files)
    trees = {name: tree_of(path) for name, path in files.items()}
    return {name: (tree, imports(tree, known)) for name, tree in trees.items()}


def test_the_imports_of_a_file_are_seen():
    known = importable(["model", "lawa_core", "lab", "lab.hub", "data/corpus", "notebooks/model"])
    assert known["corpus"] == "data/corpus" and known["model"] == "model"
    code = """
import os, model as m, lab.hub
from pathlib import Path
def late():
    from lab import Lab, hub as h
    from corpus import build
    from . import hub
    from .hub import span
"""
    assert imports(ast.parse(code), known) == [
        ("model", "", "m"),
        ("lab.hub", "", "lab.hub"),
        ("lab", "Lab", "Lab"),
        ("lab.hub", "", "h"),
        ("data/corpus", "build", "build"),
        ("lab.hub", "", "hub"),
        ("lab.hub", "span", "span"),
    ]


def test_two_files_at_the_top():
    assert sorted(path.name for path in HOME.glob("*.py")) == sorted(SIZES)


def test_no_circle(house):
    graph = {name: {other for other, _, _ in found} for name, (_, found) in house.items()}
    list(graphlib.TopologicalSorter(graph).static_order())  # CycleError names the circle


def test_arrows_go_one_way(house):
    """Four floors: lawa_core, model, lab, and what stands on them. data/ needs lawa_core alone."""
    wrong = []
    for name, (_, found) in house.items():
        for other in sorted({other for other, _, _ in found}):
            if name.startswith("data/"):
                right = other in ("lawa_core", "data/corpus")
            elif name.startswith("lab"):
                right = floor(other) <= 2
            elif floor(name) < 2:
                right = floor(other) < floor(name)
            else:
                right = floor(other) < 3 or other.startswith(("tests/", "data/"))
            if not right:
                wrong.append(f"{name} imports {other}")
    none(wrong)
    assert {floor(name) for name in house} == {0, 1, 2, 3}
    assert "lawa_core" in {other for other, _, _ in house["model"][1]}


def test_nothing_private_crosses_a_file(house):
    """Neither `from model import _x` nor `model._x`."""
    wrong = []
    for name, (tree, found) in house.items():
        here = {bound: other for other, what, bound in found if not what}
        wrong += [f"{name}: {other}.{what}" for other, what, _ in found if what.startswith("_")]
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in here:
                private = node.attr.startswith("_") and not node.attr.endswith("__")
                if private:
                    wrong.append(f"{name}, line {node.lineno}: {ast.unparse(node)}")
    none(wrong)


def test_public_names():
    for file, names in PUBLIC.items():
        defined = set()
        for node in tree_of(HOME / file).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                defined.add(node.name)
            elif isinstance(node, ast.Assign):
                defined |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        assert set(names.split()) - defined == set(), file


# ---- For reading ---------------------------------------------------------------------------------


@pytest.mark.parametrize("file", SIZES)
def test_read_in_a_sitting(file):
    lines = len(code_of(HOME / file).splitlines())
    assert lines <= SIZES[file], f"{file} has {lines} lines"


def test_no_line_is_too_long():
    git = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(git, cwd=HOME, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout, so there is no list of the project's files")
    paths = [HOME / name for name in listed.split("\0")]
    paths = [p for p in paths if p.suffix in (".py", ".sh", ".ipynb") and p.exists()]
    assert {"lawa_core.py", "run_all.sh", "test_house.py"} <= {path.name for path in paths}
    wrong = []
    for path in paths:
        for number, line in enumerate(code_of(path).split("\n"), 1):
            if len(line) > COLUMNS:
                wrong.append(f"{path.relative_to(HOME)}, code line {number}: {len(line)} columns")
    none(wrong)


COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def packed(code: str) -> list[str]:
    """Two ideas in one: ["line N: what"].

    `for x in [expression]` where `x = expression` is meant, `for x in A if c else ()` where an `if`
    is, and a comprehension of more than one line that holds another.
    """
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.For | ast.AsyncFor | ast.comprehension):
            over = node.iter
            if isinstance(over, ast.List | ast.Tuple | ast.Set) and len(over.elts) == 1:
                if not isinstance(over.elts[0], ast.Starred):
                    found.append(f"line {over.lineno}: a loop over one expression")
            elif isinstance(over, ast.IfExp):
                for way in (over.body, over.orelse):
                    empty = isinstance(way, ast.List | ast.Tuple) and not way.elts
                    if empty or (isinstance(way, ast.Dict) and not way.keys):
                        found.append(f"line {over.lineno}: a loop over something or nothing")
        elif isinstance(node, COMPREHENSIONS) and node.end_lineno > node.lineno:
            inside = [inner for inner in ast.walk(node) if inner is not node]
            if any(isinstance(inner, COMPREHENSIONS) for inner in inside):
                found.append(f"line {node.lineno}: comprehensions within one over several lines")
    return sorted(found)


@pytest.mark.parametrize(
    ("code", "times"),
    [
        ("[y for x in a for y in [f(x)]]", 1),
        ("for x in (a,):\n    pass", 1),
        ("for x in a if c else ():\n    pass", 1),
        ("{x for x in ([] if c else a)}", 1),
        ("[\n    [y for y in x] for x in a]", 1),
        ("f(g(y for y in x)\n  for x in a)", 1),
        ("for x in [*a]:\n    pass", 0),
        ("for x in (a, b):\n    pass", 0),
        ("for x in a if c else b:\n    pass", 0),
        ("[[y for y in x] for x in a]", 0),
        ("[x\n for x in a]", 0),
        ("x = [a]\nfor y in x:\n    z = [b for b in y]", 0),
    ],
)
def test_packing_is_seen(code, times):
    assert len(packed(code)) == times


@pytest.mark.parametrize("file", SIZES)
def test_one_idea_a_line(file):
    none(packed(code_of(HOME / file)))


# ---- lawa_core.py, copied to where nothing else of the project is --------------------------------

ALONE = """
import importlib.util, pathlib, sys
home, here = pathlib.Path(sys.argv[1]), pathlib.Path.cwd()
paths = [path for path in sys.path if path and "__editable__" not in path]
sys.path = [str(here), *(path for path in paths if pathlib.Path(path).resolve() != home)]
sys.meta_path = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]
for name in ("model", "lab"):
    assert importlib.util.find_spec(name) is None, name

import lawa_core
assert pathlib.Path(lawa_core.__file__).parent == here
assert not {"torch", "model", "lab"} & sys.modules.keys()

import torch
from lawa_core import EMA, LAWA, SWA, average, lawa, main, open_checkpoint, save, sweep
pathlib.Path("run").mkdir()
for step in (10, 20, 30):
    weights = {"w": torch.tensor([1.0, -2.0]) * step, "n": torch.tensor(step)}
    save(f"run/ckpt_{step}.safetensors", weights)

mean = average("run")
assert mean["w"].tolist() == [20.0, -40.0] and mean["n"].item() == 30, mean
swept = [(step, name, state["w"].tolist()) for step, name, state in
         sweep("run", {"two": lawa(2), "all": lawa(3)}, at=[20, 30])]
assert swept == [(20, "two", [15.0, -30.0]), (20, "all", [15.0, -30.0]),
                 (30, "two", [25.0, -50.0]), (30, "all", [20.0, -40.0])], swept
assert main(["inspect", "run"]) == 0
assert main(["average", "run", "-k", "2", "-o", "mean of two.safetensors"]) == 0
assert open_checkpoint("mean of two.safetensors")["w"].tolist() == [25.0, -50.0]
assert sorted(path.name for path in here.iterdir() if path.suffix == ".safetensors") \\
    == ["mean of two.safetensors"]

net = torch.nn.Linear(1, 1, bias=False)
followers = {"LAWA": LAWA(net, k=2, spacing=1), "EMA": EMA(net, 0.5), "SWA": SWA(net)}
for step, weight in enumerate([1.0, 2.0, 6.0], 1):
    torch.nn.init.constant_(net.weight, weight)
    for follower in followers.values():
        follower.update(step)
averages = {name: follower.average()["weight"].item() for name, follower in followers.items()}
assert averages == {"LAWA": 4.0, "EMA": 3.75, "SWA": 3.0}, averages  # 1, 1.5, 3.75
assert not {"model", "lab"} & sys.modules.keys()
print("all of it")
"""


def test_lawa_core_alone(tmp_path):
    """The file alone in an empty folder averages, sweeps, inspects and follows a model."""
    folder = tmp_path / "an empty folder"
    folder.mkdir()
    shutil.copy(HOME / "lawa_core.py", folder)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, str(HOME)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "all of it"
