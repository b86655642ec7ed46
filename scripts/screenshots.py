"""Takes the pictures of report pages in `docs/images/`.

    python scripts/screenshots.py                  # all pages, about three minutes on two cores
    python scripts/screenshots.py star             # one of them

Every picture comes from a small run of the embedded model with fixed seeds. Chromium and chromedriver must
be on the PATH (`scripts/install_chromium.sh`), and selenium must be installed (extra `test`).
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
LARGEST = 300_000
"""Size limit of one picture in bytes."""

SUMS = [
    "--task-options.digits", "3", "--task-options.train", "60", "--task-options.test", "60",
    "--per-device-train-batch-size", "16", "--seed-samples", "8", "--temperature", "1.0",
]  # fmt: skip
SHORTER_PATHS = """
const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (texts.nextNode()) {
    const text = texts.currentNode;
    text.nodeValue = text.nodeValue.replaceAll(arguments[0], '');
}
"""


class Shot(NamedTuple):
    """One picture: the command of the run, the page it writes, and the part of the page that is shown."""

    command: tuple[str, ...]
    page: str
    height: int
    """Of the picture, in pixels."""
    scroll_to: str | None = None
    """CSS selector of the element at the top of the picture; None: the start of the page."""


SHOTS = {
    "star": Shot(("star", "--iterations", "2"), "report.html", 1190),
    "rft": Shot(("rft", *SUMS, "--k", "1", "2", "4", "--max-steps", "30"), "report.html", 960),
    "vstar": Shot(
        ("vstar", *SUMS, "--iterations", "2", "--k", "4", "--candidates", "8", "--max-steps", "30",
         "--verifier-max-steps", "10"),
        "report.html", 1100,
    ),
    "steps": Shot(
        ("step-dpo", *SUMS, "--n", "6", "--wrong-per-problem", "3", "--best-of", "3",
         "--repeats", "2", "--max-steps", "30", "--dpo-max-steps", "10"),
        "steps.html", 505, scroll_to="#problem-3",
    ),
}  # fmt: skip
NAMES = {name: f"{name}_report.png" for name in SHOTS} | {"steps": "steps_page.png"}


def run(shot: Shot, folder: Path) -> Path:
    """Run the command of a picture and return the page that it wrote."""
    out = folder / shot.command[0]
    command = [sys.executable, "-m", "selftaught.cli", *shot.command, "--out", str(out)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode not in (0, 3):
        raise SystemExit(f"{' '.join(shot.command)} failed:\n{done.stderr[-3000:]}")
    return out / shot.page


def browser() -> Any:
    """Start headless Chromium."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        raise SystemExit("Needs chromium and chromedriver: sh scripts/install_chromium.sh")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for one in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                "--hide-scrollbars"):  # fmt: skip
        options.add_argument(one)
    return webdriver.Chrome(options=options, service=Service(driver))


def take(driver: Any, page: Path, shot: Shot, picture: Path) -> None:
    """Take a picture of a part of a page, 1,000 pixels wide, with paths relative to the repository."""
    metrics = {"width": 1000, "height": shot.height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    driver.get(page.as_uri())
    driver.execute_script(SHORTER_PATHS, f"{ROOT}/")
    if shot.scroll_to:
        scroll = "document.querySelector(arguments[0]).scrollIntoView({behavior: 'instant'})"
        driver.execute_script(scroll, shot.scroll_to)
    driver.save_screenshot(str(picture))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pages", nargs="*", help="default: " + ", ".join(SHOTS))
    parser.add_argument("--keep", type=Path, help="keep the runs in this folder")
    asked = parser.parse_args()
    if unknown := set(asked.pages) - set(SHOTS):
        parser.error(f"unknown page {sorted(unknown)[0]}; known: {', '.join(SHOTS)}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    IMAGES.mkdir(parents=True, exist_ok=True)
    driver = browser()
    try:
        with tempfile.TemporaryDirectory() as temporary:
            folder = asked.keep or Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            for name in asked.pages or SHOTS:
                picture = IMAGES / NAMES[name]
                take(driver, run(SHOTS[name], folder), SHOTS[name], picture)
                size = picture.stat().st_size
                if size > LARGEST:
                    raise SystemExit(f"{picture} has {size:,} bytes, more than {LARGEST:,}")
                print(f"{picture}: {size:,} bytes", flush=True)
    finally:
        driver.quit()
    return 0


if __name__ == "__main__":
    sys.exit(main())
