"""The flags that both trainers share, as `--help` groups them; settings.py settles them."""

import argparse

from common.flags import (
    FlagGroup,
    FlagParser,
    flag,
    in_groups,
    model_size,
    number,
    seed,
)
from common.names import BALANCE_TERMS, MODELS
from training.config_file import FLAG, ConfigParser
from training.optimization_flags import (
    add_objective_flags,
    add_optimizer_flags,
    add_schedule_flags,
    add_stop_flags,
    add_tracker_flags,
)
from training.tuning_flags import (
    add_evaluation_flags,
    add_latent_flags,
    add_start_flags,
    add_validation_flags,
)


def build_parser(docstring: str | None) -> FlagParser:
    """Return the parser of the flags that both trainers share."""
    parser = ConfigParser(docstring)
    parser.group("File").add(
        FLAG,
        default=argparse.SUPPRESS,
        metavar="FILE",
        help="YAML or JSON file of flags and their values, of config/recipes/ or the args.json of "
        "a run; what the command line says wins.",
    )
    data = parser.group("Data")
    _add_data_flags(data)
    add_validation_flags(data)
    _add_model_flags(parser.group("Model"))
    moe = parser.group("MoE")
    _add_moe_flags(moe)
    add_block_flags(moe)
    add_router_flags(moe)
    add_balance_flag(moe)
    _add_balance_flags(moe)
    optimization = parser.group("Optimization")
    _add_batch_flags(optimization)
    add_objective_flags(optimization)
    add_optimizer_flags(optimization)
    add_schedule_flags(optimization)
    run = parser.group("Run")
    _add_course_flags(run)
    add_stop_flags(run)
    _add_output_flags(run)
    add_evaluation_flags(run)
    add_tracker_flags(run)
    return parser


def _add_data_flags(data: FlagGroup) -> None:
    data.add(
        "--data-path",
        required=True,
        metavar="DATA",
        help="What to train on: a folder with one subfolder of images per class, tar:SHARDS, "
        "hf:NAME?split=train&image=image&label=label of Hugging Face's datasets, what "
        "encode_latents.py made of one, or the embedded sets digits and fashion-mnist.",
    )
    data.add(
        "--image-size",
        type=number(int, 1, 16_384),
        metavar="PIXELS",
        help="Side in pixels that images of a folder are cropped to. Default: 256; embedded sets "
        "and latents have their own.",
    )
    data.add(
        "--fashion-mnist-root",
        metavar="FOLDER",
        help="Folder of Fashion-MNIST's four idx files. Default: where Debian's package "
        "dataset-fashion-mnist puts them, else a download to ./downloads.",
    )
    data.add(
        "--flip",
        **flag,
        help="Mirror half of the images at random. Default: on for folders, off for embedded sets.",
    )
    data.add(
        "--vae-path",
        metavar="VAE",
        help="Folder or hub id of the autoencoder whose latents are modelled; none trains on "
        "pixels. Default: stabilityai/sd-vae-ft-ema for folders, none for embedded sets.",
    )
    add_latent_flags(data)
    data.add(
        "--skip-broken",
        default=False,
        **flag,
        help="Let the next image stand in for one that cannot be read, and log it; else the run "
        "ends.",
    )
    data.add(
        "--num-workers",
        type=number(int, 0, 1024),
        metavar="N",
        help="Number of processes per rank that load images. Default: 4 for folders and latents, "
        "0 for embedded sets.",
    )


def _add_model_flags(model: FlagGroup) -> None:
    model.add(
        "--model",
        **model_size(MODELS),
        help=f"Size and patch of the network, one of {in_groups(MODELS)}; to be given.",
    )
    model.add(
        "--num-classes",
        type=number(int, 1, 100_000),
        metavar="N",
        help="Number of labels, without the null label. Default: the data's own.",
    )
    model.add(
        "--class-dropout-prob",
        type=number(float, 0, 1),
        default=0.1,
        metavar="P",
        help="Share of labels replaced by the null label, which guidance needs.",
    )
    model.add(
        "--qk-norm",
        **flag,
        help="Normalise queries and keys of the attention. Default: on for XL and G.",
    )
    model.add(
        "--qk-norm-eps",
        type=number(float, 1e-12, 1),
        metavar="EPS",
        help="Added to the variance in these norms. Default: 1e-6, in later families 1e-5.",
    )
    model.add(
        "--rope",
        **flag,
        help="Turn queries and keys by the token's row and column, beside the table of positions. "
        "Default: off.",
    )
    model.add(
        "--norm",
        choices=("layer", "rms"),
        help="Norm before attention and MLP, and of queries and keys. Default: layer.",
    )
    model.add(
        "--flash-attn",
        default=False,
        **flag,
        help="Use the flash-attn package (CUDA) for attention, not PyTorch's own kernels.",
    )
    add_start_flags(model)


