"""Models on the Hugging Face Hub as trajectories: step revisions, fetched one by one and let go.

huggingface_hub fetches and retries. Added here: which files make one whole copy of the weights,
which revisions cannot be right, what a job takes, and a bounded disk.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import fnmatch
import hashlib
import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import lawa_core
from lawa_core import Checkpoint, JobFailed, LawaError, Trajectory, some

# The weights as one file, or as shards (number, count) with an index; the first that is whole.
LAYOUTS = (
    ("model.safetensors", r"model-(\d+)-of-(\d+)\.safetensors"),
    ("pytorch_model.bin", r"pytorch_model-(\d+)-of-(\d+)\.bin"),
)

RATE = 100e6  # bytes per second, which plans reckon with
# Of these models some revisions hold the weights of others, as told in their repositories.
WRONG_REVISIONS = (
    (r"pythia-2\.8b(?!-deduped)", "86 of the 154 revisions hold weights of the end of the run "
     "(EleutherAI/pythia #195, #205)"),
    (r"pythia-12b(?!-deduped)", "steps 50000 and 58000 have a shard of the end (#206)"),
    (r"pythia-", "steps 0, 1 and 2 hold the same weights (EleutherAI/pythia #83, #198)"),
    (r"olmo-2-1124-7b", "steps 101000, 175000 and 300000 were the same file (allenai/OLMo #915)"),
)


class Unreachable(JobFailed):
    """The Hub does not answer, or is not to be asked."""


def open_hub(repo: str, steps=None, folder=None, *, names: str | None = None, allow=(),
             keep: bool = False, token=None, endpoint: str | None = None) -> HubTrajectory:
    r"""The step revisions of a model. Lists their files and compares them; fetches nothing yet.

    Args:
        repo: "EleutherAI/pythia-1b-deduped", or with "@START:STOP:STRIDE" instead of `steps`.
        steps: default all there are.
        folder: where step folders are fetched to, and removed from after use; default
            ~/.cache/lawa/NAME.
        names: which revisions, and where their names have the step, such as
            "stage1-step(\d+)-"; default step<N>, else what `lawa_core.step_of` reads.
        allow: "duplicates" takes revisions that share files.
        keep: files stay after use.
        token: default the one you are logged in with; endpoint: another server than huggingface.co.

    Errors: LawaError for a missing revision, shard or token, a Hub that cannot be reached,
    revisions with the same weights. Needs huggingface_hub.
    """
    repo, _, text = repo.partition("@")
    folder = Path(folder or Path.home() / ".cache" / "lawa" / repo.replace("/", "--")).absolute()
    listings = _read_listings(folder / "listings.json")
    before, offline = dict(listings), None
    try:
        with _one_line(repo):
            from huggingface_hub import HfApi

            api = HfApi(endpoint=endpoint, token=token)
            refs = api.list_repo_refs(repo).branches
            listings[repo] = {ref.name: ref.target_commit for ref in refs}
    except Unreachable as error:  # what is on disk can be read without the Hub
        if repo not in listings:
            raise
        offline = error
        print(f"{error}; going by its branches as last seen", file=sys.stderr)
    branches = listings[repo]
    known = _steps_of(repo, branches, names)
    commits = {step: branches[name] for step, name in known.items()}
    if text:
        steps = span(text)
    steps = sorted(commits if steps is None else set(steps))
    missing = [f"step{step}" for step in steps if step not in commits]
    if missing and offline:
        raise offline
    if missing or not steps:
        raise LawaError(f"{repo} has no revision {some(missing) or 'that names a step'}; "
                        f"there are {some(sorted(commits)) or 'none'}")

    def list_files(step):
        commit = commits[step]
        if commit not in listings:
            with _one_line(f"{repo} step{step}"):
                tree = api.list_repo_tree(repo, revision=commit)
                listings[commit] = {file.path: _record(file) for file in tree}
        records = {name: SimpleNamespace(**one) for name, one in listings[commit].items()}
        return _one_copy(f"{repo} step{step}", records)

    with ThreadPoolExecutor(8) as pool:
        files = dict(zip(steps, pool.map(list_files, steps), strict=True))
    if listings != before:  # a folder that is shared may be read-only
        with (contextlib.suppress(JobFailed),
              lawa_core.replacing(folder / "listings.json") as part):
            part.write_text(json.dumps(listings))
    twins = _twins(files)
    if twins and "duplicates" not in allow:
        raise LawaError(f"{repo}: {'; '.join(twins)}; these are wrong uploads: "
                        "leave out steps, or allow duplicates")
    revisions = {step: (commits[step], files[step]) for step in steps}
    found = HubTrajectory(repo, revisions, folder, allow=allow, keep=keep, api=api)
    found.twins = twins
    found.notes = [note for name, note in WRONG_REVISIONS if re.search(name, repo.lower())]
    found.last = max(commits)
    return found


def _read_listings(path: Path) -> dict[str, dict]:
    """{repository: {branch: commit}, commit: {file name: record}} as kept before, of which those of
    a commit do not change; nothing where that is missing or damaged."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return dict(json.loads(path.read_text()))
    return {}


