"""The end of a training in a few lines, with the next command."""

from trainfit.reports.ap_table import ap_table
from trainfit.reports.progress import GIB, duration
from trainfit.training.fit import RunSummary
from trainfit.training.oom import survival_line
from trainfit.training.run_folder import BEST, UPSTREAM


def summary_text(summary: RunSummary) -> str:
    """One sentence, the figures, what to do next."""
    folder = summary.folder
    if summary.interrupted:
        return (
            f"Stopped after step {summary.steps} of {summary.total_steps}; the state is saved.\n"
            f"Go on:      trainfit train --resume {folder}"
        )
    best = (
        f"best AP {_percent(summary.best_ap)} at step {summary.best_step}" if summary.best_ap is not None else "no AP"
    )
    lines = [
        f"Trained {summary.model} for {summary.steps} steps in {duration(summary.train_s)}: {best}.",
        f"speed       {summary.images_per_s:.3g} images/s, {summary.wait_share:.0%} of the time waiting for data",
        f"memory      {summary.memory_bytes / GIB:.2f} GiB",
    ]
    lines += [ap_table(result) for result in summary.ap.values()]
    if summary.skipped_images:
        lines.append(f"left out    {len(summary.skipped_images)} images: {'; '.join(summary.skipped_images)}")
    lines += [survival_line(event) for event in summary.survived]
    lines += [
        f"weights     {folder / BEST} (for upstream's pretrain_weights=: {folder / UPSTREAM})",
        f"Next:       trainfit detect {folder} IMAGE",
    ]
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "   -" if value is None else f"{100 * value:4.1f}"
