"""The notebook contract, for every notebook, as committed; and what bad parameters meet."""

import ast
import collections
import json
import os
import re
import tokenize
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from jupyter_client.manager import start_new_kernel

import model

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MACHINE = re.compile(
    r"(?<![\w.])/(home|root|Users|tmp|work|mnt|private|var|opt|usr/local|content|scratch)/"
    r"|\b[A-Z]:\\\\?\w|site-packages"
)

NAMES = [
    "annealing", "averaging_baselines", "batch_and_rate", "blend", "budget", "loss_spikes",
    "lr_sweep", "model_size", "pythia_replay", "spacing_ablation"]
PRIMARY = {  # the paper's primary claims, each judged once
    "early": "lr_sweep",
    "rates": "lr_sweep",
    "spacing": "spacing_ablation",
    "conventional": "averaging_baselines",
    "ema": "averaging_baselines",
    "swa": "averaging_baselines",
}
# parameters of a notebook that trains; of rates, lrs or lr
EXPECTED = {"scale", "seeds", "k", "spacing", "max_iters", "corpus", "out", "disk_budget", "force"}
PROSE = 2  # cells of prose to a cell of code, at least
LONG = 20  # lines of a code cell, that few have more than

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
training = pytest.mark.parametrize(
    "path", [path for path in NOTEBOOKS if path.stem != "pythia_replay"], ids=lambda path: path.stem
)


def cells(path, kind=None):
    """[(source, cell)] in order, of one kind or of all."""
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [("".join(cell["source"]), cell) for cell in found if kind in (None, cell["cell_type"])]


def tags(cell):
    return cell["metadata"].get("tags", [])


def parameters(path):
    (source,) = [source for source, cell in cells(path, "code") if "parameters" in tags(cell)]
    return source


def calls(path, name):
    """The calls of a function, as `lab.claim`, in a notebook's code."""
    code = "\n".join(source for source, _ in cells(path, "code"))
    nodes = ast.walk(ast.parse(code))
    return [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == name]


def given(call):
    """{keyword: its value} of a call: a text as it is, or its beginning, None if it is computed."""
    found = {}
    for keyword in call.keywords:
        value = keyword.value
        if isinstance(value, ast.JoinedStr):
            value = value.values[0]
        found[keyword.arg] = value.value if isinstance(value, ast.Constant) else None
    return found


def printed(path):
    """What the code cells print, and the texts that they show."""
    outputs = [output for _, cell in cells(path, "code") for output in cell["outputs"]]
    return "\n".join(text for output in outputs for text in texts(output))


def setup(path):
    """The code cell after the parameters."""
    code = [(source, "parameters" in tags(cell)) for source, cell in cells(path, "code")]
    return code[[tagged for _, tagged in code].index(True) + 1][0]


def texts(output):
    """Everything readable in an output; PNG pictures are left out."""
    yield "".join(output.get("text", ""))
    yield from (
        data if isinstance(data, str) else "".join(data)
        for kind, data in output.get("data", {}).items()
        if kind != "image/png"
    )
    yield from output.get("traceback", [])


def test_there_are_notebooks():
    assert [path.stem for path in NOTEBOOKS] == NAMES


# ---- as committed ----


@each
def test_opens_with_a_title_the_question_and_the_paper(path):
    source, first = cells(path)[0]
    assert first["cell_type"] == "markdown"
    assert re.match(r"# \w", source)
    assert "paper" in source.lower() and "?" in source


@each
def test_says_beforehand_what_would_refute_it(path):
    """Question, method, what is claimed with its mark, what would refute it: before any code."""
    opening = ""
    for source, cell in cells(path):
        if cell["cell_type"] == "code":
            break
        opening += source + "\n"
    words = ("question", "method", "claim", "refute")
    assert [word for word in words if word not in opening.lower()] == []
    assert re.search(r"\[[SPI?]\]", opening)


