"""The end of a training in a few lines, with the next command."""

from trainfit.models.family import family_of
from trainfit.reports.progress import GIB
from trainfit.reports.tables import table_text
from trainfit.reports.words import duration, rate
from trainfit.tasks.task import Inference, percent, task_of
from trainfit.training.lines import counted
from trainfit.training.run_files import PICTURES
from trainfit.training.run_folder import BEST, TELEMETRY
from trainfit.training.shortage import survival_line
from trainfit.training.summary import RunSummary


def summary_text(summary: RunSummary) -> str:
    """One sentence, the figures, and the next command."""
    folder = summary.folder
    if summary.interrupted:
        lines = [
            f"Stopped after step {summary.steps} of {summary.total_steps}; the state is saved.",
            *_survived(summary),
        ]
        return "\n".join([*lines, f"Go on:      trainfit train --resume {folder}"])
    name = summary.evaluation.score_name if summary.evaluation else "score"
    best = (
        f"best {name} {percent(summary.best_score)} at step {summary.best_step}"
        if summary.best_score is not None
        else f"no {name}"
    )
    if summary.steps_here:
        lines = [
            f"Trained {summary.model} for {counted(summary.steps_here, 'step')} in {duration(summary.train_s)}: {best}.",
            f"speed       {rate(summary.images_per_s)} images/s; {summary.loader}",
            f"memory      {summary.memory_bytes / GIB:.2f} GiB",
        ]
    else:
        lines = [f"{folder} is finished: {counted(summary.steps, 'step')}, {best}."]
        if summary.evaluation is None:  # of an earlier start, which printed it
            go_on = f"Go on:      trainfit train --resume {folder} --epochs N"
            return "\n".join([*lines, go_on, f"Next:       {_next(summary)}"])
    if summary.evaluation and summary.best_step != summary.steps:
        lines.append(
            f"evaluation  of step {summary.steps}, the last; the best weights are those of step {summary.best_step}"
        )
    lines += [table_text(table) for table in (summary.evaluation.tables if summary.evaluation else ())]
    if summary.skipped_images:
        lines.append(
            f"left out    {counted(len(summary.skipped_images), 'image')}: {'; '.join(summary.skipped_images)}"
        )
    lines.append(f"batch       {summary.noise}")
    lines += _survived(summary)
    if (folder / PICTURES).is_dir():
        lines.append(
            f"pictures    {folder / PICTURES}; trainfit report {folder} --html page.html shows them and the curves"
        )
    lines += [
        f"weights     {folder / BEST} (for the upstream project: {summary.exported})",
        f"Next:       {_next(summary)}",
    ]
    return "\n".join(lines)


def _next(summary: RunSummary) -> str:
    """The command that uses the weights."""
    task: object = task_of(str(family_of(summary.model)[0].task))
    if isinstance(task, Inference):
        return f"trainfit detect {summary.folder} IMAGE"
    return f"trainfit evaluate {summary.folder} --data DATA"


def _survived(summary: RunSummary) -> list[str]:
    """How often memory ran out since the start, and what was done; of many events the first and the last three."""
    events = [survival_line(event) for event in summary.survived]
    if len(events) > 6:
        events[3:-3] = [f"{len(events) - 6} more in {summary.folder / TELEMETRY}"]
    errors = sum(event.cause != "quiet" for event in summary.survived)
    return (
        [f"survived    {counted(errors, 'out-of-memory error')}", *(f"  {line}" for line in events)] if events else []
    )
