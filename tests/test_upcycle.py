"""Upcycled networks give the source's output, train apart, and never leave half a folder."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from helpers import TINY, moe_of, random_model, refusal, run_main
from torch import Tensor

import upcycle
from checkpoint.layouts import to_published
from checkpoint.state import save_safetensors
from checkpoint.weights import load_model, load_settings, open_weights
from common.errors import FileError, UserError
from models import DiT, DiTConfig, GeluExperts
from training.flags import build_parser as training_parser
from training.initial import initial_weights
from training.job import build_model, prepare

GOLDEN = Path(__file__).parent / "golden"


def inputs(config: DiTConfig) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (3, config.in_channels, config.input_size, config.input_size)
    labels = torch.arange(3) % config.num_classes
    return torch.randn(shape, generator=generator), torch.tensor([0.1, 0.5, 0.9]), labels


@torch.no_grad()
def relative_difference(source: DiT, result: DiT) -> float:
    given = inputs(source.config)
    expected = source(*given)
    return ((result(*given) - expected).norm() / expected.norm()).item()


def run(source: Path, out: Path, *flags: str, config: DiTConfig | None = None) -> list[float]:
    """Upcycle as the command does; returns the differences of the MLPs."""
    args = upcycle.build_parser().parse_args(["--ckpt", str(source), "--out", str(out), *flags])
    return upcycle.upcycle(open_weights(source, config=config), args)[1]


@pytest.fixture
def golden(tmp_path: Path) -> tuple[Path, DiTConfig, dict[str, Any]]:
    """Write the golden dense network as the published file; returns path, config and tensors."""
    data = torch.load(GOLDEN / "dense_dit.pt", weights_only=True)
    torch.save(data["state_dict"], tmp_path / "dense.pt")
    config = DiTConfig(**data["config"], num_experts=0, mlp_type="gelu")
    return tmp_path / "dense.pt", config, data


def save(model: DiT, path: Path) -> Path:
    save_safetensors(path, model.state_dict(), model.config, {"objective": "rf"})
    return path


@pytest.mark.parametrize("num_experts", [4, 8, 16])
@pytest.mark.parametrize("active", [1, 2])
def test_the_golden_dense_network_keeps_its_output(
    golden: tuple[Path, DiTConfig, dict[str, Any]], num_experts: int, active: int
) -> None:
    source, config, data = golden
    out = source.parent / "moe"
    flags = ("--num-experts", str(num_experts), "--num-experts-per-tok", str(active))
    differences = run(source, out, *flags, config=config)
    model = load_model(out)
    assert isinstance(moe_of(model).experts, GeluExperts)
    with torch.no_grad():
        found = model(data["x"], data["t"], data["y"])
    torch.testing.assert_close(found, data["outputs"]["forward"], rtol=0, atol=1e-5)
    assert max(differences) < 1e-6


@pytest.mark.parametrize(
    "flags",
    [
        ("--granularity", "2", "--num-experts", "8", "--num-experts-per-tok", "4"),
        ("--granularity", "4", "--num-experts", "8"),
        ("--num-shared-experts", "2"),
        ("--num-shared-experts", "2", "--shared", "split"),
        ("--num-shared-experts", "1", "--shared", "split", "--granularity", "3", "--num-experts",
         "6"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("mlp_type", ["gelu", "swiglu"])
def test_finer_and_shared_experts_keep_the_output(
    tmp_path: Path, mlp_type: str, flags: tuple[str, ...]
) -> None:
    source = random_model(
        DiTConfig.from_dict({**TINY.to_dict(), "num_experts": 0, "mlp_type": mlp_type})
    )
    differences = run(save(source, tmp_path / "dense.safetensors"), tmp_path / "moe", *flags)
    result = load_model(tmp_path / "moe")
    assert relative_difference(source, result) < 1e-5
    assert max(differences) < 1e-5
    assert result.num_parameters()[0] > source.num_parameters()[0]


def test_a_diffusers_folder_keeps_its_output(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense: Any = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2,
        sample_size=8, patch_size=2, num_embeds_ada_norm=3,
    )  # fmt: skip
    first, second = (block.norm1.emb for block in dense.transformer_blocks)
    second.load_state_dict(first.state_dict())  # as in published folders
    dense.save_pretrained(tmp_path / "dense")
    run(tmp_path / "dense", tmp_path / "moe", "--num-experts", "4")
    difference = relative_difference(load_model(tmp_path / "dense"), load_model(tmp_path / "moe"))
    assert difference < 1e-5


def test_finer_experts_of_a_moe_keep_the_output(tmp_path: Path) -> None:
    source = random_model(TINY)
    flags = ("--num-experts", "8", "--granularity", "2")
    run(save(source, tmp_path / "moe4.safetensors"), tmp_path / "moe8", *flags)
    result = load_model(tmp_path / "moe8")
    assert result.config.num_experts_per_tok == 4
    assert relative_difference(source, result) < 1e-5


def test_copied_experts_of_a_moe_serve_a_side_each_and_nearly_keep_the_output(
    tmp_path: Path,
) -> None:
    source = random_model(TINY)
    torch.save(dict(to_published(source.state_dict(), flash_attention=True)), tmp_path / "x.pt")
    flags = ("--num-experts", "8", "--check-tokens", "1000")
    differences = run(tmp_path / "x.pt", tmp_path / "moe8", *flags, config=TINY)
    result = load_model(tmp_path / "moe8")
    assert result.config.num_experts_per_tok == 2 and not result.config.norm_topk_prob
    assert 1e-4 < max(differences) < 0.1  # tokens near the border between two copies
    x = torch.randn(400, 32)
    chosen = moe_of(result).router(x[None]).expert_indices
    assert len(set(chosen.flatten().tolist())) == 8


def test_noise_changes_the_output_and_says_by_how_much(tmp_path: Path) -> None:
    source = random_model(DiTConfig.from_dict({**TINY.to_dict(), "num_experts": 0}))
    path = save(source, tmp_path / "dense.safetensors")
    differences = run(path, tmp_path / "noisy", "--noise", "0.1", "--num-experts-per-tok", "2")
    assert 0.01 < max(differences) < 0.2
    experts = moe_of(load_model(tmp_path / "noisy")).experts.down_proj
    changed = (experts[0] != source.state_dict()["blocks.0.mlp.down_proj.weight"]).float().mean()
    assert 0.45 < changed.item() < 0.55  # --noise-share


def test_all_experts_of_the_upcycled_golden_network_train_apart(
    golden: tuple[Path, DiTConfig, dict[str, Any]],
) -> None:
    source, config, data = golden
    out = source.parent / "moe"
    run(source, out, "--num-experts", "8", "--num-shared-experts", "1", config=config)
    model = load_model(out).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    torch.manual_seed(0)
    touched = [torch.zeros(8, dtype=torch.bool) for _ in model.blocks]
    for _ in range(50):
        x, y = torch.randn(8, *data["x"].shape[1:]), torch.randint(config.num_classes, (8,))
        prediction, aux_losses = model(x, torch.rand(8), y)
        loss = (prediction[:, : x.shape[1]] - x).square().mean() + 0.005 * aux_losses["switch"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for i, seen in enumerate(touched):
            seen |= moe_of(model, i).experts.up_proj.grad.flatten(1).norm(dim=1) > 0
    for i, seen in enumerate(touched):
        assert seen.all()
        weights = moe_of(model, i).experts.up_proj.flatten(1)
        apart = torch.cdist(weights, weights) + torch.eye(8)
        assert apart.min() > 1e-3
        assert moe_of(model, i).shared_experts.fc2.weight.abs().max() > 0


def test_the_result_starts_a_training_run_whose_flags_do_not_tell_its_mlps(tmp_path: Path) -> None:
    dense = DiTConfig(
        input_size=8, in_channels=1, hidden_size=96, depth=4, num_heads=4, num_classes=10,
        num_experts=0, mlp_type="gelu", patch_size=2,
    )  # fmt: skip
    run(save(random_model(dense), tmp_path / "dense.safetensors"), tmp_path / "moe")
    flags = ["--data-path", "digits", "--init-from", str(tmp_path / "moe"), "--num-classes", "10"]
    args = training_parser(None).parse_args([*flags, "--model", "DiT-Ti/2"])
    job = prepare(args, meta=True)
    model, settings, result = job.model, job.settings, load_model(tmp_path / "moe")
    assert model.config == result.config and model.config.norm_topk_prob
    first = dict(
        initial_weights(settings, model.config, {n: p.shape for n, p in model.named_parameters()})
    )
    torch.testing.assert_close(first, dict(result.state_dict()), rtol=0, atol=0)
    other = dataclasses.replace(settings, model="DiT-Ti/4", init_strict=True)
    with pytest.raises(ValueError, match=r"moe has patch_size 2, this run 4.*DiT-Ti/4"):
        build_model(other, 1, 1)


@pytest.mark.parametrize("flash_attention", [True, False])
def test_the_name_of_the_size_is_enough_for_a_published_file_without_a_config(
    tmp_path: Path, flash_attention: bool
) -> None:
    """DiT-Ti is of no published width, so shapes do not tell its heads."""
    config = DiTConfig(
        input_size=8, in_channels=1, hidden_size=96, depth=4, num_heads=4, num_classes=10,
        num_experts=4, mlp_ratio=1.0, patch_size=2,
    )  # fmt: skip
    model, path = random_model(config), tmp_path / "published.pt"
    torch.save(dict(to_published(model.state_dict(), flash_attention=flash_attention)), path)
    flags = ["--ckpt", str(path), "--out", str(tmp_path / "moe")]
    with pytest.raises((SystemExit, ValueError), match=r"num_heads can't be told .*give --model"):
        run_main(upcycle, *flags)
    run_main(upcycle, *flags, "--model", "DiT-Ti/2")
    assert load_model(tmp_path / "moe").config.num_heads == 4
    flags = ["--data-path", "digits", "--init-from", str(path), "--model", "DiT-Ti/2"]
    job = prepare(training_parser(None).parse_args(flags), meta=True)
    shapes = {name: p.shape for name, p in job.model.named_parameters()}
    first = dict(initial_weights(job.settings, job.model.config, shapes))
    torch.testing.assert_close(first, dict(model.state_dict()), rtol=0, atol=0)


def test_weights_are_split_into_files_with_an_index_and_cast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("checkpoint.hub.SHARD_BYTES", 40_000)
    source = random_model(TINY)
    path = save(source, tmp_path / "moe4.safetensors")
    run(path, tmp_path / "moe", "--dtype", "bfloat16", "--num-experts", "4")
    names = sorted(file.name for file in (tmp_path / "moe").iterdir())
    assert names == [
        "README.md",
        "config.json",
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
    ]
    assert load_settings(tmp_path / "moe")["objective"] == "rf"
    for name, tensor in load_model(tmp_path / "moe").state_dict().items():
        kept = name.endswith(("pos_embed", "router.weight"))
        assert tensor.dtype == (torch.float32 if kept else torch.bfloat16), name
        assert torch.equal(tensor, source.state_dict()[name].to(tensor.dtype)), name


def test_it_refuses_to_overwrite_and_an_interruption_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(random_model(TINY), tmp_path / "moe4.safetensors")
    monkeypatch.setattr("checkpoint.hub.SHARD_BYTES", 1)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("upcycle.mlp_difference", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [path]
    (tmp_path / "out").mkdir()
    with pytest.raises(OSError, match="out exists already"):
        run(path, tmp_path / "out")


@pytest.mark.parametrize(
    ("num_experts", "flags", "message"),
    [
        (4, ("--num-experts", "6"), r"--num-experts 6 must be a multiple of 4"),
        (4, ("--num-experts-per-tok", "1"), "--num-experts-per-tok 1: .* gives 2"),
        (4, ("--num-shared-experts", "1"), "--num-shared-experts 1: the source has 2"),
        (0, ("--num-experts-per-tok", "3", "--granularity", "2"), "must be a multiple of --gran"),
        (0, ("--shared", "split"), "--shared split with --num-shared-experts 0: expected 1 to 3"),
        (0, ("--granularity", "3", "--num-experts", "6"), "3 does not divide the 128 neurons"),
    ],
)
def test_flags_that_do_not_fit_are_named(
    tmp_path: Path, num_experts: int, flags: tuple[str, ...], message: str
) -> None:
    model = random_model(DiTConfig.from_dict({**TINY.to_dict(), "num_experts": num_experts}))
    path = save(model, tmp_path / "source.safetensors")
    with pytest.raises(ValueError, match=message):
        run(path, tmp_path / "out", *flags)
    assert list(tmp_path.iterdir()) == [path]


def test_what_fits_no_memory_or_no_disk_is_refused_before_a_byte_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(random_model(TINY), tmp_path / "moe4.safetensors")
    with pytest.raises(UserError, match="--num-experts 1000000000, of which one block needs"):
        run(path, tmp_path / "out", "--num-experts", "1000000000")
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: free)
    with pytest.raises(FileError, match=r"--out .*out: the experts take 0\.0 GB, 0\.0 are free"):
        run(path, tmp_path / "out", "--num-experts", "8")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("value", "flags", "message"),
    [
        (float("nan"), (), "NaN|no torch.float32 numbers"),
        (1e5, ("--dtype", "float16"), "block 1: moe.experts.down_proj .* no torch.float16 numbers"),
    ],
)
def test_weights_that_are_no_numbers_are_not_copied(
    tmp_path: Path, value: float, flags: tuple[str, ...], message: str
) -> None:
    source = random_model(TINY)
    with torch.no_grad():
        moe_of(source, 1).experts.down_proj[3, 2, 1] = value
    path = save(source, tmp_path / "moe4.safetensors")
    with pytest.raises(UserError, match=message):
        run(path, tmp_path / "out", *flags)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "mixture",
    [
        {"affinity": "cosine"},
        {"selection": "expert_choice", "balance": ()},
        {"balance": ("bias",)},
        {"unconditional_expert": True},
        {"moe_blocks": "every_second"},
        {"first_k_dense_replace": 1},
    ],
)
def test_other_mixtures_than_dit_moe_are_refused(tmp_path: Path, mixture: dict[str, Any]) -> None:
    path = save(
        random_model(DiTConfig(**{**TINY.to_dict(), **mixture})), tmp_path / "x.safetensors"
    )
    with pytest.raises(UserError, match="only DiT-MoE is upcycled"):
        run(path, tmp_path / "out", "--num-experts", "8")


def test_the_command_says_in_one_line_what_is_wrong(tmp_path: Path) -> None:
    path = save(random_model(TINY), tmp_path / "moe4.safetensors")
    (tmp_path / "file").write_text("mine")
    for arguments, said in (
        (("--out", str(tmp_path / "file")), "exists already"),
        (("--out", str(tmp_path / "file" / "out")), str(tmp_path / "file")),
        (("--out", str(tmp_path / "out"), "--num-experts", "6"), "must be a multiple of 4"),
        (("--out", str(tmp_path / "out"), "--router-scale", "inf"), "inf is not in"),
        (("--out", str(tmp_path / "out"), "--seed", "99999999999999999999"), "--seed"),
    ):
        assert said in refusal("upcycle.py", "--ckpt", path, *arguments)
    assert (tmp_path / "file").read_text() == "mine" and not (tmp_path / "out").exists()


def test_parts_lie_where_the_formula_says(tmp_path: Path) -> None:
    """Expert (e C + c) G + g is part g of copy c of expert e."""
    source = random_model(TINY)
    path = save(source, tmp_path / "moe4.safetensors")
    run(path, tmp_path / "out", "--num-experts", "16", "--granularity", "2")
    old, new = (
        moe_of(source).experts.down_proj,
        moe_of(load_model(tmp_path / "out")).experts.down_proj,
    )
    C, G, F = 2, 2, old.shape[2] // 2
    for e in range(4):
        for c in range(C):
            for g in range(G):
                part = new[(e * C + c) * G + g]
                assert torch.equal(part, G * old[e, :, g * F : (g + 1) * F])
