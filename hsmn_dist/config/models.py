"""Architecture of the model families. Sizes only: nothing here knows how a model is trained."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, model_validator

from hsmn_dist.config.section import Section


class PruningConfig(Section):
    """Magnitude pruning of the low-rank factors, compressor, decompressor and head (models.md 1.7)."""

    schedule: Literal["none", "constant", "gradual"] = Field(
        "none",
        description="none; constant from begin_step; gradual: cubic ramp (Zhu and Gupta 2017, arXiv 1710.01878).",
    )
    sparsity: float = Field(0.5, ge=0.0, lt=1.0, description="Final share of zero weights; the original's is 0.5.")
    structure: Literal["unstructured", "2:4"] = Field(
        "unstructured",
        description="2:4 keeps the two largest of every four weights in a row, which sparse tensor cores can use.",
    )
    begin_step: int = Field(0, ge=0, description="First optimizer step with a mask.")
    end_step: int = Field(1000, ge=1, description="Optimizer step at which the gradual schedule reaches `sparsity`.")
    every_steps: int = Field(100, ge=1, description="Optimizer steps between recomputed masks.")


class HsmnConfig(Section):
    """HSMN (models.md section 1). Defaults are the original's."""

    family: Literal["hsmn"] = "hsmn"
    vocab_size: int = Field(
        50265, ge=2, description="Rows of the token tables and of the head; at least the tokenizer's."
    )
    d_model: int = Field(512, ge=1, description="Width of encoder and decoder.")
    num_heads: int = Field(8, ge=1, description="Attention heads; must divide d_model.")
    d_feed_forward: int = Field(2048, ge=1, description="Inner width of the feed-forward layers.")
    num_encoder_layers: int = Field(2, ge=1, description="Layers of the ChunkEncoder.")
    num_decoder_layers: int = Field(7, ge=1, description="Layers of the ReasoningModule.")
    chunk_size: int = Field(128, ge=2, description="Tokens in a chunk.")
    chunk_stride: int = Field(64, ge=1, description="Tokens between the starts of two chunks; at most chunk_size.")
    min_chunks: int = Field(2, ge=1, description="Chunks that even the shortest context gets.")
    d_compressed: int = Field(128, ge=1, description="Width of a memory node before decompression.")
    d_aggregator: int = Field(256, ge=1, description="Inner width of the Aggregator.")
    aggregator_rank: int = Field(64, ge=1, description="Rank of both Aggregator maps.")
    window_size: int = Field(
        128, ge=1, description="Target tokens per decoder window; keys and values of earlier windows are cached."
    )
    max_target_tokens: int = Field(4096, ge=1, description="Positions of the decoder's position table.")
    attention_span_tokens: int = Field(
        0,
        ge=0,
        description="Earlier target tokens (itself included) that a target token attends to; 0 for all of them. With a "
        "span, time and memory per generated token stay constant.",
    )
    encoder_group_chunks: int = Field(
        0,
        ge=0,
        description="Chunks encoded at a time; 0 encodes all at once. Groups bound the working memory of long contexts; what "
        "they compute again in the backward pass is encoder_recompute. 16 to 64 is a good size on a CPU.",
    )
    encoder_recompute: Literal["none", "attention", "sublayers", "all"] = Field(
        "all",
        description="What groups of chunks compute again in the backward pass (without groups nothing), from fast to small: none; "
        "attention, whose queries, keys and values are many bytes and little work; sublayers, which keeps what stands between them; "
        "all, for very long contexts.",
    )
    activation: Literal["relu", "gelu", "silu"] = Field("relu", description="Feed-forward activation.")
    norm_placement: Literal["pre", "post"] = Field(
        "pre", description="Norms in front of each sublayer, or behind it as in the original (which needs warm-up)."
    )
    encoder_dropout: float = Field(0.1, ge=0.0, lt=1.0, description="Dropout of the ChunkEncoder.")
    decoder_dropout: float = Field(0.3, ge=0.0, lt=1.0, description="Dropout of the ReasoningModule.")
    uses_level_embedding: bool = Field(
        True,
        description="Add a learned code of level and span position to each memory node; false reproduces the original.",
    )
    ties_embeddings: bool = Field(False, description="Share the decoder's token table with the head.")
    pad_id: int = Field(0, ge=0, description="Token id of padding.")
    pruning: PruningConfig = Field(PruningConfig(), description="Magnitude pruning.")