def _record(file) -> dict:
    """Of the Hub's record of a file (or folder) what is used here: its size, its hash, and whether
    that is the content's sha256."""
    large = getattr(file, "lfs", None)
    return {"size": getattr(file, "size", 0), "sha256": large and large.sha256,
            "identity": large.sha256 if large else getattr(file, "blob_id", "")}


def _steps_of(repo: str, branches, names: str | None) -> dict[int, str]:
    """{step: the one branch that has it}."""
    with lawa_core.explained(f"names {names!r}: expected a pattern with one group, the step"):
        pattern = re.compile(names or r"^step(\d+)$")
        if pattern.groups != 1:
            raise ValueError(f"{pattern.groups} groups")
        matches = {branch: pattern.search(branch) for branch in branches}
        steps = {branch: int(match[1]) for branch, match in matches.items() if match}
    if not steps and not names:
        read = {branch: lawa_core.step_of(branch) for branch in branches}
        steps = {branch: step for branch, step in read.items() if step is not None}
    known = {}
    for branch, step in steps.items():
        if step in known:
            raise LawaError(f"{repo}: {known[step]} and {branch} are both step {step}; say which "
                            "with names, such as 'stage1-step(\\d+)'")
        known[step] = branch
    return known


def span(text: str) -> range:
    """The steps that "START:STOP:STRIDE" (or with commas) writes, both ends included."""
    try:
        start, stop, stride = map(int, re.split("[:,]", text))
        return range(start, stop + 1, stride)
    except ValueError:
        raise LawaError("steps must be START:STOP:STRIDE, such as 103000:143000:1000, "
                        f"got {text!r}") from None


def _one_copy(revision: str, files: Mapping[str, object]) -> dict[str, object]:
    """Of {name: the Hub's record}, config.json and the files of one whole copy of the weights."""
    lacking = []
    for single, pattern in LAYOUTS:
        names = [single]
        if single not in files:
            shards = [found for found in (re.fullmatch(pattern, name) for name in files) if found]
            numbers = {int(shard[1]) for shard in shards}
            count = max((int(shard[2]) for shard in shards), default=0)
            index = f"{single}.index.json"
            names = [index, *sorted(shard[0] for shard in shards)]
            gone = [f"shard {n} of {single}" for n in range(1, count + 1) if n not in numbers]
            if shards and index not in files:
                gone.append(index)
            lacking += gone
            if gone or not shards:
                continue
        if "config.json" in files:
            names.insert(0, "config.json")
        return {name: files[name] for name in names}
    lacking = lacking or ["weights: expected model.safetensors or pytorch_model.bin"]
    raise LawaError(f"{revision} lacks {', '.join(lacking)}; leave this step out")


