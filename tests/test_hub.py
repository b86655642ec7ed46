"""A name that cannot be reached fails at once and says what to do."""

import time

import pytest

from selftaught import hub
from selftaught.hub import check_data_set, check_model_name
from selftaught.tasks.rows import hub_rows


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch):
    """A hub that refuses connections: port 9 of this machine, where nothing listens."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    asked = hub._unreachable
    asked.cache_clear()
    yield
    asked.cache_clear()


def test_an_unreachable_model_fails_within_seconds_and_names_the_ways_out(monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(FileNotFoundError, match=r"no folder here.*hub.*get-model smollm2"):
        check_model_name("somebody/nothing-of-this-name")
    assert time.monotonic() - started < hub.SECONDS + 5


@pytest.mark.parametrize("path", ["/nowhere/model", "./model", "a/b/c", "~/model", "my model"])
def test_what_can_only_be_a_path_is_not_asked_of_the_hub(path, monkeypatch):
    monkeypatch.setattr(hub, "_unreachable", lambda *_: pytest.fail("the hub was asked"))
    with pytest.raises(FileNotFoundError, match="no model folder"):
        check_model_name(path)


def test_a_folder_and_a_cached_name_are_accepted_without_the_hub(tmp_path, monkeypatch):
    check_model_name(str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--a--b" / "snapshots").mkdir(parents=True)
    check_model_name("a/b")


def test_offline_mode_is_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE"):
        check_model_name("somebody/nothing-of-this-name")


def test_an_unreachable_data_set_fails_the_same_way():
    with pytest.raises(FileNotFoundError, match=r"no file here.*hub.*local copy"):
        check_data_set("somebody/nothing-of-this-name")
    with pytest.raises(FileNotFoundError, match="no file here"):
        hub_rows("somebody/nothing-of-this-name", None, "train")
