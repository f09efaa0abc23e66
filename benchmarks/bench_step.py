"""A whole training step: time, tokens a second and peak memory, ours against the usual way.

`unteach` reads the teacher from cached rows and runs the head on supervised positions only;
`eager` keeps the teacher in memory, makes [B, T, V] logits of both, and lets autograd do the rest.
`-elementwise` recomputes all but attention and matrix products in the backward pass, `-selective`
every second product too, `-checkpointing` whole blocks, by the same wrapper on both sides.
`open-unlearning` is the loop of that project's trainer: a reference model in memory, full logits of
both cast to float32, and cross-entropy with a KL term over all of them.
Each runs in a process of its own, because a process's peak memory never comes down.

    python -m unteach.benchmarks.bench_step --preset smollm2-135m --device cpu
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from unteach.benchmarks.harness import append_rows, in_process, peak_mib
from unteach.engine.config import Checkpointing, OptimConfig, ParallelConfig
from unteach.engine.model import PreTrainedModel, head_weight, hidden_states
from unteach.engine.train.optim import adamw
from unteach.engine.train.parallel import World, shard_model
from unteach.kernels.bitopk import HiddenTeacher, bitopk_loss
from unteach.kernels.linear_topk import linear_topk

# name → (V, D, intermediate, layers, heads, KV heads, tied)
PRESETS = {
    "smollm2-135m": (49152, 576, 1536, 30, 9, 3, True),
    "llama-3.2-1b": (128256, 2048, 8192, 16, 32, 8, True),
    "llama-3.2-3b": (128256, 3072, 8192, 28, 24, 8, True),
    "llama-3.1-8b": (128256, 4096, 14336, 32, 32, 8, False),
}
MakeLoss = Callable[[PreTrainedModel, Tensor, int], Callable[[], Tensor]]
# Dense bf16 FLOP/s without sparsity, as the makers state them.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12}


def build(preset: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A model of the preset's shape with random weights."""
    vocab, width, inner, layers, heads, kv_heads, tied = PRESETS[preset]
    shape = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(shape, dtype=dtype)
    assert isinstance(model, PreTrainedModel)
    return model


def unteach_loss(model: PreTrainedModel, tokens_BT: Tensor, k: int) -> Callable[[], Tensor]:
    """Cached teacher rows, the head on supervised positions (the second half of each sequence)."""
    half = tokens_BT.shape[1] // 2
    with torch.no_grad():
        cached_NE = hidden_states(model, tokens_BT)[:, half:].flatten(0, 1).clone()
        head_VE = head_weight(model).detach().clone()
        logits_NM, ids_NM = linear_topk(cached_NE, head_VE, 2 * k)
    teacher = HiddenTeacher(cached_NE, head_VE, ids_NM, logits_NM)
    seeds: list[Tensor] = [ids_NM]

    def loss() -> Tensor:
        hidden_ND = hidden_states(model, tokens_BT)[:, half:].flatten(0, 1)
        output = bitopk_loss(hidden_ND, head_weight(model), teacher, k=k, seeds_NS=seeds[0])
        seeds[0] = output.student_ids_NS
        return output.loss

    return loss


def eager_loss(model: PreTrainedModel, tokens_BT: Tensor, k: int) -> Callable[[], Tensor]:
    """The teacher's own forward, full logits of both, torch.topk, autograd."""
    preset_shape = model.config
    with tokens_BT.device:
        teacher = AutoModelForCausalLM.from_config(preset_shape, dtype=model.dtype)
    half = tokens_BT.shape[1] // 2

    def loss() -> Tensor:
        with torch.no_grad():
            theirs = teacher(input_ids=tokens_BT, use_cache=False).logits[:, half:]
        ours = model(input_ids=tokens_BT, use_cache=False).logits[:, half:]
        terms = []
        for chooser in (theirs, ours.detach()):
            ids = chooser.topk(k, dim=-1).indices
            pair = ours.gather(-1, ids).float(), theirs.gather(-1, ids).float()
            terms.append(torch.nn.functional.smooth_l1_loss(*pair, reduction="sum"))
        total: Tensor = torch.stack(terms).sum() / theirs[..., 0].numel()
        return total

    return loss


def open_unlearning_loss(model: PreTrainedModel, tokens_BT: Tensor, k: int) -> Callable[[], Tensor]:
    """Cross-entropy on the second half, and KL to a reference model kept beside the student."""
    with tokens_BT.device:
        reference = AutoModelForCausalLM.from_config(model.config, dtype=model.dtype)
    half = tokens_BT.shape[1] // 2
    labels_BT = tokens_BT.clone()
    labels_BT[:, :half] = -100

    def loss() -> Tensor:
        output = model(input_ids=tokens_BT, labels=labels_BT, use_cache=False)
        with torch.no_grad():
            theirs = reference(input_ids=tokens_BT, use_cache=False).logits
        ours_logp, their_logp = (
            output.logits.float().log_softmax(-1),
            theirs.float().log_softmax(-1),
        )
        kl = torch.nn.functional.kl_div(ours_logp, their_logp, reduction="sum", log_target=True)
        total: Tensor = output.loss + kl / tokens_BT.numel()
        return total

    return loss


