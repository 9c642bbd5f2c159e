"""Ridge regression, and what distillation does to its bias and variance in closed form.

Shapes: D features, N samples in columns. Targets are y = X^T theta* + noise.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ridge(X_DN: Tensor, target_N: Tensor, *, ridge_lambda: float) -> Tensor:
    """(X X^T + lambda I)^-1 X target: (D,)."""
    return torch.linalg.solve(_gram(X_DN, ridge_lambda), X_DN @ target_N)


def shrinkage(X_DN: Tensor, *, ridge_lambda: float) -> Tensor:
    """P = (X X^T + lambda I)^-1 X X^T, which ridge regression does to theta* in the mean over the noise: (D, D)."""
    return torch.linalg.solve(_gram(X_DN, ridge_lambda), X_DN @ X_DN.T)


def distilled_ridge(X_DN: Tensor, y_N: Tensor, teacher_D: Tensor, *, alpha: float, ridge_lambda: float) -> Tensor:
    """Ridge regression to (1 - alpha) y + alpha X^T theta_t: a student on the samples that are kept."""
    return ridge(X_DN, (1 - alpha) * y_N + alpha * (X_DN.T @ teacher_D), ridge_lambda=ridge_lambda)


def distilled_bias(P_student_DD: Tensor, P_teacher_DD: Tensor, theta_D: Tensor, *, alpha: float) -> Tensor:
    """E theta_s - theta* = -(I - P_f) theta* - alpha P_f (I - P_t) theta*: (D,).

    P_f and P_t are the `shrinkage` of the student's and of the teacher's samples. The more samples the teacher has
    seen, the smaller I - P_t is (after Ben-Baruch et al., 2025, arXiv 2403.07854).
    """
    I_DD = torch.eye(len(theta_D), dtype=theta_D.dtype)
    return -(I_DD - P_student_DD) @ theta_D - alpha * P_student_DD @ (I_DD - P_teacher_DD) @ theta_D


def _gram(X_DN: Tensor, ridge_lambda: float) -> Tensor:
    return X_DN @ X_DN.T + ridge_lambda * torch.eye(len(X_DN), dtype=X_DN.dtype)
