"""ttpa: token-level preference training for tool-calling language models.

For other trainers: `token_dpo_loss` and `linear_token_dpo_loss` (the loss on a sparse matrix of token coefficients),
and `score_call` (every error of a tool call, and a score).
"""

from ttpa.esm.score import score_call
from ttpa.losses import linear_token_dpo_loss, token_dpo_loss

__all__ = ["linear_token_dpo_loss", "score_call", "token_dpo_loss"]
