"""Coverage-guided fuzzing of the readers of untrusted files.

``python tests/support/guided.py FOLDER [READER…] [-OPTION=VALUE…]`` takes options of libFuzzer,
such as -max_total_time=600. FOLDER holds the corpus and is created if it does not exist; an input
that fails a reader is saved there as crash-…, and the failure is in the reader's log.
"""

import os
import sys
from pathlib import Path

import atheris

sys.path[:0] = [str(Path(__file__).parents[2] / part) for part in (".", "kernels")]

WATCHED = ["prunekit", "tomllib"]
with atheris.instrument_imports(include=WATCHED):
    from tests.support import mutations, readers


def main(arguments: list[str]) -> int:
    """Fuzz each reader in its own process, and print how each ended."""
    options = [argument for argument in arguments if argument.startswith("-")]
    folder, *named = (argument for argument in arguments if not argument.startswith("-"))
    names = named or [*readers.READERS]
    place = Path(folder).resolve()
    if not place.exists():
        readers.lay_out(place)
    with atheris.instrument_imports(include=WATCHED):
        readers.warm(place, names)
    children = {}
    for name in names:
        children[name] = os.fork()
        if not children[name]:
            _fuzz(name, place / name, options)
    failed = False
    for name, child in children.items():
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        failed |= code != 0
        outcome = "FAILED" if code else "ok"
        sys.stdout.write(f"{name}: {outcome}, see {place / name / 'log'}\n")
    return int(failed)


def _fuzz(name: str, folder: Path, options: list[str]) -> None:
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    found = folder / "found"
    found.mkdir(exist_ok=True)
    limits = ["-max_len=20000", "-timeout=60", "-rss_limit_mb=4096", f"-artifact_prefix={folder}/"]
    read, change = readers.READERS[name], mutations.CHANGES[name]

    def mutate(content: bytes, most: int, seed: int) -> bytes:
        chance = mutations.Chance(seed)
        if chance.random() < 0.3:
            return atheris.Mutate(content, most)
        return change(content, chance)[:most]

    atheris.Setup(
        [name, *limits, *options, str(found), str(folder / "seeds")],
        lambda content: read(folder / "files", content),
        custom_mutator=mutate,
    )
    atheris.Fuzz()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
