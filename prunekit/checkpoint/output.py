"""Output folder of a run: shards, journal, and finally a complete checkpoint.

Shards are written atomically, and joined at the end. ``config.json`` is written last, so a folder
that opens as a model is complete.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from prunekit.checkpoint import owned_files
from prunekit.checkpoint.atomic import (
    file_sha256,
    json_bytes,
    missing_guarantees,
    report_full_disk,
    temporary_file,
    write_atomically,
)
from prunekit.checkpoint.companions import companion_content, without_code
from prunekit.checkpoint.compressed import DENSE_STORAGE, KEPT_UNITS_KEY, storage_config
from prunekit.checkpoint.consolidation import Consolidation, read_shard, write_index
from prunekit.checkpoint.formats import Format, WeightLayout
from prunekit.checkpoint.journal import JOURNAL, START, Entries, Journal
from prunekit.checkpoint.output_path import MAX_SHARD_BYTES, nearest_existing_folder
from prunekit.checkpoint.owned_files import recorded_digests
from prunekit.checkpoint.reader import Checkpoint, open_weights
from prunekit.checkpoint.safetensors_writer import write_shard
from prunekit.checkpoint.weight_files import INDEX_FILE, WEIGHTS_FILE
from prunekit.distributed.ranks import SINGLE, Ranks
from prunekit.errors import CheckpointError, ConfigError

CONFIG_FILE = "config.json"
SHARD = "shard-"
"""Beginning of the names of files that a run writes before it joins them."""


def checkpoint_files(checkpoint: Checkpoint) -> list[str]:
    """Return the names of a checkpoint's files, numbered weight files left out."""
    return [*checkpoint.companion_names, WEIGHTS_FILE, INDEX_FILE, CONFIG_FILE]


def check_same_tensors(source: Checkpoint, written: Checkpoint) -> None:
    """Refuse a copy whose tensors differ from those of the checkpoint.

    Raises:
        CheckpointError: A tensor is missing, or has another shape or data type.
    """
    for name, entry in source.entries.items():
        found = written.entries.get(name)
        if not found or (found.shape, found.dtype) != (entry.shape, entry.dtype):
            raise CheckpointError(
                f"{written.folder}: lacks {name} as {source.folder} has it. Write it again; if "
                "that does not help, the disk or the memory is faulty."
            )


