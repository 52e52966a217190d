"""The state of the random numbers, to draw the same ones again."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class RandomState:
    """State of the random numbers on the CPU and the step's device."""

    cpu: torch.Tensor
    gpu: torch.Tensor | None

    @staticmethod
    def now(device: torch.device) -> "RandomState":
        """The state as it is."""
        gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return RandomState(cpu=torch.get_rng_state(), gpu=gpu)

    def restore(self, device: torch.device) -> None:
        """Draw from here on what was drawn after `now`."""
        torch.set_rng_state(self.cpu)
        if self.gpu is not None:
            torch.cuda.set_rng_state(self.gpu, device)
