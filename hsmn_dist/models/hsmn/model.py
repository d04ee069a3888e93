"""HsmnModel: chunks, chunk embeddings, memory tree and reasoning decoder, in this order.

Unusual: only chunks with a real token are encoded (those of the whole batch as one flat batch), only scored target positions
get logits, and a row with nothing to read or to score costs no special path. Source: HSMN paper; models.md section 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hsmn_dist.config.models import HsmnConfig, HsmnHopeConfig
from hsmn_dist.foundation.param_role import ParamRole
from hsmn_dist.models.contract import BOS_ID, LanguageModel, ModelInput, ModelOutput, TargetLoss
from hsmn_dist.models.example_rows import tied_linear
from hsmn_dist.models.hsmn import bad_input
from hsmn_dist.models.hsmn.chunk_encoder import ChunkEncoder, EncoderGroups, EncoderLayer, announced_rows
from hsmn_dist.models.hsmn.chunker import Chunks, StreamingChunker
from hsmn_dist.models.hsmn.initial_weights import draw_weights
from hsmn_dist.models.hsmn.leaf_exchange import LeafExchange
from hsmn_dist.models.hsmn.memory_codes import MemoryCodes
from hsmn_dist.models.hsmn.memory_tree import MemoryTree, Tree, node_layout
from hsmn_dist.models.hsmn.reasoning_decoder import DecoderState, ReasoningBlock, ReasoningDecoder
from hsmn_dist.models.input_checks import check_continuations

COMPONENTS = {
    "context_embedding": "embedding",
    "target_embedding": "embedding",
    "encoder": "encoder",
    "compressor": "compressor",
    "tree": "aggregator",
    "decompressor": "decompressor",
    "memory_codes": "decompressor",
    "decoder": "decoder",
    "head": "head",
}


@dataclass
class HsmnState:
    """A context that was read, and the target so far.

    Attributes:
        decoder: caches; may be advanced once (use `fork` to go on in two ways).
        pending: [B] the last target token, not yet read by the decoder; None when all were read.
    """

    decoder: DecoderState
    pending: Tensor | None = None

    @property
    def batch_size(self) -> int:
        """Rows of the batch that this state belongs to."""
        return self.decoder.batch_size

    def fork(self) -> HsmnState:
        """An independent copy."""
        return HsmnState(self.decoder.fork(), self.pending)


class HsmnModel(LanguageModel):
    """Context tokens [B, n] and target tokens [B, T] -> logits [B, T, V]."""

    def __init__(self, config: HsmnConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.max_target_tokens = config.max_target_tokens
        width, is_pre_norm = config.d_model, config.norm_placement == "pre"
        self.chunker = StreamingChunker(config.chunk_size, config.chunk_stride, config.min_chunks, config.pad_id)
        self.context_embedding = nn.Embedding(config.vocab_size, width)
        layers = [
            EncoderLayer(
                width, config.num_heads, config.d_feed_forward, config.encoder_dropout, config.activation, is_pre_norm
            )
            for _ in range(config.num_encoder_layers)
        ]
        groups = EncoderGroups(config.encoder_group_chunks, config.encoder_recompute)
        self.encoder = ChunkEncoder(layers, width, config.chunk_size, config.encoder_dropout, groups)
        self.compressor = nn.Linear(width, config.d_compressed)
        self.tree = MemoryTree(config.d_compressed, config.d_aggregator, config.aggregator_rank)
        self.decompressor = nn.Linear(config.d_compressed, width)
        self.memory_codes = MemoryCodes(width) if config.uses_level_embedding else None
        self.target_embedding = nn.Embedding(config.vocab_size, width)
        self.decoder = ReasoningDecoder(
            [self._build_block(config, index) for index in range(config.num_decoder_layers)],
            width,
            config.max_target_tokens,
            config.decoder_dropout,
        )
        self.head = None if config.ties_embeddings else nn.Linear(width, config.vocab_size, bias=False)
        self.embedding_scale = width**0.5 if config.ties_embeddings else 1.0
        self.leaf_exchange: LeafExchange | None = None

    @staticmethod
    def _build_block(config: HsmnConfig, index: int) -> ReasoningBlock:
        cms = None
        if isinstance(config, HsmnHopeConfig):
            from hsmn_dist.models.hsmn.target_memory import TargetMemory

            cms = TargetMemory(config, index)
        return ReasoningBlock(
            config.d_model,
            config.num_heads,
            config.d_feed_forward,
            config.decoder_dropout,
            config.activation,
            config.norm_placement == "pre",
            config.attention_span_tokens,
            cms,
        )

    # What training needs to know.

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Encoder layers, then decoder blocks."""
        return [*self.encoder.layers, *self.decoder.blocks]

    @property
    def gathered_whole(self) -> tuple[type[nn.Module], ...]:
        """The tree (a call per level), and the encoder when it works in groups."""
        return (MemoryTree, ChunkEncoder) if self.config.encoder_group_chunks else (MemoryTree,)

    def parameter_roles(self) -> dict[str, ParamRole]:
        """Role of every parameter, from the kind of module that holds it."""
        roles = {}
        for path, module in self.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 empties the tensor itself
                role = ParamRole.MATRIX if len(shape) > 1 else ParamRole.VECTOR
                if isinstance(module, nn.Embedding):
                    role = ParamRole.EMBEDDING
                elif module is self.head:
                    role = ParamRole.HEAD
                roles[f"{path}.{name}"] = role
        return roles

    def parameter_components(self) -> dict[str, str]:
        """Component of every parameter, by the part of the model that owns it; a hybrid's memories are "cms"."""
        return {
            name: "cms" if ".cms." in name or ".cms_norm." in name else COMPONENTS[name.split(".", 1)[0]]
            for name, _ in self.named_parameters()
        }

    def prunable_parameters(self) -> list[str]:
        """The Aggregator's factors, compressor, decompressor, and the head unless it is tied."""
        parts = [*(f"tree.aggregator.{map}.{factor}" for map in ("inner", "outer") for factor in ("first", "second"))]
        parts += ["compressor", "decompressor", *([] if self.head is None else ["head"])]
        return [f"{part}.weight" for part in parts]

    def init_weights(self) -> None:
        """Draw every parameter anew (see `initial_weights`)."""
        draw_weights(self, self.context_embedding, self.target_embedding, self.head)

    # Context to memory.

    def read_context(self, context_ids: Tensor, context_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Context [B, n] and mask -> memory nodes [B, N, D] and [B, N] bool, which of them may be attended to."""
        chunks = self.chunker(context_ids, context_mask)
        is_owned = torch.arange(chunks.mask.shape[1], device=context_ids.device) < chunks.num_chunks[:, None]
        has_tokens = is_owned & chunks.mask.any(dim=-1)  # [B, C]
        leaves = self.encode_chunks(chunks.ids, chunks.mask, has_tokens)
        tree = self.tree(leaves, has_tokens, chunks.num_chunks)
        return self._decompress(tree, chunks), tree.is_valid

    def encode_chunks(self, ids: Tensor, mask: Tensor, has_tokens: Tensor) -> Tensor:
        """Chunks [B, C, S] -> compressed leaves [B, C, k]; zeros where `has_tokens` [B, C] is False."""
        num_examples, num_chunks, chunk_size = ids.shape
        flat_ids, flat_mask = ids.reshape(-1, chunk_size), mask.reshape(-1, chunk_size)
        owners = torch.arange(num_examples, device=ids.device).repeat_interleave(num_chunks)
        if torch.compiler.is_compiling():  # a data-dependent shape would break the graph: pay for padding chunks
            encoded = self._encode_rows(flat_ids, flat_mask, owners)
        else:
            index = has_tokens.flatten().nonzero().squeeze(1)
            if index.numel() == 0:  # every rank must run the encoder, also one that has nothing to read
                index = torch.zeros(1, dtype=torch.int64, device=ids.device)
            rows = self._encode_divided(flat_ids, flat_mask, owners, index)
            encoded = rows.new_zeros(flat_ids.shape[0], rows.shape[1]).index_copy(0, index, rows)
        leaves = encoded.unflatten(0, (num_examples, num_chunks))
        return leaves.masked_fill(~has_tokens[..., None], 0.0)

    def _encode_divided(self, ids: Tensor, mask: Tensor, owners: Tensor, index: Tensor) -> Tensor:
        """Rows `index` [R] of the flat chunks, encoded here or, with an exchange, by several parties -> [R, k]."""
        if self.leaf_exchange is None:
            return self._encode_rows(ids[index], mask[index], owners[index])
        own = index[self.leaf_exchange.share(index.numel())]
        some = own if own.numel() else index[:1]  # a party without a chunk runs the encoder too, on a row that it drops
        rows = self._encode_rows(ids[some], mask[some], owners[some])[: own.numel()]
        return self.leaf_exchange.gather(rows, index.numel())

    def _encode_rows(self, ids: Tensor, mask: Tensor, owners: Tensor) -> Tensor:
        """Chunks [R, S] of the examples `owners` [R] -> [R, k]."""
        is_divided = 0 < self.config.encoder_group_chunks < ids.shape[0]
        if torch.compiler.is_compiling() or not is_divided:
            with announced_rows(owners):
                return self.compressor(self.encoder(self.context_embedding(ids), mask))
        # Chunks overlap and tokens repeat: each token of an example is looked up once, and the groups share the rows.
        distinct, index = torch.unique(owners[:, None] * self.vocab_size + ids, return_inverse=True)
        with announced_rows(distinct // self.vocab_size):
            rows = self.context_embedding(distinct % self.vocab_size)  # [U, D]
        with announced_rows(owners):
            return self.compressor(self.encoder(rows, mask, index))

    def _decompress(self, tree: Tree, chunks: Chunks) -> Tensor:
        num_examples, num_leaves = chunks.mask.shape[:2]
        layout, device = node_layout(num_leaves), chunks.mask.device
        shape = (num_examples, layout.num_nodes)
        level = torch.tensor(layout.level, device=device).expand(shape)
        first = torch.tensor(layout.first_leaf, device=device).expand(shape)
        last = torch.tensor(layout.last_leaf, device=device).expand(shape)
        return self.decompress_nodes(tree.values, level, first, torch.minimum(last, chunks.num_chunks[:, None]))

    def decompress_nodes(self, values: Tensor, level: Tensor, first_leaf: Tensor, last_leaf: Tensor) -> Tensor:
        """Node values [B, N, k] with level and span (each [B, N]) -> what the decoder attends to, [B, N, D]."""
        nodes = self.decompressor(values)
        if self.memory_codes is None:
            return nodes
        return nodes + self.memory_codes(level, first_leaf, last_leaf, values.dtype).to(nodes.dtype)

    # Target to logits.

    def forward(
        self, inputs: ModelInput, state: HsmnState | None = None, target_loss: TargetLoss | None = None
    ) -> ModelOutput:
        """One pass over the whole target; or, with a `state` of `open_target`, over its next window.

        With a state the context is in it already, and `inputs.target_ids` go on where the last window ended; the new state
        comes back in the output. Raises ModelError on inputs that the model cannot take.
        """
        bad_input.check_inputs(inputs, self.config, state)
        if state is None:
            memory, is_valid = self.read_context(inputs.context_ids, inputs.context_mask)
            first = torch.full_like(inputs.target_ids[:, :1], BOS_ID)
            embedded = self._embed_target(torch.cat([first, inputs.target_ids[:, :-1]], dim=1))
            hidden, health = self.decoder(embedded, memory, is_valid[:, None, None, :])
            output = self._score(hidden, inputs, target_loss)
            output.aux = health
            return output
        assert state.pending is not None
        embedded = self._embed_target(torch.cat([state.pending[:, None], inputs.target_ids[:, :-1]], dim=1))
        hidden, decoder = self.decoder.extend(embedded, state.decoder)
        output = self._score(hidden, inputs, target_loss)
        output.state = HsmnState(decoder, inputs.target_ids[:, -1])
        return output

    def forward_windows(self, inputs: ModelInput, target_loss: TargetLoss | None = None) -> ModelOutput:
        """As `forward`, the target read in windows of `window_size` with cached keys and values: equal results.

        Saves attention memory on long targets without gradients. The number of windows depends on the batch, so this is not
        for ZeRO-3 ranks that must stay in step.
        """
        bad_input.check_inputs(inputs, self.config, None)
        memory, is_valid = self.read_context(inputs.context_ids, inputs.context_mask)
        return self._score_windows(self.open_target(memory, is_valid), inputs, target_loss)

    def score_continuations(self, inputs: ModelInput, owners: Tensor, target_loss: TargetLoss | None) -> ModelOutput:
        """See `LanguageModel.score_continuations`: the tree of each context is built once."""
        check_continuations(inputs, owners)
        bad_input.check_context(inputs.context_ids, inputs.context_mask, self.config)
        memory, is_valid = self.read_context(inputs.context_ids, inputs.context_mask)
        state = self.open_target(memory.index_select(0, owners), is_valid.index_select(0, owners))
        return self._score_windows(state, inputs, target_loss)

    def _score_windows(self, state: HsmnState, inputs: ModelInput, target_loss: TargetLoss | None) -> ModelOutput:
        parts = []
        for start in range(0, inputs.target_ids.shape[1], self.config.window_size):
            window = slice(start, start + self.config.window_size)
            part = ModelInput(
                inputs.context_ids,
                inputs.context_mask,
                inputs.target_ids[:, window],
                inputs.loss_mask[:, window],
            )
            output = self.forward(part, state, target_loss)
            state = output.state
            parts.append(output)
        if target_loss is None:
            return ModelOutput(logits=torch.cat([part.logits for part in parts if part.logits is not None], dim=1))
        return ModelOutput(nll=torch.cat([part.nll for part in parts if part.nll is not None], dim=1))

    def _embed_target(self, ids: Tensor) -> Tensor:
        embedded = self.target_embedding(ids)
        return embedded * self.embedding_scale if self.head is None else embedded  # [B, T, D]

    def _logits(self, hidden: Tensor) -> Tensor:
        if self.head is None:
            # A tied head reads the table outside its module; ZeRO-3 registers it as an external parameter by itself.
            if torch.compiler.is_compiling():
                return F.linear(hidden, self.target_embedding.weight)
            return tied_linear(hidden, self.target_embedding.weight)
        return self.head(hidden)

    def _score(self, hidden: Tensor, inputs: ModelInput, target_loss: TargetLoss | None) -> ModelOutput:
        if target_loss is None:
            return ModelOutput(logits=self._logits(hidden))  # [B, T, V]
        if torch.compiler.is_compiling():
            num_rows, num_positions = inputs.loss_mask.shape
            index = torch.arange(num_rows * num_positions, device=hidden.device)
            rows, positions = index // num_positions, index % num_positions
            losses = target_loss(self._logits(hidden.flatten(0, 1)), inputs.target_ids.flatten(), rows, positions)
            nll = losses.float().unflatten(0, (num_rows, num_positions))
            return ModelOutput(nll=nll.masked_fill(~inputs.loss_mask, 0.0))
        rows, positions = inputs.loss_mask.nonzero(as_tuple=True)  # [M]
        with announced_rows(rows):
            logits = self._logits(hidden[rows, positions])  # [M, V]
        losses = target_loss(logits, inputs.target_ids[rows, positions], rows, positions)
        nll = torch.zeros(inputs.loss_mask.shape, dtype=losses.dtype, device=losses.device)
        return ModelOutput(nll=nll.index_put((rows, positions), losses))

    # Generation.

    def open_target(self, memory: Tensor, is_valid: Tensor) -> HsmnState:
        """A state before the first target token, over memory nodes [B, N, D] with [B, N] bool validity."""
        decoder = self.decoder.start(memory, is_valid[:, None, None, :])
        first = torch.full((memory.shape[0],), BOS_ID, dtype=torch.int64, device=memory.device)
        return HsmnState(decoder, first)

    def start(self, context_ids: Tensor, context_mask: Tensor) -> tuple[Tensor, HsmnState]:
        """Read a context: logits [B, V] of the first target token, and a decoding state."""
        bad_input.check_context(context_ids, context_mask, self.config)
        return self._consume(None, self.open_target(*self.read_context(context_ids, context_mask)))

    def start_from_memory(self, memory: Tensor, is_valid: Tensor) -> tuple[Tensor, HsmnState]:
        """As `start`, over memory nodes that exist already (`StreamingMemory.nodes`)."""
        return self._consume(None, self.open_target(memory, is_valid))

    def advance(self, token_ids: Tensor, state: Any) -> tuple[Tensor, HsmnState]:
        """Append one token [B] to the target: logits [B, V] of the next one; `state` must not be used again."""
        bad_input.check_token(token_ids, state, self.config)
        return self._consume(token_ids, state)

    def _consume(self, token_ids: Tensor | None, state: HsmnState) -> tuple[Tensor, HsmnState]:
        ids = [tokens for tokens in (state.pending, token_ids) if tokens is not None]
        hidden, decoder = self.decoder.extend(self._embed_target(torch.stack(ids, dim=1)), state.decoder)
        return self._logits(hidden[:, -1]), HsmnState(decoder)