class OutputFolder:
    """Output folder of one run, new or resumed.

    Attributes:
        folder: The folder.
        shards: Number of files in which the run writes weights, before they are joined.
        limit: Bytes of a weight file of the finished checkpoint at most.
        ranks: Ranks of the run; rank 0 writes, all know the journal.
        journal: Journal entries so far, by kind and name. The ``files`` of an entry are the SHA-256
            of files that were written before it, by their names relative to the folder.
        notes: Notes for the user: files that were left, guarantees that the file system lacks.
        weights_read: Returns an entry of the model's tensors that were read since the last call,
            which is written before the next one; empty if there are none.
    """

    def __init__(
        self, folder: Path, shards: int, ranks: Ranks = SINGLE, limit: int = MAX_SHARD_BYTES
    ) -> None:
        self.folder = folder
        self.shards, self.limit = shards, limit
        self.ranks = ranks
        self.journal: Entries = {}
        self.notes: list[str] = []
        self.weights_read: Callable[[], dict[str, Any]] = dict
        self._journal = Journal(folder)

    def begin(
        self, fingerprint: str, *, resume: bool, overwrite: bool, writes: Iterable[str] = ()
    ) -> None:
        """Create or resume the folder and lock its journal.

        Args:
            fingerprint: Identifies config, model, text and version; a resumed run must have the
                same.
            resume: Continue a run that was stopped.
            overwrite: Replace the output of an earlier run; only files that it wrote are removed.
            writes: Names of all files that the run writes, besides shards and journal.

        Raises:
            ConfigError: The folder is in use, or its content belongs to another run or to the user.
            CapacityError: The file system refuses to write.
        """

        def begin() -> tuple[Entries, list[str]]:
            self._begin(fingerprint, [*writes], resume=resume, overwrite=overwrite)
            return self.journal, self.notes

        self.journal, self.notes = self.ranks.run_on_main(begin)
        seen = self.ranks.all_gather_object((self.folder / JOURNAL).is_file())
        if not all(seen):
            raise ConfigError(
                f"output.path: rank {seen.index(False)} does not see {self.folder}, which rank 0 "
                "writes. All machines of a run need a shared file system."
            )

    def _begin(self, fingerprint: str, writes: list[str], *, resume: bool, overwrite: bool) -> None:
        nearest_existing_folder(self.folder)
        with report_full_disk(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self.notes = missing_guarantees(self.folder)
        if self._journal.path.is_file():
            self._journal.open()
        self.journal = self._journal.entries
        if resume and self.journal:
            self._resume(fingerprint)
            return
        writes += self._shard_names
        self._clear(writes, overwrite=overwrite)
        self._journal.start({"fingerprint": fingerprint, "writes": writes})
        self.journal = self._journal.entries

    def close(self) -> None:
        """Close the journal and release its lock."""
        self._journal.close()

    def discard(self) -> None:
        """Remove all that this run has written."""
        owned_files.remove(self.folder, owned_files.owned_files(self.folder, self.journal))
        self.discard_journal()

    def discard_journal(self) -> None:
        """Remove the journal; the folder then belongs to no run."""
        if self.journal:
            self._journal.path.unlink(missing_ok=True)

    def _resume(self, fingerprint: str) -> None:
        """Discard invalid journal lines, and entries whose files are not intact."""
        if self.journal[START].get("fingerprint") != fingerprint:
            raise ConfigError(
                f"{self.folder}: was begun with another config, model, calibration text or version "
                "of prunekit, or with blocks in another data type, so --resume cannot continue it. "
                "Run with --overwrite, or choose another output.path."
            )
        self._journal.truncate()
        # That of the journal is left by an --overwrite that was killed as it began.
        for name in (*owned_files.announced_files(self.journal), JOURNAL):
            temporary_file(self.folder / name).unlink(missing_ok=True)
        # If a file of an entry is missing, truncated or altered, its work is repeated.
        is_intact = cache(self._is_intact)  # several entries may name a file
        for key, values in [*self.journal.items()]:
            if not all(is_intact(*file) for file in recorded_digests(values).items()):
                del self.journal[key]
        # Those that were joined to weight files, or whose work is repeated.
        for name in {*owned_files.announced_files(self.journal)} - self.files.keys():
            if name.startswith(SHARD):
                (self.folder / name).unlink(missing_ok=True)

    def _is_intact(self, name: str, sha256: str) -> bool:
        try:
            return file_sha256(self.folder / name) == sha256
        except OSError:
            return False

    def _clear(self, writes: list[str], *, overwrite: bool) -> None:
        """Remove the files of an earlier run, if ``--overwrite`` allows it.

        The journal is replaced only later, so a removal that is cut off can be repeated.
        """
        owned = owned_files.owned_files(self.folder, self.journal)
        foreign = owned_files.foreign_files(self.folder, owned)
        if self.journal and not overwrite:
            raise ConfigError(
                f"output.path: {self.folder} is not empty; --resume continues it, --overwrite "
                "starts over."
            )
        if foreign and not self.journal:
            choice = (
                f"holds files that prunekit did not write, such as {foreign[0]} (it has no "
                f"{JOURNAL} of a run), so --overwrite does not delete them. Choose another folder"
                if overwrite
                else "is not empty; choose another"
            )
            raise ConfigError(f"output.path: {self.folder} {choice}.")
        if name := owned_files.in_the_way(foreign, writes):
            raise ConfigError(
                f"output.path: {self.folder} holds {name}, which prunekit did not write, and which "
                "would be taken for a part of the result. Move it, or choose another folder."
            )
        owned_files.remove(self.folder, owned)
        if foreign:
            shown = ", ".join(foreign[:3]) + (", …" if len(foreign) > 3 else "")
            self.notes.append(
                f"{self.folder}: --overwrite left what prunekit did not write: {shown}"
            )

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
        self._journal.check_in_place()
        if weights := self.weights_read():
            self._journal.append("inputs", str(len(self.journal)), weights)
        self._journal.append(kind, name, values)

    @property
    def files(self) -> dict[str, str]:
        """SHA-256 of all files that the journal names, by their names."""
        found: dict[str, str] = {}
        for values in self.journal.values():
            found |= recorded_digests(values)
        return found

    def announce_shards(self, shards: int) -> None:
        """Set the number of shards once the run knows it.

        The journal names them before the first is written, so that they count as files of the run.
        """
        self.shards = shards
        if self.journal.get(("shards", "")) != {"writes": self._shard_names}:
            self.append_journal("shards", "", {"writes": self._shard_names})

    def shard_path(self, number: int) -> Path:
        """Return the path of shard ``number`` of 1..shards."""
        return self.folder / f"{SHARD}{number:05d}-of-{self.shards:05d}.safetensors"

    @property
    def _shard_names(self) -> list[str]:
        return [self.shard_path(number).name for number in range(1, self.shards + 1)]

    def read_shard(self, number: int) -> dict[str, Tensor]:
        """Return the tensors of a shard, whether or not it is joined."""
        return read_shard(self.folder, self.shard_path(number).name, self.journal)

    def write_shard(self, number: int, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """Write one shard; return its SHA-256 by its name, for the journal."""
        self._journal.check_in_place()
        file = self.shard_path(number)
        return {file.name: write_shard(file, tensors)}

    def finish(
        self,
        checkpoint: Checkpoint,
        dtype: str | None,
        kind: Format | None = None,
        linears: Mapping[str, WeightLayout] | None = None,
        check: Callable[[Checkpoint], object] = lambda _: None,
        storage: Mapping[str, Any] | None = None,
    ) -> None:
        """Complete the checkpoint: companions, weight files and, last, ``config.json``.

        Args:
            checkpoint: The dense checkpoint.
            dtype: Data type for the config; None keeps that of ``checkpoint``.
            kind: Storage format of compressed weights.
            linears: Layouts of the compressed weights, by layer name.
            check: Called with the written checkpoint before it gets its ``config.json``; raises if
                anything is missing.
            storage: The ``quantization_config`` of weights that are stored in few bits.
        """
        self._journal.check_in_place()
        for name, path in checkpoint.companion_names.items():
            (self.folder / name).parent.mkdir(exist_ok=True)
            write_atomically(self.folder / name, companion_content(path))
        joining = Consolidation(self.folder, self.journal, self.append_journal)
        write_index(joining.join(self._shard_names, self.limit))
        config = without_code(checkpoint.config)
        if dtype:
            kept = {key: value for key, value in config.items() if key != "torch_dtype"}
            config = kept | {"dtype": dtype}
        if KEPT_UNITS_KEY in config:
            config = config | {"quantization_config": DENSE_STORAGE}
        if kind and linears:
            config = config | {"quantization_config": storage_config(kind, linears)}
        if storage:
            config = config | {"quantization_config": storage}
        # Some engines take any folder for a model that has a config.
        check(open_weights(self.folder, config))
        write_atomically(self.folder / CONFIG_FILE, json_bytes(config))
