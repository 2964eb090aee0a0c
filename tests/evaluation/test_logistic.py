"""Logistic regression: a solution known in closed form, the condition that every solution meets, and the scaling of features."""

import math

import pytest
import torch
import torch.nn.functional as F

from esvit.evaluation.logistic import Accuracy, LogisticRegression, Scaling, accuracy


def overlapping() -> tuple[torch.Tensor, torch.Tensor]:
    """120 images of four classes that no plane separates."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 4
    return torch.randn(4, 5, generator=generator)[labels] + torch.randn(120, 5, generator=generator), labels


def fitted(features: torch.Tensor, labels: torch.Tensor, *, classes: int, penalty: float) -> LogisticRegression:
    model = LogisticRegression(features, labels, classes=classes, penalty=penalty)
    model.advance(500)
    assert model.has_converged
    return model


@pytest.mark.parametrize("weight", [0.5, 1.0, 2.0])
def test_two_points_have_the_solution_that_calculus_gives(weight):
    """x = -1 and 1 of two classes: W = (-w, w), no bias; the derivative of log(1 + exp(-2w)) + penalty w^2 is 0 at
    penalty = 1 / (w (1 + exp(2w)))."""
    penalty = 1 / (weight * (1 + math.exp(2 * weight)))
    model = fitted(torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1]), classes=2, penalty=penalty)
    torch.testing.assert_close(model.weights, torch.tensor([[-weight, weight]]), atol=1e-3, rtol=0)
    torch.testing.assert_close(model.biases, torch.zeros(2), atol=1e-3, rtol=0)


def test_without_features_the_biases_say_how_frequent_the_classes_are():
    model = fitted(torch.zeros(8, 1), torch.tensor([0, 0, 0, 0, 1, 1, 2, 2]), classes=3, penalty=1.0)
    torch.testing.assert_close(model.biases.softmax(dim=0), torch.tensor([0.5, 0.25, 0.25]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("penalty", [1e-3, 0.1])
def test_the_gradient_of_the_objective_as_autograd_has_it_is_zero_at_the_solution(penalty):
    features, labels = overlapping()
    model = fitted(features, labels, classes=4, penalty=penalty)
    weights, biases = model.weights.double().requires_grad_(), model.biases.double().requires_grad_()
    loss = F.cross_entropy(features.double() @ weights + biases, labels) + penalty / 2 * weights.square().sum()
    loss.backward()
    assert weights.grad is not None and biases.grad is not None
    assert max(weights.grad.abs().max(), biases.grad.abs().max()) < 2e-5


def test_chunks_of_images_give_the_solution_of_all_at_once(monkeypatch):
    features, labels = overlapping()
    whole = fitted(features, labels, classes=4, penalty=0.01)
    monkeypatch.setattr("esvit.evaluation.logistic._CHUNK_NUMBERS", 4 * 7)
    chunked = fitted(features, labels, classes=4, penalty=0.01)
    torch.testing.assert_close(chunked.weights, whole.weights, atol=1e-3, rtol=0)
    assert accuracy(chunked, features, labels) == accuracy(whole, features, labels)


def test_a_fit_in_blocks_is_the_fit_in_one_go():
    features, labels = overlapping()
    model = LogisticRegression(features, labels, classes=4, penalty=0.01)
    blocks = 0
    while not model.has_converged:
        model.advance(5)
        blocks += 1
    assert blocks > 1
    torch.testing.assert_close(model.weights, fitted(features, labels, classes=4, penalty=0.01).weights, atol=1e-3, rtol=0)


def test_a_fit_that_is_cut_short_says_so():
    model = LogisticRegression(*overlapping(), classes=4, penalty=1e-6)
    model.advance(3)
    assert (model.iterations, model.has_converged) == (3, False)


def test_no_step_raises_the_objective():
    model = LogisticRegression(*overlapping(), classes=4, penalty=1e-4)
    losses = [model.loss]
    while not model.has_converged:
        model.advance(1)
        losses.append(model.loss)
    assert losses[0] == pytest.approx(math.log(4))  # all classes alike
    assert losses == sorted(losses, reverse=True)


def test_accuracy_counts_the_first_and_the_first_five():
    model = LogisticRegression(torch.zeros(1, 6), torch.tensor([0]), classes=6, penalty=1.0)
    model.weights = torch.eye(6)
    ranking = torch.tensor([[6.0, 5, 4, 3, 2, 1]])
    assert accuracy(model, ranking.expand(4, -1), torch.tensor([0, 1, 4, 5])) == Accuracy(top1=25, top5=75)


def test_standardized_features_have_mean_zero_and_deviation_one_and_others_follow_them():
    features = torch.tensor([[1.0, 5.0, 3.0], [3.0, 5.0, 9.0]])
    scaling = Scaling("standardize", features)
    assert scaling(torch.tensor([[4.0, 7.0, 6.0]])).tolist() == [[2, 2, 0]]  # a constant feature is left at its scale
    assert scaling(features).tolist() == [[-1, 0, -1], [1, 0, 1]]


def test_rows_of_unit_length_keep_their_direction():
    features = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    torch.testing.assert_close(Scaling("unit_length", features)(features), torch.tensor([[0.6, 0.8], [0, 1]]))
