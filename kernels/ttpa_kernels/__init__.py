"""Kernels for preference training: plain tensors in, plain tensors out."""

from ttpa_kernels.linear_logp.op import linear_logp

__all__ = ["linear_logp"]