@each
def test_one_parameters_cell_of_annotated_literals_with_comments(path):
    source = parameters(path)
    tokens = tokenize.generate_tokens(StringIO(source).readline)
    comments = {token.start[0]: token.string for token in tokens if token.type == tokenize.COMMENT}
    lines = [number for number, line in enumerate(source.splitlines(), 1) if line.strip()]
    assert [number for number in lines if len(comments.get(number, "").strip("# ")) < 5] == []
    statements = ast.parse(source).body
    assert (
        statements
        and [ast.unparse(s) for s in statements if not isinstance(s, ast.AnnAssign)] == []
    )
    values = {s.target.id: ast.literal_eval(s.value) for s in statements}
    assert values["scale"] == "smoke"  # the committed default: a check of the machinery
    assert values["out"] is None


@training
def test_parameters_of_a_notebook_that_trains(path):
    statements = ast.parse(parameters(path)).body
    found = {s.target.id: ast.literal_eval(s.value) for s in statements}
    kinds = {s.target.id: ast.unparse(s.annotation) for s in statements}
    assert found.keys() >= EXPECTED and found.keys() & {"lrs", "lr"}
    assert (kinds["disk_budget"], found["disk_budget"]) == ("float", None)
    assert (kinds["force"], found["force"]) == ("bool", False)
    assert kinds.get("lrs", "str") == "str" and kinds.get("lr", "float") == "float"
    assert "GB" in parameters(path).split("disk_budget", 1)[1].split("\n")[0]


@each
def test_freshly_run_from_top_to_bottom(path):
    code = cells(path, "code")
    assert [cell["execution_count"] for _, cell in code] == list(range(1, len(code) + 1))
    assert [source for source, _ in code if not source.strip()] == []
    outputs = [output for _, cell in code for output in cell["outputs"]]
    assert [output for output in outputs if output["output_type"] == "error"] == []
    assert [output for output in outputs if output.get("name") == "stderr"] == []
    assert [output for output in outputs if "image/png" in output.get("data", {})]
    assert [output for output in outputs if output.get("name") == "stdout"]


@each
def test_what_is_printed_and_drawn_has_an_output(path):
    silent = [source for source, cell in cells(path, "code") if not cell["outputs"]]
    assert [
        source for source in silent if re.search(r"^(print|plt\.show)\(", source, re.MULTILINE)
    ] == []


