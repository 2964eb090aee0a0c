"""What a person sees while a run goes on: a bar with the time left on a terminal, plain lines elsewhere."""

import sys
import time

from tqdm import tqdm

_SHOWN = {
    "loss/total": "loss",
    "linear/train_loss": "loss",
    "linear/held_out_top1": "held-out %",
    "speed/images_per_second": "img/s",
    "knn/teacher": "k-NN %",
    "finetune/top1": "top-1 %",
    "finetune/ema_top1": "of the average",
}


class Progress:
    """Of `total` optimizer steps, `start` of which are done; silent on ranks other than 0."""

    def __init__(self, *, total: int, start: int, is_main: bool):
        self.total = total
        self.start = start
        self.is_main = is_main
        self._since = time.monotonic()
        on_terminal = is_main and sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True) if on_terminal else None

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def show(self, step: int, epoch: int, metrics: dict[str, float]) -> None:
        """The latest record."""
        shown = {label: metrics[name] for name, label in _SHOWN.items() if name in metrics}
        if self._bar is not None:
            self._bar.set_postfix({label: f"{value:.4g}" for label, value in shown.items()}, refresh=False)
        elif self.is_main:
            left = (time.monotonic() - self._since) / max(step - self.start, 1) * (self.total - step)
            values = "  ".join(f"{label} {value:.4g}" for label, value in shown.items())
            print(f"step {step}/{self.total}  epoch {epoch}  {values}  left {_clock(left)}", flush=True)

    def say(self, line: str) -> None:
        """One line that does not tear the bar."""
        if self.is_main:
            tqdm.write(line) if self._bar is not None else print(line, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
