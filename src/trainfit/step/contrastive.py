"""The exact gradient of a loss over all pairs of a window, by cached features, with the memory of a micro-batch."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from trainfit.step import ranks
from trainfit.step.names import Precision
from trainfit.step.precision import autocast
from trainfit.step.random_state import RandomState
from trainfit.step.terms import LossTerm
from trainfit.step.window import cut, share

Features = Sequence[torch.Tensor]
"""Features of samples: tensors (n, d) of one row per sample; d may differ between the tensors."""
FeatureFunction = Callable[[torch.nn.Module, Sequence[Any]], Features]
TermsFunction = Callable[[torch.nn.Module, Sequence[Any]], tuple[Features, Mapping[str, LossTerm]]]


@dataclass(frozen=True, kw_only=True)
class Tower:
    """A part of the model that computes features of each sample independently."""

    features: FeatureFunction
    """(model, micro-batch) -> features; moves the samples to the device."""
    learns: bool = True
    """Whether gradients flow into the tower. A tower that does not learn (a locked one, a teacher) runs once, without
    gradients."""
    ratio: float = 1.0
    """Samples in one forward and backward of this tower, as a multiple of the step's micro-batch."""
    with_terms: TermsFunction | None = None
    """Returns the same features, and loss terms that are sums over samples (CoCa's caption loss): the pass with gradients
    calls it instead of `features`. Counts of the terms come from `Contrastive.counts`."""


def _no_counts(_window: Sequence[Any]) -> Mapping[str, float]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Contrastive:
    """A coupled objective: a loss over the features of all pairs of the window, on all ranks."""

    features: FeatureFunction | Sequence[Tower]
    """(model, micro-batch) -> the features of all towers, which then run together; or the towers, which run one after another,
    so that only one uses memory at a time. Put the largest last: the graph of its last micro-batch is kept."""
    rows_loss: Callable[..., torch.Tensor | Mapping[str, torch.Tensor]]
    """(model, each feature of all pairs (N, d) in the order of the towers, rows) -> the loss of these rows: a scalar, or
    scalars by name. The losses of all rows add up to the loss of the window. Reads scale and bias from the model."""
    chunk_rows: int = 1024
    """Rows of the N x N logits that exist at one time."""
    names: tuple[str, ...] = ("contrastive",)
    """Names of the losses that `rows_loss` returns."""
    counts: Callable[[Sequence[Any]], Mapping[str, float]] = _no_counts
    """Samples -> the count of every term of `Tower.with_terms` by its name, as `Objective.counts`."""
    constrain: Callable[[torch.nn.Module], None] | None = None
    """Brings parameters back into their bounds after the optimizer's step (CLIP's scale); it must be idempotent."""

    @property
    def towers(self) -> Sequence[Tower]:
        """The towers; a single one if they run together."""
        return (Tower(features=self.features),) if callable(self.features) else self.features


@dataclass(kw_only=True, eq=False)
class _Pass:
    """The passes of one tower over the window."""

    tower: Tower
    """The tower."""
    parts: Sequence[Sequence[Any]]
    """Micro-batches of this tower."""
    keeps_last: bool = False
    """Whether the graph of the last micro-batch is kept, so that it does not run again."""
    learned_features: int = 0
    """Number of features that the tower computes of a sample; 0 if it does not learn."""
    random_states: list[RandomState] = field(default_factory=list[RandomState])
    """Random state before each micro-batch that runs again."""
    last: tuple[Features, Mapping[str, LossTerm]] | None = None
    """Features and terms of the last micro-batch, if its graph is kept."""


