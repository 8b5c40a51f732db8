"""Trajectories on the Hugging Face Hub: the revisions step<N> of a model, fetched as they are needed, checked, and let go."""
from __future__ import annotations

import contextlib
import errno
import fnmatch
import hashlib
import math
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from lawa_core import COPIED, Checkpoint, JobFailed, LawaError, Trajectory, _schedule, _some

PREFERRED = (("model.safetensors", r"model-(\d+)-of-(\d+)\.safetensors"), ("pytorch_model.bin", r"pytorch_model-(\d+)-of-(\d+)\.bin"))


def open_hub(repo: str, steps=None, folder=None, *, allow=(), keep: bool = False, token=None, endpoint: str | None = None) -> HubTrajectory:
    """The revisions step<N> of a model on the Hugging Face Hub. Lists their files and compares them; fetches nothing yet.

    Args: repo: "EleutherAI/pythia-1b-deduped", or with "@START:STOP:STRIDE" instead of `steps`; steps: default all there are; folder: where
    step folders are fetched to, default ~/.cache/lawa/NAME; allow: "duplicates" takes revisions that share files; keep: files stay after
    use; token: default the one you are logged in with; endpoint: another server than huggingface.co.
    Errors: LawaError for a missing revision, shard or token, a hub that is down, revisions with the same weights. Needs huggingface_hub.
    """
    repo, _, wanted = repo.partition("@")
    with _hub(repo):
        from huggingface_hub import HfApi
        api = HfApi(endpoint=endpoint, token=token)
        commits = {int(ref.name[4:]): ref.target_commit for ref in api.list_repo_refs(repo).branches if re.fullmatch(r"step\d+", ref.name)}
    steps = sorted(span(wanted) if wanted else commits if steps is None else set(steps))
    missing = [f"step{step}" for step in steps if step not in commits]
    if missing or not steps:
        raise LawaError(f"{repo} has no revision {_some(missing) or 'named step<N>'}; there are {_some(sorted(commits)) or 'none'}")

    def listed(step):
        with _hub(f"{repo} step{step}"):
            return _wanted(f"{repo} step{step}", list(api.list_repo_tree(repo, revision=commits[step])))
    with ThreadPoolExecutor(8) as pool:
        files = dict(zip(steps, pool.map(listed, steps), strict=True))
    if "duplicates" not in allow and (twins := list(_twins(files))):
        raise LawaError(f"{repo}: {'; '.join(twins)}; these are wrong uploads: leave out steps, or allow duplicates")
    return HubTrajectory(repo, {step: (commits[step], files[step]) for step in steps}, folder, allow, keep, api)


def span(text: str) -> range:
    """The steps that "START:STOP:STRIDE" (or with commas) writes, both ends included."""
    try:
        start, stop, stride = map(int, re.split("[:,]", text))
        return range(start, stop + 1, stride)
    except ValueError:
        raise LawaError(f"steps must be START:STOP:STRIDE, such as 103000:143000:1000, got {text!r}") from None


def _wanted(revision: str, listing) -> dict[str, object]:
    """{name: the Hub's record} of the files to fetch: config.json and one whole copy of the weights, safetensors if there is one."""
    files, incomplete = {file.path: file for file in listing}, []
    config = {name: files[name] for name in ("config.json",) if name in files}
    for single, pattern in PREFERRED:
        shards = {name: found for name in files if (found := re.fullmatch(pattern, name))}
        numbers = {int(found[1]) for found in shards.values()}
        lacking = [n for n in range(1, max((int(found[2]) for found in shards.values()), default=0) + 1) if n not in numbers]
        if single in files:
            return config | {single: files[single]}
        if (index := f"{single}.index.json") in files and shards and not lacking:
            return config | {name: files[name] for name in (index, *sorted(shards))}
        incomplete += [f"shard {n} of {single}" for n in lacking] + [index] * (bool(shards) and index not in files)
    raise LawaError(f"{revision} lacks {', '.join(incomplete) or 'weights: expected ' + ' or '.join(single for single, _ in PREFERRED)}; "
                    f"leave this step out")


