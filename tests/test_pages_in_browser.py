"""Every kind of page in a real browser: contrast, width on a telephone, and marks that are not only colors."""

import json
import math
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_report import RIGHT, SUMS, Page, fake_run, graded, with_shared_problems
from test_step_pages import all_drawn, valued, written

from selftaught.evaluation.evaluator import evaluation_from
from selftaught.quiet.evaluation import Measured
from selftaught.quiet.explore import Explored
from selftaught.quiet.legibility import Legibility
from selftaught.records import write_jsonl
from selftaught.reports import comparison_page, rft_page, star_page, step_dpo_page, vstar_page
from selftaught.reports.quiet_page import explorer_page, training_page

LONG = "/data/a-long-folder-name-without-any-break/" + "x" * 60 + "/model"
Row = dict[str, Any]


# One page of every kind, from scripted numbers


def method_folder(folder: Path, rows: list[Row]) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"task": "arithmetic", "model": LONG, "training": {"learning_rate": 1e-3}}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    versions = {
        "packages": {"torch": "2.13.0+cpu.cxx11.abi"},
        "command": "selftaught rft --model " + LONG,
    }
    (folder / "versions.json").write_text(json.dumps(versions))
    return folder


def trained(name: str, by_group: tuple[int, ...], /, **more: Any) -> Row:
    measured = evaluation_from(
        graded(random.Random(1), by_group, model=LONG), SUMS, name=f"test, {name}"
    )
    training = {"steps": 30, "trained on": 1234, "tokens": 56789, "loss": 0.3}
    seconds = {"sample": 12.0, "grade": 0.2, "train": 99.0, "evaluate": 4.0}
    return {
        "name": name,
        "model": LONG,
        "test": measured.to_dict(),
        "training": training,
        "seconds": seconds,
        **more,
    }


def choice_row(name: str, up: float) -> Row:
    draw = random.Random(name)
    rules = {"sample": 0.4, "pass": 0.8, "majority": 0.5, "best": 0.6, "weighted": 0.55}
    values = {
        rule: {str(k): [float(draw.random() < share + up * math.log2(k) / 10) for _ in range(50)] for k in (1, 2, 4, 8)}
        for rule, share in rules.items()
    }  # fmt: skip
    return {"name": f"choices: {name}", "choices": values, "seconds": {"evaluate": 3.0}}


def compared(name: str, right: tuple[int, ...]) -> Row:
    points = {"1": (0.3, 0.2, 0.4), "4": (0.5, 0.4, 0.6)}
    rules = dict.fromkeys(("majority", "best", "pass"), points)
    return trained(name, right, choices=rules, minutes=3.0, budget=1000, **{
        "sampled tokens": 2000, "trained tokens": 3000, "last steps": 3,
        "settings": {"k": [1, 2, 4], "temperature": 0.7, "model": LONG},
    })  # fmt: skip


MEASURED = Measured(
    tokens=4000, texts=20, nll_without=1.234, nll_with=1.2, gain=0.034, gain_low=0.01, gain_high=0.05,
    weight=0.2, thinking=0.9, helped=0.4, hurt=0.2, gain_by_decile=[-0.01, 0, 0, 0, 0, 0.01, 0.02, 0.05, 0.1, 0.2],
    legibility=Legibility(4000, (2.5, 2.3, 2.7), (0.3, 0.2, 0.4), (0.1, 0.05, 0.15), None, (0.9, 0.8, 1.0)),
)  # fmt: skip


def explored(text: str) -> list[Explored]:
    draw = random.Random(3)
    tokens = []
    for at, one in enumerate(text):
        gain = (-1.4, -1.0, -0.4, 0.0, 0.4, 1.0, 1.4)[at % 7]
        top = [(f"{one}{'w' * 40}", 0.6), (one, 0.3), ("z", draw.random() / 10)]
        tokens.append(Explored(one * 3, 0.3, 0.5, gain, [gain, -gain], [0.5, 0.2], ["a thought", "another"],
                               at % 5 != 0, top, top))  # fmt: skip
    return tokens


def quiet_log() -> list[dict[str, float]]:
    names = ("nll_without", "nll_with", "reward", "positive_advantages", "mixing_weight",
             "thought_entropy", "thought_base_nll", "thought_kl", "repeated_tokens", "distinct_thoughts",
             "distinct_in_text", "gain_decile_10", "gain_decile_1", "tokens_per_second")  # fmt: skip
    return [
        {"step": step} | {name: 1 / step + at for at, name in enumerate(names)}
        for step in range(1, 40)
    ]


def star(folder: Path, **options: Any) -> Path:
    return star_page.report(with_shared_problems(fake_run(folder / "star", **options)))


