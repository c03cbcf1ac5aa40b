"""Files are either complete or absent."""

import os
import subprocess

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save

from lspade_train.errors import ArtifactError, CacheError
from lspade_train.io.storage import (
    CHUNK,
    atomic_path,
    file_digest,
    json_digest,
    read_json,
    write_json,
    write_text,
)
from lspade_train.io.tensors import (
    DTYPES,
    file_tag,
    read_tensors,
    tensor_digest,
    write_tensors,
)

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2], dtype=torch.int32)}


def test_a_failed_write_leaves_only_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def fail_halfway():
        with atomic_path(path) as temporary:
            temporary.write_text("new")
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        fail_halfway()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_writing_creates_the_folder_and_an_ordinary_file(tmp_path):
    path = tmp_path / "new/folder/file.txt"
    write_text(path, "é")
    assert path.read_bytes() == "é".encode()
    assert path.stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask():
    value = os.umask(0)
    os.umask(value)
    return value


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.none() | st.text(max_size=5)))
def test_json_round_trips_and_its_digest_depends_on_the_content(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("json") / "value.json"
    write_json(path, value)
    assert read_json(path, CacheError) == value
    assert json_digest(value) == json_digest(dict(reversed(value.items())))


def test_writing_nan_as_json_is_rejected(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "nan.json", {"a": float("nan")})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("{", "is not valid JSON"),
        ("[1]", "holds a JSON list, expected an object"),
        ("[" * 200_000, "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        (f'{{"a": {10**400}}}', "a number of 401 digits"),
        ('{"a": -1e999}', "-1e999 is too large a number"),
    ],
)
def test_unreadable_json_raises_the_callers_error_with_a_remedy(tmp_path, content, message):
    path = tmp_path / "value.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ArtifactError, match=message) as caught:
        read_json(path, ArtifactError, "Fit again.")
    assert str(caught.value).splitlines()[1:] == ["Fit again."]
    assert str(path) in str(caught.value)


def test_a_huge_json_file_is_not_read(tmp_path):
    path = tmp_path / "huge.json"
    with path.open("wb") as file:
        file.truncate(65 * 1024 * 1024)
    with pytest.raises(CacheError, match="over 64 MB"):
        read_json(path, CacheError)


def test_a_folder_in_place_of_a_file_raises_a_clear_error(tmp_path):
    for read in (read_json, read_tensors):
        with pytest.raises(CacheError, match="cannot be read"):
            read(tmp_path, CacheError)
    with pytest.raises(CacheError, match="cannot be read"):
        file_digest(tmp_path, CacheError)


def test_tensors_round_trip_bit_for_bit_with_deterministic_bytes(tmp_path):
    for name in ("one", "two"):
        write_tensors(tmp_path / name, dict(reversed(TENSORS.items())), "tag")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    found = read_tensors(tmp_path / "one", CacheError)
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert file_tag(tmp_path / "one") == "tag"


@pytest.mark.parametrize("tag", ["", "prompts 0:16, é"])
def test_a_files_bytes_are_those_of_the_safetensors_library(tmp_path, tag):
    path, large = tmp_path / "file", 3 * CHUNK + 5  # several writes, the last of them short
    tensors = {str(kind): torch.arange(7).to(kind) for kind in DTYPES} | {
        "large": torch.arange(large).to(torch.uint8), "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(1.5), "transposed é": torch.arange(6).view(2, 3).T,
    }  # fmt: skip
    digest = write_tensors(path, tensors, tag)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert bool(metadata) == bool(tag)
    assert path.read_bytes() == save({n: t.contiguous() for n, t in tensors.items()}, metadata)
    assert digest == file_digest(path)


def test_an_incomplete_file_has_no_tag(tmp_path):
    path = tmp_path / "file"
    assert file_tag(path) is None
    write_tensors(path, TENSORS)
    assert file_tag(path) is None
    write_tensors(path, TENSORS, "tag")
    os.truncate(path, path.stat().st_size - 1)
    assert file_tag(path) is None


def test_truncated_tensors_raise_the_callers_error(tmp_path):
    path = tmp_path / "file"
    write_tensors(path, TENSORS)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CacheError, match="is not a complete safetensors file"):
        read_tensors(path, CacheError, "Rebuild it.")


def test_a_tensors_digest_depends_on_shape_dtype_and_bytes():
    base = torch.zeros(2, 3)
    others = [torch.zeros(3, 2), torch.zeros(2, 3).int(), base + 1e-45, torch.zeros(2, 4)]
    digests = {tensor_digest(x) for x in (base, *others)} | {tensor_digest(base, None)}
    assert len(digests) == 6
    assert tensor_digest(base.T.contiguous().T) == tensor_digest(base)
    assert tensor_digest(torch.tensor(1.0)) != tensor_digest(torch.tensor(2.0))
    assert tensor_digest(torch.zeros(0)) != tensor_digest(torch.zeros(0, 1))


def test_a_full_disk_is_reported_and_leaves_no_file(tmp_path):
    try:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(tmp_path)],
            check=True,
            capture_output=True,
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        for write in (
            lambda: write_text(tmp_path / "big", "x" * 100_000, CacheError),
            lambda: write_tensors(tmp_path / "big", {"a": torch.zeros(50_000)}, "", CacheError),
        ):
            with pytest.raises(CacheError, match=r"is full; big was not written\.\nFree some"):
                write()
            assert not list(tmp_path.iterdir())
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)
