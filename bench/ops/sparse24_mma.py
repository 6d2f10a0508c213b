"""2:4 product on sparse tensor cores: the cases of the portable one, where they are."""

from bench.ops.sparse24_matmul import cases

__all__ = ["cases"]
