"""Training learns, does not depend on the number of processes, and resumes where it stopped."""

import csv
import json
import re
import shutil

import pytest
import torch
import yaml
from torch.nn.functional import cross_entropy

from common.config import load_config
from common.distributed import start_process
from common.weights import load_weights
from dali_pipelines import InputError, Manifest
from tests.commands import run, run_forked, run_here
from training.checkpoints import load_checkpoint, save_checkpoint
from training.engine import Trainer

pytestmark = pytest.mark.slow


def train(config_file, *overrides, resume=False):
    config = load_config(str(config_file), overrides)
    with start_process("cpu") as process:
        trainer = Trainer(config, process, resume=resume)
        trainer.train()
    return trainer


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return [line["train/loss"] for line in lines(folder) if "train/loss" in line]


def faults_by_step(folder):
    """Of each epoch so far."""
    return [line["train/faults"] for line in lines(folder) if "train/loss" in line]


def assert_equal_weights(one, two, *, within=0.0, name="last"):
    first, second = (load_weights(folder / f"{name}.safetensors").state for folder in (one, two))
    for name, value in first.items():
        torch.testing.assert_close(
            value, second[name], atol=within, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_a_run_writes_what_it_promises(config_file, tmp_path, capsys):
    train(config_file)
    output = tmp_path / "output"
    assert {path.name for path in output.iterdir()} == {
        "best.safetensors",
        "last.safetensors",
        "checkpoints",
        "tensorboard",
        "metrics.jsonl",
        "config.yaml",
    }
    said = capsys.readouterr().out
    assert (
        "global batch 4 = 1 ranks x 4 clips x 1 micro-steps; 3 steps per epoch (1 clips left over), 9 in 3 epochs"
        in said
    )
    assert "epoch 1: val top-1 0." in said and f"best so far: {output}/best.safetensors" in said
    weights = load_weights(output / "best.safetensors")
    assert weights.classes == ("ash", "birch", "cedar") and weights.preprocessing["num_frames"] == 4
    assert yaml.safe_load((output / "config.yaml").read_text())["data"]["crop_size"] == 32
    logged = lines(output)
    assert [line["step"] for line in logged if "train/loss" in line] == list(range(1, 10))
    assert {"train/lr", "train/grad_norm", "train/top1", "train/top5", "speed/clips_per_second"} <= set(logged[0])
    assert 0 <= logged[0]["speed/data_wait_share"] <= 1
    assert sum("val/top1" in line for line in logged) == 3


def test_tensorboard_has_the_curves_and_an_image_of_the_clips(config_file, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(config_file, "train.epochs=1")
    events = EventAccumulator(str(tmp_path / "output" / "tensorboard")).Reload()
    assert {"train/loss", "train/lr", "speed/data_wait_share", "val/top1"} <= set(events.Tags()["scalars"])
    picture = events.Images("train/clips")[0]
    assert (picture.height, picture.width) == (4 * 32, 4 * 32)


def test_a_small_validation_manifest_is_mentioned(small_data):
    from training.startup import _validation_notes

    manifest = Manifest.read(small_data / "val.csv")
    assert list(_validation_notes("val.csv", manifest, ("ash", "birch", "cedar", "dogwood"))) == [
        "val.csv: 7 videos for 4 classes: the validation accuracy moves in steps of 14.3 %, and small differences mean "
        "nothing",
        "val.csv: no video of dogwood: mean class accuracy and macro F1 leave them out",
    ]
    assert list(_validation_notes("val.csv", manifest, ("ash", "birch", "cedar")))[1:] == []


def test_it_learns_what_can_be_learned(config_file, tmp_path):
    """The tint of videos that it has not seen."""
    changes = [
        "optim.name=adamw",
        "optim.lr=0.004",
        "train.epochs=25",
        "model.drop_path=0",
        "model.embed_init_std=0.02",
    ]
    train(config_file, *changes)
    validations = [line["val/top1"] for line in lines(tmp_path / "output") if "val/top1" in line]
    assert validations[-1] == 1 and losses(tmp_path / "output")[-1] < 0.5 * losses(tmp_path / "output")[0]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_stays_near_float32(config_file, tmp_path, precision):
    train(config_file, "train.epochs=1")
    train(config_file, "train.epochs=1", f"train.precision={precision}", f"output={tmp_path}/mixed")
    assert losses(tmp_path / "mixed") == pytest.approx(losses(tmp_path / "output"), rel=0.02)
    assert losses(tmp_path / "mixed") != losses(tmp_path / "output")


def test_accumulation_changes_nothing(config_file, tmp_path):
    train(config_file, "model.drop_path=0")
    for size in (1, 2):
        train(config_file, "model.drop_path=0", f"data.batch_size={size}", f"output={tmp_path}/micro{size}")
        assert losses(tmp_path / f"micro{size}") == pytest.approx(losses(tmp_path / "output"), abs=1e-5)
        assert_equal_weights(tmp_path / "output", tmp_path / f"micro{size}", within=1e-5)


@pytest.fixture
def config_with_bad_videos(config_file, small_data, tmp_path):
    """Three of thirteen training videos and one of validation are gone."""
    for name, bad in (("train", (2, 3, 11)), ("val", (5,))):
        manifest = Manifest.read(small_data / f"{name}.csv")
        videos = [manifest[n]._replace(path=f"gone{n}" if n in bad else manifest[n].path) for n in range(len(manifest))]
        Manifest(videos, root=small_data, classes=manifest.classes).write(tmp_path / f"{name}.csv")
    text = config_file.read_text().replace(f"{small_data}/", f"{tmp_path}/")
    config_file.write_text(text.replace("workers: 0", "workers: 0, max_fault_fraction: 1"))
    return config_file


def fault_rows(folder):
    """[epoch, mode, sample id, path] of every row of faults.csv."""
    with open(folder / "faults.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        header, *rows = csv.reader(file)
    assert header == ["epoch", "mode", "sample_id", "path", "reason"]
    assert all(len(row) == 5 and row[4] == "no such file or directory" for row in rows)
    return [[int(epoch), mode, int(sample_id), path] for epoch, mode, sample_id, path, _ in rows]


def test_two_processes_match_one_even_with_unreadable_videos(config_with_bad_videos, small_data, tmp_path):
    settings = ["-c", config_with_bad_videos, "-o", "model.drop_path=0"]
    settings += ["train.ema_decay=0.5", "data.balance_classes=true"]
    one = run_here("train.py", *settings, "data.batch_size=2")
    assert one.returncode == 0, one.stderr
    two = run("train.py", *settings, f"output={tmp_path}/two", processes=2)
    assert two.returncode == 0, two.stderr
    assert "global batch 4 = 2 ranks x 2 clips x 1 micro-steps" in two.stdout
    assert two.stdout.count("epoch 1:") == 1 and "1 unreadable videos counted as wrong" in two.stdout
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "output"), abs=1e-5)
    assert_equal_weights(tmp_path / "output", tmp_path / "two", within=1e-5)
    assert_equal_weights(tmp_path / "output", tmp_path / "two", within=1e-5, name="ema")
    validations = [
        [line["val/top1"] for line in lines(tmp_path / name) if "val/top1" in line] for name in ("output", "two")
    ]
    assert validations[0] == validations[1] and max(validations[0]) <= 6 / 7
    rows = fault_rows(tmp_path / "output")
    assert rows == fault_rows(tmp_path / "two")
    assert [row[0] for row in rows if row[1] == "validate"] == [1, 2, 3] and {row[0] for row in rows} == {1, 2, 3}
    assert {tuple(row[1:]) for row in rows} == {
        ("validate", 5, str(small_data / "gone5")),
        *(("train", bad, str(small_data / f"gone{bad}")) for bad in (2, 3, 11)),
    }
    assert f"{small_data}/gone5: no such file or directory; counted as wrong" in one.stdout
    counts = [sum(row[:2] == [epoch, "train"] for row in rows) for epoch in (1, 2, 3)]
    assert faults_by_step(tmp_path / "two")[2::3] == counts


def test_the_loss_of_a_step_is_the_mean_over_valid_clips(config_with_bad_videos, tmp_path):
    changes = ["optim.global_batch_size=12", "train.max_steps=1", "model.drop_path=0", "data.batch_size=4"]
    with start_process("cpu") as process:
        untrained = Trainer(load_config(str(config_with_bad_videos), changes), process, resume=False)
        batches = list(untrained.train_loader)
        logits = torch.cat([untrained.network(batch.clips) for batch in batches])
    labels, valid = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("labels", "valid"))
    assert 9 <= valid.sum() <= 10
    expected = cross_entropy(logits[valid], labels[valid], label_smoothing=0.1).item()
    train(config_with_bad_videos, *changes, f"output={tmp_path}/trained")
    assert losses(tmp_path / "trained") == [pytest.approx(expected, abs=1e-6)]


