"""Loading and saving: fused names, streaming, and tensors that do not fit.

The checkpoints here are those of tests/checkpoint_support.py; tests/test_parity.py ties the same
names to transformers itself, and files that are damaged are in tests/test_checkpoint_files.py.
"""

import json
import os
import weakref

import pytest
import torch
from checkpoint_support import (
    BIASED,
    LLAMA,
    MIXTRAL,
    QWEN,
    TIED,
    D,
    E,
    F,
    H,
    K,
    V,
    hub_tensors,
    load,
    refused,
    write,
)
from safetensors import safe_open
from safetensors.torch import load_file

from draftnorm import ModelConfig, load_model, save_model
from draftnorm.model import checkpoint
from draftnorm.model.checkpoint import CheckpointError
from draftnorm.model.checkpoint_names import stored_pieces


@pytest.fixture
def good(tmp_path):
    return write(tmp_path / "model", LLAMA, hub_tensors(LLAMA))


# ---- what is loaded


@pytest.mark.parametrize("shards", [1, 3])
def test_dense_tensors_reach_their_fused_place(tmp_path, shards):
    tensors = hub_tensors(BIASED)
    model = load(write(tmp_path / "m", BIASED, tensors, shards))
    assert not model.training
    ours = dict(model.named_parameters())
    assert sum(p.numel() for p in ours.values()) == sum(t.numel() for t in tensors.values())
    for i in range(2):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        for kind in ("weight", "bias"):
            qkv = [tensors[f"{attention}.{name}_proj.{kind}"] for name in "qkv"]
            assert torch.equal(ours[f"{attention}.qkv_proj.{kind}"], torch.cat(qkv))
            both = [tensors[f"{mlp}.{name}_proj.{kind}"] for name in ("gate", "up")]
            assert torch.equal(ours[f"{mlp}.gate_up_proj.{kind}"], torch.cat(both))
            for same in (f"{attention}.o_proj.{kind}", f"{mlp}.down_proj.{kind}"):
                assert torch.equal(ours[same], tensors[same])
        for norm in ("input_layernorm", "post_attention_layernorm"):
            same = f"model.layers.{i}.{norm}.weight"
            assert torch.equal(ours[same], tensors[same])
    for same in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(ours[same], tensors[same])


@pytest.mark.parametrize("fields", [MIXTRAL, QWEN], ids=["mixtral", "qwen3_moe"])
def test_experts_reach_their_fused_place(tmp_path, fields):
    mixtral = fields is MIXTRAL
    block = "model.layers.0." + ("block_sparse_moe" if mixtral else "mlp")
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    tensors = hub_tensors(fields)
    ours = dict(load(write(tmp_path / "m", fields, tensors)).named_parameters())
    assert torch.equal(ours["model.layers.0.mlp.gate.weight"], tensors[f"{block}.gate.weight"])
    for e in range(E):
        gate_FD, up_FD, down_DF = (
            tensors[f"{block}.experts.{e}.{name}.weight"] for name in (gate, up, down)
        )
        assert torch.equal(ours["model.layers.0.mlp.experts.gate_up_proj"][e, :F], gate_FD)
        assert torch.equal(ours["model.layers.0.mlp.experts.gate_up_proj"][e, F:], up_FD)
        assert torch.equal(ours["model.layers.0.mlp.experts.down_proj"][e], down_DF)


@pytest.mark.parametrize("fields", [MIXTRAL, QWEN], ids=["mixtral", "qwen3_moe"])
def test_packed_experts(tmp_path, fields):
    tensors = hub_tensors(fields, packed=True)
    ours = dict(load(write(tmp_path / "m", fields, tensors, shards=2)).named_parameters())
    for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj"):
        same = f"model.layers.0.mlp.{name}"
        assert torch.equal(ours[same], tensors[same])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("fields", [BIASED, TIED, MIXTRAL, QWEN])
def test_every_element_belongs_to_exactly_one_stored_tensor(fields, packed):
    config, stored = ModelConfig.from_dict(fields), hub_tensors(fields, packed=packed)
    shapes = {n: p.shape for n, p in checkpoint.Transformer(config).named_parameters()}
    pieces = stored_pieces(config, shapes, stored)
    assert {n: piece.shape for n, piece in pieces.items()} == {
        n: t.shape for n, t in stored.items()
    }
    counts = {name: torch.zeros(shape) for name, shape in shapes.items()}
    for piece in pieces.values():
        piece.of(counts[piece.parameter]).add_(1)
    assert all((count == 1).all() for count in counts.values())


