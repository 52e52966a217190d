"""trainfit: which training of a vision model fits a GPU, and the training itself. Importing it imports no torch.

Each name is imported from its module when it is first used. `docs/api.md` shows them.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainfit.api import (
        as_html,
        as_json,
        as_text,
        check_data,
        detect,
        emit,
        evaluate,
        measure,
        plan,
        predict,
        report,
        save_plan,
        train,
    )
    from trainfit.errors import OutOfMemory, TrainfitError
    from trainfit.exactness.check import check_exactness
    from trainfit.exactness.loop import Exactness, OwnLoop
    from trainfit.explaining.explain import Explanation, explain
    from trainfit.gpus.catalogue import Gpu, find_gpu
    from trainfit.measuring.search import Measured
    from trainfit.memory.predict import Prediction
    from trainfit.models.custom.workload import CustomTask
    from trainfit.models.family import Family, model_names, register
    from trainfit.models.setting import Setting, make_setting
    from trainfit.planning.plan import Plan
    from trainfit.reports.emit import Emitted
    from trainfit.reports.run_report import RunReport
    from trainfit.step.contrastive import Contrastive
    from trainfit.step.terms import LossTerm, Objective
    from trainfit.step.training_step import TrainingStep
    from trainfit.tasks.task import DataCheck, Evaluation
    from trainfit.training.accumulate import Accumulation, accumulate
    from trainfit.training.oom import Survivor
    from trainfit.training.recipe import Recipe
    from trainfit.training.summary import RunSummary
    from trainfit.training.survive import SurvivingStep, survive_oom

    __version__: str

__all__ = [
    "Accumulation",
    "Contrastive",
    "CustomTask",
    "DataCheck",
    "Emitted",
    "Evaluation",
    "Exactness",
    "Explanation",
    "Family",
    "Gpu",
    "LossTerm",
    "Measured",
    "Objective",
    "OutOfMemory",
    "OwnLoop",
    "Plan",
    "Prediction",
    "Recipe",
    "RunReport",
    "RunSummary",
    "Setting",
    "SurvivingStep",
    "Survivor",
    "TrainfitError",
    "TrainingStep",
    "__version__",
    "accumulate",
    "as_html",
    "as_json",
    "as_text",
    "check_data",
    "check_exactness",
    "detect",
    "emit",
    "evaluate",
    "explain",
    "find_gpu",
    "make_setting",
    "measure",
    "model_names",
    "plan",
    "predict",
    "register",
    "report",
    "save_plan",
    "survive_oom",
    "train",
]

_MODULES = {
    "api.measuring": ("measure",),
    "api.planning": ("plan", "predict"),
    "api.results": ("as_html", "as_json", "as_text", "emit", "report", "save_plan"),
    "api.running": ("check_data", "detect", "evaluate", "train"),
    "errors": ("OutOfMemory", "TrainfitError"),
    "exactness.check": ("check_exactness",),
    "exactness.loop": ("Exactness", "OwnLoop"),
    "explaining.explain": ("Explanation", "explain"),
    "gpus.catalogue": ("Gpu", "find_gpu"),
    "measuring.search": ("Measured",),
    "memory.predict": ("Prediction",),
    "models.custom.workload": ("CustomTask",),
    "models.family": ("Family", "model_names", "register"),
    "models.setting": ("Setting", "make_setting"),
    "planning.plan": ("Plan",),
    "reports.emit": ("Emitted",),
    "reports.run_report": ("RunReport",),
    "step.contrastive": ("Contrastive",),
    "step.terms": ("LossTerm", "Objective"),
    "step.training_step": ("TrainingStep",),
    "training.survive": ("SurvivingStep", "survive_oom"),
    "tasks.task": ("DataCheck", "Evaluation"),
    "training.summary": ("RunSummary",),
    "training.accumulate": ("Accumulation", "accumulate"),
    "training.oom": ("Survivor",),
    "training.recipe": ("Recipe",),
}
"""Module -> the public names that it defines."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("trainfit")
    else:
        module = next((module for module, names in _MODULES.items() if name in names), None)
        if module is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if "IPython" in sys.modules:
    import_module(f"{__name__}.api.notebook").install()
