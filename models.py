"""The DiT-MoE network: a diffusion transformer whose MLPs are sparse mixtures of experts.

In the order data flows: `DiTConfig`, precision, embedders, attention, router, experts, `MoE`,
`DiTBlock`, `FinalLayer`, `DiT`, and the registry of sizes `DiT_models`.

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

from moe_ops import (
    ExpertGroup,
    exact_linear,
    exchange,
    gather_over_ranks,
    gelu_experts,
    num_ranks,
    rank,
    sum_over_ranks,
    swiglu,
    swiglu_experts,
)

BALANCE_TERMS = ("switch", "contrastive", "z_loss", "bias")


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
    qk_norm_eps: float = 1e-6
    mlp_type: Literal["swiglu", "gelu"] = (
        "swiglu"  # "gelu" has biases, as in the dense DiT; of experts too
    )
    # The mixture as choices that do not depend on each other; the defaults are DiT-MoE's.
    affinity: Literal["softmax", "sigmoid", "cosine"] = "softmax"  # of a token to an expert
    selection: Literal["token_choice", "expert_choice", "batch_choice"] = "token_choice"
    capacity: float = 0.0  # where experts choose, the mean K; 0: num_experts_per_tok
    exact_thresholds: bool = False  # batch choice samples by thresholds alone, not by counts
    routed_scaling_factor: float = 1.0  # of all router weights
    balance: tuple[str, ...] = ("switch",)  # any of BALANCE_TERMS
    unconditional_expert: bool = False  # one more expert; it alone serves images without a class
    moe_blocks: Literal["all", "every_second", "deep_half"] = "all"  # the others are dense
    first_k_dense_replace: int = 0  # the first blocks, dense too
    dense_mlp_ratio: float = 4.0  # width of those blocks' MLP / D
    # What later recipes have; off, so that published weights stay exact.
    rope: bool = False  # turn queries and keys by their place, beside the table of positions
    norm: Literal["layer", "rms"] = "layer"  # of tokens, and of queries and keys

    def __post_init__(self) -> None:
        def require(ok: bool, message: str) -> None:
            if not ok:
                raise ValueError(f"DiTConfig: {message}")

        object.__setattr__(self, "balance", tuple(self.balance))  # JSON has lists
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
        self._check_mixture(require)

    def _check_mixture(self, require: Callable[[bool, str], None]) -> None:
        """Refuse choices of the mixture that are out of range or mean nothing together."""
        choices = {
            "affinity": ("softmax", "sigmoid", "cosine"),
            "selection": ("token_choice", "expert_choice", "batch_choice"),
            "moe_blocks": ("all", "every_second", "deep_half"),
            "norm": ("layer", "rms"),
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            require(value in allowed, f"{name}={value!r} must be one of {', '.join(allowed)}")
        for term in self.balance:
            known = ", ".join(BALANCE_TERMS)
            require(term in BALANCE_TERMS, f"balance={self.balance}: {term!r} is none of {known}")
        for name in ("routed_scaling_factor", "dense_mlp_ratio", "qk_norm_eps"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive")
        require(
            not self.rope or self.hidden_size // self.num_heads % 4 == 0,
            f"rope=True needs heads whose width is a multiple of 4, not "
            f"{self.hidden_size // self.num_heads}",
        )
        self._check_blocks(require)
        self._check_selection(require)

    def _check_blocks(self, require: Callable[[bool, str], None]) -> None:
        """Refuse choices of blocks that leave no mixture or need one."""
        first = self.first_k_dense_replace
        require(
            0 <= first < self.depth,
            f"first_k_dense_replace={first} must be in [0, depth={self.depth})",
        )
        require(
            first == 0 or self.moe_blocks == "all",
            f"first_k_dense_replace={first} needs moe_blocks='all', not {self.moe_blocks!r}",
        )
        require(
            self.moe_blocks == "all" or self.num_experts > 0,
            f"moe_blocks={self.moe_blocks!r} means nothing with num_experts=0",
        )
        require(
            self.moe_blocks != "every_second" or self.depth > 1,
            f"moe_blocks='every_second' leaves no mixture with depth={self.depth}",
        )
        require(
            not self.unconditional_expert or self.num_experts > 0,
            "unconditional_expert=True means nothing with num_experts=0",
        )

    def _check_selection(self, require: Callable[[bool, str], None]) -> None:
        """Refuse fields that mean nothing with who chooses whom."""
        selection = f"selection={self.selection!r}"
        by_token, of_batch = self.selection == "token_choice", self.selection == "batch_choice"
        require(
            self.capacity == 0 or not by_token,
            f"capacity={self.capacity} means nothing with {selection}, whose experts do not "
            "choose: give num_experts_per_tok",
        )
        require(
            0 <= self.capacity <= self.num_experts,
            f"capacity={self.capacity} must be in [0, num_experts={self.num_experts}]",
        )
        require(
            not self.exact_thresholds or of_batch,
            f"exact_thresholds=True means nothing with {selection}: only 'batch_choice' has them",
        )
        require(
            not (self.unconditional_expert and of_batch),
            f"unconditional_expert=True does not go with {selection}, whose share of the batch "
            "would depend on its labels",
        )
        for term in ("switch", "bias"):
            require(
                by_token or term not in self.balance,
                f"balance={self.balance}: {term!r} means nothing with {selection}, whose load "
                "is even",
            )
        require(
            self.affinity != "cosine" or "z_loss" not in self.balance,
            f"balance={self.balance}: 'z_loss' means nothing with affinity='cosine', which has "
            "no logits",
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

    @property
    def dense_hidden_size(self) -> int:
        """Hidden width of the MLP of a block without a mixture."""
        mixed = self.num_experts > 0
        return round(self.hidden_size * self.dense_mlp_ratio) if mixed else self.mlp_hidden_size

    @property
    def experts_per_token(self) -> float:
        """K, or where experts choose, its mean."""
        return self.capacity or self.num_experts_per_tok

    @property
    def num_all_experts(self) -> int:
        """E, the unconditional expert, which is the last one, included."""
        return self.num_experts + self.unconditional_expert

    def is_moe_block(self, index: int) -> bool:
        """Say whether the block of this index, from 0, has a mixture rather than one MLP."""
        if self.moe_blocks == "every_second":
            return index % 2 == 1
        first = self.depth // 2 if self.moe_blocks == "deep_half" else self.first_k_dense_replace
        return self.num_experts > 0 and index >= first

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


# ------------------------------------------------------------------------------ precision
#
# The residual stream, the norms and the router are float32; everything between them computes in the
# dtype of its weights, or autocast's. Each layer casts its own input, by `cast_for`.


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Return autocast's dtype where it is on (it does not reach custom ops), else the weight's."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def cast_for(weight: Tensor, x: Tensor) -> Tensor:
    """Cast x to what a layer of this weight computes in."""
    return x.to(compute_dtype(weight))


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
        """Map (N, C, H, W) to (N, T, D) fp32."""
        x = self.proj(cast_for(self.proj.weight, x))  # (N, D, H/P, W/P)
        return x.flatten(2).transpose(1, 2).float()


class TimestepEmbedder(nn.Module):
    """Times to vectors: sinusoids, then a two-layer MLP."""

    def __init__(self, hidden_size: int, frequency_size: int = 256) -> None:
        super().__init__()
        self.frequency_size = frequency_size
        first = nn.Linear(frequency_size, hidden_size)
        self.mlp = nn.Sequential(first, nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        """Map (N,) times to (N, D)."""
        embedding = timestep_embedding(t, self.frequency_size)  # (N, frequency_size)
        return self.mlp(cast_for(next(self.parameters()), embedding))


class LabelEmbedder(nn.Module):
    """Class labels to vectors; in training a share of them becomes the null label."""

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float) -> None:
        super().__init__()
        self.null_label = num_classes
        self.dropout_prob = dropout_prob
        # nn.Embedding's own drawing loads torch's compiler on the meta device: seconds
        table = torch.empty(num_classes + 1, hidden_size)
        self.embedding_table = nn.Embedding.from_pretrained(table, freeze=False)

    def drop_labels(self, y: Tensor, drop_mask: Tensor | None = None) -> Tensor:
        """Replace (N,) labels that are dropped by the null label.

        Args:
            y: (N,) int64, in [0, num_classes].
            drop_mask: (N,) bool, labels to drop; drawn with `dropout_prob` in training if absent.
        """
        if drop_mask is None and self.training and self.dropout_prob > 0:
            drop_mask = torch.rand(y.shape, device=y.device) < self.dropout_prob
        return y if drop_mask is None else torch.where(drop_mask, self.null_label, y)

    def forward(self, y: Tensor, drop_mask: Tensor | None = None) -> Tensor:
        """Map (N,) labels to (N, D); arguments as in `drop_labels`."""
        return self.embedding_table(self.drop_labels(y, drop_mask))


# ------------------------------------------------------------------------------ norms


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) over the last dimension, in float32, and its weight if it has one.

    Source: Zhang & Sennrich, arXiv:1910.07467, eq. 4.
    """

    def __init__(self, width: int, eps: float = 1e-6, elementwise_affine: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight: nn.Parameter | None = None
        if elementwise_affine:
            self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D) fp32."""
        x = x.float()
        x = x * (x.square().mean(dim=-1, keepdim=True) + self.eps).rsqrt()
        return x if self.weight is None else x * self.weight.float()


def token_norm(config: DiTConfig) -> nn.Module:
    """Return the norm before a layer, whose scale and shift adaLN supplies."""
    if config.norm == "rms":
        return RMSNorm(config.hidden_size, elementwise_affine=False)
    return nn.LayerNorm(config.hidden_size, elementwise_affine=False, eps=1e-6)


# ------------------------------------------------------------------------------ attention


class Attention(nn.Module):
    """Multi-head self-attention; which kernel runs changes neither parameters nor output.

    torch's `scaled_dot_product_attention`, but for two cases: the flash-attn package on a GPU, if
    asked for and in half formats, which are all it takes, and plain matmuls for bfloat16 on a CPU,
    where they take 0.7 of the time.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        hidden_size = config.hidden_size
        self.num_heads, self.head_dim = config.num_heads, hidden_size // config.num_heads
        self.rope = config.rope
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        layer_norm = partial(nn.LayerNorm, self.head_dim, eps=config.qk_norm_eps)
        rms_norm = partial(RMSNorm, self.head_dim, config.qk_norm_eps)
        norm: Any = rms_norm if config.norm == "rms" else layer_norm
        self.q_norm = norm() if config.qk_norm else nn.Identity()
        self.k_norm = norm() if config.qk_norm else nn.Identity()
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.use_flash_attn = False  # set by DiT.use_flash_attn

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, T, D) to (N, T, D)."""
        qkv = self.qkv(cast_for(self.qkv.weight, x))  # (N, T, 3*D)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)
        q, k = self.q_norm(q), self.k_norm(k)  # (N, T, heads, d)
        if self.rope:
            q, k = rotate(q), rotate(k)
        q, k = q.to(v.dtype), k.to(v.dtype)
        if self.use_flash_attn and v.dtype != torch.float32:  # an EMA draws without autocast
            from flash_attn import flash_attn_func

            return self.proj(flash_attn_func(q, k, v).flatten(2))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (N, heads, T, d)
        plain = x.device.type == "cpu" and v.dtype == torch.bfloat16
        attend = plain_attention if plain else F.scaled_dot_product_attention
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))


def rotate(x: Tensor, max_period: float = 10_000.0) -> Tensor:
    """Turn each pair of (N, T, heads, d) by an angle that grows with the token's place; fp32.

    The first half of d tells the row, the second the column, each with the d/4 frequencies of
    max_period^(-4i/d); pairs are i and i + d/4 of a half. Products of queries and keys then depend
    on how far apart their tokens are, not on where.

    Source: Su et al., arXiv:2104.09864, eq. 34; in two dimensions as in Heo et al.,
    arXiv:2403.13298, sec. 3.2, axial.
    """
    num_tokens, width = x.shape[1], x.shape[-1]
    size, quarter = math.isqrt(num_tokens), width // 4
    exponents = torch.arange(quarter, dtype=torch.float32, device=x.device) / quarter
    places = torch.arange(size, dtype=torch.float32, device=x.device)
    angles = places[:, None] * torch.exp(-math.log(max_period) * exponents)  # (size, d/4)
    rows, columns = angles[:, None].expand(-1, size, -1), angles.expand(size, -1, -1)
    both = torch.stack([rows, columns], dim=2).view(1, num_tokens, 1, 2, quarter)
    cos, sin = both.cos(), both.sin()
    first, second = x.float().unflatten(-1, (2, 2, quarter)).unbind(-2)  # (N, T, heads, 2, d/4)
    turned = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-2)
    return turned.flatten(-3)


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend by two matmuls that hold all (T, T) scores; (N, heads, T, d) each."""
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
    return scores.softmax(dim=-1) @ v


