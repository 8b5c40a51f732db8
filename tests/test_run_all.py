"""run_all.sh on a copy of the project with tiny notebooks, in a folder with a space in its name."""

import ast
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from importlib import metadata
from pathlib import Path

import nbformat
import pytest
from packaging.specifiers import SpecifierSet
from papermill.cli import _resolve_type

from lab import results_name

ROOT = Path(__file__).resolve().parent.parent
RUN_ALL = (ROOT / "run_all.sh").read_text()
ACTIVE = {k: v for k, v in os.environ.items() if k != "CONDA_PREFIX"} | {"VIRTUAL_ENV": sys.prefix}
NOT_ACTIVE = {k: v for k, v in ACTIVE.items() if k != "VIRTUAL_ENV"}

PARAMETERS = 'scale: str = "smoke"  # size\nout: str = ""  # results folder'
GOOD = """
import json, model, pathlib
assert scale in ("smoke", "laptop"), f"unknown scale {scale}"
print("training one", flush=True)
folder = pathlib.Path(out) / "good"
assert pathlib.Path(out).is_absolute() and folder.is_dir()
record = {"title": "Good", "scale": scale, "claims": [{"claim": "It runs", "outcome": "holds"}]}
(folder / "record.json").write_text(json.dumps(record))
"""
PREPARE = 'from pathlib import Path\n\nPath(__file__).with_name("meta.json").write_text("{}")\n'
SLOW = "import time\nprint('training slow', flush=True)\ntime.sleep(120)"


def add_notebook(project, name, code, parameters=PARAMETERS):
    cells = [
        nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(code),
    ]
    for count, cell in enumerate(cells, 1):
        cell.execution_count = count
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    nbformat.write(
        nbformat.v4.new_notebook(cells=cells, metadata=metadata),
        project / f"notebooks/{name}.ipynb",
    )


