"""Options of the tasks: what a run does. One file for each kind of task."""

from conf.schema.tasks import analyze, classify, comparison, dense, finetune, images, linear, pretrain, tools

SCHEMAS = {
    **analyze.SCHEMAS,
    **classify.SCHEMAS,
    **comparison.SCHEMAS,
    **dense.SCHEMAS,
    **linear.SCHEMAS,
    **pretrain.SCHEMAS,
    **finetune.SCHEMAS,
    **images.SCHEMAS,
    **tools.SCHEMAS,
}
