"""A network hears in every step how much of training is done."""

from tests.command_line.commands import assert_same_training, losses, succeeded

VIL = (
    "backbone=vil_small", "backbone.image_size=32", "backbone.patch_sizes=[2,2]", "backbone.dims=[8,16]", "backbone.depths=[1,1]",
    "backbone.heads=[2,2]", "backbone.window_sizes=[3,3]", "backbone.sliding=[true,true]", "backbone.global_tokens=[1,0]",
    "backbone.absolute_positions=[false,false]", "backbone.drop_path_rate=0", "backbone.neighbours=random", "epochs=1",
)  # fmt: skip


def test_random_neighbours_give_way_to_all_at_their_share_of_training_also_after_a_stop(commands, tiny, tmp_path):
    """Four steps, with all neighbours from the third on; a run stopped after the third goes on as if it had not been."""
    options = (*(option for option in tiny if not option.startswith(("backbone=", "epochs="))), *VIL)
    never, whole, stopped = (tmp_path / name for name in ("never", "whole", "stopped"))
    succeeded(commands.run(*options, "max_steps=3", f"output_dir={never}"))
    succeeded(commands.run(*options, "backbone.all_neighbours_from=0.5", f"output_dir={whole}"))
    for limit in ("max_steps=3", "max_steps=4"):
        succeeded(commands.run(*options, "backbone.all_neighbours_from=0.5", limit, f"output_dir={stopped}"))
    assert losses(whole)[:2] == losses(never)[:2]
    assert losses(whole)[2]["loss/total"] != losses(never)[2]["loss/total"]
    assert_same_training(stopped, whole)
