"""Output folder of a run: shards, journal, and finally a complete checkpoint.

Shards are written atomically. ``config.json`` and the index are written last, so a folder that
opens as a model is complete.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from prunekit.checkpoint.atomic import file_sha256, report_full_disk, write_atomically, write_shard
from prunekit.checkpoint.compressed import DENSE_STORAGE, KEPT_UNITS_KEY, storage_config
from prunekit.checkpoint.formats import Format, WeightLayout
from prunekit.checkpoint.header import read_header
from prunekit.checkpoint.reader import INDEX_FILE, Checkpoint
from prunekit.distributed.ranks import SINGLE, Ranks
from prunekit.errors import CheckpointError, ConfigError

JOURNAL = "journal.jsonl"


def nearest_existing_folder(path: Path, name: str = "output.path") -> Path:
    """Return ``path``, or its nearest parent that exists.

    Args:
        path: Folder to be created.
        name: Config key or option of the path, for the message.

    Raises:
        ConfigError: The path, or one of its parents, is a file.
    """
    nearest = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not nearest.is_dir():
        raise ConfigError(
            f"{name}: {nearest} is a file, so {path} cannot be a folder; name another."
        )
    return nearest


class OutputFolder:
    """Output folder of one run, new or resumed.

    Attributes:
        folder: The folder.
        shards: Number of weight files of the finished checkpoint.
        ranks: Ranks of the run; rank 0 writes, all know the journal.
        journal: Journal entries so far, by kind and name.
    """

    def __init__(self, folder: Path, shards: int, ranks: Ranks = SINGLE) -> None:
        self.folder = folder
        self.shards = shards
        self.ranks = ranks
        self.journal: dict[tuple[str, str], dict[str, Any]] = {}
        self._file: BinaryIO | None = None

    def begin(self, fingerprint: str, *, resume: bool, overwrite: bool) -> None:
        """Create or resume the folder and lock its journal.

        Args:
            fingerprint: Identifies config, model, text and version; a resumed run must have the
                same.
            resume: Continue a run that was stopped.
            overwrite: Replace the output of an earlier run.

        Raises:
            ConfigError: The folder is in use, or its content belongs to another run.
        """

        def begin() -> dict[tuple[str, str], dict[str, Any]]:
            self._begin(fingerprint, resume=resume, overwrite=overwrite)
            return self.journal

        self.journal = self.ranks.run_on_main(begin)
        seen = self.ranks.all_gather_object((self.folder / JOURNAL).is_file())
        if not all(seen):
            raise ConfigError(
                f"output.path: rank {seen.index(False)} does not see {self.folder}, which rank 0 "
                "writes. All machines of a run need a shared file system."
            )

    def _begin(self, fingerprint: str, *, resume: bool, overwrite: bool) -> None:
        has_run = _is_prunekit_journal(self.folder / JOURNAL)
        if has_run:
            self._open()
        if resume and has_run:
            self._resume(fingerprint)
        elif self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            self._clear(has_run, overwrite=overwrite)
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.journal:
            self.close()
            self._open()
            self.append_journal("start", "", {"fingerprint": fingerprint})

    def _open(self) -> None:
        """Open and lock the journal; the lock ends with the process."""
        self._file = (self.folder / JOURNAL).open("ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            raise ConfigError(
                f"output.path: another run is writing to {self.folder}. Wait until it has ended, "
                "or choose another folder."
            ) from error

    def close(self) -> None:
        """Close the journal and release its lock."""
        if self._file:
            self._file.close()
        self._file = None

    def _resume(self, fingerprint: str) -> None:
        """Load the journal; discard an incomplete last line and corrupt shards."""
        lines = (self.folder / JOURNAL).read_bytes().splitlines(keepends=True)
        # A line truncated by a crash is dropped; its work is repeated.
        complete = list(takewhile(_is_complete, lines))
        for entry in map(json.loads, complete):
            self.journal[entry["kind"], entry["name"]] = entry["values"]
        if self.journal and self.journal["start", ""]["fingerprint"] != fingerprint:
            raise ConfigError(
                f"{self.folder}: was begun with another config, model, calibration text or version "
                "of prunekit, or with blocks in another data type, so --resume cannot continue it. "
                "Run with --overwrite, or choose another output.path."
            )
        assert self._file is not None
        self._file.truncate(sum(map(len, complete)))
        for temporary in self.folder.glob(".*.tmp"):
            temporary.unlink()
        for kind, name in list(self.journal):
            file = {
                "block": self.journal[kind, name].get("file"),
                "rest": self.shard_path(1).name,
            }.get(kind)
            # The work of a corrupt or missing shard is repeated too.
            if file and not _is_intact(self.folder / file, self.journal[kind, name].get("sha256")):
                del self.journal[kind, name]

    def _clear(self, has_run: bool, *, overwrite: bool) -> None:  # noqa: FBT001
        """Delete the output of an earlier run, if ``--overwrite`` allows it."""
        if not overwrite:
            hint = "--resume continues it, --overwrite starts over" if has_run else "choose another"
            raise ConfigError(f"output.path: {self.folder} is not empty; {hint}.")
        if not has_run:
            raise ConfigError(
                f"output.path: {self.folder} holds files that prunekit did not write (it has no "
                f"{JOURNAL} of a run), so --overwrite does not delete them. Choose another folder."
            )
        shutil.rmtree(self.folder)

    def append_journal(self, kind: str, name: str, values: dict[str, Any]) -> None:
        """Append an entry to the journal and flush it to disk.

        Args:
            kind: Kind of entry, such as "block".
            name: Name within its kind.
            values: Values, as JSON.
        """
        self.journal[kind, name] = values
        if not self.ranks.is_main:
            return
        assert self._file is not None
        with report_full_disk(self.folder):
            line = json.dumps({"kind": kind, "name": name, "values": values})
            self._file.write(line.encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def shard_path(self, number: int) -> Path:
        """Return the path of shard ``number`` of 1..shards."""
        return self.folder / f"model-{number:05d}-of-{self.shards:05d}.safetensors"

    def write_shard(self, number: int, tensors: Mapping[str, Tensor]) -> Path:
        """Write one shard."""
        write_shard(self.shard_path(number), tensors)
        return self.shard_path(number)

    def finish(
        self,
        checkpoint: Checkpoint,
        dtype: str | None,
        kind: Format | None = None,
        linears: Mapping[str, WeightLayout] | None = None,
    ) -> None:
        """Complete the checkpoint: companion files, the index, and last ``config.json``.

        Args:
            checkpoint: The dense checkpoint.
            dtype: Data type for the config; None keeps that of ``checkpoint``.
            kind: Storage format of compressed weights.
            linears: Layouts of the compressed weights, by layer name.
        """
        for path in checkpoint.companions:
            write_atomically(self.folder / path.name, path.read_bytes())
        weight_map, total = {}, 0
        for number in range(1, self.shards + 1):
            for name, entry in read_header(self.shard_path(number)).items():
                weight_map[name] = self.shard_path(number).name
                total += entry.nbytes
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_atomically(self.folder / INDEX_FILE, json.dumps(index, indent=2).encode() + b"\n")
        config = checkpoint.config
        if dtype:
            kept = {key: value for key, value in config.items() if key != "torch_dtype"}
            config = kept | {"dtype": dtype}
        if KEPT_UNITS_KEY in config:
            config = config | {"quantization_config": DENSE_STORAGE}
        if kind and linears:
            config = config | {"quantization_config": storage_config(kind, linears)}
        content = json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n"
        write_atomically(self.folder / "config.json", content)


def _is_prunekit_journal(journal: Path) -> bool:
    """Return whether a journal, possibly truncated, was written by prunekit."""
    start = b'{"kind": "start"'
    if not journal.is_file():
        return False
    with journal.open("rb") as stream:
        return start.startswith(stream.read(len(start)))


def _is_complete(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return line.endswith(b"\n")


def _is_intact(shard: Path, sha256: str | None) -> bool:
    try:
        return bool(read_header(shard)) and sha256 in {None, file_sha256(shard)}
    except (CheckpointError, OSError):
        return False
