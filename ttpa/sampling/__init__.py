"""Token-level preference sampling: from dialogues to preference trees."""

from ttpa.sampling.options import SamplingOptions
from ttpa.sampling.report import SamplingReport
from ttpa.sampling.tps import sample_trees

__all__ = ["SamplingOptions", "SamplingReport", "sample_trees"]
