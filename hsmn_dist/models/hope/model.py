"""HopeModel: token table, blocks, head; threads fast state through. And HOPE, the simple variant's interface.

Unusual: context and targets are one row ([bos] + context + targets, `rows.py`), logits exist for scored positions only
when a `target_loss` is given, and the head starts with standard deviation 0.2 / sqrt(D), so that the loss of a fresh model
is ln V (public code starts at 58 to 247 nats for 4,096 tokens). Source: models.md section 2; Nested Learning, NeurIPS
2025 (arXiv 2512.24695).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hsmn_dist.config.models import HopeConfig
from hsmn_dist.foundation.errors import ModelError
from hsmn_dist.foundation.param_role import ParamRole
from hsmn_dist.models.contract import BOS_ID, LanguageModel, ModelInput, ModelOutput, TargetLoss
from hsmn_dist.models.example_rows import example_rows
from hsmn_dist.models.hope import bad_input
from hsmn_dist.models.hope.block import BlockState
from hsmn_dist.models.hope.build_parts import build_block
from hsmn_dist.models.hope.fast_state import FastState
from hsmn_dist.models.hope.mixers import SequenceInfo
from hsmn_dist.models.hope.rows import Rows, build_rows, reset_points
from hsmn_dist.models.input_checks import check_continuations
from hsmn_dist.models.layers.dropout import Dropout
from hsmn_dist.models.layers.norms import RMSNorm
from hsmn_dist.models.layers.rotary import rotary_table


@dataclass
class HopeState(FastState):
    """Everything that a stream or a generation carries.

    Attributes:
        blocks: one `BlockState` per block.
        num_tokens: [B] tokens read so far (the next position).
        pending: [B] a stream's next token, not yet read (<bos> at its beginning); None behind `start` and `advance`.
    """

    blocks: list[BlockState] = field(default_factory=list)
    num_tokens: Tensor | None = None
    pending: Tensor | None = None


class HopeModel(LanguageModel):
    """HOPE behind the house's contract. Everything that differs between variants comes from `HopeConfig`."""

    def __init__(self, config: HopeConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = nn.Embedding(config.max_tokens, config.d_model) if config.positions == "learned" else None
        self.layers = nn.ModuleList(build_block(config, index) for index in range(config.num_layers))
        self.norm = RMSNorm(config.d_model)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.ties_embeddings:
            self.head.weight = self.embedding.weight
        # A tied table is as small as the head has to be; the stream starts at the untied size all the same.
        self.embedding_scale = 0.1 * config.d_model**0.5 if config.ties_embeddings else 1.0
        self.dropout = Dropout(config.dropout)
        self.init_weights()

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks, first to last."""
        return list(self.layers)

    def init_weights(self) -> None:
        """Normal(0, 0.02); maps that write into the stream divided by sqrt(2 layers); head 0.2 / sqrt(D)."""
        depth = (2 * self.config.num_layers) ** -0.5
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                is_output = name.rsplit(".", 1)[-1] in ("output", "outer")
                nn.init.normal_(module.weight, std=0.02 * (depth if is_output else 1.0))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.RMSNorm):
                nn.init.ones_(module.weight)
        for module in self.modules():
            draw = getattr(module, "init_weights", None)
            if module is not self and callable(draw):
                draw()
        nn.init.normal_(self.head.weight, std=0.2 * self.config.d_model**-0.5)

    def parameter_roles(self) -> dict[str, ParamRole]:
        """Linear weights are matrices; tables and head by name; per-head memories are matrices too."""
        roles: dict[str, ParamRole] = {}
        for name, parameter in self.named_parameters():
            if name.startswith(("embedding.", "positions.")):
                roles[name] = ParamRole.EMBEDDING
            elif name.startswith("head."):
                roles[name] = ParamRole.HEAD
            else:
                shape = getattr(parameter, "ds_shape", parameter.shape)
                is_vector = len(shape) < 2 or name.endswith(".convolution")
                roles[name] = ParamRole.VECTOR if is_vector else ParamRole.MATRIX
        return roles

    def parameter_components(self) -> dict[str, str]:
        """Of embedding, mixer, cms, mlp, head; a norm belongs to the part it feeds."""
        return {name: _component(name) for name, _ in self.named_parameters()}

    def initial_state(self, batch_size: int) -> HopeState:
        """An empty state: given to `forward`, it starts a stream whose state comes back."""
        device = self.norm.weight.device
        blocks = [BlockState() for _ in self.layers]
        zeros = torch.zeros(batch_size, dtype=torch.long, device=device)
        return HopeState(blocks, zeros, torch.full_like(zeros, BOS_ID))

    def forward(
        self, inputs: ModelInput, state: HopeState | None = None, target_loss: TargetLoss | None = None
    ) -> ModelOutput:
        """See `LanguageModel.forward`.

        With a `state` the row goes on where the state's stream stopped (its pending token stands in <bos>'s place) and
        the state after the last token comes back; without one there is neither.
        """
        first = None
        if state is not None:
            bad_input.check_state(state, HopeState, inputs.target_ids.shape[0])
            bad_input.check_stream(state.pending)
            first = state.pending
        rows = build_rows(inputs, first, self.config.pad_id)
        bad_input.check_tokens(inputs.target_ids, self.vocab_size)  # the last label is never read, and so not in `rows`
        hidden, blocks, aux = self._run(rows, state, returns_state=state is not None)
        after = None
        if state is not None and state.num_tokens is not None:
            after = HopeState(blocks, state.num_tokens + rows.valid.sum(1), rows.pending)
        if target_loss is None:
            width = inputs.target_ids.shape[1]
            places = rows.context_lengths[:, None] + torch.arange(width, device=hidden.device)
            picked = hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))
            return ModelOutput(logits=self.head(self.norm(picked)), state=after, aux=aux)
        return ModelOutput(nll=self._losses(hidden, rows.context_lengths, inputs, target_loss), state=after, aux=aux)

    def _losses(self, hidden: Tensor, lengths: Tensor, inputs: ModelInput, target_loss: TargetLoss) -> Tensor:
        """Losses [B, T] of the scored targets, which stand behind contexts of `lengths` [B] in `hidden` [B, L, D]."""
        if torch.compiler.is_compiling():  # a data-dependent shape would break the graph: pay for unscored targets
            num_rows, num_positions = inputs.loss_mask.shape
            index = torch.arange(num_rows * num_positions, device=hidden.device)
            batch_rows, positions = index // num_positions, index % num_positions
            places = lengths[:, None] + torch.arange(num_positions, device=hidden.device)
            scored = hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1])).flatten(0, 1)
            losses = target_loss(self.head(self.norm(scored)), inputs.target_ids.flatten(), batch_rows, positions)
            return losses.unflatten(0, (num_rows, num_positions)).masked_fill(~inputs.loss_mask, 0.0)
        batch_rows, positions = inputs.loss_mask.nonzero(as_tuple=True)
        # Without a context and with nothing padded or masked these are all tokens in order, which need no copy.
        takes_all = len(batch_rows) == hidden.shape[0] * hidden.shape[1]
        scored = hidden.flatten(0, 1) if takes_all else hidden[batch_rows, lengths[batch_rows] + positions]  # [M, D]
        labels = inputs.target_ids[batch_rows, positions]
        with example_rows(batch_rows):
            logits = self.head(self.norm(scored))
        losses = target_loss(logits, labels, batch_rows, positions)
        nll = torch.zeros(inputs.target_ids.shape, dtype=losses.dtype, device=losses.device)
        return nll.index_put((batch_rows, positions), losses)

    def score_continuations(self, inputs: ModelInput, owners: Tensor, target_loss: TargetLoss | None) -> ModelOutput:
        """See `LanguageModel.score_continuations`: each context is read once, its last token pending."""
        check_continuations(inputs, owners)
        bad_input.check_context(inputs.context_ids, inputs.context_mask)
        lengths = inputs.context_mask.sum(1)
        if not bool((lengths > 0).all()):
            return super().score_continuations(inputs, owners, target_loss)
        first = torch.full_like(inputs.context_ids[:, :1], BOS_ID)
        # <bos> takes one place in front, and the pending token one at the end: `lengths` tokens are read.
        _, state = self.read(torch.cat([first, inputs.context_ids[:, :-1]], 1), lengths)
        state.pending = inputs.context_ids.gather(1, lengths[:, None] - 1)[:, 0]
        nothing = inputs.target_ids[:, :0]
        rest = ModelInput(nothing, nothing.bool(), inputs.target_ids, inputs.loss_mask)
        return self.forward(rest, state.rows(owners), target_loss)

    def start(self, context_ids: Tensor, context_mask: Tensor) -> tuple[Tensor, HopeState]:
        """See `LanguageModel.start`."""
        bad_input.check_context(context_ids, context_mask)
        first = torch.full_like(context_ids[:, :1], BOS_ID) if context_ids.shape[1] else None
        if first is None:
            first = torch.full((context_ids.shape[0], 1), BOS_ID, dtype=torch.long, device=context_mask.device)
        return self.read(torch.cat([first, context_ids], 1), context_mask.sum(1) + 1)

    def read(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, HopeState]:
        """Read rows [B, L] of `lengths` [B] tokens (no <bos> is added): logits [B, V] after the last one, and the state."""
        index = torch.arange(tokens.shape[1], device=tokens.device)[None].expand(tokens.shape[0], -1)
        valid = index < lengths[:, None]
        tokens = torch.where(valid, tokens, torch.full_like(tokens, self.config.pad_id))
        rows = Rows(tokens, lengths - 1, index, None, valid, tokens[:, 0])
        hidden, blocks, _ = self._run(rows, self.initial_state(tokens.shape[0]), returns_state=True)
        last = hidden.gather(1, (lengths - 1)[:, None, None].expand(-1, 1, hidden.shape[-1]))[:, 0]
        return self.head(self.norm(last)), HopeState(blocks, lengths)

    def advance(self, token_ids: Tensor, state: HopeState) -> tuple[Tensor, HopeState]:
        """See `LanguageModel.advance`. What a stream left pending is read first."""
        bad_input.check_next(token_ids)
        bad_input.check_state(state, HopeState, token_ids.shape[0])
        assert state.num_tokens is not None
        tokens = token_ids[:, None] if state.pending is None else torch.stack([state.pending, token_ids], 1)
        index = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        rows = Rows(tokens, index[:, 0], index, None, torch.ones_like(tokens, dtype=torch.bool), token_ids)
        hidden, blocks, _ = self._run(rows, state, returns_state=True, all_valid=True)
        return self.head(self.norm(hidden[:, -1])), HopeState(blocks, state.num_tokens + tokens.shape[1])

    def _run(
        self, rows: Rows, state: HopeState | None, *, returns_state: bool, all_valid: bool = False
    ) -> tuple[Tensor, list[BlockState], dict[str, Tensor]]:
        """The stream [B, L, D] behind the last block, the blocks' states, and their health scalars (means)."""
        positions = rows.positions
        if state is not None and state.num_tokens is not None:
            continues = torch.ones_like(positions, dtype=torch.bool) if rows.segments is None else rows.segments == 0
            positions = positions + state.num_tokens[:, None] * continues
        bad_input.check_tokens(rows.tokens, self.vocab_size)
        info = self._sequence_info(rows, positions, returns_state, all_valid)
        x = self.embedding(rows.tokens) * self.embedding_scale
        if self.positions is not None:
            bad_input.check_positions(positions, rows.valid, self.config.max_tokens)
            x = x + self.positions(positions.clamp(max=self.config.max_tokens - 1))
        x = self.dropout(x)
        blocks: list[BlockState] = []
        aux: dict[str, Tensor] = {}
        for index, block in enumerate(self.layers):
            x, after, health = block(x, None if state is None else state.blocks[index], info)
            if after is not None:
                blocks.append(after)
            aux.update({f"{name}/block_{index}": value for name, value in health.items()})
        return x, blocks, aux

    def _sequence_info(self, rows: Rows, positions: Tensor, returns_state: bool, all_valid: bool) -> SequenceInfo:
        info = SequenceInfo(segments=rows.segments, returns_state=returns_state)
        if returns_state and not all_valid:
            info.valid = rows.valid
        elif not all_valid:
            info.is_real = rows.valid
        if self.config.positions == "rotary":
            width = self.config.d_model // self.config.num_heads
            info.rotary = rotary_table(positions, width, self.config.rotary_base)
        if rows.segments is not None:
            info.reset = reset_points(rows.segments)
            if self.config.mixer == "attention":
                length = rows.segments.shape[1]
                causal = torch.ones(length, length, dtype=torch.bool, device=positions.device).tril()
                info.mask = (causal & (rows.segments[:, :, None] == rows.segments[:, None, :]))[:, None]
        return info