@each
def test_kernel(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert notebook["nbformat"] == 4


@each
def test_no_path_of_a_machine(path):
    shown = [
        text
        for source, cell in cells(path)
        for text in (source, *(t for output in cell.get("outputs", []) for t in texts(output)))
    ]
    assert [line for text in shown for line in text.splitlines() if MACHINE.search(line)] == []


@each
def test_size(path):
    assert path.stat().st_size < 1.5e6


@each
def test_ends_with_a_record_that_nbval_compares(path):
    """The last cell's output is compared, and it records rows and claims."""
    source, last = cells(path, "code")[-1]
    assert "nbval-check-output" in tags(last) and last["outputs"]
    assert "lab.record(" in source


@each
def test_limits_come_before_the_last_cell(path):
    prose = [source for source, cell in cells(path)[:-1] if cell["cell_type"] == "markdown"]
    assert any(re.search(r"(^#+ |\*\*).*limit", source, re.I | re.M) for source in prose[-2:])
    assert cells(path)[-1][1]["cell_type"] == "code"


@each
def test_calls_and_figures_only(path):
    """No training loop, no shell line."""
    source = "\n".join(source for source, _ in cells(path, "code"))
    assert re.findall(r"\.backward\(|optim\.|optimizer\.step|^\s*[!%]", source, re.MULTILINE) == []


@each
def test_reads_as_prose(path):
    prose, code = len(cells(path, "markdown")), cells(path, "code")
    assert prose >= PROSE * len(code), f"{prose} cells of prose, {len(code)} of code"
    long = [source for source, _ in code if len(source.splitlines()) > LONG]
    assert len(long) <= len(code) / 4


# ---- claims ----


@each
def test_smoke_checks_and_judges_nothing(path):
    """A word that judges would be read as a result."""
    out = printed(path)
    words = r"\b(HOLDS|OPPOSITE|NO DIFFERENCE|CANNOT TELL|NOT TESTED HERE)\b"
    former = r"does not hold|undecided|: holds|at scale smoke \("
    assert re.findall(f"{words}|{former}", out) == []
    assert out.startswith("scale smoke:") or "\nscale smoke:" in out
    claims = re.findall(r"^check: \S", out, re.MULTILINE)
    assert len(claims) >= len(calls(path, "lab.claim")) >= 1


@each
def test_every_claim_has_a_marked_source_and_a_figure(path):
    """[S] read in a source, [P] read off a plot, [I] inferred, [?] unknown."""
    drawn = [call.args[1] for call in calls(path, "lab.figure")]
    computed = any(not isinstance(name, ast.Constant) for name in drawn)
    figures = {name.value for name in drawn if isinstance(name, ast.Constant)}
    for call in calls(path, "lab.claim"):
        words = given(call)
        assert {"at", "published", "source", "figure"} <= words.keys() or None in words
        if words.get("source") is not None:
            assert re.match(r"\[[SPI?]\]", words["source"]), words["source"]
        if words.get("figure") is not None:
            assert computed or words["figure"] in figures


def test_each_primary_claim_is_judged_once():
    found = []
    for path in NOTEBOOKS:
        for call in calls(path, "lab.claim"):
            primary = given(call).get("primary")
            if primary:
                found.append((primary, path.stem))
                assert not given(call).get("later"), "the paper's own claims only"
    assert sorted(found) == sorted(PRIMARY.items())


@each
def test_rates_are_shown_as_they_are(path):
    """`:.0e` shows 1.8e-3 as 2e-03."""
    source = "\n".join(source for source, _ in cells(path, "code"))
    assert ":.0e}" not in source and "%.0e" not in source


@each
def test_code_is_at_most_100_columns_wide(path):
    lines = [line for source, _ in cells(path, "code") for line in source.splitlines()]
    assert [line for line in lines if len(line) > 100] == []


def test_no_helper_is_copied():
    """A function that two notebooks define belongs in one of the files."""
    seen = collections.defaultdict(set)
    for path in NOTEBOOKS:
        for source, _ in cells(path, "code"):
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.FunctionDef):
                    seen["\n".join(ast.unparse(statement) for statement in node.body)].add(
                        path.stem
                    )
    assert {body: names for body, names in seen.items() if len(names) > 1} == {}


# ---- parameters and set-up in a kernel ----