def rft(folder: Path) -> Path:
    counts = {"right per problem": 1.5, "distinct per problem": 1.25, "kept per problem": 1.0}
    rows = [trained("SFT", RIGHT[0])]
    rows += [trained(f"RFT, k={k}", RIGHT[at], k=k, **counts) for at, k in enumerate((1, 2, 4))]
    return rft_page.report(method_folder(folder / "rft", rows))


def vstar(folder: Path) -> Path:
    rows = [trained(f"iteration-{n}", RIGHT[n], sampled=400, right=200) for n in (1, 2)]
    names = ["V-STaR", "outcome reward model", "one iteration (RFT + verifier)"]
    names += [f"V-STaR[{g}] with V-STaR verifier {v}" for g in (1, 2) for v in (1, 2)]
    rows += [choice_row(name, 0.3) for name in names]
    return vstar_page.report(method_folder(folder / "vstar", rows))


def step_dpo(folder: Path) -> Path:
    rows = []
    for size in (16, 32, 64):
        for at, method in enumerate(step_dpo_page.NAMES):
            rows.append(
                trained(
                    f"{method}, {size}",
                    RIGHT[at % 4],
                    size=size,
                    method=method,
                    **{"sampled tokens": 999},
                )
            )
            held_out = graded(random.Random(1), RIGHT[at % 4], model="m")
            write_jsonl(folder / "dpo" / f"size-{size}" / method / "test.graded.jsonl", held_out)
    written_at = folder / "dpo"
    shutil.move(written_at, folder / "graded")
    method_folder(folder / "dpo", rows)
    shutil.copytree(folder / "graded", written_at, dirs_exist_ok=True)
    (written_at / "steps.html").write_text("")
    return step_dpo_page.report(written_at)


def steps(folder: Path) -> Path:
    several = [
        valued(),
        valued("p" * 200, ["a\n", "b\n"], [2, 4, 8]),
        valued("plums", ["a" * 90, "\nb\n", "c\n"], [8, 2, 2, 0]),
    ]
    folder.mkdir(parents=True)
    return written(folder, several, all_drawn(several), title="Steps of a run")


def comparison(folder: Path) -> Path:
    rows = [compared(name, RIGHT[at]) for at, name in enumerate(("SFT", "STaR", "RFT", "V-STaR"))]
    return comparison_page.report(method_folder(folder / "comparison", rows))


def several_runs(folder: Path) -> Path:
    runs = [
        fake_run(folder / name, seed=at, rate=1e-3 / (at + 1))
        for at, name in enumerate(("one", "y" * 70, "three"))
    ]
    unfinished = fake_run(folder / "unfinished", iterations=1, ended=False)
    return star_page.compare_runs([*runs, unfinished], folder / "compare.html")


def quiet(folder: Path) -> Path:
    folder.mkdir(parents=True)
    settings = {"model": LONG, "thought_tokens": 8, "texts": ["a" * 120, "b"]}
    return training_page(folder, quiet_log(), settings, MEASURED, MEASURED)


def explorer(folder: Path) -> Path:
    return explorer_page(
        folder / "explore.html", "text.txt", "Q", explored("Three apples\nand more."), MEASURED
    )


PAGES: dict[str, Callable[[Path], Path]] = {
    "STaR": star,
    "STaR, still running": lambda folder: star(folder, iterations=2, ended=False),
    "RFT": rft, "V-STaR": vstar, "step DPO": step_dpo, "steps": steps, "comparison": comparison,
    "several runs": several_runs, "Quiet-STaR": quiet, "explorer": explorer,
}  # fmt: skip


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    return {name: make(folder / str(at)) for at, (name, make) in enumerate(PAGES.items())}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no chromium and chromedriver here; scripts/install_chromium.sh installs them")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for one in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(one)
    opened = webdriver.Chrome(options=options, service=Service(driver))
    opened.set_script_timeout(60)
    yield opened
    opened.quit()


def open_page(browser: Any, path: Path, *, scheme: str = "light", width: int = 1200) -> None:
    scheme_feature = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme_feature})
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(path.as_uri())
    opens = "for (const one of document.querySelectorAll('details')) one.open = true"
    browser.execute_script(opens)


# Contrast, by WCAG 2.2


def luminance(color: tuple[float, float, float]) -> float:
    """Relative luminance of a color with channels from 0 to 255 (WCAG 2.2, section 5)."""
    parts = [channel / 255 for channel in color]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: tuple[float, float, float], other: tuple[float, float, float]) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_the_contrast_of_known_colors():
    """Values of the WebAIM contrast checker: #767676 is the lightest gray on white with 4.5."""
    white = (255, 255, 255)
    assert contrast(white, (0, 0, 0)) == pytest.approx(21)
    assert contrast(white, (0x76, 0x76, 0x76)) == pytest.approx(4.54, abs=0.005)
    assert contrast((0x77, 0x77, 0x77), white) == pytest.approx(4.48, abs=0.005)
    assert contrast(white, white) == 1


