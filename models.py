"""The DiT-MoE network: a diffusion transformer whose MLPs are sparse mixtures of experts.

In the order data flows: `DiTConfig`, embedders, attention, router, experts, `MoE`, `DiTBlock`,
`FinalLayer`, `DiT`, and the registry of sizes `DiT_models`.

Shapes: N batch, C channels, H W latent size, P patch, T tokens per image, M = N*T tokens,
D hidden, F expert hidden, E experts, K experts per token.

Source: Fei et al., arXiv:2407.11633 (DiT-MoE); Peebles & Xie, arXiv:2212.09748 (DiT).
"""

import dataclasses
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin, save_torch_state_dict, snapshot_download
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_ops import exact_linear, gelu_experts, swiglu, swiglu_experts


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Everything that decides the parameters of a `DiT` and what they compute.

    Raises:
        ValueError: if a field is out of range or two fields do not fit together.
    """

    input_size: int = 32  # H = W of the latents
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_ratio: float = 4.0  # F / D
    num_classes: int = 1000
    class_dropout_prob: float = 0.1
    num_experts: int = 8  # 0: every block has one dense MLP instead
    num_experts_per_tok: int = 2
    num_shared_experts: int = 2  # one always-on MLP of hidden width num_shared_experts * D
    norm_topk_prob: bool = False  # scale the K router weights of a token to sum to 1
    learn_sigma: bool = True  # twice the output channels; DDPM reads them as the variance
    qk_norm: bool = False
    mlp_type: Literal["swiglu", "gelu"] = (
        "swiglu"  # "gelu" has biases, as in the dense DiT; of experts too
    )

    def __post_init__(self) -> None:
        def require(ok: bool, message: str) -> None:
            if not ok:
                raise ValueError(f"DiTConfig: {message}")

        positive = ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads")
        for name in (*positive, "num_classes"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        require(
            self.input_size % self.patch_size == 0,
            f"input_size={self.input_size} is not a multiple of patch_size={self.patch_size}",
        )
        require(
            self.hidden_size % self.num_heads == 0 and self.hidden_size % 4 == 0,
            f"hidden_size={self.hidden_size} must be a multiple of 4 and of "
            f"num_heads={self.num_heads}",
        )
        require(
            0.0 <= self.class_dropout_prob < 1.0,
            f"class_dropout_prob={self.class_dropout_prob} must be in [0, 1)",
        )
        require(self.mlp_hidden_size >= 1, f"mlp_ratio={self.mlp_ratio} must be positive")
        require(self.num_experts >= 0, f"num_experts={self.num_experts} must be 0 (dense) or more")
        if self.num_experts:  # rows of experts' matmuls start at multiples of 16 bytes on a GPU
            step, width = 8, self.mlp_hidden_size
            nearest = max(round(width / step), 1) * step
            require(
                self.hidden_size % step == 0,
                f"hidden_size={self.hidden_size} must be a multiple of {step} for experts",
            )
            require(
                width % step == 0,
                f"mlp_ratio={self.mlp_ratio} makes experts {width} wide, which must be a multiple "
                f"of {step}: --mlp-ratio {nearest / self.hidden_size:.6g} makes {nearest}",
            )
        require(
            self.num_experts == 0 or 1 <= self.num_experts_per_tok <= self.num_experts,
            f"num_experts_per_tok={self.num_experts_per_tok} must be in [1, num_experts="
            f"{self.num_experts}]",
        )
        require(
            self.num_shared_experts >= 0,
            f"num_shared_experts={self.num_shared_experts} must be at least 0",
        )
        require(
            self.mlp_type in ("swiglu", "gelu"),
            f"mlp_type={self.mlp_type!r} must be 'swiglu' or 'gelu'",
        )

    @property
    def null_label(self) -> int:
        """Label of the unconditional class, the last row of the label table."""
        return self.num_classes

    @property
    def out_channels(self) -> int:
        """Channels of the prediction: 2C with a learned variance, else C."""
        return self.in_channels * 2 if self.learn_sigma else self.in_channels

    @property
    def num_patches(self) -> int:
        """T, tokens of one image."""
        return (self.input_size // self.patch_size) ** 2

    @property
    def mlp_hidden_size(self) -> int:
        """F, the hidden width of one routed expert or of the dense MLP."""
        return round(self.hidden_size * self.mlp_ratio)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain Python values, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "DiTConfig":
        """Build a config from `to_dict`'s result.

        Raises:
            ValueError: on a field this version does not know.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise ValueError(f"unknown DiTConfig fields {unknown}; known: {sorted(known)}")
        return cls(**fields)