@pytest.mark.parametrize("stop", [4, 6])
def test_a_resumed_run_is_the_unbroken_one(config_file, tmp_path, stop):
    """Stopped in the middle of an epoch and at its end; drop path and momentum included, bit by bit."""
    train(config_file, "optim.name=adamw", f"output={tmp_path}/unbroken")
    train(config_file, "optim.name=adamw", f"train.max_steps={stop}")
    trainer = train(config_file, "optim.name=adamw", resume=True)
    assert trainer.step == 9
    assert losses(tmp_path / "output") == losses(tmp_path / "unbroken")
    assert_equal_weights(tmp_path / "output", tmp_path / "unbroken")


def test_checkpoints_within_an_epoch_are_as_good(config_file, tmp_path):
    train(config_file, f"output={tmp_path}/unbroken")
    train(config_file, "train.checkpoint_every_steps=1", "train.max_steps=6")
    kept = sorted((tmp_path / "output" / "checkpoints").iterdir())
    assert [path.name[:13] for path in kept] == ["step_00000005", "step_00000006"]
    kept[1].unlink()  # as if killed after step 5
    assert len(losses(tmp_path / "output")) == 6
    train(config_file, resume=True)
    assert losses(tmp_path / "output") == losses(tmp_path / "unbroken")
    assert_equal_weights(tmp_path / "output", tmp_path / "unbroken")


