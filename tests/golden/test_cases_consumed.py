"""No golden case is forgotten: every file of the folder is run by a test, or named here with the reason why not; none is missing."""

from pathlib import Path

SWIN = ["tiny_w7", "tiny_w14", "small_w7", "small_w14", "base_w7", "base_w14", "large_w7"]
CVT = [
    *("tiny_s1", "s1_w14", "s1_shift", "s1_rpe", "s1_rpe_w14", "s1_rpe_shift", "s1_resstem_w14", "s1_resstem_rpe_w14"),
    *("s3", "s3_w14", "s3_rpe", "s3_resstem_w14"),
]

CONSUMED = {
    "SEED.txt": "cases.py",
    **{f"arch_swin_{model}.npz": "test_backbones.py" for model in SWIN},
    **{f"arch_cvt_{model}.npz": "test_cvt.py" for model in CVT},
    **{f"arch_{model}.npz": "test_vit.py" for model in ("deit_tiny", "deit_small", "deit_small_p8", "vit_base", "resnet50")},
    **{f"arch_vil_{model}.npz": "test_vil.py" for model in ("2262", "small_default")},
    "vil_sliding_chunk_attention.npz": "test_vil.py",
    "layernorm_eps.npz": "test_backbones.py",
    "linear_eval_dims.json": "test_backbones.py",
    "dinohead.npz": "test_heads.py",
    "loss_view.npz": "test_losses.py",
    "loss_view_mixup.npz": "test_losses.py",
    "loss_view_region.npz": "test_losses.py",
    "schedules.npz": "test_optimization.py",
    "clip_gradients.npz": "test_optimization.py",
    "lars.npz": "test_optimization.py",
    "knn.npz": "test_knn.py",
    "attn_entropy.npz": "test_attention_entropy.py",
    "correspondence.npz": "test_correspondence.py",
    "train_cvt_dense_adamw.npz": "test_cvt.py",
    "train_vil_dense_adamw.npz": "test_vil.py",
    "train_swin_view_adamw.npz": "test_training.py",
    "train_swin_dense_adamw.npz": "test_training.py",
    "train_swin_dense_sgd.npz": "test_training.py",
    "train_swin_dense_lars.npz": "test_training.py",
}

NOT_OURS_YET = {}


def test_every_case_is_consumed_or_named_as_not_ours(goldens):
    found = {path.name for path in goldens.folder.iterdir()}
    unknown = found - CONSUMED.keys() - NOT_OURS_YET.keys()
    assert not unknown, f"cases that no test runs; consume them or name them in NOT_OURS_YET: {sorted(unknown)}"


def test_no_case_that_we_consume_is_missing(goldens):
    missing = [name for name in CONSUMED if not (goldens.folder / name).exists()]
    assert not missing, f"missing from {goldens.folder}: {missing}"


def test_no_case_is_both_consumed_and_not_ours():
    assert not CONSUMED.keys() & NOT_OURS_YET.keys()


def test_every_file_that_consumes_cases_exists():
    absent = {file for file in CONSUMED.values() if not (Path(__file__).parent / file).exists()}
    assert not absent, f"no such test files: {sorted(absent)}"
