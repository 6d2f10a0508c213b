"""2:4 product on sparse tensor cores: the cases of sparse24_matmul."""

from bench.ops.sparse24_matmul import cases

__all__ = ["cases"]