def test_resuming_a_finished_run_changes_nothing(config_file, tmp_path, capsys):
    train(config_file)
    before = (tmp_path / "output" / "last.safetensors").read_bytes()
    train(config_file, resume=True)
    assert "all 9 steps are done already" in capsys.readouterr().out
    assert (tmp_path / "output" / "last.safetensors").read_bytes() == before


def test_an_earlier_run_is_not_overwritten(config_file, tmp_path):
    train(config_file, "train.epochs=1")
    with pytest.raises(InputError, match="of an earlier run: continue that with --resume .*name another folder"):
        train(config_file, "train.epochs=1")
    shutil.rmtree(tmp_path / "output" / "checkpoints")
    with pytest.raises(InputError, match="best.safetensors of an earlier run"):
        train(config_file, "train.epochs=1")


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(config_file):
    with pytest.raises(
        InputError,
        match=r"step \d+: the loss is .* at a learning rate of .*; clips: .*/train_\d.*; try a lower optim.lr",
    ):
        train(config_file, "optim.lr=1e30", "optim.clip_norm=null", "optim.warmup_start_lr=1e30")


@pytest.mark.parametrize(
    "override, message",
    [
        (
            "optim.global_batch_size=14",
            r"is 14, but an epoch has 13 clips, fewer than one step takes; try -o optim.global_batch_size=2 \(6 "
            r"steps an epoch\); the nearest that work: 13",
        ),
        ("data.batch_size=3", "batches of 3 each; the nearest that work: 3, 6; or data.batch_size 2, 4"),
        ("data.train=null", "data.train is not set"),
        ("data.val=/gone.csv", "/gone.csv: no such manifest"),
    ],
)
def test_settings_that_cannot_work(config_file, override, message):
    with pytest.raises(InputError, match=message):
        train(config_file, override)


