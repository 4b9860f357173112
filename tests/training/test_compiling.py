"""Who compiles a network and who does not, and what a compiled run computes."""

import warnings

import pytest
import torch
from torch._dynamo.utils import counters

from common.config import TrainConfig, load_config
from common.distributed import DistributedContext, start_process
from common.precision import make_deterministic
from dali_pipelines import InputError
from tests.commands import run, run_forked
from tests.conftest import needs_compiler
from tests.training.test_engine import assert_equal_weights, train
from training import compiling
from training.compiling import WORTH_IT, check_compile, decide_compile
from training.engine import Trainer

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
COMPILED = ["train.compile=true", "data.batch_size=2"]  # one shape for all, so that the compiler has it cached


def process(device, rank=0, world_size=1):
    return DistributedContext(rank, world_size, rank, world_size, device)


@pytest.mark.parametrize(
    "wanted, device, passes, before, missing, expected, why",
    [
        ("auto", CPU, WORTH_IT, None, "", "eager", "eager: train.compile=auto compiles on a GPU"),
        ("auto", GPU, WORTH_IT, None, "", "compiled", "compiled"),
        (
            "auto",
            GPU,
            WORTH_IT - 1,
            None,
            "",
            "eager",
            "eager: 999 forward passes; train.compile=auto compiles from 1000",
        ),
        ("auto", GPU, WORTH_IT, None, "no g++", "eager", "eager: no g++"),
        ("auto", GPU, 1, "compiled", "", "compiled", "compiled"),
        ("auto", GPU, 1, "CUDA graphs", "", "compiled", "compiled"),
        ("auto", GPU, 1, "compiled", "no g++", "eager", "eager: no g++"),
        ("auto", GPU, WORTH_IT, "eager", "", "eager", "eager, as the run started; train.compile=true would compile it"),
        (True, GPU, 1, "eager", "", "compiled", "compiled"),
        ("true", CPU, 1, None, "", "compiled", "compiled"),
        (False, GPU, WORTH_IT, "compiled", "", "eager", "eager, as train.compile says"),
    ],
)
def test_when_the_network_is_compiled(monkeypatch, wanted, device, passes, before, missing, expected, why):
    monkeypatch.setattr(compiling, "compiler_missing", lambda on: missing if on == device else "wrong device")
    settings = TrainConfig(compile=wanted)
    check_compile(settings, process(device))
    mode, said = decide_compile(settings, process(device), passes=passes, before=before)
    assert mode == expected and said.startswith(why)


def test_no_process_compiles_if_one_has_no_compiler(monkeypatch):
    monkeypatch.setattr(compiling, "compiler_missing", lambda on: "")
    monkeypatch.setattr(DistributedContext, "gather", lambda self, mine: [mine, "no g++ on rank 1"])
    said = decide_compile(TrainConfig(), process(GPU, world_size=2), passes=WORTH_IT, before=None)
    assert said == ("eager", "eager: no g++ on rank 1")


@pytest.mark.parametrize(
    "settings, missing, message",
    [
        (dict(compile=False, cuda_graphs=True), "", "train.cuda_graphs is true and train.compile is false"),
        (dict(cuda_graphs=True), "no Triton", "train.cuda_graphs is true, and no Triton; .* train.cuda_graphs=false"),
        (dict(compile=True), "no Triton", "train.compile is true, and no Triton; .* train.compile=auto"),
    ],
)
def test_forced_settings_that_cannot_work(monkeypatch, settings, missing, message):
    monkeypatch.setattr(compiling, "compiler_missing", lambda on: missing)
    with pytest.raises(InputError, match=message):
        check_compile(TrainConfig(**settings), process(GPU))


def test_settings_are_refused_before_anything_is_written(config_file, tmp_path):
    for settings, message in [
        (["train.cuda_graphs=true"], "train.cuda_graphs is true, and the device is cpu; expected a GPU"),
        (["train.compile=fast"], "train.compile is fast; expected auto, true or false"),
    ]:
        with pytest.raises(InputError, match=message):
            train(config_file, *settings)
    assert not (tmp_path / "output").exists()


@pytest.mark.slow
def test_without_a_compiler(monkeypatch, config_file, tmp_path):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))  # what others compiled works without one
    done = run("train.py", "-c", config_file, "-o", "train.compile=true")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    message = (
        "train.compile is true, and torch.compile does not work on cpu (InvalidCxxCompiler: No working C++ compiler"
    )
    assert message in done.stderr


