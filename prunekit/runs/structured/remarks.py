"""Notes of a plan of a run that removes units."""

from contextlib import suppress

from prunekit.errors import PrunekitError
from prunekit.models.units.find import unit_groups
from prunekit.models.units.kinds import WHOLE
from prunekit.runs.structured.plan import StructuredPlan
from prunekit.runs.structured.written import rounding_notes


def remarks_of(made: StructuredPlan) -> list[str]:
    """Return the notes about the written checkpoint."""
    prune = made.config.prune
    remarks = [
        f"Of hidden dimensions a multiple of {group.unit_multiple(prune.round_to)} stays, "
        "rounded up: transformers wants a number that the heads divide."
        for group in made.groups.get("hidden", ())
        if group.unit_multiple(1) > 1
    ]
    remarks += [
        f"{name}.{unit} stays whatever its score: no stock config can leave it out."
        for name, units in made.fixed.items()
        for unit in units
    ]
    remarks += rounding_notes(made)
    if not prune.uniform and not WHOLE.issuperset(prune.pattern):
        remarks.append(
            "Layers may keep different numbers of units: the folder opens with prunekit.load, and "
            "with transformers after `import prunekit`. uniform = true makes it one that any tool "
            "opens."
        )
    return remarks + _apt_remarks(made)


def _apt_remarks(made: StructuredPlan) -> list[str]:
    """Return the notes about windows and kinds of ``[apt]``."""
    apt = made.config.apt
    if apt is None:
        return []
    remarks = []
    if apt.decay * apt.window < 1:
        left = 1 - apt.decay * apt.window
        remarks.append(
            f"apt.decay: in a window of {apt.window} steps gates fall by {1 - left:g}, so that "
            f"units are removed with a gate of {left:g} still open: they then vanish at once. "
            f"decay = {1 / apt.window:.2g} closes them."
        )
    if "hidden" not in apt.kinds:
        with suppress(PrunekitError):
            unit_groups(made.model, "hidden")
            remarks.append(
                "apt.kinds: of this family hidden dimensions can be removed too; they are kept."
            )
    return remarks
