"""Every option as a typed dataclass: its default, unit and meaning, and (in `_target_`) the class that it configures.

A default lives here and nowhere else. The comment behind an option is what `python run.py --help` prints.
"""

from hydra.core.config_store import ConfigStore

from conf import recipes
from conf.schema import augmentations, data, models, root, running, sampling, tasks, training


def register() -> None:
    """Make every schema known to Hydra under schema/<group>/<name>, where a preset begins with its schema; and the recipes of sweeps."""
    recipes.register()
    store = ConfigStore.instance()
    store.store(name="root_schema", node=root.Root)
    for module in (models, augmentations, data, sampling, training, running, tasks):
        for (group, name), node in module.SCHEMAS.items():
            store.store(group=f"schema/{group}", name=name, node=node)
