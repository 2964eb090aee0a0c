"""Linear probes: the published numbers of one step, independence of one another, columns of a row, and accuracies."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from esvit.evaluation.linear import Accuracy, CachedRows, Choice, LabelledRows, Probes, RowLayout, best_of, cosine_share, fresh_classifier
from esvit.runtime import Runtime
from tests.backbones.networks import micro_vit, swin

CPU = torch.device("cpu")
PLAIN = RowLayout(widths=[4, 6], regions=0)


def probes(*choices: Choice, layout: RowLayout = PLAIN, images_per_step: int = 512) -> Probes:
    return Probes(choices=choices, layout=layout, classes=3, images_per_step=images_per_step, seed=0, device=CPU)


def batches(count: int, width: int = 10) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, width, generator=generator), torch.randint(3, (8,), generator=generator)) for _ in range(count)]


def test_two_steps_are_those_of_sgd_with_momentum_written_out():
    """lr * 512 / 256; v = 0.9 v + g; w -= lr v; no weight decay."""
    trained = probes(Choice(0.05, 2, "pooled"))
    weight, bias = (parameter.detach().clone() for parameter in fresh_classifier(10, 3, seed=0).parameters())
    velocity = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for (rows, labels), share in zip(batches(2), (1.0, 0.5), strict=True):
        loss = trained.step(rows, labels, rate_share=share)
        parameters = [weight.requires_grad_(), bias.requires_grad_()]
        expected = F.cross_entropy(rows @ weight.T + bias, labels)
        gradients = torch.autograd.grad(expected, parameters)
        velocity = [0.9 * each + gradient for each, gradient in zip(velocity, gradients, strict=True)]
        weight, bias = (each.detach() - 0.1 * share * v for each, v in zip(parameters, velocity, strict=True))
        torch.testing.assert_close(loss, expected.detach()[None])
    torch.testing.assert_close(trained.linears[0].weight.detach(), weight)
    torch.testing.assert_close(trained.linears[0].bias.detach(), bias)


def test_a_probe_has_the_same_bits_alone_and_beside_others():
    choice = Choice(0.1, 1, "pooled")
    alone, beside = probes(choice), probes(Choice(0.01, 1, "pooled"), Choice(1e38, 2, "pooled"), choice)
    for rows, labels in batches(5):
        alone.step(rows, labels, rate_share=1.0)
        beside.step(rows, labels, rate_share=1.0)
    for ours, theirs in zip(alone.linears[0].parameters(), beside.linears[2].parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert not beside.linears[1].weight.isfinite().all()


def test_fresh_weights_have_a_deviation_of_a_hundredth_and_leave_torchs_generator_alone():
    before = torch.get_rng_state()
    linear = fresh_classifier(1000, 100, seed=3).requires_grad_(False)
    assert torch.equal(torch.get_rng_state(), before)
    assert linear.weight.std().item() == pytest.approx(0.01, rel=0.02) and not linear.bias.any()
    assert torch.equal(linear.weight, fresh_classifier(1000, 100, seed=3).weight)


def test_learning_rates_fall_by_a_cosine_from_all_to_nearly_nothing():
    assert [cosine_share(epoch, 4) for epoch in range(5)] == pytest.approx([1, 0.8535534, 0.5, 0.1464466, 0], abs=1e-6)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (Choice(0.1, 1, "pooled"), slice(4, 10)),
        (Choice(0.1, 2, "pooled"), slice(0, 10)),
        (Choice(0.1, 1, "pooled_and_regions"), slice(4, 13)),
        (Choice(0.1, 2, "pooled_and_regions"), slice(0, 13)),
    ],
)
def test_a_probe_reads_its_last_blocks_and_the_regions_if_it_wants_them(choice, expected):
    assert RowLayout(widths=[4, 6], regions=3).columns(choice) == expected


def test_rows_are_the_networks_last_blocks_and_the_mean_of_its_regions():
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    network = micro_vit().eval()
    layout = RowLayout.of(network, [Choice(0.1, 1, "pooled"), Choice(0.1, 2, "pooled_and_regions")])
    assert (layout.widths, layout.regions, layout.width) == ([24, 24], 24, 72)
    with torch.no_grad():
        rows, features = layout.describe().of(network, images), network(images)
    torch.testing.assert_close(rows[:, layout.columns(Choice(0.1, 1, "pooled"))], features.pooled)
    torch.testing.assert_close(rows[:, 48:], features.regions.mean(dim=1))


def test_the_last_four_blocks_of_a_swin_have_the_width_of_both_their_stages():
    network = swin().eval()  # blocks of 24, 24, 48, 96, 96 and 192
    layout = RowLayout.of(network, [Choice(0.1, 4, "pooled")])
    assert layout.width == 48 + 96 + 96 + 192
    assert layout.describe().of(network, torch.zeros(1, 3, 32, 32)).shape == (1, layout.width)


def test_accuracies_count_planted_hits_of_the_rows_asked_for():
    """Six classes: the row's first six numbers are its logits, so the class of its largest number is the prediction."""
    trained = Probes(
        choices=[Choice(0.1, 1, "pooled"), Choice(0.2, 1, "pooled")], layout=RowLayout([6], 0), classes=6, images_per_step=256, seed=0,
        device=CPU,
    )  # fmt: skip
    with torch.no_grad():
        trained.linears[0].weight.copy_(torch.eye(6))
        trained.linears[1].weight.fill_(float("nan"))
    features = torch.tensor([6.0, 5, 4, 3, 2, 1]).repeat(5, 1)
    images = LabelledRows(features=features, labels=torch.tensor([0, 1, 5, 0, 4]), numbers=np.array([0, 1, 2, 4]))
    assert trained.accuracies(images, [0, 1]) == [Accuracy(top1=25, top5=75), Accuracy(top1=0, top5=0)]


def test_of_equally_good_probes_the_first_is_the_best():
    assert best_of([Accuracy(50, 90), Accuracy(60, 80), Accuracy(60, 99)]) == 1


def test_cached_rows_come_in_a_new_order_every_epoch_and_go_on_from_any_step():
    runtime = Runtime(device="cpu", precision="fp32", seed=0, deterministic=None, threads=1, timeout_minutes=1, stall_minutes=0)
    numbers = np.array([1, 3, 4, 6, 7, 8, 9])
    table = LabelledRows(features=torch.arange(10.0)[:, None], labels=torch.arange(10), numbers=numbers)
    rows = CachedRows(images=table, batch_size=2, runtime=runtime)
    assert (rows.steps_per_epoch, rows.images_per_step, rows.image_count) == (3, 2, 7)
    labels = [labels.tolist() for _, labels in itertools.islice(rows.from_step(0), 9)]
    for epoch in range(3):
        seen = sum(labels[3 * epoch : 3 * epoch + 3], [])
        assert len(set(seen)) == 6 and set(seen) < set(numbers.tolist())
    assert labels[:3] != labels[3:6] != labels[6:]
    assert [labels.tolist() for _, labels in itertools.islice(rows.from_step(4), 5)] == labels[4:]
    features, ids = next(rows.from_step(0))
    assert torch.equal(features[:, 0].long(), ids)