@pytest.mark.parametrize(
    "override, message",
    [
        ("model.depth=3", "model.depth was 2 and is 3 now; resume with its old value"),
        ("optim.name=adamw", "optim.name was sgd and is adamw now"),
        ("data.crop_size=64", "data.crop_size was 32 and is 64 now"),
        ("data.num_frames=8", "data.num_frames was 4 and is 8 now"),
        ("data.mean=[0.5,0.5,0.5]", r"data.mean was \[0.0, 0.0, 0.0\] and is \[0.5, 0.5, 0.5\] now"),
        ("data.std=[2,2,2]", r"data.std was \[1.0, 1.0, 1.0\]"),
        ("model.patch_size=8", "model.patch_size was 16 and is 8 now"),
        ("model.attention=space_only", "model.attention was divided_space_time and is space_only now"),
        ("optim.global_batch_size=2", "optim.global_batch_size was 4 and is 2 now"),
        ("data.views_per_decode=2", "data.views_per_decode was 1 and is 2 now"),
        ("seed=1", "seed was 0 and is 1 now"),
        ("data.labels={folder}/renamed.txt", "data.labels: class 1 was 'birch' and is 'Birke' now"),
        ("data.train={folder}/other_classes.csv", "data.train: class 2 was 'cedar' and is 'Zeder' now"),
        ("data.train={folder}/fewer.csv", "data.train .*fewer.csv has changed: it has 12 videos, and had 13"),
        ("data.train={folder}/relabelled.csv", "data.train .*: its videos, their labels or their order are different"),
        ("data.train={folder}/replaced.csv", "data.train .*: its videos, their labels or their order are different"),
        ("data.train={folder}/shuffled.csv", "data.train .*: its videos, their labels or their order are different"),
    ],
)
def test_resuming_as_something_else_is_refused(config_file, small_data, tmp_path, override, message, changed_data):
    train(config_file, "train.epochs=1")
    config = (tmp_path / "output" / "config.yaml").read_text()
    override = override.format(folder=changed_data)
    overrides = [override]
    if "other_classes" in override:
        overrides.append(f"data.val={changed_data}/other_val.csv")
    with pytest.raises(InputError, match=message) as error:
        train(config_file, *overrides, resume=True)
    assert "\n" not in str(error.value)
    assert f"train.pretrained={tmp_path}/output/last.safetensors output=DIR" in str(error.value)
    assert (tmp_path / "output" / "config.yaml").read_text() == config
    assert train(config_file, "train.epochs=1", resume=True).step == 3  # nothing is lost


@pytest.fixture(scope="session")
def changed_data(small_data, tmp_path_factory):
    """The manifests of `small_data` with one change each."""
    folder = tmp_path_factory.mktemp("changed")
    (folder / "renamed.txt").write_text("ash\nBirke\ncedar\n")
    for name in ("train", "val"):
        manifest = Manifest.read(small_data / f"{name}.csv")
        rows = [manifest[n] for n in range(len(manifest))]
        for file, videos in (
            ("fewer", rows[:-1]),
            ("relabelled", [rows[0]._replace(label=1), *rows[1:]]),
            ("replaced", [*rows[:3], rows[3]._replace(frames=rows[3].frames + 1), *rows[4:]]),
            ("shuffled", rows[::-1]),
            ("measured_anew", [row._replace(fps=row.fps + 0.5, gop=3, vfr=1) for row in rows]),
        ):
            file = file if name == "train" else f"{file}_val"
            Manifest(videos, root=small_data, classes=manifest.classes).write(folder / f"{file}.csv")
        other = "other_classes" if name == "train" else "other_val"
        Manifest(rows, root=small_data, classes=("ash", "birch", "Zeder")).write(folder / f"{other}.csv")
        moved = [row._replace(path=str(small_data / row.path)) for row in rows]
        Manifest(moved, root="/", classes=manifest.classes).write(folder / f"moved_{name}.csv")
    return folder