def _add_moe_flags(moe: FlagGroup) -> None:
    moe.add(
        "--num-experts",
        type=number(int, 0, 4096),
        metavar="E",
        help="Number of routed experts in a block; 0 makes it dense. Default: 16 for G, else 8.",
    )
    moe.add(
        "--num-experts-per-tok",
        type=number(int, 1, 4096),
        metavar="K",
        help="Number of routed experts that each token uses. Default: 2.",
    )
    moe.add(
        "--num-shared-experts",
        type=number(int, 0, 1024),
        metavar="N",
        help="Hidden width of the expert that all tokens use, in units of the model's width; 0 "
        "leaves it out. Default: 2.",
    )
    moe.add(
        "--mlp-ratio",
        type=number(float, 0.01, 1024),
        metavar="RATIO",
        help="Hidden width of a routed expert, in units of the model's width. Default: 4.",
    )
    moe.add(
        "--mlp-type",
        choices=("swiglu", "gelu"),
        help="Form of all MLPs: gated without biases, or the dense DiT's. Default: swiglu, in "
        "later families gelu.",
    )
    moe.add(
        "--dense-mlp-ratio",
        type=number(float, 0.01, 1024),
        metavar="RATIO",
        help="Hidden width of the MLP of blocks without experts, in units of the model's width. "
        "Default: 4.",
    )
    moe.add(
        "--expert-parallel",
        type=number(int, 1, 4096),
        metavar="N",
        help="Number of neighbouring ranks that hold the experts together, each its part, while "
        "tokens travel; checkpoints are in shares then. Default: each rank holds all experts.",
    )


def add_block_flags(moe: FlagGroup) -> None:
    """Add the flags that say where experts are, and which is always on."""
    moe.add(
        "--moe-blocks",
        choices=("all", "every_second", "deep_half"),
        help="Blocks that have experts; the others have one dense MLP. Default: all, in later "
        "families every_second.",
    )
    moe.add(
        "--first-k-dense-replace",
        type=number(int, 0, 10_000),
        metavar="N",
        help="Number of blocks, from the first, that have a dense MLP instead. Default: 0.",
    )
    moe.add(
        "--unconditional-expert",
        **flag,
        help="Add an expert that alone serves the images without a label. Default: off, in ProMoE "
        "on.",
    )


def add_router_flags(moe: FlagGroup) -> None:
    """Add the flags that say who chooses whom, by what and with which weight."""
    moe.add(
        "--affinity",
        choices=("softmax", "sigmoid", "cosine"),
        help="How well a token suits an expert: of the logits, or by prototypes. Default: "
        "softmax, in ProMoE cosine.",
    )
    moe.add(
        "--selection",
        choices=("token_choice", "expert_choice", "batch_choice"),
        help="Who chooses: a token its experts, or an expert its tokens of an image or of the "
        "batch. Default: token_choice, in later families their own.",
    )
    moe.add(
        "--capacity",
        type=number(float, 0, 4096),
        metavar="K",
        help="Where experts choose, the mean number of experts of a token. Default: "
        "--num-experts-per-tok, as 0.",
    )
    moe.add(
        "--exact-thresholds",
        **flag,
        help="Sample with the tokens above the thresholds of batch_choice, not with as many. "
        "Default: off.",
    )
    moe.add(
        "--norm-topk-prob",
        **flag,
        help="Scale the weights of a token's experts to sum to 1. Default: off.",
    )
    moe.add(
        "--routed-scaling-factor",
        type=number(float, 1e-6, 1e6),
        metavar="FACTOR",
        help="Factor of all routed experts' weights. Default: 1.",
    )


def add_balance_flag(moe: FlagGroup) -> None:
    """Add the flag of the balance terms, without their weights."""
    moe.add(
        "--balance",
        nargs="+",
        choices=(*BALANCE_TERMS, "none"),
        help="What evens the load, one or several; bias moves with the load and has no loss. "
        "Default: switch, in later families contrastive or none.",
    )


