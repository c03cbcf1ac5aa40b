"""A mistyped model id is reported at once, and an unreachable Hub is not contacted again."""

import os
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from lspade_train.errors import UnsupportedModelError
from lspade_train.io.hub_names import is_hub_id, near_model, settle_hub

SILENT = "http://127.0.0.1:9"  # nothing listens there


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Sets the Hub's answer and returns the requested paths. An empty cache, no token."""
    asked, status = [], [200]

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            self.send_response(status[0])
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name in ("HF_TOKEN", "HF_HUB_CACHE", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "")  # restored after the test, whatever it sets
    monkeypatch.chdir(tmp_path)

    def answers(code):
        status[0] = code
        return asked

    yield answers
    server.shutdown()
    server.server_close()


def test_an_existing_id_is_left_to_the_hub_client(hub):
    asked = hub(200)
    settle_hub("org/name", None)
    assert asked == ["/api/models/org/name"]
    assert not os.environ["HF_HUB_OFFLINE"]


@pytest.mark.parametrize("code", [404, 401])
def test_an_unknown_id_is_rejected_with_a_suggestion(hub, code, tmp_path):
    hub(code)
    (tmp_path / "hf/hub/models--org--model").mkdir(parents=True)
    with pytest.raises(
        UnsupportedModelError, match=r"can read; did you mean org/model\?"
    ) as caught:
        settle_hub("org/modle", None)
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("name", ["My Models/llama", "modèles/llama"])
def test_the_path_of_a_local_model_is_not_sent_to_the_hub(hub, name, tmp_path):
    asked = hub(200)
    (tmp_path / name).mkdir(parents=True)
    settle_hub(str(tmp_path / name), None)
    assert not any("llama" in path for path in asked)
    assert not os.environ["HF_HUB_OFFLINE"]


def test_with_a_token_the_lookup_is_left_to_the_hub_client(hub, monkeypatch):
    hub(401)
    monkeypatch.setenv("HF_TOKEN", "secret")
    settle_hub("org/private", None)


def test_an_unreachable_hub_is_not_contacted_again(hub, monkeypatch, tmp_path, caplog):
    (tmp_path / "hf/hub/models--org--name").mkdir(parents=True)
    monkeypatch.setenv("HF_ENDPOINT", SILENT)
    settle_hub("org/name", None)
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert "The Hub cannot be reached (Connection refused)" in caplog.text


def test_a_model_not_found_locally_is_rejected_when_offline(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", SILENT)
    with pytest.raises(UnsupportedModelError, match=r"out of reach \(Connection refused\)\.\n"):
        settle_hub("org/name", None)


@pytest.mark.parametrize(
    "name", ["./models/none", "a/b/c/d", "org//name", "org/na me", "modèle", "org/a--b", "org/a."]
)
def test_an_invalid_id_is_rejected_without_a_request(hub, name):
    asked = hub(404)
    with pytest.raises(UnsupportedModelError, match="no id that the Hub could have.\nCheck PATH."):
        settle_hub(name, None, key="PATH")
    assert asked == []


@pytest.mark.parametrize("name", ["gpt2", "org/name", "Qwen/Qwen2.5-0.5B_x", "0x/a-b"])
def test_a_valid_id_is_recognised(name):
    assert is_hub_id(name)


def test_an_invalid_dataset_id_is_left_to_the_task_without_a_request(hub, tmp_path):
    asked = hub(404)
    settle_hub(str(tmp_path), "no such/data set")  # the task reports what is wrong
    assert asked == []


def test_no_request_is_made_for_a_local_model_and_local_data(hub, tmp_path):
    asked = hub(404)
    settle_hub(str(tmp_path), str(tmp_path))
    assert asked == []


def test_a_similar_folder_name_is_suggested(hub, tmp_path):
    (tmp_path / "models/smollm2").mkdir(parents=True)
    (tmp_path / "models/smollm2/config.json").write_text("{}")
    assert near_model("models/smolm2") == "; did you mean models/smollm2?"
    assert near_model(str(Path("models/xyz"))) == "."
