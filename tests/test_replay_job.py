"""A replay as a job for a night: killed and started again, in slices, planned, and on the page."""

import csv
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import toy_task
from hub_stand_in import Hub, Storage
from safetensors.torch import load_file, save as packed
from toy_task import WORDS

import lab.report
import lawa_core
import model
from lab import replay
from lab.hf import save_hf
from lawa_core import LawaError
from model import GPT, NEOX, ROOT, GPTConfig

os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
transformers = pytest.importorskip("transformers")
pytest.importorskip("huggingface_hub")

TINY, SMALL, LLAMA = "EleutherAI/pythia-tiny", "EleutherAI/pythia-small", "nano/llama-nano"
MODELS = (TINY, SMALL, LLAMA)
STEPS, POINTS, K = range(10, 90, 10), range(20, 90, 10), 3
BLOCK, BLOCKS = 32, 8  # tokens of a block of text, and blocks that a model is evaluated on
WEIGHTS = (".safetensors", ".bin")
RANKS = re.compile(r"RANK|WORLD_SIZE|LOCAL_|MASTER_|SLURM_|HF_(ENDPOINT|TOKEN|HUB_OFFLINE)")
VOCABULARY = 32  # of the models, which pad the tokenizer's


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """One thread, as models this small want, and no launcher's variables."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name in [name for name in os.environ if RANKS.match(name)]:
        monkeypatch.delenv(name)
    yield
    torch.set_num_threads(threads)


# ---- Tiny models, their text and their tasks -----------------------------------------------------


def walk(base: dict, step: int) -> dict:
    """Weights that move smoothly from `base` on, with noise of their own at every step."""
    ahead = torch.Generator().manual_seed(1)
    noise = torch.Generator().manual_seed(1000 + step)
    moved = {}
    for name, tensor in base.items():
        size = 0.3 * (tensor.std() if tensor.dim() > 1 else 0.2)
        way = step / STEPS[-1] * torch.randn(tensor.shape, generator=ahead)
        moved[name] = tensor + size * (way + torch.randn(tensor.shape, generator=noise))
    return moved


def neox(folder, layers: int, width: int) -> tuple[dict, dict]:
    """(config.json, weights in Hugging Face's names) of a GPT-NeoX in which all weights matter."""
    gpt, generator = GPT(GPTConfig(layers, 4, width, BLOCK, VOCABULARY, **NEOX)), torch.Generator()
    with torch.no_grad():
        for p in gpt.parameters():
            size = 0.1 if p.dim() == 1 else width**-0.5
            p += size * torch.randn(p.shape, generator=generator)
    save_hf(folder, gpt.config, gpt.state_dict())
    state = load_file(folder / "model.safetensors")
    return json.loads((folder / "config.json").read_text()), state


def other(folder, kind: str, **changes) -> tuple[dict, dict]:
    """The same of an architecture that transformers alone has, as its save_pretrained writes it."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=BLOCK,
        initializer_range=0.25, bos_token_id=1, eos_token_id=1, **changes,
    )  # fmt: skip
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(folder)
    fields = json.loads((folder / "config.json").read_text())
    return fields, load_file(folder / "model.safetensors")


def files(made: tuple[dict, dict], step: int, tokenizer: dict, dtype, layout=".safetensors"):
    """{name: bytes} of a revision."""
    fields, base = made
    state = {name: tensor.to(dtype) for name, tensor in walk(base, step).items()}
    fields = fields | {"dtype": str(dtype).removeprefix("torch.")}
    weights = {"model.safetensors": packed(state, {"format": "pt"})}
    if layout == ".bin":
        file = io.BytesIO()
        torch.save(state, file)
        weights = {"pytorch_model.bin": file.getvalue()}
    return {"config.json": json.dumps(fields).encode()} | weights | tokenizer


def lay(folder: Path, revision: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in revision.items():
        (folder / name).write_bytes(data)
    return folder


ITEMS = toy_task.items("cat", "dog", "bird", "mat")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tokenizer, a text in its tokens, a zero-shot task, three models and what all need."""
    pytest.importorskip("tokenizers")
    top = tmp_path_factory.mktemp("world")
    toy_task.save_tokenizer(top / "tokenizer")
    tokenizer = {path.name: path.read_bytes() for path in (top / "tokenizer").iterdir()}

    meta = {
        "name": "words", "vocab_size": len(WORDS), "eot_token": 1, "tokenizer": "tokenizer.json",
        "tokenizer_sha256": hashlib.sha256(tokenizer["tokenizer.json"]).hexdigest(),
        "val_bytes": 6000,
    }  # fmt: skip
    (top / "words").mkdir()
    for split, seed in (("train", 0), ("val", 1)):
        tokens = np.random.default_rng(seed).integers(1, len(WORDS), 2000)
        tokens.astype("<u2").tofile(top / "words" / f"{split}.bin")
        meta[f"{split}_tokens"] = len(tokens)
    (top / "words" / "meta.json").write_text(json.dumps(meta))
    (top / "words" / "tokenizer.json").write_bytes(tokenizer["tokenizer.json"])

    toy_task.save_task(top / "tasks", top / "toy.jsonl", ITEMS)
    kinds = {
        TINY: (neox(top / "tiny", 2, 32), torch.float16, ".safetensors"),
        SMALL: (neox(top / "small", 3, 64), torch.float16, ".bin"),
        LLAMA: (other(top / "llama", "Llama"), torch.float32, ".safetensors"),
    }
    repos = {
        repo: {f"step{step}": files(made, step, tokenizer, *how) for step in STEPS}
        for repo, (made, *how) in kinds.items()
    }
    for branches in repos.values():
        branches["main"] = branches[f"step{STEPS[-1]}"]
    # lm_eval lists all packages after every evaluation, for which pip takes half a second
    (top / "quick").mkdir()
    (top / "quick" / "pip.py").write_text("")
    environment = {name: value for name, value in os.environ.items() if not RANKS.match(name)}
    environment |= {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{top / 'quick'}",
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(top / "hf"),
        "HF_DATASETS_CACHE": str(top / "datasets"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    return SimpleNamespace(
        top=top, repos=repos, tokenizer=tokenizer, text=top / "words", tasks=top / "tasks",
        environment=environment, corpus=model.open_corpus(top / "words"),
    )  # fmt: skip


# ---- The Hub, watched ----------------------------------------------------------------------------


class Slow(Storage):
    """Weights go out in pieces, so that a client that is killed is noticed in the middle."""

    def serve(self, fault):
        sha = self.path[1:].partition("?")[0]
        asked = self.headers.get("Range", "")
        whole = not asked or not asked.startswith("bytes=0-")  # else the rate is being measured
        if self.command == "GET":
            self.hub.begun.append((time.monotonic(), sha))
        super().serve(fault)
        # the end of a file that was gone on with ends it as well
        if self.command == "GET" and whole:
            self.hub.ended.append((time.monotonic(), sha))

    def reply(self, status, headers, body=b"", promised=None):
        super().reply(status, {"Content-Length": len(body)} | headers)
        for start in range(0, len(body) if self.command == "GET" else 0, 1 << 14):
            time.sleep(0.002)
            self.wfile.write(body[start : start + (1 << 14)])


class Watched(Hub):
    """A Hub that keeps when each weight file was asked for, and when it was out to its end."""

    def __enter__(self):
        self.begun, self.ended = [], []
        super().__enter__()
        self.servers[1].RequestHandlerClass = type("Handler", (Slow,), {"hub": self})
        for server in self.servers:
            server.handle_error = lambda *error: None  # clients are killed here
        return self

    def reset(self):
        for kept in (self.begun, self.ended, self.log, self.sent):
            kept.clear()

    def weights(self, *repos) -> set[str]:
        """sha256 of all weight files of these models."""
        named = [self.files[repo] for repo in repos or self.files]
        return {
            hashlib.sha256(data).hexdigest()
            for branches in named
            for revision in branches.values()
            for name, data in revision.items()
            if name.endswith(WEIGHTS)
        }

    def times(self) -> list[int]:
        """How often each weight file that was sent at all was sent to its end."""
        shas = [sha for _, sha in self.ended]
        return [shas.count(sha) for sha in set(shas)]


def weight_files(folder: Path) -> list[Path]:
    """Weights in a folder, fetched or under way; what goes meanwhile is no error."""
    return [
        Path(top, name)
        for top, _, names in os.walk(folder)
        for name in names
        if name.endswith((*WEIGHTS, ".incomplete"))
    ]


class Disk:
    """What lies in a hub folder, looked at again and again."""

    def __init__(self, folder: Path, models):
        self.folders = {name: folder / name.replace("/", "--") for name in models}
        self.most = dict.fromkeys(models, 0)  # revisions at once
        self.seen = {}  # {sha256: when a whole file was first there}
        self.hashed = {}

    def look(self) -> None:
        for name, folder in self.folders.items():
            steps = set()
            for path in weight_files(folder):
                with suppress(OSError):  # it may go at any moment
                    stat = path.stat()
                    steps.add(next((p for p in path.parts if re.fullmatch(r"step\d+", p)), "?"))
                    key = (path, stat.st_mtime_ns, stat.st_size)
                    if path.suffix != ".incomplete" and key not in self.hashed:
                        self.hashed[key] = hashlib.sha256(path.read_bytes()).hexdigest()
                        self.seen.setdefault(self.hashed[key], time.monotonic())
            self.most[name] = max(self.most[name], len(steps))

    def left(self) -> list[Path]:
        return [path for folder in self.folders.values() for path in weight_files(folder)]


class Night:
    """The command over some models, with folders of its own."""

    def __init__(self, world, hub, folder: Path, models=MODELS, *more, steps="20,80,10"):
        self.world, self.folder, self.models = world, folder, models
        self.store, self.hub_folder = folder / "store", folder / "hub"
        self.disk, self.started = Disk(self.hub_folder, models), 0
        self.arguments = [
            *models, "--steps", steps, "-k", K, "--spacing", 10, "--corpus", world.text,
            "--eval-tokens", BLOCK * BLOCKS, "--device", "cpu", "--hub-folder", self.hub_folder,
            "--store", self.store, "--endpoint", hub.url, *more,
        ]  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, *more, **variables) -> subprocess.Popen:
        self.started += 1
        with open(self.folder / f"told{self.started}.txt", "wb") as told:
            process = subprocess.Popen(
                [sys.executable, "-m", "lab.replay", *map(str, (*self.arguments, *more))],
                stdout=told,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env=self.world.environment | variables,
                start_new_session=True,
            )
        process.told = Path(told.name)
        return process

    def wait(self, *processes, until=None) -> None:
        """Watch the disk until they end well, or until something has happened before that."""
        deadline, happened = time.monotonic() + 240, False
        try:
            while not happened and any(process.poll() is None for process in processes):
                assert time.monotonic() < deadline, "it does not end"
                self.disk.look()
                time.sleep(0.02)
                happened = bool(until and until())
        finally:
            for process in processes:
                if not happened and process.poll() is None:
                    kill(process)
        self.disk.look()
        if not happened:
            assert until is None, "it ended before that"
            for process in processes:
                assert process.returncode == 0, process.told.read_text()[-3000:]

    def own(self, name: str) -> Path:
        """A model's folder in the store."""
        return self.store / name.replace("/", "--")

    def rows(self, name: str) -> bytes:
        return (self.own(name) / "rows.csv").read_bytes()

    def documents(self) -> dict:
        return {
            str(path.relative_to(self.store)): path.read_bytes()
            for path in sorted(self.store.rglob("documents/*.json"))
        }

    def kept(self) -> dict:
        """All that lies in the store."""
        return {path: path.read_bytes() for path in self.store.rglob("*") if path.is_file()}


def kill(process) -> None:
    os.killpg(process.pid, signal.SIGKILL)  # its own session: no other process is in it
    process.wait()


def table(rows: bytes) -> list[dict]:
    return list(csv.DictReader(io.StringIO(rows.decode())))


def short(name: str) -> str:
    return name.split("/")[-1]


ZERO_SHOT = ("--tasks", "toy", "--task-steps", "50,80", "--task-path")


@pytest.fixture(scope="module")
def hub(world):
    with Watched(world.repos) as hub:
        yield hub


@pytest.fixture(scope="module")
def undisturbed(world, hub):
    """All three models replayed in one go."""
    pytest.importorskip("lm_eval")
    hub.reset()
    night = Night(world, hub, world.top / "undisturbed", MODELS, *ZERO_SHOT, world.tasks)
    began = time.monotonic()
    night.wait(night.start())
    night.seconds, night.times = time.monotonic() - began, hub.times()
    night.sent, night.needed = {sha for _, sha in hub.ended}, hub.weights()
    return night


# ---- A night -------------------------------------------------------------------------------------


def test_a_night_replays_every_model(undisturbed):
    """Every scheme at every point, each file sent once, and a disk that stays small and empties."""
    for name in MODELS:
        rows = table(undisturbed.rows(name))
        assert list(rows[0])[:3] == ["model", "step", "scheme"]
        assert {row["model"] for row in rows} == {short(name)}
        assert {"loss", "loss_se", "gain", "gain_se"} <= set(rows[0])
        found = sorted((int(row["step"]), row["scheme"]) for row in rows)
        assert found == sorted((t, s) for t in POINTS for s in ("run", "lawa", "ema", "swa"))
        losses = {float(row["loss"]) for row in rows}
        # all differ but at the first point, where EMA and SWA are the run, the second, where both
        # are the mean of two, and the third, where SWA has the window of LAWA
        assert len(losses) in (len(rows) - 3, len(rows) - 4)  # of halves all three are rounded
        assert all(1 < loss < 30 for loss in losses)
    assert undisturbed.sent == undisturbed.needed and set(undisturbed.times) == {1}
    assert undisturbed.disk.left() == []
    assert min(undisturbed.disk.most.values()) >= 1
    assert max(undisturbed.disk.most.values()) <= K + 4
    assert not list(undisturbed.store.rglob("*.part*")) and undisturbed.documents()


@pytest.mark.parametrize("seed", [0])
def test_killed_twice_it_ends_in_the_same_rows(world, hub, undisturbed, seed):
    """SIGKILL at two random moments: once among the requests, once among the zero-shot tasks."""
    hub.reset()
    random = np.random.default_rng(seed)
    night = Night(world, hub, world.top / f"killed{seed}", MODELS, *ZERO_SHOT, world.tasks)
    asked, pause, killed = random.integers(4, 14), random.uniform(0, 0.5), []

    process = night.start()
    night.wait(process, until=lambda: len(hub.begun) >= asked)
    time.sleep(pause)
    kill(process)
    killed.append(time.monotonic())
    night.disk.look()
    assert process.returncode == -signal.SIGKILL

    already = len(night.documents())
    more = random.integers(1, max(2, len(undisturbed.documents()) - already - 5))
    process = night.start()
    night.wait(process, until=lambda: len(night.documents()) >= already + more)
    time.sleep(random.uniform(0, 0.3))
    kill(process)
    killed.append(time.monotonic())
    night.disk.look()
    assert process.returncode == -signal.SIGKILL and len(night.documents()) > already

    night.wait(night.start())
    for name in MODELS:
        assert night.rows(name) == undisturbed.rows(name), name
    assert night.documents() == undisturbed.documents()
    # a file that was whole on the disk is not asked for again; what a kill cut off may be
    again = [sha for when, sha in hub.begun if when > night.disk.seen.get(sha, np.inf)]
    assert again == [] and night.disk.seen
    for sha in {sha for _, sha in hub.ended}:
        ends = [when for when, other in hub.ended if other == sha]
        for end in ends[:-1]:
            assert any(0 < moment - end < 3 for moment in killed), "sent twice, and no kill near"
    assert sum(hub.times()) <= len(hub.weights()) + 2 * len(killed)
    assert night.disk.left() == [] and max(night.disk.most.values()) <= K + 4


def test_started_again_after_the_end_it_asks_for_no_weights_and_changes_nothing(hub, undisturbed):
    hub.reset()
    before = undisturbed.kept()
    assert command(*undisturbed.arguments) == 0
    assert undisturbed.kept() == before and undisturbed.disk.left() == []
    assert hub.begun == []


@pytest.mark.parametrize("more", [(), ("--alone",)], ids=["all averages", "without EMA and SWA"])
def test_files_that_a_kill_left_are_used_or_go(world, hub, tmp_path, more):
    """A kill may come after a point is recorded and before the files that it needed have gone."""
    folder = tmp_path / "hub" / TINY.replace("/", "--")

    def leave(*steps):
        for step in steps:
            data = world.repos[TINY][f"step{step}"]["model.safetensors"]
            lay(folder / f"step{step}", {"model.safetensors": data})

    night = Night(world, hub, tmp_path, (TINY,), *more, steps="20,40,10")
    assert command(*night.arguments) == 0
    leave(10, 20)  # of points that are recorded
    leave(70)  # fetched ahead
    hub.reset()
    night = Night(world, hub, tmp_path, (TINY,), *more)
    assert command(*night.arguments) == 0
    ahead = hashlib.sha256(world.repos[TINY]["step70"]["model.safetensors"]).hexdigest()
    assert hub.begun and ahead not in {sha for _, sha in hub.begun} and night.disk.left() == []
    leave(60, 70, 80)  # after the last record
    hub.reset()
    assert command(*night.arguments) == 0
    assert hub.begun == [] and night.disk.left() == []


def job(world, hub, night, name: str, **more):
    """The same in Python, over a model's own folders."""
    return replay.Job(
        name, list(POINTS), world.corpus, k=K, spacing=10, eval_tokens=BLOCK * BLOCKS,
        tasks=("toy",), task_steps=(50, 80), task_path=str(world.tasks), device="cpu",
        hub_folder=night.hub_folder / name.replace("/", "--"), store=night.own(name),
        endpoint=hub.url, **more,
    )  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_job_reads_what_the_command_kept(world, hub, undisturbed, name, tmp_path):
    """Rows with their blocks, and documents that are what the model's own logits say."""
    hub.reset()
    opened = job(world, hub, undisturbed, name)
    rows, kept = opened.run(), table(undisturbed.rows(name))
    assert len(rows) == len(kept) == 4 * len(POINTS)
    for row, line in zip(rows, kept, strict=True):
        assert [str(row[key]) for key in ("model", "step", "scheme")] == list(line.values())[:3]
        assert row["losses"].shape == (BLOCKS,) and row["model"] == short(name)
        assert float(line["loss"]) == pytest.approx(row["losses"].mean(), abs=1e-12)
        assert float(line["gain"]) == pytest.approx(row["gain"], abs=1e-12)
    assert [row["step"] for row in opened.run([30, 40])] == [30] * 4 + [40] * 4

    found = {(row["step"], row["scheme"]): row for row in opened.accuracies()}
    assert set(found) == {(t, s) for t in (50, 80) for s in ("run", "lawa", "ema", "swa")}
    for row in found.values():
        documents = np.asarray(row["documents"])
        assert documents.shape == (len(ITEMS),) and set(documents.tolist()) <= {0, 1}
        assert (row["model"], row["task"]) == (short(name), "toy")
        assert row["accuracy"] == pytest.approx(documents.mean())
        assert row["stderr"] == pytest.approx(documents.std(ddof=1) / len(ITEMS) ** 0.5)
    assert hub.begun == []

    net = theirs(lay(tmp_path / "own", world.repos[name]["step80"]))
    for scheme, states in (("run", (80,)), ("lawa", (60, 70, 80))):
        net.load_state_dict(mean([weights(world, name, step, tmp_path) for step in states]))
        assert np.asarray(found[80, scheme]["documents"]).tolist() == right(net), scheme


def theirs(folder):
    found = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return found.eval()


def weights(world, name: str, step: int, tmp_path) -> dict:
    folder = lay(tmp_path / f"step{step}", world.repos[name][f"step{step}"])
    return theirs(folder).state_dict()


def mean(states) -> dict:
    """In double."""
    return {name: sum(state[name].double() for state in states) / len(states) for name in states[0]}


@torch.inference_mode()
def right(net) -> list[int]:
    """For each item, whether the likelier ending is the answer."""
    found = []
    for item in ITEMS:
        scores = []
        for ending in item["choices"]:
            idx = torch.tensor([[WORDS.index(word) for word in f"{item['text']} {ending}".split()]])
            logs = net(idx[:, :-1]).logits.log_softmax(-1)
            told = logs.gather(-1, idx[:, 1:, None])[0, -len(ending.split()) :]
            scores.append(told.sum().item())
        found.append(int(int(np.argmax(scores)) == item["answer"]))
    return found


# ---- The notebook and the page -------------------------------------------------------------------


def test_the_notebook_finds_it_done_and_the_page_shows_it(world, hub, undisturbed, tmp_path):
    papermill = pytest.importorskip("papermill")
    hub.reset()
    before = undisturbed.kept()
    parameters = {
        "scale": "laptop",
        "model": ",".join(MODELS),
        "steps": "20,80,10",
        "k": K,
        "spacing": 10,
        "corpus": str(world.text),
        "eval_tokens": BLOCK * BLOCKS,
        "tasks": "toy",
        "task_steps": "50,80",
        "task_path": str(world.tasks),
        "device": "cpu",
        "hub_folder": str(undisturbed.hub_folder),
        "store": str(undisturbed.store),
        "endpoint": hub.url,
        "out": str(tmp_path / "out"),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name in ("OMP_NUM_THREADS", "HF_HOME", "HF_DATASETS_CACHE"):
            patch.setenv(name, world.environment[name])
        made = papermill.execute_notebook(
            ROOT / "notebooks" / "pythia_replay.ipynb",
            tmp_path / "made.ipynb",
            parameters,
            kernel_name="python3",
            cwd=str(tmp_path),
            progress_bar=False,
        )
    assert hub.begun == []
    assert {path: data for path, data in undisturbed.kept().items() if path in before} == before
    printed = "".join(
        output.get("text", "") for cell in made.cells for output in cell.get("outputs", [])
    )
    assert "stand-in" not in printed

    (path,) = (tmp_path / "out").glob("pythia_replay*/record.json")
    record = json.loads(path.read_text())
    assert record["figures"] and record["claims"]
    (kept,) = [kept for kept in record["tables"] if kept["file"] == "zero_shot.csv"]
    shown = [dict(zip(kept["columns"], row, strict=True)) for row in kept["rows"]]
    shown = {(row["model"], int(row["step"]), row["task"]): row for row in shown}
    found = [row for name in MODELS for row in job(world, hub, undisturbed, name).accuracies()]
    assert len(found) == 3 * 2 * 4 and len(shown) == 3 * 2
    for row in found:
        label = row["scheme"].upper().replace("RUN", "run")
        there = shown[row["model"], row["step"], "toy"]
        assert there[label] == f"{row['accuracy']:.4f}"
        assert there[f"± {label}"] == f"{row['stderr']:.4f}"
        assert str(len(ITEMS)) in there.values()
    rows = table((path.parent / "rows.csv").read_bytes())
    own = [row for name in MODELS for row in table(undisturbed.rows(name))]
    for key in ("model", "step", "scheme", "loss", "gain", "gain_se"):
        assert [row[key] for row in rows] == [row[key] for row in own], key

    shutil.copy(tmp_path / "made.ipynb", path.parent / f"{path.parent.name}.ipynb")
    page = lab.report.build(tmp_path / "out").read_text()
    for figure in record["figures"]:
        assert (path.parent / figure["file"]).stat().st_size > 1000
        assert f"/{figure['file']}" in page
    cells = [
        [re.sub("<.*?>", "", cell).strip() for cell in re.findall(r"(?s)<t[dh]\b.*?</t[dh]>", row)]
        for row in re.findall(r"(?s)<tr\b.*?</tr>", page)
    ]
    assert [row for row in cells if row in kept["rows"]] == kept["rows"]
    assert kept["columns"] in cells and ": missing" not in page


# ---- The plan ------------------------------------------------------------------------------------


def command(*arguments) -> int:
    """What the command line gives back, without a process of its own."""
    try:
        return replay.main([str(word) for word in arguments]) or 0
    except SystemExit as ended:
        return ended.code


def one_line(capsys) -> str:
    told = capsys.readouterr().err.strip()
    assert told.startswith("error: ") and "\n" not in told, told
    return told


def test_a_dry_run_tells_the_cost_and_fetches_no_weights(world, hub, tmp_path, capsys):
    hub.reset()
    night = Night(world, hub, tmp_path, MODELS, *ZERO_SHOT, world.tasks)
    assert command(*night.arguments, "--dry-run") == 0
    told = capsys.readouterr().out
    for name in MODELS:
        assert short(name) in told
    assert len(re.findall(r"\b8 revisions", told)) == len(MODELS)
    assert len(re.findall(r"\d (?:[kMGT]?B|bytes)\b", told)) >= len(MODELS)
    assert len(re.findall(r"\d (?:s|minutes|hours|days)\b", told)) >= len(MODELS)
    assert hub.ended == [] and hub.begun == [], "weights were sent"
    assert night.disk.left() == [] and not list(tmp_path.rglob("rows.csv"))


def test_duplicates_are_named_by_the_plan_and_refused_by_the_run(world, tmp_path, capsys):
    """Step 50's file is step 30's, in the second model of two."""
    twins = dict(world.repos[TINY])
    twins["step50"] = twins["step50"] | {"model.safetensors": twins["step30"]["model.safetensors"]}
    with Watched({SMALL: world.repos[SMALL], TINY: twins}) as hub:
        night = Night(world, hub, tmp_path, (SMALL, TINY))
        assert command(*night.arguments, "--dry-run") == 0
        told = capsys.readouterr().out
        (line,) = [line for line in told.splitlines() if re.search(r"\b30\b.*\b50\b", line)]
        assert re.search("identical|duplicate", line)
        assert command(*night.arguments) == 2
        assert re.search(r"\b30\b.*\b50\b.* hold identical weights", one_line(capsys))
        assert hub.begun == []


# ---- Several processes ---------------------------------------------------------------------------


def both(night, one, other) -> list[str]:
    """Two processes side by side, each with (arguments, variables); what they printed."""
    processes = [night.start(*arguments, **variables) for arguments, variables in (one, other)]
    night.wait(*processes)
    return [process.told.read_text() for process in processes]


def test_two_slices_of_two_models(world, hub, undisturbed, tmp_path):
    hub.reset()
    night = Night(world, hub, tmp_path, (TINY, SMALL))
    both(night, (("--slice", "0/2"), {}), (("--slice", "1/2"), {}))
    for name in (TINY, SMALL):
        assert night.rows(name) == undisturbed.rows(name)
    assert {sha for _, sha in hub.ended} == hub.weights(TINY, SMALL) and set(hub.times()) == {1}
    assert night.disk.left() == []


def expect_run_and_lawa(night, hub, undisturbed) -> None:
    """Of the first model, by several processes, with each file sent once between them."""
    expected = [row for row in table(undisturbed.rows(TINY)) if row["scheme"] in ("run", "lawa")]
    assert table(night.rows(TINY)) == expected and len(expected) == 2 * len(POINTS)
    assert {sha for _, sha in hub.ended} == hub.weights(TINY) and set(hub.times()) == {1}
    assert night.disk.left() == []


def test_two_slices_of_one_model(world, hub, undisturbed, tmp_path):
    """Its points are cut into two pieces, whose windows meet: files are shared, not fetched twice.

    An average that needs every checkpoint in order is left out, which is said.
    """
    hub.reset()
    night = Night(world, hub, tmp_path, (TINY,))
    said = both(night, (("--slice", "0/2"), {}), (("--slice", "1/2"), {}))
    expect_run_and_lawa(night, hub, undisturbed)
    assert all(re.search("EMA and SWA are left out", told) for told in said), said


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["in order", "the last first"])
@pytest.mark.parametrize("launcher", ["torchrun", "slurm"])
def test_processes_are_told_apart_by_their_launcher(
    world, hub, undisturbed, tmp_path, monkeypatch, launcher, order
):
    """One after the other: the first leaves the files that the second needs, and no rows yet."""
    hub.reset()
    night = Night(world, hub, tmp_path, (TINY,))
    for turn, rank in enumerate(order):
        variables = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank}
        if launcher == "slurm":  # as of sbatch --array=1-2
            names = ("ID", "MIN", "COUNT")
            variables = dict(zip(names, (rank + 1, 1, 2), strict=True))
            variables = {f"SLURM_ARRAY_TASK_{name}": value for name, value in variables.items()}
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        assert command(*night.arguments) == 0
        assert (night.own(TINY) / "rows.csv").exists() == (turn == 1)
    expect_run_and_lawa(night, hub, undisturbed)


# ---- Other architectures, other averages ---------------------------------------------------------


@torch.inference_mode()
def by_hand(folder: Path, state: dict, corpus) -> np.ndarray:
    """Losses of the blocks of `model.evaluate`, as transformers computes them."""
    net = theirs(folder)
    lacking = net.load_state_dict({name: state[name].float() for name in state}, strict=False)
    assert not lacking.unexpected_keys and set(lacking.missing_keys) <= {"lm_head.weight"}
    net.tie_weights()
    starts = np.linspace(0, len(corpus.val) - BLOCK - 1, BLOCKS).astype(np.int64)
    tokens = torch.from_numpy(corpus.val[starts[:, None] + np.arange(BLOCK + 1)].astype(np.int64))
    logits = net(tokens[:, :-1]).logits.double()
    return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1).numpy()