def _add_balance_flags(moe: FlagGroup) -> None:
    moe.add(
        "--aux-loss-weight",
        type=number(float, 0),
        default=0.005,
        metavar="WEIGHT",
        help="Weight of each layer's load balancing loss beside the objective's loss.",
    )
    moe.add(
        "--contrastive-loss-weight",
        type=number(float, 0),
        default=1.0,
        metavar="WEIGHT",
        help="Weight of each layer's routing contrastive loss.",
    )
    moe.add(
        "--z-loss-weight",
        type=number(float, 0),
        default=0.001,
        metavar="WEIGHT",
        help="Weight of each layer's router z-loss.",
    )
    moe.add(
        "--capacity-loss-weight",
        type=number(float, 0),
        default=0.01,
        metavar="WEIGHT",
        help="Weight of the loss of each layer's capacity predictor, which batch_choice has.",
    )
    moe.add(
        "--bias-update-rate",
        type=number(float, 0, 1000),
        default=0.001,
        metavar="RATE",
        help="Step by which an optimizer step moves a router's bias against its expert's load.",
    )
    moe.add(
        "--aux-loss-scope",
        choices=("global", "rank"),
        default="global",
        help="Tokens whose statistics are balanced: of all ranks together, or of each by itself.",
    )


def _add_batch_flags(train: FlagGroup) -> None:
    train.add(
        "--rf",
        default=False,
        **flag,
        help="Train with rectified flow, not with DDPM's noise prediction.",
    )
    train.add(
        "--time-scale",
        type=number(float, 1, 1000),
        metavar="SCALE",
        help="What rectified flow multiplies its time with for the model, 1 or, in later families, "
        "1000. Default: that of --init-from, else 1.",
    )
    train.add(
        "--global-batch-size",
        "--train_batch_size",
        type=number(int, 1, 10_000_000),
        default=256,
        metavar="N",
        help="Number of images in an optimizer step, over all ranks.",
    )
    train.add(
        "--micro-batch-size",
        type=number(int, 1, 1_000_000),
        metavar="N",
        help="Number of images in a rank's forward pass. Default: a step's share of the rank "
        "divided by --accum-steps.",
    )
    train.add(
        "--accum-steps",
        "--accum_iter",
        type=number(int, 1, 1_000_000),
        metavar="N",
        help="Number of forward passes of a rank in an optimizer step. Default: as many as "
        "--micro-batch-size needs, 1 without it.",
    )


def _add_course_flags(run: FlagGroup) -> None:
    run.add(
        "--results-dir", default="results", metavar="FOLDER", help="Folder that all runs are in."
    )
    run.add(
        "--run-name",
        metavar="NAME",
        help="Folder of this run in --results-dir. Default: from the model, the data, the seed, "
        "the rate and whatever else makes it another run.",
    )
    run.add(
        "--resume",
        default="auto",
        metavar="FROM",
        help="Checkpoint to go on from: auto takes the run's last, never insists on a new run, "
        "and a file or folder goes back to that one.",
    )
    run.add(
        "--allow-new-data",
        default=False,
        **flag,
        help="Go on with a run although its images or classes are not those it began with.",
    )
    run.add(
        "--epochs",
        type=number(int, 1),
        default=1400,
        metavar="N",
        help="Number of passes over the data after which the run ends.",
    )
    run.add(
        "--max-steps",
        type=number(int, 1),
        metavar="STEPS",
        help="Optimizer steps after which the run ends, if --epochs does not end it before. "
        "Default: no limit.",
    )
    run.add(
        "--seed",
        "--global-seed",
        "--global_seed",
        type=seed,
        default=0,
        metavar="N",
        help="Seed of the weights, the order of the images, noise, times and label drops.",
    )


def _add_output_flags(run: FlagGroup) -> None:
    run.add(
        "--log-every",
        type=number(int, 1),
        default=100,
        metavar="STEPS",
        help="Optimizer steps between two points of the curves.",
    )
    run.add(
        "--ckpt-every",
        type=number(int, 1),
        default=5000,
        metavar="STEPS",
        help="Optimizer steps between two checkpoints; the last step is saved too.",
    )
    run.add(
        "--keep-last",
        type=number(int, 0),
        default=3,
        metavar="N",
        help="Number of checkpoints kept, the last ones; 0 keeps all.",
    )
    run.add(
        "--sample-every",
        type=number(int, 0),
        default=5000,
        metavar="STEPS",
        help="Optimizer steps between two grids of samples; 0 draws none.",
    )
    run.add(
        "--sample-cfg-scale",
        type=number(float, 0),
        default=1.5,
        metavar="SCALE",
        help="Scale of classifier-free guidance in these grids; 1 turns it off.",
    )
    run.add(
        "--dry-run",
        default=False,
        **flag,
        help="Print the settings and the number of parameters, then stop; nothing is written.",
    )