TEXTS = r"""
const canvas = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
const cache = new Map();
function rgba(css) {  // any color syntax of CSS, as four numbers
  if (!cache.has(css)) {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = '#000';
    canvas.fillStyle = css;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    cache.set(css, [r, g, b, a / 255]);
  }
  return cache.get(css);
}
const over = ([r, g, b, a], under) => [r, g, b].map((c, i) => c * a + under[i] * (1 - a));
function grounds(element) {  // colors behind the text; several where there is a gradient
  let layers = [];
  for (let e = element; e; e = e.parentElement) layers.unshift(e);
  const canvasColor = matchMedia('(prefers-color-scheme: dark)').matches ? [18, 18, 18] : [255, 255, 255];
  let found = [canvasColor];
  for (const e of layers) {
    const style = getComputedStyle(e);
    found = found.map(under => over(rgba(style.backgroundColor), under));
    const stops = style.backgroundImage.match(/(?:rgba?|color|oklab|oklch)\([^()]*\)/g) ?? [];
    if (stops.length) found = found.flatMap(under => [under, ...stops.map(stop => over(rgba(stop), under))]);
  }
  return found;
}
const opacity = element => {
  let product = 1;
  for (let e = element; e; e = e.parentElement) product *= Number(getComputedStyle(e).opacity);
  return product;
};
const found = [];
function judge(element, text, style) {
  const color = element.closest('svg') ? style.fill : style.color;
  const [r, g, b, a] = rgba(color);
  found.push({
    text: text.trim().slice(0, 40),
    tag: element.tagName + (element.getAttribute('class') ? '.' + element.getAttribute('class') : ''),
    size: parseFloat(style.fontSize), weight: Number(style.fontWeight),
    marker: element.matches('.legend [aria-hidden]'),
    pairs: grounds(element).map(ground => [over([r, g, b, a * opacity(element)], ground), ground]),
  });
}
const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (texts.nextNode()) {
  const element = texts.currentNode.parentElement;
  if (!texts.currentNode.nodeValue.trim() || ['SCRIPT', 'STYLE', 'OPTION'].includes(element.tagName)) continue;
  const range = document.createRange();
  range.selectNodeContents(texts.currentNode);
  const box = range.getBoundingClientRect();
  const style = getComputedStyle(element);
  if (box.width < 2 || box.height < 2 || style.visibility === 'hidden' || element.closest('.sr')) continue;
  judge(element, texts.currentNode.nodeValue, style);
}
for (const element of document.querySelectorAll('*')) {
  for (const pseudo of ['::before', '::after']) {
    const style = getComputedStyle(element, pseudo);
    const text = style.content.match(/^"([^"]*[^\s"][^"]*)"/);
    if (text && element.getClientRects().length) judge(element, pseudo + text[1], style);
  }
}
for (const element of document.querySelectorAll('select')) judge(element, 'options', getComputedStyle(element));
return found;
"""


def asked(text: Row) -> float:
    """Contrast that WCAG 2.2 asks for: 3 for large text (24 px, or 18.66 px in bold), else 4.5.

    The markers of lines in a legend are graphical objects, for which it asks for 3 (1.4.11).
    """
    if text["marker"]:
        return 3.0
    return 3.0 if text["size"] >= 24 or (text["size"] >= 18.66 and text["weight"] >= 700) else 4.5


def too_faint(browser: Any) -> tuple[int, list[str]]:
    """Number of texts on the open page, and those with less contrast than WCAG 2.2 asks for."""
    texts, faint = browser.execute_script(TEXTS), []
    for text in texts:
        least = min(contrast(tuple(ink), tuple(ground)) for ink, ground in text["pairs"])
        if least < asked(text):
            faint.append(f"{text['tag']} {text['text']!r}: {least:.2f}")
    return len(texts), sorted(set(faint))