def accumulate_contrastive(
    model: torch.nn.Module,
    objective: Contrastive,
    micro_batches: Sequence[Sequence[Any]],
    *,
    device: torch.device,
    precision: Precision = "fp32",
    scaler: torch.amp.GradScaler | None = None,
    after_micro_batch: Callable[[int], None] | None = None,
    last_backward: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> dict[str, torch.Tensor]:
    """Add the window's gradient to `.grad`, equal to that of one big batch on all ranks together.

    Features of every micro-batch but the last are computed without gradients. The loss is computed once, on these features
    as leaves, which gives the exact gradients of the features, the scale and the bias. Then each micro-batch runs again
    with gradients, draws the same random numbers, and its backward starts from the gradients of its features (GradCache,
    Gao et al. 2021, arXiv 2101.06983). The last micro-batch keeps its graph, so that a single micro-batch is the plain step.
    Of towers that run one after another, only the last keeps a graph, unless each is a single micro-batch. Buffers
    (BatchNorm's running statistics) are updated once per micro-batch.

    If one rank runs out of memory before a collective, all ranks raise, so that none waits; after the last collective it
    raises alone. Gradients must be summed over the ranks, not averaged; see `accumulate`.

    Returns:
        This rank's share of the window's losses by name, scalars on `device`.
    """
    window = [sample for micro_batch in micro_batches for sample in micro_batch]
    counts = ranks.sum_over_ranks(objective.counts(window))
    run = _Run(model, counts, device=device, precision=precision, scaler=scaler, after_micro_batch=after_micro_batch)
    passes = _passes(objective.towers, micro_batches)
    own = ranks.together(lambda: [run.cached_features(each) for each in passes])
    gathered = _gather(own, [each.tower.learns for each in passes], like=next(model.parameters()))
    run.losses |= ranks.together(partial(run.backward_rows, objective, gathered))
    gradients = gathered.own_gradients()
    del own, gathered
    run.backward_towers(passes, gradients, last_backward)
    return run.losses


def _passes(towers: Sequence[Tower], micro_batches: Sequence[Sequence[Any]]) -> list[_Pass]:
    """The pass of each tower: its cut of the window, and whether it keeps a graph."""
    largest = max((len(micro_batch) for micro_batch in micro_batches), default=1)
    window = [sample for micro_batch in micro_batches for sample in micro_batch]

    def parts(tower: Tower) -> Sequence[Sequence[Any]]:
        if tower.ratio == 1:
            return micro_batches
        return cut(window, 1 if largest == 1 else math.ceil(largest * tower.ratio))

    passes = [_Pass(tower=tower, parts=parts(tower)) for tower in towers]
    learning = [each for each in passes if each.tower.learns]
    plain = all(len(each.parts) <= 1 for each in learning)
    for each in learning:
        each.keeps_last = plain or each is learning[-1]
    return passes


class _Run:
    """State shared by the phases of one window's gradient."""

    def __init__(
        self,
        model: torch.nn.Module,
        counts: Mapping[str, float],
        *,
        device: torch.device,
        precision: Precision,
        scaler: torch.amp.GradScaler | None,
        after_micro_batch: Callable[[int], None] | None,
    ) -> None:
        self.model = model
        self.counts = counts
        self.device = device
        self.scaler = scaler
        self.precision: Precision = precision
        self.progress: Callable[[int], None] = after_micro_batch or (lambda images: None)  # noqa: ARG005
        self.losses = {name: torch.zeros((), device=device) for name in counts}

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        return self.scaler.scale(loss) if self.scaler is not None else loss

    def forward(self, tower: Tower, part: Sequence[Any]) -> tuple[Features, Mapping[str, LossTerm]]:
        """Features in at least float32, and the tower's loss terms if gradients are enabled."""
        with autocast(self.precision, self.device.type):
            if tower.with_terms is not None and torch.is_grad_enabled():
                features, terms = tower.with_terms(self.model, part)
            else:
                features = tower.features(self.model, part)
                terms = {}
        return [f.to(torch.promote_types(f.dtype, torch.float32)) for f in features], terms

    def cached_features(self, tower_pass: _Pass) -> list[torch.Tensor]:
        """The tower's features of this rank's samples, detached from the graph."""
        columns: list[Features] = []
        for number, part in enumerate(tower_pass.parts, 1):
            if tower_pass.keeps_last and number == len(tower_pass.parts):
                tower_pass.last = self.forward(tower_pass.tower, part)
                columns.append([feature.detach() for feature in tower_pass.last[0]])
                continue
            if tower_pass.tower.learns:
                tower_pass.random_states.append(RandomState.now(self.device))
            with torch.no_grad():
                columns.append(self.forward(tower_pass.tower, part)[0])
            self.progress(0)
        tower_pass.learned_features = len(columns[0]) if columns and tower_pass.tower.learns else 0
        return [torch.cat(column) for column in zip(*columns, strict=True)]

    def backward_rows(self, objective: Contrastive, gathered: "_GatheredFeatures") -> dict[str, torch.Tensor]:
        """Backward of the loss of this rank's rows, a chunk at a time; returns its value by name."""
        totals = {name: torch.zeros((), device=self.device) for name in objective.names}
        for start in range(gathered.rows.start, gathered.rows.stop, objective.chunk_rows):
            chunk = slice(start, min(start + objective.chunk_rows, gathered.rows.stop))
            with autocast(self.precision, self.device.type):
                losses = objective.rows_loss(self.model, *gathered.features, chunk)
                named = {objective.names[0]: losses} if isinstance(losses, torch.Tensor) else losses
                loss = torch.stack(list(named.values())).sum()
            self.scaled(loss).backward()
            for name, value in named.items():
                totals[name] = totals[name] + value.detach()
        return totals

    def backward_towers(
        self,
        passes: Sequence[_Pass],
        gradients: Sequence[torch.Tensor],
        last_backward: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """Propagate the gradients of this rank's features through the towers: the kept graphs first, then each micro-batch
        again.
        """
        jobs: list[tuple[_Pass, int, list[torch.Tensor]]] = []
        remaining = list(gradients)
        for tower_pass in passes:
            own = remaining[: tower_pass.learned_features]
            remaining = remaining[tower_pass.learned_features :]
            sizes = [len(part) for part in tower_pass.parts]
            cuts = zip(*(gradient.split(sizes) for gradient in own), strict=True)
            jobs += [(tower_pass, number, list(of_part)) for number, of_part in enumerate(cuts)]
        jobs.sort(key=lambda job: job[1] < len(job[0].random_states))
        runs_again = any(tower_pass.random_states for tower_pass in passes)
        buffers = [buffer.clone() for buffer in self.model.buffers()] if runs_again else None
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            for count, (tower_pass, number, of_part) in enumerate(jobs, 1):
                with last_backward() if count == len(jobs) else nullcontext():
                    self.backward_part(tower_pass, number, of_part)
                if tower_pass is passes[-1]:
                    self.progress(len(tower_pass.parts[number]))
        if buffers is not None:
            with torch.no_grad():
                for buffer, after in zip(self.model.buffers(), buffers, strict=True):
                    buffer.copy_(after)

    def backward_part(self, tower_pass: _Pass, number: int, gradients: Sequence[torch.Tensor]) -> None:
        """Backward of one micro-batch of a tower, through the kept graph or a new one."""
        if number < len(tower_pass.random_states):
            tower_pass.random_states[number].restore(self.device)
            features, terms = self.forward(tower_pass.tower, tower_pass.parts[number])
        else:
            assert tower_pass.last is not None
            features, terms = tower_pass.last
            tower_pass.last = None
        pairs = [(f, gradient) for f, gradient in zip(features, gradients, strict=True) if f.requires_grad]
        for name, term in terms.items():
            loss = share(name, term, self.counts, len(tower_pass.parts[number]))
            self.losses[name] = self.losses[name] + loss.detach()
            scaled = self.scaled(loss)
            pairs.append((scaled, torch.ones_like(scaled)))
        if pairs:
            torch.autograd.backward([root for root, _ in pairs], [gradient for _, gradient in pairs])


@dataclass(frozen=True, kw_only=True)
class _GatheredFeatures:
    """The features of all pairs of the window, on all ranks."""

    features: list[torch.Tensor]
    """(N, d) each; those that learn are leaves with an allocated `.grad`."""
    rows: slice
    """The rows of this rank."""
    gradient: torch.Tensor | None
    """Their `.grad`s in one tensor, which is summed over the ranks; None in a run of one process."""

    def own_gradients(self) -> list[torch.Tensor]:
        """The gradients of this rank's features that learn, summed over the ranks: a collective call."""
        if self.gradient is not None:
            _sum(self.gradient)
        gradients = [feature.grad for feature in self.features if feature.grad is not None]
        return gradients if self.gradient is None else [gradient[self.rows].clone() for gradient in gradients]


def _gather(own: Sequence[Sequence[torch.Tensor]], learns: Sequence[bool], *, like: torch.Tensor) -> _GatheredFeatures:
    """Features of all ranks, by one collective. A rank's share may have any size or be empty: its rows are written into zeros,
    which are summed over the ranks.
    """
    mine: list[tuple[torch.Tensor, bool]] = []
    for features, learned in zip(own, learns, strict=True):
        mine += [(feature, learned) for feature in features]
    if ranks.world_size() == 1:
        for feature, learned in mine:
            if learned:
                feature.requires_grad_().grad = torch.zeros_like(feature)
        rows = slice(0, len(mine[0][0]) if mine else 0)
        return _GatheredFeatures(features=[feature for feature, _ in mine], rows=rows, gradient=None)
    shapes = ranks.gather((len(mine[0][0]) if mine else 0, [(f.shape[1], learned) for f, learned in mine]))
    sizes = [size for size, _ in shapes]
    widths_of_all = next((widths for _, widths in shapes if widths), [])
    start = sum(sizes[: ranks.rank()])
    rows = slice(start, start + sizes[ranks.rank()])
    dtype = torch.promote_types(like.dtype, torch.float32)

    def zeros(widths: Sequence[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Zeros for features of these widths, and the view (N, d) of each feature."""
        elements = [sum(sizes) * width for width in widths]
        whole = torch.zeros(sum(elements), dtype=dtype, device=like.device)
        return whole, [part.view(-1, width) for part, width in zip(whole.split(elements), widths, strict=True)]

    def allocate() -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor, list[torch.Tensor]]:
        whole, features = zeros([width for width, _ in widths_of_all])
        gradient, gradients = zeros([width for width, learned in widths_of_all if learned])
        for feature, (own_rows, _) in zip(features, mine, strict=False):
            feature[rows] = own_rows
        return whole, features, gradient, gradients

    whole, features, gradient, gradients = ranks.together(allocate)
    _sum(whole)
    parts = iter(gradients)
    for feature, (_, learned) in zip(features, widths_of_all, strict=True):
        if learned:
            feature.requires_grad_().grad = next(parts)
    return _GatheredFeatures(features=features, rows=rows, gradient=gradient)


def _sum(tensor: torch.Tensor) -> torch.Tensor:
    with ranks.collective():
        dist.all_reduce(tensor)
    return tensor
