"""Commands that show runs, their status, and names for configs."""

from pathlib import Path
from typing import Literal

from prunekit.cli.app import Json, Switch, app, print_json, print_line, print_table
from prunekit.errors import ConfigError


@app.command
def compare(*folders: Path, latex: Switch = False, as_json: Json = False) -> None:
    """Show finished runs and sweeps as one table, seeds in one row.

    Runs that differ in nothing but their seed are one row.

    Args:
        folders: Output folders.
        latex: Print a LaTeX table instead of Markdown.
        as_json: Print JSON, with every value.
    """
    from prunekit.reports import compare as comparison
    from prunekit.reports import report as reports

    if not folders:
        raise ConfigError("compare: name the output folders of finished runs.")
    if latex and as_json:
        raise ConfigError("compare: --latex and --json exclude each other.")
    made = comparison.compare([reports.load(folder) for folder in folders])
    if as_json:
        print_json(made.as_dict())
    else:
        print_line(made.latex() if latex else made.markdown())


@app.command
def status(folder: Path, /, *, as_json: Json = False) -> None:
    """Show the stage of the run in a folder, or its end.

    Args:
        folder: The output folder of a run.
        as_json: Print JSON.
    """
    from prunekit.formatting import duration, percent
    from prunekit.runs.status import read_status

    found = read_status(folder)
    if as_json:
        print_json(found.as_dict())
        return
    task = f": {found.task}" if found.task and not found.stage.ended else ""
    print_line(f"{found.stage.title}{task}")
    if found.steps:
        print_line(f"  {found.done} of {found.steps} steps, {percent(found.progress)}")
    if found.seconds:
        print_line(f"  after {duration(found.seconds)}")
    if found.error:
        print_line(f"  {found.error}")


@app.command(name="list")
def list_(name: str | None = None, /, *, as_json: Json = False) -> None:
    """List methods with their settings, patterns, allocations, formats and architectures.

    Args:
        name: Only what has this name, or a kind of it such as "method"; all if left out.
        as_json: Print JSON.
    """
    from prunekit.cli.catalogue import as_table, catalogue, found

    entries = catalogue() if name is None else found(name)
    if as_json:
        print_json(entries)
    else:
        print_table(as_table(entries))


@app.command
def completion(shell: Literal["bash", "zsh", "fish"], /) -> None:
    """Print a script that completes commands and options in a shell.

    Args:
        shell: bash, zsh or fish; for bash: source <(prunekit completion bash)
    """
    print_line(app.generate_completion(prog_name="prunekit", shell=shell))
