"""Malicious files: every reader rejects them with a clear error, quickly and in little memory.

`LSPADE_FUZZ=20000 pytest tests/test_hostile.py` draws that many inputs per reader.
"""

import ast
import contextlib
import copy
import json
import os
import pickle
import resource
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import toy
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import save

import lspade_train
from lspade_train.artifacts.folder import describe
from lspade_train.cache import Manifest, open_cache
from lspade_train.cli import main
from lspade_train.errors import ArtifactError, CacheError, LSpadeError, PolicyError, TaskError
from lspade_train.io.fetch import local_folder
from lspade_train.io.layout import read_results
from lspade_train.io.storage import file_digest, json_digest, read_json
from lspade_train.io.tensors import file_tag, read_tensors
from lspade_train.policies.policy import ExitPolicy
from lspade_train.probes.heads import LSpadeHeads
from lspade_train.runtime import predict
from lspade_train.tasks.files import read_jsonl

COUNT = int(os.environ.get("LSPADE_FUZZ", "30"))
MEMORY = 6 << 30
"""Address space a reader may take in all, torch's libraries and mapped files with it."""

fuzz = lambda test: seed(7)(  # noqa: E731
    settings(
        max_examples=COUNT,
        deadline=2000,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )(test)
)

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.just(10**400)
    | st.floats()
    | st.sampled_from(["", "..", "../x", "/etc/passwd", "shard-00000.safetensors", "a\0b", "full"])
    | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=8,
)


@pytest.fixture(autouse=True, scope="module")
def _bounded_memory():
    """Exceeding this limit fails the test instead of making the machine swap."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY + mapped(), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def mapped() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


@pytest.fixture(scope="module")
def cache(toy_root, tmp_path_factory):
    """A small finished cache; tests that change it make a copy."""
    project = toy.Project(toy_root, tmp_path_factory.mktemp("cache"))
    project.module(shard_mb=0.01).states("train")
    return project.cache / "train"


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """A small heads folder with a policy."""
    folder = tmp_path_factory.mktemp("heads")
    LSpadeHeads((1, 3), 8, form="low_rank", rank=2).save_pretrained(folder)
    ExitPolicy(layers=(1, 3), threshold=0.5).save(folder)
    return folder


def paths(value, path=()):
    """The path of every node in a JSON value."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from paths(value[key], (*path, key))


def changed(value, place, new):
    if not place:
        return new
    value = copy.deepcopy(value)
    part = value
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = new
    return value


def mutated(data, honest):
    """A valid JSON value with one to three nodes replaced, or replaced entirely."""
    value = honest
    for _ in range(data.draw(st.integers(1, 3))):
        value = changed(value, data.draw(st.sampled_from(list(paths(value)))), data.draw(JSON))
    return value


def damaged(data, content: bytes) -> bytes:
    """Bytes with some of them changed, cut or repeated."""
    found = bytearray(content)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, max(len(found) - 1, 0)))
        part = data.draw(st.binary(max_size=8))
        found[at : at + data.draw(st.integers(0, 8))] = part
    return bytes(found)


def accepts_or_refuses(error, read, *arguments):
    """A reader may either return a value, or raise its own error in a line or two."""
    try:
        return read(*arguments)
    except error as cause:
        refusal = cause
    assert 0 < len(str(refusal).splitlines()) <= 2, refusal
    return None


