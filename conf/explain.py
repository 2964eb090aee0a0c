"""A user's mistake on the command line, told by Hydra in paragraphs, told again in one line."""

import contextlib
import re
import sys
from collections.abc import Iterator

from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from conf.resolve import remedy_for_unknown
from esvit.errors import OptionError


@contextlib.contextmanager
def mistakes_in_one_line() -> Iterator[None]:
    """End the process with one line and exit code 1 where the user is the cause."""
    try:
        yield
    except (HydraException, OmegaConfBaseException, OptionError) as error:
        sys.exit(f"error: {explain(error)}")


def explain(error: BaseException) -> str:
    """One line that names the option, what was found and the remedy."""
    if isinstance(error, OptionError):
        return str(error)
    cause = _innermost(error)
    if isinstance(cause, ConfigCompositionException) and isinstance(cause.__context__, ConfigKeyError):
        return _unknown_in_file(cause, cause.__context__)
    if isinstance(cause, ConfigKeyError | ConfigAttributeError):
        return _unknown_option(cause)
    if isinstance(cause, ValidationError):
        remedy = f"write a list, {cause.full_key}=[...]" if "is not a ListConfig" in str(cause) else "give it a value of the right type"
        return f"{cause.full_key}: {_first_sentence(cause)}; {remedy}"
    if isinstance(cause, MissingMandatoryValue):
        return f"{cause.full_key}: has no value; give one, e.g. {cause.full_key}=..."
    if isinstance(cause, InterpolationResolutionError):
        return f"{cause.full_key}: {_first_sentence(cause)}; check the reference"
    if isinstance(cause, MissingConfigException):
        return _unknown_choice(cause)
    if isinstance(cause, OverrideParseException):
        remedy = "write option=value, quoted if it holds spaces or brackets"
        return f"'{cause.override}': cannot be read as an override ({_first_sentence(cause)}); {remedy}"
    return f"{_first_sentence(cause)}; see python run.py --help"


def _innermost(error: BaseException) -> BaseException:
    while error.__cause__ is not None and isinstance(error.__cause__, OmegaConfBaseException | HydraException):
        error = error.__cause__
    return error


def _unknown_option(cause: OmegaConfBaseException) -> str:
    name = str(cause.full_key or cause.key)
    parent = cause.parent_node
    prefix = name.rpartition(".")[0]
    siblings = [f"{prefix}.{key}" if prefix else key for key in map(str, parent)] if isinstance(parent, DictConfig) else []
    remedy = remedy_for_unknown(name, siblings) if siblings else "see python run.py --help"
    return f"{name}: no such option; {remedy}"


def _unknown_in_file(error: ConfigCompositionException, cause: ConfigKeyError) -> str:
    """A preset or an experiment sets an option that nobody has: most likely one of another task."""
    file = re.match(r"In '([^']*)'", str(error))
    group, _, choice = (file[1] if file else "").rpartition("/")
    what = f"{group}={choice}" if group else "a file in conf"
    if str(cause.full_key).startswith("task."):
        return f"{what}: sets {cause.full_key}, which the chosen task does not have; choose its task, or give single options instead"
    return f"{what}: sets {cause.full_key}, which the config does not have; correct the file"


def _unknown_choice(cause: MissingConfigException) -> str:
    missing = str(cause.missing_cfg_file or "")
    group, _, choice = missing.rpartition("/")
    options = ", ".join(sorted(cause.options or []))
    if not group:
        return f"{_first_sentence(cause)}; see python run.py --help"
    return f"{group}: there is no '{choice}'; choose one of {options}"


def _first_sentence(error: BaseException) -> str:
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    return next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__).rstrip(".")