def _is_listed(path: Path, file) -> bool:
    if path.stat().st_size != file.size or not file.lfs:
        return path.stat().st_size == file.size
    with open(path, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest() == file.lfs.sha256


def _identity(file) -> str:
    return file.lfs.sha256 if file.lfs else file.blob_id


def _twins(files: Mapping[int, Mapping]) -> Iterator[str]:
    """Revisions that share weight files, by the sha256 that the Hub lists: known before a byte is fetched."""
    weights = {step: {_identity(file) for name, file in names.items() if not name.endswith(".json")} for step, names in files.items()}
    groups: dict[str, list[int]] = {}
    for step, names in weights.items():
        for identity in names:
            groups.setdefault(identity, []).append(step)
    for steps in sorted({tuple(group) for group in groups.values() if len(group) > 1}):
        whole = all(weights[step] == weights[steps[0]] for step in steps)
        yield f"steps {_some(steps)} hold {'identical weights' if whole else 'partly identical weights, some shards are the same file'}"


@contextlib.contextmanager
def _hub(what: str) -> Iterator[None]:
    """Whatever the Hub's client raises, as one line that says what to do."""
    try:
        import huggingface_hub.errors as hub
    except ImportError:
        raise LawaError('the Hub needs huggingface_hub: pip install "lawa-lab[hub]"') from None
    try:
        yield
    except LawaError:
        raise
    except Exception as error:  # the client's own errors, its HTTP library's, the disk's
        status = getattr(getattr(error.__cause__ or error, "response", None), "status_code", None)
        first = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0]
        reason = next(text for known, text in (
            (isinstance(error, hub.RevisionNotFoundError), "no such revision on the Hub"),
            (isinstance(error, hub.RemoteEntryNotFoundError), "a file it lists is missing on the Hub"),
            (isinstance(error, hub.RepositoryNotFoundError) or status in (401, 403),
             "no such model, or it needs a token: check the name, `hf auth login` or set HF_TOKEN"),
            (isinstance(error, hub.OfflineModeIsEnabled), "HF_HUB_OFFLINE is set; unset it and start again"),
            (getattr(error, "errno", None) == errno.ENOSPC, "the disk is full; free some, or choose another folder"),
            ("Consistency check" in str(error), "the download was cut short"),
            (True, f"the Hub cannot be reached ({status or first})")) if known)
        raise JobFailed(f"{what}: {reason}; what is fetched is kept, run again to go on") from None


def soon(function: Callable, *args) -> Future:
    """The future of a call in a thread of its own, for which an interrupted program does not wait."""
    future = Future()

    def run():
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)
    threading.Thread(target=run, daemon=True).start()
    return future


