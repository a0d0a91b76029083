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
from helpers import run_main
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

import expert_report
import heatmap_class
import heatmap_layer
from common.errors import FileError, UserError
from models import DiTConfig
from routing.figures import (
    FAINT,
    LOAD_COLORS,
    OVERLAY,
    expert_colors,
    grid_columns,
    relative_load,
    save_figure,
    tick_step,
)
from routing.tables import FORMAT, VERSION, RoutingData

KINDS = list(heatmap_layer.FIGURES)
CHROMIUM = shutil.which("chromium")
HOSTILE = "</script> <!--<script> & <b>$_^$"  # ends scripts, begins comments, breaks mathtext


def synthetic(
    path: Path, *, num_steps: int = 6, side: int = 4, num_names: int | None = None, **fields: int
) -> Path:
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
        "class_names": [*names[:-1], HOSTILE][:num_names],
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
        traced_ids=torch.randint(0, E, (2, S, L, side * side, K), generator=generator).byte(),
        traced_labels=torch.tensor([0, num_classes - 1]),
        traced_images=torch.randint(0, 256, (2, 3, 8 * side, 8 * side), generator=generator).byte(),
    ).save(path)
    return path


def draw(script: ModuleType, data: Path, out: Path, *flags: str) -> None:
    """Run a figure script in this process."""
    run_main(script, "--data", data, "--out", out, *flags)


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


@pytest.mark.parametrize(("num_experts", "apart"), [(8, 0.16), (16, 0.09)])
def test_no_patch_beneath_makes_one_expert_look_like_another(num_experts: int, apart: float):
    colors = np.array([to_rgb(color) for color in expert_colors(num_experts)])
    grays = np.linspace(*FAINT, 9)
    seen = OVERLAY * colors[:, None] + (1 - OVERLAY) * grays[None, :, None]  # (E, gray, 3)
    distances = np.linalg.norm(seen[:, :, None, None] - seen[None, None], axis=-1).min(axis=(1, 3))
    assert distances[~np.eye(num_experts, dtype=bool)].min() > apart


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


def drawn(data: Path, *flags: str) -> Figure:
    """Return a figure of heatmap_layer.py, laid out."""
    arguments = ["--data", str(data), *flags]
    args = heatmap_layer.build_parser().parse_args(arguments)
    figure = heatmap_layer.FIGURES[args.by](args, RoutingData.load(data))
    figure.draw_without_rendering()
    return figure


def words(figure: Figure) -> str:
    return " ".join(" ".join(text.get_text().split()) for text in figure.texts)


def test_figures_say_what_nmi_and_half_mean(data: Path, tmp_path: Path) -> None:
    said = words(drawn(data, "--by", "step"))
    assert "NMI, normalised mutual information: how much the step tells about the expert" in said
    assert "the conditional half is what happened with it" in said
    assert "half is what happened without" in words(drawn(data, "--half", "unconditional"))
    one = RoutingData.load(data)
    one.rows[1] = 0  # guidance was off
    one.save(tmp_path / "a.npz")
    said = words(drawn(tmp_path / "a.npz", "--by", "step"))
    assert "half" not in said and "NMI" in said


@pytest.mark.parametrize("sizes", [{"depth": 4, "num_experts": 8}, {"depth": 12}])
def test_the_maps_take_most_of_their_figure(tmp_path: Path, sizes: dict[str, int]) -> None:
    figure = drawn(synthetic(tmp_path / "a.npz", **sizes), "--by", "map")
    *maps, _color_bar = figure.axes
    covered = sum(axis.get_window_extent().width for axis in maps)
    assert covered > 0.68 * figure.bbox.width
    label = maps[0].yaxis.label.get_window_extent()
    assert label.x0 < 0.03 * figure.bbox.width  # no empty strip beside it


@pytest.mark.parametrize("kind", ["expert", "step", "map", "pair"])
@pytest.mark.parametrize("depth", [1, 4, 12])
def test_the_label_of_the_colour_bar_is_no_longer_than_the_bar(
    tmp_path: Path, kind: str, depth: int
) -> None:
    figure = drawn(synthetic(tmp_path / "a.npz", depth=depth), "--by", kind)
    bar = figure.axes[-1]
    label, extent = bar.yaxis.label.get_window_extent(), bar.get_window_extent()
    assert extent.y0 <= label.y0 and label.y1 <= extent.y1
    assert label.x1 <= figure.bbox.x1
    plt.close(figure)


def test_the_note_is_below_everything_else(data: Path) -> None:
    for kind in KINDS:
        figure = drawn(data, "--by", kind)
        note = [text for text in figure.texts if text.get_fontsize() == 8][-1].get_window_extent()
        lowest = min(axis.get_window_extent().y0 for axis in figure.axes)
        assert note.y1 <= lowest + 1 and note.x1 <= figure.bbox.width, kind


def test_a_class_name_is_text_not_a_formula(data: Path, tmp_path: Path) -> None:
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none"}):
        draw(heatmap_class, data, tmp_path / "a.svg")
        draw(heatmap_layer, data, tmp_path / "b.svg", "--by", "sample", "--sample", "1")
    assert html.escape(HOSTILE, quote=False) in (tmp_path / "a.svg").read_text()
    assert html.escape(HOSTILE, quote=False) in (tmp_path / "b.svg").read_text()


def test_classes_beyond_the_names_have_their_number(tmp_path: Path) -> None:
    data = synthetic(tmp_path / "a.npz", num_names=2, depth=12)
    assert RoutingData.load(data).class_names == [
        "thing 0",
        "thing 1",
        *map("class {}".format, range(2, 5)),
    ]
    draw(heatmap_class, data, tmp_path / "a.png", "--dpi", "20")
    draw(heatmap_layer, data, tmp_path / "b.png", "--by", "sample", "--sample", "1", "--dpi", "20")
    assert "class 4" in expert_report.build_page(RoutingData.load(data))