def _twins(files: Mapping[int, Mapping]) -> list[str]:
    """Which steps share weight files, by the hashes that the Hub lists: nothing need be fetched."""
    weights = {}  # step -> hashes of its weight files
    owners = {}  # hash -> steps
    for step, names in files.items():
        weights[step] = set()
        for name, file in names.items():
            if not name.endswith(".json"):
                weights[step].add(file.identity)
                owners.setdefault(file.identity, []).append(step)
    problems = []
    for steps in sorted({tuple(steps) for steps in owners.values() if len(steps) > 1}):
        whole = all(weights[step] == weights[steps[0]] for step in steps)
        what = "identical weights"
        if not whole:
            what = "partly identical weights, some shards are the same file"
        problems.append(f"steps {some(steps)} hold {what}")
    return problems


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Whatever huggingface_hub raises, as one line that says what to do."""
    try:
        import huggingface_hub.errors as hub
    except ImportError:
        raise LawaError('the Hub needs huggingface_hub: pip install "lawa-lab[hub]"') from None
    try:
        yield
    except Exception as error:  # the client's own errors, its HTTP library's, the disk's
        kind, cause = JobFailed, error.__cause__ or error
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(error, hub.RevisionNotFoundError):
            reason = "no such revision on the Hub"
        elif isinstance(error, hub.RemoteEntryNotFoundError):
            reason = "a file it lists is missing on the Hub"
        elif isinstance(error, hub.RepositoryNotFoundError) or status in (401, 403):
            reason = ("no such model, or it needs a token: check the name, "
                      "`hf auth login` or set HF_TOKEN")
        elif isinstance(error, hub.OfflineModeIsEnabled):
            kind, reason = Unreachable, "HF_HUB_OFFLINE is set; unset it and start again"
        elif getattr(error, "errno", None) == errno.ENOSPC:
            reason = "the disk is full; free some, or choose another folder"
        elif "Consistency check" in str(error):
            reason = "the download was cut short"
        else:
            first = (str(cause).strip() or type(cause).__name__).splitlines()[0]
            kind, reason = Unreachable, f"the Hub cannot be reached ({status or first})"
        raise kind(f"{what}: {reason}; what is fetched is kept, run again to go on") from None


class HubTrajectory(Trajectory):
    """Revisions on the Hub, each fetched when it is asked for, and the next one meanwhile.

    The folder of a step goes when `release` says that it is read (see `open_hub`). Several
    processes may share a folder: what one is fetching the others wait for.
    revisions: {step: (commit, {file name: a record with .size and .sha256, None of a small file})}.
    """
    twins: Sequence[str] = ()  # which steps share files
    last = 0  # the newest step that the Hub has

    def __init__(self, repo: str, revisions: Mapping, folder, *, allow=(), keep=False, api=None):
        self.folder = Path(folder).absolute()
        super().__init__({step: self.folder / f"step{step}" for step in revisions}, repo)
        self.revisions = dict(revisions)
        self.allow = allow
        self.keep = keep
        self.api = api
        self.order: list[int] = []  # what will be asked for
        self.ahead: dict[int, threading.Thread] = {}  # step -> what fetches it ahead of time
        self.fetched = 0  # bytes so far

    def nbytes(self, step: int) -> int:
        """Bytes of the files fetched for one revision."""
        return sum(file.size for file in self.revisions[step][1].values())

    def expect(self, steps) -> None:
        self.order = list(steps)

    def __getitem__(self, step) -> Checkpoint:
        if step in self.revisions:
            if step in self.ahead:
                self.ahead.pop(step).join()
            self._fetch(step)  # what the thread could not fetch is tried again, and fails aloud
            following = self.order[self.order.index(step) + 1 :] if step in self.order else []
            if following and following[0] not in self.ahead:
                # A daemon: a program that fails or is interrupted does not wait for it.
                thread = threading.Thread(target=self._try, args=(following[0],), daemon=True)
                self.ahead[following[0]] = thread
                thread.start()
        return super().__getitem__(step)

    def release(self, step: int) -> None:
        if not self.keep:
            self.remove(step)

    def remove(self, step: int) -> None:
        """What is fetched of a step."""
        shutil.rmtree(self.folder / f"step{step}", ignore_errors=True)

    def config_dir(self) -> Path:
        """The folder of the newest step's config and tokenizer, which are fetched."""
        step = self.steps[-1]
        commit, _ = self.revisions[step]
        target = self.folder / f"model-{commit[:12]}"
        if (target / ".whole").exists():
            return target
        with _one_line(f"{self.name} step{step}"):
            for file in self.api.list_repo_tree(self.name, revision=commit):
                if any(fnmatch.fnmatch(file.path, pattern) for pattern in lawa_core.COPIED):
                    self.api.hf_hub_download(self.name, file.path, revision=commit,
                                             local_dir=target,
                                             tqdm_class=lawa_core.progress)
        target.mkdir(exist_ok=True)
        (target / ".whole").touch()
        return target

    def to_fetch(self, steps) -> int:
        """Bytes of these revisions that are not on disk."""
        return sum(file.size for step in steps for _, file in self._lacking(step))

    def _lacking(self, step: int) -> list[tuple]:
        """(name, record) of a revision's files that are not on disk, or are of another commit."""
        target = self.folder / f"step{step}"
        commit, files = self.revisions[step]
        with contextlib.suppress(OSError):
            if (target / ".commit").read_text() != commit:
                return list(files.items())
        return [(name, file) for name, file in files.items() if not (target / name).exists()]

    def _try(self, step: int) -> None:
        with contextlib.suppress(Exception):
            self._fetch(step)

    def _fetch(self, step: int) -> None:
        """Fetch what is not on disk of a revision; compare it with the hashes that the Hub has."""
        if not self._lacking(step):
            return
        what = f"{self.name} step{step}"
        target = self.folder / f"step{step}"
        locks = self.folder / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        with open(locks / target.name, "w") as lock:  # which goes with its process, even killed
            fcntl.flock(lock, fcntl.LOCK_EX)
            lacking = self._lacking(step)
            commit, files = self.revisions[step]
            if len(lacking) == len(files):
                self.remove(step)  # what is there of another commit
            target.mkdir(exist_ok=True)
            (target / ".commit").write_text(commit)
            shutil.rmtree(target / ".part", ignore_errors=True)  # which a killed one left
            size = sum(file.size for _, file in lacking)
            free = shutil.disk_usage(target).free
            if free < size:
                raise JobFailed(f"{what} takes {size / 1e9:.2f} GB, {self.folder} has "
                                f"{free / 1e9:.2f} GB left; free some, or choose another folder; "
                                "what is fetched is kept, run again to go on")
            for name, file in lacking:
                part = target / ".part" / name
                with _one_line(what):
                    self.api.hf_hub_download(self.name, name, revision=commit,
                                             local_dir=target / ".part",
                                             tqdm_class=lawa_core.progress)
                if file.sha256:  # huggingface_hub compares the size only
                    with open(part, "rb") as opened:
                        found = hashlib.file_digest(opened, "sha256").hexdigest()
                    if found != file.sha256:
                        part.unlink()
                        raise JobFailed(f"{what}: {name} is not the file that the Hub lists "
                                        "(its sha256 differs); run again")
                os.replace(part, target / name)
                self.fetched += file.size
            shutil.rmtree(target / ".part", ignore_errors=True)


lawa_core.SOURCES["hub"] = open_hub


def main(argv=None) -> int:
    """The installed command `lawa`: lawa_core's, which then opens "hub:NAME" too."""
    return lawa_core.main(argv)
