"""What a run is about to do, printed before its first step, so that a wrong setting is seen before it costs hours."""

from torch import nn

from esvit.runtime import Runtime
from esvit.schedules import Schedules


def plan_lines(
    *,
    network: nn.Module,
    backbone: nn.Module,
    runtime: Runtime,
    schedules: Schedules,
    images: int,
    images_per_step: int,
    batch_size: int,
    accumulation: int,
    prototypes: int,
    prototype_matrices: int,
    prototype_shares: int,
    bottleneck_dim: int,
    start: int,
    stop: int,
    checkpoint_every: int,
) -> list[str]:
    """Lines for the console: sizes in millions of parameters and in MB (1e6 bytes), lengths in optimizer steps.

    prototype_shares  among how many processes the prototypes are divided; 1: each has all
    """
    # weights, their normalised copy and gradient, and the optimizer's two moments, all float32
    prototype_megabytes = prototype_matrices * prototypes * bottleneck_dim * 4 * 5 / prototype_shares / 1e6
    shares = f", {prototypes // prototype_shares} on each process" if prototype_shares > 1 else ""
    steps = f"{stop} of {schedules.total_steps}" if stop < schedules.total_steps else f"{stop}"
    first_line = f"{start} done before, " if start else ""
    return [
        f"run folder     {runtime.folder}",
        f"device         {runtime.device}, {runtime.world_size} process{'es' if runtime.world_size > 1 else ''}, {runtime.precision}, "
        f"{runtime.threads} CPU thread{'s' if runtime.threads > 1 else ''} each, "
        f"{'deterministic' if runtime.deterministic else 'not deterministic'}",
        f"parameters     {_millions(backbone)} backbone, {_millions(network)} with heads",
        f"prototypes     {prototypes} x {bottleneck_dim}, {prototype_matrices} head{'s' if prototype_matrices > 1 else ''}"
        f"{shares}, about {prototype_megabytes:.0f} MB with gradient and optimizer state",
        f"images         {images}, {images_per_step} per step "
        f"({batch_size} x {runtime.world_size} processes x {accumulation} micro-batches)",
        f"steps          {first_line}{steps}, {schedules.steps_per_epoch} per epoch, {schedules.epochs} epochs",
        f"learning rate  {schedules.learning_rate:.3g} at its peak (scaled to {images_per_step} images per step)",
        f"checkpoint     every {checkpoint_every} steps, on a signal, and at the end",
    ]


def _millions(module: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:.2f} M"
