"""Push to the Hub and pull back: the real client against a Hub on loopback, over HTTP."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import hub_server
import pytest
import torch
from hub_server import READ_TOKEN, TOKEN, RefusalError, Repo
from huggingface_hub import HfFileSystem, constants
from tiny_models import WIDTH

from lspade_train import ExitPolicy, LSpadeHeads
from lspade_train.artifacts import folder as artifact
from lspade_train.artifacts.folder import pull, push, push_to_hub
from lspade_train.cli import main
from lspade_train.errors import ArtifactError, HubError, PolicyError
from lspade_train.io.layout import known_files

REPO = "someone/toy-heads"
STRAY = (
    "training/last.ckpt",
    "logs/metrics.csv",
    "notes.txt",
    "heads.pkl",
    ".env",
    "figures/a.pkl",
)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on loopback that this process's client uses, logged in, with an empty cache."""
    with hub_server.serve() as server:
        point_client_at(server.url, monkeypatch, tmp_path / "hub-cache")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def point_client_at(url, monkeypatch, cache):
    """Set after import what the client reads from the environment when imported."""
    settings = {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,  # the transfer library only talks to the Hub's own storage
        "HF_HUB_CACHE": str(cache),
        "HF_TOKEN_PATH": str(cache / "no-token"),
    }
    for name, value in settings.items():
        assert hasattr(constants, name)
        monkeypatch.setattr(constants, name, value)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """`checkpoints/toy` with every known file, and unrelated private files."""
    monkeypatch.chdir(tmp_path)
    place = Path("checkpoints/toy")
    heads = LSpadeHeads([1, 2, 3], WIDTH, form="bias")
    with torch.no_grad():
        heads.bias.normal_()
    heads.save_pretrained(place)
    ExitPolicy(layers=(1, 2), heads_digest=heads.metadata["weights_sha256"]).save(place)
    for name in ("figures/loss.png", "figures/loss.svg", "report.html", *STRAY):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(name.encode())
    return place


@pytest.fixture
def recipe(tmp_path):
    """A recipe of that name."""
    path = tmp_path / "recipe.yaml"
    path.write_text('{"name": "toy", "data": {"model_id": "some/model", "task": "jsonl"}}')
    return path


def content(place):
    """Every file below a folder, by relative path."""
    paths = (path for path in Path(place).rglob("*") if path.is_file())
    return {path.relative_to(place).as_posix(): path.read_bytes() for path in paths}


