"""Random trees in torch files, and random names: the right average, or one line that says why not.

The reference is written from the documentation alone and knows nothing of the averager's code. The
trees are the same in every run; with FUZZ=5000 in the environment they are so many others.
"""

import contextlib
import io
import json
import os
import shutil
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors import safe_open

import lawa_core

FUZZ = int(os.environ.get("FUZZ", 0))
FOUR = ("model", "state_dict", "model_state_dict", "module")
NARROW = (
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
)
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
COMPLEX = (torch.complex32, torch.complex64, torch.complex128)
WHOLE = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)
NAMES = st.sampled_from(
    [
        "weight",
        "wte.weight",
        "wte",
        "attn.bias",
        "inv_freq",
        "qweight",
        "scales",
        "",
        ".",
        "..",
        "dot.",
        "größe",
        "重み",
        "line\nbreak",
        "0",
        0,
        7,
        -1,
        2.5,
        True,
        "model",
        "module",
        "module.deep",
        "state_dict",
        "optimizer",
        "ema",
        "__metadata__",
        "_extra_state",
        "_orig_mod.deep",
        "block._orig_mod.deep",
    ]
)

# ------------------------------------------------------------------ trees

# A leaf is a recipe, made into a value for every step: (kind, dtype, shape), or (None, value).
SHAPES = st.sampled_from([(), (1,), (3,), (2, 3), (4, 4), (1, 1, 3, 3), (0,), (0, 4)])
PLAIN = st.tuples(
    st.just("plain"), st.sampled_from(FLOATS[1:2] * 6 + FLOATS + WHOLE + COMPLEX + NARROW), SHAPES
)
KINDS = ["transposed", "expanded", "tied", "slice", "sparse", "rows", "meta", "list", "parameter"]
ODD = st.tuples(
    st.sampled_from(KINDS),
    st.sampled_from((*FLOATS, torch.int64, torch.complex64)),
    st.sampled_from([(3,), (2, 3), (4, 4)]),
)
NO_TENSOR = st.tuples(
    st.none(), st.sampled_from([None, 3, 2.5, "text", b"bytes", [], {}, (1, "a"), [1, 2]])
)
LEAVES = st.one_of(PLAIN, PLAIN, PLAIN, ODD, NO_TENSOR)


def nested(depth):
    """Dictionaries in dictionaries, fewer of them the deeper."""
    if depth == 0:
        return st.dictionaries(NAMES, LEAVES, min_size=1, max_size=4)
    values = st.one_of(LEAVES, LEAVES, nested(depth - 1))
    return st.dictionaries(NAMES, values, min_size=1, max_size=4)


def flattened_too(tree):
    """Beside a nested name the same one with a dot, another tensor."""
    for key, value in list(tree.items()):
        if isinstance(value, dict):
            for name in value:
                tree[f"{key}.{name}"] = ("plain", torch.float32, (3,))


@st.composite
def trees(draw):
    """What a trainer may have saved: weights under a name, at the top, or anything."""
    weights = draw(nested(draw(st.integers(0, 2))))
    where = draw(st.sampled_from([*FOUR, "model", "model", None, None, "net"]))
    if draw(st.integers(0, 7)) == 0:
        flattened_too(weights)
    if where is None:
        return weights
    tree = {where: weights}
    beside = st.sampled_from(["optimizer", "ema", "epoch", "module", "args", "lr"])
    for name in draw(st.lists(beside, max_size=2)):
        if name != where:
            tree[name] = draw(st.one_of(nested(0), LEAVES))
    return tree


def numbers(shape, dtype, step, salt):
    """Multiples of 1/4 that every type holds, others at every step; whole ones for integers."""
    rng = torch.Generator().manual_seed(1000 * salt + step)
    values = torch.randint(-8, 9, shape, generator=rng).double() / 4
    if dtype == torch.float8_e8m0fnu:
        return torch.exp2((values * 4).round()).to(dtype)
    if dtype in WHOLE:
        return (values * 4).abs().to(torch.int64).to(dtype)
    if dtype in COMPLEX:
        return torch.complex(values, values.flip(0) if shape else -values).to(dtype)
    return values.to(dtype)


def leaf(recipe, step, salt, made):
    """The value of a recipe at a step; `made` holds the tensors so far, to tie to."""
    if recipe[0] is None:
        return recipe[1]
    kind, dtype, shape = recipe
    tensor = numbers(shape, dtype, step, salt)
    if kind == "tied" and made:
        return made[-1]
    if kind == "slice" and made and made[-1].layout == torch.strided and made[-1].dim():
        return made[-1][1:]
    if kind == "transposed":
        tensor = tensor.t()
    elif kind == "expanded":
        tensor = tensor[:1].expand(5, *tensor.shape[1:])
    elif kind == "sparse":
        tensor = tensor.to_sparse()
    elif kind == "rows" and tensor.dim() == 2:
        tensor = tensor.to_sparse_csr()
    elif kind == "meta":
        return tensor.to("meta")
    elif kind == "parameter":
        return torch.nn.Parameter(tensor, tensor.is_floating_point())
    elif kind == "list":
        return [tensor, tensor + tensor]
    made.append(tensor)
    return tensor


