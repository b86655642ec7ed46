"""Talking to a model: in a browser, and in the terminal."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import running

from selftaught.reports.chat_page import chat_page


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no chromium and chromedriver here; scripts/install_chromium.sh installs them")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for one in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(one)
    opened = webdriver.Chrome(options=options, service=Service(driver))
    yield opened
    opened.quit()


def sent(browser: Any, text: str, answers: int) -> Any:
    """Send a message and return the item of the answer when it is complete."""
    from selenium.webdriver.common.by import By

    browser.find_element(By.ID, "box").send_keys(text)
    browser.execute_script("document.getElementById('send').click()")
    end = time.monotonic() + 30
    while time.monotonic() < end:
        items = browser.find_elements(By.CSS_SELECTOR, "#talk li")
        if len(items) == 2 * answers and browser.find_element(By.ID, "send").is_enabled():
            return items[-1]
        time.sleep(0.05)
    raise AssertionError(browser.page_source)


def test_the_page_shows_the_answer_with_folded_thoughts_and_gains(
    browser: Any, quiet_model_dir: Path
):
    from selenium.webdriver.common.by import By

    page = chat_page("m", chat=True, one_turn=False, thoughts="shown", tokens=6, key=True)
    with running(
        quiet_model_dir, thoughts="shown", app_options={"page": page, "api_key": "k3y"}
    ) as one:
        browser.get(one.url)
        refused = sent(browser, "Hello", 1)
        assert "Authorization: Bearer KEY" in refused.text
        browser.find_element(By.ID, "key").send_keys("k3y")
        browser.execute_script("document.getElementById('clear').click()")
        temperature = browser.find_element(By.ID, "temperature")
        temperature.clear()
        temperature.send_keys("0")
        answer = sent(browser, "<b>How many</b> apples?", 1)
        whole = one.post(
            "/v1/chat/completions",
            {"model": "m", "messages": [{"role": "user", "content": "<b>How many</b> apples?"}],
             "max_tokens": 6, "temperature": 0},
            authorization="Bearer k3y",
        )[1]["choices"][0]["message"]  # fmt: skip
        question = browser.find_elements(By.CSS_SELECTOR, "#talk li")[0]
        assert question.find_element(By.CLASS_NAME, "said").text == "<b>How many</b> apples?"
        said = answer.find_elements(By.CSS_SELECTOR, ":scope > .said")[0]
        assert said.get_property("textContent") == whole["content"]
        boxes = answer.find_elements(By.TAG_NAME, "details")
        assert [box.get_property("open") for box in boxes] == [False, False]
        thoughts = boxes[0].find_element(By.CLASS_NAME, "said")
        assert not thoughts.is_displayed()
        assert thoughts.get_property("textContent") == whole["reasoning_content"]
        browser.execute_script("arguments[0].open = true", boxes[1])
        rows = boxes[1].find_elements(By.TAG_NAME, "tr")[1:]
        gains = [row.find_elements(By.TAG_NAME, "td")[1].text for row in rows]
        assert gains == [
            f"{one['gain']:+.3f}".replace("-", "\u2212") for one in whole["hidden_thoughts"]
        ]
        sent(browser, "And?", 2)
        broken = [row for row in browser.get_log("browser") if row["level"] == "SEVERE" and "401" not in row["message"] and "favicon" not in row["message"]]  # fmt: skip
        assert not broken
        if folder := os.environ.get("SELFTAUGHT_SCREENSHOTS"):
            browser.execute_script("arguments[0].open = true", boxes[0])
            browser.set_window_size(1000, 1200)
            browser.save_screenshot(str(Path(folder) / "chat.png"))


def talked(model: Path, lines: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "selftaught.cli", "chat", "--model", str(model), "--temperature", "0", *options]  # fmt: skip
    return subprocess.run(command, input=lines, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_a_conversation_in_the_terminal(quiet_model_dir: Path):
    lines = "/thoughts\nHow many?\n/thoughts\nAnd?\n/zzz\n/new\nHow many?\n/quit\nnever read\n"
    done = talked(quiet_model_dir, lines, "--max-tokens", "5")
    assert done.returncode == 0, done.stderr
    assert "The last answer has no thoughts." in done.stdout
    assert done.stdout.count("15 tokens of thoughts: /thoughts; cut at --max-tokens") == 3
    assert done.stdout.count(" nats  ") == 5
    assert "Unknown command /zzz" in done.stdout
    with running(quiet_model_dir) as one:
        first = [{"role": "user", "content": "How many?"}]
        answer = one.chat(first, max_tokens=5, temperature=0)["choices"][0]["message"]["content"]
        more = [
            *first,
            {"role": "assistant", "content": answer},
            {"role": "user", "content": "And?"},
        ]
        second = one.chat(more, max_tokens=5, temperature=0)["choices"][0]["message"]["content"]
    from selftaught.printable import printable

    assert done.stdout.count(printable(answer)) >= 2  # again after /new
    assert printable(second) in done.stdout
