"""The page of app.py: its flags here, and in headless Chromium (slow) what a visitor does.

The slow tests need requirements-app.txt, `pip install playwright` and Debian's package chromium.
"""

import dataclasses
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from helpers import TINY_DIGITS, random_model, run_main
from launch import REPO
from PIL import Image
from test_pipeline import recipe_sources

import app
import convert
from checkpoint.state import save_safetensors
from common.errors import UserError
from models import DiTConfig

CONFIG = dataclasses.replace(TINY_DIGITS, depth=12, patch_size=2)
CONFIGS = {
    "tokens": CONFIG,
    "experts": dataclasses.replace(
        CONFIG,
        selection="expert_choice",
        balance=(),
        moe_blocks="every_second",
        unconditional_expert=True,
        num_experts_per_tok=1,
    ),
    "dense": dataclasses.replace(CONFIG, num_experts=0),
    "larger": dataclasses.replace(CONFIG, input_size=16),
}
NAMES = [f"digit {i}" for i in range(10)]
SECONDS = 240  # that a step of a test may take on a busy machine


def saved(path: Path, config: DiTConfig, objective: str = "rf") -> Path:
    settings = {"objective": objective, "vae_path": "none", "class_names": NAMES}
    save_safetensors(path, random_model(config, std=0.1).state_dict(), config, settings)
    return path


# ------------------------------------------------------------------------------ flags


def test_checkpoints_are_named_by_as_little_of_their_paths_as_tells_them_apart() -> None:
    names = app.names_of(["results/a", "other/a", "b.pt"])
    assert names == {"a": "results/a", "other/a": "other/a", "b.pt": "b.pt"}
    with pytest.raises(UserError, match="--ckpt a is there twice"):
        app.names_of(["a", "a"])


def test_the_page_is_for_this_machine_alone_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRADIO_SERVER_NAME", raising=False)
    assert app.build_parser().parse_args([]).host == "127.0.0.1"
    assert app.build_parser().parse_args(["--host", "0.0.0.0"]).host == "0.0.0.0"
    monkeypatch.setenv("GRADIO_SERVER_NAME", "0.0.0.0")  # as a Space says
    assert app.build_parser().parse_args([]).host == "0.0.0.0"


def test_what_is_missing_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs gradio: pip install -r requirements-app\.txt"):
        run_main(app, "--ckpt", "x")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(UserError, match="--ckpt: give a checkpoint"):
        run_main(app)


# ------------------------------------------------------------------------------ a browser


class Server(NamedTuple):
    """A page that is being served."""

    process: subprocess.Popen[str]
    url: str
    folder: Path  # where it runs; nothing is to be written there