def make_project(folder):
    """The real run_all.sh, report and lawa_core.py among stubs.

    What pyproject.toml asks for is there, so that pip is not called.
    """
    for inner in ("notebooks", "data/stdlib", "tests", "lab"):
        (folder / inner).mkdir(parents=True)
    for name in ("run_all.sh", "lawa_core.py", "lab/report.py", "lab/report.html"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("model.py", "lab/__init__.py"):
        (folder / name).write_text("")
    (folder / "constraints.txt").write_text("")
    extras = '{notebooks = ["papermill>=2"], test = ["stub[notebooks]", "pytest"]}'
    extras = f"optional-dependencies = {extras}"
    (folder / "pyproject.toml").write_text(
        f'[project]\nname = "stub"\ndependencies = []\n{extras}\n'
    )
    (folder / "data/stdlib/prepare.py").write_text(PREPARE)
    add_notebook(folder, "good", GOOD)
    return folder


def shell(folder, functions, *lines):
    """What these functions of run_all.sh print, called in lines of their own."""
    parts = re.findall(rf"^(?:{functions})\(\) .*?^}}", RUN_ALL, re.MULTILINE | re.DOTALL)
    script = ["bash", "-c", "\n".join((*parts, *lines))]
    env = ACTIVE | {"PATH": f"{sys.prefix}/bin:{os.environ['PATH']}", "PYTHONPATH": str(folder)}
    done = subprocess.run(script, cwd=folder, env=env, capture_output=True, text=True, check=True)
    return done.stdout


def stamp(folder, name="good", scale="laptop", options="options=()"):
    """What run_all.sh notes of all that the notebook's result depends on."""
    return shell(folder, "hash256|stamp_of", f"scale={scale}", options, f"stamp_of {name}")


def test_a_notebook_is_run_again_when_anything_that_it_can_use_changes(tmp_path):
    """Every module but the page's, also one that is new; the notebook, the corpus, the scale."""
    project = make_project(tmp_path / "a lab")
    (project / "data/stdlib/meta.json").write_text("{}")
    modules = [*ROOT.glob("*.py"), *ROOT.glob("lab/*.py")]
    seen = [stamp(project), stamp(project, scale="smoke")]
    names = [path.relative_to(ROOT) for path in modules if path.name != "report.py"]
    for name in (*names, "notebooks/good.ipynb", "data/stdlib/meta.json", "lab/new.py"):
        with open(project / name, "a") as file:
            file.write("# changed\n")
        seen.append(stamp(project))
    assert len(names) >= 7 and len(set(seen)) == len(seen)
    options = "options=(-p lr 6e-4)"
    assert stamp(project, options=options) not in seen
    assert stamp(project, options=options) != stamp(project, options="options=(-p lr 6e-3)")
    for name in ("lab/report.html", "lab/report.py"):
        (project / name).write_text("only how results are shown")
    add_notebook(project, "other", "pass")
    assert stamp(project) == seen[-1]


def command(project, *args, env=ACTIVE, cwd="/"):
    shell = [str(project / "run_all.sh"), *args]
    return subprocess.run(
        shell,
        env=env,
        cwd=cwd,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=600,
    )


def table(done):
    """{notebook: status} as printed at the end."""
    lines = done.stdout[done.stdout.index("notebook   ") :].split("\n\n")[0].splitlines()[1:]
    return {line.split()[0]: line.split()[1] for line in lines if not line.startswith(" ")}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = make_project(tmp_path_factory.mktemp("lab") / "my lab")
    add_notebook(folder, "deaf", "pass", parameters="lr = 1e-3")
    add_notebook(folder, "bad", "raise ValueError('lost its way\\nand more')")
    return folder


@pytest.fixture(scope="module")
def first(project):
    return command(project)


def test_one_failure_leaves_the_others(project, first):
    assert first.returncode == 1
    assert table(first) == {"bad": "FAILED", "deaf": "FAILED", "good": "done"}
    assert "ValueError: lost its way" in first.stdout
    assert f"see {project}/results/bad/bad.failed.ipynb" in first.stdout
    assert f"open {project}/results/index.html" in first.stdout
    results = project / "results"
    assert json.loads((results / "good/record.json").read_text())["scale"] == "laptop"
    assert sorted(path.name for path in (results / "good").iterdir()) == [
        ".stamp",
        "good.html",
        "good.ipynb",
        "record.json",
    ]
    assert not (results / "bad/bad.ipynb").exists()
    page = (results / "index.html").read_text()
    assert "It runs" in page and "ValueError: lost its way" in page


def test_a_parameter_the_notebook_does_not_have_is_a_failure(first):
    assert "Passed unknown parameter" in first.stdout


def test_the_screen_shows_the_notebook_and_not_papermill(first):
    assert "training one" in first.stdout
    assert not any(
        noise in first.stdout + first.stderr
        for noise in ("Executing", "Input Notebook", "TCP", "%|")
    )


def test_list_prints_commands_that_run_alone(project, first):
    listed = command(project, "--list", "--results", "else where", cwd=project / "data")
    lines = listed.stdout.splitlines()
    assert listed.returncode == 0 and len(lines) == 3 and not (project / "data/else where").exists()
    done = subprocess.run(
        ["bash", "-c", lines[2]], env=ACTIVE, cwd="/", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert table(done) == {"good": "done"}
    assert (project / "data/else where/good/good.ipynb").exists()


def test_finished_work_is_not_redone_until_something_changes(project, first):
    executed = project / "results/good/good.ipynb"
    before = executed.read_bytes()
    began = time.monotonic()
    again = command(project, "--only", "good.ipynb", "--only", "good")
    assert time.monotonic() - began < 10
    assert (
        again.returncode == 0
        and table(again) == {"good": "cached"}
        and executed.read_bytes() == before
    )

    (project / "lab/__init__.py").write_text("# changed\n")
    failed = command(project, "--only", "good", "--scale", "enormous")
    assert failed.returncode == 1 and table(failed) == {"good": "FAILED"}
    assert "AssertionError: unknown scale enormous" in failed.stdout
    assert executed.read_bytes() == before  # the earlier result stands

    redone = command(project, "--only", "good")
    assert (
        redone.returncode == 0
        and table(redone) == {"good": "done"}
        and executed.read_bytes() != before
    )
    assert not (project / "results/good/good.failed.ipynb").exists()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--wrong"], "unknown option '--wrong'"),
        (["good"], "unknown option 'good'"),
        (["--only", "nothing"], "no notebook 'nothing'; there are: bad deaf good"),
        (["--scale"], "--scale needs a value"),
        (["--results", "--list"], "--results needs a value"),
        (["test", "--force"], "test takes no options, got '--force'"),
        (["figure", "--list"], "figure needs a notebook"),
        (["figure", "nothing"], "no notebook 'nothing'"),
        (["-p", "lr"], "-p needs a name and a value"),
        (["-p", "l r", "1"], "-p needs a name and a value"),
        (["-p", "scale", "smoke"], "-p scale: use --scale and --results"),
        (["-p", "rate", "1"], "-p rate: no such parameter in bad deaf good"),
    ],
)
def test_bad_usage_is_one_line(project, args, says):
    done = command(project, *args)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {says}") and done.stderr.count("\n") == 1


