"""Reversed construction: scenario and tools first, real calls and results next, the question last."""

from ttpa.construct.generator import SPLITS, Split, construct_dialogues

__all__ = ["SPLITS", "Split", "construct_dialogues"]
