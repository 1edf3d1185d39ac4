"""The shape of a model."""

from __future__ import annotations

from pydantic import model_validator

from tanren.config.fields import Positive, PositiveFloat, Strict


class RopeScaling(Strict):
    """Llama-3.1 frequency scaling (Llama 3 herd of models, 2024, section 3.2)."""

    factor: PositiveFloat = 8.0
    low_frequency_factor: PositiveFloat = 1.0
    high_frequency_factor: PositiveFloat = 4.0
    original_max_positions: Positive = 8192


class Model(Strict):
    """The shape of a LLaMA-type model."""

    layers: Positive
    hidden_size: Positive
    ffn_hidden_size: Positive
    attention_heads: Positive
    kv_groups: Positive
    head_size: Positive | None = None
    vocabulary_size: Positive
    max_positions: Positive
    rotary_base: PositiveFloat
    rope_scaling: RopeScaling | None = None
    norm_epsilon: PositiveFloat
    tied_embeddings: bool = False
    init_std: PositiveFloat = 0.02

    @model_validator(mode="after")
    def _shapes_fit(self) -> Model:
        if self.attention_heads % self.kv_groups:
            raise ValueError(
                f"attention_heads {self.attention_heads} is not a multiple of "
                f"kv_groups {self.kv_groups}"
            )
        if self.head_size is None and self.hidden_size % self.attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of attention_heads "
                f"{self.attention_heads}: state head_size"
            )
        if self.head_width % 2:
            raise ValueError(f"head size {self.head_width} is odd: rotary embedding needs pairs")
        return self

    @property
    def head_width(self) -> int:
        """Channels of one attention head."""
        return self.head_size or self.hidden_size // self.attention_heads

    @property
    def padded_vocabulary(self) -> int:
        """Embedding rows inside the engine: the vocabulary rounded up to a multiple of 128.

        It does not depend on the layout, so that a checkpoint fits every tensor-parallel size
        that divides 128.
        """
        return -(-self.vocabulary_size // 128) * 128

    @property
    def parameters(self) -> int:
        """Trainable parameters, without the padding of the vocabulary."""
        attention = self.hidden_size * self.head_width * (self.attention_heads + self.kv_groups) * 2
        mlp = 3 * self.hidden_size * self.ffn_hidden_size
        embeddings = self.vocabulary_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        norms = self.hidden_size * (2 * self.layers + 1)
        return self.layers * (attention + mlp) + embeddings + norms

    def flops(self, tokens: int, attended: int, predicted: int) -> float:
        """Floating-point operations of training, forward and backward.

        Six per weight of every matrix product, the embedding lookup not counted, plus attention
        scores with the causal half counted once (PaLM, appendix B, halved for causality).

        Args:
            tokens: that go through the layers.
            attended: the sum of the squares of the sequences' lengths.
            predicted: tokens that go through the output layer.
        """
        attention = self.hidden_size * self.head_width * (self.attention_heads + self.kv_groups) * 2
        mlp = 3 * self.hidden_size * self.ffn_hidden_size
        weights = self.layers * (attention + mlp) * tokens
        weights += self.vocabulary_size * self.hidden_size * predicted
        scores = self.layers * attended * self.attention_heads * self.head_width
        return 6.0 * (weights + scores)

    def flops_per_token(self, sequence_length: int) -> float:
        """`flops` of a token in full sequences of this length, each of them predicted.

        For llm-jp-4-8b at 4096 this gives 49.93 GFLOP.
        """
        return self.flops(1, sequence_length, 1)
