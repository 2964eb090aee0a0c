"""The one exception for a user's mistake, told in one line: the option, what was found, the remedy."""


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
