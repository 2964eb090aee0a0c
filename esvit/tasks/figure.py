"""Draws the paper's efficiency figure: published models, and runs whose accuracy and throughput were measured. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esvit.comparison.columns import matches
from esvit.comparison.efficiency import Ours, draw, our_panels, published_panels, together
from esvit.comparison.selection import gather
from esvit.errors import OptionError
from esvit.tracking.files import replace_file


@dataclass(kw_only=True)
class Figure:
    """runs, experiment, uri  which runs, as for Compare; none at all: the published models alone
    linear, knn            patterns of the metrics of the two panels; of several in a run the first counts
    published              whether the models of the paper's tables are drawn
    dataset                what the runs' accuracies were measured on; None: the name of the folder of the images
    folder                 gets efficiency.png and efficiency.svg
    """

    runs: Sequence[str]
    experiment: str | None
    uri: str | None
    linear: Sequence[str]
    knn: Sequence[str]
    published: bool
    dataset: str | None
    folder: str

    def run(self, runtime: Any = None) -> None:
        """Write both files. Raises OptionError if there is nothing to draw."""
        ours = self._ours() if self.runs or self.experiment is not None else Ours([], [], [])
        panels = together(published_panels() if self.published else [], ours.panels)
        if not panels:
            raise OptionError("task.runs", "there is nothing to draw", "give runs, or published=true")
        folder = Path(self.folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for kind, content in draw(panels, ours.machines).items():
                replace_file(folder / f"efficiency.{kind}", content)
        except OSError as error:
            found = f"cannot write to '{folder}' ({error.strerror})"
            raise OptionError("output_dir", found, "give a folder that can be written") from None
        for note in ours.notes:
            print(f"note: {note}")
        print(f"{folder / 'efficiency.png'}  (also efficiency.svg)", flush=True)

    def _ours(self) -> Ours:
        metrics = {"linear": self.linear, "knn": self.knn}
        patterns = [pattern for some in metrics.values() for pattern in some]
        gathered = gather(self.runs, experiment=self.experiment, uri=self.uri, wanted=lambda name: matches(name, [*patterns, "parameters"]))
        ours = our_panels(gathered.runs, metrics, dataset=self.dataset)
        if not ours.panels:
            found = "no finished run among them has an accuracy, and its backbone's throughput measured too"
            remedy = "add a run of task=throughput with the same backbone options, or see task.linear and task.knn"
            raise OptionError("task.runs", found, remedy)
        return Ours(ours.panels, ours.machines, [*gathered.notes, *ours.notes])