def folders(world, top: Path, made, steps=STEPS) -> dict[int, Path]:
    """A folder of step folders in float32."""
    return {
        step: lay(top / f"step{step}", files(made, step, world.tokenizer, torch.float32))
        for step in steps
    }


@pytest.mark.parametrize(
    "kind, changes",
    [("Llama", {}), ("Olmo2", {}), ("Llama", {"tie_word_embeddings": True})],
    ids=["llama", "olmo2", "tied"],
)
def test_other_architectures_are_evaluated_as_transformers_does(world, tmp_path, kind, changes):
    laid = folders(world, tmp_path / "run", other(tmp_path / "base", kind, **changes), STEPS[:4])
    states = {step: load_file(folder / "model.safetensors") for step, folder in laid.items()}
    assert ("lm_head.weight" not in states[40]) == bool(changes)
    rows = replay.Job(
        str(tmp_path / "run"), [30, 40], world.corpus, k=2, spacing=10, running=False,
        eval_tokens=BLOCK * BLOCKS, device="cpu", store=tmp_path / "store",
    ).run()  # fmt: skip
    found = {(row["step"], row["scheme"]): row for row in rows}
    assert set(found) == {(30, "run"), (30, "lawa"), (40, "run"), (40, "lawa")}
    for (step, scheme), row in found.items():
        window = (step,) if scheme == "run" else (step - 10, step)
        expected = by_hand(laid[step], mean([states[t] for t in window]), world.corpus)
        np.testing.assert_allclose(row["losses"], expected, rtol=0, atol=1e-4)
        assert row["loss"] == pytest.approx(expected.mean(), abs=1e-4)
    losses = sorted(row["loss"] for row in rows)
    assert min(np.diff(losses)) > 1e-3  # another's weights would not pass


