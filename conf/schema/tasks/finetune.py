"""Options of fine-tuning."""

from dataclasses import dataclass, field
from typing import Any

from conf.schema.augmentations import Interpolation, Mixing, TrainingCrop
from conf.schema.tasks.frozen import Frozen


def _crop_as_evaluated() -> TrainingCrop:
    return TrainingCrop(size="${task.frozen.crop}", interpolation=Interpolation.bicubic)  # type: ignore[arg-type]


def _published_mixing() -> Mixing:
    return Mixing(probability=1.0)


def _without_cache() -> Frozen:
    return Frozen(cache=None)  # its features change with every step


@dataclass
class FineTune:
    _target_: str = "esvit.tasks.finetune.FineTune"
    has_run_folder: bool = True
    label_fraction: float = 1.0  # share of each class's training images that is used: 0.01, 0.1, 1; drawn from the seed
    layer_decay: float = 0.8  # learning rate of a layer over that of the layer above; 1 for none, best for an untrained network
    warmup_epochs: int = 5  # of the learning rate, linear from 0
    final_learning_rate: float = 1e-6  # where its cosine ends; not scaled with the number of images
    weight_decay: float = 0.05  # of the weights of layers; biases, norms, tokens and tables of positions have none
    label_smoothing: float = 0.1  # share of a target that is spread over all classes; 0 means none
    ema_momentum: float = 0.9999  # of the moving average of the weights; 0 keeps none
    accumulation: int = 1  # micro-batches per optimizer step
    log_every: int = 10  # optimizer steps between log records (the only times the host waits for the device)
    validate_every: int = 1  # epochs between validations; 0 means at the end only
    checkpoint_keep: int = 1  # how many checkpoint_<step>.pt to keep
    training_crop: TrainingCrop = field(default_factory=_crop_as_evaluated)
    mixing: Mixing = field(default_factory=_published_mixing)
    frozen: Frozen = field(default_factory=_without_cache)
    data: Any = "${data}"
    optimizer: Any = "${optimizer}"
    epochs: int = "${epochs}"  # type: ignore[assignment]
    max_steps: int | None = "${max_steps}"  # type: ignore[assignment]
    checkpoint_every: int = "${checkpoint_every}"  # type: ignore[assignment]


SCHEMAS = {
    ("task", "finetune"): FineTune,
}
