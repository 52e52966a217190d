"""Records every allocation and free of a step, in order: on fake CUDA tensors, or on real ones on the CPU."""
# pyright: reportPrivateUsage=false

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from trainfit.tracing.counts import Counter
from trainfit.tracing.events import Category, TensorInfo, Trace
from trainfit.tracing.fake_cuda import PRIM_DEVICE, device_for_cpp, with_cuda_device, with_cuda_strides
from trainfit.tracing.shadow import Shadows, tensors_in

aten = torch.ops.aten
# Under a dispatch mode, C++ computes these backward formulas out of place, into a second full-size tensor; a real run
# writes into the new zeros (pytorch `FunctionsManual.cpp`: index_backward, gather_backward).
_IN_PLACE = {
    aten.index_put.default: ("IndexBackward0", aten.index_put_.default),
    aten.scatter_add.default: ("GatherBackward0", aten.scatter_add_.default),
}


class Recorder(TorchDispatchMode):
    """Watches the operators of a step: an allocation is a storage seen for the first time, a free is its deletion.

    Phases follow from what runs: "build"; "inputs" (a window has begun, no module has run); "forward" (from the first
    module); "backward" (the autograd engine); "update" (after a backward: clipping, EMA, the next inputs); "optimizer".
    """

    def __init__(self, device_type: str, shadows: Shadows | None) -> None:
        """Record tensors on `device_type`; with `shadows`, these are fake."""
        super().__init__()
        self._device_type = device_type
        self._shadows = shadows
        self._live: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}  # storage -> index of its tensor
        self._tensors: list[TensorInfo] = []  # category "other" until one is set
        self._events: list[int] = []
        self._marks: list[tuple[int, str]] = []
        self._names: dict[nn.Module, str] = {}
        self._stack: list[str] = []
        self._module_of_node: dict[int, str] = {}
        self._hooks: list[Any] = []
        self._recording = True
        self._inputs_from = 0
        self.phase = "build"
        self.counter = Counter()
        self.failed: OpOverload | None = None
        """The operator whose call raised, if one did."""

    # ---- operators
    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run one operator and record what it allocated."""
        kwargs = kwargs or {}
        if self._shadows is not None:
            if func is PRIM_DEVICE:
                return device_for_cpp(args[0])
            kwargs = with_cuda_device(kwargs)
        node = _running_node()
        self._follow_engine(node)
        if node is not None and func in _IN_PLACE and node.name() == _IN_PLACE[func][0]:
            func = _IN_PLACE[func][1]
        try:
            out = self._shadows.call(func, args, kwargs) if self._shadows else func(*args, **kwargs)
        except Exception:
            self.failed = func
            raise
        out = with_cuda_strides(func, out) if self._shadows else out
        outputs = [t for t in tensors_in(out) if self._on_device(t)]
        inputs = [t for t in tensors_in((args, kwargs)) if self._on_device(t)]
        if inputs or outputs:
            module = self._module(node)
            for tensor in outputs:
                self._track(tensor, str(func.overloadpacket), module)
            self.counter.add(func, args, kwargs, out, inputs, outputs, self.phase)
        return out

    def _on_device(self, tensor: Tensor) -> bool:
        if self._shadows is None:
            return tensor.device.type == self._device_type
        return isinstance(tensor, FakeTensor) and tensor.fake_device.type == self._device_type

    def _module(self, node: Any) -> str:
        """The path of the running module; in backward, that of the module which made the autograd node."""
        if self._stack:
            path = self._stack[-1]
        elif node is not None:
            path = self._module_of_node.get(node._sequence_nr(), "")
        else:
            path = ""
        if self.phase == "forward":
            # The newest node was numbered just before its first operator. A later operator without a node of its own
            # (BatchNorm's `num_batches_tracked.add_`) still sees that number, perhaps from another module.
            self._module_of_node.setdefault(torch.autograd._get_sequence_nr() - 1, path)
        return path

    # ---- storages
    def _track(self, tensor: Tensor, op: str, module: str) -> int | None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._live.get(key)
        if known is not None and known[1]() is not None:
            return known[0]
        if storage.nbytes() == 0 or not self._recording:
            return None
        index = len(self._tensors)
        self._tensors.append(TensorInfo(id=index, nbytes=storage.nbytes(), op=op, module=module, phase=self.phase))
        self._events.append(index + 1)

        def freed(_: object) -> None:
            if self._recording:
                self._events.append(-(index + 1))
            if self._live.get(key, (None,))[0] == index:
                del self._live[key]

        self._live[key] = (index, weakref.ref(storage, freed))
        return index

    def categorise(self, tensors: Iterable[Tensor | None], category: Category) -> None:
        """Set the category of `tensors` that have none. Those not seen before are recorded now."""
        for tensor in tensors:
            if tensor is not None and self._on_device(tensor):
                index = self._track(tensor, "", "")
                if index is not None:
                    self._set_category(index, category)

    def _set_category(self, index: int, category: Category) -> None:
        if self._tensors[index].category == "other":
            self._tensors[index] = replace(self._tensors[index], category=category)

    def _categorise_live(self, phases: tuple[str, ...], category: Category, since: int = 0) -> None:
        for index, _ in self._live.values():
            if index >= since and self._tensors[index].phase in phases:
                self._set_category(index, category)

    # ---- phases
    def enter(self, phase: str) -> None:
        """Begin a phase."""
        if phase == self.phase:
            return
        if phase == "forward" and self.phase in ("inputs", "update"):
            self._categorise_live(("inputs", "update"), "inputs", self._inputs_from)
        if phase == "backward":
            self._categorise_live(("forward",), "activations")
        if phase in ("inputs", "update"):
            self._inputs_from = len(self._tensors)
        self.phase = phase
        self._marks.append((len(self._events), phase))

    def _follow_engine(self, node: object) -> None:
        if node is not None:
            if self.phase != "backward":
                self.enter("backward")
        elif self.phase == "backward":
            self.enter("update")

    def begin_window(self, number: int) -> None:
        """Begin a window: the operator counts start from zero."""
        self.counter = Counter()
        self._module_of_node.clear()
        self._marks.append((len(self._events), f"window {number}"))
        self.enter("inputs")

    def watch(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Register hooks on the modules and the optimizer of a step."""
        self._names = {module: name for name, module in model.named_modules(prefix="model")}
        self._hooks = [
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module, always_call=True),
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def _enter_module(self, module: nn.Module, _: Any) -> None:
        self._follow_engine(_running_node())
        if self.phase in ("inputs", "update"):
            self.enter("forward")
        self._stack.append(self._names.get(module, type(module).__name__))

    def _leave_module(self, _module: nn.Module, _args: Any, _out: Any) -> None:
        self._stack.pop()

    def _before_step(self, optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        for group in optimizer.param_groups:
            self.categorise([parameter.grad for parameter in group["params"]], "gradients")
        self.enter("optimizer")

    def _after_step(self, _optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        self.enter("update")

    def finish(self) -> Trace:
        """Stop recording and return what was recorded."""
        self._recording = False
        for hook in self._hooks:
            hook.remove()
        for index in range(len(self._tensors)):
            self._set_category(index, "temporary")
        return Trace(tensors=tuple(self._tensors), events=tuple(self._events), marks=tuple(self._marks))


def _running_node() -> Any:
    """The autograd node that is computing its gradient, or None."""
    return torch._C._current_autograd_node()
