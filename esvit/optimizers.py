"""Update the student: tagged parameter groups, clipping, the frozen last layer, fp16 scaling, and AdamW, SGD or LARS.

Unusual here:
* Gradients are clipped per parameter by default, as in the paper's code: it changes results.
* A step is masked on the device: when `finite` is False, or a gradient is not finite, parameters, moments and step counters
  keep their bits, and the host never waits to learn which it was. AdamW and SGD do so through the `found_inf` tensor that
  torch's fused kernels honour, LARS through its own code.
* The optimizer's state is made at the start, zero, not at a parameter's first gradient. Torch's fused SGD takes uninitialised
  memory as momentum if its first step is masked, and fails on parameters whose first gradient comes later (the frozen last
  layer); zeros give the same numbers without either. It also makes every checkpoint complete, so that loading can be strict.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from esvit import distributed
from esvit.errors import OptionError
from esvit.records import StepValues

LAST_LAYER = "prototypes"  # what the names of the last layer's parameters contain
CLIP_MODES = ("parameter", "global", "none")


@dataclass(frozen=True)
class ParameterGroup:
    """Trainable parameters that share weight decay and learning rate. The three lists run in parallel.

    decayed     whether the scheduled weight decay applies; otherwise it is 0
    rate_scale  factor of the scheduled learning rate
    last_layer  which of the parameters belong to the prototypes
    """

    names: list[str]
    parameters: list[nn.Parameter]
    last_layer: list[bool]
    decayed: bool
    rate_scale: float


def parameter_groups(
    network: nn.Module, *, rate_scales: Mapping[str, float] | None = None, tables_decay: bool = True
) -> list[ParameterGroup]:
    """What weight decay applies to, and the rest: two groups for each learning rate; frozen parameters are in none.

    Parameters in shares and whole ones are in groups of their own, as are shares that lie differently: no kernel takes both.

    rate_scales   factor of the learning rate for each parameter by name; None means 1 for all
    tables_decay  as in the paper's code everything that is not 1-D and not named `*.bias` decays, hence also relative-position tables,
                  position embeddings and a trainable `weight_g` of the prototypes. False: weights of layers only, `*weight`, as recipes
                  of supervised training have it
    """
    trainable = [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]
    scales = {1.0} if rate_scales is None else set(rate_scales.values())
    spreads = dict.fromkeys(distributed.spread(parameter) for _, parameter in trainable) or {None: None}
    groups = []
    for decayed, scale, spread in itertools.product((True, False), sorted(scales), spreads):
        chosen = [
            (name, parameter)
            for name, parameter in trainable
            if _decays(name, parameter, tables_decay) == decayed
            and (rate_scales is None or rate_scales[name] == scale)
            and distributed.spread(parameter) == spread
        ]
        groups.append(
            ParameterGroup(
                names=[name for name, _ in chosen],
                parameters=[parameter for _, parameter in chosen],
                last_layer=[LAST_LAYER in name for name, _ in chosen],
                decayed=decayed,
                rate_scale=scale,
            )
        )
    return groups


def _decays(name: str, parameter: nn.Parameter, tables_decay: bool) -> bool:
    return parameter.ndim != 1 and not name.endswith(".bias") and (tables_decay or name.endswith("weight"))


def clip_each_(gradients: list[Tensor], limit: float) -> Tensor:
    """Scale each gradient down, in place, to an L2 norm of at most `limit`; returns the norms (n,) from before.

    The coefficient is limit / (norm + 1e-6) where that is below 1 (the paper's utils.clip_gradients).
    """
    norms = distributed.norms(gradients)
    coefficients = (limit / (norms + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(distributed.shares(gradients), list(coefficients.unbind()))
    return norms


def clip_global_(gradients: list[Tensor], limit: float) -> Tensor:
    """Scale all gradients, in place, by one factor to a joint L2 norm of at most `limit`; returns the norm of each (n,) from before."""
    norms = distributed.norms(gradients)
    coefficient = (limit / (torch.linalg.vector_norm(norms) + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(distributed.shares(gradients), coefficient)
    return norms


class StudentOptimizer:
    """One update of the student per optimizer step: `set`, `backward` (once per micro-batch), `step`.

    groups     from `parameter_groups`
    optimizer  over one parameter group for each of `groups`, state already made; honours a 0-d float tensor `found_inf` (1: do nothing)
    clip       "parameter" (each gradient by itself), "global" (all by one factor) or "none"
    clip_norm  the largest L2 norm that clipping leaves
    scaler     of the loss in fp16, otherwise None
    """

    def __init__(
        self,
        groups: list[ParameterGroup],
        optimizer: torch.optim.Optimizer,
        *,
        clip: str,
        clip_norm: float,
        scaler: torch.amp.GradScaler | None,
    ):
        self.groups = groups
        self.optimizer = optimizer
        self.clip = clip
        self.clip_norm = clip_norm
        self.scaler = scaler
        self.last_layer_frozen = False

    def set(self, now: StepValues) -> None:
        """Take the learning rate, weight decay and freezing of this step."""
        for group, tags in zip(self.optimizer.param_groups, self.groups, strict=True):
            group["lr"] = now.learning_rate * tags.rate_scale
            group["weight_decay"] = now.weight_decay if tags.decayed else 0.0
        self.last_layer_frozen = now.last_layer_frozen

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss` (0-d); with gradient accumulation the caller divides each micro-batch's loss by their number."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def backward_from(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Go on backwards from tensors whose gradients of the loss are known, (tensor, gradient) each; nothing to do without any."""
        if self.scaler is not None:
            pairs = [(tensor, self.scaler.scale(gradient)) for tensor, gradient in pairs]
        if pairs:
            torch.autograd.backward([tensor for tensor, _ in pairs], [gradient for _, gradient in pairs])

    @torch.no_grad()
    def step(self, finite: Tensor) -> Tensor:
        """Clip, update and forget the gradients. Returns the L2 norm of the whole gradient before clipping, 0-d, on the device.

        finite  0-d bool on the device, the same on all ranks. When it is False, or a gradient is not finite, nothing changes
                but fp16's scale (halved); the returned norm then is infinite or NaN in the latter case, as it is now and then in fp16.
        """
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        gradients = [parameter.grad for group in self.groups for parameter in group.parameters if parameter.grad is not None]
        if self.clip == "parameter":
            norms = clip_each_(gradients, self.clip_norm)
        elif self.clip == "global":
            norms = clip_global_(gradients, self.clip_norm)
        else:
            norms = distributed.norms(gradients)
        norm = torch.linalg.vector_norm(norms)
        if self.last_layer_frozen:  # dropped, not zeroed, and only after clipping: neither decay nor momentum moves the prototypes
            for group in self.groups:
                for parameter, last_layer in zip(group.parameters, group.last_layer, strict=True):
                    if last_layer:
                        parameter.grad = None
        self.optimizer.found_inf = (~(finite & norm.isfinite())).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        if self.scaler is not None:
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors: the state of every parameter by name, which names decay, and fp16's scale."""
        return {
            "decayed": self._decayed(),
            "parameters": {name: dict(state) for name, state in self._states().items()},
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from `saved`. Raises OptionError, before anything changes, unless names, groups, kind and shapes are those here."""
        ours = self._states()
        theirs = saved["parameters"]
        remedy = "resume with the options of that run, or start a new one in another output_dir"
        if ours.keys() != theirs.keys():
            names = sorted(ours.keys() ^ theirs.keys())
            found = f"the optimizer's state is of other parameters ({len(names)} differ, {names[0]} for example)"
            raise OptionError("output_dir", found, remedy)
        if sorted(saved["decayed"]) != sorted(self._decayed()):
            raise OptionError("output_dir", "weight decay applies to other parameters in the optimizer's state", remedy)
        for name, state in ours.items():
            here = {key: tuple(value.shape) for key, value in state.items()}
            there = {key: tuple(value.shape) for key, value in theirs[name].items()}
            if here != there:
                raise OptionError("output_dir", f"the optimizer's state of {name} is {there}, here it is {here}", remedy)
        if (saved["scaler"] is None) != (self.scaler is None):
            held = "no fp16 scale" if saved["scaler"] is None else "an fp16 scale"
            raise OptionError("output_dir", f"the optimizer's state holds {held}", "resume with the precision of that run")
        for name, state in ours.items():
            for key, value in state.items():
                value.copy_(distributed.shared_like(theirs[name][key], value))
        if self.scaler is not None:
            self.scaler.load_state_dict(saved["scaler"])

    def _decayed(self) -> list[str]:
        return [name for group in self.groups if group.decayed for name in group.names]

    def _states(self) -> dict[str, dict[str, Tensor]]:
        named = [pair for group in self.groups for pair in zip(group.names, group.parameters, strict=True)]
        return {name: self.optimizer.state[parameter] for name, parameter in named}


@dataclass(frozen=True, kw_only=True)
class _Optimizer(ABC):
    """What every optimizer has.

    learning_rate  peak for a global batch of 256 images; the schedules take it scaled to the real batch
    clip           "parameter", "global" or "none"
    clip_norm      the largest L2 norm that clipping leaves
    """

    learning_rate: float
    clip: str
    clip_norm: float

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise OptionError("optimizer.learning_rate", f"{self.learning_rate} is not above 0", "use 0.0005 for example")
        if self.clip not in CLIP_MODES:
            raise OptionError("optimizer.clip", f"'{self.clip}' is no way to clip", f"use one of {', '.join(CLIP_MODES)}")
        if self.clip != "none" and self.clip_norm <= 0:
            raise OptionError("optimizer.clip_norm", f"{self.clip_norm} is not above 0", "use optimizer.clip=none for no clipping")

    def build(
        self,
        network: nn.Module,
        *,
        precision: str,
        device: torch.device,
        rate_scales: Mapping[str, float] | None = None,
        tables_decay: bool = True,
    ) -> StudentOptimizer:
        """The optimizer of `network`, which already is on `device`; the loss is scaled when `precision` is "fp16".

        rate_scales, tables_decay  see `parameter_groups`
        """
        groups = parameter_groups(network, rate_scales=rate_scales, tables_decay=tables_decay)
        # a group without parameters stays: the groups here and the optimizer's run in parallel
        optimizer = self._optimizer([{"params": group.parameters} for group in groups])
        for group in groups:
            for parameter in group.parameters:
                optimizer.state[parameter] = self._fresh_state(parameter)
        scaler = torch.amp.GradScaler(device.type) if precision == "fp16" else None
        return StudentOptimizer(groups, optimizer, clip=self.clip, clip_norm=self.clip_norm, scaler=scaler)

    @abstractmethod
    def _optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Torch's optimizer over `groups`, which honours `found_inf`."""

    def _fresh_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        return {"momentum_buffer": torch.zeros_like(parameter)}


@dataclass(frozen=True, kw_only=True)
class AdamW(_Optimizer):
    """AdamW with decoupled weight decay (Loshchilov & Hutter 2019). betas: decay of the two moments; eps: added to the root."""

    betas: list[float]
    eps: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise OptionError("optimizer.betas", f"{list(self.betas)} are not two numbers from 0 to below 1", "use [0.9,0.999]")

    def _optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        first, second = self.betas
        return torch.optim.AdamW(groups, betas=(first, second), eps=self.eps, fused=True)

    def _fresh_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        return {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }


@dataclass(frozen=True, kw_only=True)
class SGD(_Optimizer):
    """Stochastic gradient descent with momentum, not Nesterov's; weight decay is added to the gradient."""

    momentum: float

    def _optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=self.learning_rate, momentum=self.momentum, fused=True)


@dataclass(frozen=True, kw_only=True)
class LARS(_Optimizer):
    """Layer-wise adaptive rates (You et al. 2017). eta: the trust coefficient."""

    momentum: float
    eta: float

    def _optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return LayerwiseAdaptiveSGD(groups, lr=self.learning_rate, momentum=self.momentum, eta=self.eta)


class LayerwiseAdaptiveSGD(torch.optim.Optimizer):
    """LARS as in the paper's code (utils.LARS), with its state made beforehand and a mask on the device.

    For a parameter p that is not 1-D:  g += weight_decay * p;  g *= eta * |p| / |g|  (times 1 where either norm is 0).
    Then for all:  mu = momentum * mu + g;  p -= lr * mu.
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, momentum: float, eta: float):
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0, "momentum": momentum, "eta": eta})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        masked = self.found_inf.bool()  # type: ignore[attr-defined]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                update = parameter.grad
                if parameter.ndim != 1:
                    update = update.add(parameter, alpha=group["weight_decay"])
                    parameter_norm, update_norm = torch.linalg.vector_norm(parameter), torch.linalg.vector_norm(update)
                    ratio = group["eta"] * parameter_norm / update_norm
                    # a tensor of ones, not 1.0, which torch.where may copy from the host and wait for
                    update = update * torch.where((parameter_norm > 0) & (update_norm > 0), ratio, torch.ones_like(ratio))
                buffer = self.state[parameter]["momentum_buffer"]
                momentum = buffer * group["momentum"] + update
                buffer.copy_(torch.where(masked, buffer, momentum))
                parameter.copy_(torch.where(masked, parameter, parameter - group["lr"] * momentum))
