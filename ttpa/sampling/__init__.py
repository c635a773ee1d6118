"""Token-level preference sampling: from dialogues to preference trees."""

from ttpa.sampling.options import SamplingOptions
from ttpa.sampling.paths import PathWriter
from ttpa.sampling.report import SamplingReport
from ttpa.sampling.tps import Progress, sample_decisions, sample_trees

__all__ = ["PathWriter", "Progress", "SamplingOptions", "SamplingReport", "sample_decisions", "sample_trees"]