# ------------------------------------------------------------------------------ mixture of experts


class Routing(NamedTuple):
    """Router decision for M tokens of S slots each: K if tokens choose, E if experts do.

    E counts all experts, the unconditional one, the last, included.
    """

    expert_indices: Tensor  # (M, S) int64, in [0, E]; E is an empty slot
    expert_weights: Tensor  # (M, S) fp32: the affinities or their shares; 0 in empty slots
    probs: Tensor  # (M, E) fp32, rows sum to 1
    aux_losses: dict[str, Tensor]  # () fp32 each, unweighted; none outside training
    num_rows: int | None  # None: no slot is empty; else no more than this are filled


def token_affinity(kind: str, tokens: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Say how well each token suits each expert.

    Args:
        kind: "softmax", "sigmoid" or "cosine".
        tokens: (M, D) fp32.
        weight: (E, D) fp32, rows of a linear map, or the experts' prototypes.

    Returns:
        (M, E) each: logits, or cosines; affinities; and the same as shares, rows that sum to 1.
    """
    if kind == "cosine":
        scores = exact_linear(F.normalize(tokens, dim=-1), F.normalize(weight, dim=-1))
        return scores, scores, scores.softmax(dim=-1)
    logits = exact_linear(tokens, weight)
    if kind == "softmax":
        probs = logits.softmax(dim=-1)
        return logits, probs, probs
    scores = logits.sigmoid()
    return logits, scores, scores / scores.sum(dim=-1, keepdim=True)


def best_tokens(scores: Tensor, k: int) -> Tensor:
    """Let every expert choose: mark the k largest of (..., T, E) scores along T."""
    best = scores.detach().topk(k, dim=-2, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-2, best, True)


def most_probable(scores: Tensor, counts: Tensor) -> Tensor:
    """Mark the counts[e] largest scores of each expert: (M, E) and (E,) to (M, E)."""
    order = scores.argsort(dim=0, descending=True, stable=True)
    ranks = torch.arange(len(scores), device=scores.device)[:, None].expand_as(order)
    return torch.empty_like(order).scatter_(0, order, ranks) < counts


def normalize_weights(kind: str, scores: Tensor, filled: Tensor) -> Tensor:
    """Scale the affinities (M, S) of a token's filled slots to sum to 1.

    Cosines may be negative, so theirs are the shares of a softmax, as for "softmax" itself.
    """
    if kind == "cosine":
        least = torch.finfo(scores.dtype).min
        return scores.masked_fill(~filled, least).softmax(dim=-1) * filled
    scores = scores * filled
    return scores / scores.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)


def load_balancing_loss(
    probs: Tensor, expert_indices: Tensor, routed: Tensor | None = None, pooled: bool = False
) -> Tensor:
    """Auxiliary loss that pushes the router towards an even load: E * sum_e f_e * P_e.

    Args:
        probs: (M, E) router probabilities; gradients flow through these only.
        expert_indices: (M, K) experts actually chosen.
        routed: (M,) bool, tokens that count; all if absent.
        pooled: take loads and probabilities of all ranks' tokens.

    Returns:
        () fp32, unweighted. 1.0 for an even load, E if one expert takes everything.

    Source: Switch Transformer, arXiv:2101.03961, sec. 2.2, counting all K choices.
    """
    num_experts, k = probs.shape[-1], expert_indices.shape[-1]
    chosen = F.one_hot(expert_indices.flatten(), num_experts).float()  # (M * K, E)
    routed_choices = None if routed is None else routed.repeat_interleave(k)
    load = masked_mean(chosen, routed_choices, pooled)  # f: (E,)
    importance = masked_mean(probs, routed, pooled)  # P: (E,)
    return num_experts * (load * importance).sum()


def router_z_loss(logits: Tensor, routed: Tensor | None = None, pooled: bool = False) -> Tensor:
    """Auxiliary loss that keeps (M, E) logits small: the mean of logsumexp(logits)^2.

    Source: ST-MoE, arXiv:2202.08906, eq. 5.
    """
    return masked_mean(logits.logsumexp(dim=-1).square(), routed, pooled)


def contrastive_loss(
    prototypes: Tensor, sums: Tensor, counts: Tensor, temperature: float = 0.07
) -> Tensor:
    """Auxiliary loss that pulls each expert's prototype to the mean of its tokens.

    L = -mean_i log softmax_j(cos(p_i, m_j) / tau) at j = i, over the experts that have tokens.

    Args:
        prototypes: p, (E, D).
        sums: (..., E, D), of the tokens routed to each expert, not detached; m = sums / counts.
        counts: (..., E).
        temperature: tau.

    Returns:
        (...) fp32, unweighted: log E when all means agree, 0 where fewer than two experts have
        tokens.

    Source: ProMoE, arXiv:2510.24711, eq. 6.
    """
    active = counts > 0
    means = sums / counts.clamp(min=1)[..., None]
    cosines = F.normalize(prototypes, dim=-1) @ F.normalize(means, dim=-1).transpose(-2, -1)
    logits = (cosines / temperature).masked_fill(~active[..., None, :], -torch.inf)  # (..., i, j)
    own = (cosines / temperature).diagonal(dim1=-2, dim2=-1)
    losses = torch.where(active, logits.logsumexp(dim=-1) - own, 0.0)  # (..., E)
    num_active = active.sum(dim=-1)
    return torch.where(num_active > 1, losses.sum(dim=-1) / num_active.clamp(min=1), 0.0)


def masked_mean(values: Tensor, mask: Tensor | None, pooled: bool) -> Tensor:
    """Average (M, ...) over the tokens of the (M,) mask, if one is given.

    Args:
        pooled: over those of all ranks.
    """
    if mask is None:
        mean = values.mean(dim=0)
        return sum_over_ranks(mean) / num_ranks() if pooled else mean
    weights = mask.float().view(-1, *[1] * (values.dim() - 1))
    total, count = (values * weights).sum(dim=0), weights.sum()
    if pooled:
        total, count = sum_over_ranks(total), sum_over_ranks(count)
    return total / count.clamp(min=1)


class CapacityPredictor(nn.Module):
    """Foretells from a token alone which experts of the batch will choose it.

    Source: DiffMoE, arXiv:2503.14487, sec. 3.3.
    """

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, hidden_size)
        self.fc2 = nn.Linear(hidden_size, num_experts)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (M, D) fp32 to (M, E) logits, in float32; the tokens get no gradient."""
        hidden = exact_linear(tokens.detach(), self.fc1.weight.float()) + self.fc1.bias.float()
        return exact_linear(F.silu(hidden), self.fc2.weight.float()) + self.fc2.bias.float()


class TopKRouter(nn.Module):
    """Choose the experts of each token by affinity, and weigh them.

    A token chooses its best K experts; or an expert the best T/E * capacity tokens of each image;
    or of the batch, which in sampling, where a batch is any batch, a predictor and thresholds
    replace. What is not trained, biases and thresholds, moves by `update_state`.

    Source: arXiv:2407.11633, sec. 2.2; EC-DiT, arXiv:2410.02098; DiffMoE, arXiv:2503.14487;
    ProMoE, arXiv:2510.24711; loss-free balance, arXiv:2408.15664.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config, self.num_experts = config, config.num_all_experts
        self.expert_bias: Tensor
        self.thresholds: Tensor
        self.pooled = True  # statistics are all ranks', see DiT.use_rank_statistics
        self.seen: dict[str, Tensor] = {}  # sums over the training forwards since `update_state`
        weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.register_parameter("prototypes" if config.affinity == "cosine" else "weight", weight)
        if "bias" in config.balance:
            self.register_buffer("expert_bias", torch.zeros(config.num_experts))
        if config.selection == "batch_choice":
            self.capacity_predictor = CapacityPredictor(config.hidden_size, config.num_experts)
            self.register_buffer("thresholds", torch.zeros(config.num_experts))

    def forward(self, x: Tensor, is_null: Tensor | None = None) -> Routing:
        """Route (N, T, D) tokens, in float32: bfloat16 logits tie and flip choices between experts.

        Args:
            is_null: (N,) bool, images without a class; none if absent.
        """
        with torch.autocast(x.device.type, enabled=False):
            return self._route(x.float(), is_null)

    def _route(self, x: Tensor, is_null: Tensor | None) -> Routing:
        config, tokens = self.config, x.flatten(0, 1)  # (M, D)
        logits, scores, probs = token_affinity(config.affinity, tokens, self.matrix.float())
        aux_losses: dict[str, Tensor] = {}
        if config.selection == "token_choice":
            biased = scores + self.expert_bias.float() if "bias" in config.balance else scores
            indices = biased.topk(config.num_experts_per_tok, dim=-1, sorted=False).indices
            weights, num_rows = scores.gather(1, indices), None
        else:
            chosen, num_rows = self._choose_tokens(
                scores.view(*x.shape[:2], -1), tokens, aux_losses
            )
            experts = torch.arange(config.num_experts, device=x.device)
            indices, weights = torch.where(chosen, experts, self.num_experts), scores * chosen
        if config.norm_topk_prob:
            weights = normalize_weights(config.affinity, weights, indices < self.num_experts)
        if config.routed_scaling_factor != 1.0:
            weights = weights * config.routed_scaling_factor
        has_class = None if is_null is None else ~is_null
        if self.training:
            aux_losses |= self._balance(x, logits, probs, indices, has_class)
        if not config.unconditional_expert:
            return Routing(indices, weights, probs, aux_losses, num_rows)
        if has_class is None:
            has_class = x.new_ones(len(x), dtype=torch.bool)
        routing = Routing(indices, weights, probs, aux_losses, num_rows)
        return self._spare_unconditional(routing, has_class)

    @property
    def matrix(self) -> Tensor:
        """(E, D): the rows of the linear map, or the prototypes."""
        matrix: Tensor = getattr(
            self, "prototypes" if self.config.affinity == "cosine" else "weight"
        )
        return matrix

    def _choose_tokens(
        self, scores: Tensor, tokens: Tensor, aux_losses: dict[str, Tensor]
    ) -> tuple[Tensor, int]:
        """Let the experts choose by (N, T, E) scores: (M, E) choices, and a bound of their number.

        Args:
            tokens: (M, D) fp32.
            aux_losses: where the capacity predictor's loss is put in training.
        """
        num_images, num_tokens, num_experts = scores.shape
        share = self.config.experts_per_token / num_experts  # of the tokens, for each expert
        if self.config.selection == "expert_choice":
            k = max(1, math.floor(num_tokens * share))
            return best_tokens(scores, k).flatten(0, 1), num_images * num_experts * k
        scores, predicted = scores.flatten(0, 1), self.capacity_predictor(tokens)  # (M, E) both
        if not self.training:
            above = predicted.sigmoid() > self.thresholds.float()
            exact = self.config.exact_thresholds
            return above if exact else most_probable(scores, above.sum(dim=0)), above.numel()
        both = torch.cat([scores, predicted.sigmoid()], dim=1).detach()
        pooled = self.pooled and num_ranks() > 1
        both = gather_over_ranks(both) if pooled else both
        k = max(1, math.floor(len(both) * share))
        every = best_tokens(both[:, :num_experts], k)
        start = rank() * len(scores) if pooled else 0
        chosen = every[start : start + len(scores)]
        self._see("thresholds", both[:, num_experts:].topk(k, dim=0).values.amin(dim=0))
        loss = F.binary_cross_entropy_with_logits(predicted, chosen.float())
        aux_losses["capacity"] = loss
        return chosen, num_experts * min(k, len(scores))

    def _balance(
        self,
        x: Tensor,
        logits: Tensor,
        probs: Tensor,
        indices: Tensor,
        has_class: Tensor | None,
    ) -> dict[str, Tensor]:
        """Return the balance losses of routed tokens, and see their load."""
        balance, pooled = self.config.balance, self.pooled and num_ranks() > 1
        routed = None
        if self.config.unconditional_expert and has_class is not None:
            routed = has_class.repeat_interleave(x.shape[1])  # (M,)
        losses: dict[str, Tensor] = {}
        if "switch" in balance:
            losses["switch"] = load_balancing_loss(probs, indices, routed, pooled)
        if "z_loss" in balance:
            losses["z_loss"] = router_z_loss(logits, routed, pooled)
        if "contrastive" in balance:
            losses["contrastive"] = self._contrast(x, indices, has_class, pooled)
        if "bias" in balance:
            chosen = F.one_hot(indices, self.config.num_experts).sum(dim=1)  # (M, E)
            load = chosen.sum(dim=0) if routed is None else (chosen * routed[:, None]).sum(dim=0)
            self._see("load", load)
        return losses

    def _contrast(
        self, x: Tensor, indices: Tensor, has_class: Tensor | None, pooled: bool
    ) -> Tensor:
        """Return the contrastive loss of images with a class, each by itself if experts choose."""
        num_experts, prototypes = self.config.num_experts, self.matrix.float()
        chosen = x.new_zeros(len(indices), self.num_experts + 1).scatter(1, indices, 1.0)
        chosen = chosen[:, :num_experts].view(*x.shape[:2], num_experts)  # (N, T, E)
        if has_class is not None:
            chosen = chosen * has_class[:, None, None]
        if self.config.selection == "expert_choice":
            losses = contrastive_loss(prototypes, chosen.transpose(1, 2) @ x, chosen.sum(dim=1))
            return masked_mean(losses, has_class, pooled)
        sums, counts = chosen.flatten(0, 1).T @ x.flatten(0, 1), chosen.sum(dim=(0, 1))
        if pooled:
            sums, counts = sum_over_ranks(sums), sum_over_ranks(counts)
        return contrastive_loss(prototypes, sums, counts)

    def _spare_unconditional(self, routing: Routing, has_class: Tensor) -> Routing:
        """Send the tokens of images without a class (N,) to the last expert, with weight 1."""
        num_slots, last = routing.expert_indices.shape[1], self.num_experts - 1
        num_tokens = len(routing.expert_indices) // len(has_class)
        routed = has_class.repeat_interleave(num_tokens)[:, None]  # (M, 1)
        is_first = torch.arange(num_slots, device=routed.device) == 0  # (S,)
        only = torch.where(is_first, last, self.num_experts)
        num_rows = routing.num_rows
        if num_rows is not None:  # an image's tokens, or what the experts chose of them
            num_rows = max(num_rows, len(routing.expert_indices))
        elif num_slots > 1:
            num_rows = routing.expert_indices.numel()
        return Routing(
            torch.where(routed, routing.expert_indices, only),
            torch.where(routed, routing.expert_weights, is_first.float()),
            torch.cat([routing.probs * routed, (~routed).float()], dim=1),
            routing.aux_losses,
            num_rows,
        )

    def _see(self, name: str, value: Tensor) -> None:
        """Add up what `update_state` needs, over micro-batches."""
        value = torch.cat([value.detach().float(), value.new_ones(1).float()])
        self.seen[name] = self.seen[name] + value if name in self.seen else value

    @torch.no_grad()
    def update_state(self, bias_rate: float = 1e-3, decay: float = 0.95) -> None:
        """Move biases against the loads and thresholds to the k-th predictions, all ranks'.

        Args:
            bias_rate: u, the step of a bias.
            decay: of a threshold, which keeps this share of itself.
        """
        for name, value in self.seen.items():
            value = sum_over_ranks(value) if num_ranks() > 1 else value
            if name == "load":
                step = bias_rate * (value[:-1].mean() - value[:-1]).sign()
                self.expert_bias += step - step.mean()
            else:
                self.thresholds.lerp_(value[:-1] / value[-1], 1 - decay)
        self.seen = {}


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) without biases; gate and up are one matmul."""

    def __init__(self, hidden_size: int, mlp_hidden_size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden_size, 2 * mlp_hidden_size, bias=False)
        self.down_proj = nn.Linear(mlp_hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        gate_up, down = self.gate_up_proj.weight, self.down_proj.weight
        return swiglu(cast_for(gate_up, x), gate_up, down)


class GeluMLP(nn.Module):
    """fc2(gelu(fc1(x))) with biases, the dense DiT's MLP."""

    def __init__(self, hidden_size: int, mlp_hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_hidden_size)
        self.fc2 = nn.Linear(mlp_hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        hidden = self.fc1(cast_for(self.fc1.weight, x))  # (..., F)
        return self.fc2(F.gelu(hidden, approximate="tanh"))


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

    def forward(
        self,
        x: Tensor,
        expert_indices: Tensor,
        expert_weights: Tensor,
        num_rows: int | None = None,
    ) -> Tensor:
        """Send (M, D) tokens through their experts, see `Routing`; returns the (M, D) sum."""
        x, weights = cast_for(self.down_proj, x), (self.gate_up_proj, self.down_proj)
        return swiglu_experts(x, *weights, expert_indices, expert_weights, num_rows)


class GeluExperts(nn.Module):
    """E experts of the dense DiT's form, down(gelu(up(x))) with biases, held as stacked tensors."""

    def __init__(self, num_experts: int, hidden_size: int, mlp_hidden_size: int) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.empty(num_experts, mlp_hidden_size, hidden_size))
        self.up_bias = nn.Parameter(torch.empty(num_experts, mlp_hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, mlp_hidden_size))
        self.down_bias = nn.Parameter(torch.empty(num_experts, hidden_size))

    def forward(
        self,
        x: Tensor,
        expert_indices: Tensor,
        expert_weights: Tensor,
        num_rows: int | None = None,
    ) -> Tensor:
        """Send (M, D) tokens through their experts, see `Routing`; returns the (M, D) sum."""
        x = cast_for(self.down_proj, x)
        weights = (self.up_proj, self.up_bias, self.down_proj, self.down_bias)
        return gelu_experts(x, *weights, expert_indices, expert_weights, num_rows)


class MoE(nn.Module):
    """Sparse MLP: routed experts, K per token, plus shared experts that see every token.

    Source: arXiv:2407.11633, sec. 2.2.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.router = TopKRouter(config)
        experts: Any = Experts if config.mlp_type == "swiglu" else GeluExperts
        self.experts = experts(config.num_all_experts, config.hidden_size, config.mlp_hidden_size)
        self.shared_experts = (
            build_mlp(config, config.num_shared_experts * config.hidden_size)
            if config.num_shared_experts
            else None
        )
        self.exchange: Callable[..., Any] | None = None  # with other ranks, `use_expert_group`

    def forward(self, x: Tensor, is_null: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Map (N, T, D) tokens, of images without a class where `is_null` (N,), to as many.

        Returns:
            (N, T, D), and in training the losses () by name.
        """
        tokens = x.flatten(0, 1)  # (M, D)
        # By way of `tokens`: gradients of router and experts are added first, as always. Another
        # order has other bits, and a run would not resume as if it had never stopped.
        routing = self.router(tokens.view_as(x), is_null)  # (M, S) experts and weights
        chosen = routing.expert_indices, routing.expert_weights, routing.num_rows
        rounded, shared = tokens, None
        if self.shared_experts is not None:  # once, for both kinds of experts
            rounded = cast_for(next(self.shared_experts.parameters()), tokens)
            shared = partial(self.shared_experts, x if rounded is tokens else rounded.view_as(x))
        if self.exchange is None:
            out = self.experts(rounded, *chosen).view_as(x)  # (N, T, D)
            beside = None if shared is None else shared()  # (N, T, D)
        else:
            sent = cast_for(self.experts.down_proj, rounded)
            out, beside = self.exchange(sent, *chosen, experts=self.experts, meanwhile=shared)
            out = out.view_as(x)  # (N, T, D)
        return out if beside is None else out + beside, routing.aux_losses


# ------------------------------------------------------------------------------ transformer


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale and shift (N, T, D) tokens by one (N, D) vector per image."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


class DiTBlock(nn.Module):
    """Transformer block with adaLN-Zero conditioning.

    Source: arXiv:2212.09748, sec. 3.2.
    """

    def __init__(self, config: DiTConfig, index: int = 0) -> None:
        super().__init__()
        hidden_size = config.hidden_size
        self.norm1 = token_norm(config)
        self.attn = Attention(config)
        self.norm2 = token_norm(config)
        self.is_moe = config.is_moe_block(index)
        if self.is_moe:
            self.moe = MoE(config)
        else:
            self.mlp = build_mlp(config, config.dense_hidden_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(
        self, x: Tensor, c: Tensor, is_null: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Map tokens (N, T, D) fp32 and conditioning (N, D); the rest as in `MoE`."""
        modulation = self.adaLN_modulation(c).float().chunk(6, dim=-1)  # (N, D) each
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation
        h = modulate(self.norm1(x), shift_msa, scale_msa)  # (N, T, D) fp32
        h = self.attn(h)  # (N, T, D)
        x = torch.addcmul(x, gate_msa[:, None], h.float())  # (N, T, D) fp32
        h = modulate(self.norm2(x), shift_mlp, scale_mlp)  # (N, T, D) fp32
        h, aux_losses = self.moe(h, is_null) if self.is_moe else (self.mlp(h), {})  # (N, T, D)
        x = torch.addcmul(x, gate_mlp[:, None], h.float())  # (N, T, D) fp32
        return x, aux_losses


class FinalLayer(nn.Module):
    """adaLN, then one linear map from each token to its patch of the prediction."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        hidden_size = config.hidden_size
        self.norm_final = token_norm(config)
        self.linear = nn.Linear(hidden_size, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Map tokens (N, T, D) and conditioning (N, D) to (N, T, P*P*C_out)."""
        shift, scale = self.adaLN_modulation(c).float().chunk(2, dim=-1)  # (N, D) each
        x = modulate(self.norm_final(x), shift, scale)  # (N, T, D) fp32
        return self.linear(cast_for(self.linear.weight, x))


class DiT(nn.Module, PyTorchModelHubMixin, library_name="dit-moe"):
    """Diffusion transformer with sparse mixtures of experts.

    In training mode it returns `(prediction, aux_losses)`, in eval mode the prediction alone.
    `from_pretrained`, `save_pretrained` and `push_to_hub` are huggingface_hub's, for folders and
    repositories of config.json and safetensors; the first one reads run folders, too.
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
        self.blocks = nn.ModuleList(DiTBlock(config, i) for i in range(config.depth))
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

    def mlp_weights(self) -> list[Tensor]:
        """Return the matrices of all experts and MLPs, nearly all parameters of the model."""
        kinds = (Experts, GeluExperts, SwiGLU)
        found = [module for module in self.modules() if isinstance(module, kinds)]
        return [p for module in found for p in module.parameters()]

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

    def compile_blocks(self, dynamic: bool | None = None) -> None:
        """Compile every block in place; but not how tokens travel between ranks.

        Args:
            dynamic: False makes a graph for each shape of a batch; None, from the second, for any.
        """
        for block in self.blocks:
            moe: Any = block.moe if block.is_moe else None
            travels = moe is not None and moe.exchange is not None
            if travels:
                moe.exchange = torch.compiler.disable(moe.exchange)
            block.compile(fullgraph=not travels, dynamic=dynamic)

    def unpatchify(self, x: Tensor) -> Tensor:
        """Reassemble (N, T, P*P*C) tokens into (N, C, H, W)."""
        p, size = self.config.patch_size, self.config.input_size // self.config.patch_size
        x = x.unflatten(1, (size, size)).unflatten(-1, (p, p, -1))  # (N, H/P, W/P, P, P, C)
        x = x.permute(0, 5, 1, 3, 2, 4)  # (N, C, H/P, P, W/P, P)
        return x.flatten(4, 5).flatten(2, 3)

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, drop_mask: Tensor | None = None
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Predict noise (DDPM) or velocity (rectified flow).

        Args:
            x: (N, C, H, W) noisy latents.
            t: (N,) times as the objective defines them.
            y: (N,) int64 labels in [0, num_classes], num_classes being the null label.
            drop_mask: (N,) bool, labels to replace by the null label; in training drawn with
                `class_dropout_prob` when absent.

        Returns:
            Prediction (N, C_out, H, W); in training mode `(prediction, aux_losses)`, the latter
            by name, () fp32 each, summed over layers and unweighted.
        """
        x = self.x_embedder(x) + self.pos_embed  # (N, T, D) fp32
        y = self.y_embedder.drop_labels(y, drop_mask)  # (N,)
        c = self.t_embedder(t) + self.y_embedder.embedding_table(y)  # (N, D)
        is_null = y == self.config.null_label  # (N,)
        by_name: dict[str, list[Tensor]] = {}
        for block in self.blocks:
            if self.grad_checkpointing and self.training:
                x, aux_losses = checkpoint(block, x, c, is_null, use_reentrant=False)
            else:
                x, aux_losses = block(x, c, is_null)  # (N, T, D) fp32, () by name
            for name, loss in aux_losses.items():
                by_name.setdefault(name, []).append(loss)
        x = self.final_layer(x, c)  # (N, T, P*P*C_out)
        prediction = self.unpatchify(x)  # (N, C_out, H, W)
        if not self.training:
            return prediction
        return prediction, {name: torch.stack(losses).sum() for name, losses in by_name.items()}

    def update_router_state(self, discard: bool = False, bias_rate: float = 1e-3) -> None:
        """Move biases and thresholds by what the routers saw since the last call.

        To be called after each optimizer step, on every rank; nothing where there are none.

        Args:
            discard: only forget what they saw, for a step that was skipped.
            bias_rate: the step of a bias, see `TopKRouter.update_state`.
        """
        for module in self.modules():
            if isinstance(module, TopKRouter):
                if discard:
                    module.seen = {}
                module.update_state(bias_rate)

    def use_rank_statistics(self, enabled: bool = True) -> None:
        """Take balance statistics from each rank's own tokens, as published, or from all again."""
        for module in self.modules():
            if isinstance(module, TopKRouter):
                module.pooled = not enabled

    def use_expert_group(self, group: ExpertGroup) -> None:
        """Keep this rank's experts of every layer only; tokens travel to those of the others."""
        for module in self.modules():
            if isinstance(module, MoE):
                num_experts = self.config.num_all_experts
                first, last = group.experts_of(group.rank, num_experts)
                for name, whole in list(module.experts.named_parameters()):
                    part = whole.detach()[first:last].clone()
                    setattr(module.experts, name, nn.Parameter(part, whole.requires_grad))
                module.exchange = partial(exchange, group=group, num_experts=num_experts)

    def num_parameters(self) -> tuple[int, int]:
        """Count parameters: (total, activated by one token), frozen position table included."""
        total = sum(p.numel() for p in self.parameters())
        routed = [m for m in self.modules() if isinstance(m, (Experts, GeluExperts))]
        experts = sum(p.numel() for module in routed for p in module.parameters())
        share = self.config.experts_per_token / max(self.config.num_all_experts, 1)
        used_experts = math.floor(experts * share + 0.5)
        return total, total - experts + used_experts

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> "DiT":
        """Load a model in eval mode: of a run of train.py, a folder or a hub repository.

        Args:
            pretrained_model_name_or_path: run folder, of which the averaged weights of the latest
                checkpoint are taken; folder of `save_pretrained` or convert.py; or a hub id.
            **options: of huggingface_hub's mixin, for folders and repositories.

        Raises:
            ValueError: a run has no checkpoint, or shards only.
        """
        checkpoints = Path(pretrained_model_name_or_path) / "checkpoints"
        if not checkpoints.is_dir():
            return super().from_pretrained(str(pretrained_model_name_or_path), **options)
        course = checkpoints / "latest"  # names, the last one first
        names = course.read_text().split() if course.is_file() else []
        there = {path.name: path for path in checkpoints.glob("[0-9]*")}  # nowhere else is looked
        names += sorted((name for name in there if name.endswith(".pt")), reverse=True)
        found = next((there[name] for name in names if name in there), None)
        if found is None or found.is_dir():
            what = "has shards only" if found else "has no checkpoint"
            raise ValueError(
                f"{checkpoints.parent} {what}: make a folder of it, python convert.py "
                f"{checkpoints.parent} FOLDER"
            )
        content = torch.load(found, map_location="cpu", weights_only=True, mmap=True)
        with torch.device("meta"):
            model = cls(DiTConfig.from_dict(content["config"]))
        model.settings = content["settings"]
        model.load_state_dict(content["ema"] or content["model"], assign=True)
        return model.eval()

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
    elif (
        name.endswith(("bias", "thresholds"))
        or "adaLN_modulation" in name
        or name.startswith("final_layer")
    ):
        nn.init.zeros_(parameter)
    elif name.endswith(("q_norm.weight", "k_norm.weight")):
        nn.init.ones_(parameter)
    elif name.startswith(("t_embedder", "y_embedder")) or name.endswith("router.prototypes"):
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
    **dict.fromkeys(("S", "B", "L", "XL"), (1, 2, 4, 8)),
    "G": (1, 2),
}
# What other families of sparse DiTs have in common beside the dimensions of `SIZES`, and their own.
_LATER: dict[str, Any] = {
    "mlp_type": "gelu",
    "moe_blocks": "every_second",
    "num_experts_per_tok": 1,
    "learn_sigma": False,
    "qk_norm": False,
    "qk_norm_eps": 1e-5,
}
_PROMOE = {
    **_LATER,
    "affinity": "cosine",
    "balance": ("contrastive",),
    "num_experts": 12,
    "mlp_ratio": 2.0,
    "num_shared_experts": 2,
    "unconditional_expert": True,
}
_EIGHT_EXPERTS = {**_LATER, "num_experts": 8, "num_shared_experts": 0, "balance": ()}
FAMILIES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {  # name: (fields, sizes)
    "ProMoE": (_PROMOE, ("S", "B", "L", "XL")),
    "ProMoE-EC": ({**_PROMOE, "selection": "expert_choice"}, ("S", "B", "L", "XL")),
    "EC-DiT": ({**_EIGHT_EXPERTS, "selection": "expert_choice"}, ("L",)),
    "DiffMoE": ({**_EIGHT_EXPERTS, "selection": "batch_choice"}, ("B", "L", "XL")),
}


def _build(fields: dict[str, Any], patch_size: int, **overrides: Any) -> DiT:
    return DiT(DiTConfig(**{**fields, "patch_size": patch_size, **overrides}))


DiT_models: dict[str, Callable[..., DiT]] = {
    f"DiT-{size}/{patch_size}": partial(_build, SIZES[size], patch_size)
    for size, patch_sizes in PATCH_SIZES.items()
    for patch_size in patch_sizes
}
DiT_models |= {
    f"{family}-{size}/2": partial(_build, {**SIZES[size], **fields}, 2)
    for family, (fields, sizes) in FAMILIES.items()
    for size in sizes
}
