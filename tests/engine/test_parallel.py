"""What a rank holds: its own shards of a model, and blocks that recompute what they are told to."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from unteach.engine.attention import check_attention
from unteach.engine.config import ModelConfig, ParallelConfig
from unteach.engine.data.bytes_tokenizer import byte_tokenizer
from unteach.engine.errors import InputError
from unteach.engine.live_bytes import LiveBytes
from unteach.engine.model import export_model, hidden_states, load_model, tiny_model
from unteach.engine.train import checkpoint
from unteach.engine.train.parallel import WRAPPED, World, check_parallel, joined, shard_model

ALONE = World(0, 1, torch.device("cpu"), None)
WATCH_A_LOAD = """
import sys
from pathlib import Path
import torch
from unteach.engine.config import Config, ModelConfig
from unteach.engine.model import load_tokenizer, load_model
from unteach.engine.train.checkpoint import model_state
from unteach.engine.train.loop import Job, prepare_model
from unteach.engine.train.parallel import joined

def peak_kib(reset):
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

torch.set_num_threads(1)
config = Config(model=ModelConfig(path=sys.argv[1]))
def watch(world):
    # what is sharded must be gone before the process group is
    tokenizer = load_tokenizer(sys.argv[1], config.model)
    small, big = (Job("t", config, path, tokenizer, (), None, Path()) for path in sys.argv[3:0:-2])
    prepare_model(small, world)  # imports and process groups are no part of the model
    before = peak_kib(reset=True)
    model, _, _ = prepare_model(big, world)
    grown = 1024 * (peak_kib(reset=False) - before)
    expected = load_model(sys.argv[1], config.model)
    wanted = {**expected.state_dict(), **dict(expected.named_buffers())}
    for name, value in {**model_state(model), **dict(model.named_buffers())}.items():
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value
        assert torch.equal(whole, wanted[name]), name
    Path(sys.argv[2], f"rank{world.rank}").write_text(str(grown))

with joined("cpu", 1) as world:
    watch(world)
    world.wait()
"""


def big_model(folder: Path, *, tied: bool) -> int:
    """A folder with 140 MB of random weights, no tensor over 5 MB; returns the bytes."""
    tokenizer = byte_tokenizer()
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=14,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=tied,
    )
    model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
    export_model(model, tokenizer, model.state_dict(), folder)
    return sum(p.numel() * p.element_size() for p in model.parameters())


JOIN = """
import sys
from pathlib import Path
import torch
from unteach.engine.errors import InputError
from unteach.engine.train.parallel import joined
try:
    with joined("cpu", 1) as world:
        total = int(world.reduced(torch.tensor(10 + world.rank)))
        Path(sys.argv[1], f"rank{world.rank}").write_text(f"{world.size} {total}")
except InputError as error:
    sys.exit(str(error))