@pytest.mark.slow
@needs_compiler
def test_a_compiled_run_matches_the_eager_one_and_resumes_exactly(config_file, tmp_path, capsys):
    """Two micro-steps, drop path, epochs with validation; broken off and resumed, by a new compiler."""
    torch.compiler.reset()
    counters.clear()
    trainer = train(config_file, *COMPILED, f"output={tmp_path}/whole")
    assert trainer.state.mode == "compiled" and "network compiled\n" in capsys.readouterr().out
    # The first and the last block, in training and in validation; nothing is compiled anew for a later step.
    assert counters["stats"]["unique_graphs"] - 1 == 4 and not counters["graph_break"]
    for resume, more in ((False, ["train.max_steps=4"]), (True, [])):
        torch.compiler.reset()
        train(config_file, *COMPILED, *more, f"output={tmp_path}/parts", resume=resume)
    assert_equal_weights(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
@needs_compiler
def test_a_run_that_started_in_another_mode_says_so(config_file, capsys):
    train(config_file, "train.max_steps=2")
    trainer = train(config_file, *COMPILED, resume=True)
    assert trainer.state.mode == "compiled"
    assert "network compiled; it started as eager, so rounding and the draws of drop" in capsys.readouterr().out


@pytest.mark.slow
@needs_compiler
def test_a_compiled_run_with_the_order_of_sums_of_a_gpu(config_file, tmp_path, monkeypatch):
    """A compiled backward pass refuses another setting of deterministic algorithms than its forward pass had."""
    monkeypatch.setattr("training.step.make_deterministic", lambda device: make_deterministic(GPU))
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    torch.compiler.reset()
    counters.clear()
    try:
        train(config_file, *COMPILED, "train.epochs=2")
        assert (
            torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert counters["stats"]["unique_graphs"] - 1 == 4


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_run_of_two_processes(config_file, tmp_path, checkpointing):
    settings = [
        "model.drop_path=0",
        "optim.global_batch_size=8",
        "train.max_steps=2",
        f"train.activation_checkpointing={checkpointing}",
    ]
    train(config_file, *settings, "train.compile=false", f"output={tmp_path}/eager")
    arguments = ["-c", config_file, "-o", *settings, *COMPILED, f"output={tmp_path}/compiled"]
    done = run_forked("train.py", *arguments, processes=2)
    assert done.returncode == 0, done.stderr
    assert "network compiled\n" in done.stdout
    assert_equal_weights(tmp_path / "eager", tmp_path / "compiled", within=1e-4)


@pytest.mark.slow
@needs_compiler
def test_a_compiled_student_and_its_teacher(config_file, tmp_path):
    train(config_file, "train.max_steps=1", f"output={tmp_path}/teacher")
    settings = [f"distill.teacher={tmp_path}/teacher/last.safetensors", "train.max_steps=2", "model.drop_path=0"]
    train(config_file, *settings, f"output={tmp_path}/eager")
    train(config_file, *settings, *COMPILED, f"output={tmp_path}/compiled")
    assert_equal_weights(tmp_path / "eager", tmp_path / "compiled", within=1e-4)


# -- on a GPU --


def train_on_gpu(config_file, *overrides, resume=False):
    config = load_config(str(config_file), ["device=cuda", "data.decode=host", *overrides])
    with start_process("cuda") as process:
        trainer = Trainer(config, process, resume=resume)
        trainer.train()
    return trainer


@pytest.mark.gpu
def test_a_run_on_a_gpu_compiles_by_default_and_resumes_exactly(config_file, tmp_path, monkeypatch):
    train_on_gpu(config_file, "train.compile=false", f"output={tmp_path}/eager", "model.drop_path=0")
    monkeypatch.setattr(compiling, "WORTH_IT", 1)
    trainer = train_on_gpu(config_file, f"output={tmp_path}/same", "model.drop_path=0")
    assert trainer.state.mode == "compiled"
    assert_equal_weights(tmp_path / "eager", tmp_path / "same", within=3e-2)
    many_tokens = ["data.crop_size=224", "model.embed_dim=96"]  # 197: several blocks of keys, whose order could vary
    train_on_gpu(config_file, *many_tokens, f"output={tmp_path}/whole")
    for resume, more in ((False, ["train.max_steps=4"]), (True, [])):
        torch.compiler.reset()
        train_on_gpu(config_file, *many_tokens, *more, f"output={tmp_path}/parts", resume=resume)
    assert_equal_weights(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.gpu
def test_cuda_graphs_compute_the_same_and_draw_anew(config_file, tmp_path):
    settings = ["data.batch_size=2", "train.precision=float32", "model.drop_path=0"]  # two micro-steps
    train_on_gpu(config_file, *settings, "train.compile=false", f"output={tmp_path}/eager")
    counters.clear()
    train_on_gpu(config_file, *settings, "train.cuda_graphs=true", f"output={tmp_path}/graphs")
    assert not compiling.cuda_graphs_skipped()
    assert_equal_weights(tmp_path / "eager", tmp_path / "graphs", within=1e-3)
    trainer = train_on_gpu(config_file, "model.drop_path=0.9", "train.cuda_graphs=true", f"output={tmp_path}/drawn")
    network, clips = trainer.network.train(), torch.rand(4, 3, 4, 32, 32, device="cuda")
    found = []
    for seed in (1, 2, 3, 4, 1):
        torch.manual_seed(seed)
        torch.compiler.cudagraph_mark_step_begin()
        found.append(network(clips).detach().clone())
    assert (found[0] == found[4]).all() and len(torch.stack(found[:4]).unique(dim=0)) > 1


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["train.compile=false", "train.compile=true", "train.cuda_graphs=true"])
def test_a_step_waits_once_for_the_gpu(config_file, how):
    waits = []

    class Watched(Trainer):
        def train_step(self, batches):
            batches = list(batches)
            if self.step < 4:  # warm, and not the first of an epoch, which shows its clips
                return super().train_step(batches)
            torch.cuda.set_sync_debug_mode("warn")
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                result = super().train_step(batches)
            torch.cuda.set_sync_debug_mode("default")
            waits.append(sum("synchronizing" in str(each.message) for each in said))
            return result

    overrides = ["device=cuda", "data.decode=host", "mix.cutmix_prob=0.5", "mix.mixup_alpha=0.2", how]
    with start_process("cuda") as process:
        Watched(load_config(str(config_file), [*overrides, "train.max_steps=6"]), process, resume=False).train()
    assert waits == [1, 1]
