"""Check that a structured run fits into memory and on the disk."""

from prunekit.errors import CapacityError
from prunekit.formatting import size
from prunekit.runs.checks import check_disk
from prunekit.runs.preflight import available_memory
from prunekit.runs.sharded_training import held_words, ways_out
from prunekit.runs.structured.plan import StructuredPlan
from prunekit.runs.training_memory import saved_state_disk


def check_capacity(made: StructuredPlan) -> None:
    """Refuse a run that needs more memory or disk than is free.

    Raises:
        CapacityError: It does; the message says how it needs less.
    """
    available, host = available_memory(made.device, made.preflight)
    total, in_host, on_disk = made.place
    if in_host > host:
        way_out = "Take fewer or narrower kinds of units, or compensate = none"
        raise CapacityError(
            f"memory: the run needs about {size(in_host)} of main memory, {size(host)} are free. "
            + ('Set calibration.hidden = "disk".' if made.where == "host" else f"{way_out}.")
        )
    if total > available:
        trains, kinds = "training" in made.memory, " and ".join(made.groups)
        held = "one block" if made.by_block else "the whole model"
        what = f"{kinds} are ranked with {held} in memory"
        if trains and made.by_block:
            what = f"the model is trained with {held_words(made)} in memory"
        ways = ["a smaller model", *ways_out(made)] if trains else ["fewer or shorter samples"]
        if not (trains and made.by_block):
            ways.append("take a ranker that gathers less")
        raise CapacityError(
            f"memory: {what}, about {size(total)} on {made.device}; {size(available)} are free. "
            f"Take {', '.join(ways[:-1])}{', or ' * (len(ways) > 1)}{ways[-1]}."
        )
    if made.preflight and made.preflight.device_memory:
        return  # the disk of the other machine is unknown
    needed = made.checkpoint.nbytes + on_disk
    check_disk(
        made.config.output.path, needed, made.joining, made.least_joining, saved_state_disk(made)
    )
