"""Open a page that draws with a checkpoint and shows which expert takes which patch.

    python app.py --ckpt results/demo
    python app.py --ckpt results/demo results/other --port 8000
    python app.py --model DiT-XL/2 --ckpt dit_moe_xl_8E2A.pt --vae-path V

It needs Gradio: pip install -r requirements-app.txt. The page is for this machine alone unless
--host says otherwise, asks nothing of the internet, and keeps no file after its end.
"""

import argparse
import importlib.util
import os
import signal
import tempfile
from pathlib import Path

from common import process
from common.errors import UserError, one_line_errors
from common.flags import FlagParser, number
from sampling.drawing import Limits
from sampling.flags import drawing_flags, drawing_options
from sampling.opening import open_run

BESIDE = Path(__file__).parent  # where a Space has its weights and its autoencoder


def build_parser() -> FlagParser:
    """Return the parser of this script's flags."""
    parser = FlagParser(__doc__)
    data = parser.group("Data")
    data.add(
        "--ckpt",
        nargs="+",
        default=[str(BESIDE / "weights")] if (BESIDE / "weights").is_dir() else None,
        metavar="CKPT",
        help="Checkpoints, run folders (their latest) or published files to choose from. "
        "Default: the folder weights beside app.py, as in a Space.",
    )
    data.add(
        "--vae-path",
        default=str(BESIDE / "vae") if (BESIDE / "vae").is_dir() else None,
        help="Folder or hub id of the autoencoder. Default: the folder vae beside app.py, as in a "
        "Space, else the checkpoint's.",
    )
    drawing_flags(parser, guide=False)
    page = parser.group("Page")
    page.add(
        "--host",
        default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"),
        metavar="ADDRESS",
        help="Address to listen at; 0.0.0.0 lets the whole network in.",
    )
    page.add(
        "--port",
        type=number(int, 1, 65535),
        help="Default: 7860, or the next one that is free.",
    )
    page.add(
        "--max-pictures",
        type=number(int, 1, 64),
        default=Limits().pictures,
        metavar="N",
        help="Pictures of one request, at most.",
    )
    page.add(
        "--max-steps",
        type=number(int, 1, 1000),
        default=Limits().steps,
        metavar="N",
        help="Sampling steps of one request, at most.",
    )
    return parser


def names_of(ckpts: list[str]) -> dict[str, str]:
    """Return what the command line called each checkpoint, by the name that the page shows.

    Raises:
        UserError: one is given twice.
    """
    names: dict[str, str] = {}
    for ckpt in ckpts:
        parts = Path(ckpt).parts
        tails = ["/".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        name = next((tail for tail in tails if tail not in names), None)
        if name is None:
            raise UserError(f"--ckpt {ckpt} is there twice")
        names[name] = ckpt
    return names


def main(args: argparse.Namespace) -> None:
    """Open the checkpoints and serve the page until Ctrl-C."""
    if importlib.util.find_spec("gradio") is None:
        raise UserError("app.py needs gradio: pip install -r requirements-app.txt")
    if args.ckpt is None:
        raise UserError("--ckpt: give a checkpoint, such as results/demo")
    names = names_of(args.ckpt)
    rt = process.setup()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C, and tidies up
    options = drawing_options(args)
    runs = {name: open_run(ckpt, device=rt.device, **options) for name, ckpt in names.items()}
    with tempfile.TemporaryDirectory(prefix="dit-moe-page-") as temp:
        os.environ |= {"GRADIO_TEMP_DIR": temp, "GRADIO_ANALYTICS_ENABLED": "False"}
        from page.tabs import build_page, serve  # needs gradio, and the two variables

        limits = Limits(pictures=args.max_pictures, steps=args.max_steps)
        serve(build_page(runs, names, limits), args.host, args.port, limits)


if __name__ == "__main__":
    with one_line_errors():
        main(build_parser().parse_args())