class HOPE(nn.Module):
    """The simple variant's interface, a thin wrapper around `HopeModel`.

    Args:
        vocab_size: V.
        dim: D.
        num_layers: blocks.
        num_heads: H.
        num_memory_modules: time scales of the CMS.
        use_cms: False removes exactly the CMS branch.
        **options: further fields of `HopeConfig`.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int = 512,
        num_layers: int = 12,
        num_heads: int = 8,
        num_memory_modules: int = 5,
        use_cms: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        settings: dict[str, Any] = {
            "vocab_size": vocab_size,
            "d_model": dim,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "d_feed_forward": 4 * dim,
            "num_memory_modules": num_memory_modules,
            "uses_cms": use_cms,
        }
        try:
            config = HopeConfig(**{**settings, **options})
        except ValueError as error:
            raise ModelError(
                f"HOPE({settings | options}): {error}",
                allowed="the fields of HopeConfig, with num_heads dividing dim",
                action="correct the argument named above",
            ) from None
        self.model = HopeModel(config)

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, targets_are_shifted: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Logits [B, T, V] after every token, and the mean loss in nats (None without targets).

        Args:
            tokens: [B, T] ids, T >= 1; nothing is put in front of them.
            targets: [B, T] labels of the same positions as `tokens`: the model predicts targets[:, t + 1] from tokens up
                to t, as in `model(tokens, tokens)`. Labels below 0 are not scored; without any other the loss is 0.
            targets_are_shifted: targets[:, t] is already the label of position t.
        """
        bad_input.check_simple(tokens, targets, targets_are_shifted, self.model.vocab_size)
        index = torch.arange(tokens.shape[1], device=tokens.device)[None].expand(tokens.shape[0], -1)
        valid = torch.ones_like(tokens, dtype=torch.bool)
        rows = Rows(tokens, torch.zeros_like(tokens[:, 0]), index, None, valid, tokens[:, -1])
        hidden, _, _ = self.model._run(rows, None, returns_state=False)
        logits = self.model.head(self.model.norm(hidden))
        if targets is None:
            return logits, None
        scored, labels = (logits, targets) if targets_are_shifted else (logits[:, :-1], targets[:, 1:])
        labels = torch.where(labels < 0, torch.full_like(labels, -100), labels)
        loss = nn.functional.cross_entropy(scored.flatten(0, 1).float(), labels.flatten())
        # The mean over nothing is NaN, and one such batch would end a training.
        return logits, torch.where((labels >= 0).any(), loss, torch.zeros_like(loss))

    @torch.no_grad()
    def generate(self, prompt: Tensor, max_new_tokens: int = 50, temperature: float = 0.8) -> Tensor:
        """Append `max_new_tokens` sampled tokens to `prompt` [B, T]; temperature 0 takes the likeliest: [B, T + new]."""
        bad_input.check_simple(prompt, None, False, self.model.vocab_size)
        bad_input.check_generation(max_new_tokens, temperature)
        was_training = self.training
        self.eval()
        try:
            return self._continued(prompt, max_new_tokens, temperature)
        finally:
            self.train(was_training)

    def _continued(self, prompt: Tensor, max_new_tokens: int, temperature: float) -> Tensor:
        lengths = torch.full((prompt.shape[0],), prompt.shape[1], device=prompt.device)
        logits, state = self.model.read(prompt, lengths)
        tokens = [prompt]
        for number in range(max_new_tokens):
            if temperature > 0:
                token = torch.multinomial(torch.softmax(logits.float() / temperature, -1), 1)
            else:
                token = logits.argmax(-1, keepdim=True)
            tokens.append(token)
            if number + 1 < max_new_tokens:
                logits, state = self.model.advance(token[:, 0], state)
        return torch.cat(tokens, 1)


def _component(name: str) -> str:
    if name.startswith(("embedding.", "positions.")):
        return "embedding"
    for part in ("mixer", "cms", "mlp"):
        if f".{part}." in name or f".{part}_norm." in name:
            return part
    return "head"
