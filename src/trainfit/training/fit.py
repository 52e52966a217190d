"""Training, top to bottom: recipe -> data, model, step -> windows, evaluation, checkpoints -> summary."""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trainfit.errors import OutOfMemory, TrainfitError
from trainfit.models.family import family_of
from trainfit.step import ranks
from trainfit.step.names import Precision
from trainfit.step.precision import resolve_precision
from trainfit.step.training_step import StepResult
from trainfit.tasks.task import Evaluation, task_of
from trainfit.training import run_folder
from trainfit.training.best import Best
from trainfit.training.distributed import process_group
from trainfit.training.earlier_run import on_earlier_run
from trainfit.training.evaluation import evaluate_model
from trainfit.training.extents import largest_of
from trainfit.training.journal import Journal
from trainfit.training.lines import counted, diverged, evaluated_line, opening_lines, other_ranks
from trainfit.training.loader import STEP, Unreadable, default_workers, training_loader, window_plan
from trainfit.training.noise_watch import NoiseWatch
from trainfit.training.oom import HalfUpdated, Halving
from trainfit.training.recipe import Recipe, resolve_batching, resume_recipe
from trainfit.training.rehearsal import rehearse
from trainfit.training.saved_state import require_state
from trainfit.training.schedule import lr_factor, mix, set_lr
from trainfit.training.setup import (
    Choose,
    augmentation_of,
    load_data,
    make_step,
    make_survivor,
    require_task,
    restore,
    take_defaults,
    with_choice,
    with_weights,
    workload_of,
    write_recipe,
)
from trainfit.training.shortage import survival_line, survivals
from trainfit.training.summary import RunSummary
from trainfit.training.telemetry import Progress, Silent, memory_bytes
from trainfit.training.window_progress import WindowProgress
from trainfit.training.workers import LoaderDiedError

MOST_SKIPPED = 32
"""Windows in a row that fp16 may skip. Each halves the loss scale: 32 of them bring it from 2**16, where it starts, to 2**-16,
where only gradients above 4e9 overflow fp16; a run that skips as many has diverged, or its loss is not a number."""


def fit(
    recipe: Recipe,
    *,
    progress: Progress | None = None,
    stop: Callable[[], bool] = lambda: False,
    choose: Choose = take_defaults,
) -> RunSummary:
    """Train.

    Args:
        recipe: What is trained, on what, for how long.
        progress: Shows what happens.
        stop: Asked after every window: when it says so the state is saved and training ends.
        choose: Says what the recipe leaves open of the step's memory, once the data set is known.

    Raises:
        TrainfitError: whatever the user can repair, before the first step wherever possible.
    """
    with process_group(recipe.device) as device:
        show = progress if progress is not None and ranks.rank() == 0 else Silent()
        recipe = resume_recipe(recipe) if recipe.resume else with_weights(on_earlier_run(recipe))
        require_task(recipe)
        name = family_of(recipe.model)[1]
        with run_folder.opened(recipe.out, name, resume=recipe.resume is not None) as folder:
            return _Run(recipe, folder, device, show, choose).train(stop)