def test_other_settings_may_change_on_resume_and_do(config_file, tmp_path, capsys):
    train(config_file, "train.epochs=1")
    changes = [
        "optim.weight_decay=0.3",
        "optim.momentum=0.5",
        "train.precision=bf16",
        "data.stride=2",
        "model.drop_path=0",
    ]
    trainer = train(config_file, *changes, resume=True)
    groups = [(group["weight_decay"], group["momentum"]) for group in trainer.optimizer.param_groups]
    assert groups == [(0.3, 0.5), (0.0, 0.5)] and trainer.step == 9
    assert yaml.safe_load((tmp_path / "output" / "config.yaml").read_text())["optim"]["weight_decay"] == 0.3
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert {
        "note: data.stride was None in the checkpoint, and is 2.0 now",
        "note: optim.momentum was 0.9 in the checkpoint, and is 0.5 now",
        "note: optim.weight_decay was 7e-05 in the checkpoint, and is 0.3 now",
        "note: train.epochs was 1 in the checkpoint, and is 3 now",
    } <= set(notes)
    assert len(notes) == 6


def test_data_may_move_and_be_measured_anew_and_old_checkpoints_resume(config_file, changed_data, tmp_path, capsys):
    train(config_file, "train.epochs=1")
    for name in ("moved_train", "measured_anew"):
        train(config_file, "train.epochs=1", f"data.train={changed_data}/{name}.csv", resume=True)
    train(config_file, "train.epochs=1", f"data.val={changed_data}/moved_val.csv", resume=True)
    assert "note:" not in capsys.readouterr().out
    train(config_file, "train.epochs=1", f"data.val={changed_data}/relabelled_val.csv", resume=True)
    assert re.search(
        r"note: data.val .*relabelled_val.csv has other videos or labels than before; the best top-1 so "
        r"far, \d\.\d{4}",
        capsys.readouterr().out,
    )
    for path in (tmp_path / "output" / "checkpoints").glob("step_*"):
        state = load_checkpoint(path)
        del state["manifests"], state["config"]["data"]["host_share"]
        path.unlink()
        save_checkpoint(path.parent, state["step"], state)
    train(config_file, "train.epochs=1", f"data.train={changed_data}/relabelled.csv", resume=True)
    with pytest.raises(InputError, match="it has 12 videos, and had 13"):
        train(config_file, "train.epochs=1", f"data.train={changed_data}/fewer.csv", resume=True)


def test_resuming_without_a_readable_checkpoint_overwrites_nothing(config_file, tmp_path):
    train(config_file, "train.epochs=1")
    best = (tmp_path / "output" / "best.safetensors").read_bytes()
    for path in (tmp_path / "output" / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="no checkpoint that can be read: to start a new run, name another folder"):
        train(config_file, resume=True)
    assert (tmp_path / "output" / "best.safetensors").read_bytes() == best


def test_a_run_killed_before_its_first_checkpoint_starts_over(config_file, tmp_path):
    """Between its first weights file and that."""
    train(config_file, f"output={tmp_path}/unbroken")
    train(config_file, "train.max_steps=3")
    for path in (tmp_path / "output" / "checkpoints").iterdir():
        path.rename(path.with_name("unnamed.pt.part"))
    with pytest.raises(InputError, match="holds the best.safetensors of an earlier run: continue that with --resume"):
        train(config_file)
    train(config_file, resume=True)
    assert losses(tmp_path / "output") == losses(tmp_path / "unbroken")
    assert_equal_weights(tmp_path / "output", tmp_path / "unbroken")


def test_resuming_in_an_empty_folder_starts_a_run(config_file, tmp_path):
    assert train(config_file, "train.epochs=1", resume=True).step == 3


