"""The loss in the trainers of others: log-probabilities in, loss out."""