def grown(tree, step, made, path=()):
    """The tree with values for its recipes."""
    grown_tree = {}
    for place, (key, value) in enumerate(tree.items()):
        if isinstance(value, dict):
            grown_tree[key] = grown(value, step, made, (*path, place))
        else:
            salt = sum((n + 1) * 7**depth for depth, n in enumerate((*path, place)))
            grown_tree[key] = leaf(value, step, salt, made)
    return grown_tree


def spoiled(tree, how):
    """One tensor at the top or one below it gone, or of another float type, in an old checkpoint.

    -> whether there was one
    """
    for key, value in list(tree.items()):
        if isinstance(value, dict) and spoiled(value, how):
            return True
        if isinstance(value, torch.Tensor) and value.layout == torch.strided:
            if how == "gone":
                del tree[key]
                return True
            if value.dtype in FLOATS and not value.is_meta:
                tree[key] = value.detach().double()
                return True
    return False


# ------------------------------------------------------------------ the reference


def leaves(tree, path=()):
    """[(path, tensor)] of all tensors of a tree; places in lists are numbers."""
    if isinstance(tree, torch.Tensor):
        return [(path, tree)]
    if isinstance(tree, dict):
        items = list(tree.items())
    elif isinstance(tree, list | tuple):
        items = list(enumerate(tree))
    else:
        return []
    found = []
    for key, value in items:
        found += leaves(value, (*path, key))
    return found


def walked(tree, key):
    """The dictionary or list at a dotted path, or None."""
    for part in key.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return None
        tree = tree[part]
    return tree if isinstance(tree, dict | list) else None


def holds(tree, name):
    """Whether tensors lie in a dictionary, or a list of layers, of that name."""
    return isinstance(tree.get(name), dict | list) and bool(leaves(tree[name]))


def weights_of(tree, key):
    """(path of the weights, their tree), or None where the documentation asks for a --key."""
    if key == ".":
        return (), tree
    if key is not None:
        found = walked(tree, key)
        return None if found is None else (tuple(key.split(".")), found)
    groups = [name for name in FOUR if holds(tree, name)]
    if len(groups) > 1:
        return None
    if groups:
        return tuple(groups), tree[groups[0]]
    return (), tree


def plain_name(path):
    """A name without wrappers' prefixes, which may be left out on both sides."""
    parts = ".".join(str(part) for part in path).split(".")
    parts = [part for part in parts if part != "_orig_mod"]
    while len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def wide(tensor):
    tensor = tensor.detach()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def averages(dtype):
    return dtype.is_floating_point or dtype.is_complex


def is_mean(got, path, states):
    """Whether a tensor of the average is the mean of what the checkpoints hold at a path; of
    integers, whether it is the newest's."""
    newest = states[-1][path]
    if newest.is_meta or got.is_meta or got.shape != newest.shape or got.dtype != newest.dtype:
        return False
    if not averages(newest.dtype):
        return torch.equal(wide(got), wide(newest))
    if any(path not in state or state[path].shape != newest.shape for state in states):
        return False
    want = sum(wide(state[path]) for state in states) / len(states)
    finest = newest.dtype.to_real() if newest.dtype.is_complex else newest.dtype
    error = (wide(got) - want).abs()
    return bool((error <= torch.finfo(finest).eps * want.abs()).all())


