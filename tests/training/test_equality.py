"""One process with the whole batch, and 1, 2 and 4 with 1, 2 and 4 micro-steps: the same losses, gradients, weights."""

import itertools

import pytest
import torch
from omegaconf import OmegaConf

from dali_pipelines.manifest import Manifest
from tests.commands import CONFIG, PROJECT, run_forked

pytestmark = pytest.mark.slow

COUNTS = (1, 2, 4)
STEPS = 3
SETTINGS = {"model.drop_path": 0, "optim.global_batch_size": 16, "train.max_steps": STEPS}
UNREADABLE = {"all": (), "some": (2, 3, 11)}  # of 13 videos; clips of some ranks and micro-steps


@pytest.fixture(scope="module")
def all_results(small_data, tmp_path_factory):
    """Name of a manifest -> (processes, micro-steps) -> what equality.py found."""
    folder = tmp_path_factory.mktemp("equality")
    manifest = Manifest.read(small_data / "train.csv")
    for name, bad in UNREADABLE.items():
        videos = [manifest[n]._replace(path=f"gone{n}" if n in bad else manifest[n].path) for n in range(13)]
        Manifest(videos * 4, root=small_data, classes=manifest.classes).write(folder / f"{name}.csv")
        config = OmegaConf.create(CONFIG.format(folder=small_data))
        for key, value in (SETTINGS | {"data.train": f"{folder}/{name}.csv", "data.max_fault_fraction": 1}).items():
            OmegaConf.update(config, key, value)
        OmegaConf.save(config, folder / f"{name}.yaml")
    configs = [folder / f"{name}.yaml" for name in UNREADABLE]
    for processes in COUNTS:
        script = PROJECT / "tests/training/equality.py"
        done = run_forked(script, ",".join(map(str, COUNTS)), *configs, processes=processes)
        assert done.returncode == 0, done.stderr
    return {
        path.stem: {
            (processes, micro_steps): torch.load(
                f"{folder}/{name}.yaml.{processes}x{micro_steps}.pt", weights_only=True
            )
            for processes, micro_steps in itertools.product(COUNTS, COUNTS)
        }
        for path in configs
    }


@pytest.fixture(params=UNREADABLE)
def results(request, all_results):
    return all_results[request.param]


def test_losses_gradients_and_weights_are_those_of_one_process(results):
    whole = results[1, 1]
    assert len(whole["losses"]) == STEPS and max(gradient.abs().max() for gradient in whole["gradients"]) > 1e-2
    for key, result in results.items():
        assert result["losses"] == pytest.approx(whole["losses"], abs=1e-5), key
        for one, two in zip(result["gradients"], whole["gradients"], strict=True):
            torch.testing.assert_close(one, two, atol=1e-5, rtol=0, msg=lambda text, key=key: f"{key}: {text}")
        for name, value in result["weights"].items():
            torch.testing.assert_close(
                value, whole["weights"][name], atol=1e-5, rtol=0, msg=lambda text, key=(key, name): f"{key}: {text}"
            )


def test_gradients_are_reduced_in_the_last_micro_step_only(results):
    for (processes, micro_steps), result in results.items():
        buckets = result["reduced"].pop(micro_steps - 1, 0)
        assert result["reduced"] == {} and (buckets >= STEPS if processes > 1 else buckets == 0), (
            processes,
            micro_steps,
        )


def test_every_step_has_the_same_clips_whoever_takes_them(results):
    def by_step(result):
        return [
            sorted(id for rank in result["ids"] for at, _, ids in rank for id in ids if at == step)
            for step in range(STEPS)
        ]

    whole = by_step(results[1, 1])
    assert all(len(ids) == 16 for ids in whole) and len({tuple(ids) for ids in whole}) == STEPS
    assert all(by_step(result) == whole for result in results.values())