class SelfModifyingConfig(Section):
    """Self-modifying Titans (models.md 2.4)."""

    memory: Literal["mlp", "matrix"] = Field(
        "mlp", description="mlp: z + W1 gelu(W2 z); matrix: the gated delta rule (cheaper, less capacity)."
    )
    hidden_units: int = Field(64, ge=1, description="Hidden units of each memory and head; mlp only.")
    objective: Literal["dot", "half_l2", "l2"] = Field(
        "l2", description="Inner loss: -<M(k), v>, |M(k) - v|^2 / 2, or |M(k) - v|^2."
    )
    uses_delta: bool = Field(
        True, description="Keep the paper's factor alpha I - eta k k^T; false decays by alpha alone."
    )
    momentum: float = Field(0.0, ge=0.0, lt=1.0, description="Decay of the momentum of writes; mlp memories only.")
    reads_at: Literal["token", "chunk"] = Field(
        "token", description="Reads see every earlier write, or the weights of the running chunk's start."
    )
    adapts_query: bool = Field(False, description="Pass queries through a sixth memory (the paper's ablation).")
    normalises_value: bool = Field(
        True, description="l2-normalise values as keys are; false is the paper's letter and can overflow."
    )
    chunk_tokens: int = Field(64, ge=1, description="Tokens between two refreshes of the k, v, eta, alpha memories.")
    memory_chunk_tokens: int = Field(
        64, ge=1, description="The same for the memory that is read; one of the two must divide the other."
    )
    rate_scale: float = Field(0.1, gt=0.0, description="Factor of softplus in the write rate eta.")
    initial_rate: float = Field(0.01, gt=0.0, description="Write rate of a fresh model.")
    largest_growth: float = Field(
        2.0,
        ge=0.0,
        description="Largest norm of each fast map as a multiple of its start, enforced at chunk ends; 0: no bound.",
    )
    largest_rate: float = Field(
        0.3, gt=0.0, le=1.0, description="Upper clamp of eta; |alpha - c eta| <= 1 needs at most 1 / c (c = 3 for l2)."
    )

    @model_validator(mode="after")
    def _check_memories(self) -> SelfModifyingConfig:
        sizes = sorted((self.chunk_tokens, self.memory_chunk_tokens))
        if sizes[1] % sizes[0]:
            raise ValueError(
                f"chunk_tokens {self.chunk_tokens} and memory_chunk_tokens {self.memory_chunk_tokens}; allowed: one "
                "divides the other; change one of them"
            )
        if self.memory == "matrix" and self.momentum > 0:
            raise ValueError(
                f"momentum {self.momentum} with matrix memories; allowed: 0 (they follow the gated delta rule); set "
                "momentum to 0 or memory to mlp"
            )
        form = {"dot": 0, "half_l2": 1, "l2": 2}[self.objective] + int(self.uses_delta)
        if self.largest_rate * form > 1.0:
            raise ValueError(
                f"largest_rate {self.largest_rate} with objective {self.objective}; allowed: at most 1 / {form}, so that "
                "|alpha - c eta| stays below 1; lower largest_rate"
            )
        return self


class MemoryLevelConfig(Section):
    """One level of a CMS in paper form."""

    period: int = Field(
        64,
        ge=0,
        description="Tokens (cadence tokens) or optimizer steps (cadence optimizer) between two updates; 0 never ticks "
        "inside a sequence: a plain MLP.",
    )
    hidden_units: int = Field(512, ge=1, description="Inner width of the level's MLP.")
    learning_rate: float = Field(
        0.25,
        ge=0.0,
        description="cadence tokens: rate of the in-context step per token, divided by d_model; the start when it is learned; 0 never "
        "writes.",
    )
    rate_scale: float = Field(
        1.0,
        ge=0.0,
        description="cadence optimizer: the level's learning rate as a multiple of the optimizer's; 0 keeps its start.",
    )


