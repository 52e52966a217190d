"""Gradients as multiples and sums of other gradients."""

from collections.abc import Sequence

import torch

from trainfit.exactness.record import Gradients
from trainfit.exactness.runs import parameter_errors

FIT = 1e-6
"""Relative residual below which weights of the micro-batches explain the big batch's gradient."""


def ratio_of(mine: Gradients, truth: Gradients) -> float | None:
    """The factor c if `mine` is c times `truth` up to rounding, else None."""
    square = sum(float((value * value).sum()) for value in truth.values())
    if not square:
        return None
    c = sum(float((mine[name] * value).sum()) for name, value in truth.items() if name in mine) / square
    scaled = {name: c * value for name, value in truth.items()}
    return c if c and max(parameter_errors(mine, scaled).values()) < FIT else None


def counted_again(mine: Gradients, truth: Gradients, parts: int, limit: float) -> list[str]:
    """Parameters whose gradient is `parts` times the true one, if all others are exact."""
    errors = parameter_errors(mine, truth)
    wrong = [name for name, error in errors.items() if error > limit]
    again = parameter_errors(mine, {n: parts * value if n in wrong else value for n, value in truth.items()})
    right = len(wrong) < len(errors) and max(again.values()) < max(limit, FIT)
    return wrong if right else []


def fitted(parts: Sequence[Gradients], whole_gradient: Gradients) -> tuple[list[float], float]:
    """Least-squares weights with which the parts' gradients add up to the whole gradient, and the relative residual."""
    names = sorted(whole_gradient)
    columns = [
        torch.cat([(part[n] if n in part else torch.zeros_like(whole_gradient[n])).flatten() for n in names])
        for part in parts
    ]
    matrix = torch.stack(columns, dim=1).double().cpu()
    goal = torch.cat([whole_gradient[n].flatten() for n in names]).double().cpu()
    solution = torch.linalg.lstsq(matrix, goal[:, None], driver="gelsd").solution[:, 0]
    residual = float((matrix @ solution - goal).norm() / goal.norm().clamp_min(1e-300))
    return [round(w, 9) for w in solution.tolist()], residual


def norm_of(gradients: Gradients) -> float:
    """The norm of all gradients together."""
    return float(sum(float(value.norm()) ** 2 for value in gradients.values()) ** 0.5)
