"""The routing figures: what they show on tables known by heart, and that any size draws."""

import html
import json
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

import expert_report
import heatmap_class
import heatmap_layer
from figures import LOAD_COLORS, expert_colors, grid_columns, relative_load, tick_step
from models import DiTConfig
from routing_data import FORMAT, VERSION, RoutingData

KINDS = list(heatmap_layer.FIGURES)
CHROMIUM = shutil.which("chromium")


def synthetic(path: Path, *, num_steps: int = 6, side: int = 4, **fields: int) -> Path:
    """Write random routing data of a given config; class 1 is left out, two pictures are kept."""
    small = {"depth": 3, "num_experts": 4, "num_experts_per_tok": 2, "num_classes": 5}
    config = DiTConfig.from_dict({**small, **fields, "input_size": 2 * side, "patch_size": 2})
    num_classes, L, S = config.num_classes, config.depth, num_steps
    E, K = config.num_experts, config.num_experts_per_tok
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(0, 1000, shape, generator=generator)

    by_class = draw(2, num_classes, L, E)
    by_class[:, 1] = 0
    names = [f"thing {i}" for i in range(num_classes)]
    meta = {
        "format": FORMAT,
        "version": VERSION,
        "config": config.to_dict(),
        "checkpoint": {"path": "model.pt", "sha256": "", "ema": True, "dtype": "torch.float32"},
        "source": "samples",
        "sampler": "euler",
        "num_steps": S,
        "cfg_scale": 1.5,
        "class_names": [*names[:-1], "</script> & <b>"],
        "runs": [{"seed": 0, "labels": [0], "num_images": 9, "images_done": 9}],
    }
    RoutingData(
        meta=meta,
        times=torch.linspace(1, 1 / S, S, dtype=torch.float64),
        by_class=by_class,
        by_step=draw(2, S, L, E),
        by_patch=draw(2, side * side, L, E),
        pairs=draw(2, L, E, E),
        probs=draw(2, S, L, E),
        rows=torch.full((2, S), 9),
        raw_ids=torch.randint(0, E, (2, S, L, side * side, K), generator=generator).byte(),
        raw_labels=torch.tensor([0, num_classes - 1]),
        raw_images=torch.randint(0, 256, (2, 3, 8 * side, 8 * side), generator=generator).byte(),
    ).save(path)
    return path


def draw(script: ModuleType, data: Path, out: Path, *flags: str) -> None:
    """Run a figure script in this process."""
    arguments = ["--data", str(data), "--out", str(out), *flags]
    script.main(script.build_parser().parse_args(arguments))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic(tmp_path_factory.mktemp("data") / "routing.npz")


# ------------------------------------------------------------------------------ parts


def test_relative_load_is_one_when_even_and_num_experts_when_collapsed():
    assert relative_load([[5, 5, 5, 5], [0, 20, 0, 0]]).tolist() == [[1, 1, 1, 1], [0, 4, 0, 0]]


def test_relative_load_of_nothing_is_not_a_number():
    assert np.isnan(relative_load([[0, 0], [1, 1]])).tolist() == [[True, True], [False, False]]


def test_expert_colors_differ_for_any_number_of_experts():
    for num_experts in (1, 8, 16, 64):
        assert len(set(expert_colors(num_experts))) == num_experts


def test_ticks_are_few_and_round():
    assert [tick_step(count, 25) for count in (3, 25, 26, 256, 1000)] == [1, 1, 2, 20, 50]


def test_panels_leave_no_holes_where_they_can():
    assert [grid_columns(layers) for layers in (1, 4, 12, 24, 28, 40)] == [1, 2, 4, 6, 7, 8]


def test_neighbours_in_similarity_order_use_the_experts_alike():
    alike, other = [2.0, 0.0, 1.0], [0.0, 2.0, 1.0]
    order = heatmap_class.similarity_order(np.array([[alike, other, alike, other]]))
    assert sorted(sorted(pair) for pair in (order[:2].tolist(), order[2:].tolist())) == [
        [0, 2],
        [1, 3],
    ]


def test_the_even_load_has_the_middle_colour_in_the_report_as_in_the_figures():
    scale = expert_report.color_scale(most=4)
    assert scale[0][0] == 0 and scale[-1][0] == 1
    position, color = scale[10]
    assert position == pytest.approx(1 / 4)
    assert color == "rgb(247,246,246)"  # the white of RdBu
    assert LOAD_COLORS == "RdBu_r"


# ------------------------------------------------------------------------------ figures


@pytest.mark.parametrize(
    ("kind", "half"), [*((kind, "conditional") for kind in KINDS), ("step", "unconditional")]
)
def test_every_kind_of_layer_figure_is_a_picture(data: Path, tmp_path: Path, kind: str, half: str):
    draw(heatmap_layer, data, tmp_path / "a.png", "--by", kind, "--half", half, "--dpi", "30")
    with Image.open(tmp_path / "a.png") as image:
        assert min(image.size) > 60 and len(set(image.convert("L").get_flattened_data())) > 20


