"""The page in Chromium: what a reader does with it, by keyboard too, on a phone, and that nothing leaves the file."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.report import report
from tests.benchmarks.page.test_page import HOSTILE
from tests.benchmarks.page.test_pictures import draw
from tests.benchmarks.page.test_plots import suite
from tests.fixtures import ROOT
from tests.fixtures.records import CHECKPOINT, broken, made, official, ok
from transfer.run import write_record

sync_playwright = pytest.importorskip("playwright.sync_api").sync_playwright
Axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe
CHROMIUM = shutil.which("chromium")
PATIENCE = 300_000  # ms, for what takes a moment where nothing is wrong
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="there is no chromium")]


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=PATIENCE)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three checkpoints, two recipes, official and other data, what failed, curves, a picture, hostile names."""
    out = tmp_path_factory.mktemp("results")
    records = [*suite("a"), *suite("b", better=3.0), *map(official, suite("a"))]
    records += [replace(record, recipe_name=HOSTILE[0]) for record in suite(HOSTILE[1])]
    records += [broken("imagenet_a", "failed", HOSTILE[0]), broken("imagenet_r", "skipped", "no data")]
    for i, record in enumerate(records):
        write_record(record, out / "runs" / str(i))
        (out / "runs" / str(i) / "log.jsonl").write_text('{"epoch": 0, "loss": 2}\n{"epoch": 1, "loss": 1}\n')
    draw(out / "reconstruction.png", 200, 90)
    report(out)
    return out


@pytest.fixture
def load(chromium):
    """Open a folder's page; afterwards: nothing was asked of any network, and the console is empty."""
    contexts, trouble = [], []

    def open_page(out: Path, **options):
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        page = context.new_page()
        url = (out / "index.html").as_uri()

        def only_itself(route):
            if route.request.url.partition("#")[0] == url:
                return route.continue_()
            trouble.append(route.request.url)
            return route.abort()

        context.route("**/*", only_itself)
        page.on("console", lambda message: trouble.append(message.text))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("dialog", lambda dialog: trouble.append(dialog.message))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert trouble == []


def unfold(page) -> None:
    page.evaluate("document.querySelectorAll('details').forEach(details => { details.open = true })")


def draw_all(page) -> None:
    """Look at the whole page at once, until every plot that is not filtered away has been drawn."""
    before = page.viewport_size
    page.set_viewport_size({**before, "height": page.evaluate("document.documentElement.scrollHeight")})
    # Asked again and again from here: Playwright's own waiting evaluates a text, which the page's policy forbids.
    while not page.evaluate(
        "[...document.querySelectorAll('.chart')].every(c => !c.clientWidth || c.matches('.drawn'))"
    ):
        page.wait_for_timeout(50)
    page.set_viewport_size(before)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_and_every_plot_is_drawn(load, folder, scheme):
    page = load(folder, color_scheme=scheme)
    draw_all(page)
    assert page.locator(".chart.drawn").count() == page.locator(".chart").count() > 20
    unfold(page)
    assert violations(page) == []
    page.locator(".number").first.click()
    page.wait_for_selector("#story[open]")
    assert violations(page) == []


def violations(page) -> list:
    found = Axe().run(page).response["violations"]
    return [(v["id"], node["html"], node.get("failureSummary")) for v in found for node in v["nodes"][:2]]


