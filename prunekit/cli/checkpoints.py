"""Commands that convert a finished checkpoint, or upload it to the hub."""

from pathlib import Path
from typing import TYPE_CHECKING

from prunekit.cli.app import Switch, app, print_line

if TYPE_CHECKING:
    from prunekit.inference.convert import Conversion


@app.command
def convert(source: Path, target: Path, /, *, format: str) -> None:  # noqa: A002  the option's name
    """Convert a checkpoint to another storage format without changing any weight.

    Args:
        source: A checkpoint folder.
        target: A new folder.
        format: dense (every tool reads it), 2:4 (for patterns 2:4 and 1:4), 2:4-int8 (for those
            after "prunekit quantize --scheme int8") or bitmask (for any).
    """
    from prunekit.inference.convert import convert

    _print_conversion(convert(source, target, format))


@app.command
def migrate(source: Path, target: Path, /, *, format: str = "dense") -> None:  # noqa: A002
    """Convert a sparse checkpoint written by compressed-tensors.

    Current transformers silently fills the weights of such a checkpoint with random values.

    Args:
        source: A folder in the format sparse-24-bitmask or sparse-bitmask.
        target: A new folder.
        format: dense (every tool reads it), 2:4 (if the weights fit) or bitmask.
    """
    from prunekit.inference.convert import migrate

    _print_conversion(migrate(source, target, format))


@app.command
def push(
    folder: Path,
    repository: str,
    /,
    *,
    private: Switch = False,
    reports: Switch = False,
) -> None:
    """Upload a finished checkpoint to the Hugging Face hub.

    Args:
        folder: The output folder of a run.
        repository: org/name on the hub; created if there is none.
        private: Create it as a private one.
        reports: Upload report.json and report.html too, which name local paths.
    """
    from prunekit.checkpoint import push as hub

    hub.published_files(folder)
    hub.check_can_push(repository, repository)
    print_line(hub.push(folder, repository, private=private, reports=reports))


def _print_conversion(result: "Conversion") -> None:
    from prunekit.formatting import size

    print_line(f"{result.folder}: {size(result.before)} became {size(result.after)}.")
    if result.linears:
        counts = (
            f"{len(result.linears)} linear layers are compressed, {len(result.dense)} stay dense"
        )
        print_line(f"  {counts}.")
        for name, reason in [*result.dense.items()][:3]:
            print_line(f"  dense: {name}: {reason}")
        print_line("  To load it in Python: import prunekit, then transformers as ever.")
    for note in result.notes:
        print_line(f"  {note}")