def tensors_file(header: object, body: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(start, end, dtype="F32", shape=(2,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


BODY = bytes(16)
TENSOR_FILES = {
    "empty": b"",
    "header longer than the file": tensors_file({}, length=1 << 20),
    "header of 2^63 bytes": tensors_file({}, length=1 << 63),
    "header of 2^64 - 1 bytes": tensors_file({}, length=(1 << 64) - 1),
    "huge offsets": tensors_file({"a": entry(0, 2**62)}, BODY),
    "offsets over 64 bits": tensors_file({"a": entry(0, 2**70)}, BODY),
    "negative offsets": tensors_file({"a": entry(-8, 0)}, BODY),
    "offsets the wrong way round": tensors_file({"a": entry(8, 0)}, BODY),
    "overlap": tensors_file({"a": entry(0, 8), "b": entry(4, 12)}, BODY[:12]),
    "the same bytes twice": tensors_file({"a": entry(0, 8), "b": entry(0, 8)}, BODY[:8]),
    "a hole": tensors_file({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20)),
    "bytes left over": tensors_file({"a": entry(0, 8)}, BODY),
    "a dtype nobody has": tensors_file({"a": entry(0, 8, "F33")}, BODY[:8]),
    "a dtype of another size": tensors_file({"a": entry(0, 8, "F64")}, BODY[:8]),
    "a shape that overflows": tensors_file({"a": entry(0, 8, shape=(2**33, 2**33))}, BODY[:8]),
    "a negative shape": tensors_file({"a": entry(0, 8, shape=(-2,))}, BODY[:8]),
    "a name twice": tensors_file(
        b'{"a":%b,"a":%b}' % ((json.dumps(entry(0, 8)).encode(),) * 2), BODY
    ),
    "no object": tensors_file([1], BODY),
    "nested a thousand deep": tensors_file(b'{"a":' + b"[" * 100_000, BODY),
    "metadata that is no text": tensors_file({"__metadata__": {"tag": [1]}}, b""),
    "not UTF-8": tensors_file(b"\xff\xfe{}", BODY),
    "a pickle": pickle.dumps({"a": 1}),
}


@pytest.mark.parametrize("name", TENSOR_FILES)
def test_a_malicious_safetensors_file_is_rejected(tmp_path, name):
    path = tmp_path / "file.safetensors"
    path.write_bytes(TENSOR_FILES[name])
    with pytest.raises(CacheError, match=r"is not a complete safetensors file|cannot be read"):
        read_tensors(path, CacheError)
    assert file_tag(path) is None


@fuzz
@given(st.data())
def test_fuzz_of_the_safetensors_reader(tmp_path, data):
    names, dtypes = st.text(max_size=3), st.sampled_from(["F32", "I64", "BOOL", "F8_E4M3", "C64"])
    number = st.integers(-4, 40) | st.integers(-(2**70), 2**70)
    one = st.fixed_dictionaries(
        {
            "dtype": dtypes | JSON,
            "shape": st.lists(number, max_size=3) | JSON,
            "data_offsets": st.lists(number, min_size=2, max_size=2) | JSON,
        }
    )
    honest = save({"a": torch.arange(4.0), "b": torch.ones(2, 3, dtype=torch.bfloat16)})
    made = st.dictionaries(names, one, max_size=3).map(lambda header: tensors_file(header, BODY))
    content = data.draw(made) if data.draw(st.booleans()) else damaged(data, honest)
    path = tmp_path / "file.safetensors"
    path.write_bytes(content)
    accepts_or_refuses(CacheError, read_tensors, path, CacheError)
    assert file_tag(path) is None


@fuzz
@given(st.data())
def test_fuzz_of_the_manifest_and_its_cache(cache, tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "fuzzed-cache"
    shutil.copytree(cache, folder, dirs_exist_ok=True)
    value = mutated(data, json.loads((cache / "manifest.json").read_text()))
    if isinstance(value, dict) and data.draw(st.booleans()):
        with contextlib.suppress(ValueError):  # a forger would fix the digest
            value["digest"] = json_digest(value.get("identity"))
    (folder / "manifest.json").write_text(json.dumps(value))
    accepts_or_refuses(CacheError, Manifest.read, folder)
    opened = accepts_or_refuses(CacheError, open_cache, folder)
    if opened:
        opened[1].gather(torch.arange(len(opened[1])))


def forged(cache, folder, tensors, part="shards"):
    """A cache with one file's tensors replaced, and a manifest whose checksums match."""
    shutil.copytree(cache, folder)
    value = json.loads((folder / "manifest.json").read_text())
    shard = folder / value[part][0]["file"]
    shard.write_bytes(save(tensors))
    value[part][0] |= {"bytes": shard.stat().st_size, "sha256": file_digest(shard)}
    (folder / "manifest.json").write_text(json.dumps(value))
    return folder


TENSOR_CHANGES = {
    "a tensor too few": lambda tensors: tensors.pop("hidden"),
    "a tensor too many": lambda tensors: tensors.update(more=torch.ones(2)),
    "a row too few": lambda tensors: tensors.update(final=tensors["final"][1:].clone()),
    "another width": lambda tensors: tensors.update(final=tensors["final"][:, 1:].clone()),
    "another dtype": lambda tensors: tensors.update(hidden=tensors["hidden"].int()),
    "another precision": lambda tensors: tensors.update(hidden=tensors["hidden"].half()),
    "a layer too few": lambda tensors: tensors.update(hidden=tensors["hidden"][:, 1:].clone()),
    "a reduced target": lambda tensors: tensors.update(target_mean=tensors["hidden"].clone()),
    "a number": lambda tensors: tensors.update(final=torch.tensor(1.0)),
}


@pytest.mark.parametrize("change", TENSOR_CHANGES)
def test_a_forged_shard_with_a_matching_checksum_is_rejected(cache, tmp_path, change):
    tensors = read_tensors(cache / "shard-00000.safetensors", CacheError)
    TENSOR_CHANGES[change](tensors)
    with pytest.raises(CacheError, match="does not contain the rows of a cache"):
        open_cache(forged(cache, tmp_path / "forged", tensors))


TARGET_CHANGES = {
    "nothing": lambda tensors: tensors.clear(),
    "hidden states": lambda tensors: tensors.update(hidden=tensors["target"].clone()),
    "a row too few": lambda tensors: tensors.update(target=tensors["target"][1:].clone()),
    "a layer too few": lambda tensors: tensors.update(target=tensors["target"][:, 1:].clone()),
    "another width": lambda tensors: tensors.update(target=tensors["target"][..., 1:].clone()),
}


@pytest.mark.parametrize("change", TARGET_CHANGES)
def test_forged_targets_with_a_matching_checksum_are_rejected(cache, tmp_path, change):
    tensors = read_tensors(cache / "target-00000.safetensors", CacheError)
    TARGET_CHANGES[change](tensors)
    with pytest.raises(CacheError, match="does not contain the (rows|targets) of a cache"):
        open_cache(forged(cache, tmp_path / "forged", tensors, "targets"))


@pytest.mark.parametrize("part", ["shards", "targets"])
@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "..", "", "a/b", "identity.json", "shard-0.safetensors\n"]
)
def test_a_manifest_that_names_another_file_is_rejected(cache, tmp_path, name, part):
    folder = shutil.copytree(cache, tmp_path / "cache")
    value = json.loads((folder / "manifest.json").read_text())
    value[part][0]["file"] = name
    (folder / "manifest.json").write_text(json.dumps(value))
    with pytest.raises(CacheError, match="names a file outside its folder"):
        open_cache(folder)


@fuzz
@given(st.data())
def test_fuzz_of_the_heads_config(heads, tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "fuzzed-heads"
    shutil.copytree(heads, folder, dirs_exist_ok=True)
    value = mutated(data, json.loads((heads / "config.json").read_text()))
    (folder / "config.json").write_text(json.dumps(value))
    accepts_or_refuses(ArtifactError, LSpadeHeads.from_pretrained, folder)
    accepts_or_refuses(ArtifactError, describe, folder)


@pytest.mark.parametrize(
    "claim",
    [
        {"hidden_size": 10**7},
        {"hidden_size": 2**62},
        {"rank": 10**12},
        {"layers": list(range(9**6))},
        {"form": "low_rank", "hidden_size": 10**5, "rank": 10**5},
    ],
    ids=["a wide model", "a wider one than numbers go", "rank", "layers", "low rank"],
)
def test_heads_that_claim_oversized_tensors_are_rejected_before_allocation(heads, tmp_path, claim):
    folder = shutil.copytree(heads, tmp_path / "heads")
    config = json.loads((folder / "config.json").read_text()) | claim
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=r"does not describe heads\.safetensors"):
        LSpadeHeads.from_pretrained(folder)


@fuzz
@given(st.data())
def test_fuzz_of_the_policy(heads, tmp_path, data):
    value = mutated(data, json.loads((heads / "policy.json").read_text()))
    (tmp_path / "policy.json").write_text(json.dumps(value))
    accepts_or_refuses(PolicyError, ExitPolicy.load, tmp_path)


def test_a_threshold_too_large_for_a_float_is_rejected():
    with pytest.raises(PolicyError, match="out of range for entropy"):
        ExitPolicy(layers=(1,), threshold=10**400)


@fuzz
@given(st.data())
def test_fuzz_of_json_files_byte_by_byte(cache, tmp_path, data):
    path = tmp_path / "results.json"
    path.write_bytes(damaged(data, (cache / "manifest.json").read_bytes()[:400]))
    accepts_or_refuses(ArtifactError, read_results, tmp_path)


@fuzz
@given(st.data())
def test_fuzz_of_rows_and_of_prompts_to_predict(tmp_path, data):
    path = tmp_path / "rows.jsonl"
    line = json.dumps(
        data.draw(JSON | st.dictionaries(st.sampled_from(["prompt", "choices"]), JSON))
    )
    path.write_bytes(damaged(data, line.encode()))
    accepts_or_refuses(TaskError, read_jsonl, path, lambda row: row)
    for text in path.read_text(errors="replace").splitlines():
        line = predict.parse_line(1, text, predict.RawPrompts())
        assert line.echo["line"] == 1
        assert (line.asked is None) == bool(line.error)
        json.dumps(line.echo, allow_nan=False)


BOMBS = {
    "deep": b'{"a":' + b"[" * 1_000_000,
    "deep objects": b'{"a":' * 500_000,
    "a number of a million digits": b'{"a": ' + b"9" * 1_000_000 + b"}",
    "over 64 MB": b'{"a": "' + b"x" * (64 << 20) + b'"}',
    "not a number": b'{"a": NaN}',
    "infinite": b'{"a": -Infinity}',
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_json_bomb_is_rejected(tmp_path, name):
    path = tmp_path / "value.json"
    path.write_bytes(BOMBS[name])
    with pytest.raises(ArtifactError, match=r"not valid JSON|over 64 MB"):
        read_json(path, ArtifactError)


@pytest.mark.parametrize("version", [0, 3, 99, "1", None, 1.5, [1]], ids=str)
def test_an_unknown_format_version_is_rejected(cache, heads, tmp_path, version):
    for source, file, read in (
        (cache, "manifest.json", Manifest.read),
        (heads, "config.json", LSpadeHeads.from_pretrained),
        (heads, "policy.json", ExitPolicy.load),
    ):
        folder = shutil.copytree(source, tmp_path / file)
        value = json.loads((folder / file).read_text()) | {"format_version": version}
        (folder / file).write_text(json.dumps(value))
        with pytest.raises(LSpadeError, match="format"):
            read(folder)


def test_anything_but_a_regular_file_is_rejected_immediately(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("pipe", "device", "loop"):
        for read in (read_json, read_tensors, file_digest):
            with pytest.raises(CacheError, match="cannot be read"):
                read(tmp_path / name, CacheError)


@pytest.mark.parametrize(
    "name", ["../../etc", "a/b/c", "org/../name", "", "org/na me", "-x/y", "org/" + "n" * 200]
)
def test_a_repository_name_with_path_traversal_is_rejected(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LSpadeError):
        local_folder(name or "nowhere/")


class Evil:
    """A pickle that creates a marker file when loaded."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def test_a_checkpoint_containing_code_is_rejected_without_running_it(project, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.chdir(project.home)
    path, mark = project.home / "evil.ckpt", project.home / "mark"
    torch.save({"state_dict": {}, "callbacks": Evil(mark)}, path)
    recipe = str(project.recipe())
    assert main(["fit", "--config", recipe, "--ckpt_path", str(path)]) == 1
    assert "is damaged or not a checkpoint" in capsys.readouterr().err
    assert not mark.exists()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello", "world")
    assert main(["fit", "--config", recipe, "--ckpt_path", str(path)]) == 1


# Guarantees checked in the package's source

SOURCES = sorted(Path(lspade_train.__file__).parent.rglob("*.py"))


def calls(name):
    """Every call of a function of that name, with its keywords."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == name:
                words = {word.arg: ast.unparse(word.value) for word in node.keywords}
                yield f"{path.name}:{node.lineno}", ast.unparse(node.func), words


def test_pickles_are_loaded_only_with_weights_only():
    for where, function, words in calls("load"):
        if function.startswith("torch."):
            assert words.get("weights_only") == "True", where
    resumed = [(where, words) for where, _, words in calls("fit") if "ckpt_path" in words]
    assert resumed
    for where, words in resumed:
        assert words.get("weights_only") == "True", where
    imported = {
        alias.name
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert not imported & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def test_remote_code_runs_only_if_the_recipe_allows_it():
    words = [
        word
        for path in SOURCES
        for word in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(word, ast.keyword) and word.arg == "trust_remote_code"
    ]
    assert words
    assert not [word for word in words if isinstance(word.value, ast.Constant) and word.value.value]
    assert lspade_train.recipe.DataConfig(model_id="x", task="arc_easy").trust_remote_code is False


def _commands(home):
    with (home / "printed").open("w", buffering=1) as printed:
        os.dup2(printed.fileno(), 1)
        os.dup2(printed.fileno(), 2)
        sys.stdout = sys.stderr = printed
        recipe = ["--config", "recipe.yaml"]
        done = [
            main(["fit", *recipe, "--trainer.max_epochs", "1"]),
            main(["evaluate", *recipe]),
            main(["predict", *recipe, "--threshold", "1", "--input", "prompts.jsonl"]),
            main(["info", "checkpoints/toy"]),
        ]
    sys.exit(any(done))


@pytest.mark.slow
def test_no_secret_in_the_environment_is_printed_or_written(project):
    secret = "0123456789SECRET0123456789SECRET01234567"
    names = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")
    environment = dict.fromkeys(names, secret) | {"WANDB_MODE": "offline"}
    project.recipe()
    toy.write_jsonl(project.home / "prompts.jsonl", toy.questions(3))
    code = "from test_hostile import _commands; import pathlib; _commands(pathlib.Path.cwd())"
    # W&B runs of earlier tests leave their service's address in the environment.
    kept = {name: value for name, value in os.environ.items() if "WANDB_SERVICE" not in name}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=project.home, timeout=300, check=False,
        env={**kept, **environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    printed = (project.home / "printed").read_text()
    assert done.returncode == 0, printed
    assert '"token_id"' in printed
    written = [path for path in project.home.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in written), "W&B wrote nothing to search"
    assert {"config.json", "README.md", "manifest.json"} <= {path.name for path in written}
    assert not [path for path in written if secret.encode() in path.read_bytes()]
