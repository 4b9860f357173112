"""Sums over valid clips, and counts of what was right."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from common.metrics import top_k_counts
from training.losses import summed_cross_entropy, summed_distillation


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_clips_that_are_not_valid_add_nothing(label_smoothing):
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.tensor([0, 3, 6, -1, 2])
    valid = torch.tensor([True, False, True, False, True])
    loss = summed_cross_entropy(logits, labels, valid, label_smoothing=label_smoothing)
    kept = cross_entropy(logits[valid], labels[valid], label_smoothing=label_smoothing, reduction="none").sum()
    assert torch.allclose(loss, kept)
    loss.backward()
    assert (logits.grad[~valid] == 0).all() and (logits.grad[valid] != 0).all()


def test_no_valid_clip_at_all_is_zero():
    logits = torch.randn(2, 3, requires_grad=True)
    loss = summed_cross_entropy(logits, torch.tensor([-1, -1]), torch.tensor([False, False]), label_smoothing=0.1)
    loss.backward()
    assert loss == 0 and (logits.grad == 0).all()


def test_distillation_by_hand():
    """Twice the temperature, a quarter of the divergence: times temperature**2 that is what Hinton's gradients are."""
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 0.0, 0.0], [1.0, 2.0, 3.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, 1.0, 0.0], [5.0, -5.0, 0.0], [1.0, 2.0, 3.0]])
    valid = torch.tensor([True, False, True])
    loss = summed_distillation(logits, teacher, valid, temperature=2.0)
    p, q = (teacher[0] / 2).softmax(0), (logits[0] / 2).softmax(0)
    assert loss.item() == pytest.approx(
        4 * (p * (p / q).log()).sum().item()
    )  # the third agrees, the second is left out
    loss.backward()
    torch.testing.assert_close(logits.grad[0], 2 * (q - p))
    assert not logits.grad[1].any() and logits.grad[2].abs().max() < 1e-6


def test_top_k():
    scores = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1], [0.1, 0.4, 0.3, 0.2], [0.9, 0.0, 0.0, 0.0]])
    labels = torch.tensor([3, 2, 2, -1])
    assert top_k_counts(scores, labels, ks=(1, 2, 3)).tolist() == [1, 2, 3]


def test_equal_scores_count_as_argmax_has_it():
    scores = torch.randint(0, 4, (500, 8), generator=torch.Generator().manual_seed(0)).float()
    labels = torch.arange(500) % 8
    assert top_k_counts(scores, labels, ks=(1,))[0] == (scores.argmax(1) == labels).sum()
    assert top_k_counts(torch.zeros(4, 8), torch.arange(4), ks=(1, 3)).tolist() == [1, 3]


def test_nan_scores_are_not_correct():
    assert top_k_counts(torch.full((4, 8), torch.nan), torch.arange(4)).tolist() == [0, 0]


def test_fewer_classes_than_k():
    assert top_k_counts(torch.eye(3), torch.arange(3)).tolist() == [3, 3]
