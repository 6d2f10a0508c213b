"""Probes of a running model: attention, inputs of linears, gradients."""
