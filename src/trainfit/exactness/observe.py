"""One run of a user's loop, watched from outside: nothing of the loop is changed but the number format."""

import random
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, cast

import numpy as np
import torch
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import clip_grad
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.optim.swa_utils import AveragedModel

from trainfit.exactness.operators import Operators
from trainfit.exactness.record import Gradients, LoopWindow, Run


class Watch:
    """Records a run. `with watch.watching(): train(model, ...)`; then `watch.run(...)`."""

    def __init__(
        self, model: torch.nn.Module, *, mute: bool = False, freeze_norms: bool = False, double: bool = True
    ) -> None:
        """`mute` removes random numbers, `freeze_norms` the batch's statistics."""
        self.model = model
        self.freeze_norms = freeze_norms
        self.taken: Callable[[], int] = lambda: 0
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.parameters = dict(model.named_parameters())
        self.window = LoopWindow()
        self.windows: list[LoopWindow] = []
        self.batch_norms: dict[str, None] = {}
        self.optimizers: list[torch.optim.Optimizer] = []
        self.operators = Operators(mute=mute, double=double, outside=lambda: self._inside == 0)
        self.operators.averaged = self._averaged
        self._inside = 0
        self._within_backward = False
        self._scaler: torch.amp.GradScaler | None = None
        self._scaled = self._unscaled = False
        self._stepped: dict[str, bool] = {}
        self._captured: tuple[int, Gradients] = (0, {})
        self._last: Gradients = {}
        self._before: dict[str, torch.Tensor] = {}
        self._initial = False
        self._frozen: list[tuple[_BatchNorm, bool, Any]] = []

    def run(self) -> Run:
        """What was recorded."""
        seen = self.operators
        return Run(
            windows=self.windows,
            trailing_backwards=self.window.backwards,
            taken=self.taken(),
            batch_norms=list(self.batch_norms),
            random=seen.random,
            low=seen.low,
            pairs=seen.pairs,
            labels=seen.labels,
        )

    @contextmanager
    def watching(self) -> Generator[None]:
        """Around the loop."""
        with ExitStack() as stack:
            for handle in (
                register_module_forward_pre_hook(self._enter_module),
                register_module_forward_hook(self._leave_module, always_call=True),
                register_optimizer_step_pre_hook(self._before_step),
                register_optimizer_step_post_hook(self._after_step),
            ):
                stack.callback(handle.remove)
            for owner, name, make in self._wrappers():
                stack.callback(setattr, owner, name, owner.__dict__[name])
                setattr(owner, name, make(owner.__dict__[name]))
            stack.enter_context(self.operators)
            before = random.getstate(), repr(np.random.get_state())
            yield
            after = random.getstate(), repr(np.random.get_state())
            names = ("Python's random", "numpy.random")
            self.operators.random |= {n for n, one, other in zip(names, before, after, strict=True) if one != other}

    def _wrappers(self) -> list[tuple[Any, str, Callable[[Any], Any]]]:
        """(Owner, name, original -> replacement) of everything for which torch offers no hook."""
        scaler = torch.amp.GradScaler
        ddp = torch.nn.parallel.DistributedDataParallel
        replaced: list[tuple[Any, str, Callable[[Any], Any]]] = [
            (torch.autograd, "backward", self._backward),
            (torch.autocast, "__init__", self._no_autocast),
            (clip_grad, "_clip_grads_with_norm_", self._clip),
            (torch.nn.utils, "clip_grads_with_norm_", self._clip),
            (clip_grad, "clip_grad_value_", self._clip),
            (torch.nn.utils, "clip_grad_value_", self._clip),
            (scaler, "__init__", self._make_scaler),
            (scaler, "scale", self._scale),
            (scaler, "unscale_", self._unscale),
            (scaler, "step", self._scaler_step),
            (scaler, "update", self._update_scale),
            (AveragedModel, "update_parameters", self._average_update),
            (LRScheduler, "_initial_step", self._initial_schedule),
            (ddp, "forward", self._ddp_forward),
        ]
        schedulers: list[Any] = [LRScheduler]
        for kind in schedulers:
            schedulers += [each for each in kind.__subclasses__() if each not in schedulers]
        replaced += [(kind, "step", self._schedule) for kind in schedulers if "step" in kind.__dict__]
        return replaced

    # Modules

    def _enter_module(self, module: torch.nn.Module, _inputs: Any) -> None:
        self._inside += 1
        if isinstance(module, _BatchNorm):
            if self.freeze_norms:
                self._frozen.append((module, module.training, module.running_mean))
                module.training = False
                if module.running_mean is None:
                    like = next(self.model.parameters())
                    module.running_mean = torch.zeros(module.num_features, dtype=like.dtype, device=like.device)
                    module.running_var = torch.ones_like(module.running_mean)
            elif module.training or module.running_mean is None:
                self.batch_norms[type(module).__name__] = None

    def _leave_module(self, module: torch.nn.Module, _inputs: Any, _output: Any) -> None:
        self._inside -= 1
        if self._frozen and self._frozen[-1][0] is module:
            norm, training, mean = self._frozen.pop()
            norm.training = training
            if mean is None:
                norm.running_mean = norm.running_var = None

    def _ddp_forward(self, original: Any) -> Any:
        @wraps(original)
        def forward(ddp: Any, *args: Any, **named: Any) -> Any:
            if torch.is_grad_enabled():
                self.window.synchronised.append(bool(ddp.require_backward_grad_sync))
            return original(ddp, *args, **named)

        return forward

    # Backward, clip, step

    def _present(self) -> Gradients:
        return {name: p.grad for name, p in self.parameters.items() if p.grad is not None}

    def _backward(self, original: Any) -> Any:
        @wraps(original)
        def backward(*args: Any, **named: Any) -> Any:
            if self._within_backward:  # activation checkpointing runs one for each block
                return original(*args, **named)
            before = {name: g for name, g in self._present().items() if bool(g.any())}
            for name in self._stepped:
                self._stepped[name] = self._stepped[name] and name in before
            window = self.window
            if window.backwards and not before and any(bool(g.any()) for g in self._before.values()):
                window.cleared = True
            scale = self._scale_now()
            self._inside += 1
            self._within_backward = True
            try:
                result = original(*args, **named)
            finally:
                self._inside -= 1
                self._within_backward = False
            window.backwards += 1
            window.scales.add(scale)
            window.rates.add(tuple(float(g["lr"]) for o in self.optimizers for g in o.param_groups))
            after = self._present()
            self._before = {name: g.detach().clone() for name, g in after.items()}
            self.operators.weights = {
                p.untyped_storage().data_ptr(): p.numel() for p in self.parameters.values() if p.requires_grad
            }
            return result

        return backward

    def _scale_now(self) -> float:
        """The loss scale of the next backward, or of gradients that are not yet unscaled; 1 without a scaler."""
        return float(self._scaler.get_scale()) if self._scaler is not None and self._scaled else 1.0

    def _capture(self) -> None:
        """Keep the present gradients, unscaled, unless they were already kept after this backward."""
        if self._captured[0] != self.window.backwards:
            scale = 1.0 if self._unscaled else self._scale_now()
            self._captured = (
                self.window.backwards,
                {n: g.detach().clone() / scale for n, g in self._present().items()},
            )

    def _clip(self, original: Any) -> Any:
        @wraps(original)
        def clip(*args: Any, **named: Any) -> Any:
            if self._inside == 0 and self.window.backwards and self._is_gradients(args[0] if args else None):
                scaled = self._scaled and not self._unscaled
                self.window.clips.append((self.window.backwards, scaled))
                self._capture()
            return original(*args, **named)

        return clip

    def _is_gradients(self, given: Any) -> bool:
        """Whether these tensors are the model's parameters or their gradients; norms of other tensors are not clipping."""
        tensors: list[Any] = []
        if isinstance(given, torch.Tensor):
            tensors = [given]
        elif isinstance(given, (list, tuple)):
            tensors = list(cast("list[Any] | tuple[Any, ...]", given))
        own = {id(p) for p in self.parameters.values()} | {id(p.grad) for p in self.parameters.values()}
        return not tensors or any(id(t) in own for t in tensors)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, named: Any) -> Any:
        """Watch a closure, which computes the gradients within the step (Lightning, LBFGS), until it has run once."""
        closure = named.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._note_step(optimizer)
            self._inside += 1
            return None
        runs: list[int] = []

        def watched() -> Any:
            self._inside -= 1
            try:
                result = closure()
                if not runs:
                    self._note_step(optimizer)
                runs.append(1)
                return result
            finally:
                self._inside += 1

        self._inside += 1
        return (args[0], watched), {name: value for name, value in named.items() if name != "closure"}

    def _note_step(self, optimizer: torch.optim.Optimizer) -> None:
        window = self.window
        if optimizer not in self.optimizers:
            self.optimizers.append(optimizer)
            for group in optimizer.param_groups:
                for p in group["params"]:
                    if id(p) not in self.names:
                        name = f"parameter {len(self.parameters)}, which is none of the model's"
                        self.names[id(p)] = name
                        self.parameters[name] = p
        if window.backwards:
            self._capture()
        place = self.optimizers.index(optimizer)
        prefix = f"optimizer {place}, " if place else ""
        window.groups = [
            (f"{prefix}group {i}", [self.names[id(p)] for p in group["params"]])
            for i, group in enumerate(optimizer.param_groups)
        ]
        own = {name for _, names in window.groups for name in names}
        window.gradients = {n: g for n, g in self._captured[1].items() if n in own} if window.backwards else {}
        window.left_over = any(self._stepped.get(name, False) for name in own)
        window.scaled_at_step = self._scaled and not self._unscaled and window.backwards > 0
        self._stepped |= {n: True for n in own if (g := self.parameters[n].grad) is not None and bool(g.any())}
        self._values = {n: self.parameters[n].detach().clone() for n in own}

    def _after_step(self, _optimizer: torch.optim.Optimizer, _args: Any, _named: Any) -> None:
        """Put the parameters back, so that every window is compared from the same weights."""
        self._inside -= 1
        with torch.no_grad():
            for name, value in self._values.items():
                self.parameters[name].copy_(value)
        self.window.taken = self.taken()
        if self.window.backwards or not self.windows:
            self._last = self._captured[1]
            self.windows.append(self.window)
        else:  # another optimizer's step after the same backwards
            last = self.windows[-1]
            last.groups += self.window.groups
            last.gradients |= {n: g for n, g in self._last.items() for _, names in self.window.groups if n in names}
            last.left_over = last.left_over or self.window.left_over
        self.window = LoopWindow()
        self._captured = (0, {})
        self._before = {}
        self._scaled = self._unscaled = False

    # Loss scaling

    def _no_autocast(self, original: Any) -> Any:
        """Turn autocast off: the check compares in one number format."""

        @wraps(original)
        def init(autocast: Any, device_type: str, *_args: Any, **_named: Any) -> None:
            original(autocast, device_type, enabled=False)

        return init

    def _make_scaler(self, original: Any) -> Any:
        """Make a scaler that scales, even if the loop asks for that of a GPU that this machine does not have."""

        @wraps(original)
        def init(scaler: Any, device: Any = "cuda", *args: Any, **named: Any) -> None:
            here = next(self.model.parameters()).device.type
            device = "cpu" if here == "cpu" else device
            original(scaler, device, *args, **named)

        return init

    def _scale(self, original: Any) -> Any:
        @wraps(original)
        def scale(scaler: Any, outputs: Any) -> Any:
            with self._scalers_format():
                result = original(scaler, outputs)
            if scaler.is_enabled():
                self._scaler = scaler
                self._scaled = True
            return result

        return scale

    def _unscale(self, original: Any) -> Any:
        @wraps(original)
        def unscale(scaler: Any, optimizer: Any) -> Any:
            with self._scalers_format():
                result = original(scaler, optimizer)
            self._unscaled = True
            return result

        return unscale

    def _update_scale(self, original: Any) -> Any:
        @wraps(original)
        def update(scaler: Any, *args: Any, **named: Any) -> Any:
            with self._scalers_format():
                return original(scaler, *args, **named)

        return update

    @contextmanager
    def _scalers_format(self) -> Generator[None]:
        """Context of the scaler's own arithmetic, whose kernels take a scale in float32 only."""
        double = self.operators.double
        self.operators.double = False
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
            self.operators.double = double

    def _scaler_step(self, original: Any) -> Any:
        @wraps(original)
        def step(scaler: Any, optimizer: Any, *args: Any, **named: Any) -> Any:
            if getattr(optimizer, "_step_supports_amp_scaling", False) and not self._unscaled and scaler.is_enabled():
                scaler.unscale_(optimizer)  # a fused kernel unscales as it steps: the same, and seen
            return original(scaler, optimizer, *args, **named)

        return step

    # Averages and schedules

    def _averaged(self) -> None:
        if self._inside == 0:
            self.window.averages.add(self.window.backwards)

    def _average_update(self, original: Any) -> Any:
        @wraps(original)
        def update(averaged: Any, model: Any) -> Any:
            self._averaged()
            return original(averaged, model)

        return update

    def _initial_schedule(self, original: Any) -> Any:
        @wraps(original)
        def initial(scheduler: Any) -> Any:
            self._initial = True
            try:
                return original(scheduler)
            finally:
                self._initial = False

        return initial

    def _schedule(self, original: Any) -> Any:
        @wraps(original)
        def step(scheduler: Any, *args: Any, **named: Any) -> Any:
            if not self._initial:
                self.window.schedules.setdefault(id(scheduler), set()).add(self.window.backwards)
            return original(scheduler, *args, **named)

        return step
