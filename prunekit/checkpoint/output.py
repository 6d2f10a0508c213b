"""The folder that a run writes: shards whole or not at all, a journal, and at the end a checkpoint.

``config.json`` and the index are written last, so that a folder which opens as a model is complete.
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

from prunekit.checkpoint.atomic import digest, names_a_full_disk, write_atomically, write_shard
from prunekit.checkpoint.compressed import OPENS, storage_config
from prunekit.checkpoint.formats import Format, Stored
from prunekit.checkpoint.header import read_header
from prunekit.checkpoint.reader import INDEX, Checkpoint
from prunekit.distributed.ranks import SINGLE, Ranks
from prunekit.errors import CheckpointError, ConfigError
from prunekit.models.units.removal import RECORD

JOURNAL = "journal.jsonl"


def nearest_folder(path: Path, name: str = "output.path") -> Path:
    """Return ``path`` or, where it is not there yet, the folder in which it will be made.

    Raises:
        ConfigError: It is a file, or below one.
    """
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not there.is_dir():
        raise ConfigError(f"{name}: {there} is a file, so {path} can be no folder; name another.")
    return there


class Output:
    """An output folder of one run, new or taken up again.

    Attributes:
        folder: Where it is.
        ranks: The processes that share the run; the first of them writes, the others remember.
        done: Journal entries of the run that is taken up, by kind and name.
    """

    def __init__(self, folder: Path, shards: int, ranks: Ranks = SINGLE) -> None:
        self.folder = folder
        self.shards = shards
        self.ranks = ranks
        self.done: dict[tuple[str, str], dict[str, Any]] = {}
        self._journal: BinaryIO | None = None

    def begin(self, fingerprint: str, *, resume: bool, overwrite: bool) -> None:
        """Make the folder ready.

        Raises:
            ConfigError: The folder is in use, or what it holds belongs to another run.
        """

        def begin() -> dict[tuple[str, str], dict[str, Any]]:
            self._begin(fingerprint, resume=resume, overwrite=overwrite)
            return self.done

        self.done = self.ranks.run_on_main(begin)
        seen = self.ranks.all_gather_object((self.folder / JOURNAL).is_file())
        if not all(seen):
            raise ConfigError(
                f"output.path: rank {seen.index(False)} does not see {self.folder}, which rank 0 "
                "writes. All machines of a run need one file system in common."
            )

    def _begin(self, fingerprint: str, *, resume: bool, overwrite: bool) -> None:
        ours = _is_ours(self.folder / JOURNAL)
        if ours:
            self._open()
        if resume and ours:
            self._take_up(fingerprint)
        elif self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            self._clear(ours, overwrite=overwrite)
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.done:
            self.close()
            self._open()
            self.note("start", "", {"fingerprint": fingerprint})

    def _open(self) -> None:
        """Open the journal and lock it: the lock goes with the process, however that ends."""
        self._journal = (self.folder / JOURNAL).open("ab")
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            raise ConfigError(
                f"output.path: another run is writing to {self.folder}. Wait until it has ended, "
                "or choose another folder."
            ) from error

    def close(self) -> None:
        """Let go of the folder."""
        if self._journal:
            self._journal.close()
        self._journal = None

    def _take_up(self, fingerprint: str) -> None:
        lines = (self.folder / JOURNAL).read_bytes().splitlines(keepends=True)
        # A line cut off by a crash stands for work that is done again.
        whole = list(takewhile(_is_whole, lines))
        for entry in map(json.loads, whole):
            self.done[entry["kind"], entry["name"]] = entry["values"]
        if self.done and self.done["start", ""]["fingerprint"] != fingerprint:
            raise ConfigError(
                f"{self.folder}: was begun with another config, model, calibration text or version "
                "of prunekit, or where blocks run in another type, so --resume cannot go on with "
                "it. Run with --overwrite, or choose another output.path."
            )
        assert self._journal is not None
        self._journal.truncate(sum(map(len, whole)))
        for left in self.folder.glob(".*.tmp"):
            left.unlink()
        for kind, name in list(self.done):
            file = {"block": self.done[kind, name].get("file"), "rest": self.shard(1).name}.get(
                kind
            )
            # So does a shard that is no longer what was written.
            if file and not _is_sound(self.folder / file, self.done[kind, name].get("sha256")):
                del self.done[kind, name]

    def _clear(self, ours: bool, *, overwrite: bool) -> None:  # noqa: FBT001
        if not overwrite:
            hint = "--resume goes on with it, --overwrite begins anew" if ours else "choose another"
            raise ConfigError(f"output.path: {self.folder} is not empty; {hint}.")
        if not ours:
            raise ConfigError(
                f"output.path: {self.folder} holds files that are not prunekit's (it has no "
                f"{JOURNAL} of a run), so --overwrite leaves them alone. Choose another folder."
            )
        shutil.rmtree(self.folder)

    def note(self, kind: str, name: str, values: dict[str, Any]) -> None:
        """Append to the journal; on the disk when this returns."""
        self.done[kind, name] = values
        if not self.ranks.is_main:
            return
        assert self._journal is not None
        with names_a_full_disk(self.folder):
            line = json.dumps({"kind": kind, "name": name, "values": values})
            self._journal.write(line.encode() + b"\n")
            self._journal.flush()
            os.fsync(self._journal.fileno())

    def shard(self, number: int) -> Path:
        """Return the path of shard ``number`` of 1..shards."""
        return self.folder / f"model-{number:05d}-of-{self.shards:05d}.safetensors"

    def write(self, number: int, tensors: Mapping[str, Tensor]) -> Path:
        """Write one shard."""
        write_shard(self.shard(number), tensors)
        return self.shard(number)

    def finish(
        self,
        checkpoint: Checkpoint,
        dtype: str | None,
        kind: Format | None = None,
        linears: Mapping[str, Stored] | None = None,
    ) -> None:
        """Write what makes the folder a checkpoint: companions, index and, last, the config.

        ``linears``: those that were compressed, by name of the layer, as ``kind``.
        """
        for path in checkpoint.companions:
            write_atomically(self.folder / path.name, path.read_bytes())
        weight_map, total = {}, 0
        for number in range(1, self.shards + 1):
            for name, entry in read_header(self.shard(number)).items():
                weight_map[name] = self.shard(number).name
                total += entry.nbytes
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_atomically(self.folder / INDEX, json.dumps(index, indent=2).encode() + b"\n")
        config = checkpoint.config
        if dtype:
            kept = {key: value for key, value in config.items() if key != "torch_dtype"}
            config = kept | {"dtype": dtype}
        if RECORD in config:
            config = config | {"quantization_config": OPENS}
        if kind and linears:
            config = config | {"quantization_config": storage_config(kind, linears)}
        content = json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n"
        write_atomically(self.folder / "config.json", content)


def _is_ours(journal: Path) -> bool:
    """Say whether a journal begins as ours do, if only with the first bytes of that."""
    begin = b'{"kind": "start"'
    if not journal.is_file():
        return False
    with journal.open("rb") as stream:
        return begin.startswith(stream.read(len(begin)))


def _is_whole(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return line.endswith(b"\n")


def _is_sound(shard: Path, sha256: str | None) -> bool:
    try:
        return bool(read_header(shard)) and sha256 in {None, digest(shard)}
    except (CheckpointError, OSError):
        return False
