"""Pruned blocks are written while the next one is pruned.

One block is written while one is pruned, no more: memory is planned for these two. A block's entry
of the journal follows its files. Records are yielded in the order of the work: a layer's once its
numbers are there, a block's once it is written.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

from prunekit.checkpoint.output import OutputFolder
from prunekit.models.sequential.loaded_block import LoadedBlock
from prunekit.runs.background import Background
from prunekit.runs.record import Record
from prunekit.runs.sparsify.shards import ShardWriter
from prunekit.sparsify.layer_result import LayerResult
from prunekit.sparsify.permute_channels import Orders

Values = dict[str, Any]
"""Values of a block's entry of the journal."""


@dataclass
class PrunedBlock:
    """A pruned block, to be written.

    Attributes:
        number: Its number in the model.
        loaded: The block.
        results: Results of its linears, taken out as it is written.
        orders: Orders into which its channels were permuted.
        seconds: The time in which it was pruned.
    """

    number: int
    loaded: LoadedBlock
    results: list[LayerResult]
    orders: Orders
    seconds: float


class BlockOutput:
    """Writes blocks in the background, and yields the records of them.

    Args:
        shards: Writes the shard of a block.
        output: The output folder and its journal.
        recorded: Returns the record of a written block, given its number and its values.
    """

    def __init__(
        self,
        shards: ShardWriter,
        output: OutputFolder,
        recorded: Callable[[int, Values], Record],
    ) -> None:
        self._shards, self._output, self._recorded = shards, output, recorded
        self._thread = Background[Values | None]("prunekit-write")
        self._writing: PrunedBlock | None = None
        self._layers: deque[tuple[int, LayerResult]] = deque()

    def add(self, number: int, result: LayerResult) -> None:
        """Note a result whose record is to be yielded, of a block."""
        self._layers.append((number, result.measurements()))

    def write(self, block: PrunedBlock) -> None:
        """Begin to write a block, after :meth:`finish` of the last one."""
        self._writing = block
        self._thread.start(lambda: self._write(block))

    def ready(self) -> Iterator[Record]:
        """Yield the records that are there now.

        Raises:
            Exception: The block before could not be written.
        """
        writing = self._writing
        yield from self._layer_records(writing.number if writing else None, wait=False)
        if writing and not self._has_layers_of(writing.number) and self._thread.peek() is not None:
            yield from self.finish()
            yield from self._layer_records(None, wait=False)

    def finish(self) -> Generator[Record, None, None]:
        """Wait for the block that is being written; yield its records.

        Raises:
            Exception: It could not be written, or a number in it is not finite.
        """
        if self._writing is None:
            return
        writing, values = self._writing, self._thread.result()
        self._writing = None
        if values is None:
            writing.loaded.checks.settle()
        assert values is not None
        yield from self._layer_records(writing.number, wait=True)
        yield self._recorded(writing.number, values)

    def close(self) -> None:
        """Close the output folder, once nothing is being written to it."""
        self._thread.close(self._output.close)

    def _has_layers_of(self, number: int) -> bool:
        return bool(self._layers) and self._layers[0][0] == number

    def _layer_records(self, number: int | None, *, wait: bool) -> Iterator[Record]:
        """Yield records of linears of a block, or of any.

        Args:
            number: The block.
            wait: Whether to wait for numbers that are not there yet.
        """
        while self._layers and number in (None, self._layers[0][0]):
            block, result = self._layers[0]
            if not (wait or result.is_there):
                return
            self._layers.popleft()
            record = self._shards.record(result.arrived(), block)
            yield Record("layer", result.linear.name, record)

    def _write(self, block: PrunedBlock) -> Values | None:
        """Write block and entry; return None if it is not finite."""
        if not block.loaded.checks.hold():
            return None
        results, block.results = [result.arrived() for result in block.results], []
        file, name = self._shards.file(block.number), self._shards.blocks[block.number]
        try:
            values = self._shards.write_block(
                block.number,
                block.loaded,
                results,
                block.orders,
                writes=self._output.ranks.is_main,
            )
            values |= {"seconds": block.seconds, "orders": block.orders}
            self._output.append_journal("block", name, values)
        except BaseException as error:
            error.add_note(f"It came up while {file} was written.")
            raise
        return values