@pytest.mark.parametrize(
    ("script", "name"),
    [(heatmap_class, "a.png"), (heatmap_layer, "a.svg"), (heatmap_layer, "a.pdf"),
     (expert_report, "a.html")],
)  # fmt: skip
def test_only_what_the_scripts_wrote_is_replaced(
    data: Path, tmp_path: Path, script: ModuleType, name: str
) -> None:
    out = tmp_path / name
    draw(script, data, out)
    draw(script, data, out)
    out.write_bytes(b"something dear")
    with pytest.raises(FileError, match="exists and is none of ours"):
        draw(script, data, out)
    assert out.read_bytes() == b"something dear"
    with pytest.raises(FileError, match="is not a file"):
        (tmp_path / "folder" / name).mkdir(parents=True)
        draw(script, data, tmp_path / "folder" / name)
    with pytest.raises(FileError, match=r"can't be written to"):
        draw(script, data, out / name)


def test_a_figure_of_before_is_replaced(data: Path, tmp_path: Path) -> None:
    figure = drawn(data)
    for name in ("a.png", "a.svg", "a.pdf"):
        figure.savefig(tmp_path / name)
        draw(heatmap_layer, data, tmp_path / name)


def test_a_figure_too_large_for_a_picture_names_the_flag(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--dpi 1000000: this figure would have"):
        save_figure(drawn(data), tmp_path / "a.png", 1_000_000)
    assert not list(tmp_path.iterdir())


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
    with pytest.raises(UserError, match=message):
        draw(heatmap_layer, data, tmp_path / "a.png", *flags)
    assert not list(tmp_path.iterdir())


def test_pairs_of_a_top_one_model_are_refused(tmp_path: Path):
    data = synthetic(tmp_path / "a.npz", num_experts_per_tok=1)
    with pytest.raises(UserError, match="--by pair: num_experts_per_tok is 1"):
        draw(heatmap_layer, data, tmp_path / "a.png", "--by", "pair")


# ------------------------------------------------------------------------------ report


def test_report_is_one_file_that_asks_for_nothing_else(data: Path, tmp_path: Path):
    out = tmp_path / "a.html"
    draw(expert_report, data, out)
    page = out.read_text()
    own = page.replace(expert_report.get_plotlyjs(), "")
    assert "src=" not in own and "href=" not in own and "http" not in own
    assert own.count("</script>") == 2  # a class of that name does not end the script
    assert "<!--" not in own and "\x1b" not in own


def test_a_class_named_as_a_part_of_the_template_stays_a_name(data: Path) -> None:
    routing = RoutingData.load(data)
    routing.meta["class_names"][0] = "/*PLOTLY*/ /*DATA*/null"
    page = expert_report.build_page(routing)
    assert page.count(expert_report.get_plotlyjs()) == 1
    assert "/*PLOTLY*/ /*DATA*/null" in page


CHOOSE = """<script>  // what a reader would click, and what the page then shows
for (const [id, value] of [["layer", 2], ["step", 4], ["class", 3]]) {
  find(id).value = value;
  find(id).dispatchEvent(new Event("change"));
  find(id).dispatchEvent(new Event("input"));
}
document.body.textContent = JSON.stringify({
  rows: [by_class.data[0].z.length, by_step.data[0].z.length], cell: by_step.data[0].z[4][1],
  selected: document.querySelector("tr.selected").cells[0].textContent,
  note: find("sample_note").textContent, pixels: [picture.width, overlay.height],
  ticks: by_class.layout.yaxis.ticktext, injected: document.querySelectorAll("#by_class b").length,
  meanings: find("meanings").textContent });
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
    assert shown["note"].endswith(f"class: {HOSTILE}. Right: layer 2, t = 0.33.")
    assert shown["ticks"][-1] == "&lt;/script&gt; &lt;!-…" and shown["injected"] == 0
    assert "max_viohow far the busiest expert is above the even load" in shown["meanings"]


NARROW = """<iframe src="a.html" width="480" height="900"></iframe><script>
addEventListener("load", () => setTimeout(() => {
  const page = frames[0].document, root = page.documentElement;
  const plots = [...page.querySelectorAll(".js-plotly-plot .main-svg")];
  document.body.textContent = JSON.stringify({ visible: root.clientWidth, needed: root.scrollWidth,
    narrowest: Math.min(...plots.map(plot => plot.getBoundingClientRect().width)),
    widest: Math.max(...plots.map(plot => plot.getBoundingClientRect().right)) });
}, 500));</script>"""


@pytest.mark.skipif(not CHROMIUM, reason="needs Debian's chromium")
def test_report_fits_a_window_of_480_pixels(tmp_path: Path) -> None:
    data = RoutingData.load(synthetic(tmp_path / "a.npz", depth=12, num_experts=16))
    (tmp_path / "a.html").write_text(expert_report.build_page(data))
    (tmp_path / "frame.html").write_text(NARROW)  # chromium's own windows are 500 wide at least
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    flags += ["--allow-file-access-from-files", "--virtual-time-budget=5000", "--dump-dom"]
    page = (tmp_path / "frame.html").as_uri()
    result = subprocess.run(
        [str(CHROMIUM), *flags, page], capture_output=True, text=True, timeout=120
    )
    shown = json.loads(result.stdout.split("<body>")[1].split("</body>")[0])
    assert shown["needed"] == shown["visible"] <= 480
    assert shown["narrowest"] > 350 and shown["widest"] <= 480
