"""What is kept when a loss was not finite: the batch, drawn again from its sample keys, and a report of where it came from."""

import json
from pathlib import Path

import torch

from esvit.augmentations import device
from esvit.data.base import ImageSet
from esvit.data.loading import TrainLoader
from esvit.errors import OptionError


class NonFiniteLoss(OptionError):
    """The loss became NaN or infinite; nothing after the last good step was kept."""


def save_bad_batch(*, folder: Path, rank: int, step: int, loader: TrainLoader, images: ImageSet) -> Path:
    """Write `nonfinite/step_<step>_rank_<rank>.pt` (the crops, uint8, one list per micro-batch) and a `.json` beside it that
    names the images; returns the latter's path. Loadable with weights_only=True.

    step  from 0, the one whose batch is drawn again for this rank
    """
    target = folder / "nonfinite"
    target.mkdir(exist_ok=True)
    batches = loader.redraw_step(step)
    torch.save([device.finish(batch.crops, batch.changes) for batch in batches], target / f"step_{step}_rank_{rank}.pt")
    report = target / f"step_{step}_rank_{rank}.json"
    indices = torch.cat([batch.indices for batch in batches]).tolist()
    described = {
        "step": step,
        "rank": rank,
        "epoch": batches[0].epoch,
        "positions": torch.cat([batch.positions for batch in batches]).tolist(),
        "images": [images.name(index) for index in indices],
        "crops": [list(crop.shape) for crop in batches[0].crops],
    }
    report.write_text(json.dumps(described, indent=1))
    return report
