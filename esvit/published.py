"""Starting from a file: ours, the original EsViT's or DINO's full checkpoints, or plain weights (Swin, DeiT, timm, torchvision), strictly.

What kind of file it is shows in its keys:

    ours            student, teacher, loss, step, ...: state dicts of `MultiCropNetwork` and of the loss
    EsViT and DINO  student (`module.*`), teacher (with or without `module.`), dino_loss, epoch, args, ...; in a network the backbone's
                    entries (`backbone.*` or `backbone.backbone.*` where it was wrapped), `head.*` and `head_dense.*`
    plain           a backbone's entries, by themselves or under `model` or `state_dict`; or one network's of the kinds above

Unusual: nothing here knows an architecture. A backbone translates names by `Backbone.from_published` and resizes its tables of positions by
`Backbone.resize_positions`; `recognise` names the one in a file that does not fit. Left out are only integer buffers (indices that we
compute) and the classifier of a supervised network; everything else must fit, and what begins anew (`fresh_heads`) is asked for, never
assumed.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from esvit.backbones.base import Backbone
from esvit.backbones.recognise import recognise
from esvit.checkpoints import SAME_NETWORK, load_checkpoint_file, strict_load
from esvit.errors import OptionError
from esvit.networks import MultiCropNetwork

State = dict[str, Tensor]

OURS = "this program"
CONTAINERS = ("model", "state_dict")  # under which other programs keep a network's weights
HEADS = {  # the original's names and ours; its prototypes are the last layer of its head
    "head.mlp.": "view_head.mlp.",
    "head.last_layer.": "view_prototypes.",
    "head_dense.mlp.": "region_head.mlp.",
    "head_dense.last_layer.": "region_prototypes.",
}
CENTERS = {"center": "center", "center_grid": "center_region"}
CLASSIFIER = re.compile(r"(head|head\.fc|heads\.head|fc|classifier)\.(weight|bias)")
FRESH = {  # fresh_heads: entries of network and loss that begin anew
    "none": (),
    "region": ("region_", "center_region"),
    "all": ("view_", "region_", "center"),
}


@dataclass(frozen=True)
class NetworkWeights:
    """One network of a file.

    backbone  entries under the names of whoever wrote them, without prefixes
    heads     entries of heads and prototypes, under the names of `MultiCropNetwork`; empty if the file has none
    """

    backbone: State
    heads: State


@dataclass(frozen=True, kw_only=True)
class SavedNetworks:
    """What a file holds.

    origin            who made it, for messages
    student, teacher  where the file has one network only, both are that one
    centers           `center` and `center_region`, as far as the file has them
    epoch             completed epochs, or None if the file does not say
    step              completed optimizer steps, or None if the file does not say
    """

    origin: str
    student: NetworkWeights
    teacher: NetworkWeights
    centers: State
    epoch: int | None
    step: int | None

    def network(self, which: str) -> NetworkWeights:
        """ "student" or "teacher"."""
        return {"student": self.student, "teacher": self.teacher}[which]


def read_networks(path: Path | str) -> SavedNetworks:
    """Raises OptionError if the file is missing, cannot be read without running code, or holds no weights in a form known here."""
    content = load_checkpoint_file(Path(path))
    networks = {which: split(content[which]) for which in ("student", "teacher") if _is_state(content.get(which))}
    if not networks:
        plain = next((content[name] for name in CONTAINERS if _is_state(content.get(name))), content)
        if not _is_state(plain):
            entries = ", ".join(str(name) for name in list(content)[:6]) or "nothing"
            raise OptionError("checkpoint", f"'{path}' holds no weights in a form known here (but {entries})", "give a checkpoint")
        networks = {"teacher": split(plain)}
    first = next(iter(networks.values()))
    centers = content.get("dino_loss", content.get("loss"))
    return SavedNetworks(
        origin=_origin(content),
        student=networks.get("student", first),
        teacher=networks.get("teacher", first),
        centers=_in_our_names(centers) if isinstance(centers, dict) else {},
        epoch=_completed_epochs(content),
        step=content["step"] if isinstance(content.get("step"), int) else None,
    )


def load_backbone(backbone: Backbone, path: Path | str, *, which: str, resize_positions: bool) -> SavedNetworks:
    """Load the weights of the student's or teacher's backbone (`which`) from a file, strictly; what an evaluation starts from.

    Raises OptionError, with the architecture that the file holds and missing, unexpected and mis-shaped entries, if they do not fit.
    """
    saved = read_networks(path)
    published = saved.network(which).backbone
    state, resizable = _fitting(backbone, published, resize_positions)
    _load(backbone, state, what=_what("backbone", saved), remedy=_remedy([], resizable), held=_held(backbone, state, published))
    return saved


def load_networks(
    saved: SavedNetworks, *, student: MultiCropNetwork, teacher: MultiCropNetwork, loss: nn.Module, fresh_heads: str, resize_positions: bool
) -> None:
    """Load student, teacher and centres, strictly, but for the heads, prototypes and centres that `fresh_heads` leaves as they are.

    fresh_heads       "none", "region" (a view-only checkpoint goes on with view and region losses) or "all" (a backbone alone)
    resize_positions  resize tables of positions that were made for other windows or another image size

    Raises OptionError, with missing, unexpected and mis-shaped entries, if they do not fit, and with the architecture that the file holds
    if the backbone is what does not.
    """
    fresh = FRESH[fresh_heads]
    if fresh_heads == "region" and not any(name.startswith(fresh) for name in student.state_dict()):
        raise OptionError("fresh_heads", "'region', but the loss asks for no region head", "use loss=view_region, or fresh_heads=none")
    if fresh_heads == "region" and any(name.startswith(fresh) for name in saved.student.heads):
        raise OptionError("fresh_heads", "'region', but the checkpoint has a region head", "use fresh_heads=none to go on with it, or all")
    for name, network, weights in (("student", student, saved.student), ("teacher", teacher, saved.teacher)):
        backbone, resizable = _fitting(network.backbone, weights.backbone, resize_positions)
        state = {f"backbone.{entry}": value for entry, value in backbone.items()} | weights.heads
        _load_but(network, state, fresh, saved, name, resizable, _held(network.backbone, backbone, weights.backbone))
    _load_but(loss, saved.centers, fresh, saved, "loss", [], None)


def split(state: State) -> NetworkWeights:
    """One network's entries, of any kind of file, into backbone and heads."""
    state = _without_prefix(state, "module.")
    if any(name.startswith("view_prototypes.") for name in state):  # ours
        heads = {name: value for name, value in state.items() if not name.startswith("backbone.")}
        return NetworkWeights({name.removeprefix("backbone."): value for name, value in state.items() if name not in heads}, heads)
    places = {name: next((theirs for theirs in HEADS if name.startswith(theirs)), None) for name in state}
    if not any(theirs is not None and "last_layer" in theirs for theirs in places.values()):  # a supervised network may have a `head` too
        return NetworkWeights(_without_prefix(state, "backbone."), {})
    return NetworkWeights(
        backbone=_without_prefix({name: value for name, value in state.items() if places[name] is None}, "backbone."),
        heads={HEADS[theirs] + name.removeprefix(theirs): state[name] for name, theirs in places.items() if theirs is not None},
    )