@pytest.mark.parametrize("stored", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [None, torch.bfloat16])
def test_floats_are_cast(tmp_path, stored, wanted):
    tensors = hub_tensors(LLAMA, dtype=stored)
    model = load_model(write(tmp_path / "m", LLAMA, tensors), device="cpu", dtype=wanted)
    assert model.dtype == (wanted or torch.float32)
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"].to(model.dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_default_on_cuda_is_bfloat16(tmp_path, stored):
    tensors = hub_tensors(BIASED, dtype=stored)
    model = load_model(write(tmp_path / "m", BIASED, tensors, shards=2))
    assert model.device.type == "cuda" and model.dtype == torch.bfloat16
    qkv = [tensors[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv"]
    ours = model.model.layers[1].self_attn.qkv_proj.weight
    assert torch.equal(ours.cpu(), torch.cat(qkv).bfloat16())


def test_one_tensor_of_a_file_is_alive_at_a_time(tmp_path, monkeypatch):
    """Extra host memory: no stored tensor outlives its copy, and none is read before all fit."""
    alive, seen = weakref.WeakSet(), []

    class Watched:
        def __init__(self, *args, **kwargs):
            self.file = safe_open(*args, **kwargs)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.__exit__(*error)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def get_tensor(self, name):
            assert not alive, "the tensor before is still held"
            tensor = self.file.get_tensor(name)
            alive.add(tensor)
            seen.append(name)
            return tensor

    monkeypatch.setattr(checkpoint, "safe_open", Watched)
    tensors = hub_tensors(MIXTRAL)
    load(write(tmp_path / "m", MIXTRAL, tensors, shards=3))
    assert sorted(seen) == sorted(tensors)  # each once

    seen.clear()
    del tensors["model.norm.weight"]
    refused(write(tmp_path / "m", MIXTRAL, tensors, shards=3))
    assert not seen


def test_harmless_extra_tensors(tmp_path):
    tensors = hub_tensors(TIED)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.rotary_emb.inv_freq"] = torch.ones(K // 2)
    tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(K // 2)
    model = load(write(tmp_path / "m", TIED, tensors))
    assert "lm_head.weight" not in dict(model.named_parameters())

    tensors["lm_head.weight"][3, 2] += 1
    assert "tie_word_embeddings" in refused(write(tmp_path / "m", TIED, tensors))


# ---- tensors that do not fit


def test_all_misfits_in_one_error(good):
    tensors = hub_tensors(LLAMA)
    for i in range(2):
        tensors.pop(f"model.layers.{i}.self_attn.k_proj.weight")
    tensors["model.layers.0.self_attn.sinks"] = torch.zeros(H)
    tensors["model.layers.1.mlp.down_proj.weight"] = torch.zeros(F, D)
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(F, D, dtype=torch.int8)
    message = refused(write(good, LLAMA, tensors))
    assert "2 missing: model.layers.0.self_attn.k_proj.weight, model.layers.1" in message
    assert "1 unexpected: model.layers.0.self_attn.sinks" in message
    assert "1 of the wrong shape: model.layers.1.mlp.down_proj.weight [24, 16]" in message
    assert "model.layers.0.mlp.up_proj.weight I8" in message


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_quantised_tensors_are_refused_by_name(good, dtype):
    tensors = hub_tensors(LLAMA)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(dtype)
    message = refused(write(good, LLAMA, tensors))
    assert "quantised" in message and "lm_head.weight" in message


def test_names_without_the_model_prefix_are_refused(good):
    tensors = {n.removeprefix("model."): t for n, t in hub_tensors(LLAMA).items()}
    message = refused(write(good, LLAMA, tensors))
    assert "20 missing" in message and "20 unexpected" in message


def test_two_spellings_of_the_same_weights_are_refused(tmp_path):
    tensors = hub_tensors(QWEN) | hub_tensors(QWEN, packed=True)
    message = refused(write(tmp_path / "m", QWEN, tensors))
    assert "2 unexpected: model.layers.0.mlp.experts.down_proj, model" in message


def test_hostile_names_are_printed_harmlessly(good):
    tensors = hub_tensors(LLAMA) | {"\x1b[2J\nweights": torch.zeros(1), "x" * 9999: torch.zeros(1)}
    assert "2 unexpected" in refused(write(good, LLAMA, tensors))


def test_huge_config_beside_small_files(good):
    (good / "config.json").write_text(json.dumps(LLAMA | dict(vocab_size=10**12)))
    assert "parameters, the files hold only" in refused(good)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(model_type=["llama"]), "model_type"),
        (dict(architectures=["LlamaModel"]), "architecture"),
        (dict(tie_word_embeddings="false"), "tie_word_embeddings"),
        (dict(rms_norm_eps=float("nan")), "eps"),
        (dict(num_hidden_layers=-2), "num_hidden_layers"),
        (dict(num_hidden_layers=10**12), "num_hidden_layers"),
        (dict(hidden_act="gelu"), "gelu"),
        (dict(quantization_config={"quant_method": "gptq"}), "quantised"),
    ],
)
def test_wrong_config_is_one_line(good, change, message):
    (good / "config.json").write_text(json.dumps(LLAMA | change))
    with pytest.raises(ValueError, match=message) as caught:
        load(good)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("device", ["bananas", "cuda:-3", "cuda", "mps", "meta"])
