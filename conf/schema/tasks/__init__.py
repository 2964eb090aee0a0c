"""Options of the tasks: what a run does. One file for each kind of task."""

from conf.schema.tasks import pretrain, tools

SCHEMAS = {**pretrain.SCHEMAS, **tools.SCHEMAS}