@pytest.mark.slow
def test_the_measurement_finds_what_is_too_faint(browser: Any, tmp_path: Path):
    """Grays on white with known contrast, alpha and opacity, a gradient, and text of a plot."""
    page = tmp_path / "grays.html"
    page.write_text(
        "<meta name='color-scheme' content='light dark'><style>:root { color-scheme: light dark; }"
        ".mark::after { content: 'marked'; color: #999 }</style><body style='background:#fff'>"
        "<p style='color:#767676'>enough</p><p style='color:#777'>gray</p>"
        "<p style='color:#777;font-size:24px'>large</p><p style='color:#000;opacity:.3'>pale</p>"
        "<p style='color:rgb(0 0 0 / .3)'>thin</p><p style='color:#fff;display:none'>hidden</p>"
        "<div style='background:rgb(0 0 0 / .5)'><p style='color:#333'>on gray</p></div>"
        "<p style='color:#000;background:linear-gradient(90deg, #fff, #222)'>gradient</p>"
        "<p class=mark style='color:#000'>good</p>"
        "<svg width=200 height=40><text y=20 fill='#aaa' style='font-size:12px'>plot</text></svg>"
    )
    open_page(browser, page)
    count, faint = too_faint(browser)
    words = [one.split("'")[1] for one in faint]
    assert sorted(words) == ["::aftermarked", "gradient", "gray", "on gray", "pale", "plot", "thin"]
    assert count == 10
    assert "P 'gray': 4.48" in faint


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_every_text_has_the_contrast_that_wcag_asks_for(
    browser: Any, pages: dict[str, Path], name: str, scheme: str
):
    open_page(browser, pages[name], scheme=scheme)
    count, faint = too_faint(browser)
    assert count > 40
    assert faint == []


# Width


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_no_page_is_wider_than_a_telephone(browser: Any, pages: dict[str, Path], name: str):
    open_page(browser, pages[name], width=360)
    inner, wide = browser.execute_script(
        "return [innerWidth, document.scrollingElement.scrollWidth]"
    )
    assert inner == 360
    assert wide <= inner


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_wide_tables_scroll_in_their_own_box_and_prose_wraps(
    browser: Any, pages: dict[str, Path], name: str
):
    """Every table that is wider than the text is in a box that scrolls and takes the keyboard focus."""
    open_page(browser, pages[name], width=360)
    outside = browser.execute_script(
        "return [...document.querySelectorAll('table')].filter(table => {"
        "  const right = table.getBoundingClientRect().right, box = table.closest('.scroll');"
        "  return right > innerWidth && !(box && box.tabIndex === 0 && box.ariaLabel);"
        "}).map(table => table.textContent.slice(0, 40))"
    )
    assert outside == []
    cells = browser.execute_script(
        "return [...document.querySelectorAll('td.text:not([colspan]), tbody th')].map("
        "  one => [one.textContent.slice(0, 40), one.getBoundingClientRect().width, one.scrollWidth])"
    )
    assert all(width <= 328 and inner <= width + 1 for _, width, inner in cells), [
        cell for cell in cells if cell[1] > 328 or cell[2] > cell[1] + 1
    ]


# Marks that are not only colors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "marked"),
    [("STaR", [["3", "best"]] * 2), ("STaR, still running", [["2", "best"]] * 2),
     ("comparison", [["V-STaR", "best"]])],
)  # fmt: skip
def test_the_best_row_says_so_in_words(
    browser: Any, pages: dict[str, Path], name: str, marked: list[list[str]]
):
    """The name of the row for screen readers, from the accessibility tree, ends with "best"."""
    open_page(browser, pages[name])
    tree = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    heads = [
        one["name"]["value"] for one in tree if one.get("role", {}).get("value") == "rowheader"
    ]
    assert [
        head.split() for head in heads if head.endswith(" best") and "test" not in head
    ] == marked
    assert browser.execute_script("return document.body.innerText").count("★ best") == len(marked)


@pytest.mark.slow
def test_the_title_of_a_token_is_the_gain_of_the_picked_thought(
    browser: Any, pages: dict[str, Path]
):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select

    open_page(browser, pages["explorer"])
    token = browser.find_elements(By.CSS_SELECTOR, ".token")[0]
    assert token.get_attribute("title") == "-1.400 nats"
    Select(browser.find_element(By.ID, "pick")).select_by_value("1")  # the second thought: 1.4
    assert token.get_attribute("title") == "+1.400 nats"


def test_a_gain_on_a_single_text_has_no_interval(tmp_path: Path):
    """The interval is over texts; that of one text is not a number."""
    one = replace(MEASURED, texts=1, gain_low=math.nan, gain_high=math.nan)
    page = Page(training_page(tmp_path, quiet_log(), {}, one, one).read_text(encoding="utf-8"))
    assert "nan" not in page.text
    assert "gain +0.0340" in page.text and "an interval needs several texts" in page.text
    several = Page(training_page(tmp_path, [], {}, MEASURED, MEASURED).read_text(encoding="utf-8"))
    assert "gain +0.0340 [0.0100, 0.0500]" in several.text and "clustered by text" in several.text