def test_a_manifest_whose_videos_are_elsewhere_stops_the_run(config_file, small_data, tmp_path):
    manifest = Manifest.read(small_data / "train.csv")
    videos = [manifest[n] for n in range(len(manifest))]
    Manifest(videos, root="/elsewhere", classes=manifest.classes).write(tmp_path / "lost.csv")
    message = "epoch 1: 4 of the first 4 videos cannot be read, .*: /elsewhere/train_.*`# root:` in"
    with pytest.raises(InputError, match=message):
        train(config_file, f"data.train={tmp_path}/lost.csv")
    message = "epoch 1: 12 of the first 12 videos cannot be read: /elsewhere/train_.*`# root:` in"
    with pytest.raises(InputError, match=message):
        train(config_file, f"data.train={tmp_path}/lost.csv", "data.max_fault_fraction=1")
    assert len(fault_rows(tmp_path / "output")) == 12  # of this run only


def test_a_run_stops_at_the_step_where_too_many_videos_cannot_be_read(config_with_bad_videos, tmp_path):
    """Batches of one; the second of three bad ones is more than a tenth of thirteen."""
    settings = ["optim.global_batch_size=1", "train.epochs=1"]
    train(config_with_bad_videos, *settings, "data.max_fault_fraction=0.24", f"output={tmp_path}/whole")
    assert max(faults_by_step(tmp_path / "whole")) == 3
    message = (
        r"epoch 1: 2 of the first \d+ videos cannot be read, more than data.max_fault_fraction=0.1 allows of the "
        r"epoch's 13: .*gone\d+: no such file or directory; .*gone\d+: .*; all are in .*/faults.csv; repair .* raise "
    )
    with pytest.raises(InputError, match=message):
        train(config_with_bad_videos, *settings, "data.max_fault_fraction=0.1")
    steps = faults_by_step(tmp_path / "whole")
    assert faults_by_step(tmp_path / "output") == steps[: steps.index(2)]
    assert [row[:2] for row in fault_rows(tmp_path / "output")] == [[1, "train"]] * 2
    assert not list((tmp_path / "output" / "checkpoints").iterdir())


def test_faults_of_before_a_checkpoint_count_and_are_not_written_twice(config_with_bad_videos, tmp_path):
    """Killed just before a checkpoint was complete, then resumed with a limit that is passed, then with none."""
    settings = ["optim.global_batch_size=1", "train.epochs=2", "train.checkpoint_every_steps=1", "seed=1"]
    train(config_with_bad_videos, *settings, f"output={tmp_path}/unbroken")
    expected = fault_rows(tmp_path / "unbroken")
    steps = faults_by_step(tmp_path / "unbroken")
    third = steps.index(3) + 1
    train(config_with_bad_videos, *settings, f"train.max_steps={third}")
    folder = tmp_path / "output"
    sorted((folder / "checkpoints").iterdir())[-1].unlink()
    assert len([row for row in fault_rows(folder) if row[1] == "train"]) == 3
    with pytest.raises(InputError, match=f"epoch 1: 3 of the first {third} videos"):
        train(config_with_bad_videos, *settings, "data.max_fault_fraction=0.2", resume=True)
    assert len(fault_rows(folder)) == 3
    train(config_with_bad_videos, *settings, resume=True)
    assert fault_rows(folder) == expected and len(expected) == 8
    assert faults_by_step(folder)[-13:] == steps[-13:]


def test_two_processes_stop_together(config_with_bad_videos, tmp_path):
    settings = ["-c", config_with_bad_videos, "-o", "data.max_fault_fraction=0.1", "data.workers=1"]
    done = run_forked("train.py", *settings, processes=2)
    assert done.returncode != 0
    found = re.findall(r"error: epoch 1: (\d) of the first (\d+) videos cannot be read, more than .*", done.stderr)
    assert found and int(found[0][0]) >= 2
    assert len(fault_rows(tmp_path / "output")) == int(found[0][0])


def test_names_of_every_kind_appear_in_the_list_of_faults(config_file, small_data, tmp_path):
    manifest = Manifest.read(small_data / "train.csv")
    odd = ['a, "b".mp4', "c\nd.mp4", "e\udcff.mp4", "f ü.mp4"]
    videos = [manifest[n]._replace(path=odd[n] if n < 4 else manifest[n].path) for n in range(13)]
    Manifest(videos, root=small_data, classes=manifest.classes).write(tmp_path / "odd.csv")
    settings = [f"data.train={tmp_path}/odd.csv", "optim.global_batch_size=13", "data.max_fault_fraction=0.5"]
    train(config_file, *settings, "train.epochs=1")
    expected = [[1, "train", n, str(small_data / name)] for n, name in enumerate(odd)]
    assert fault_rows(tmp_path / "output") == expected