class Kernel:
    """One kernel for all cases: importing torch and matplotlib takes seconds."""

    def __init__(self, client, runs):
        self.client = client
        self.runs = runs  # where it would train, apart from what others train meanwhile

    def run(self, *sources):
        """The error (name, message) of the first source that raises one, else None.

        They run one after the other in an empty namespace.
        """
        for source in ("%reset -f", *sources):
            messages = []
            reply = self.client.execute_interactive(
                source, store_history=False, timeout=120, output_hook=messages.append
            )["content"]
            if reply["status"] == "error":
                return reply["ename"], reply["evalue"]
        return None


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """As Jupyter and papermill start it, in a folder that is not the project's."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    manager, client = start_new_kernel(
        kernel_name="python3", env=environment, cwd=str(tmp_path_factory.mktemp("elsewhere"))
    )
    runs = tmp_path_factory.mktemp("trained") / "runs"
    found = Kernel(client, runs)
    assert found.run(f"import model, pathlib\nmodel.RUNS = pathlib.Path({str(runs)!r})") is None
    yield found
    client.stop_channels()
    manager.shutdown_kernel(now=True)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Random tokens in the format of data/corpus.py."""
    folder = tmp_path_factory.mktemp("corpora") / "tiny"
    folder.mkdir()
    sizes = {"train": 50_000, "val": 20_000}
    for side, length in sizes.items():
        np.random.default_rng(0).integers(0, 257, length).astype("<u2").tofile(
            folder / f"{side}.bin"
        )
    meta = {
        "name": "tiny",
        "vocab_size": 257,
        "eot_token": 256,
        "tokenizer": "gpt2",
        "manifest_sha256": "0",
        "seed": 0,
    }
    meta |= {
        f"{side}_{unit}": length for side, length in sizes.items() for unit in ("tokens", "bytes")
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def written(kernel):
    """What lies in the kernel's folder of runs and under results/: nothing may be added."""
    tops = [top for top in (kernel.runs, ROOT / "results") if top.exists()]
    return sorted(str(path) for top in tops for path in top.iterdir())


def has(path, name):
    return re.search(rf"^{name}:", parameters(path), re.MULTILINE) is not None


def injected(values):
    """The cell that papermill puts after the parameters."""
    return "\n".join(f"{name} = {value!r}" for name, value in values.items())


OFF_GRID = model.SCALES["smoke"]["ckpt_interval"] + 1

BAD = {  # parameters, and words of the one line that answers
    "unknown scale": ({"scale": "huge"}, "scale 'huge'"),
    "scale of a wrong type": ({"scale": 3}, "scale 3"),
    "negative rate": ({"lr": -1}, "lr -1"),
    "no rate": ({"lr": 0.0}, "lr 0.0"),
    "rate is text": ({"lr": "fast"}, "lr 'fast'"),
    "empty window": ({"k": 0}, "k 0"),
    "between two checkpoints": ({"spacing": OFF_GRID}, f"spacing {OFF_GRID}"),
    "no spacing": ({"spacing": 0}, "spacing 0"),
    "missing corpus": ({"corpus": "nowhere"}, "nowhere"),
    "no steps": ({"max_iters": 0}, "max_iters 0"),
    "no seeds": ({"seeds": ""}, "seeds"),
    "a seed twice": ({"seeds": "0,0"}, "seeds"),
    "seed is text": ({"seeds": "zero"}, "seeds"),
    "unknown parameter": ({"learning_rate": 0.1}, "learning_rate"),
    "rates are text": ({"lrs": "fast"}, "lrs 'fast'"),
    "no rates": ({"lrs": ""}, "lrs"),
    "a rate twice": ({"lrs": "1e-3,0.001"}, "lrs"),
    "a negative rate among others": ({"lrs": "-1,1e-3"}, "lr -1"),
    "a negative seed": ({"seeds": "0,-1"}, "seed -1"),
    "disk budget is text": ({"disk_budget": "much"}, "disk_budget 'much'"),
    "force is a number": ({"force": 1}, "force 1"),
}


@each
@pytest.mark.parametrize("case", BAD)
def test_bad_parameters(path, case, kernel, corpus, tmp_path):
    """One clear LawaError that names the parameter, before anything is written.

    A parameter the notebook lacks is an unknown one.
    """
    wrong, words = BAD[case]
    before, good = written(kernel), {"corpus": str(corpus), "out": str(tmp_path / "out")}
    values = {name: value for name, value in good.items() if has(path, name)} | wrong
    error = kernel.run(parameters(path), injected(values), setup(path))
    assert error is not None, "accepted"
    name, message = error
    assert name == "LawaError" and "\n" not in message
    expected = words.split() if all(has(path, parameter) for parameter in wrong) else wrong
    assert [word for word in expected if word not in message] == []
    assert not (tmp_path / "out").exists() and written(kernel) == before


@each
def test_committed_parameters_are_accepted(path, kernel, corpus, tmp_path):
    """The set-up of every notebook passes with its own parameters, from any folder.

    It trains and writes nothing yet.
    """
    before, good = written(kernel), {"corpus": str(corpus), "out": str(tmp_path / "out")}
    assert (
        kernel.run(
            parameters(path),
            injected({name: value for name, value in good.items() if has(path, name)}),
            setup(path),
        )
        is None
    )
    assert not (tmp_path / "out").exists() and written(kernel) == before
