"""Qwen3 as MindSpore cells, with the parameters of MindSpore Transformers: the same function of the weights as transformers' Qwen3.

Shapes below: B samples, T tokens, H hidden_size, G key and value heads (groups), Q query heads of a group, D head_dim, F
intermediate_size, V vocab_size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from reshard.config.fields import ModelSettings
from reshard.training.config_fields import config_fields
from reshard.training.seeds import derived_seed

# What a token may not see; no score is smaller.
_HIDDEN = float(np.finfo(np.float32).min)

# MindSpore declares that a cell's `construct` never returns.
_Cell: Any = nn.Cell

_ACTIVATIONS = {"silu": ops.silu, "gelu": ops.gelu, "relu": ops.relu}


class Qwen3(_Cell):
    """The whole model. It takes token ids, int32 of shape (B, T), and gives logits of shape (B × T, V).

    Queries, keys and values are one matrix, group by group: Q queries, a key, a value. Gate and up are one matrix whose rows alternate.
    Where the embeddings are tied there is no output layer, as in the published model.

    Args:
        settings: the model's.
        seed: the run's. Every parameter draws from a generator of its own, so that it begins the same on every rank.
    """

    def __init__(self, settings: ModelSettings, seed: int) -> None:
        super().__init__()
        # Mappings take sizes from here.
        self.config: dict[str, Any] = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], **config_fields(settings)}
        self.embedding = _Embedding(settings.vocab_size, settings.hidden_size)
        self.decoder = _Decoder(settings)
        self.output_layer = None if settings.tie_word_embeddings else _Linear(settings.hidden_size, settings.vocab_size)
        for parameter in self.trainable_params():
            if parameter.ndim > 1:
                draw = np.random.default_rng(derived_seed(seed, "weight", parameter.name))
                drawn = draw.normal(0.0, settings.initializer_range, parameter.shape).astype(np.float32)
                parameter.assign_value(Tensor(drawn))

    def construct(self, tokens: Tensor) -> Tensor:
        """Logits, as the class says."""
        hidden = self.decoder(self.embedding(tokens))
        if self.output_layer is None:
            return _linear(hidden, self.embedding.word_embeddings.weight)
        return self.output_layer(hidden)


class _Embedding(_Cell):
    """Token ids of shape (B, T) become hidden states of shape (B, T, H)."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.word_embeddings = _Linear(width, vocabulary)

    def construct(self, tokens: Tensor) -> Tensor:
        return ops.gather(self.word_embeddings.weight, tokens, 0)


class _Decoder(_Cell):
    """Hidden states of shape (B, T, H) become normed ones of shape (B × T, H)."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.layers = nn.CellList([_Layer(settings) for _ in range(settings.num_hidden_layers)])
        self.final_layernorm = _Norm(settings.hidden_size, settings.rms_norm_eps)
        self._head_dim = settings.head_dim or settings.hidden_size // settings.num_attention_heads
        self._theta = settings.rope_theta
        self._constants: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def construct(self, hidden: Tensor) -> Tensor:
        samples, length, width = hidden.shape
        if length not in self._constants:
            self._constants[length] = (*_rotation(length, self._head_dim, self._theta), _causal_mask(length))
        hidden = hidden.reshape(samples * length, width)
        for layer in self.layers:
            hidden = layer(hidden, samples, *self._constants[length])
        return self.final_layernorm(hidden)


class _Layer(_Cell):
    """Hidden states of shape (B × T, H), before and after."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.input_layernorm = _Norm(settings.hidden_size, settings.rms_norm_eps)
        self.self_attention = _Attention(settings)
        self.pre_mlp_layernorm = _Norm(settings.hidden_size, settings.rms_norm_eps)
        self.mlp = _FeedForward(settings)

    def construct(self, hidden: Tensor, samples: int, cosine: Tensor, sine: Tensor, mask: Tensor) -> Tensor:
        hidden = hidden + self.self_attention(self.input_layernorm(hidden), samples, cosine, sine, mask)
        return hidden + self.mlp(self.pre_mlp_layernorm(hidden))