def test_devices_that_are_not_there(good, device):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(CheckpointError, match=f"device '{device}'"):
        load_model(good, device=device)


@pytest.mark.parametrize("dtype", [torch.int8, "bfloat16"])
def test_dtypes_that_are_none_of_a_model(good, dtype):
    with pytest.raises(CheckpointError, match="not a floating-point"):
        load_model(good, device="cpu", dtype=dtype)


def test_out_of_memory_is_known_before_loading(good, monkeypatch):
    monkeypatch.setattr(checkpoint, "free_bytes", lambda device: 1000)
    parameters = ModelConfig.from_dict(LLAMA).parameters
    message = refused(good)
    assert f"need {4 * parameters:,} bytes on cpu, 1,000 are free" in message


def test_failed_allocation_is_out_of_memory(good, monkeypatch):
    def fail(config, *, device=None, dtype=None):
        if str(device) == "cpu":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return Transformer(config, device=device, dtype=dtype)

    Transformer = checkpoint.Transformer
    monkeypatch.setattr(checkpoint, "Transformer", fail)
    assert "out of memory" in refused(good)


def test_free_memory_is_plausible():
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < checkpoint.free_bytes(torch.device("cpu")) <= physical


# ---- saving


@pytest.mark.parametrize("fields", [BIASED, TIED, MIXTRAL, QWEN])
@pytest.mark.parametrize("limit", ["5GB", "4KB"])
def test_save_writes_the_hub_names(tmp_path, fields, limit):
    tensors = hub_tensors(fields)
    model = load(write(tmp_path / "m", fields, tensors))
    save_model(model, tmp_path / "new" / "saved", max_shard_size=limit)
    saved = tmp_path / "new" / "saved"
    files = sorted(saved.glob("*.safetensors"))
    assert (len(files) == 1) == (limit == "5GB")
    found = {}
    for file in files:
        part = load_file(file)
        with safe_open(file, framework="pt") as shard:
            assert shard.metadata() == {"format": "pt"}
        largest = sum(t.nbytes for t in part.values())
        assert largest <= checkpoint._parse_size(limit) or len(part) == 1
        found |= part
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert json.loads((saved / "config.json").read_text())["torch_dtype"] == "float32"
    again = load(saved)
    assert again.config == model.config


def test_save_replaces_weights_and_leaves_the_rest(good):
    model = load(good)
    (good / "tokenizer.json").write_text("{}")
    save_model(model, good, max_shard_size=3000)
    assert not (good / "model.safetensors").exists() and len(list(good.iterdir())) > 5
    save_model(model, good)
    names = {file.name for file in good.iterdir()}
    modes = {file.stat().st_mode for file in good.iterdir()}
    assert len(modes) == 1  # all as the umask says, also those that safetensors made
    assert names == {"config.json", "model.safetensors", "tokenizer.json"}


@pytest.mark.parametrize("steps", range(5))
def test_interrupted_save_never_mixes_old_and_new(tmp_path, monkeypatch, steps):
    """Stopped after any number of renames: the directory loads the new model or is refused."""
    directory = write(tmp_path / "m", LLAMA, hub_tensors(LLAMA), shards=3)
    model = load(directory)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    replace, done = os.replace, []

    def replace_or_stop(source, target):
        if len(done) == steps:
            raise KeyboardInterrupt
        done.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_or_stop)
    with pytest.raises(KeyboardInterrupt):
        save_model(model, directory, max_shard_size=2 * model.config.parameters + 4 * V * D)
        raise KeyboardInterrupt  # config.json, two shards and the index: all four steps were done
    assert not list(directory.glob(".saving-*"))
    if steps == 4:
        assert torch.equal(load(directory).lm_head.weight, model.lm_head.weight)
    else:
        assert "model.safetensors is missing" in refused(directory)


def test_save_errors(good, tmp_path):
    model = load(good)
    for size in ("many", "-5GB", 0, "0MB", "5 bananas"):
        with pytest.raises(ValueError, match="max_shard_size="):
            save_model(model, tmp_path / "x", max_shard_size=size)
    with pytest.raises(CheckpointError, match="cannot write"):
        save_model(model, good / "config.json")