def error_of(capsys, *arguments):
    """The one error, of one or two lines, on standard error."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 1
    error_text = capsys.readouterr().err
    assert error_text.startswith("error: "), error_text
    assert len(error_text.splitlines()) == 2, error_text
    return error_text


# Round trip


def test_pushed_files_are_pulled_byte_for_byte(hub, folder):
    artifact.push(folder, REPO)
    artifact.pull(REPO, Path("back"))
    sent = {name: path.read_bytes() for name, path in known_files(folder).items()}
    assert content("back") == sent
    assert {"heads.safetensors", "policy.json", "README.md", "figures/loss.svg"} <= set(sent)


def test_heads_and_policy_load_by_repository_name(hub, folder):
    artifact.push(folder, REPO)
    heads = LSpadeHeads.from_pretrained(REPO)
    assert torch.equal(heads.bias, LSpadeHeads.from_pretrained(folder).bias)
    policy = ExitPolicy.from_pretrained(REPO)
    policy.check_heads(heads.metadata["weights_sha256"])


def test_an_hf_url_reads_a_repository_and_downloads_unchanged_files_once(
    hub, folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("LSPADE_CACHE", str(tmp_path / "mirrors"))
    HfFileSystem.clear_instance_cache()  # cached clients of another server
    artifact.push(folder, REPO)
    expected = LSpadeHeads.from_pretrained(folder).bias
    for downloads in (1, 0):
        hub.requests.clear()
        assert torch.equal(LSpadeHeads.from_pretrained(f"hf://{REPO}").bias, expected)
        asked = [request for request in hub.requests if "GET" in request and "resolve" in request]
        assert sum("heads.safetensors" in request for request in asked) == downloads
        assert bool(asked) == bool(downloads)


@pytest.mark.slow
def test_commands_push_and_pull_with_only_the_environment_set(folder, recipe, tmp_path):
    """A real process, so that endpoint and token are read as for a user."""
    push = ["push", "--config", str(recipe), "--repo", REPO, "--license", "mit"]
    commands = [push, ["pull", REPO, "--to", "back"]]
    code = f"from lspade_train.cli import main; print(*map(main, {commands}))"
    with hub_server.serve() as server:
        environment = os.environ | {
            "HF_ENDPOINT": server.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": TOKEN,
        }
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment
        )
    address, codes = done.stdout.splitlines()
    assert codes == "0 0", done.stderr
    assert address.startswith(f"{server.url}/{REPO}/commit/")
    assert content("back") == {n: p.read_bytes() for n, p in known_files(folder).items()}


def test_only_known_files_are_uploaded(hub, folder):
    artifact.push(folder, REPO)
    assert set(hub.repos[REPO].at("main")) == {".gitattributes", *known_files(folder)}
    assert not set(known_files(folder)) & set(STRAY)


def test_only_known_files_are_downloaded(hub, folder):
    artifact.push(folder, REPO)
    there = hub.repos[REPO]
    there.commit("main", there.at("main") | {"model.pkl": b"x", "figures/../../evil.png": b"x"})
    artifact.pull(REPO, Path("back"))
    assert set(content("back")) == set(known_files(folder))
    assert not any("pkl" in line or "evil" in line for line in hub.requests)


def test_pushing_again_deletes_removed_files_and_keeps_foreign_ones(hub, folder):
    artifact.push(folder, REPO)
    there = hub.repos[REPO]
    foreign = {"LICENSE": b"terms", "figures/poster.pdf": b"x", "old/policy.json": b"{}"}
    there.commit("main", there.at("main") | foreign)
    for name in ("policy.json", "figures/loss.png"):
        (folder / name).unlink()
    artifact.push(folder, REPO)
    now = there.at("main")
    assert not {"policy.json", "figures/loss.png"} & set(now)
    assert foreign.items() <= now.items()


def test_a_gate_and_a_tuned_lens_are_pushed_and_pulled_with_the_heads(hub, folder):
    heads = LSpadeHeads.from_pretrained(folder)
    tuned = LSpadeHeads([1, 2, 3], WIDTH, form="bias")
    heads.beside(tuned).save_pretrained(folder)
    (folder / "gate.safetensors").write_bytes(b"gate")
    (folder / "tuned_lens/results.json").write_bytes(b"{}")
    push(folder, REPO)
    pull(REPO, Path("back"))
    sent, back = content(folder), content("back")
    travelled = {"gate.safetensors", "tuned_lens/heads.safetensors", "tuned_lens/config.json"}
    assert {name: back[name] for name in travelled} == {name: sent[name] for name in travelled}
    assert "tuned_lens/results.json" not in back
    beside = LSpadeHeads.from_pretrained("back").tuned_lens
    assert beside is not None
    assert beside.digest == tuned.digest


@pytest.mark.slow
def test_pushing_again_deletes_a_removed_tuned_lens(hub, folder):
    heads = LSpadeHeads.from_pretrained(folder)
    heads.beside(LSpadeHeads([1], WIDTH, form="bias")).save_pretrained(folder)
    push(folder, REPO)
    shutil.rmtree(folder / "tuned_lens")
    push(folder, REPO)
    assert not any("tuned_lens" in name for name in hub.repos[REPO].at("main"))


def test_push_to_hub_uploads_config_and_card(hub, folder):
    heads = LSpadeHeads.from_pretrained(folder)
    address = push_to_hub(heads, REPO, license="mit", message="First heads")
    there = hub.repos[REPO]
    assert address == f"{hub.url}/{REPO}/commit/{there.refs['main']}"
    assert there.messages[there.refs["main"]] == "First heads"
    assert set(there.at("main")) - {".gitattributes"} == {
        "heads.safetensors",
        "config.json",
        "README.md",
    }
    assert b"license: mit" in there.at("main")["README.md"]


def test_saving_heads_sets_their_digest(tmp_path):
    heads = LSpadeHeads([1], WIDTH)
    heads.save_pretrained(tmp_path)
    assert heads.metadata == LSpadeHeads.from_pretrained(tmp_path).metadata


# Destination


def test_a_revision_can_be_a_branch_or_a_commit(hub, folder):
    artifact.push(folder, REPO)
    first = hub.repos[REPO].refs["main"]
    other = LSpadeHeads([1, 2], WIDTH, form="bias")
    push_to_hub(other, REPO, branch="two")
    assert hub.repos[REPO].refs["main"] == first
    assert LSpadeHeads.from_pretrained(REPO).layers == (1, 2, 3)
    assert LSpadeHeads.from_pretrained(REPO, revision="two").layers == (1, 2)
    push_to_hub(other, REPO)
    assert LSpadeHeads.from_pretrained(REPO).layers == (1, 2)
    assert LSpadeHeads.from_pretrained(REPO, revision=first).layers == (1, 2, 3)


@pytest.mark.parametrize("private", [True, False])
def test_a_new_repository_is_private_on_request(hub, folder, private):
    artifact.push(folder, REPO, private=private)
    assert hub.repos[REPO].private == private


def test_pushing_as_private_to_a_public_repository_is_rejected(hub, folder):
    artifact.push(folder, REPO)
    before = dict(hub.repos[REPO].refs)
    with pytest.raises(HubError, match=r"is public(.|\n)*settings"):
        artifact.push(folder, REPO, private=True, message="secret")
    assert hub.repos[REPO].refs == before


def test_a_pull_request_needs_no_write_access_and_leaves_main_unchanged(hub, folder, monkeypatch):
    repo = hub.repos["other/heads"] = Repo()
    main_before = repo.commit("main", {".gitattributes": b""})
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    address = artifact.push(folder, "other/heads", create_pr=True)
    assert address == f"{hub.url}/other/heads/discussions/1"
    assert repo.refs["main"] == main_before
    assert LSpadeHeads.from_pretrained("other/heads", revision="refs/pr/1").layers == (1, 2, 3)


@pytest.mark.parametrize("flag", ["--private", "--create_pr"])
@pytest.mark.parametrize("option", [[], ["--branch", "try"]])
def test_command_line_options_reach_the_hub(hub, folder, recipe, capsys, flag, option):
    if flag == "--create_pr":
        hub.repos[REPO] = Repo()
        start = hub.repos[REPO].commit("main", {})
        hub.repos[REPO].refs["try"] = start
    assert main(["push", "--config", str(recipe), "--repo", REPO, flag, *option]) == 0
    refs = hub.repos[REPO].refs
    printed = capsys.readouterr().out
    if flag == "--create_pr":
        assert "refs/pr/1" in refs
        assert "/discussions/1" in printed
    else:
        assert hub.repos[REPO].private
        assert printed.strip().endswith(refs["try" if option else "main"])


def test_a_dry_run_shows_files_sizes_and_card_without_uploading_or_writing(
    hub, folder, recipe, capsys
):
    before = content(folder)
    arguments = ["push", "--config", str(recipe), "--repo", REPO, "--dry_run", "--license", "mit"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert f"{(folder / 'heads.safetensors').stat().st_size:,}  heads.safetensors" in printed
    assert f"files to {REPO}" in printed
    assert "license: mit" in printed
    assert f'LSpadeHeads.from_pretrained("{REPO}")' in printed
    assert not any(name in printed for name in STRAY)
    assert content(folder) == before
    assert not hub.requests


def test_local_paths_in_the_config_are_reported(hub, folder, recipe, caplog):
    heads = LSpadeHeads.from_pretrained(folder)
    heads.metadata["base_model"] = {"model_id": "/home/someone/models/llama", "revision": None}
    heads.save_pretrained(folder)
    with caplog.at_level("WARNING"):
        assert main(["push", "--config", str(recipe), "--repo", REPO]) == 0
    assert "public: config.json: /home/someone/models/llama" in caplog.text
    assert b"/home" not in hub.repos[REPO].at("main")["README.md"]


# Failures


@pytest.mark.slow
def test_an_upload_is_retried_after_a_dropped_connection(hub, folder):
    drops = iter([True])

    def drop_connection(_oid, _data):
        if next(drops, False):
            raise ConnectionAbortedError

    hub.on_upload = drop_connection
    artifact.push(folder, REPO)
    artifact.pull(REPO, Path("back"))


@pytest.mark.slow  # the client backs off before each of its five attempts
def test_a_connection_that_always_drops_raises_a_clear_error_without_a_commit(
    hub, folder, recipe, capsys
):
    def drop_connection(_oid, _data):
        raise ConnectionAbortedError

    hub.on_upload = drop_connection
    error_text = error_of(capsys, "push", "--config", recipe, "--repo", REPO)
    assert "someone/toy-heads was interrupted" in error_text
    assert set(hub.repos[REPO].at("main")) == {".gitattributes"}


def test_a_failed_upload_commits_nothing_and_resumes_on_the_next_push(hub, folder, recipe, capsys):
    weights = (folder / "heads.safetensors").read_bytes()

    def refuse_weights(_oid, data):
        if data == weights:
            raise RefusalError(403, "Request has expired")

    hub.on_upload = refuse_weights
    arguments = ["push", "--config", recipe, "--repo", REPO]
    error_text = error_of(capsys, *arguments)
    assert "someone/toy-heads was interrupted" in error_text
    assert "Request has expired" in error_text
    assert "run it again" in error_text
    assert set(hub.repos[REPO].at("main")) == {".gitattributes"}
    assert len(hub.blobs) == 1  # the figure
    hub.on_upload, hub.requests[:] = lambda _oid, _data: None, []
    assert main([str(argument) for argument in arguments]) == 0
    assert sum(line.startswith("PUT") for line in hub.requests) == 1


def test_a_wrong_token_is_reported(hub, folder, recipe, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    error_text = error_of(capsys, "push", "--config", recipe, "--repo", REPO)
    assert "refuses the token (Invalid credentials" in error_text
    assert "hf auth login" in error_text
    assert "hf_wrong" not in error_text


def test_a_token_without_write_access_is_reported(hub, folder, recipe, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    error_text = error_of(capsys, "push", "--config", recipe, "--repo", REPO)
    assert "no permission to do that in someone/toy-heads" in error_text
    assert "--create_pr" in error_text


def test_without_a_login_the_hub_is_not_contacted(hub, folder, recipe, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    error_text = error_of(capsys, "push", "--config", recipe, "--repo", REPO)
    assert "hf auth login" in error_text
    assert not hub.requests


@pytest.mark.parametrize("token", [TOKEN, None])
def test_a_missing_repository_is_reported(hub, capsys, monkeypatch, token):
    monkeypatch.delenv("HF_TOKEN") if token is None else None
    error_text = error_of(capsys, "pull", "someone/nothing")
    assert "no repository someone/nothing that you can read" in error_text
    assert "hf auth login" in error_text


def test_reading_a_private_repository_requires_a_login(hub, folder, capsys, monkeypatch):
    artifact.push(folder, REPO, private=True)
    monkeypatch.delenv("HF_TOKEN")
    assert "that you can read" in error_of(capsys, "pull", REPO, "--to", "back")
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    assert main(["pull", REPO, "--to", "back"]) == 0


def test_a_pull_request_to_a_missing_repository_is_reported(hub, folder, recipe, capsys):
    error_text = error_of(capsys, "push", "--config", recipe, "--repo", REPO, "--create_pr")
    assert "no repository someone/toy-heads" in error_text


def test_a_missing_revision_is_reported(hub, folder, capsys):
    artifact.push(folder, REPO)
    error_text = error_of(capsys, "pull", REPO, "--revision", "v9", "--to", "back")
    assert "someone/toy-heads has no revision 'v9'" in error_text
    with pytest.raises(HubError, match="no revision 'v9'"):
        LSpadeHeads.from_pretrained(REPO, revision="v9")


def test_a_revision_with_a_local_folder_is_rejected(folder):
    with pytest.raises(HubError, match=r"folder here, which has no revision 'v1'"):
        LSpadeHeads.from_pretrained(folder, revision="v1")


def test_a_missing_network_is_reported(folder, recipe, capsys, monkeypatch, tmp_path):
    with hub_server.serve() as server:
        url = server.url
    point_client_at(url, monkeypatch, tmp_path / "hub-cache")  # the server is down now
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for arguments in (["pull", REPO], ["push", "--config", recipe, "--repo", REPO]):
        error_text = error_of(capsys, *arguments)
        assert f"The Hub at {url} cannot be reached" in error_text
        assert "HF_ENDPOINT" in error_text


def test_a_hub_without_xet_storage_is_reported_with_a_workaround(
    hub, folder, recipe, capsys, monkeypatch
):
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    error_text = error_of(capsys, "push", "--config", recipe, "--repo", REPO)
    assert "HF_HUB_DISABLE_XET=1" in error_text
    assert set(hub.repos[REPO].at("main")) == {".gitattributes"}


def test_without_a_network_the_cached_copy_is_used(hub, folder, monkeypatch):
    artifact.push(folder, REPO)
    LSpadeHeads.from_pretrained(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert LSpadeHeads.from_pretrained(REPO).layers == (1, 2, 3)


NAMES = [
    "../heads",
    "someone/../heads",
    "heads",
    "a/b/c",
    "some one/heads",
    "someone/heads.git",
    "",
]


@pytest.mark.parametrize("name", NAMES)
def test_an_invalid_repository_name_is_rejected_before_any_request(
    hub, folder, recipe, capsys, name
):
    for arguments in (["pull", name], ["push", "--config", recipe, f"--repo={name}"]):
        assert "Expected org/name" in error_of(capsys, *arguments)
    with pytest.raises(HubError, match="Expected org/name"):
        push_to_hub(LSpadeHeads([1], WIDTH), name)
    assert not hub.requests


def test_push_without_a_repository_exits_with_code_2(folder, recipe, capsys):
    assert main(["push", "--config", str(recipe)]) == 2
    assert "--repo" in capsys.readouterr().err


def test_a_folder_without_heads_is_not_pushed(hub, recipe, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error_text = error_of(capsys, "push", "--config", recipe, "--repo", REPO)
    assert "checkpoints/toy" in error_text
    assert "lspade-train fit" in error_text
    assert not hub.requests


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGE = {
    "a flipped bit": (lambda f: flip(f / "heads.safetensors"), "checksum"),
    "an unknown format": (lambda f: edit(f / "config.json", format_version=9), "format_version 9"),
    "a policy of other heads": (
        lambda f: edit(f / "policy.json", heads_digest="0" * 64),
        "expected 0000",
    ),
    "a policy that is none": (lambda f: edit(f / "policy.json", layers=[2, 1]), "ascending"),
    "results of other heads": (
        lambda f: (f / "results.json").write_text('{"heads": {"weights_sha256": "0000"}}'),
        "measured with heads 0000",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_folder_is_neither_pushed_nor_pulled(hub, folder, case):
    artifact.push(folder, REPO)
    break_it, message = DAMAGE[case]
    break_it(folder)
    before = dict(hub.repos[REPO].refs)
    with pytest.raises((ArtifactError, PolicyError), match=message):
        artifact.push(folder, REPO)
    assert hub.repos[REPO].refs == before
    there = hub.repos[REPO]
    broken = {name: path.read_bytes() for name, path in known_files(folder).items()}
    there.commit("main", there.at("main") | broken)
    with pytest.raises((ArtifactError, PolicyError), match=message):
        artifact.pull(REPO, Path("back"))
    assert not Path("back").exists()
    assert not list(Path().glob(".back*"))


def test_a_repository_without_heads_is_reported(hub, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub.repos["someone/llama"] = Repo()
    hub.repos["someone/llama"].commit("main", {"config.json": b"{}", "model.safetensors": b""})
    assert "holds no heads.safetensors" in error_of(capsys, "pull", "someone/llama")
    assert not Path("checkpoints").exists()


def test_pull_does_not_overwrite_an_existing_folder(hub, folder, capsys):
    artifact.push(folder, REPO)
    before = content(folder)
    assert "overwrites nothing" in error_of(capsys, "pull", REPO, "--to", folder)
    assert content(folder) == before


def test_a_card_rejected_by_the_hub_stops_the_push(hub, folder, recipe, capsys):
    error_text = error_of(
        capsys, "push", "--config", recipe, "--repo", REPO, "--license", "My Own Licence"
    )
    assert '"license" must be one of' in error_text
    assert set(hub.repos[REPO].at("main")) == {".gitattributes"}