class _Attention(_Cell):
    """Causal attention of G groups, each of Q query heads with one key and one value."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        heads = settings.num_attention_heads
        self._groups = settings.num_key_value_heads or heads
        self._queries = heads // self._groups
        self._head_dim = settings.head_dim or settings.hidden_size // heads
        self.linear_qkv = _Linear(settings.hidden_size, (heads + 2 * self._groups) * self._head_dim)
        self.linear_proj = _Linear(heads * self._head_dim, settings.hidden_size)
        self.q_layernorm = _Norm(self._head_dim, settings.rms_norm_eps)
        self.k_layernorm = _Norm(self._head_dim, settings.rms_norm_eps)

    def construct(self, hidden: Tensor, samples: int, cosine: Tensor, sine: Tensor, mask: Tensor) -> Tensor:
        groups, queries, width = self._groups, self._queries, self._head_dim
        length = hidden.shape[0] // samples
        fused = self.linear_qkv(hidden).reshape(samples, length, groups, queries + 2, width)
        fused = ops.transpose(fused, (0, 2, 3, 1, 4))  # (B, G, Q + 2, T, D)
        query = _rotated(self.q_layernorm(fused[:, :, :queries]), cosine, sine)
        key = _rotated(self.k_layernorm(fused[:, :, queries]), cosine, sine)
        value = fused[:, :, queries + 1]
        # The queries of a group stand below each other: one product with its key, one with its value.
        rows = query.reshape(samples, groups, queries * length, width)
        scores = ops.matmul(rows, ops.transpose(key, (0, 1, 3, 2))) * (width**-0.5)
        scores = scores.reshape(samples, groups, queries, length, length) + mask
        weights = ops.softmax(scores, axis=-1).reshape(samples, groups, queries * length, length)
        mixed = ops.matmul(weights, value).reshape(samples, groups, queries, length, width)
        mixed = ops.transpose(mixed, (0, 3, 1, 2, 4))  # (B, T, G, Q, D)
        return self.linear_proj(mixed.reshape(samples * length, groups * queries * width))


class _FeedForward(_Cell):
    """A feed-forward layer with a gate."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.linear_fc1 = _Linear(settings.hidden_size, 2 * settings.intermediate_size)
        self.linear_fc2 = _Linear(settings.intermediate_size, settings.hidden_size)
        self._activation = _ACTIVATIONS[settings.hidden_act]

    def construct(self, hidden: Tensor) -> Tensor:
        both = self.linear_fc1(hidden).reshape(hidden.shape[0], -1, 2)  # gate and up alternate
        return self.linear_fc2(self._activation(both[..., 0]) * both[..., 1])


class _Linear(_Cell):
    """A matrix of shape (outputs, inputs) without bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = Parameter(Tensor(np.zeros((outputs, inputs), np.float32)), name="weight")

    def construct(self, rows: Tensor) -> Tensor:
        return _linear(rows, self.weight)


class _Norm(_Cell):
    """RMS norm over the last dimension."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = Parameter(Tensor(np.ones(width, np.float32)), name="weight")
        self._epsilon = epsilon

    def construct(self, hidden: Tensor) -> Tensor:
        variance = ops.mean(ops.square(hidden), axis=-1, keep_dims=True)
        return self.weight * (hidden * ops.rsqrt(variance + self._epsilon))


def _linear(rows: Tensor, weight: Tensor) -> Tensor:
    return ops.matmul(rows, weight.T)


def _rotation(length: int, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary embedding, each of shape (T, D): the two halves of a head turn together."""
    frequencies = 1.0 / theta ** (np.arange(0, width, 2, dtype=np.float32) / width)
    angles = np.outer(np.arange(length, dtype=np.float32), frequencies.astype(np.float32))
    angles = np.concatenate([angles, angles], axis=-1)
    return Tensor(np.cos(angles)), Tensor(np.sin(angles))


def _causal_mask(length: int) -> Tensor:
    """What is added to scores, of shape (T, T)."""
    return Tensor(np.triu(np.full((length, length), _HIDDEN, np.float32), 1))


def _rotated(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    half = heads.shape[-1] // 2
    turned = ops.concat((-heads[..., half:], heads[..., :half]), -1)
    return heads * cosine + turned * sine
