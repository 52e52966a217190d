"""The library's side of the commands: what a command does, one call does. Imports no torch before it is needed.

Progress goes to functions that the caller gives; nothing is printed. What a user can repair raises `TrainfitError`.
"""

from trainfit.api.measuring import make_bench, measure, planned_setting
from trainfit.api.planning import plan, predict
from trainfit.api.results import as_html, as_json, as_text, emit, report, save_plan
from trainfit.api.running import check_data, detect, evaluate, require_options, train
from trainfit.api.samples import default_model, samples_page

__all__ = [
    "as_html",
    "as_json",
    "as_text",
    "check_data",
    "default_model",
    "detect",
    "emit",
    "evaluate",
    "make_bench",
    "measure",
    "plan",
    "planned_setting",
    "predict",
    "report",
    "require_options",
    "samples_page",
    "save_plan",
    "train",
]