def test_help(project):
    done = command(project, "--help")
    assert done.returncode == 0 and done.stderr == ""
    for option in ("test", "figure", "--scale", "--only", "-p", "--results", "--force", "--list"):
        assert f" {option} " in done.stdout


# ---- parameters ----

WITH_RATE = PARAMETERS + "\nlr: float = None  # rate\nseeds: str = None  # of runs"
NAMED = """
import json, pathlib
folder = pathlib.Path(out) / ("lr_sweep" if lr is None else f"lr_sweep-lr={lr}")
assert folder.is_dir() and lr in (None, 6e-4, 6e-3)
(folder / "record.json").write_text(json.dumps({"title": "Sweep", "scale": scale, "claims": []}))
"""
AFTER = """
import pathlib
assert "Sweep" in (pathlib.Path(out) / "index.html").read_text()
"""


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_parameters_have_a_folder_of_their_own(tmp_path):
    """They go to the notebooks that have them; and the page is there after the first notebook."""
    project = make_project(tmp_path / "a lab")
    for name in ("__init__.py", "statistics.py"):
        shutil.copy(ROOT / "lab" / name, project / "lab" / name)
    (project / "model.py").write_text("import pathlib\nROOT = pathlib.Path(__file__).parent\n")
    (project / "notebooks/good.ipynb").unlink()
    add_notebook(project, "lr_sweep", NAMED, WITH_RATE)
    add_notebook(project, "after", AFTER)
    results = project / "results"

    done = command(project, "-p", "lr", "6e-4")
    assert done.returncode == 0, done.stdout + done.stderr
    assert table(done) == {"lr_sweep-lr=0.0006": "done", "after": "done"}
    first = files(results / "lr_sweep-lr=0.0006")
    assert sorted(first) == [
        ".stamp",
        "lr_sweep-lr=0.0006.html",
        "lr_sweep-lr=0.0006.ipynb",
        "record.json",
    ]
    sweep = ("--only", "lr_sweep")
    assert table(command(project, *sweep, "-p", "lr", "6e-3")) == {"lr_sweep-lr=0.006": "done"}
    assert table(command(project, *sweep)) == {"lr_sweep": "done"}
    assert table(command(project, *sweep, "-p", "lr", "6e-4")) == {"lr_sweep-lr=0.0006": "cached"}
    assert files(results / "lr_sweep-lr=0.0006") == first


@pytest.mark.parametrize(
    "given",
    [
        {"lr": "6e-4"},
        {"seeds": "0", "lr": "0.01"},  # the order is the notebook's
        {"lrs": "6e-4,6e-3", "force": "True", "lr": "None"},
        {"corpus": "my text/1"},
    ],
)
def test_run_all_names_folders_as_lab_does(tmp_path, given):
    path = ROOT / "notebooks" / "lr_sweep.ipynb"
    (source,) = [
        cell.source
        for cell in nbformat.read(path, 4).cells
        if "parameters" in cell.metadata.get("tags", ())
    ]
    values = {key: _resolve_type(text) for key, text in given.items()}
    tree = ast.parse(source)
    names = [node.target.id for node in tree.body]
    committed = {node.target.id: ast.literal_eval(node.value) for node in tree.body}
    whole = {name: (committed | values)[name] for name in names}
    words = " ".join(f"-p {key} {shlex.quote(text)}" for key, text in given.items())
    printed = shell(ROOT, "folder_of", f"options=({words})", "folder_of lr_sweep")
    assert printed.strip() == results_name("lr_sweep", whole)


