"""Single published figures of the models that trainfit trains: rf-detr pull request 1437 (NVIDIA L4, allocated peaks).

The pull request gives no number of objects an image. 15 is about twice COCO's mean, and an
assumption; the interval is from 1 to 100, the most that `trainfit predict` assumes where no count is given. What was
measured is upstream's step, so these are traced with its own mask losses (`lean="off"`). Upstream trains through Lightning,
which clears the gradients of the last step after the forward pass and not before it: they are at the peak there, and not in
these traces (docs/prediction.md has two rows with them).
"""

from benchmarks.public.rows import Case, Row

OBJECTS, FEWEST, MOST = 15, 1, 100
MEASURED_GIB = {("small", 4): 4.96, ("small", 8): 8.96, ("small", 16): 15.30, ("small", 20): 19.63, ("medium", 4): 6.83}


def rows() -> list[Row]:
    """Five."""
    return [
        Row(
            source="rf-detr PR 1437",
            group="detection transformer",
            name=f"rfdetr-seg-{size} {batch}",
            card="L4",
            quantity="allocated",
            measured_mib=gib * 1024,
            case=_case(size, batch, OBJECTS),
            bounds=(_case(size, batch, FEWEST), _case(size, batch, MOST)),
            batch=batch,
            traced_batch=batch,
            after_step=1,
        )
        for (size, batch), gib in MEASURED_GIB.items()
    ]


def _case(size: str, batch: int, objects: int) -> Case:
    model = f"rfdetr-seg-{size}"
    arguments = {"model": model, "micro_batch": batch, "objects_per_image": objects, "lean": "off"}
    return Case(source="product", arguments=arguments, capability=(8, 9))
