"""Detectron2's YAML configurations in and out. Imports no torch."""