def test_the_order_and_what_figure_is(tmp_path):
    project = make_project(tmp_path / "a lab")
    with_budget = PARAMETERS + "\ndisk_budget: float = None  # GB"
    for name in ("budget", "annealing", "spacing_ablation"):
        add_notebook(project, name, "pass")
    add_notebook(project, "lr_sweep", "pass", with_budget)

    def listed(*args):
        done = command(project, *args, "--list")
        assert done.returncode == 0, done.stderr
        return [shlex.split(line)[1:] for line in done.stdout.splitlines()]

    assert [words[5] for words in listed()] == [
        *("lr_sweep", "spacing_ablation", "budget", "annealing", "good")
    ]
    at_laptop = ["--scale", "laptop", "--results", f"{project}/results", "--only"]
    assert listed("figure", "lr_sweep") == [[*at_laptop, "lr_sweep"]]
    given = ("-p", "disk_budget", "0")
    small = ["--scale", "gpt2-small", "--results", f"{project}/results/scale-gpt2-small", "--only"]
    assert listed("figure", "lr_sweep", "--scale", "gpt2-small") == [[*small, "lr_sweep", *given]]
    assert listed("figure", "good", "--scale", "gpt2-small") == [[*small, "good"]]
    own = ("-p", "disk_budget", "2 5")
    assert listed("figure", "lr_sweep", "--scale", "gpt2-small", *own)[0][6:] == [*own]
    assert [words[6:] for words in listed(*own)] == [[*own], [], [], [], []]


# ---- what ends in the middle ----


def test_ctrl_c_stops_and_keeps_what_is_finished(tmp_path):
    project = make_project(tmp_path / "a lab")
    add_notebook(project, "slow", SLOW)
    running = subprocess.Popen(
        [project / "run_all.sh"],
        env=ACTIVE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # a test runner in the background may itself have been told to ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    output = ""
    while "training slow" not in output:
        line = running.stdout.readline()
        assert line, output
        output += line
    os.killpg(running.pid, signal.SIGINT)
    output += running.communicate(timeout=30)[0]
    assert running.returncode == 130
    assert "slow                         stopped" in output
    assert list((project / "results/slow").glob("*.ipynb")) == []
    assert "It runs" in (project / "results/index.html").read_text()
    assert table(command(project, "--only", "good")) == {"good": "cached"}


def test_test_mode_runs_all_three_and_fails_if_one_did(tmp_path):
    project = make_project(tmp_path / "a lab")
    (project / "bad_style.py").write_text("import os\n")  # for ruff
    (project / "tests/test_stub.py").write_text("def test_stub():\n    pass\n")
    (project / "notebooks/good.ipynb").unlink()
    add_notebook(project, "quick", "import model\n")
    done = command(project, "test")
    assert done.returncode == 1
    assert "bad_style.py" in done.stdout
    assert "1 passed" in done.stdout and "2 passed" in done.stdout  # one test, two cells


FAKE_PYTHON = """#!/bin/bash
# Stands for python3, pip and papermill: notes its arguments; `-m venv` makes an environment,
# papermill a copy.
echo "$*" >>"$CALLS"
case "$*" in
  "-m venv "*)
    mkdir -p "$3/bin" && cp "$0" "$3/bin/python3" && touch "$3/bin/pip" && chmod +x "$3/bin/pip"
    ;;
  "-m papermill "*) cp "$3" "$4" ;;
esac
"""


def test_without_an_environment_one_is_made_and_filled_once(tmp_path):
    project = make_project(tmp_path / "a lab")
    (project / "data/stdlib/meta.json").write_text("{}")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python3").write_text(FAKE_PYTHON)
    (tmp_path / "bin/python3").chmod(0o755)
    calls = tmp_path / "calls"
    env = NOT_ACTIVE | {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "CALLS": str(calls)}

    def pip_calls(*args):
        calls.write_text("")
        assert command(project, *args, env=env).returncode == 0
        return [
            line
            for line in calls.read_text().splitlines()
            if line.startswith(("-m pip", "-m venv"))
        ]

    install = "-m pip install -q --disable-pip-version-check -c constraints.txt -e "
    assert pip_calls() == ["-m venv .venv", install + ".[notebooks]"]
    assert pip_calls() == []
    assert pip_calls("test") == [install + ".[test]"]
    assert pip_calls() == []
    (project / "constraints.txt").write_text("numpy==2.3.0\n")
    assert pip_calls() == [install + ".[notebooks]"]


def test_every_pin_fits_every_python_that_is_promised():
    """pip looks through hundreds of versions, for ever, where one pin excludes its Python."""
    lowest = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    oldest = f"{lowest.removeprefix('>=')}.0"
    wrong = []
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        name, _, pinned = line.partition("==")
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # what another machine needs
            continue
        pythons = SpecifierSet(found.metadata["Requires-Python"] or "")
        if found.version == pinned and oldest not in pythons:
            wrong.append(f"{line} needs Python {pythons}")
    assert not wrong
