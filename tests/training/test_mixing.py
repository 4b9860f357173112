"""VideoMix: what is mixed with what, and what the labels say of it."""

import numpy as np
import pytest
import torch

from common.config import MixConfig
from training.mixing import mix_clips

CUTMIX = MixConfig(cutmix_prob=1.0)
MIXUP = MixConfig(mixup_alpha=0.2)
REFERENCE = MixConfig(cutmix_prob=1.0, cutmix_box="reference")


def mixed(mix, seed, *, valid=None, batch=6, num_frames=4, size=16):
    """Clip n is the number n everywhere, so that a mixed one says what it is made of."""
    clips = torch.arange(batch, dtype=torch.float32)[:, None, None, None, None].expand(-1, 3, num_frames, size, size)
    valid = torch.ones(batch, dtype=torch.bool) if valid is None else torch.tensor(valid)
    before = clips.clone()
    result = mix_clips(clips, valid, mix, np.random.default_rng(seed))
    assert (clips == before).all()
    return result


@pytest.mark.parametrize("mix", [CUTMIX, MIXUP])
@pytest.mark.parametrize("seed", range(20))
def test_a_clip_is_its_own_by_the_share_that_the_label_says(mix, seed):
    clips, partners, share = mixed(mix, seed)
    own = torch.arange(6.0)
    expected = share * own + (1 - share) * partners
    torch.testing.assert_close(clips.mean((1, 2, 3, 4)), expected, atol=1e-5, rtol=0)
    assert sorted(partners.tolist()) == list(range(6)) and 0 <= share <= 1


@pytest.mark.parametrize("seed", range(20))
def test_cutmix_cuts_a_box_of_rows_and_columns_out_of_all_frames(seed):
    clips, partners, share = mixed(CUTMIX, seed)
    if share == 1:
        return
    n = int((partners != torch.arange(6)).nonzero()[0])
    pasted = clips[n] == partners[n]
    assert (pasted == pasted[:1, :1]).all()  # the same in all colours and frames
    rows, columns = pasted[0, 0].any(1), pasted[0, 0].any(0)
    assert (pasted[0, 0] == rows[:, None] & columns[None]).all()
    for side in (rows, columns):  # one piece
        assert side.int().diff().abs().sum() <= 2
    assert share == pytest.approx(1 - (rows.sum() * columns.sum()).item() / 256)


def test_the_references_box_spans_frames_and_rows_and_hardly_moves_the_label():
    """PaddleVideo, loader/pipelines/mix.py: the box is counted against rows x columns."""
    most, moved = 0.0, 0.0
    for seed in range(300):
        clips, partners, share = mixed(REFERENCE, seed, batch=2, num_frames=8, size=32)
        if partners[0] == 0:
            continue
        pasted = clips[0, 0] == 1  # [T, H, W]
        assert (pasted == pasted[:, :, :1]).all()
        frames, rows = pasted[:, :, 0].any(1), pasted[:, :, 0].any(0)
        assert share == pytest.approx(1 - (frames.sum() * rows.sum()).item() / 32**2)
        most, moved = max(most, pasted.float().mean().item()), max(moved, 1 - share)
    assert most > 0.5 and moved == pytest.approx(most * 8 / 32)


def test_only_clips_that_can_be_read_are_mixed():
    valid = [True, False, True, True, False, True]
    for mix in (CUTMIX, MIXUP, REFERENCE):
        for seed in range(20):
            clips, partners, _ = mixed(mix, seed, valid=valid)
            for n, is_valid in enumerate(valid):
                assert valid[partners[n]] if is_valid else (partners[n] == n and (clips[n] == n).all())


def test_how_often_mixup_and_cutmix_are_drawn():
    both = MixConfig(cutmix_prob=0.5, mixup_alpha=0.2)
    kinds = {"cutmix": 0, "mixup": 0}
    shares = []
    for seed in range(400):
        clips, partners, share = mixed(both, seed, batch=2)
        if partners[0] == 1 and 0.02 < share < 0.98:
            is_mixup = len(clips[0].unique()) == 1
            kinds["mixup" if is_mixup else "cutmix"] += 1
            shares += [share] if is_mixup else []
    # Of a Beta(0.2, 0.2), 52 % lies between 0.02 and 0.98; of CutMix nearly all. Half of the pairs are not swapped.
    assert 65 < kinds["cutmix"] < 125 and 30 < kinds["mixup"] < 80
    assert abs(np.mean(shares) - 0.5) < 0.15


def test_none_and_one_clip_stay_as_they_are():
    clips, partners, share = mixed(MixConfig(), 0)
    assert share == 1 and (clips[:, 0, 0, 0, 0] == torch.arange(6)).all()
    for mix in (CUTMIX, MIXUP, REFERENCE):
        clips, partners, _ = mixed(mix, 0, batch=1)
        assert partners.tolist() == [0] and not clips.any()


def test_the_same_draw_the_same_mix():
    one, two, three = mixed(CUTMIX, 1), mixed(CUTMIX, 1), mixed(CUTMIX, 2)
    assert (one.clips == two.clips).all() and one.share == two.share
    assert one.share != three.share
