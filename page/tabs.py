"""What a visitor of the page can do: draw, look at a picture of their own, compare two drawings.

`build_page` puts the three tabs together; each is a function that lays it out, with its event.
"""

from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from common.errors import UserError
from data import Pixels
from page.controls import (
    HEAVY,
    NO_CLASS,
    DrawControls,
    Runs,
    answered,
    checkpoint_choice,
    class_choice,
    class_choices,
    guidance_choice,
    seed_choice,
)
from page.experts import CHEAP, ExpertView, Updates, note
from sampling.drawing import (
    Drawing,
    DrawingPlan,
    Limits,
    check_plan,
    draw,
    label_in,
    route_picture,
)
from sampling.opening import DrawingRun

PREVIEWS, DECODED_PREVIEWS = 25, 6  # pictures on the way: of pixels, through an autoencoder
SESSIONS = 16  # visitors whose drawings are kept
TITLE = "DiT-MoE: draw, and watch the experts"
CSS = """
.gradio-container { max-width: 1280px !important; margin: auto; }
.note { margin: .2em 0; opacity: .85; overflow-wrap: anywhere; }
.alert { margin: .2em 0; padding: .5em .8em; background: #D55E0022;
  border-left: 4px solid #D55E00; }
.legend { line-height: 1.9; }
h3 { margin: .3em 0 .5em !important; font-size: 1em !important; font-weight: 600 !important; }
progress { width: 100%; accent-color: #D55E00; }
img { image-rendering: pixelated; }
footer { display: none !important; }
"""


def build_page(runs: Runs, ckpts: Mapping[str, str], limits: Limits) -> Any:
    """Return the page, ready to launch.

    Args:
        runs: checkpoints to try, by name.
        ckpts: what the command line called each.
        limits: of one request.
    """
    with gr.Blocks(analytics_enabled=False, title=TITLE, delete_cache=(600, 3600)) as page:
        gr.Markdown(f"# {TITLE}")
        with gr.Tab("Draw"):
            draw_tab(runs, ckpts, limits)
        with gr.Tab("Your picture"):
            picture_tab(runs, limits)
        with gr.Tab("Compare"):
            compare_tab(runs, limits)
    return page.queue(max_size=20)


def serve(page: Any, host: str, port: int | None, limits: Limits) -> None:
    """Serve the page until Ctrl-C: no file but its own, nothing from the internet, no sharing.

    Args:
        page: of `build_page`.
        host: address to listen at.
        port: None takes the first free one from 7860.
        limits: of an upload.
    """
    system = ["system-ui", "sans-serif"]  # the theme's own are asked of a font server
    theme = gr.themes.Default(font=system, font_mono=["ui-monospace", "monospace"])
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        theme=theme,
        css=CSS,
        share=False,
        quiet=True,
        footer_links=[],
        ssr_mode=False,
        mcp_server=False,
        max_file_size=limits.upload_bytes,
        state_session_capacity=SESSIONS,
        prevent_thread_lock=True,
    )
    print(f"open in a browser: {address}", flush=True)
    page.block_thread()


# ------------------------------------------------------------------------------ draw


def draw_tab(runs: Runs, ckpts: Mapping[str, str], limits: Limits) -> None:
    """Lay out the tab that draws."""
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            controls = DrawControls(runs, limits)
            with gr.Row():
                button = gr.Button("Draw", variant="primary", elem_id="draw", min_width=100)
                stop = gr.Button("Stop", elem_id="stop", min_width=100)
            status = gr.HTML(note("Nothing is drawn yet."), elem_id="draw-status")
        with gr.Column(scale=3, min_width=320):
            view = ExpertView("draw")

    def event(name: str, *choices: Any) -> Iterator[Updates]:
        run, plan = controls.plan(name, *choices)
        for drawing in previews(draw(run, plan)):
            yield view.live(drawing) | {status: progress(drawing)}
        command = escape(plan.command(ckpts[name], run.class_names))
        same = note(f"The same pictures on the command line: <code>{command}</code>")
        yield view.begin(drawing) | {status: same}

    started = button.click(
        answered(status, event), controls.inputs, [*view.outputs, status], **HEAVY
    )
    stop.click(lambda: note("Stopped."), None, [status], cancels=[started], **CHEAP)


