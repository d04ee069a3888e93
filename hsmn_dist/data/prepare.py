"""prepare_curriculum: the datasets of a run -> one tokenizer and one folder of shards each, made once and found again.

The folder's name is a digest of everything that decides its bytes (rows, preprocessing, split, tokenizer, limits), so another
configuration never overwrites it and the same one reuses it. Order of work: rows to examples; the tokenizer over all training
text; examples to shards, part by part; each index last. Killed at any point and started again, it goes on and ends with the
same bytes, whatever the number of processes.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from hsmn_dist.config.data import DataConfig, DatasetConfig, TokenizerConfig
from hsmn_dist.data.builtin import builtin_identity, preprocessor_of
from hsmn_dist.data.contamination import DEFAULT_MIN_WORDS, measure_contamination
from hsmn_dist.data.example import Example
from hsmn_dist.data.executor import Executor, InlineExecutor, build_executor
from hsmn_dist.data.fingerprint import Fingerprints
from hsmn_dist.data.prepare_examples import (
    ExamplesTask,
    iter_examples,
    iter_training_texts,
    read_manifest,
    run_examples_task,
)
from hsmn_dist.data.prepare_shards import ShardsTask, build_index, run_shards_task
from hsmn_dist.data.progress import Progress, QuietProgress
from hsmn_dist.data.raw_reader import hub_configurations, hub_revision, hub_split, source_files, source_kind
from hsmn_dist.data.shards.index import INDEX_NAME, load_index, save_index
from hsmn_dist.data.shards.reader import read_examples, read_index
from hsmn_dist.data.shards.writer import disk_errors_as_data_errors
from hsmn_dist.data.sources import known_source
from hsmn_dist.data.tokenizer import TOKENIZER_NAME, Tokenizer, build_tokenizer, load_tokenizer
from hsmn_dist.foundation.errors import ConfigError, DataError
from hsmn_dist.foundation.files import remove_leftovers, sha256_of_file, sha256_of_json, write_text

DIGEST_LETTERS = 16
WORK = ".work"
SETTINGS = ".settings"


@dataclass(frozen=True)
class PreparedData:
    """Where a run's data lies: the tokenizer's file, and each dataset's folder by name or label.

    A URL stands there as a `Path` too; `shards.remote.folder_name` gives it back, and the readers do so themselves.
    """

    tokenizer_path: Path
    folders: dict[str, Path]


@dataclass(frozen=True)
class _Job:
    dataset: DatasetConfig
    folder: Path
    digest: str
    origin: dict[str, Any]

    @property
    def work(self) -> Path:
        return self.folder / WORK


def prepare_curriculum(
    datasets: Sequence[DatasetConfig],
    data: DataConfig,
    tokenizer: TokenizerConfig,
    root: Path,
    progress: Progress | None = None,
    executor: Executor | None = None,
) -> PreparedData:
    """Prepare every dataset under `root/<digest>/`, with one tokenizer over all of them.

    Args:
        datasets: of all stages; one that appears twice has equal settings (weight apart) or a label.
        data: split, limits, shard size, number of processes.
        tokenizer: what to train or load.
        root: folder of prepared data.
        progress: told of rows and parts done.
        executor: where the tasks run; None: processes of this machine, `data.prepare_workers` of them.

    Raises:
        ConfigError: an unknown dataset, or one name with two settings.
        DataError: unreadable or unusable rows, or a disk that is full.
    """
    unique = _unique(datasets)
    root.mkdir(parents=True, exist_ok=True)
    fingerprints = Fingerprints(root / "fingerprints.json")
    resolved = [_resolve(dataset, fingerprints) for dataset in unique if not dataset.shards]
    digest = _digest(resolved, data, tokenizer, fingerprints)
    home = root / digest[:DIGEST_LETTERS]
    jobs = [_Job(dataset, home / dataset.key, digest, origin) for dataset, origin in resolved]
    given = {dataset.key: dataset.shards for dataset in unique if dataset.shards}
    with disk_errors_as_data_errors(home), _locked(root / f".{home.name}.lock"):
        if given:
            _use_given_shards(given, data, tokenizer, home / TOKENIZER_NAME)
        _prepare(jobs, data, tokenizer, home / TOKENIZER_NAME, fingerprints, progress, executor)
    folders = {job.dataset.key: job.folder for job in jobs} | {name: Path(folder) for name, folder in given.items()}
    return PreparedData(home / TOKENIZER_NAME, folders)


def prepare_dataset(
    dataset: DatasetConfig,
    data: DataConfig,
    tokenizer: TokenizerConfig,
    out: Path,
    progress: Progress | None = None,
    executor: Executor | None = None,
) -> Path:
    """Prepare one dataset into `out`, its tokenizer beside its shards; gives `out`.

    Raises:
        ConfigError, DataError: as `prepare_curriculum`, or `out` holds another preparation.
    """
    if out.is_dir() and not (out / SETTINGS).is_file() and any(out.iterdir()):
        raise DataError(
            f"{out}: holds files that no preparation made",
            allowed="a new or empty folder, or one made by the same command",
            action="name another --out",
        )
    out.mkdir(parents=True, exist_ok=True)
    fingerprints = Fingerprints(out / ".fingerprints.json")
    resolved = [_resolve(dataset, fingerprints)]
    digest = _digest(resolved, data, tokenizer, fingerprints)
    if (out / INDEX_NAME).is_file() and load_index(out).config_digest != digest:
        raise DataError(
            f"{out}: holds shards of {load_index(out).dataset!r} made with other settings or rows",
            allowed="a new or empty folder, or one made by the same command",
            action="name another --out, or remove this folder first",
        )
    with disk_errors_as_data_errors(out), _locked(out / ".lock"):
        _forget_other_work(out, digest)
        job = _Job(resolved[0][0], out, digest, resolved[0][1])
        _prepare([job], data, tokenizer, out / TOKENIZER_NAME, fingerprints, progress, executor)
    return out


def _forget_other_work(out: Path, digest: str) -> None:
    """Remove what an unfinished preparation with other settings left: resuming from it would mix the two."""
    marker = out / SETTINGS
    if marker.is_file() and marker.read_text(encoding="utf-8") == digest:
        return
    shutil.rmtree(out / WORK, ignore_errors=True)
    for path in [out / TOKENIZER_NAME, *out.glob("*.tar"), *out.glob("*.samples.npy")]:
        path.unlink(missing_ok=True)
    write_text(marker, digest)


def _prepare(
    jobs: list[_Job],
    data: DataConfig,
    tokenizer_config: TokenizerConfig,
    tokenizer_path: Path,
    fingerprints: Fingerprints,
    progress: Progress | None,
    executor: Executor | None,
) -> None:
    progress = progress or QuietProgress()
    todo = [job for job in jobs if not (tokenizer_path.is_file() and is_complete(job.folder, job.digest, fingerprints))]
    if not todo:
        fingerprints.save()
        return
    for job in todo:
        (job.folder / INDEX_NAME).unlink(missing_ok=True)  # from here on the folder is not complete
        job.work.mkdir(parents=True, exist_ok=True)
        remove_leftovers(job.folder)
        remove_leftovers(job.work)
    _make_examples(todo, data, progress, executor)
    tokenizer = _make_tokenizer(todo, tokenizer_config, tokenizer_path, progress)
    _make_shards(todo, data, tokenizer_path, progress, executor)
    notes = _contamination_notes(jobs, todo, data, progress)
    for job in todo:
        extra = {"origin": job.origin, **notes.get(job.dataset.key, {})}
        index = build_index(job.folder, job.work, tokenizer, job.dataset.key, job.digest, extra)
        save_index(job.folder, index)
        shutil.rmtree(job.work, ignore_errors=True)
        is_complete(job.folder, job.digest, fingerprints)  # remembers the hashes for the next start
    fingerprints.save()


def _use_given_shards(given: dict[str, str], data: DataConfig, config: TokenizerConfig, path: Path) -> None:
    """Check that shards prepared before fit the run's tokenizer, and save that tokenizer.

    Raises:
        ConfigError: the tokenizer would be trained, so it cannot be the shards'.
        DataError: no shards there, or another tokenizer's.
    """
    if config.kind == "bpe":
        raise ConfigError(
            f"datasets {', '.join(given)} have `shards`, and tokenizer.kind is 'bpe'",
            allowed="tokenizer.kind 'file' with the tokenizer.json of those shards, or 'bytes'",
            action="set tokenizer: {kind: file, path: .../tokenizer.json}",
        )
    tokenizer = build_tokenizer(config, [])
    for name, folder in given.items():
        index = read_index(folder, data)
        if index.tokenizer_digest != tokenizer.digest:
            raise DataError(
                f"{folder}: the shards of {name!r} hold tokens of another tokenizer than the run's",
                allowed="shards and a tokenizer that were made together",
                action="set tokenizer.path to the tokenizer.json that lies beside the shards",
            )
    if not path.is_file():
        tokenizer.save(path)


def is_complete(folder: Path, digest: str, fingerprints: Fingerprints) -> bool:
    """Whether a folder was prepared with these settings and still has the bytes that its index names."""
    if not (folder / INDEX_NAME).is_file():
        return False
    try:
        index = load_index(folder)
    except DataError:
        return False
    if index.config_digest != digest:
        return False
    wanted = {shard.name: shard.sha256 for split in index.splits.values() for shard in split.shards}
    wanted |= {split.samples_file: split.samples_sha256 for split in index.splits.values()}
    return all((folder / name).is_file() and fingerprints.sha256(folder / name) == sha for name, sha in wanted.items())


def _make_examples(jobs: list[_Job], data: DataConfig, progress: Progress, executor: Executor | None) -> None:
    tasks = [ExamplesTask(job.dataset, data, str(job.work.resolve())) for job in jobs]
    chosen = executor or build_executor(data.prepare_workers, len(tasks))
    if isinstance(chosen, InlineExecutor):
        for task in tasks:
            phase = f"{task.dataset.key}: examples"
            run_examples_task(task, partial(_report, progress, phase))
            total = sum(read_manifest(Path(task.work_folder))["counts"].values())
            progress.update(phase, total, total)
        return
    for done, _ in enumerate(chosen.map(run_examples_task, tasks), start=1):
        progress.update("datasets read", done, len(tasks))


def _contamination_notes(
    jobs: list[_Job], todo: list[_Job], data: DataConfig, progress: Progress
) -> dict[str, dict[str, Any]]:
    """Per dataset {"contamination": report}: overlap of its test items with all training examples of the run.

    Built-in datasets are left out: they are made of a few sentences, which every item shares with every other.
    """
    benchmarks = {job.dataset.key: job for job in todo if known_source(job.dataset.name) is not None}
    if not data.contamination_words or not benchmarks:
        return {}
    fresh = {job.dataset.key for job in todo}

    def examples(job: _Job, split: str) -> Iterator[Example]:
        return iter_examples(job.work, split) if job.dataset.key in fresh else read_examples(job.folder, split)

    reports = measure_contamination(
        {name: islice(examples(job, "test"), data.contamination_items) for name, job in benchmarks.items()},
        {job.dataset.key: examples(job, "train") for job in jobs},
        ngram_words=data.contamination_words,
        min_words=min(DEFAULT_MIN_WORDS, data.contamination_words),
    )
    progress.update("contamination", 1, 1)
    return {report.benchmark: {"contamination": report.to_json()} for report in reports}


def _report(progress: Progress, phase: str, done: int) -> None:
    progress.update(phase, done)


def _make_tokenizer(jobs: list[_Job], config: TokenizerConfig, path: Path, progress: Progress) -> Tokenizer:
    if not path.is_file():
        texts = iter_training_texts([job.work for job in jobs], config.max_training_bytes)
        build_tokenizer(config, texts).save(path)
    progress.update("tokenizer", 1, 1)
    return load_tokenizer(path)


def _make_shards(
    jobs: list[_Job], data: DataConfig, tokenizer_path: Path, progress: Progress, executor: Executor | None
) -> None:
    tasks = [
        ShardsTask(
            folder=str(job.folder.resolve()),  # a worker of a cluster has another working directory
            work_folder=str(job.work.resolve()),
            part=part,
            tokenizer_path=str(tokenizer_path.resolve()),
            max_context_tokens=data.max_context_tokens,
            max_target_tokens=data.max_target_tokens,
            shard_bytes=data.shard_bytes,
        )
        for job in jobs
        for part in range(read_manifest(job.work)["num_parts"])
    ]
    total = sum(sum(read_manifest(job.work)["counts"].values()) for job in jobs)
    done = 0
    chosen = executor or build_executor(data.prepare_workers, len(tasks))
    for _, _, num_samples in chosen.map(run_shards_task, tasks):
        done += num_samples
        progress.update("samples written", done, total)


def _unique(datasets: Sequence[DatasetConfig]) -> list[DatasetConfig]:
    by_name: dict[str, DatasetConfig] = {}
    for dataset in datasets:
        preprocessor_of(dataset.name)  # an unknown name is refused before anything is read
        plain = dataset.model_copy(update={"weight": 1.0})
        if by_name.setdefault(dataset.key, plain) != plain:
            raise ConfigError(
                f"dataset {dataset.key!r} appears twice with different settings",
                allowed="one set of settings per name or label in a run (weights may differ)",
                action="give both the same settings, or one of them a label",
            )
    return list(by_name.values())


def _resolve(dataset: DatasetConfig, fingerprints: Fingerprints) -> tuple[DatasetConfig, dict[str, Any]]:
    """The dataset with its revision pinned, and what its rows are: {"kind", "source", "revision", ...}."""
    kind = source_kind(dataset)
    plain = dataset.model_copy(update={"weight": 1.0})
    if kind == "builtin":
        return plain, {"kind": kind, "source": dataset.name, "revision": "", **builtin_identity(dataset)}
    if kind == "hub":
        pinned = plain.model_copy(update={"revision": hub_revision(dataset)})
        origin = {"configuration": " ".join(hub_configurations(dataset)), "split": hub_split(dataset)}
        return pinned, {"kind": kind, "source": dataset.name, "revision": pinned.revision, **origin}
    path = Path(dataset.source)
    files = [[file.name, fingerprints.sha256(file)] for file in source_files(path)]
    found = plain.model_copy(update={"source": str(path.resolve())})
    return found, {"kind": kind, "source": path.name, "revision": sha256_of_json(files)}


def _digest(
    resolved: list[tuple[DatasetConfig, dict[str, Any]]],
    data: DataConfig,
    tokenizer: TokenizerConfig,
    fingerprints: Fingerprints,
) -> str:
    """SHA-256 of everything that decides the bytes; where a local source lies does not."""
    decisive = (
        "split",
        "split_seed",
        "shard_bytes",
        "max_context_tokens",
        "max_target_tokens",
        "part_examples",
        "deduplicate",
        "near_duplicate_overlap",
        "contamination_words",
        "contamination_items",
    )
    tokens: dict[str, Any] = tokenizer.model_dump(exclude={"path"})
    if tokenizer.kind == "file":
        path = Path(tokenizer.path)
        if not path.is_file():
            raise DataError(
                f"{path}: no such file (tokenizer.path)", allowed="a tokenizer.json", action="correct tokenizer.path"
            )
        tokens = {"kind": "file", "sha256": fingerprints.sha256(path)}
    elif tokenizer.kind == "bytes":
        tokens = {"kind": "bytes"}
    return sha256_of_json(
        {
            "recipe": _recipe(),
            "datasets": [[dataset.model_dump(exclude={"source"}), origin] for dataset, origin in resolved],
            "data": {name: getattr(data, name) for name in decisive},
            "tokenizer": tokens,
        }
    )


def _recipe() -> str:
    """SHA-256 of the code that makes examples and shards: another version of it never reuses what this one made."""
    room = Path(__file__).parent
    files = [*room.glob("*.py"), *room.glob("preprocessors/*.py"), *room.glob("shards/*.py")]
    return sha256_of_json([[path.relative_to(room).as_posix(), sha256_of_file(path)] for path in sorted(files)])


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One preparation of a folder at a time on this machine; the second waits and finds the work done."""
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
