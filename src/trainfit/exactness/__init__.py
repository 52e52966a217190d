"""Whether a training loop that is not ours accumulates the big batch's gradient, and if not, why."""