class HubTrajectory(Trajectory):
    """Revisions on the Hub, each fetched once when asked for, the next one meanwhile (see `open_hub`, `expect`, `release`).

    `fetched` counts bytes received. Files are checked against the Hub's sha256; an interrupted fetch goes on with the first file it lacks.
    """

    def __init__(self, repo: str, revisions: Mapping[int, tuple[str, Mapping]], folder, allow, keep: bool, api):
        self.folder = Path(folder or Path.home() / ".cache" / "lawa" / repo.replace("/", "--")).absolute()
        super().__init__({step: self.folder / f"step{step}" for step in revisions}, repo)
        self.revisions, self.allow, self.keep, self.api = dict(revisions), allow, keep, api
        self.order, self.pending, self.fetched, self.begun, self.told = [], {}, 0, None, math.inf

    def nbytes(self, step: int) -> int:
        return sum(file.size for file in self.revisions[step][1].values())

    def expect(self, steps) -> None:
        self.order = list(steps)

    def __getitem__(self, step) -> Checkpoint:
        if step not in self.sources:
            return super().__getitem__(step)
        try:
            self._start(step).result()
        except BaseException:
            self.pending.pop(step, None)  # asked for again, it is tried again
            raise
        for following in self.order[self.order.index(step) + 1:][:1] if step in self.order else ():
            self._start(following)
        return super().__getitem__(step)

    def release(self, step: int) -> None:
        if self.pending.pop(step, None) and not self.keep:
            shutil.rmtree(self.sources[step], ignore_errors=True)

    def plan(self, schemes: Mapping[str, Callable], at=None, on_disk: bool = False, rate: float | None = None) -> dict:
        """What `stream` with these arguments will take: revisions, bytes to fetch, bytes on disk and in memory at most, hours of fetching.

        rate: bytes/s, default measured. What is on disk already is not fetched again.
        """
        _, needed, last = _schedule(self, schemes, at)
        size = {step: self.nbytes(step) for step in needed}
        held = [sum(size[s] for s in needed[:i + 1] if last[s] >= step) for i, step in enumerate(needed)]
        resting = held if on_disk else [size[step] for step in needed]
        todo = sum(file.size for step in needed for _, file in self._lacking(step))
        rate = rate or self.measure()
        disk = max(now + ahead for now, ahead in zip(resting, [*size.values(), 0][1:], strict=True))
        return {"revisions": len(needed), "fetch_bytes": todo, "disk_bytes": disk, "memory_bytes": 0 if on_disk else max(held),
                "rate": rate, "hours": todo / rate / 3600}

    def companions(self) -> Path:
        step = self.steps[-1]
        with _hub(f"{self.name} step{step}"):
            names = [file.path for file in self.api.list_repo_tree(self.name, revision=self.revisions[step][0])]
        for name in names:
            if any(fnmatch.fnmatch(name, pattern) for pattern in COPIED):
                self._download(step, name, self.folder / "model")
        return self.folder / "model"

    def measure(self, size: int = 8 << 20) -> float:
        """Bytes per second of one request for the first `size` bytes of the weights."""
        import huggingface_hub as hub
        commit, files = self.revisions[self.steps[0]]
        url = hub.hf_hub_url(self.name, max(files, key=lambda name: files[name].size), revision=commit, endpoint=self.api.endpoint)
        headers, begun = hub.utils.build_hf_headers(token=self.api.token) | {"Range": f"bytes=0-{size - 1}"}, time.perf_counter()
        with _hub(self.name):
            response = hub.get_session().get(url, headers=headers, follow_redirects=True)
            hub.utils.hf_raise_for_status(response)
        return len(response.content) / (time.perf_counter() - begun)

    def _start(self, step: int) -> Future:
        if step not in self.pending:
            self.pending[step] = soon(self._fetch, step)
        return self.pending[step]

    def _lacking(self, step: int) -> list[tuple]:
        return [(name, file) for name, file in self.revisions[step][1].items() if not (self.sources[step] / name).exists()]

    def _fetch(self, step: int) -> None:
        target = self.sources[step]
        if self.begun is None:
            self.begun = self.told = time.monotonic()
        target.mkdir(parents=True, exist_ok=True)
        needed = sum(file.size for _, file in self._lacking(step))
        if (free := shutil.disk_usage(target).free) < needed:
            raise JobFailed(f"{self.name} step{step} takes {needed / 1e9:.2f} GB, {self.folder} has {free / 1e9:.2f} GB left; "
                            f"free some, or choose another folder; what is fetched is kept, run again to go on")
        for name, file in self._lacking(step):
            self._download(step, name, target)
            if not _is_listed(target / name, file):
                (target / name).unlink()
                raise JobFailed(f"{self.name} step{step}: {name} is not the file that the Hub lists (size or sha256 differ); run again")

    def _download(self, step: int, name: str, target: Path) -> None:
        from huggingface_hub.utils import tqdm

        class Meter(tqdm):  # the client reports to a progress bar
            def __init__(bar, *args, **options):
                super().__init__(*args, **options | {"disable": True})

            def update(bar, n=1):
                self._count(n or 0)
        with _hub(f"{self.name} step{step}"):
            self.api.hf_hub_download(self.name, name, revision=self.revisions[step][0], local_dir=target, tqdm_class=Meter)

    def _count(self, size: float) -> None:
        self.fetched += size
        if time.monotonic() - self.told > 10 and self.fetched:
            self.told, seconds = time.monotonic(), time.monotonic() - self.begun
            total = sum(self.nbytes(step) for step in self.order or self.pending)
            print(f"{self.name}: {self.fetched / 1e9:.2f} of {total / 1e9:.2f} GB fetched, {self.fetched / seconds / 1e6:.0f} MB/s, "
                  f"{(total - self.fetched) / self.fetched * seconds:.0f} s left", flush=True)


