"""Joins the shards of a run to weight files.

A run writes one shard a block, so that it can be resumed. At its end the tensors are copied into
as few files as ``max_shard_size`` allows, named as transformers names them. A shard is removed once
all its tensors are in finished files: beside the checkpoint there is never more than the file that
is being written and the shard of which a part is in finished ones.

The journal holds, before the first file is written, the tensors of each file (``layout``), then the
digest of each finished file (``weights``). Each entry that named a shard names these files instead
before the shard is removed. So whatever is lost, and whenever a run is killed, the next one finds
the work whose files are intact, and joins the rest.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from prunekit.checkpoint.atomic import json_bytes, write_atomically
from prunekit.checkpoint.header import TensorEntry, read_header
from prunekit.checkpoint.journal import Entries
from prunekit.checkpoint.owned_files import recorded_digests
from prunekit.checkpoint.safetensors_writer import write_joined
from prunekit.checkpoint.weight_files import INDEX_FILE
from prunekit.errors import CheckpointError

LAYOUT = ("layout", "")
"""Journal entry of the tensors of each weight file."""
WEIGHTS = "weights"
"""Kind of the journal entries of finished weight files."""

Layout = dict[str, dict[str, list[str]]]
"""Tensors by weight file and by the shard that they come from, in order."""


def plan_layout(shards: Mapping[str, Mapping[str, TensorEntry]], limit: int) -> Layout:
    """Return which tensors go into which weight file, as transformers splits them.

    Args:
        shards: Tensors of each shard, by its name, in the order in which they are joined.
        limit: Bytes of a file at most; a larger tensor gets a file of its own.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    homes = {name: shard for shard, entries in shards.items() for name in entries}
    split = split_state_dict_into_shards_factory(
        {name: entry.nbytes for entries in shards.values() for name, entry in entries.items()},
        get_storage_size=int,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit,
    )
    layout: Layout = {}
    for file, names in split.filename_to_tensors.items():
        sources = layout[file] = {}
        for name in names:
            sources.setdefault(homes[name], []).append(name)
    return layout


def read_shard(folder: Path, shard: str, entries: Entries) -> dict[str, Tensor]:
    """Return the tensors of a shard, from wherever they are now.

    Args:
        folder: The output folder.
        shard: Name of the shard.
        entries: Entries of the journal.
    """
    if (folder / shard).is_file():
        return load_file(folder / shard)
    found: dict[str, Tensor] = {}
    layout: Layout = entries[LAYOUT]["layout"]
    for file, sources in layout.items():
        if shard in sources:
            with safe_open(folder / file, framework="pt") as opened:
                found |= {name: opened.get_tensor(name) for name in sources[shard]}
    return found


def write_index(files: Sequence[Path]) -> None:
    """Write the index of weight files, unless there is only one."""
    index = files[0].with_name(INDEX_FILE)
    if len(files) == 1:
        index.unlink(missing_ok=True)
        return
    entries = {name: entry for file in files for name, entry in read_header(file).items()}
    total = sum(entry.nbytes for entry in entries.values())
    weight_map = {name: entry.file.name for name, entry in sorted(entries.items())}
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_atomically(index, json_bytes(content))


class Consolidation:
    """Joins the shards of an output folder; repeatable after any interruption.

    Args:
        folder: The output folder.
        entries: Entries of its journal.
        append: Appends an entry of kind, name and values to the journal.
    """

    def __init__(
        self, folder: Path, entries: Entries, append: Callable[[str, str, dict[str, Any]], None]
    ) -> None:
        self.folder, self._entries, self._append = folder, entries, append
        self._headers: dict[tuple[str, int, int], dict[str, TensorEntry]] = {}

    def join(self, shards: Sequence[str], limit: int) -> list[Path]:
        """Join the shards and remove them; return the weight files.

        Args:
            shards: Names of the shards in order.
            limit: Bytes of a file at most.

        Raises:
            CapacityError: The file system refuses to write; the next run can go on.
            CheckpointError: A tensor is in no file.
        """
        layout = self._layout(shards, limit)
        spread: dict[str, set[str]] = {shard: set() for shard in shards}
        for file, sources in layout.items():
            for shard in sources:
                spread[shard].add(file)
        done: set[str] = set()
        for file in layout:
            self._write(file, layout)
            done.add(file)
            self._remove({shard: files for shard, files in spread.items() if files <= done})
        return [self.folder / file for file in layout]

    def _layout(self, shards: Sequence[str], limit: int) -> Layout:
        """Return the layout, planned anew while all shards are there."""
        known: Layout = self._entries.get(LAYOUT, {}).get("layout", {})
        if not all((self.folder / shard).is_file() for shard in shards):
            if not known:
                raise CheckpointError(
                    f"{self.folder}: a shard is missing that the run wrote. Run again with "
                    "--resume, which repeats its work."
                )
            return known
        layout = plan_layout({shard: read_header(self.folder / shard) for shard in shards}, limit)
        if layout != known:
            # Files of the other layout may have names of this one, and hold other tensors.
            for file in known:
                (self.folder / file).unlink(missing_ok=True)
                self._append(WEIGHTS, file, {})
            self._append(*LAYOUT, {"layout": layout, "writes": [*layout]})
        return layout

    def _write(self, file: str, layout: Layout) -> None:
        """Write a weight file, unless it is written and up to date."""
        named = self._named
        made_of = {shard: named[shard] for shard in layout[file] if shard in named}
        known = self._entries.get((WEIGHTS, file), {})
        is_of_them = recorded_digests(known) and made_of.items() <= known["shards"].items()
        if is_of_them and self._header(file).keys() == {*chain(*layout[file].values())}:
            return
        found = {
            name: self._entry(name, shard, layout)
            for shard, names in layout[file].items()
            for name in names
        }
        digest = write_joined(self.folder / file, found)
        self._append(WEIGHTS, file, {"files": {file: digest}, "shards": made_of})

    def _entry(self, name: str, shard: str, layout: Layout) -> TensorEntry:
        """Return where a tensor is: in its shard or a weight file."""
        joined = (file for file, sources in layout.items() if name in sources.get(shard, ()))
        for file in (shard, *joined):
            if (self.folder / file).is_file() and (entry := self._header(file).get(name)):
                return entry
        raise CheckpointError(
            f"{self.folder}: {name} is in none of its files. Run again with --overwrite."
        )

    def _header(self, file: str) -> dict[str, TensorEntry]:
        """Return the tensors of a file, which is read once."""
        path = self.folder / file
        state = path.stat()
        key = (file, state.st_ino, state.st_mtime_ns)
        if key not in self._headers:
            self._headers[key] = read_header(path)
        return self._headers[key]

    @property
    def _named(self) -> dict[str, str]:
        """Digests of all files that entries name, but weight files."""
        return {
            name: digest
            for (kind, _), values in self._entries.items()
            if kind != WEIGHTS
            for name, digest in recorded_digests(values).items()
        }

    def _remove(self, finished: Mapping[str, set[str]]) -> None:
        """Remove shards; entries that named them name weight files first.

        Args:
            finished: The weight files that hold each of them.
        """
        for (kind, name), values in [*self._entries.items()]:
            files = recorded_digests(values)
            if kind == WEIGHTS or not (gone := finished.keys() & files.keys()):
                continue
            kept = {file: digest for file, digest in files.items() if file not in gone}
            for file in sorted(set().union(*(finished[shard] for shard in gone))):
                kept |= recorded_digests(self._entries[WEIGHTS, file])
            self._append(kind, name, values | {"files": kept})
        for shard in finished:
            (self.folder / shard).unlink(missing_ok=True)
