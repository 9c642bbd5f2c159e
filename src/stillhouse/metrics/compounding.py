"""What a small error of every step costs over many steps: if no error is ever made good, if each is, or some are."""

from __future__ import annotations


def expected_errors(error: float, steps: int, *, recovery: float = 0.0) -> float:
    """Expected number of wrong ones among ``steps`` steps.

    A step goes wrong with probability ``error`` where the one before was right. After a wrong one it is wrong too,
    unless the student finds back, which has probability ``recovery``; then it errs as any other.

    Without recovery an error is the end: ``steps - sum_t (1 - error)^t``, about error T^2 / 2 while that is small, as
    for a student that has learnt on its teacher's path only. With ``recovery=1`` it is ``error T``, as for one that was
    corrected on its own (Ross, Gordon and Bagnell, 2011, arXiv 1011.0686; card 151).

    Raises ``ValueError`` unless both probabilities lie in [0, 1] and ``steps`` is not negative.
    """
    if not (0 <= error <= 1 and 0 <= recovery <= 1):
        raise ValueError(f"error and recovery must lie in [0, 1], got {error} and {recovery}")
    if steps < 0:
        raise ValueError(f"steps must not be negative, got {steps}")
    stays = (1 - recovery) * (1 - error)  # how much of having been wrong is left a step later, compared with error
    if stays == 1:
        return 0.0
    return error / (1 - stays) * (steps - stays * (1 - stays**steps) / (1 - stays))
