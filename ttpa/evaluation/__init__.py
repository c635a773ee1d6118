"""What a model gets right, and what a training changed in it."""

from ttpa.evaluation.calls import Evaluation, Outcome, evaluate_calls
from ttpa.evaluation.compare import Comparison, compare, comparison_table, evaluation_table

__all__ = ["Comparison", "Evaluation", "Outcome", "compare", "comparison_table", "evaluate_calls", "evaluation_table"]