def read(path, key):
    """[(path, tensor)] of an average as its format's own library reads it; a safetensors header
    lists the further names of tied tensors."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            ties = json.loads(file.metadata().get("ties", "{}"))
        return leaves(found | {name: found[first] for name, first in ties.items()})
    tree = torch.load(path, weights_only=True)
    if key is None:
        way = [name for name in FOUR if holds(tree, name)][:1]
    else:
        way = [] if key == "." else key.split(".")
    for name in way:
        if holds(tree, name):
            tree = tree[name]
    return leaves(tree)


def problems(got, saved, key, said):
    """What is wrong with an average `got`, [(path, tensor)], of the trees `saved`: a line each."""
    found = [weights_of(tree, key) for tree in saved]
    if found[-1] is None:
        return ["should have asked for another --key"]
    states = [dict(leaves(where[1])) if where else {} for where in found]
    sources, results, wrong = {}, {}, []
    for path in states[-1]:
        sources.setdefault(plain_name(path), []).append(path)
    for path, tensor in got:
        results.setdefault(plain_name(path), []).append(tensor)
    for name in results.keys() - sources.keys():
        wrong.append(f"{name!r} is in no checkpoint")
    for name, paths in sources.items():
        missing = list(results.get(name, []))
        for path in paths:
            right = [n for n, tensor in enumerate(missing) if is_mean(tensor, path, states)]
            if right:
                del missing[right[0]]
            elif not is_named(path, key, said):
                there = "is not the mean" if name in results else "is not there"
                wrong.append(f"{path!r} {there}: {states[-1][path]!r}, {results.get(name)}")
    return wrong


def is_named(path, key, said):
    """Whether what the command said names a path, or a group it is in, as left out; an optimizer at
    the top needs no word."""
    if key is None and path[0] == "optimizer":
        return True
    _, _, text = said.partition("left out")
    heads = [".".join(map(str, path[: n + 1])) for n in range(len(path))]
    heads += [plain_name((head,)) for head in heads]
    heads += [repr(head)[1:-1] for head in heads]
    return bool(text) and any(head and head in text for head in heads)


# ------------------------------------------------------------------ the two properties


def command(*args):
    """-> (exit status, stdout, stderr) of the command line"""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = lawa_core.main([str(arg) for arg in args])
    return status, out.getvalue(), err.getvalue()


@pytest.mark.filterwarnings("ignore")
def test_any_tree_gives_its_mean_or_one_line():
    counted = Counter()

    @settings(deadline=None, derandomize=not FUZZ, max_examples=FUZZ or 500)
    @given(
        tree=trees(),
        steps=st.sampled_from([(9, 10), (900, 1000, 2000)]),
        spoil=st.sampled_from([None] * 8 + ["gone", "wider"]),
        key=st.sampled_from([None] * 8 + [".", "model", "net", "model.wte"]),
        suffix=st.sampled_from(["safetensors", "pt"]),
    )
    def check(tree, steps, spoil, key, suffix):
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        saved = [grown(tree, step, []) for step in steps]
        if spoil:
            spoiled(saved[0], spoil)
        for step, state in zip(steps, saved, strict=True):
            torch.save(state, folder / f"ckpt_{step}.pt")
        out = folder / f"average.{suffix}"
        more = [] if key is None else ["--key", key]
        paths = [folder / f"ckpt_{step}.pt" for step in steps]
        args = ["average", *paths, "-o", out, "--allow", "duplicates", "--threads", "1", *more]
        status, said, err = command(*args)
        counted[status] += 1
        if status == 0:
            assert "Traceback" not in err
            assert problems(read(out, key), saved, key, said + err) == []
        else:
            assert status == 2, (status, err)
            assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
            assert sorted(folder.iterdir()) == sorted(paths)

    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(name)
        check()
    assert counted[0] >= 50, counted  # else the test would show little


KEYS = ["step", "global_step", "iter", "iteration", "it", "update", "ba"]
KEYS += ["ckpt", "checkpoint", "epoch", "ep"]
NUMBERS = ["0", "7", "100", "00500", "1k", "1.5M", "1e4", "1e999", "-1", "0.5", "9" * 30, "²", "٣"]
METRICS = ["", "-val_loss=0.92", "_loss_2.31", "-acc91", "_lr0.001", "_seed_3", "_bs64", "-v1"]
SUFFIXES = ["", ".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".pth.tar"]
PIECES = [*KEYS, *NUMBERS, *METRICS, *SUFFIXES, *"=-_./ k", "best", "mp_rank_00", "重", "\n", "nan"]


@settings(deadline=None, derandomize=not FUZZ, max_examples=FUZZ or 1000)
@given(st.lists(st.sampled_from(PIECES), max_size=8).map("".join))
def test_any_name_has_a_step_or_none(name):
    step = lawa_core.step_of(name)
    assert step is None or (type(step) is int and step >= 0)


@settings(deadline=None, derandomize=not FUZZ, max_examples=FUZZ or 1000)
@given(
    prefix=st.sampled_from(["", "model_", "gpt2-", "run7_", "lit-", "my.net_", "runs/seed_3/"]),
    key=st.sampled_from(KEYS),
    separator=st.sampled_from(["", "=", "-", "_", "."]),
    step=st.integers(0, 10**7),
    zeros=st.sampled_from(["{}", "{:08d}"]),
    metric=st.sampled_from(METRICS),
    suffix=st.sampled_from(SUFFIXES),
)
def test_a_name_made_by_the_grammar_reads_its_step(
    prefix, key, separator, step, zeros, metric, suffix
):
    name = f"{prefix}{key}{separator}{zeros.format(step)}{metric}{suffix}"
    assert lawa_core.step_of(name) == step
