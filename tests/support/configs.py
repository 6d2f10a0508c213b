"""TOML texts of small configs."""

GOOD = """\
[model]
path = "Qwen/Qwen3-0.6B"
[calibration]
data = "pydoc:train"
[prune]
method = "sparsegpt"
pattern = "unstructured"
sparsity = 0.5
[output]
path = "out"
"""


def prune(lines: str, rest: str = '[calibration]\ndata = "pydoc:train"\n') -> str:
    """Return a config whose ``[prune]`` begins on line 1."""
    return f'[prune]\n{lines}\n{rest}[model]\npath = "a/b"\n[output]\npath = "out"\n'
