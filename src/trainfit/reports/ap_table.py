"""An evaluation as text."""

from trainfit.reports.words import printable
from trainfit.tasks.detection.coco_ap import ApResult

_WORDS = {"bbox": "boxes", "segm": "masks"}


def ap_line(result: ApResult) -> str:
    """The result in one line; "-" where COCO defines no value."""
    sizes = (("small", result.ap_small), ("medium", result.ap_medium), ("large", result.ap_large))
    figures = [("AP", result.ap), ("AP50", result.ap50), ("AP75", result.ap75), *sizes]
    figures.append((f"AR@{result.max_detections}", result.ar_max))
    text = "  ".join(f"{name} {_figure(value)}" for name, value in figures)
    return f"{_WORDS[result.iou]}: {text}  ({result.images} images, {result.objects} objects)"


def ap_table(result: ApResult) -> str:
    """The line of `ap_line`, then a row for each class."""
    width = max(len("class"), *(len(printable(row.name)) for row in result.per_class))
    head = f"{'class':<{width}}  {'AP':>5}  {'AP50':>5}  {'AR':>5}  {'objects':>8}  {'detections':>10}"
    rows = [
        f"{printable(row.name):<{width}}  {_figure(row.ap):>5}  {_figure(row.ap50):>5}  {_figure(row.ar):>5}"
        f"  {row.objects:>8}  {row.detections:>10}"
        for row in result.per_class
    ]
    return "\n".join([ap_line(result), head, *rows])


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
