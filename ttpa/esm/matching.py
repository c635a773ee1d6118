"""The best one-to-one assignment of a small matrix of scores."""

from __future__ import annotations

from collections.abc import Sequence


def best_assignment(score: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
    """Pairs (row, column), as many as the shorter side has, with the greatest sum of scores; sorted by row.

    The Hungarian method with potentials (Kuhn 1955; shortest augmenting paths), cubic in the number of rows.
    """
    rows, columns = len(score), len(score[0]) if score else 0
    if rows > columns:
        return sorted((i, j) for j, i in best_assignment([list(column) for column in zip(*score, strict=True)]))
    # Index 0 of rows and columns is a dummy from which each search starts.
    row_of = [0] * (columns + 1)
    row_potential, column_potential = [0.0] * (rows + 1), [0.0] * (columns + 1)
    for row in range(1, rows + 1):
        row_of[0], at = row, 0
        slack, previous = [float("inf")] * (columns + 1), [0] * (columns + 1)
        visited: set[int] = set()
        while row_of[at]:
            visited.add(at)
            i = row_of[at]
            for j in set(range(1, columns + 1)) - visited:
                reduced = -score[i - 1][j - 1] - row_potential[i] - column_potential[j]
                if reduced < slack[j]:
                    slack[j], previous[j] = reduced, at
            following = min((j for j in range(1, columns + 1) if j not in visited), key=slack.__getitem__)
            step = slack[following]
            for j in range(columns + 1):
                if j in visited:
                    row_potential[row_of[j]] += step
                    column_potential[j] -= step
                else:
                    slack[j] -= step
            at = following
        while at:
            row_of[at] = row_of[previous[at]]
            at = previous[at]
    return sorted((row_of[j] - 1, j - 1) for j in range(1, columns + 1) if row_of[j])
