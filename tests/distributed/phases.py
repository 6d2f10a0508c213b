"""Scripts that stop ranks in a phase of a run, or slow them down, for a fault to be injected."""

PHASES = {
    "begin": ("prunekit.runs.base", "RunBase", "_texts", 1),
    "calibrate": ("prunekit.sparsify.block_pruner", "BlockPruner", "_gather", 2),
    "prune": ("prunekit.sparsify.block_pruner", "BlockPruner", "_prune_stage", 6),
    "write": ("prunekit.runs.sparsify.shards", "ShardWriter", "write_block", 2),
    "finish": ("prunekit.runs.sparsify.shards", "ShardWriter", "finish", 1),
    "verify": ("prunekit.runs.sparsify.run", "SparsifyRun", "_verify", 1),
}
"""Module, class, method and call in which a phase is; rank 0 alone texts, finishes and verifies."""
PRUNE_BLOCK = ("prunekit.sparsify.block_pruner", "BlockPruner", "prune", 1)
HOOK = """
import importlib, os, time
def hook(module, owner, name, call):
    owner = getattr(importlib.import_module(module), owner)
    real, calls = getattr(owner, name), [0]
    def wait(self, *given, **options):
        calls[0] += 1
        if calls[0] == call:
            open({folder!r} + f"/reached-{{rank}}", "w").close()
            end = time.monotonic() + 20
            while not os.path.exists({folder!r} + "/go") and time.monotonic() < end:
                time.sleep(0.01)
        return real(self, *given, **options)
    setattr(owner, name, wait)
hook{phase!r}
"""
PATIENCE = """
from prunekit.distributed import calls, heartbeat as watch, join as joining
watch.BEAT_SECONDS, watch.SUSPECT_SECONDS, watch.GRACE_SECONDS = 0.1, 1.5, 0.4
watch.DEAD_SECONDS, calls.STALL_SECONDS, joining.JOIN_SECONDS = 3.0, 4.0, 5.0
"""
"""A tenth of the times of a run."""
CLI = """
from prunekit.cli import main as cli
from prunekit.models.sequential import pipeline
pipeline.BATCH_TOKENS["cpu"] = 4 * 24
code = cli.main(["run", *arguments, "--quiet"])
"""


def stop_in(phase: str, folder: object) -> str:
    """Return a script in which ranks wait in a phase for the file ``go`` in a folder."""
    return HOOK.format(phase=PHASES[phase], folder=str(folder))


def slow_blocks(seconds: float, phase: str = "prune") -> str:
    """Return a script after which each block takes longer to be pruned, or written."""
    module, owner, name, _ = {"prune": PRUNE_BLOCK, "write": PHASES["write"]}[phase]
    return f"""
import importlib, time
owner = importlib.import_module({module!r}).{owner}
real = owner.{name}
def slow(*arguments, **options):
    time.sleep({seconds})
    return real(*arguments, **options)
owner.{name} = slow
"""