def _load_but(
    module: nn.Module, state: State, fresh: tuple[str, ...], saved: SavedNetworks, name: str, resizable: list[str], held: str | None
) -> None:
    """Strictly, but for entries that begin with one of `fresh`: they stay."""
    here = module.state_dict()
    state = {entry: value for entry, value in state.items() if not entry.startswith(fresh)}
    state |= {entry: value for entry, value in here.items() if entry.startswith(fresh)}
    missing = [entry for entry in here if entry not in state]
    _load(module, state, what=_what(name, saved), remedy=_remedy(missing, resizable), held=held)


def _load(module: nn.Module, state: State, *, what: str, remedy: str, held: str | None) -> None:
    """`strict_load`; its error begins with what the file holds, if that is given."""
    try:
        strict_load(module, state, option="checkpoint", what=what, remedy=remedy)
    except OptionError as error:
        if held is None:
            raise
        option, found, remedy = error.args
        raise OptionError(option, f"the file holds {held}, and {found}", remedy) from None


def _held(backbone: Backbone, state: State, published: State) -> str | None:
    """The architecture of `published`, if that can be told and `state`, the same in the names of `backbone`, does not fit."""
    here = {name: value.shape for name, value in backbone.state_dict().items()}
    there = {name: value.shape if isinstance(value, Tensor) else None for name, value in state.items()}
    return recognise(published) if here != there else None


def _fitting(backbone: Backbone, published: State, resize_positions: bool) -> tuple[State, list[str]]:
    """`published` in the names of `backbone`, without what no network of ours keeps; and which of its entries have another shape but
    could be resized. With `resize_positions` they are, and none is left."""
    here = {name: value.shape for name, value in backbone.state_dict().items()}
    state = backbone.from_published(published)
    state = {name: value for name, value in state.items() if name in here or not (_is_index(value) or CLASSIFIER.fullmatch(name))}
    resized = {}
    for name, value in state.items():
        if isinstance(value, Tensor) and name in here and value.shape != here[name]:
            table = backbone.resize_positions(name, value, here[name])
            if table is not None:
                resized[name] = table
    return (state | resized, []) if resize_positions else (state, list(resized))


def _remedy(missing: list[str], resizable: list[str]) -> str:
    """What would make the file fit, as far as that can be told from the entries it lacks."""
    remedies = [SAME_NETWORK]
    heads = [name for name in missing if name.startswith(FRESH["all"])]
    if heads and all(name.startswith(FRESH["region"]) for name in heads):
        remedies.append("fresh_heads=region to begin with a fresh region head")
    elif heads:
        remedies.append("fresh_heads=all to begin with fresh heads")
    if resizable:
        remedies.append(f"resize_positions=true to resize the {len(resizable)} tables of positions among them")
    return ", or ".join(remedies)


def _what(name: str, saved: SavedNetworks) -> str:
    return f"{name} of {saved.origin}" if saved.origin != OURS else name


def _origin(content: dict[str, Any]) -> str:
    if "step" in content and ("loss" in content or "config" in content):
        return OURS
    if "dino_loss" not in content:
        return "another program"
    options = vars(content["args"]) if hasattr(content.get("args"), "__dict__") else {}
    made_with = [f"--{name} {options[name]}" for name in ("arch", "cfg") if options.get(name)]
    return f"the original ({' '.join(made_with)})" if made_with else "the original"


def _completed_epochs(content: dict[str, Any]) -> int | None:
    epoch = content["sampler"]["epoch"] if "sampler" in content else content.get("epoch")
    return epoch if isinstance(epoch, int) else None


def _in_our_names(centers: dict[str, Any]) -> dict[str, Any]:
    return {CENTERS.get(name, name): value for name, value in centers.items()}


def _is_state(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(entry, Tensor) for entry in value.values())


def _is_index(value: Any) -> bool:
    """Counters, which have no axis, are none."""
    return isinstance(value, Tensor) and value.dim() > 0 and value.dtype in (torch.int64, torch.int32)


def _without_prefix(state: State, prefix: str) -> State:
    """Also where it stands twice; only if every entry has it."""
    while state and all(name.startswith(prefix) for name in state):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state
