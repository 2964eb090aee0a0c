"""Lists the published models, or fetches the checkpoint of one. Imports no torch."""

from dataclasses import dataclass
from typing import Any

from esvit import zoo
from esvit.errors import OptionError


@dataclass(kw_only=True)
class Zoo:
    """model   name of the model to fetch; None: print the table of all
    token   the storage's access token, a query string; None: that of the environment variable ESVIT_ZOO_TOKEN
    server  address of a copy of the storage; None: the published one
    """

    model: str | None
    token: str | None
    server: str | None

    def run(self, runtime: Any = None) -> None:
        """Print what was asked for. Raises OptionError for an unknown model, and when a checkpoint cannot be had."""
        server = self.server or zoo.published_server()
        if not server.startswith(("http://", "https://")):
            raise OptionError("task.server", f"'{server}' is no web address", "give http://... or https://...")
        if self.model is None:
            print(zoo.table())
            print("\nfetch one:     python run.py task=zoo task.model=NAME")
            print("reproduce one: python run.py experiment=published/NAME data.root=TRAIN_IMAGES")
            return
        chosen = zoo.model(self.model)
        accuracy = f"linear {chosen.linear} %, k-NN {chosen.knn} % (published)"
        print(f"{chosen.name}: {chosen.architecture}, {chosen.tasks}, {chosen.dataset}, {accuracy}")
        for kind, url in chosen.urls(server).items():
            print(f"  {kind:<11} {url}")
        path = zoo.fetch_checkpoint(chosen, server=server, token=self.token)
        print(f"checkpoint={path}    (backbone={chosen.backbone})")
