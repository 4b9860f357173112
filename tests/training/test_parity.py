"""The same training: PaddleVideo's losses, rates, gradient norms and weights, by the trainer's own steps."""

import numpy as np
import pytest
import torch

from common.config import load_config
from common.distributed import start_process
from common.weights import load_into
from dali_pipelines.batches import Batch
from tests.conftest import DATA
from training.engine import Trainer

pytestmark = pytest.mark.slow

RECIPE = [
    "data.crop_size=64", "data.num_frames=4",
    "model.embed_dim=48", "model.depth=3", "model.num_heads=3", "model.drop_path=0",
    "optim.name=sgd", "optim.lr=0.05", "optim.warmup_start_lr=0.005", "optim.warmup_epochs=1", "optim.momentum=0.9",
    "optim.weight_decay=0.01", "optim.clip_norm=1", "train.epochs=3", "train.label_smoothing=0.1",
]  # fmt: skip


@pytest.mark.parametrize("micro_steps", [1, 2])
def test_twelve_steps_of_paddlevideo(config_file, tmp_path, micro_steps):
    (tmp_path / "labels.txt").write_text("".join(f"class {n}\n" for n in range(11)))
    overrides = [f"data.labels={tmp_path}/labels.txt", f"train.pretrained={DATA}/tiny.pdparams"]
    config = load_config(str(config_file), [*RECIPE, *overrides, f"data.batch_size={4 // micro_steps}"])
    golden = np.load(DATA / "train_tiny.npz")
    clips = torch.from_numpy(np.random.RandomState(11).rand(12, 4, 3, 4, 64, 64).astype(np.float32))
    labels = torch.from_numpy(golden["labels"]).long()
    with start_process("cpu") as process:
        trainer = Trainer(config, process, resume=False)
        trainer.steps_per_epoch = 4
        results = []
        for step in range(12):
            parts = zip(clips[step].chunk(micro_steps), labels[step].chunk(micro_steps), strict=True)
            results.append(
                trainer.train_step(
                    [Batch(*part, torch.arange(len(part[1])), torch.ones(len(part[1])).bool()) for part in parts]
                )
            )
        trainer.train_loader.close()
        trainer.monitor.close()
    assert [result.lr for result in results] == pytest.approx(golden["lrs"].tolist(), abs=1e-12)
    assert [result.loss for result in results] == pytest.approx(golden["losses"].tolist(), abs=1e-5)
    assert [result.grad_norm for result in results] == pytest.approx(golden["grad_norms"].tolist(), rel=1e-5)
    final = type(trainer.network)(num_frames=4, image_size=64, num_classes=11, embed_dim=48, depth=3, num_heads=3)
    load_into(final, str(DATA / "train_tiny_final.pdparams"), classes=trainer.classes)
    for name, expected in final.state_dict().items():
        difference = (trainer.network.state_dict()[name] - expected).abs().max()
        assert difference < 1e-5, (name, difference)
