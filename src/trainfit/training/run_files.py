"""Names of a run folder's files that need no torch to be read. Imports nothing."""

RECIPE = "recipe.json"
PLAN = "plan.json"
"""The plan that the run was started with, if it was."""
METRICS = "metrics.jsonl"
"""Losses, rates, AP: the same bit for bit in a resumed run."""
TELEMETRY = "telemetry.jsonl"
"""Times, memory, waiting for data, events: never the same twice."""