def test_class_figure_names_the_classes_drawn_in_vector_form(data: Path, tmp_path: Path):
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none"}):  # text stays text
        draw(heatmap_class, data, tmp_path / "a.svg", "--order", "similarity")
    svg = (tmp_path / "a.svg").read_text()
    assert "thing 0" in svg and "thing 3" in svg and "1 even" in svg
    assert "thing 1" not in svg  # no image of it
    assert "layer 2" in svg


@pytest.mark.parametrize(("num_experts", "num_experts_per_tok"), [(1, 1), (2, 2), (9, 3)])
def test_any_number_of_experts_draws(tmp_path: Path, num_experts: int, num_experts_per_tok: int):
    sizes = {"num_experts": num_experts, "num_experts_per_tok": num_experts_per_tok}
    data = synthetic(tmp_path / "a.npz", depth=1, **sizes)
    for kind in ("expert", "map", "step"):
        draw(heatmap_layer, data, tmp_path / f"{kind}.png", "--by", kind, "--dpi", "20")
    expert_report.build_page(RoutingData.load(data))


@pytest.mark.slow
def test_forty_layers_of_sixteen_experts_and_a_thousand_classes_draw(tmp_path: Path):
    sizes = {"depth": 40, "num_experts": 16, "num_classes": 1000, "num_steps": 250, "side": 16}
    data = synthetic(tmp_path / "a.npz", **sizes)
    draw(heatmap_class, data, tmp_path / "class.png", "--order", "similarity")
    for kind in KINDS:
        draw(heatmap_layer, data, tmp_path / f"{kind}.png", "--by", kind)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--layers", "3"], r"--layers 3: expected numbers in \[0, 2\]"),
        (["--by", "sample", "--sample", "2"], "--sample 2: this file keeps 2 pictures"),
        (["--out", "a.xyz"], r"--out a\.xyz: expected \.png, \.svg or \.pdf"),
        (["--data", "nowhere.npz"], r"no such file: nowhere\.npz"),
    ],
)
def test_wrong_flags_are_named(data: Path, tmp_path: Path, flags: list[str], message: str):
    with pytest.raises(SystemExit, match=message):
        draw(heatmap_layer, data, tmp_path / "a.png", *flags)


def test_pairs_of_a_top_one_model_are_refused(tmp_path: Path):
    data = synthetic(tmp_path / "a.npz", num_experts_per_tok=1)
    with pytest.raises(SystemExit, match="--by pair: num_experts_per_tok is 1"):
        draw(heatmap_layer, data, tmp_path / "a.png", "--by", "pair")


# ------------------------------------------------------------------------------ report


def test_report_is_one_file_that_asks_for_nothing_else(data: Path, tmp_path: Path):
    out = tmp_path / "a.html"
    draw(expert_report, data, out)
    page = out.read_text()
    own = page.replace(expert_report.get_plotlyjs(), "")
    assert "src=" not in own and "href=" not in own and "http" not in own
    assert own.count("</script>") == 2  # a class of that name does not end the script


CHOOSE = """<script>  // what a reader would click, and what the page then shows
for (const [id, value] of [["layer", 2], ["step", 4], ["class", 3]]) {
  find(id).value = value;
  find(id).dispatchEvent(new Event("change"));
  find(id).dispatchEvent(new Event("input"));
}
document.body.textContent = JSON.stringify({
  rows: [by_class.data[0].z.length, by_step.data[0].z.length], cell: by_step.data[0].z[4][1],
  selected: document.querySelector("tr.selected").cells[0].textContent,
  note: find("sample_note").textContent, pixels: [picture.width, overlay.height] });
</script>"""


@pytest.mark.skipif(not CHROMIUM, reason="needs Debian's chromium")
def test_report_works_in_a_browser_without_network(data: Path, tmp_path: Path):
    routing = RoutingData.load(data)
    page = tmp_path / "a.html"
    page.write_text(expert_report.build_page(routing) + CHOOSE)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
    output = ["--enable-logging=stderr", "--dump-dom", f"--user-data-dir={tmp_path}", page.as_uri()]

    result = subprocess.run(
        [str(CHROMIUM), *flags, *output], capture_output=True, text=True, timeout=120
    )

    assert "CONSOLE" not in result.stderr  # no error, no warning
    body = result.stdout.split('data-ready="yes">')[1].split("</body>")[0]
    shown = json.loads(html.unescape(body))
    expected = relative_load(routing.counts("step"))[2, 4, 1]
    assert shown["cell"] == pytest.approx(expected, abs=6e-4)
    assert shown["rows"] == [4, 6] and shown["selected"] == "2" and shown["pixels"] == [32, 32]
    assert shown["note"].endswith("class: </script> & <b>. Right: layer 2, t = 0.33.")
