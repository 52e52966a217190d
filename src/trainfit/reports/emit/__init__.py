"""Writes a plan as configuration of another tool, with notes on what the tool cannot express.

The emitted effective batch equals the plan's. Another tool is one function with `@register` (`models.emit`), in a family's
`emit.py` if it trains that family's models only, else in `trainers`.
"""

from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib import import_module

from trainfit.errors import TrainfitError
from trainfit.models.emit import TOOLS, Job, Tool
from trainfit.models.family import families, family_of
from trainfit.models.setting import Setting
from trainfit.planning.plan import Candidate, Plan
from trainfit.planning.rates import rate_factor
from trainfit.reports.plan import choice
from trainfit.tracing.events import CATEGORIES

__all__ = ["TOOLS", "Emitted", "emit"]

for _family in families().values():
    if _family.emit is not None:
        import_module(_family.emit)
import_module("trainfit.reports.emit.trainers")


@dataclass(frozen=True, kw_only=True)
class Emitted:
    """Configuration of another tool."""

    tool: str
    """Name of the tool."""
    text: str
    """Content of a file, or a command; YAML has its launch command in a comment."""
    notes: tuple[str, ...]
    """Differences between the tool and the plan."""


def emit(plan: Plan, tool: str) -> Emitted:
    """The plan as configuration of `tool`, a name of `TOOLS`; its effective batch equals the plan's.

    Raises:
        TrainfitError: no such tool, nothing fits, a tool for other models, or nothing that fits can be expressed.
    """
    if tool not in TOOLS:
        near = get_close_matches(tool, TOOLS, n=1)
        hint = f" Perhaps you meant {near[0]}." if near else ""
        raise TrainfitError(f"--emit {tool}: no such tool.{hint} Tools: {', '.join(TOOLS)}")
    writer = TOOLS[tool]
    kind = family_of(plan.model)[0].name
    if plan.chosen is None:
        raise TrainfitError(f"--emit {tool}: nothing fits {plan.gpu.name}, so there is nothing to write")
    if writer.families and kind not in writer.families:
        others = [each.name for each in TOOLS.values() if not each.families or kind in each.families]
        raise TrainfitError(f"--emit {tool}: {tool} does not train {plan.model}; these do: {', '.join(others)}")
    job, notes = _nearest(plan, plan.chosen, writer)
    text, more = writer.write(job)
    if job.setting.checkpointing == "offload":
        offload = f"{tool} keeps saved activations on the GPU, unless your code moves them: more memory than planned."
        more = [*more, offload]
    own = f"Memory and speed are those of trainfit's own training step; they do not include what {tool} itself adds."
    return Emitted(tool=tool, text=text, notes=(*notes, *more, plan.learning_rate, own))


def emitted_text(emitted: Emitted) -> str:
    """The configuration, then its notes as comments."""
    return "\n".join([emitted.text.rstrip("\n"), *(f"# {note}" for note in emitted.notes)])


def _nearest(plan: Plan, chosen: Candidate, tool: Tool) -> tuple[Job, list[str]]:
    """The plan's choice if the tool can express it, else the fastest that fits and that it can, else smaller micro-batches."""
    share, rest = divmod(plan.effective_batch, plan.gpus)
    if rest:
        raise TrainfitError(
            f"--emit {tool.name}: {plan.effective_batch} images do not divide evenly over {plan.gpus} GPUs, which "
            f"{tool.name} needs: plan with --effective-batch {share * plan.gpus or plan.gpus}"
        )

    def legal(c: Candidate) -> bool:
        even = len(set(c.cuts)) == 1 and sum(c.cuts) == share
        return even and (tool.accumulates or len(c.cuts) == 1) and tool.checkpoints(c.setting)

    expressible = [c for c in plan.candidates if c.verdict != "does not fit" and legal(c)]
    if legal(chosen):
        return _job(plan, replace(chosen.setting, accumulation=len(chosen.cuts))), []
    if expressible:
        best = max(expressible, key=lambda c: (c.images_per_s or 0.0, c.setting.micro_batch))
    elif tool.accumulates and tool.checkpoints(chosen.setting):
        micro = max(n for n in range(1, chosen.cuts[0] + 1) if share % n == 0)
        best = replace(chosen, cuts=(micro,) * (share // micro))
    else:
        lacks = "neither gradient accumulation nor" if not tool.accumulates else "not this"
        raise TrainfitError(
            f"--emit {tool.name}: {tool.name} has {lacks} activation checkpointing for {plan.model}, and without it no "
            f"effective batch of {plan.effective_batch} fits {plan.gpu.name}: plan with a smaller --effective-batch"
        )
    batching = {"micro_batch": best.cuts[0], "accumulation": len(best.cuts)}
    setting = replace(best.setting, eval_micro_batch=chosen.setting.eval_micro_batch, **batching)
    assert setting.micro_batch * setting.accumulation * plan.gpus == plan.effective_batch
    note = f"{tool.name} cannot express the plan's {choice(chosen)}; this is {choice(best)}, with the same effective batch."
    return _job(plan, setting), [note]


def _job(plan: Plan, setting: Setting) -> Job:
    parameter_bytes = spare_bytes = 0
    if plan.prediction is not None:
        parameter_bytes = plan.prediction.training.profile.peak.category_bytes[CATEGORIES.index("parameters")]
        spare_bytes = plan.budget.low_bytes - plan.prediction.needs.high_bytes
    return Job(
        setting=setting,
        gpus=plan.gpus,
        effective_batch=plan.effective_batch,
        workers=plan.loading.workers,
        rate_factor=rate_factor(setting, plan.effective_batch),
        parameter_bytes=parameter_bytes,
        spare_bytes=spare_bytes,
    )