"""


def test_processes_that_another_launcher_starts_join_or_are_refused(tmp_path: Path) -> None:
    """What srun and mpirun scripts set: no torchrun, and once nobody says where to meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    clean = {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC")}
    met = {**clean, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-c", JOIN, str(tmp_path)]
    ranks = [subprocess.Popen(command, env={**met, "RANK": str(rank)}) for rank in (0, 1)]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"rank0": "2 21", "rank1": "2 21"}
    lost = {k: v for k, v in met.items() if not k.startswith("MASTER")}
    done = subprocess.run(command, env=lost, capture_output=True, text=True, check=False)
    assert done.stderr.startswith("WORLD_SIZE is 2, but RANK and MASTER_ADDR and MASTER_PORT must")
    assert done.stderr.count("\n") == 1
    odd = {**met, "WORLD_SIZE": "two"}
    done = subprocess.run(command, env=odd, capture_output=True, text=True, check=False)
    assert done.stderr.startswith("WORLD_SIZE is 'two', which is no number of processes: start")
    assert done.stderr.count("\n") == 1


LOST = "[/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:5731."


def test_a_process_that_is_left_alone_ends_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It never tells to remove a checkpoint that is whole."""

    def lost(*args: object, **kwargs: object) -> None:
        raise RuntimeError(LOST)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    step = tmp_path / "step-000001"
    step.mkdir()
    (step / "complete").write_text('{"step": 1, "fingerprint": {}, "files": {}}')
    for name in ("save", "load"):
        monkeypatch.setattr(checkpoint, name, lost)
    met = {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in met.items():
        monkeypatch.setenv(name, value)
    model: Any = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    saver = checkpoint.Saver(tmp_path, {}, ALONE, keep=1, background=False)
    for work in (
        lambda: checkpoint.resume(tmp_path, model, optimizer, ["weight", "bias"], {}, ALONE),
        lambda: saver.save(2, model, optimizer, ["weight", "bias"]),
    ):
        told = pytest.raises(InputError, match="Another process of this run has ended early")
        with told, joined("cpu", 1):
            work()
        port = str(int(port) + 1)
        monkeypatch.setenv("MASTER_PORT", port)


@pytest.mark.parametrize("tied", [False, True])
def test_no_rank_ever_holds_the_whole_model(tmp_path: Path, tied: bool) -> None:
    whole = big_model(tmp_path / "model", tied=tied)
    small = str(tiny_model(tmp_path / "tiny", tied=tied))
    script = tmp_path / "watch.py"
    script.write_text(WATCH_A_LOAD, encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = subprocess.run(
        [sys.executable, *launcher, str(script), str(tmp_path / "model"), str(tmp_path), small],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in range(2):
        grown = int((tmp_path / f"rank{rank}").read_text(encoding="utf-8"))
        assert 0.45 * whole < grown < 0.75 * whole


def gradients(model: Any) -> tuple[float, dict[str, Tensor]]:
    tokens_BT = torch.arange(24).reshape(2, 12)
    loss = hidden_states(model, tokens_BT).square().mean()
    loss.backward()
    grads = {n.replace(WRAPPED, ""): p.grad for n, p in model.named_parameters()}
    return float(loss.detach()), {name: grad for name, grad in grads.items() if grad is not None}


@pytest.mark.parametrize("mode", ["full", 2, "selective", "elementwise"])
def test_recomputing_blocks_changes_nothing(tmp_path: Path, mode: str | int) -> None:
    path = str(tiny_model(tmp_path / "tiny", tied=True))
    plain = load_model(path, ModelConfig())
    lean = load_model(path, ModelConfig())
    shard_model(lean, ParallelConfig(checkpointing=mode), ALONE)  # type: ignore[arg-type]
    loss, grads = gradients(plain)
    lean_loss, lean_grads = gradients(lean)
    assert lean_loss == loss
    assert grads.keys() == lean_grads.keys()
    assert all(torch.equal(lean_grads[name], grad) for name, grad in grads.items())


def test_modes_keep_full_less_than_selective_less_than_off(tmp_path: Path) -> None:
    path = str(tiny_model(tmp_path / "tiny", tied=True))
    kept = {}
    for mode in ("off", "elementwise", 2, "selective", "full"):
        model = load_model(path, ModelConfig())
        shard_model(model, ParallelConfig(checkpointing=mode), ALONE)  # type: ignore[arg-type]
        with LiveBytes() as live:
            hidden = hidden_states(model, torch.arange(512).remainder(250).reshape(2, 256))
            kept[mode] = live.now
        assert hidden.requires_grad
    assert kept["full"] < kept["selective"] < kept["elementwise"] < kept["off"]
    assert kept["full"] < kept[2] < kept["off"]


def trained_losses(model: Any) -> list[float]:
    """Losses of three steps; the third has a shape that the others had not.

    By plain gradients: AdamW would blow up the rounding of the smallest of them.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-1)
    losses = []
    for length in (12, 12, 16):
        loss = hidden_states(model, torch.arange(2 * length).reshape(2, length)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler")
def test_compiled_blocks_train_as_others_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    path = str(tiny_model(tmp_path / "tiny", tied=True))
    plain, compiled = (load_model(path, ModelConfig()).train() for _ in range(2))
    shard_model(compiled, ParallelConfig(compile=True), ALONE)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    losses = trained_losses(compiled)
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]
    assert list((tmp_path / "inductor").rglob("*.so")), "nothing was compiled"
    expected = trained_losses(plain)
    assert losses == pytest.approx(expected, rel=1e-5) and expected[2] < expected[0]


def test_what_cannot_work_here_is_one_sentence() -> None:
    cpu = torch.device("cpu")
    with pytest.raises(InputError, match=r"cpu_offload moves state from a GPU"):
        check_parallel(ParallelConfig(cpu_offload=True), ALONE)
    with pytest.raises(InputError, match=r"torchrun"):
        gpu = World(0, 1, torch.device("cuda"), None)
        check_parallel(ParallelConfig(cpu_offload=True), gpu)
    check_parallel(ParallelConfig(), ALONE)
    with pytest.raises(InputError, match=r"no backward pass on a CPU"):
        check_attention("flex_attention", cpu)
    for name, remedy in {
        "flash_attention_2": r"unteach\[flash\]",
        "flash_attention_3": "hopper",
        "flash_attention_4": r"unteach\[fa4\]",
    }.items():
        with pytest.raises(InputError, match=f"{name} is not installed.*{remedy}.*sdpa"):
            check_attention(name, torch.device("cuda"))
    assert check_attention("sdpa", cpu).startswith("sdpa of torch")
