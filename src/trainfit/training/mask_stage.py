"""Stage 2 of a segmentation: what `--from RUN` fixes of its recipe."""

import dataclasses
import json
from pathlib import Path

from trainfit.errors import TrainfitError
from trainfit.models.build import workload_from_metadata
from trainfit.training.recipe import Recipe
from trainfit.training.run_folder import BEST, load_weights


def evaluated_weights(run: Path) -> Path:
    """The weights of a run that its evaluation chose: the average where the run kept one.

    Raises:
        TrainfitError: not a run folder, or one that was never evaluated.
    """
    path = run / BEST
    if not path.is_file():
        raise TrainfitError(
            f"--from: {run} is no run folder with evaluated weights (no {BEST}): train a detector first"
        )
    return path


def on_detector_run(recipe: Recipe) -> Recipe:
    """The recipe with the model, and what shapes its weights, as the run of `--from` had them; others as they are.

    Raises:
        TrainfitError: `--from` is no run folder with evaluated weights.
    """
    if recipe.from_run is None:
        return recipe
    path = evaluated_weights(recipe.from_run)
    _, metadata = load_weights(path)
    if "model" not in metadata or "knobs" not in metadata:
        raise TrainfitError(f"{path} is not a weights file of trainfit")
    workload_from_metadata(metadata)  # refuses what is damaged
    knobs = json.loads(metadata["knobs"])
    given = {name: getattr(recipe, name) for name in ("resolution", "num_queries", "groups")}
    fixed = {name: knobs.get(name) if value is None else value for name, value in given.items()}
    return dataclasses.replace(recipe, **fixed, model=recipe.model or metadata["model"])
