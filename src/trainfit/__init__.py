"""trainfit: which training of a vision model fits a GPU, and the training itself. Importing it imports no torch.

Each name is imported from its module when it is first used. `docs/api.md` shows them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainfit.api import check_data, detect, evaluate, measure, plan, predict, train
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
    from trainfit.step.contrastive import Contrastive
    from trainfit.step.terms import LossTerm, Objective
    from trainfit.step.training_step import TrainingStep
    from trainfit.tasks.task import Evaluation
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
    "RunSummary",
    "Setting",
    "SurvivingStep",
    "Survivor",
    "TrainfitError",
    "TrainingStep",
    "__version__",
    "accumulate",
    "check_data",
    "check_exactness",
    "detect",
    "evaluate",
    "explain",
    "find_gpu",
    "make_setting",
    "measure",
    "model_names",
    "plan",
    "predict",
    "register",
    "survive_oom",
    "train",
]

_MODULES = {
    "api": ("check_data", "detect", "evaluate", "measure", "plan", "predict", "train"),
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
    "step.contrastive": ("Contrastive",),
    "step.terms": ("LossTerm", "Objective"),
    "step.training_step": ("TrainingStep",),
    "tasks.task": ("Evaluation",),
    "training.survive": ("SurvivingStep", "survive_oom"),
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