def serve(script: Path, folder: Path, *flags: object) -> Server:
    """Start a page in an empty folder and wait until it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir()
    (folder / "tmp").mkdir()
    environment = {**os.environ, "TMPDIR": str(folder / "tmp")}
    command = [sys.executable, str(script), "--port", str(port), *map(str, flags)]
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    said = process.stdout.readline()
    assert said == f"open in a browser: http://127.0.0.1:{port}/\n"
    return Server(process, said.split(": ")[1].strip(), folder)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serve a page with a checkpoint of each kind."""
    pytest.importorskip("gradio")
    folder = tmp_path_factory.mktemp("page")
    ckpts = [saved(folder / f"{name}.safetensors", config) for name, config in CONFIGS.items()]
    started = serve(REPO / "app.py", folder / "cwd", "--dtype", "fp32", "--ckpt", *ckpts)
    yield started
    started.process.kill()
    started.process.wait()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Start headless Chromium."""
    playwright = pytest.importorskip("playwright.sync_api")
    if (chromium := shutil.which("chromium")) is None:
        pytest.skip("no chromium")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield started
        started.close()


class Visitor:
    """Somebody at the page."""

    def __init__(self, browser: Any, url: str, width: int = 1280) -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 1000})
        self.page.set_default_timeout(1000 * SECONDS)
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.asked: list[str] = []
        self.page.goto(url)
        self.page.wait_for_selector("#draw")

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    def choose(self, label: str, option: str) -> None:
        self.page.get_by_label(label, exact=True).locator("visible=true").first.click()
        self.page.get_by_role("option", name=option, exact=True).locator("visible=true").click()
        self.page.wait_for_timeout(500)

    def wait(self, part: str, text: str) -> str:
        """Wait until a part of the page says a text; returns all that it says."""
        self.page.wait_for_function(
            "([part, text]) => document.querySelector(part)?.innerText.includes(text)",
            arg=[part, text],
        )
        return self.page.inner_text(part)

    def few_steps(self) -> None:
        self.page.get_by_text("Sampler, steps, interval of guidance").click()
        self.fill_steps()

    def fill_steps(self) -> None:
        self.page.get_by_label("number input for Steps").locator("visible=true").fill("5")
        self.page.keyboard.press("Tab")

    def click_at(self, part: str, across: float, down: float) -> None:
        image = self.page.locator(f"{part} img")
        box = image.bounding_box()
        image.click(position={"x": across * box["width"], "y": down * box["height"]})


@pytest.fixture
def visitor(browser: Any, server: Server) -> Iterator[Visitor]:
    """Open the page."""
    found = Visitor(browser, server.url)
    yield found
    found.page.close()


@pytest.mark.slow
def test_a_visitor_draws_slides_through_steps_and_clicks_a_patch(visitor: Visitor) -> None:
    visitor.choose("Class", "digit 7")
    visitor.few_steps()
    visitor.page.click("#draw")
    said = visitor.wait("#draw-status", "sample.py")
    assert "--labels 'digit 7' --num-per-class 4" in said and "--num-sampling-steps 5" in said
    visitor.wait("#draw-where", "Block 6, step 5, t = 0.20. The framed patch, row 3, column 3")
    assert visitor.page.locator("#draw-load svg").count() == 1
    visitor.page.locator("#draw-step input[type=range]").focus()
    visitor.page.keyboard.press("ArrowLeft")
    visitor.wait("#draw-where", "step 4, t = 0.40")
    visitor.page.locator("#draw-layer input[type=range]").focus()
    visitor.page.keyboard.press("ArrowRight")
    visitor.wait("#draw-where", "Block 7, step 4")
    visitor.click_at("#draw-experts", 0.9, 0.1)
    said = visitor.wait("#draw-where", "row 1, column 4: expert")
    visitor.click_at("#draw-picture", 0.9, 0.9)  # another picture has other weights there
    visitor.page.wait_for_function(
        "said => document.querySelector('#draw-where').innerText != said", arg=said
    )
    visitor.page.get_by_label("without a class").click()
    visitor.wait("#draw-where", "row 1, column 4")
    assert all(url.startswith((visitor.page.url, "data:", "blob:")) for url in visitor.asked)


@pytest.mark.slow
def test_a_picture_is_uploaded_noised_and_routed_and_a_wrong_file_is_answered(
    visitor: Visitor, tmp_path: Path
) -> None:
    (tmp_path / "wrong.png").write_text("no picture")
    Image.fromarray(np.full((30, 40, 3), 90, np.uint8)).save(tmp_path / "photo.jpg")
    visitor.tab("Your picture")
    visitor.page.click("#route")
    visitor.wait("#picture-status", "choose a picture first")
    visitor.page.set_input_files("#upload input[type=file]", tmp_path / "wrong.png")
    visitor.page.wait_for_selector("#upload >> text=wrong")
    visitor.page.click("#route")
    said = visitor.wait("#picture-status", "cannot read the image file wrong.png: not JPEG")
    assert "tmp" not in said
    visitor.page.locator("#upload").get_by_label("Clear").click()
    visitor.page.set_input_files("#upload input[type=file]", tmp_path / "photo.jpg")
    visitor.page.wait_for_selector("#upload >> text=photo")
    visitor.page.click("#route")
    visitor.wait("#picture-status", "Your picture in 8 x 8 pixels")
    visitor.wait("#picture-where", "Block 6, step 6, t = 0.50")
    visitor.click_at("#picture-experts", 0.1, 0.9)
    visitor.wait("#picture-where", "row 4, column 1: expert")


@pytest.mark.slow
def test_two_checkpoints_are_compared_from_the_same_noise(visitor: Visitor) -> None:
    visitor.tab("Compare")
    visitor.page.get_by_label("number input for Steps").locator("visible=true").fill("4")
    visitor.page.click("#compare")
    visitor.wait("#compare-status", "The finished pictures differ by")
    visitor.wait("#left-where", "Block 6, step 4")
    visitor.wait("#right-where", "Block 7, step 4")  # every second block has experts
    visitor.page.locator("#compare-step input[type=range]").focus()
    visitor.page.keyboard.press("ArrowLeft")
    visitor.wait("#left-where", "step 3")
    visitor.wait("#right-where", "step 3")
    visitor.choose("Right checkpoint", "larger.safetensors")
    visitor.page.click("#compare")
    visitor.wait("#compare-status", "start from noise of different shapes")


@pytest.mark.slow
def test_experts_that_choose_and_a_dense_model_are_drawn_and_explained(visitor: Visitor) -> None:
    visitor.choose("Checkpoint", "experts.safetensors")
    visitor.few_steps()
    visitor.page.click("#draw")
    visitor.wait("#draw-status", "experts.safetensors")
    visitor.wait("#draw-where", "Block 7, step 5")
    visitor.choose("Checkpoint", "dense.safetensors")
    visitor.page.click("#draw")
    visitor.wait("#draw-where", "A dense model: it has no experts to show.")


@pytest.mark.slow
def test_checkpoints_of_every_family_and_objective_are_drawn_and_explained(
    browser: Any, tmp_path: Path
) -> None:
    pytest.importorskip("gradio")
    ddpm = saved(tmp_path / "ddpm.safetensors", CONFIG, objective="ddpm")
    middle = {"dit_moe": 6, "dsmoe": 6, "ddpm": 6}  # others have experts in every second block
    ckpts = [*recipe_sources(tmp_path), ddpm]
    assert len(ckpts) == 7
    started = serve(REPO / "app.py", tmp_path / "cwd", "--dtype", "fp32", "--ckpt", *ckpts)
    visitor = Visitor(browser, started.url)
    visitor.few_steps()
    for ckpt in ckpts:
        visitor.choose("Checkpoint", ckpt.name)
        visitor.fill_steps()
        visitor.page.click("#draw")
        visitor.wait("#draw-status", f"--ckpt {ckpt} ")
        visitor.wait("#draw-where", f"Block {middle.get(ckpt.stem, 7)}, step 5, t = ")
        assert visitor.page.locator("#draw-load svg").count() == 1
    visitor.page.close()
    started.process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 768, 1280])
def test_nothing_is_wider_than_the_window_of_a_phone_or_a_desk(
    browser: Any, server: Server, width: int
) -> None:
    visitor = Visitor(browser, server.url, width)
    visitor.few_steps()
    visitor.page.click("#draw")
    visitor.wait("#draw-where", "Block 6, step 5")
    for tab in ("Draw", "Your picture", "Compare"):
        visitor.tab(tab)
        if tab == "Compare":
            visitor.fill_steps()
            visitor.page.click("#compare")
            visitor.wait("#compare-status", "The finished pictures differ by")
        assert visitor.page.evaluate("document.documentElement.scrollWidth") <= width
    visitor.page.close()


@pytest.mark.slow
def test_two_tabs_draw_at_once_and_neither_sees_the_other(browser: Any, server: Server) -> None:
    visitors = [Visitor(browser, server.url) for _ in range(2)]
    for number, visitor in enumerate(visitors, 3):
        visitor.choose("Class", f"digit {number}")
        visitor.few_steps()
    for visitor in visitors:
        visitor.page.click("#draw")
    for number, visitor in enumerate(visitors, 3):
        said = visitor.wait("#draw-status", "sample.py")
        assert f"--labels 'digit {number}'" in said
        visitor.page.locator("#draw-step input[type=range]").focus()
        visitor.page.keyboard.press("ArrowLeft")
        visitor.wait("#draw-where", "step 4")
        visitor.page.close()


@pytest.mark.slow
def test_a_page_writes_nothing_where_it_runs_and_leaves_nothing_behind(
    browser: Any, server: Server, tmp_path: Path
) -> None:
    pytest.importorskip("gradio")
    ckpt = saved(tmp_path / "model.safetensors", CONFIG)
    started = serve(REPO / "app.py", tmp_path / "cwd", "--ckpt", ckpt)
    visitor = Visitor(browser, started.url)
    visitor.few_steps()
    visitor.page.click("#draw")
    visitor.wait("#draw-status", "sample.py")
    visitor.page.close()
    started.process.send_signal(signal.SIGTERM)
    assert started.process.wait(SECONDS) == 0
    assert [path.name for path in started.folder.rglob("*") if path.is_file()] == []


@pytest.mark.slow
def test_a_written_space_starts_without_flags_and_draws(browser: Any, tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    run_main(convert, saved(tmp_path / "m.safetensors", CONFIG), tmp_path / "space", "--space")
    started = serve(tmp_path / "space" / "app.py", tmp_path / "cwd")
    visitor = Visitor(browser, started.url)
    visitor.few_steps()
    visitor.page.click("#draw")
    visitor.wait("#draw-where", "Block 6, step 5")
    visitor.page.close()
    started.process.kill()
