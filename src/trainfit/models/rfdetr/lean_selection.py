"""RF-DETR's choice of queries (two stages), some query groups at a time, and recomputed where the setting asks for it.

In training upstream (rfdetr 1.11.2 models/transformer.py `_two_stage_group_selection`) makes the proposals of all 13 query
groups at once: half a dozen float32 copies of all tokens for each group, at the peak of its backward. What comes of them are
the chosen queries alone. The groups have nothing in common but the tokens, so upstream's own function runs on some of them.
"""

from types import SimpleNamespace
from typing import Any, cast

import torch
from rfdetr.models.lwdetr import LWDETR
from rfdetr.models.transformer import Transformer
from torch.utils.checkpoint import checkpoint

from trainfit.step.checkpointing import is_recomputed

PIECE_BYTES = 2**22
"""Tokens of one image for the groups of a piece, in float32; of one group, where these are more. It does not depend on the
micro-batch, so that steps of every micro-batch are alike."""
BY_GROUP = ("enc_output", "enc_output_norm", "enc_out_class_embed", "enc_out_bbox_embed")
Chosen = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class LeanTransformer(Transformer):
    """Upstream's transformer. The values are upstream's; its gradient by the tokens is the same sum in another order."""

    def _two_stage_group_selection(
        self, output_memory: torch.Tensor, output_proposals: torch.Tensor, group_detr: int
    ) -> Chosen:
        at_once = max(1, PIECE_BYTES // (4 * output_memory[0].numel()))
        recomputed = is_recomputed(cast(torch.nn.Module, self.enc_output)) and torch.is_grad_enabled()
        pieces: list[Chosen] = []
        for first in range(0, group_detr, at_once):
            count = min(at_once, group_detr - first)
            some = self._groups(first, count)
            arguments = (some, output_memory, output_proposals, count)
            # torch takes the device from the arguments, and with it the autocast for the second time.
            made: Any = checkpoint(choose, *arguments, use_reentrant=False) if recomputed else choose(*arguments)
            pieces.append(made)
        return cast(Chosen, tuple(torch.cat(parts, 1) for parts in zip(*pieces, strict=True)))

    def _groups(self, first: int, count: int) -> Any:
        """What upstream's function reads of a transformer, with `count` of its groups."""
        own: dict[str, Any] = {name: list(getattr(self, name))[first : first + count] for name in BY_GROUP}
        own |= {name: getattr(self, name) for name in ("num_queries", "d_model", "bbox_reparam", "training")}
        return SimpleNamespace(**own)


choose: Any = Transformer._two_stage_group_selection  # pyright: ignore[reportPrivateUsage]
"""(transformer, tokens, proposals, groups) -> boxes, queries, boxes with their graph, and class scores of the chosen."""


def selection_of(model: torch.nn.Module) -> torch.nn.Module:
    """What stands for the choice among the blocks: the list of the groups' projections.

    It is never called, and its class says whether the choice is recomputed.
    """
    return cast(torch.nn.Module, cast(LWDETR, model).transformer.enc_output)
