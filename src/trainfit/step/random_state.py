"""The state of the random number generators, so that the same numbers can be drawn again."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class RandomState:
    """State of the random number generators of the CPU and the step's device."""

    cpu: torch.Tensor
    """State of the CPU's generator."""
    gpu: torch.Tensor | None
    """State of the GPU's generator; None for a step on the CPU."""

    @staticmethod
    def now(device: torch.device) -> "RandomState":
        """Return the current state."""
        gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return RandomState(cpu=torch.get_rng_state(), gpu=gpu)

    def restore(self, device: torch.device) -> None:
        """Set the generators to this state."""
        torch.set_rng_state(self.cpu)
        if self.gpu is not None:
            torch.cuda.set_rng_state(self.gpu, device)
