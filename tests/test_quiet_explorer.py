"""The thought explorer, in a real browser where there is one."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from narrowed import tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from selftaught.cli import main
from selftaught.quiet.checkpoint import make_quiet, save_quiet
from selftaught.quiet.config import QuietConfig

HOSTILE = "Q: <script>alert(1)</script> </script><b>\n'\"&amp; {{ 7 * 7 }}\nA: 19"


@pytest.fixture(scope="module")
def folder(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model = make_quiet(base, tokenizer, QuietConfig(thought_tokens=3, initial_text="A"))
    torch.nn.init.normal_(tensor(model.mixing.layers[-1].weight), std=0.3)
    out = tmp_path_factory.mktemp("quiet")
    save_quiet(model, tokenizer, out)
    return out


@pytest.fixture(scope="module")
def page(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("page")
    (where / "text.txt").write_text(HOSTILE, encoding="utf-8")
    out = where / "thoughts.html"
    assert main(["quiet", "explore", "--model", str(folder), "--text", str(where / "text.txt"),
                 "--thoughts", "2", "--thought_temperature", "1", "--out", str(out)]) == 0  # fmt: skip
    return out


def test_the_page_is_one_file_with_nothing_of_the_text_as_markup(page: Path):
    html = page.read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", html)
    assert "<script>alert" not in html
    assert html.count("<script") == 2  # the data and the one script
    data = json.loads(html.split('id="data">')[1].split("</script>")[0])
    assert "".join(token["next"] for token in data) == HOSTILE[1:]
    assert all(len(token["thoughts"]) == 2 for token in data)


@pytest.fixture(scope="module")
def browser(page: Path) -> Iterator[Any]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no chromium and chromedriver here; scripts/install_chromium.sh installs them")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for one in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1200,900"):  # fmt: skip
        options.add_argument(one)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=Service(driver))
    opened.get(page.as_uri())
    yield opened
    opened.quit()


@pytest.mark.slow
def test_pointing_at_a_token_shows_its_thoughts_and_keys_walk(browser: Any, page: Path):
    from selenium.webdriver import ActionChains, Keys
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select

    html = page.read_text(encoding="utf-8")
    data = json.loads(html.split('id="data">')[1].split("</script>")[0])
    tokens = browser.find_elements(By.CSS_SELECTOR, ".token")
    assert len(tokens) == len(data) > 20
    panel = browser.find_element(By.ID, "panel")

    def shown() -> list[str]:
        return [one.get_property("textContent") for one in panel.find_elements(By.TAG_NAME, "pre")]

    assert shown() == data[0]["thoughts"]
    ActionChains(browser).move_to_element(tokens[9]).perform()
    assert shown() == data[9]["thoughts"]
    assert f"{100 * data[9]['without']:.1f}% without" in panel.text
    tokens[9].click()
    ActionChains(browser).move_to_element(tokens[2]).perform()
    assert shown() == data[9]["thoughts"]  # held
    ActionChains(browser).send_keys(Keys.ARROW_RIGHT).perform()
    assert shown() == data[10]["thoughts"]
    ActionChains(browser).send_keys(Keys.HOME).perform()
    assert shown() == data[0]["thoughts"]
    Select(browser.find_element(By.ID, "pick")).select_by_value("1")
    assert shown() == data[0]["thoughts"][1:2]
    colour = tokens[9].value_of_css_property("background-color")
    assert colour not in ("", "rgba(0, 0, 0, 0)") or abs(data[9]["gains"][1]) < 1e-3
    assert browser.find_element(By.CSS_SELECTOR, ".scale").is_displayed()
    assert browser.get_log("browser") == []