def test_other_architectures_need_transformers(world, tmp_path, monkeypatch, capsys):
    folders(world, tmp_path / "run", other(tmp_path / "base", "Llama"), STEPS[:3])
    monkeypatch.setitem(sys.modules, "transformers", None)
    arguments = [
        tmp_path / "run", "--steps", "20,30,10", "-k", 2, "--spacing", 10, "--corpus", world.text,
        "--device", "cpu", "--store", tmp_path / "store",
    ]  # fmt: skip
    capsys.readouterr()  # what transformers told while it wrote them
    assert command(*arguments) == 2
    assert re.search(r"transformers.*pip install", one_line(capsys))


@pytest.mark.parametrize("k, stride", [(3, 10), (4, 20)])
def test_ema_and_swa_are_updated_at_every_point(world, tmp_path, k, stride):
    """EMA's mean age, beta / (1 - beta) points, is that of LAWA's window, (k - 1) spacing / 2."""
    laid = folders(world, tmp_path / "run", neox(tmp_path / "base", 2, 32))
    nets = {step: theirs(folder).state_dict() for step, folder in laid.items()}
    points = list(range(20, 90, stride))
    rows = replay.Job(
        str(tmp_path / "run"), points, world.corpus, k=k, spacing=10, device="cpu",
        eval_tokens=BLOCK * BLOCKS, store=tmp_path / "store",
    ).run()  # fmt: skip
    found = {(row["step"], row["scheme"]): row["losses"] for row in rows}
    assert len(found) == 4 * len(points)
    age = (k - 1) * 10 / 2 / stride
    beta, e = age / (1 + age), None
    for i, step in enumerate(points):
        w = {name: tensor.double() for name, tensor in nets[step].items()}
        e = e or dict(w)
        e = {name: e[name] + (1 - beta) * (w[name] - e[name]) for name in w}
        window = [nets[t] for t in STEPS if step - 10 * k < t <= step]
        by_scheme = {
            "run": w,
            "lawa": mean(window),
            "ema": e,
            "swa": mean([nets[t] for t in points[: i + 1]]),
        }
        for scheme, state in by_scheme.items():
            expected = by_hand(laid[step], state, world.corpus)
            np.testing.assert_allclose(found[step, scheme], expected, rtol=0, atol=1e-5)
    ends = [found[points[-1], scheme].mean() for scheme in ("run", "lawa", "ema", "swa")]
    assert min(np.diff(sorted(ends))) > 1e-3


