"""Single published figures of the models that trainfit trains: rf-detr pull request 1437 (NVIDIA L4, allocated peaks).

The pull request gives no number of objects an image. 15 is about twice COCO's mean, and an
assumption. What was measured is upstream's step, so these are traced with its own mask losses (`lean="off"`).
"""

from benchmarks.public.rows import Case, Row

OBJECTS = 15
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
            case=Case(
                source="product",
                arguments={
                    "model": f"rfdetr-seg-{size}",
                    "micro_batch": batch,
                    "objects_per_image": OBJECTS,
                    "lean": "off",
                },
                capability=(8, 9),
            ),
            batch=batch,
            traced_batch=batch,
            after_step=1,
        )
        for (size, batch), gib in MEASURED_GIB.items()
    ]
