"""Two ways a run ends early: by a user's mistake, told in one line (the option, what was found, the remedy), or by a signal."""

import signal


class OptionError(ValueError):
    """An option (or the data it points to) that cannot work; `run.py` prints its message and exits with code 1.

    >>> raise OptionError("data.root", "folder '/data/imagnet' does not exist", "give the folder that holds one folder per class")
    """

    def __init__(self, option: str, found: str, remedy: str):
        super().__init__(option, found, remedy)  # the same arguments as __init__, so that it pickles across processes
        self.option = option

    def __str__(self) -> str:
        option, found, remedy = self.args
        return f"{option}: {found}; {remedy}"


class Interrupted(Exception):
    """A signal stopped the run, after its state was saved."""

    def __init__(self, signal_number: int, step: int):
        super().__init__(signal_number, step)
        self.signal_number = signal_number
        self.step = step

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.signal_number).name} after step {self.step}, checkpoint written; the same command resumes"

    @property
    def exit_code(self) -> int:
        """128 + signal number, as shells report it."""
        return 128 + self.signal_number


class Stopped(Interrupted):
    """A signal stopped work that keeps no state on its way."""

    def __init__(self, signal_number: int):
        super().__init__(signal_number, 0)
        self.args = (signal_number,)  # the same as __init__'s, so that it pickles across processes

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.signal_number).name}, nothing measured; the same command begins anew"