class CmsConfig(Section):
    """Continuum memory system (models.md 2.2 and 2.3)."""

    form: Literal["decay", "chain"] = Field(
        "decay", description="decay: linear memories; chain: the paper's MLP levels."
    )
    cadence: Literal["tokens", "optimizer"] = Field(
        "tokens",
        description="chain: levels learn inside each sequence, or are parameters updated every `period` steps.",
    )
    variant: Literal["sequential", "nested", "independent"] = Field("sequential", description="chain: how levels meet.")
    levels: tuple[MemoryLevelConfig, ...] = Field(
        (MemoryLevelConfig(period=64), MemoryLevelConfig(period=256)), description="chain: levels, fast to slow."
    )
    spread: Literal["every_block", "by_depth"] = Field(
        "every_block", description="chain: all levels in every block, or level i in blocks i, i + k, ... alone."
    )
    writes: Literal["differentiable", "stop_gradient"] = Field(
        "differentiable", description="chain, tokens: backpropagate through writes, or stop there (long streams)."
    )
    objective: Literal["l2", "dot"] = Field(
        "l2", description="chain, tokens: inner loss against the next token's value."
    )
    nested_rate: float = Field(
        0.5, ge=0.0, le=1.0, description="nested: share of the way that a start moves at a reset."
    )
    largest_growth: float = Field(
        1.0, ge=0.0, description="chain, tokens: bound of a level's change as a multiple of its start's norm; 0: none."
    )
    fastest_retention: float = Field(0.01, gt=0.0, lt=1.0, description="decay: tau of the fastest module.")
    slowest_retention: float = Field(0.99, gt=0.0, lt=1.0, description="decay: tau of the slowest module.")
    reads_after_write: bool = Field(True, description="decay: a token reads its own write.")
    corrects_bias: bool = Field(False, description="decay: divide reads by 1 - tau^t.")

    @model_validator(mode="after")
    def _check_cms(self) -> CmsConfig:
        if self.fastest_retention > self.slowest_retention:
            raise ValueError(
                f"fastest_retention {self.fastest_retention} above slowest_retention {self.slowest_retention}; allowed: "
                "fastest <= slowest; swap them"
            )
        periods = [level.period for level in self.levels]
        finite = [period for period in periods if period]
        in_order = bool(periods) and periods[: len(finite)] == finite
        if not in_order or any(slow % fast for fast, slow in pairwise(finite)):
            raise ValueError(
                f"level periods {periods}; allowed: one or more, fast to slow, each a multiple of the one before, 0 last; "
                "reorder the levels"
            )
        unused = "learning_rate" if self.cadence == "optimizer" else "rate_scale"
        default = MemoryLevelConfig.model_fields[unused].default
        if any(getattr(level, unused) != default for level in self.levels):
            used = "rate_scale" if self.cadence == "optimizer" else "learning_rate"
            raise ValueError(
                f"levels[].{unused} with cadence {self.cadence}, which has no use for it; allowed: {used}; set that one"
            )
        if self.variant == "nested" and self.cadence == "optimizer":
            raise ValueError("variant nested with cadence optimizer; allowed: cadence tokens; change one of them")
        return self


class HopeConfig(Section):
    """HOPE (models.md section 2). Defaults are the simple variant's."""

    family: Literal["hope"] = "hope"
    vocab_size: int = Field(32000, ge=2, description="Rows of the token table and of the head.")
    d_model: int = Field(512, ge=1, description="Width of the residual stream.")
    num_layers: int = Field(12, ge=1, description="Blocks.")
    num_heads: int = Field(8, ge=1, description="Heads of the mixer and of the CMS; must divide d_model.")
    d_feed_forward: int = Field(2048, ge=1, description="Inner width of the MLP.")
    positions: Literal["rotary", "learned", "none"] = Field(
        "rotary", description="rotary: angles in queries and keys, any length; learned: a table of max_tokens rows."
    )
    rotary_base: float = Field(10000.0, gt=1.0, description="Base of the rotary angles (arXiv 2104.09864).")
    max_tokens: int = Field(8192, ge=1, description="Longest sequence when positions are learned.")
    chunk_tokens: int = Field(
        64, ge=1, description="Tokens that linear memories compute at once; changes their speed, never their result."
    )
    mixer: Literal["attention", "linear", "self_modifying"] = Field(
        "attention", description="Token mixer of every block."
    )
    uses_cms: bool = Field(True, description="Give every block a continuum memory.")
    uses_mlp: bool = Field(True, description="Give every block an MLP.")
    num_memory_modules: int = Field(5, ge=1, description="Time scales of the decay-form CMS.")
    cms: CmsConfig = Field(CmsConfig(), description="Used with uses_cms.")
    self_modifying: SelfModifyingConfig = Field(SelfModifyingConfig(), description="Used with mixer self_modifying.")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="Dropout after mixer, CMS and MLP.")
    ties_embeddings: bool = Field(False, description="Share the token table with the head.")
    pad_id: int = Field(0, ge=0, description="Token id of padding.")

    @model_validator(mode="after")
    def _check_hope(self) -> HopeConfig:
        if self.d_model % self.num_heads:
            raise ValueError(
                f"num_heads {self.num_heads} does not divide d_model {self.d_model}; allowed: a divisor of the width; "
                "change num_heads or d_model"
            )
        if self.positions == "rotary" and (self.d_model // self.num_heads) % 2:
            raise ValueError(
                f"rotary positions with heads of {self.d_model // self.num_heads}; allowed: an even head width; "
                "change num_heads, or set positions to learned"
            )
        return self


class HsmnHopeConfig(HsmnConfig):
    """The hybrid: HSMN whose reasoning blocks carry a continuum memory over the target; all else as in HsmnConfig."""

    family: Literal["hsmn_hope"] = "hsmn_hope"  # type: ignore[assignment]
    cms: CmsConfig = Field(CmsConfig(), description="Continuum memory of every reasoning block.")
    num_memory_modules: int = Field(5, ge=1, description="Time scales of the decay-form CMS.")
    chunk_tokens: int = Field(
        64, ge=1, description="Tokens that linear memories compute at once; changes their speed, never their result."
    )


ModelConfig = Annotated[HsmnConfig | HopeConfig | HsmnHopeConfig, Field(discriminator="family")]
