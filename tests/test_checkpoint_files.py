"""Files of a checkpoint that are damaged, not files, or not where the index says."""

import json
import os
import struct

import pytest
from checkpoint_support import LLAMA, D, V, hub_tensors, load, refused, write, write_index


@pytest.fixture
def good(tmp_path):
    return write(tmp_path / "model", LLAMA, hub_tensors(LLAMA))


# ---- files that are no safetensors


def header_of(data):
    return struct.unpack("<Q", data[:8])[0]


def with_header(data, header):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + header_of(data) :]


def wrong_offsets(data, change):
    header = json.loads(data[8 : 8 + header_of(data)])
    header["lm_head.weight"]["data_offsets"] = change(*header["lm_head.weight"]["data_offsets"])
    return with_header(data, header)


DAMAGE = {
    "empty": lambda data: b"",
    "seven bytes": lambda data: data[:7],
    "header cut off": lambda data: data[: header_of(data) // 2],
    "no data": lambda data: data[: 8 + header_of(data)],
    "one byte short": lambda data: data[:-1],
    "one byte more": lambda data: data + b"\0",
    "garbage": lambda data: bytes(range(256)) * 40,
    "html": lambda data: b"<!DOCTYPE html><html><body>404</body></html>" * 9,
    "git lfs pointer": lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "header of 2^63 bytes": lambda data: struct.pack("<Q", 2**63) + data[8:],
    "header of 2^40 bytes": lambda data: struct.pack("<Q", 2**40) + data[8:],
    "header is a list": lambda data: with_header(data, []),
    "header nested deeply": lambda data: struct.pack("<Q", 90_000) + b"[" * 90_000,
    "unknown dtype": lambda data: data.replace(b'"F32"', b'"X32"'),
    "offsets past the end": lambda data: wrong_offsets(data, lambda a, b: [a + 2**40, b + 2**40]),
    "offsets reversed": lambda data: wrong_offsets(data, lambda a, b: [b, a]),
    "offsets of a neighbour": lambda data: wrong_offsets(data, lambda a, b: [a + 4, b + 4]),
    "offsets too short": lambda data: wrong_offsets(data, lambda a, b: [a, b - 4]),
    "offsets negative": lambda data: wrong_offsets(data, lambda a, b: [-4, b]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_file_is_one_line(good, damage):
    file = good / "model.safetensors"
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    assert "model.safetensors: cut off or not safetensors" in refused(good)


@pytest.mark.parametrize("shape", [[2**62, 2**62], [2**63, V * D], [-1, D]])
def test_shape_larger_than_its_data(good, shape):
    file = good / "model.safetensors"
    data = file.read_bytes()
    header = json.loads(data[8 : 8 + header_of(data)])
    header["lm_head.weight"]["shape"] = shape
    file.write_bytes(with_header(data, header))
    assert "cut off or not safetensors" in refused(good)


def test_empty_tensor_with_a_huge_dimension(good):
    file = good / "model.safetensors"
    data = file.read_bytes()
    header = json.loads(data[8 : 8 + header_of(data)])
    header["huge"] = dict(dtype="F32", shape=[0, 2**63], data_offsets=[0, 0])
    file.write_bytes(with_header(data, header))
    assert "1 unexpected: huge" in refused(good)


def test_things_that_are_not_files(good, tmp_path):
    file = good / "model.safetensors"
    file.unlink()
    assert "model.safetensors is missing" in refused(good)
    file.mkdir()
    assert "model.safetensors is missing" in refused(good)
    file.rmdir()
    os.mkfifo(file)  # opening it would wait for ever
    assert "model.safetensors is missing" in refused(good)
    file.unlink()
    for name, message in (
        ("model.safetensors.index.json", "not an index"),
        ("config.json", "no c"),
    ):
        (good / name).unlink(missing_ok=True)
        os.mkfifo(good / name)
        with pytest.raises(ValueError, match=message):
            load(good)
        (good / name).unlink()
    (good / "config.json").write_text(json.dumps(LLAMA))
    (good / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    assert "pickled" in refused(good)
    with pytest.raises(ValueError, match="is not a directory"):
        load(good / "config.json")
    with pytest.raises(ValueError, match="is not a directory"):
        load(tmp_path / "nowhere")


# ---- the index


def test_index_goes_before_the_single_file_and_nothing_is_globbed(tmp_path):
    directory = write(tmp_path / "m", LLAMA, hub_tensors(LLAMA), shards=2)
    (directory / "model.safetensors").write_bytes(b"not read")
    (directory / "consolidated.safetensors").write_bytes(b"not read")
    load(directory)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", '{"weight_map": []}', '{"weight_map": {"a": [1]}}', "[" * 99_999],
)
def test_broken_index(good, text):
    (good / "model.safetensors.index.json").write_text(text)
    assert "not an index" in refused(good)


@pytest.mark.parametrize(
    "entry", ["../model.safetensors", "/etc/x.safetensors", "", ".", "a/../m.safetensors", "\0", 3]
)
def test_index_entries_stay_in_the_directory(good, entry):
    write_index(good, dict.fromkeys(hub_tensors(LLAMA), entry))
    assert "leaves the directory" in refused(good)


def test_index_entries_stay_in_the_directory_through_links(good, tmp_path):
    secret = tmp_path / "elsewhere.safetensors"
    (good / "model.safetensors").rename(secret)
    (good / "linked.safetensors").symlink_to(secret)
    write_index(good, dict.fromkeys(hub_tensors(LLAMA), "linked.safetensors"))
    assert "leaves the directory" in refused(good)


def test_links_of_the_hub_cache_are_followed(tmp_path):
    """models--x/snapshots/REVISION/file -> ../../blobs/HASH is how the Hub's cache looks."""
    snapshot = tmp_path / "models--x" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    write(snapshot, LLAMA, hub_tensors(LLAMA), shards=2)
    (tmp_path / "models--x" / "blobs").mkdir()
    for n, file in enumerate(snapshot.glob("*.safetensors")):
        file.rename(tmp_path / "models--x" / "blobs" / str(n))
        file.symlink_to(f"../../blobs/{n}")
    load(snapshot)


def test_index_and_shards_disagree(tmp_path):
    directory = write(tmp_path / "m", LLAMA, hub_tensors(LLAMA), shards=2)
    path = directory / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    first, second = sorted(set(weight_map.values()))

    write_index(directory, weight_map | {"lm_head.weight": second, "model.norm.weight": second})
    assert "is not where the index puts it" in refused(directory)
    write_index(directory, weight_map | {"model.extra": first})
    load(directory)  # promised by the index, stored nowhere, needed by nobody
    (directory / second).unlink()
    assert f"{second} is missing" in refused(directory)