def previews(steps: Iterator[Drawing]) -> Iterator[Drawing]:
    """Yield a growing drawing as often as its pictures are cheap to show, and at its end."""
    for drawing in steps:
        most = PREVIEWS if isinstance(drawing.run.vae, Pixels) else DECODED_PREVIEWS
        if drawing.is_done or drawing.steps_done % max(1, len(drawing.times) // most) == 0:
            yield drawing


def progress(drawing: Drawing, prefix: str = "") -> str:
    """Say how far a drawing has come."""
    done, total = drawing.steps_done, len(drawing.times)
    bar = f'<progress max="{total}" value="{done}"></progress>'
    return note(f"{prefix}Step {done} of {total}") + bar


# ------------------------------------------------------------------------------ your picture


def picture_tab(runs: Runs, limits: Limits) -> None:
    """Lay out the tab that routes a visitor's picture."""
    first = next(iter(runs.values()))
    megabytes = limits.upload_bytes / 2**20
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            chosen = checkpoint_choice(runs)
            file = gr.File(
                label=f"A picture, at most {megabytes:.0f} MB",
                elem_id="upload",
                height=140,
            )
            label = class_choice(first, ("no class", NO_CLASS))
            t = gr.Slider(0, 1, 0.5, step=0.05, label="Noise t", info="0 = your picture, 1 = noise")
            seed = seed_choice()
            button = gr.Button("Route it", variant="primary", elem_id="route")
            status = gr.HTML(
                note("It is cut to a square, noised, and shown to the network once a noise level."),
                elem_id="picture-status",
            )
        with gr.Column(scale=3, min_width=320):
            view = ExpertView("picture", title="Your picture at this noise level")

    def event(name: str, path: str | None, label: int, t: float, seed: int) -> Iterator[Updates]:
        if path is None:
            raise UserError("choose a picture first")
        yield {status: note("On its way.")}
        drawing, step = routed(runs[name], path, label, t, seed, limits)
        size = drawing.run.image_size
        said = note(f"Your picture in {size} x {size} pixels. Step = noise level, from t = 1 to 0.")
        yield view.begin(drawing, step) | {status: said}

    inputs = [chosen, file, label, t, seed]
    button.click(answered(status, event), inputs, [*view.outputs, status], **HEAVY)

    def another(name: str) -> Any:
        choices = [("no class", NO_CLASS), *class_choices(runs[name])]
        return gr.Dropdown(choices, value=NO_CLASS)

    chosen.input(another, [chosen], [label], **CHEAP)


def routed(
    run: DrawingRun, path: str, label: int, t: float, seed: int, limits: Limits
) -> tuple[Drawing, int]:
    """Route an uploaded file; errors name it as its owner does.

    Raises:
        UserError: as `route_picture`.
    """
    known = None if label == NO_CLASS else label
    try:
        return route_picture(run, path, t=t, label=known, seed=seed, limits=limits)
    except UserError as error:
        raise UserError(str(error).replace(path, Path(path).name)) from error


# ------------------------------------------------------------------------------ compare


def compare_tab(runs: Runs, limits: Limits) -> None:
    """Lay out the tab that draws twice from the same noise."""
    first = next(iter(runs.values()))
    with gr.Row():
        left = side_controls("Left", runs, 0, 1.0)
        right = side_controls("Right", runs, 1, 3.0)
    with gr.Row():
        label = class_choice(first)
        most = min(4, limits.pictures)
        num_pictures = gr.Slider(1, most, 1, step=1, label="Pictures of each")
        num_steps = gr.Slider(1, limits.steps, min(25, limits.steps), step=1, label="Steps")
        seed = seed_choice()
    button = gr.Button("Draw both from the same noise", variant="primary", elem_id="compare")
    status = gr.HTML(elem_id="compare-status")
    step = gr.Slider(1, 2, 1, step=1, label="Step", visible=False, elem_id="compare-step")
    with gr.Row():
        with gr.Column(min_width=320):
            left_view = ExpertView("left", step=step, charts=False)
        with gr.Column(min_width=320):
            right_view = ExpertView("right", step=step, charts=False)

    def event(label: int, count: int, steps: int, seed: int, *sides: Any) -> Iterator[Updates]:
        plans = check_sides(runs, sides, label, count, steps, seed, limits)
        done: Updates = {}
        drawings = []
        for view, side, (run, plan) in zip(
            (left_view, right_view), ("Left", "Right"), plans, strict=True
        ):
            for drawing in previews(draw(run, plan)):
                yield done | view.live(drawing) | {status: progress(drawing, f"{side}: ")}
            done |= view.begin(drawing)
            drawings.append(drawing)
        steps = len(drawing.times)
        slider = gr.Slider(1, max(steps, 2), steps, visible=steps > 1, label=f"Step (of {steps})")
        yield done | {step: slider, status: note(difference(*drawings))}

    inputs = [label, num_pictures, num_steps, seed, *left, *right]
    outputs = [step, status]
    outputs += [part for view in (left_view, right_view) for part in view.outputs if part != step]
    button.click(answered(status, event), inputs, outputs, **HEAVY)
    left[0].input(
        lambda name: gr.Dropdown(class_choices(runs[name]), value=0), [left[0]], [label], **CHEAP
    )


def side_controls(side: str, runs: Runs, index: int, cfg_scale: float) -> list[Any]:
    """Lay out what may differ between the two: checkpoint and guidance."""
    with gr.Column(min_width=280):
        run = checkpoint_choice(runs, f"{side} checkpoint", index)
        return [run, guidance_choice(cfg_scale, f"{side} guidance")]


def check_sides(
    runs: Runs, sides: Any, label: int, count: int, steps: int, seed: int, limits: Limits
) -> list[tuple[DrawingRun, DrawingPlan]]:
    """Return both checkpoints, each with its plan.

    Raises:
        UserError: naming the control, or the two draw pictures of different shapes.
    """
    names, scales = sides[::2], sides[1::2]
    first, second = (runs[name] for name in names)
    shapes = [(run.config.in_channels, run.config.input_size) for run in (first, second)]
    if shapes[0] != shapes[1]:
        raise UserError(f"{names[0]} and {names[1]} start from noise of different shapes")
    labels = [label, label_in(second, first, label)]
    return [
        (run, check_plan(run, DrawingPlan(its, count, seed, scale, num_steps=steps), limits))
        for run, its, scale in zip((first, second), labels, scales, strict=True)
    ]


def difference(left: Drawing, right: Drawing) -> str:
    """Say how far the finished pictures of two drawings are apart."""
    apart = abs(left.pictures(-1).astype(float) - right.pictures(-1)).mean() / 255
    return f"The finished pictures differ by {apart:.1%} of the range of a pixel on average."