def test_a_step_without_a_readable_video_changes_nothing(config_with_bad_videos, tmp_path):
    """Batches of one: three of the thirteen steps have nothing to learn from, and the run continues."""
    changes = ["optim.global_batch_size=1", "train.epochs=1", "train.log_every_steps=1"]
    trainer = train(config_with_bad_videos, *changes)
    bad = [line["step"] for line in lines(tmp_path / "output") if line.get("train/loss") == 0]
    assert trainer.step == 13 and len(bad) == 3


def test_names_of_classes_may_be_replaced(config_file, tmp_path):
    (tmp_path / "names.txt").write_text("Esche\nBirke\nZeder\n")
    train(config_file, f"data.labels={tmp_path}/names.txt", "train.epochs=1")
    assert load_weights(tmp_path / "output" / "best.safetensors").classes == ("Esche", "Birke", "Zeder")


def test_a_step_is_that_of_plain_torch(config_with_bad_videos, tmp_path):
    """Gradients of the mean over valid clips, clipped, then SGD: with unreadable videos and accumulation."""
    changes = ["optim.global_batch_size=12", "train.max_steps=1", "model.drop_path=0", "data.batch_size=4"]
    changes += ["optim.clip_norm=0.1", "optim.warmup_start_lr=0.01", "optim.weight_decay=0.01"]
    with start_process("cpu") as process:
        untrained = Trainer(load_config(str(config_with_bad_videos), changes), process, resume=False)
    batches = list(untrained.train_loader)
    logits = torch.cat([untrained.network(batch.clips) for batch in batches])
    labels, valid = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("labels", "valid"))
    cross_entropy(logits[valid], labels[valid], label_smoothing=0.1).backward()
    norm = torch.nn.utils.clip_grad_norm_(untrained.network.parameters(), 0.1)
    assert norm > 0.2  # so that the clip matters
    expected = {}
    for name, value in untrained.network.named_parameters():
        decay = 0 if name in ("cls_token", "pos_embed", "time_embed", "head.bias") else 0.01
        gradient = value.grad + decay * value
        expected[name] = (value - 0.01 * (gradient + 0.9 * gradient)).detach()  # Nesterov's first step
    trained = train(config_with_bad_videos, *changes, f"output={tmp_path}/trained").network.state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(trained[name], value, atol=1e-7, rtol=1e-5)


def test_validation_does_not_drop_paths(config_file, tmp_path):
    trainer = train(config_file, "model.drop_path=0.9", "train.epochs=1")
    assert trainer.validate(trainer.network) == trainer.validate(trainer.network)
    loss = [line["val/loss"] for line in lines(tmp_path / "output") if "val/loss" in line][-1]
    trainer.network.eval()
    with torch.no_grad():
        batches = list(trainer.val_loader)
        logits = torch.cat([trainer.network(batch.clips[batch.valid]) for batch in batches])
    labels = torch.cat([batch.labels[batch.valid] for batch in batches])
    assert loss == pytest.approx(cross_entropy(logits, labels).item(), rel=1e-5)


def test_fp16_resumes_with_its_loss_scale(config_file, tmp_path):
    settings = ["train.precision=fp16", "optim.name=adamw"]
    train(config_file, *settings, f"output={tmp_path}/unbroken")
    trainer = train(config_file, *settings, "train.max_steps=4")
    (path,) = (tmp_path / "output" / "checkpoints").glob("step_00000004*")
    state = load_checkpoint(path)
    state["loss_scale"] = {"value": 2.0**10, "good_steps": 7}  # as after overflows
    save_checkpoint(path.parent, 5, state)
    resumed = Trainer(trainer.config, trainer.process, resume=True)
    assert resumed.loss_scale.state_dict() == state["loss_scale"]