@pytest.mark.parametrize("width", [360, 768])
def test_a_phone_scrolls_only_down(load, folder, width):
    page = load(folder, viewport={"width": width, "height": 640})
    draw_all(page)
    unfold(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator(".number").first.click()
    box = page.locator("#story").bounding_box()
    assert 0 <= box["x"] <= box["x"] + box["width"] <= width
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def column(page, number: int) -> list[str]:
    cells = page.locator(".block table.sortable").first.locator(f"td:nth-child({number})")
    return [text.splitlines()[0] for text in cells.all_inner_texts()]


def test_a_column_is_sorted_by_keyboard(load, tmp_path):
    tops = {"a": 70.0, "b": 9.5, "c": 80.0}
    records = [replace(ok("imagenet_finetune", top1=v), checkpoint={**CHECKPOINT, "name": k}) for k, v in tops.items()]
    missing = replace(broken("imagenet_finetune", "failed", "x"), checkpoint={**CHECKPOINT, "name": "d"})
    page = load(made(tmp_path, missing, *records))
    header = page.get_by_role("columnheader", name="fine-tuning ↑").first
    assert header.get_attribute("aria-sort") == "none"
    header.get_by_role("button").focus()
    page.keyboard.press("Enter")
    assert column(page, 5) == ["80.00", "70.00", "9.50", "failed"]
    assert header.get_attribute("aria-sort") == "descending"
    page.keyboard.press("Space")
    assert column(page, 5) == ["9.50", "70.00", "80.00", "failed"]
    page.reload()
    assert column(page, 5) == ["9.50", "70.00", "80.00", "failed"]


def test_filters_by_recipe_and_data(load, folder):
    page = load(folder)
    blocks = page.locator(".block:visible h2")
    assert blocks.count() == 3
    page.get_by_role("combobox", name="Recipe").select_option("mini")
    assert blocks.all_inner_texts() == ["Recipe mini, miniature data"]
    page.get_by_role("combobox", name="Data").select_option("official data")
    assert blocks.count() == 0
    assert page.get_by_role("status").inner_text() == "No records of this recipe on these data."
    page.get_by_role("combobox", name="Recipe").select_option("paper")
    assert blocks.all_inner_texts() == ["Recipe paper, official data"]
    page.reload()
    assert blocks.all_inner_texts() == ["Recipe paper, official data"]
    page.get_by_role("combobox", name="Recipe").select_option(HOSTILE[0])
    page.get_by_role("combobox", name="Data").select_option("")
    assert blocks.all_inner_texts() == [f"Recipe {HOSTILE[0]}, miniature data"]


def test_a_story_opens_and_closes_by_keyboard(load, folder):
    page = load(folder)
    number = page.get_by_role("button", name="80.00").first
    number.focus()
    page.keyboard.press("Enter")
    story = page.get_by_role("dialog")
    assert "fine-tuning" in story.get_by_role("heading", level=2).inner_text()
    text = story.inner_text()
    for expected in ("ab" * 32, "vit_base_patch16", "fp32", "record.json", "f" * 64):
        assert expected in text
    page.keyboard.press("Escape")
    assert not story.is_visible()
    assert number.evaluate("e => e === document.activeElement")
    page.keyboard.press("Enter")
    story.get_by_role("button", name="Close").press("Enter")
    assert not story.is_visible()


def test_seeds_are_told_apart_where_they_differ(load, tmp_path):
    page = load(made(tmp_path, *(ok("imagenet_finetune", seed, top1=80.0 + seed) for seed in (0, 1))))
    page.get_by_role("button", name="80.50").first.click()
    rows = [row.inner_text().split("\t") for row in page.locator("#story tr").all()]
    assert ["top1, seed 0", "80.0000"] in rows
    assert ["top1, seed 1", "81.0000"] in rows
    assert ["arch", "vit_base_patch16"] in rows


def test_the_theme_follows_the_system_and_the_button(load, folder):
    page = load(folder, color_scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    button = page.get_by_role("button", name="Theme")
    button.press("Enter")
    assert button.inner_text() == "Theme: light"
    assert page.evaluate(ground) == "rgb(255, 255, 255)" != dark
    page.reload()
    assert page.evaluate(ground) == "rgb(255, 255, 255)"
    button.press("Enter")
    assert page.evaluate(ground) == dark


def test_it_looks_for_results_while_jobs_are_at_work(load, tmp_path):
    out = made(tmp_path, ok("imagenet_finetune", top1=80.0))
    report(out, going=True)
    page = load(out)
    page.clock.install()
    page.reload()
    write_record(ok("imagenet_linprobe", top1=55.5), out / "runs" / "b")
    report(out, going=True)
    page.get_by_role("button", name="Pause").press("Enter")
    page.evaluate("window.mark = true")
    page.clock.run_for(60_000)
    page.wait_for_timeout(500)
    assert page.evaluate("window.mark")  # it is the same page
    page.get_by_role("button", name="Pause").press("Enter")
    with page.expect_navigation():
        page.clock.run_for(31_000)
    assert page.get_by_text("55.50").count() > 0
    report(out)
    page.reload()
    page.clock.run_for(60_000)
    assert page.get_by_role("button", name="Pause").count() == 0


def test_the_committed_miniature(load, tmp_path):
    shutil.copytree(ROOT / "results" / "miniature", tmp_path / "mini")
    report(tmp_path / "mini")
    page = load(tmp_path / "mini")
    draw_all(page)
    assert page.get_by_role("button", name="74.94 ± 1.08").first.is_visible()
    assert violations(page) == []
