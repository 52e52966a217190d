"""The package's traces, moved to a request's objects, classes and size of the image."""

from trainfit.memory.laws import moved
from trainfit.memory.scaling import ScaledTrace
from trainfit.memory.shipped import shipped, source
from trainfit.tracing.trace_cache import TraceRequest


def packaged(request: TraceRequest, *, alone: bool = False) -> ScaledTrace | None:
    """The package's trace of a request, for any micro-batch or for micro-batch 1 `alone`, moved to its objects, classes and size
    of the image.
    """
    origin = source(request, alone=alone)
    if origin is None:
        return None
    read = ScaledTrace.from_record_of_one if alone else ScaledTrace.from_record
    scaled = shipped(origin.request, read, alone=alone)
    return moved(scaled, origin.laws, origin.values) if origin.laws and scaled else scaled