# ---- Names and wrong arguments -------------------------------------------------------------------


def test_revisions_of_other_names(world, tmp_path, capsys):
    """As OLMo's: another stage's revisions have the same steps, and numbers stand behind them."""
    made = neox(tmp_path / "base", 2, 32)
    repo, names = "nano/olmo-nano", r"stage1-step(\d+)-"
    branches = {
        f"stage1-step{step}-tokens{step // 10}B": files(made, step, world.tokenizer, torch.float32)
        for step in (10, 20, 30)
    }
    branches |= {
        f"stage2-ingredient1-step{step}-tokens3B": files(
            made, step + 5, world.tokenizer, torch.float32
        )
        for step in (10, 20, 30)
    }
    branches["main"] = branches["stage2-ingredient1-step30-tokens3B"]
    with Watched({repo: branches}) as hub:
        options = {"k": 2, "spacing": 10, "running": False, "device": "cpu"}
        options |= {"eval_tokens": BLOCK * BLOCKS, "hub_folder": tmp_path / "hub"}
        options |= {"endpoint": hub.url, "store": tmp_path / "store"}
        rows = replay.Job(repo, [20, 30], world.corpus, names=names, **options).run()
        night = Night(world, hub, tmp_path / "plan", (repo,), "--names", names, steps="20,30,10")
        capsys.readouterr()
        assert command(*night.arguments, "--dry-run") == 0
        assert "3 revisions" in capsys.readouterr().out
        assert len(hub.ended) == 3
    laid = {
        step: lay(tmp_path / f"laid{step}", branches[f"stage1-step{step}-tokens{step // 10}B"])
        for step in (10, 20, 30)
    }
    nets = {step: theirs(folder).state_dict() for step, folder in laid.items()}
    assert len(rows) == 4
    for row in rows:
        step = row["step"]
        window = (step,) if row["scheme"] == "run" else (step - 10, step)
        expected = by_hand(laid[step], mean([nets[t] for t in window]), world.corpus)
        np.testing.assert_allclose(row["losses"], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "change, said",
    [
        (("--corpus", "nowhere"), "nowhere"),
        (("--steps", "20,80"), "steps"),
        (("--steps", "20,80,0"), "steps"),
        (("--steps", "80,20,10"), "steps"),
        (("--steps", "twenty,80,10"), "steps"),
        (("--steps", "20,95,5"), "step25"),
        (("--slice", "2/2"), "2/2"),
        (("--slice", "0/0"), "0/0"),
        (("--slice", "half"), "half"),
        (("-k", "0"), "k"),
        (("--spacing", "0"), "spacing"),
        (("--eval-tokens", "many"), "eval-tokens"),
        (("--task-steps", "55", "--tasks", "toy"), "55"),
        (("--names", "stage("), "names|regular"),
        (("--names", r"step\d+"), "names|group"),
        (("--endpoint", "http://127.0.0.1:9"), "cannot be reached"),
        (("--hurry",), "hurry"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_arguments_are_one_line(world, hub, tmp_path, capsys, change, said):
    hub.reset()
    night = Night(world, hub, tmp_path, (TINY,))
    assert command(*night.arguments, *change) == 2
    assert re.search(said, one_line(capsys))
    assert hub.begun == [] and not list(tmp_path.rglob("rows.csv"))


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "first", "WORLD_SIZE": "2"},
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "2"},
    ],
    ids=["a word", "too high", "too low"],
)
def test_wrong_ranks_are_one_line(world, hub, tmp_path, capsys, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert command(*Night(world, hub, tmp_path, (TINY,)).arguments, "--dry-run") == 2
    assert one_line(capsys)


@pytest.mark.parametrize("name", ["nano/none", "no/such/folder"])
def test_no_such_model(world, hub, tmp_path, capsys, name):
    night = Night(world, hub, tmp_path, (TINY, name))
    assert command(*night.arguments, "--dry-run") == 2
    assert name in one_line(capsys)


def test_no_model_and_the_same_one_twice(world, hub, tmp_path, capsys):
    night = Night(world, hub, tmp_path, ())
    assert command(*night.arguments) == 2
    assert one_line(capsys)
    night = Night(world, hub, tmp_path, (TINY, TINY))  # two names of one folder
    assert command(*night.arguments, "--dry-run") in (0, 2)
    assert "Traceback" not in capsys.readouterr().err


def test_text_in_other_tokens_is_refused_before_weights_are_fetched(world, hub, tmp_path, capsys):
    hub.reset()
    shutil.copytree(world.text, tmp_path / "text")
    meta = json.loads((world.text / "meta.json").read_text()) | {"tokenizer_sha256": "0" * 64}
    (tmp_path / "text" / "meta.json").write_text(json.dumps(meta))
    night = Night(world, hub, tmp_path, (TINY,), "--corpus", tmp_path / "text")
    assert command(*night.arguments) == 2
    assert "not in this model's tokens" in one_line(capsys) and hub.begun == []
    opened = model.open_corpus(tmp_path / "text")
    with pytest.raises(LawaError, match="not in this model's tokens"):
        replay.Job(TINY, [20], opened, k=1, spacing=10, endpoint=hub.url, device="cpu",
                   hub_folder=tmp_path / "h", store=tmp_path / "s").run()  # fmt: skip


# ---- Results that would be of something else, and work that would be done twice ------------------


def fresh(world, hub, folder, model=TINY, points=POINTS, corpus=None, **more):
    """A job with folders of its own, without tasks unless they are given."""
    options = {"k": K, "spacing": 10, "eval_tokens": BLOCK * BLOCKS, "device": "cpu"}
    options |= {"hub_folder": folder / "hub", "store": folder / "store", "endpoint": hub.url}
    return replay.Job(model, list(points), corpus or world.corpus, **options | more)


TASKS = {"tasks": ("toy",), "task_steps": (50,)}


def test_a_store_of_other_weights_is_refused(world, hub, tmp_path):
    """Of another stage's revisions with the same steps, or of a folder that was written anew."""
    made = neox(tmp_path / "base", 2, 32)
    branches = {}
    for stage, late in ((1, 0), (2, 5)):
        for step in (10, 20):
            files_of = files(made, step + late, world.tokenizer, torch.float32)
            branches[f"stage{stage}-step{step}"] = files_of
    with Watched({"nano/stages": branches}) as stages:
        one, other = (
            fresh(world, stages, tmp_path, "nano/stages", (20,), k=2, names=names)
            for names in (r"stage1-step(\d+)", r"stage2-step(\d+)")
        )
        one.run()
        with pytest.raises(LawaError, match=r"holds results of other weights at step 10, 20; "):
            other.run()
    for step in (10, 20):
        lay(tmp_path / "folders" / f"step{step}", branches[f"stage1-step{step}"])
    rows = fresh(world, hub, tmp_path / "own", tmp_path / "folders", (20,), k=2).run()
    again = fresh(world, hub, tmp_path / "own", tmp_path / "folders", (20,), k=2).run()
    assert [row["loss"] for row in again] == [row["loss"] for row in rows]
    lay(tmp_path / "folders" / "step10", branches["stage2-step10"])
    with pytest.raises(LawaError, match="other weights at step 10"):
        fresh(world, hub, tmp_path / "own", tmp_path / "folders", (20,), k=2).run()


def test_random_weights_are_in_no_average(world, tmp_path):
    branches = {"step0": files(neox(tmp_path / "base", 2, 32), 0, world.tokenizer, torch.float32)}
    branches |= {f"step{step}": world.repos[TINY][f"step{step}"] for step in (10, 20)}
    with Watched({TINY: branches}) as hub:
        (_, _, _, lawa) = fresh(world, hub, tmp_path, points=(0, 10), running=False).run()
        (run, _) = fresh(world, hub, tmp_path / "other", points=(10,), running=False).run()
    assert lawa["step"] == 10 and lawa["loss"] == run["loss"]


def test_a_file_that_nobody_compared_is_not_there(world, hub, tmp_path, monkeypatch):
    """A kill between the last byte and the comparison with the Hub's sha256."""
    hub.reset()
    before = fresh(world, hub, tmp_path / "other", points=(20,)).run()
    digest = hashlib.file_digest
    spoilt = []

    def die(opened, kind):
        data = bytearray(Path(opened.name).read_bytes())
        data[-1] ^= 1
        Path(opened.name).write_bytes(data)
        spoilt.append(opened.name)
        raise KeyboardInterrupt

    monkeypatch.setattr(hashlib, "file_digest", die)
    with pytest.raises(KeyboardInterrupt):
        fresh(world, hub, tmp_path, points=(20,)).run()
    monkeypatch.setattr(hashlib, "file_digest", digest)
    rows = fresh(world, hub, tmp_path, points=(20,)).run()
    assert spoilt and [row["loss"] for row in rows] == [row["loss"] for row in before]


def test_text_whose_tokens_are_not_known_to_be_the_models(world, hub, tmp_path):
    hub.reset()
    shutil.copytree(world.text, tmp_path / "text")
    meta = json.loads((world.text / "meta.json").read_text())
    del meta["tokenizer_sha256"]
    (tmp_path / "text" / "meta.json").write_text(json.dumps(meta | {"tokenizer": "gpt2"}))
    with pytest.raises(LawaError, match="not in this model's tokens"):
        fresh(world, hub, tmp_path, corpus=model.open_corpus(tmp_path / "text")).run()
    assert hub.begun == []


def test_under_torchrun_every_process_asks_its_own_models(world, hub, tmp_path, monkeypatch):
    """lm_eval answers None in all ranks but the first, if it is told that there are ranks."""
    pytest.importorskip("lm_eval")
    variables = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    more = ("--tasks", "toy", "--task-path", world.tasks, "--alone")
    night = Night(world, hub, tmp_path, (TINY, LLAMA), *more, steps="20,30,10")
    assert command(*night.arguments) == 0
    assert len(night.documents()) == 2 and all("llama" in path for path in night.documents())


def test_one_process_does_not_end_what_another_is_asking(world, hub, tmp_path, monkeypatch):
    more = TASKS | {"task_steps": (80,), "task_path": str(world.tasks), "running": False}
    first, last = (fresh(world, hub, tmp_path, **more) for _ in range(2))
    ask = replay.zero_shot

    def asked(folder, *args, **options):
        if not first.store.joinpath("documents").exists() and not done:
            done.append(first.run(POINTS[:3]))  # the other ends in the midst of it
        return ask(folder, *args, **options)

    done = []
    monkeypatch.setattr(replay, "zero_shot", asked)
    last.run(POINTS[3:])
    assert len(done) == 1 and len(done[0]) == 6 and len(last.accuracies()) == 2
    assert len(table((last.store / "rows.csv").read_bytes())) == 2 * len(POINTS)
    assert not last.work.exists()


def test_another_job_may_not_take_files_away(world, hub, tmp_path):
    """Two jobs of one model, at once, in one hub folder; two processes of one job may share it."""
    one = fresh(world, hub, tmp_path, running=False)
    other = fresh(world, hub, tmp_path, points=(20, 30), store=tmp_path / "elsewhere")
    with one._alone():
        with pytest.raises(LawaError, match=r"another replay is fetching to .*hub; wait for it"):
            other.run()
        fresh(world, hub, tmp_path, running=False).run(POINTS[:2])
    assert len(other.run()) == 8  # afterwards


def test_tasks_that_come_later_take_no_more_disk(world, hub, tmp_path):
    """EMA and SWA are made again from the first point on, and what is read goes at once."""
    fresh(world, hub, tmp_path).run()
    job = fresh(world, hub, tmp_path, tasks=("toy",), task_path=str(world.tasks))
    assert "7 revisions" in job.plan()  # all points', for EMA and SWA
    most, advance = [], replay.lawa_core.average_files

    def watched(*args, **options):
        revisions = list((tmp_path / "hub").glob("step*"))
        most.append((len(revisions), len(list(job.work.rglob("ckpt_*")))))
        return advance(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay.lawa_core, "average_files", watched)
        rows = job.run()
    revisions, averages = map(max, zip(*most, strict=True))
    assert revisions <= K + 4 and averages <= 4
    again = fresh(world, hub, tmp_path / "other").run()
    assert [row["loss"] for row in rows] == [row["loss"] for row in again]
    assert len(job.accuracies()) == 4


def test_nothing_is_evaluated_twice(world, hub, tmp_path, monkeypatch):
    count, evaluate = [], model.evaluate
    monkeypatch.setattr(model, "evaluate", lambda *args: count.append(1) or evaluate(*args))
    fresh(world, hub, tmp_path, running=False).run()
    assert len(count) == 2 * len(POINTS)
    fresh(world, hub, tmp_path).run()
    assert len(count) == 4 * len(POINTS)
    fresh(world, hub, tmp_path).run()
    assert len(count) == 4 * len(POINTS)


@pytest.mark.parametrize(
    "change, said",
    [
        (("--eval-tokens", "-5"), "eval_tokens must be at least 1"),
        (("--device", "foo"), "device 'foo' cannot be used here"),
        (("--device", "cuda"), "device 'cuda' cannot be used here"),
        (("--task-steps", "abc"), "--task-steps must be steps"),
        (("--tasks", "both", "--task-path", "TASKS"), "both stands for several tasks"),
        (("--tasks", "nothing", "--task-path", "TASKS"), "lm_eval has no task nothing"),
        (("--tasks", "toy", "--task-path", "TASKS", "--task-limit", "0"), "task_limit must be"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_more_wrong_arguments(world, hub, tmp_path, capsys, change, said):
    if torch.cuda.is_available() and "cuda" in change:
        pytest.skip("cuda can be used here")
    hub.reset()
    tasks = tmp_path / "tasks"
    shutil.copytree(world.tasks, tasks)
    text = (tasks / "toy.yaml").read_text()
    for name in "ab":
        own = text.replace("task: toy", f"task: toy{name}\ntag: both")
        (tasks / f"{name}.yaml").write_text(own)
    night = Night(world, hub, tmp_path, (TINY,))
    assert command(*night.arguments, *(tasks if word == "TASKS" else word for word in change)) == 2
    assert said in one_line(capsys) and hub.begun == []


@pytest.mark.parametrize("name", ["a/b/c", "./nowhere", "/nowhere"])
def test_a_folder_that_is_not_there(world, hub, tmp_path, capsys, name):
    assert command(*Night(world, hub, tmp_path, (name,)).arguments) == 2
    assert one_line(capsys).startswith(f"error: {name} is no folder; expected one, or a repository")


def test_a_config_that_lacks_a_size(tmp_path):
    folder = tmp_path / "step10"
    fields = neox(folder, 2, 32)[0]
    del fields["hidden_size"]
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(LawaError, match=r"config.json lacks hidden_size"):
        lab.hf.hf_config(folder)


def test_a_variant_that_is_not_ours_is_evaluated_through_transformers(world, hub, tmp_path):
    """A GPT-NeoX with another rotary base."""
    for step in (10, 20):
        folder = lay(tmp_path / "odd" / f"step{step}", world.repos[TINY][f"step{step}"])
        fields = json.loads((folder / "config.json").read_text())
        fields["rope_parameters"] = {"rope_theta": 500.0, "partial_rotary_factor": 0.25}
        fields |= {"rotary_emb_base": 500}
        (folder / "config.json").write_text(json.dumps(fields))
    run, _ = fresh(world, hub, tmp_path, tmp_path / "odd", (20,), k=1, running=False).run()
    net = theirs(tmp_path / "odd" / "step20")
    expected = by_hand(tmp_path / "odd" / "step20", net.state_dict(), world.corpus)
    np.testing.assert_allclose(run["losses"], expected, rtol=0, atol=1e-4)


def test_a_finished_replay_is_drawn_without_the_hub(world, hub, tmp_path):
    """On a machine that is offline; what still has to be fetched says so."""
    done = fresh(world, hub, tmp_path, points=(20, 40), k=2)
    rows = done.run()
    nowhere = SimpleNamespace(url="http://127.0.0.1:9")
    again = fresh(world, nowhere, tmp_path, points=(20, 40), k=2).run()
    assert [row["loss"] for row in again] == [row["loss"] for row in rows]
    with pytest.raises(LawaError, match="the Hub cannot be reached"):
        fresh(world, nowhere, tmp_path, points=(20, 40, 60), k=2).run()
    # another section of the run, and then the first one again
    fresh(world, hub, tmp_path, points=(60, 80), k=2).run()
    again = fresh(world, nowhere, tmp_path, points=(20, 40), k=2).run()
    assert [row["loss"] for row in again] == [row["loss"] for row in rows]


def test_what_is_kept_of_one_model_is_not_taken_for_another(world, hub, tmp_path):
    """Nor is an answer of the Hub's, such as that there is no such model, passed over."""
    fresh(world, hub, tmp_path, points=(20,), k=2).run()
    for url, says in ((hub.url, "no such model"), ("http://127.0.0.1:9", "cannot be reached")):
        where = SimpleNamespace(url=url)
        with pytest.raises(LawaError, match=says):
            fresh(world, where, tmp_path, "nano/typo", points=(20,), k=2).run()


def test_a_folder_of_revisions_may_be_read_only(world, hub, tmp_path, monkeypatch):
    done = fresh(world, hub, tmp_path, points=(20,), k=2)
    rows = done.run()
    (tmp_path / "hub" / "listings.json").unlink()

    def refused(path):
        if Path(path).name == "listings.json":
            raise lawa_core.JobFailed("cannot write: Read-only file system")
        return replacing(path)

    replacing = lawa_core.replacing
    monkeypatch.setattr(lawa_core, "replacing", refused)
    again = fresh(world, hub, tmp_path, points=(20,), k=2).run()
    assert [row["loss"] for row in again] == [row["loss"] for row in rows]