# ------------------------------------------------------------------------------ embedders


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Embed times as cosines and sines of geometric frequencies.

    Args:
        t: (N,) times: DDPM 0..999, rectified flow [0, 1], unscaled in both cases.
        dim: even width of the embedding.
        max_period: longest period over 2 pi.

    Returns:
        (N, dim) fp32: cos first, then sin.
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t.float()[:, None] * torch.exp(-math.log(max_period) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class PatchEmbedder(nn.Module):
    """Images to tokens: one linear map of every P x P patch, row by row."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        channels, patch_size = config.in_channels, config.patch_size
        self.proj = nn.Conv2d(channels, config.hidden_size, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, T, D)."""
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Times to vectors: sinusoids, then a two-layer MLP."""

    def __init__(self, hidden_size: int, frequency_size: int = 256) -> None:
        super().__init__()
        self.frequency_size = frequency_size
        first = nn.Linear(frequency_size, hidden_size)
        self.mlp = nn.Sequential(first, nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        """Map (N,) times to (N, D)."""
        dtype = next(self.parameters()).dtype
        return self.mlp(timestep_embedding(t, self.frequency_size).to(dtype))


class LabelEmbedder(nn.Module):
    """Class labels to vectors; in training a share of them becomes the null label."""

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float) -> None:
        super().__init__()
        self.null_label = num_classes
        self.dropout_prob = dropout_prob
        # nn.Embedding's own drawing loads torch's compiler on the meta device: seconds
        table = torch.empty(num_classes + 1, hidden_size)
        self.embedding_table = nn.Embedding.from_pretrained(table, freeze=False)

    def forward(self, y: Tensor, drop_mask: Tensor | None = None) -> Tensor:
        """Map (N,) labels to (N, D).

        Args:
            y: (N,) int64, in [0, num_classes].
            drop_mask: (N,) bool, labels to drop; drawn with `dropout_prob` in training if absent.
        """
        if drop_mask is None and self.training and self.dropout_prob > 0:
            drop_mask = torch.rand(y.shape, device=y.device) < self.dropout_prob
        if drop_mask is not None:
            y = torch.where(drop_mask, self.null_label, y)
        return self.embedding_table(y)


# ------------------------------------------------------------------------------ attention


class Attention(nn.Module):
    """Multi-head self-attention; which kernel runs changes neither parameters nor output.

    torch's `scaled_dot_product_attention`, but for two cases: the flash-attn package on a GPU, if
    asked for and in half formats, which are all it takes, and plain matmuls for bfloat16 on a CPU,
    where they take 0.7 of the time.
    """

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, hidden_size // num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm = nn.LayerNorm(self.head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.use_flash_attn = False  # set by DiT.use_flash_attn

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, T, D) to (N, T, D)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)  # (N, T, heads, d)
        if self.use_flash_attn and v.dtype != torch.float32:  # an EMA draws without autocast
            from flash_attn import flash_attn_func

            return self.proj(flash_attn_func(q, k, v).flatten(2))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (N, heads, T, d)
        plain = x.device.type == "cpu" and v.dtype == torch.bfloat16
        attend = plain_attention if plain else F.scaled_dot_product_attention
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend by two matmuls that hold all (T, T) scores; (N, heads, T, d) each."""
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
    return scores.softmax(dim=-1) @ v


# ------------------------------------------------------------------------------ mixture of experts


class Routing(NamedTuple):
    """Router decision for M tokens."""

    expert_indices: Tensor  # (M, K) int64, in [0, E)
    expert_weights: Tensor  # (M, K) fp32, in (0, 1]: the probs, or with norm_topk_prob their share
    probs: Tensor  # (M, E) fp32, rows sum to 1
    aux_loss: Tensor  # () fp32, 1.0 when every expert gets the same load; 0 outside training


def load_balancing_loss(probs: Tensor, expert_indices: Tensor) -> Tensor:
    """Auxiliary loss that pushes the router towards an even load: E * sum_e f_e * P_e.

    Args:
        probs: (M, E) router probabilities; gradients flow through these only.
        expert_indices: (M, K) experts actually chosen.

    Returns:
        () fp32, unweighted. 1.0 for an even load, E if one expert takes everything.

    Source: Switch Transformer, arXiv:2101.03961, sec. 2.2, counting all K choices.
    """
    num_experts = probs.shape[-1]
    load = F.one_hot(expert_indices.flatten(), num_experts).float().mean(dim=0)  # f: (E,)
    importance = probs.mean(dim=0)  # P: (E,)
    return num_experts * (load * importance).sum()


class TopKRouter(nn.Module):
    """Choose K of E experts for each token: softmax over all experts, then top-K."""

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        num_experts_per_tok: int,
        norm_topk_prob: bool = False,
    ) -> None:
        super().__init__()
        self.num_experts, self.num_experts_per_tok = num_experts, num_experts_per_tok
        self.norm_topk_prob = norm_topk_prob
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))

    def forward(self, x: Tensor) -> Routing:
        """Route (M, D) tokens, in float32: bfloat16 logits tie and flip choices between experts."""
        with torch.autocast(x.device.type, enabled=False):
            probs = exact_linear(x.float(), self.weight.float()).softmax(dim=-1)  # (M, E)
        weights, indices = probs.topk(self.num_experts_per_tok, dim=-1, sorted=False)
        if self.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        aux_loss = load_balancing_loss(probs, indices) if self.training else probs.new_zeros(())
        return Routing(indices, weights, probs, aux_loss)


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Return autocast's dtype where it is on (it does not reach custom ops), else the weight's."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) without biases; gate and up are one matmul."""

    def __init__(self, hidden_size: int, mlp_hidden_size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden_size, 2 * mlp_hidden_size, bias=False)
        self.down_proj = nn.Linear(mlp_hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        weight, dtype = self.gate_up_proj.weight, compute_dtype(self.gate_up_proj.weight)
        return swiglu(x.to(dtype), weight, self.down_proj.weight)


class GeluMLP(nn.Module):
    """fc2(gelu(fc1(x))) with biases, the dense DiT's MLP."""

    def __init__(self, hidden_size: int, mlp_hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_hidden_size)
        self.fc2 = nn.Linear(mlp_hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def build_mlp(config: DiTConfig, mlp_hidden_size: int) -> Any:
    """Return a dense MLP of the config's form: (..., D) to (..., D)."""
    if config.mlp_type == "swiglu":
        return SwiGLU(config.hidden_size, mlp_hidden_size)
    return GeluMLP(config.hidden_size, mlp_hidden_size)


class Experts(nn.Module):
    """E SwiGLU experts held as stacked matrices."""

    def __init__(self, num_experts: int, hidden_size: int, mlp_hidden_size: int) -> None:
        super().__init__()
        # gate rows [:F] above up rows [F:]
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * mlp_hidden_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, mlp_hidden_size))

    def forward(self, x: Tensor, expert_indices: Tensor, expert_weights: Tensor) -> Tensor:
        """Send (M, D) tokens through their (M, K) experts; returns the (M, D) weighted sum."""
        x = x.to(compute_dtype(self.down_proj))
        return swiglu_experts(x, self.gate_up_proj, self.down_proj, expert_indices, expert_weights)


