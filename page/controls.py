"""What a visitor chooses: a checkpoint, a class, and how to draw.

`DrawControls` are those of a drawing; a change of checkpoint sets them to what it has. `answered`
turns what a visitor can mend into a line of the page.
"""

from collections.abc import Callable, Iterator, Mapping
from html import escape
from typing import Any

import gradio as gr

from common.errors import UserError
from page.experts import CHEAP, Updates, note
from sampling.drawing import DrawingPlan, Limits, check_plan, describe_experts
from sampling.opening import DrawingRun

Runs = Mapping[str, DrawingRun]  # by the name that the page shows
HEAVY: dict[str, Any] = {  # of events that run a network: one at a time, of all visitors
    "show_progress": "hidden",
    "concurrency_id": "network",
    "concurrency_limit": 1,
    "api_visibility": "private",
}
NO_CLASS = -1


def class_choices(run: DrawingRun) -> list[tuple[str, int]]:
    """Return the names of a checkpoint's classes, with their numbers."""
    names, count = run.class_names, run.config.num_classes
    return [(names[i] if i < len(names) else str(i), i) for i in range(count)]


def checkpoint_choice(runs: Runs, label: str = "Checkpoint", index: int = 0) -> Any:
    """Lay out the choice of a checkpoint, unseen where there is but one."""
    names = list(runs)
    several = len(names) > 1
    return gr.Dropdown(names, value=names[index % len(names)], label=label, visible=several)


def class_choice(run: DrawingRun, *others: tuple[str, int]) -> Any:
    """Lay out the choice of a class, others before those of the checkpoint."""
    choices = [*others, *class_choices(run)]
    return gr.Dropdown(choices, value=choices[0][1], label="Class")


def seed_choice() -> Any:
    """Lay out the choice of a seed."""
    return gr.Number(0, label="Seed", precision=0, minimum=0)


class DrawControls:
    """What to draw, from which checkpoint, and how."""

    def __init__(self, runs: Runs, limits: Limits) -> None:
        """Lay the controls out."""
        self.runs, self.limits = runs, limits
        run = next(iter(runs.values()))
        sampler = run.diffusion.default_sampler
        steps = min(run.diffusion.default_num_steps[sampler], limits.steps)
        self.run = checkpoint_choice(runs)
        self.about = gr.HTML(note(escape(describe_experts(run.config))))
        self.label = class_choice(run)
        most = limits.pictures
        self.num_pictures = gr.Slider(1, most, min(4, most), step=1, label="Pictures")
        self.seed = seed_choice()
        self.cfg_scale = guidance_choice()
        with gr.Accordion("Sampler, steps, interval of guidance", open=False):
            self.sampler = gr.Radio(list(run.diffusion.samplers), value=sampler, label="Sampler")
            self.num_steps = gr.Slider(1, limits.steps, steps, step=1, label="Steps")
            self.low = gr.Slider(0, 1, 0, step=0.05, label="Guidance from t", info="0 = picture")
            self.high = gr.Slider(0, 1, 1, step=0.05, label="Guidance to t", info="1 = noise")
        outputs = [self.about, self.label, self.sampler, self.num_steps]
        self.run.input(self._another, [self.run], outputs, **CHEAP)
        self.sampler.input(self._steps, [self.run, self.sampler], [self.num_steps], **CHEAP)

    @property
    def inputs(self) -> list[Any]:
        """Return the components that `plan` reads."""
        how = [self.sampler, self.num_steps, self.low, self.high]
        return [self.run, self.label, self.num_pictures, self.seed, self.cfg_scale, *how]

    def plan(
        self,
        name: str,
        label: int,
        num_pictures: int,
        seed: int,
        cfg_scale: float,
        *how: Any,
    ) -> tuple[DrawingRun, DrawingPlan]:
        """Return the checkpoint and a plan that it can draw.

        Raises:
            UserError: naming the control.
        """
        run, (sampler, num_steps, low, high) = self.runs[name], how
        plan = DrawingPlan(label, num_pictures, seed, cfg_scale, (low, high), sampler, num_steps)
        return run, check_plan(run, plan, self.limits)

    def _another(self, name: str) -> list[Any]:
        run = self.runs[name]
        sampler = run.diffusion.default_sampler
        return [
            note(escape(describe_experts(run.config))),
            gr.Dropdown(class_choices(run), value=0),
            gr.Radio(list(run.diffusion.samplers), value=sampler),
            self._steps(name, sampler),
        ]

    def _steps(self, name: str, sampler: str) -> int:
        return min(self.runs[name].diffusion.default_num_steps[sampler], self.limits.steps)


def guidance_choice(value: float = 1.5, label: str = "Guidance") -> Any:
    """Lay out the choice of a guidance scale."""
    return gr.Slider(0, 10, value, step=0.1, label=label, info="1 = off, half the work")


def answered(
    status: Any, body: Callable[..., Iterator[Updates]]
) -> Callable[..., Iterator[Updates]]:
    """Let what a visitor can mend be said in the page.

    Args:
        status: the component that says it.
        body: of an event; yields updates.
    """

    def event(*values: Any) -> Iterator[Updates]:
        try:
            yield from body(*values)
        except UserError as error:
            yield {status: f'<p class="alert" role="alert">{escape(str(error))}</p>'}

    return event
