"""How much memory the number of objects makes, said beside a prediction."""

from dataclasses import dataclass

import pytest

from trainfit.gpus.catalogue import GIB
from trainfit.gpus.context import ByteRange
from trainfit.models.setting import DetectionSetting, Setting, make_setting
from trainfit.planning.objects import objects_lines


@dataclass(frozen=True)
class Prices:
    """2 GiB and what each object takes."""

    object_bytes: int
    traced: tuple[int, ...] = (10, 50, 100)

    def known(self, setting: Setting) -> bool:
        assert isinstance(setting, DetectionSetting)
        return setting.objects_per_image in self.traced

    def needs(self, setting: Setting) -> ByteRange:
        assert isinstance(setting, DetectionSetting)
        low_bytes = 2 * GIB + setting.objects_per_image * self.object_bytes
        return ByteRange(low_bytes=low_bytes, high_bytes=low_bytes + GIB // 2)


MANY = make_setting("maskrcnn-r50-v2", objects_per_image=100)


def test_memory_with_few_and_with_many_objects() -> None:
    assert objects_lines(Prices(GIB // 100), MANY) == (
        "Objects in the fullest image: with 10 training needs 2.10 to 2.60 GiB, with 100 3.00 to 3.50 GiB.",
    )
    assert objects_lines(Prices(0), MANY) == (
        "Training needs as much with 10 objects in the fullest image as with 100.",
    )


@pytest.mark.parametrize(
    ("setting", "traced"),
    [
        (make_setting("maskrcnn-r50-v2", objects_per_image=10), (10,)),  # few already
        (MANY, (100,)),  # few would take a trace
        (MANY, (10,)),
        (make_setting("timm:resnet18"), ()),  # no objects
    ],
)
def test_nothing_is_said_where_nothing_is_known(setting: Setting, traced: tuple[int, ...]) -> None:
    assert objects_lines(Prices(GIB, traced), setting) == ()