class GeluExperts(nn.Module):
    """E experts of the dense DiT's form, down(gelu(up(x))) with biases, held as stacked tensors."""

    def __init__(self, num_experts: int, hidden_size: int, mlp_hidden_size: int) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.empty(num_experts, mlp_hidden_size, hidden_size))
        self.up_bias = nn.Parameter(torch.empty(num_experts, mlp_hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, mlp_hidden_size))
        self.down_bias = nn.Parameter(torch.empty(num_experts, hidden_size))

    def forward(self, x: Tensor, expert_indices: Tensor, expert_weights: Tensor) -> Tensor:
        """Send (M, D) tokens through their (M, K) experts; returns the (M, D) weighted sum."""
        x = x.to(compute_dtype(self.down_proj))
        weights = (self.up_proj, self.up_bias, self.down_proj, self.down_bias)
        return gelu_experts(x, *weights, expert_indices, expert_weights)


class MoE(nn.Module):
    """Sparse MLP: K routed experts per token plus shared experts that see every token.

    Source: arXiv:2407.11633, sec. 2.2.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.router = TopKRouter(
            config.hidden_size,
            config.num_experts,
            config.num_experts_per_tok,
            config.norm_topk_prob,
        )
        experts: Any = Experts if config.mlp_type == "swiglu" else GeluExperts
        self.experts = experts(config.num_experts, config.hidden_size, config.mlp_hidden_size)
        self.shared_experts = (
            build_mlp(config, config.num_shared_experts * config.hidden_size)
            if config.num_shared_experts
            else None
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (N, T, D) tokens to ((N, T, D), aux_loss ())."""
        tokens = x.flatten(0, 1)  # (M, D)
        routing = self.router(tokens)
        out = self.experts(tokens, routing.expert_indices, routing.expert_weights).view_as(x)
        if self.shared_experts is not None:
            out = out + self.shared_experts(x.to(next(self.shared_experts.parameters()).dtype))
        return out, routing.aux_loss