def model_flops(model: PreTrainedModel, sequences: int, tokens: int) -> float:
    """FLOPs of one step that the model itself asks for: 6 a weight and token, and attention.

    The head is counted on the supervised half; what is computed twice, or by a teacher, is not.
    """
    config = model.config
    head = config.vocab_size * config.hidden_size
    tied = config.tie_word_embeddings
    body = sum(p.numel() for p in model.parameters()) - head * (1 if tied else 2)
    width = config.num_attention_heads * (config.hidden_size // config.num_attention_heads)
    attention = 6 * config.num_hidden_layers * width * tokens  # causal: half of 12
    return float(sequences * tokens * (6 * body + 3 * head + attention))


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of a known card; None for others and for CPUs."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for card, flops in PEAK_FLOPS.items() if card in name), None)


# name → loss, and what is recomputed
PROVIDERS: dict[str, tuple[MakeLoss, Checkpointing]] = {
    "unteach": (unteach_loss, "off"),
    "unteach-elementwise": (unteach_loss, "elementwise"),
    "unteach-selective": (unteach_loss, "selective"),
    "unteach-checkpointing": (unteach_loss, "full"),
    "eager": (eager_loss, "off"),
    "eager-elementwise": (eager_loss, "elementwise"),
    "eager-checkpointing": (eager_loss, "full"),
    "open-unlearning": (open_unlearning_loss, "off"),
}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Median step time and peak memory of one provider, in this process."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    torch.set_num_threads(options.threads)
    before = peak_mib(device)
    model = build(options.preset, device, dtype)
    make_loss, mode = PROVIDERS[options.provider]
    shard_model(model, ParallelConfig(checkpointing=mode), World(0, 1, device, None))
    model.train()
    optimizer = adamw(model, OptimConfig(lr=1e-6, state=options.state))
    shape = (options.sequences, options.tokens)
    tokens_BT = torch.randint(0, PRESETS[options.preset][0], shape, device=device)
    loss = make_loss(model, tokens_BT, options.k)
    times = []
    warm_up = 3 if device.type == "cuda" else 1
    for _ in range(warm_up + options.steps):
        start = time.perf_counter()
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1e3 * (time.perf_counter() - start))
    parameters = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    peak = peak_mib(device)
    times = times[warm_up:]
    median = statistics.median(times)
    flops, best = model_flops(model, options.sequences, options.tokens), peak_flops(device)
    best = best if options.dtype == "bfloat16" else None
    moments = sum(
        value.numel() * value.element_size() / 2**20
        for state in optimizer.state.values()
        for name, value in state.items()
        if name.startswith("exp_avg")
    )
    held = 2 * parameters + moments
    return {
        "preset": options.preset,
        "provider": options.provider,
        "sequences": options.sequences,
        "tokens": options.tokens,
        "k": options.k,
        "dtype": options.dtype,
        "state": options.state,
        "median_ms": median,
        "min_ms": min(times),
        "max_ms": max(times),
        "tokens_per_second": 1e3 * options.sequences * options.tokens / median,
        "model_tflops": flops / median / 1e9,
        "mfu": flops / median * 1e3 / best if best else None,
        "peak_mib": peak,
        # the process before the model; weights, gradients and AdamW's two moments; the rest
        "before_mib": before,
        "state_mib": held,
        "above_state_mib": peak - before - held,
    }


def main() -> None:
    """Measure every provider, one process each, and append the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="smollm2-135m")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--provider", choices=PROVIDERS, help="measure this one here, print JSON")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="cpu: float32, cuda: bfloat16"
    )
    parser.add_argument("--state", default="float32", choices=("float32", "bfloat16", "8bit"))
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--steps", type=int, help="cpu: 3, cuda: 20")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    gpu = torch.device(options.device).type == "cuda"
    options.dtype = options.dtype or ("bfloat16" if gpu else "float32")
    options.steps = options.steps or (20 if gpu else 3)
    if options.provider:
        print(json.dumps(measure(options)))
        return
    own = ("provider", "providers")
    given = {name: value for name, value in vars(options).items() if name not in own}
    arguments = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    torch.set_num_threads(options.threads)  # what the rows say
    for provider in options.providers:
        row = in_process(__spec__.name, [*arguments, "--provider", provider])
        print(json.dumps({"provider": provider, **row}), flush=True)
        if "skipped" not in row:
            append_rows("bench_step", [row], torch.device(options.device))


if __name__ == "__main__":
    main()
