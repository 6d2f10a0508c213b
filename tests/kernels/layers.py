"""Layers on which solvers differ: correlated inputs of unequal scale."""

import torch


def correlated(outputs, inputs, *, tokens=None, device="cpu", dtype=torch.float64):
    """Return a deterministic weight [O, I] and Gram matrix [I, I].

    The spectrum of the inputs falls as 1 / i; channels differ in scale, a few of them 15 times.
    """
    generator = torch.Generator().manual_seed(1000 * outputs + inputs)
    options = {"generator": generator, "dtype": torch.float64}
    basis = torch.linalg.qr(torch.randn(inputs, inputs, **options)).Q
    spectrum = torch.arange(1, inputs + 1, dtype=torch.float64).rsqrt()
    x = torch.randn(tokens or 16 * inputs, inputs, **options) * spectrum
    x = x @ basis.T + 0.15 * torch.randn(len(x), inputs, **options) / inputs**0.5
    loudness = (0.7 * torch.randn(inputs, **options)).exp()
    loudness[:: max(inputs // 6, 1)] *= 15
    weight = torch.randn(outputs, inputs, **options) / loudness.sqrt()
    x *= loudness
    return weight.to(device, dtype), (x.T @ x).to(device, dtype)


def loss(weight, target, gram, ridge=0.0):
    """Return tr((W − W′)(G + λI)(W − W′)ᵀ) in float64."""
    change = (weight - target).double()
    return float(((change @ gram.double()) * change).sum() + ridge * change.square().sum())


def lowest_half(score, dim=None):
    """Keep the higher half of each row or of ``dim`` neighbours."""
    groups = score.unflatten(1, (-1, dim or score.shape[1]))
    best = groups.topk(groups.shape[2] - groups.shape[2] // 2, dim=2).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(2, best, True).flatten(1)  # noqa: FBT003
