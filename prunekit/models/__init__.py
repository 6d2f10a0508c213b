"""Transformers models: empty construction, weight loading, block-wise execution, units."""