class _Run:
    """One training on one rank: what `fit` sets up, and the loop."""

    def __init__(self, recipe: Recipe, folder: Path, device: torch.device, show: Progress, choose: Choose) -> None:
        began = time.perf_counter()
        self.task = task_of(str(recipe.family.task))
        self.dataset = load_data(recipe, self.task, show)
        recipe = with_choice(recipe, self.dataset, device, choose, show)
        self.recipe = recipe
        self.folder = folder
        self.device = device
        self.show = show
        self.batching = resolve_batching(recipe, ranks.world_size())
        self.augmentation = augmentation_of(recipe)
        self.workload = workload_of(recipe, self.dataset.classes)
        self.task.require(self.dataset, self.workload)
        self.precision: Precision = resolve_precision(recipe.precision, device)
        self.workers = default_workers() if recipe.workers is None else recipe.workers
        records = self.dataset.splits["train"]
        batch = self.batching.effective_batch
        self.plan = window_plan(self.workload, records, effective_batch=batch, seed=recipe.seed)
        self.steps_per_epoch = self.plan.windows_per_epoch
        self.total_steps = min(recipe.epochs * self.steps_per_epoch, recipe.max_steps or 10**12)
        self.skipped: list[str] = []
        self.evaluation: Evaluation | None = None
        self.best = Best()
        self.step = make_step(self.workload, recipe, device, show)
        self.done = 0
        self.survivor = make_survivor(self.workload, self.step, self.batching)
        self.eval_micro_batch = recipe.eval_micro_batch or self.batching.micro_batch
        self.in_parts = Halving(self.eval_micro_batch, device, self.survivor.survived)
        self.began_at = self.reported = 0
        self.pending_evaluation = False
        self.saved_step: int | None = None
        if recipe.resume:
            self._resume()
            self.survivor.survived += survivals(run_folder.events(folder, "oom"), folder / run_folder.TELEMETRY)
            self.reported = len(self.survivor.survived)
        else:
            ranks.on_first_rank(partial(write_recipe, recipe, self.batching, folder))
        self.journal = Journal(
            self.folder,
            after_step=self.done,
            pending_evaluation=self.pending_evaluation,
            total_steps=self.total_steps,
            steps_per_epoch=self.steps_per_epoch,
            device=device,
            began=began,
            workers=self.workers,
            effective_batch=self.batching.effective_batch,
            trackers=recipe.trackers,
            show=show,
        )
        self.noise = NoiseWatch(self.step)
        self.window_progress = WindowProgress(self.step, show.note)
        how = f"{self.precision} on {device}; {self.batching.reason}"
        for line in opening_lines(self.task.summary(self.dataset), self.workload, how):
            show.note(line)
        show.note(
            f"{counted(self.steps_per_epoch, 'step')} an epoch, {self.total_steps} in all; run folder {self.folder}"
        )

    def train(self, stop: Callable[[], bool]) -> RunSummary:
        """Train all windows and return the summary; if memory runs out, save the state and say how to resume."""
        try:
            interrupted = self._loop(stop)
        except (OutOfMemory, LoaderDiedError) as error:
            self._report_survived()
            # A loader dies on a single rank, which must not wait for the others; a half-done update is not saved.
            alone = isinstance(error, LoaderDiedError) and ranks.world_size() > 1
            if not isinstance(error, HalfUpdated) and not alone:
                self.journal.flush()
                self._save()
            self.journal.close(self.done, interrupted=True, unseen=self.noise.reason)
            raise type(error)(
                f"{error}; go on from the saved state with trainfit train --resume {self.folder}"
            ) from None
        except ranks.LostRankError as error:
            self.journal.close(self.done, interrupted=True, unseen=self.noise.reason)
            raise ranks.LostRankError(f"{error} in the window after step {self.done}; {self._way_back()}") from None
        return self._finish(interrupted)

    def _way_back(self) -> str:
        """How to resume after ranks were lost. Nothing can be saved then, because all ranks agree before a save."""
        if self.saved_step is None:
            return "no state was saved yet: start again"
        launch = f"torchrun --nproc-per-node {ranks.world_size()} -m trainfit"
        return f"go on from the state saved after step {self.saved_step} with {launch} train --resume {self.folder}"

    def _loop(self, stop: Callable[[], bool]) -> bool:
        """Train window by window, and do what is due after each; return whether `stop` ended the loop."""
        interrupted = False
        train = self.dataset.splits["train"]
        steps = range(self.done, self.total_steps)
        size = max(self.plan.sizes)
        share = -(-self.batching.effective_batch // ranks.world_size())
        rehearse(
            self.step,
            self.survivor,
            self.in_parts,
            self.workload,
            self.task.worst_first(train),
            size=size,
            share=share,
            number=self.done,
        )
        self._report_survived()
        if self.pending_evaluation:
            self._evaluate()
            self._save_state()
        if self._ends_early():
            return False
        # A single rank must not leave its window out.
        options: Any = {"note": self.show.note, "stop": stop if ranks.world_size() == 1 else lambda: False}
        options |= {"augment": self.augmentation, "workers": self.workers, "folder": self.folder}
        loader = training_loader(train, self.workload.decoder(), self.plan, steps=steps, **options)
        self.saved_at = time.monotonic()
        self.step.requests = partial(self._requests, stop)
        for items in self.journal.clock.fetch(loader):
            self.window_progress.begin(self.done + 1, items)
            result = self._window(self._readable(items))
            self.done += 1
            lr = max(group["lr"] for group in self.step.optimizer.param_groups)
            largest = largest_of(self.task, items, self.done)
            self.journal.window(result, step=self.done, lr=lr, size=self.plan.size(self.done - 1), largest=largest)
            due = self._due()
            interrupted = self.step.agreed["stop"] > 0
            last = interrupted or self.done == self.total_steps
            save = due or last or self.step.agreed["save"] > 0
            if save:
                self.journal.flush()
            self._check_finite()
            self.pending_evaluation = due
            if save:
                self._save()
            if due:  # the state is saved already: whatever ends the evaluation, a resume repeats only the evaluation
                self._evaluate()
                self._save_state()
            if save:
                self.saved_at = time.monotonic()
                self.journal.event("pause", self.done, paused_s=self.journal.clock.pause())
            if last or (due and self._ends_early()):
                return interrupted
        if self.done == self.total_steps:  # a finished run was resumed: no window was left
            return False
        self._save()  # stopped while a window was waited for
        return True

    def _requests(self, stop: Callable[[], bool]) -> dict[str, float]:
        """What this rank requests after the window; all ranks do it if one of them requests it."""
        unsaved_s = time.monotonic() - self.saved_at
        return {"stop": float(stop()), "save": float(unsaved_s > 60 * self.recipe.save_minutes)}

    def _check_finite(self) -> None:
        skips = self.precision == "fp16"  # the loss scaler skips a window that is not finite, and tries a smaller scale
        if self.step.skipped_windows < MOST_SKIPPED if skips else self.journal.finite:
            return
        self.journal.flush()
        self.journal.close(self.done, interrupted=True, unseen=self.noise.reason)
        raise TrainfitError(diverged(self.done, MOST_SKIPPED if skips else 0, self.folder / run_folder.LAST))

    def _window(self, window: Sequence[Any]) -> StepResult:
        factor = lr_factor(self.done, self.recipe, steps_per_epoch=self.steps_per_epoch, total_steps=self.total_steps)
        set_lr(self.step.optimizer, factor)
        torch.manual_seed(mix(self.recipe.seed, STEP, self.done, ranks.rank()))
        survived = len(self.survivor.survived)
        with self.noise.window(self.done):
            result = self.survivor.run(self.step, window, number=self.done)
        self._report_survived()
        if sample := self.noise.sample(result, disturbed=len(self.survivor.survived) > survived):
            self.journal.noise_sample(sample, self.done + 1)
        return result

    def _report_survived(self) -> None:
        """Report what the survivor did since the last report, on the console and in telemetry.jsonl."""
        for event in self.survivor.survived[self.reported :]:
            self.show.note(survival_line(event))
            self.journal.event("oom", **dataclasses.asdict(event))
        self.reported = len(self.survivor.survived)

    def _readable(self, items: Sequence[Any]) -> list[Any]:
        for item in items:
            if isinstance(item, Unreadable) and item not in self.skipped:
                self.skipped.append(str(item))
                self.show.note(f"left out: {item}")
        return [item for item in items if not isinstance(item, Unreadable)]

    def _due(self) -> bool:
        """Whether an evaluation follows the window that was just trained."""
        if self.done == self.total_steps:
            return True
        if self.recipe.eval_steps is not None and self.done % self.recipe.eval_steps == 0:
            return True
        epoch, rest = divmod(self.done, self.steps_per_epoch)
        return rest == 0 and self.recipe.eval_every > 0 and epoch % self.recipe.eval_every == 0

    def _evaluate(self) -> None:
        records = self.dataset.splits["val"]
        evaluation = evaluate_model(
            self.step.ema or self.step.model,
            self.workload,
            records,
            self.task.metric(records, self.workload),
            micro_batch=self.eval_micro_batch,
            precision=self.precision,
            device=self.device,
            workers=self.workers,
            progress=self.show.evaluated,
            note=self.show.note,
            step=self.done - 1,
            in_parts=self.in_parts,
        )
        self.evaluation = evaluation
        self.pending_evaluation = False
        self._report_survived()
        epoch = (self.done - 1) // self.steps_per_epoch
        self.journal.evaluation(evaluation, step=self.done, epoch=epoch)
        better, chosen = self.best.take(evaluation.score, self.done)
        self.show.note(evaluated_line(evaluation, epoch=epoch + 1, step=self.done, better=better))
        if chosen:
            self._save_weights(run_folder.BEST)
            self.journal.graphics(evaluation)

    def _ends_early(self) -> bool:
        """Whether the epochs of `--early-stopping` have passed without a better evaluation."""
        patience = self.recipe.early_stopping
        if patience is None or self.best.stale_epochs(self.done, self.steps_per_epoch) < patience:
            return False
        self.show.note(
            f"stopped early: no better evaluation for {counted(patience, 'epoch')} (the best is of step {self.best.step}); "
            "--resume RUN --early-stopping N goes on"
        )
        return True

    def _save_weights(self, name: str) -> None:
        metadata = self.workload.metadata() | {"step": str(self.done), "score": json.dumps(self.best.score)}
        weights = (self.step.ema or self.step.model).state_dict()
        ranks.on_first_rank(lambda: run_folder.save_weights(self.folder / name, weights, metadata))

    def _save(self) -> None:
        """Save everything that a resume needs, and the present weights."""
        self._save_weights(run_folder.LAST)
        self._save_state()

    def _save_state(self) -> None:
        state = {
            "step": self.done,
            "model": self.step.model.state_dict(),
            "ema": self.step.ema.state_dict() if self.step.ema else None,
            "optimizer": self.step.optimizer.state_dict(),
            "scaler": self.step.scaler.state_dict(),
            "best": self.best.state(),
            "skipped": self.skipped,
            "survivor": self.survivor.state(),
            "skipped_windows": self.step.skipped_windows,
            "pending_evaluation": self.pending_evaluation,
            "world_size": ranks.world_size(),
        }

        def write() -> None:
            run_folder.save_state(self.folder / run_folder.STATE, state)
            self.saved_step = self.done

        ranks.on_first_rank(write)
        ranks.gather(None)  # no rank leaves before the state is on the disk: torchrun would end the one that writes it
        self.saved_step = self.done

    def _resume(self) -> None:
        choice = ranks.from_first_rank(lambda: json.dumps(run_folder.usable_state(self.folder, require_state)))
        name, remark = json.loads(choice)
        if remark:
            self.show.note(remark)
        if name is None:
            return
        path = self.folder / name
        state = run_folder.load_state(path, require_state)
        restore(self.step, state, path)
        self.done = state["step"]
        self.skipped = state["skipped"]
        self.best.load(state["best"])
        self.survivor.load(state["survivor"])
        self.pending_evaluation = state["pending_evaluation"]
        self.saved_step = self.began_at = self.done
        self.show.note(f"going on after step {self.done}")
        if state["world_size"] != ranks.world_size():
            self.show.note(other_ranks(ranks.world_size(), state["world_size"], self.batching.effective_batch))

    def _finish(self, interrupted: bool) -> RunSummary:
        if not interrupted and ranks.rank() == 0:
            weights, _ = run_folder.load_weights(self.folder / run_folder.BEST)
            path = self.folder / self.workload.export_name
            run_folder.write_atomically(path, lambda p: self.workload.export(weights, p))
        loader, noise = self.journal.close(self.done, interrupted=interrupted, unseen=self.noise.reason)
        spent = self.journal.clock.total
        seconds = spent.elapsed_s or float("inf")
        return RunSummary(
            folder=self.folder,
            model=self.workload.setting.model,
            steps=self.done,
            steps_here=self.done - self.began_at,
            total_steps=self.total_steps,
            images_per_s=spent.images * ranks.world_size() / seconds,
            train_s=spent.elapsed_s,
            loader=loader,
            noise=noise,
            memory_bytes=memory_bytes(self.device),
            evaluation=self.evaluation,
            best_score=self.best.score,
            best_step=self.best.step,
            exported=self.folder / self.workload.export_name,
            skipped_images=tuple(self.skipped),
            survived=tuple(self.survivor.survived),
            interrupted=interrupted,
        )