# ------------------------------------------------------------------------------ transformer


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale and shift (N, T, D) tokens by one (N, D) vector per image."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


class DiTBlock(nn.Module):
    """Transformer block with adaLN-Zero conditioning.

    The residual stream and the norms stay in float32; attention and experts run in the dtype of
    their weights, or autocast's.

    Source: arXiv:2212.09748, sec. 3.2.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        hidden_size = config.hidden_size
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, config.num_heads, config.qk_norm)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.is_moe = config.num_experts > 0
        if self.is_moe:
            self.moe = MoE(config)
        else:
            self.mlp = build_mlp(config, config.mlp_hidden_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Map tokens (N, T, D) fp32 and conditioning (N, D) to (tokens, aux_loss ())."""
        dtype = self.attn.proj.weight.dtype
        modulation = self.adaLN_modulation(c).float().chunk(6, dim=-1)  # (N, D) each
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation
        attended = self.attn(modulate(self.norm1(x), shift_msa, scale_msa).to(dtype))
        x = torch.addcmul(x, gate_msa[:, None], attended.float())
        h = modulate(self.norm2(x), shift_mlp, scale_mlp)
        if self.is_moe:
            out, aux_loss = self.moe(h)
        else:
            out, aux_loss = self.mlp(h.to(dtype)), x.new_zeros(())
        return torch.addcmul(x, gate_mlp[:, None], out.float()), aux_loss


class FinalLayer(nn.Module):
    """adaLN, then one linear map from each token to its patch of the prediction."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        hidden_size = config.hidden_size
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Map tokens (N, T, D) and conditioning (N, D) to (N, T, P*P*C_out)."""
        shift, scale = self.adaLN_modulation(c).float().chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale).to(self.linear.weight.dtype))


