"""The part of the page that shows which expert took which patch of a drawing.

`ExpertView` holds the pictures, sliders and charts; `show` fills them from a `Drawing`.
"""

from typing import Any

import gradio as gr
from torch import Tensor

from routing.charts import load_bars, pair_table, weight_table
from routing.figures import expert_colors
from routing.overlay import contact_sheet, legend, overlay, painted_side, patch_at, picture_at
from routing.tracing import Place, pairs_of, patches_per_expert, ranked_experts
from sampling.drawing import Drawing

CHEAP: dict[str, Any] = {  # of events that only look at what was drawn
    "show_progress": "hidden",
    "trigger_mode": "always_last",
    "concurrency_id": "look",
    "concurrency_limit": 2,
    "api_visibility": "private",
}
HALVES = ("with its class", "without a class")
SESSION_SECONDS = 3600  # a drawing is kept so long after the last look
Updates = dict[Any, Any]  # component -> what it becomes


class ExpertView:
    """Pictures, sliders and charts of one drawing."""

    def __init__(
        self,
        name: str,
        *,
        title: str = "The pictures after this step",
        step: Any = None,
        charts: bool = True,
    ) -> None:
        """Lay the components out where the page is being built.

        Args:
            name: of the view, unique in the page.
            title: above the pictures.
            step: slider of another view that this one follows.
            charts: whether load, pairs and steps are shown beneath the picture.
        """
        self.drawing = gr.State(None, time_to_live=SESSION_SECONDS)
        self.chosen, self.patch = gr.State(0), gr.State(0)
        picture: dict[str, Any] = {"interactive": False, "format": "png", "show_label": False}
        picture |= {"buttons": [], "container": False}
        with gr.Row():
            with gr.Column(min_width=240):
                gr.HTML(heading(title))
                alt = "The pictures at this step; a click chooses one"
                self.picture = gr.Image(elem_id=f"{name}-picture", alt_text=alt, **picture)
            with gr.Column(min_width=240):
                gr.HTML(heading("Experts (click a patch)"))
                alt = "The picture in patches of its experts' colours; a click chooses one"
                self.experts = gr.Image(elem_id=f"{name}-experts", alt_text=alt, **picture)
        self.legend = gr.HTML(elem_classes="legend")
        with gr.Row():
            slider: dict[str, Any] = {"step": 1, "interactive": True, "visible": False}
            slider |= {"min_width": 240}  # on a phone one beneath the other
            self.own_step = step is None
            if self.own_step:
                step = gr.Slider(1, 2, 1, label="Step", elem_id=f"{name}-step", **slider)
            self.step = step
            self.layer = gr.Slider(
                0, 1, 0, label="Layer (block)", elem_id=f"{name}-layer", **slider
            )
            self.half = gr.Radio(
                list(HALVES), value=HALVES[0], label="The pass through the network", visible=False
            )
        self.where = gr.HTML(elem_id=f"{name}-where")
        self.charts = []
        if charts:
            with gr.Row():
                for chart in ("load", "pairs", "patch"):
                    with gr.Column(min_width=240):
                        self.charts.append(gr.HTML(elem_id=f"{name}-{chart}"))
        self._connect()

    @property
    def inputs(self) -> list[Any]:
        """Return the components that say what `show` shows."""
        return [self.drawing, self.chosen, self.step, self.layer, self.half, self.patch]

    @property
    def outputs(self) -> list[Any]:
        """Return all components that change."""
        shown = [self.picture, self.experts, self.legend, self.where, *self.charts]
        return [*self.inputs, *shown]

    def _connect(self) -> None:
        """Show what sliders and clicks ask for."""
        for control in (self.step, self.layer, self.half):
            control.input(self.show, self.inputs, self.outputs, **CHEAP)
        self.picture.select(self._click_picture, self.inputs, self.outputs, **CHEAP)
        self.experts.select(self._click_patch, self.inputs, self.outputs, **CHEAP)

    def _click_picture(
        self,
        event: gr.SelectData,
        drawing: Drawing | None,
        chosen: int,
        step: float,
        layer: float,
        half: str,
        patch: int,
    ) -> Updates:
        if drawing is not None:
            pictures = drawing.pictures(-1)
            size = contact_sheet(pictures).shape[:2]
            chosen = picture_at(event.index[0], event.index[1], len(pictures), size)
        return self.show(drawing, chosen, step, layer, half, patch) | {self.chosen: chosen}

    def _click_patch(
        self,
        event: gr.SelectData,
        drawing: Drawing | None,
        chosen: int,
        step: float,
        layer: float,
        half: str,
        patch: int,
    ) -> Updates:
        if drawing is not None and drawing.trace.layers:
            num_patches = drawing.run.config.num_patches
            patch = patch_at(event.index[0], event.index[1], num_patches, painted_side(num_patches))
        return self.show(drawing, chosen, step, layer, half, patch) | {self.patch: patch}

    # -------------------------------------------------------------------------- what is shown

    def begin(self, drawing: Drawing, step: int | None = None) -> Updates:
        """Show a finished drawing, its sliders set to what it has.

        Args:
            drawing: whose steps are all made.
            step: to begin at, from 0; default: the last.
        """
        layers, num_steps = drawing.trace.layers, len(drawing.times)
        step = num_steps - 1 if step is None else step
        config = drawing.run.config
        patch = config.num_patches // 2 + int(config.num_patches**0.5) // 2
        updates: Updates = {self.drawing: drawing, self.chosen: 0, self.patch: patch}
        updates[self.half] = gr.Radio(
            value=HALVES[0], visible=bool(layers) and bool(drawing.trace.ran[1].any())
        )
        if self.own_step:
            updates[self.step] = gr.Slider(
                1,
                max(num_steps, 2),
                step + 1,
                visible=num_steps > 1,
                label=f"Step (of {num_steps})",
            )
        layer = layers[len(layers) // 2] if layers else 0
        if len(layers) > 1:
            stride = layers[1] - layers[0]
            updates[self.layer] = gr.Slider(layers[0], layers[-1], layer, step=stride, visible=True)
        else:
            updates[self.layer] = gr.Slider(0, 1, 0, visible=False)
        return updates | self.show(drawing, 0, step + 1, layer, HALVES[0], patch)

    def live(self, drawing: Drawing) -> Updates:
        """Show how far a drawing has come."""
        pictures, layers = drawing.pictures(-1), drawing.trace.layers
        updates: Updates = {self.picture: contact_sheet(pictures)}
        if layers and drawing.steps_done:
            weights = drawing.trace.at(Place(0, drawing.steps_done - 1, len(layers) // 2))
            colors = expert_colors(drawing.trace.config.num_all_experts)
            names = drawing.trace.expert_names
            updates[self.experts] = overlay(pictures[0], weights, colors, names)
        return updates

    def show(
        self, drawing: Drawing | None, chosen: int, step: float, layer: float, half: str, patch: int
    ) -> Updates:
        """Show a drawing at a step, from 1, and a layer, by its block's number."""
        if drawing is None:
            return {
                self.where: note("Nothing is drawn here yet, or too long ago: press the button.")
            }
        index = min(max(int(step or 1) - 1, 0), len(drawing.times) - 1)
        t = drawing.times[index]
        updates: Updates = {self.picture: contact_sheet(drawing.pictures_at(index), chosen)}
        layers = drawing.trace.layers
        if not layers:
            finished = contact_sheet(drawing.pictures(-1)[chosen : chosen + 1])
            updates |= {self.experts: finished, self.legend: "", **dict.fromkeys(self.charts, "")}
            return updates | {self.where: note("A dense model: it has no experts to show.")}
        nearest = min(range(len(layers)), key=lambda i: abs(layers[i] - (layer or 0)))
        place = Place(chosen, index, nearest, HALVES.index(half))
        return updates | self._show_place(drawing, place, patch, t)

    def _show_place(self, drawing: Drawing, place: Place, patch: int, t: float) -> Updates:
        trace = drawing.trace
        colors = expert_colors(trace.config.num_all_experts)
        names = trace.expert_names
        where = f"Block {trace.layers[place.layer]}, step {place.step + 1}, t = {t:.2f}"
        if not trace.ran[place.half, place.step]:
            return {self.where: note(f"{where}: guidance was off, nothing ran without a class.")}
        weights = trace.at(place)
        picture = drawing.pictures(-1)[place.picture]
        row, column = divmod(patch, int(len(weights) ** 0.5))
        ranked = ranked_experts(weights)[patch]
        experts = [f"expert {names[e]} with weight {weights[patch, e]:.3f}" for e in ranked]
        said = ", ".join(experts) or "no expert"
        updates: Updates = {
            self.experts: overlay(picture, weights, colors, names, patch),
            self.legend: legend(colors, names),
            self.where: note(
                f"{where}. The framed patch, row {row + 1}, column {column + 1}: {said}."
            ),
        }
        if not self.charts:
            return updates
        load = patches_per_expert(weights)
        history = trace.over_steps(place, patch)
        contents = (
            (
                "Patches of each expert",
                load_bars(load, float(load.sum()) / trace.config.num_experts, colors, names),
            ),
            ("Patches that two experts share", pair_chart(weights, names)),
            (
                "The framed patch, step by step",
                weight_table(history, place.step, drawing.times, names),
            ),
        )
        for html, (title, content) in zip(self.charts, contents, strict=True):
            updates[html] = heading(title) + content
        return updates


def pair_chart(weights: Tensor, names: list[str]) -> str:
    """Return the table of pairs, or why there is none."""
    if int((~weights.isnan()).sum(dim=1).max()) < 2:
        return note("Here no patch has more than one expert.")
    return pair_table(pairs_of(weights), names)


def heading(text: str) -> str:
    """Return a small heading for the page."""
    return f"<h3>{text}</h3>"


def note(text: str) -> str:
    """Return a line of text for the page."""
    return f'<p class="note">{text}</p>'
