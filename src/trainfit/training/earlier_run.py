"""Recipes of runs that start from the evaluated weights of another run (`--weights RUN`)."""

import json
from pathlib import Path

from trainfit.errors import TrainfitError
from trainfit.models.build import workload_from_metadata
from trainfit.training.recipe import Recipe, make_recipe
from trainfit.training.run_folder import BEST, load_weights
from trainfit.values import changed, given


def evaluated_weights(run: Path) -> Path:
    """The weights of a run that its evaluation chose: the EMA weights where the run kept them.

    Raises:
        TrainfitError: not a run folder, or one that was never evaluated.
    """
    path = run / BEST
    if not path.is_file():
        raise TrainfitError(f"--weights: {run} is not a run folder with evaluated weights (no {BEST}): train it first")
    return path


def on_earlier_run(recipe: Recipe) -> Recipe:
    """The recipe with the model, and the knobs that shape its weights, as the run had them that `weights` names.

    Raises:
        TrainfitError: the folder is not a run folder with evaluated weights.
    """
    if recipe.earlier_run is None:
        return recipe
    path = evaluated_weights(recipe.earlier_run)
    _, metadata = load_weights(path)
    if "model" not in metadata or "knobs" not in metadata:
        raise TrainfitError(f"{path} is not a weights file of trainfit")
    family = workload_from_metadata(metadata).setting.family  # refuses what is damaged
    knobs = json.loads(metadata["knobs"])
    values = {name: getattr(recipe, name) for name in given(recipe) - {"model"}}
    kept = {name: knobs.get(name) for name in family.shapes_weights if values.get(name) is None}
    if recipe.model:
        return changed(recipe, **kept)
    return make_recipe(metadata["model"], **(values | kept))