class DiT(nn.Module, PyTorchModelHubMixin, library_name="dit-moe"):
    """Diffusion transformer with sparse mixtures of experts.

    In training mode it returns `(prediction, aux_loss)`, in eval mode the prediction alone.
    `from_pretrained`, `save_pretrained` and `push_to_hub` are huggingface_hub's, for folders and
    repositories of config.json and safetensors.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.settings: dict[str, Any] = {}  # saved with the weights: objective, VAE, class names
        self.grad_checkpointing = False
        self.x_embedder = PatchEmbedder(config)
        self.t_embedder = TimestepEmbedder(config.hidden_size)
        self.y_embedder = LabelEmbedder(
            config.num_classes, config.hidden_size, config.class_dropout_prob
        )
        # A Parameter, as published, so that it counts and is saved; the optimizer never sees it.
        self.pos_embed = nn.Parameter(
            torch.empty(1, config.num_patches, config.hidden_size), requires_grad=False
        )
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self.initialize_weights()

    @property
    def dtype(self) -> torch.dtype:
        """The weights' (router and position table may be in float32 beside half formats)."""
        return self.x_embedder.proj.weight.dtype

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Draw every parameter anew, in order, see `initialize_parameter`; on meta, nothing."""
        for name, parameter in self.named_parameters():
            if not parameter.is_meta:
                initialize_parameter(name, parameter)

    def use_flash_attn(self, enabled: bool = True) -> None:
        """Switch all attention to the flash-attn package (GPU, half precision) or back to torch's.

        Raises:
            ValueError: if the package is not installed.
        """
        if enabled:
            try:
                import flash_attn  # noqa: F401
            except ImportError:
                raise ValueError("--flash-attn needs the flash-attn package (CUDA only)") from None
        for module in self.modules():
            if isinstance(module, Attention):
                module.use_flash_attn = enabled

    def unpatchify(self, x: Tensor) -> Tensor:
        """Reassemble (N, T, P*P*C) tokens into (N, C, H, W)."""
        p, size = self.config.patch_size, self.config.input_size // self.config.patch_size
        x = x.unflatten(1, (size, size)).unflatten(-1, (p, p, -1))  # (N, h, w, P, P, C)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, drop_mask: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Predict noise (DDPM) or velocity (rectified flow).

        Args:
            x: (N, C, H, W) noisy latents.
            t: (N,) times as the objective defines them.
            y: (N,) int64 labels in [0, num_classes], num_classes being the null label.
            drop_mask: (N,) bool, labels to replace by the null label; in training drawn with
                `class_dropout_prob` when absent.

        Returns:
            Prediction (N, C_out, H, W); in training mode `(prediction, aux_loss)` with aux_loss ()
            the sum of the layers' balance losses (depth when every layer's load is even).
        """
        x = self.x_embedder(x.to(self.x_embedder.proj.weight.dtype)).float() + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y, drop_mask)  # (N, D)
        aux_losses = []
        for block in self.blocks:
            if self.grad_checkpointing and self.training:
                x, aux_loss = checkpoint(block, x, c, use_reentrant=False)
            else:
                x, aux_loss = block(x, c)
            aux_losses.append(aux_loss)
        prediction = self.unpatchify(self.final_layer(x, c))
        return (prediction, torch.stack(aux_losses).sum()) if self.training else prediction

    def num_parameters(self) -> tuple[int, int]:
        """Count parameters: (total, activated by one token), frozen position table included."""
        total = sum(p.numel() for p in self.parameters())
        routed = [m for m in self.modules() if isinstance(m, (Experts, GeluExperts))]
        experts = sum(p.numel() for module in routed for p in module.parameters())
        used_experts = experts * self.config.num_experts_per_tok // max(self.config.num_experts, 1)
        return total, total - experts + used_experts

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write safetensors of at most 5 GB each; the mixin writes config.json."""
        metadata = {"format": "pt", "settings": json.dumps(self.settings)}
        save_torch_state_dict(self.state_dict(), save_directory, metadata=metadata)

    @classmethod
    def _from_pretrained(  # type: ignore[override]
        cls,
        *,
        model_id: str,
        map_location: str = "cpu",
        strict: bool = True,
        config: DiTConfig,
        **download: Any,
    ) -> "DiT":
        """Load a local folder or a repository; on the CPU the weights stay mapped from the files.

        Args:
            model_id: folder or repository of config.json and model*.safetensors.
            map_location: device of the weights.
            strict: refuse missing and unknown weights.
            config: read from config.json by the mixin.
            **download: revision, cache_dir, force_download, local_files_only, token.
        """
        index = "model.safetensors.index.json"
        patterns = ["config.json", "model*.safetensors", index]
        if not Path(model_id).is_dir():
            model_id = snapshot_download(model_id, allow_patterns=patterns, **download)
        state: dict[str, Tensor] = {}
        metadata: dict[str, Any] = {}
        if (Path(model_id) / index).is_file():  # of several files, it alone has the metadata
            metadata = json.loads((Path(model_id) / index).read_text()).get("metadata", {})
        for file in sorted(Path(model_id).glob("model*.safetensors")):
            state |= load_file(file, device=map_location)
            with safe_open(file, framework="pt") as opened:
                metadata |= opened.metadata() or {}
        with torch.device("meta"):
            model = cls(config)
        model.settings = json.loads(metadata.get("settings", "{}"))
        model.load_state_dict(state, strict=strict, assign=True)
        return model.eval()


@torch.no_grad()
def initialize_parameter(name: str, parameter: Tensor, generator: Generator | None = None) -> None:
    """Fill one parameter of a `DiT`, every matrix as if it were its own `nn.Linear`, as published.

    Xavier-uniform linears, kaiming-uniform router, zero biases, normal(0.02) embeddings, and zero
    adaLN and output layers, so that every block starts as the identity (adaLN-Zero). One at a time
    and by name, so that a model which is never whole on one rank can be filled too.

    Args:
        name: in the state dict.
        parameter: of its whole shape; filled in place.
        generator: of the draws; the global one if absent.
    """
    if name == "pos_embed":
        parameter.copy_(sincos_pos_embed(math.isqrt(parameter.shape[1]), parameter.shape[2]))
    elif name.endswith("bias") or "adaLN_modulation" in name or name.startswith("final_layer"):
        nn.init.zeros_(parameter)
    elif name.endswith(("q_norm.weight", "k_norm.weight")):
        nn.init.ones_(parameter)
    elif name.startswith(("t_embedder", "y_embedder")):
        nn.init.normal_(parameter, std=0.02, generator=generator)
    elif name.endswith("router.weight"):
        nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=generator)
    else:  # linear maps: (E, O, I) of stacked experts, (D, C, P, P) over patches, else (O, I)
        matrices = parameter if ".experts." in name else [parameter.flatten(1)]
        for matrix in matrices:
            for half in matrix.chunk(2 if "gate_up_proj" in name else 1):
                nn.init.xavier_uniform_(half, generator=generator)


def sincos_pos_embed(size: int, hidden_size: int) -> Tensor:
    """Return the frozen (1, size*size, D) table: the column's sines and cosines, then the row's."""
    quarter = hidden_size // 4
    frequencies = 10_000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(size)[:, None] * frequencies  # (size, D/4)
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # (size, D/2)
    column, row = line.expand(size, -1, -1), line[:, None].expand(-1, size, -1)
    return torch.cat([column, row], dim=-1).view(1, size * size, hidden_size).float()


# ------------------------------------------------------------------------------ sizes

SIZES: dict[str, dict[str, Any]] = {
    "Ti": {"hidden_size": 96, "depth": 4, "num_heads": 4},  # for CPUs and tests, ours
    "S": {"hidden_size": 384, "depth": 12, "num_heads": 6},
    "B": {"hidden_size": 768, "depth": 12, "num_heads": 12},
    "L": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
    "XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16, "qk_norm": True},
    "G": {"hidden_size": 1408, "depth": 40, "num_heads": 16, "qk_norm": True, "num_experts": 16},
}
PATCH_SIZES: dict[str, tuple[int, ...]] = {
    "Ti": (1, 2, 4, 8),
    **dict.fromkeys(("S", "B", "L", "XL"), (2, 4, 8)),
    "G": (2,),
}


def _build(size: str, patch_size: int, **overrides: Any) -> DiT:
    return DiT(DiTConfig(**{**SIZES[size], "patch_size": patch_size, **overrides}))


DiT_models: dict[str, Callable[..., DiT]] = {
    f"DiT-{size}/{patch_size}": partial(_build, size, patch_size)
    for size, patch_sizes in PATCH_SIZES.items()
    for patch_size in patch_sizes
}
